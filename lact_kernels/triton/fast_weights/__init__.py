"""Kernels of `block_causal_ttt`."""
