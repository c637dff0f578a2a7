"""Signatures of other packages, computed by `lact_kernels`. To migrate, change an import."""

from lact_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from lact_kernels.compat.lact import (
    block_causal_lact_swiglu,
    prenorm_block_causal_lact_swiglu,
    swap_lact_layers,
)

__all__ = [
    "block_causal_lact_swiglu",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "prenorm_block_causal_lact_swiglu",
    "swap_lact_layers",
]
