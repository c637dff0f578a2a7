"""Signatures that people already call, computed by `lact_kernels`. To migrate, replace an import."""

from lact_kernels.compat.lact import block_causal_lact_swiglu, prenorm_block_causal_lact_swiglu

__all__ = ["block_causal_lact_swiglu", "prenorm_block_causal_lact_swiglu"]
