"""Kernels of test-time training."""
