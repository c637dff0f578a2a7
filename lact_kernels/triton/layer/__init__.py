"""Kernels of what a LaCT layer does before and after its two operations."""
