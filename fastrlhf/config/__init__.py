"""Typed configurations: fields, defaults, checks, recipes. Imports no torch."""
