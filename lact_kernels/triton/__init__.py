"""Triton kernels and their launchers, one module per pass; imported only when a launcher runs."""
