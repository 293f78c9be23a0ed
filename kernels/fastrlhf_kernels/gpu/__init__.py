"""Triton kernels and their launchers, one operation a file. Imported only where a call goes to Triton."""
