"""Kernels of `window_attn` and `window_attn_with_kvcache`."""
