"""Rows of human feedback in, token ids out."""
