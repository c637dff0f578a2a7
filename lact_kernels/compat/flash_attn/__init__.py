"""flash-attn 2.8's functions, for causal attention in a window.

Each function has the signature, the defaults and the results of flash-attn's function of the same name. An
option that asks for anything but causal attention raises `NotImplementedError`. The default does so, too:
flash-attn's `causal` is False.
"""

from lact_kernels.compat.flash_attn.dense import flash_attn_func, flash_attn_qkvpacked_func
from lact_kernels.compat.flash_attn.kvcache import flash_attn_with_kvcache
from lact_kernels.compat.flash_attn.varlen import flash_attn_varlen_func

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]
