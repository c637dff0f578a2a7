"""flash-attn 2.8's functions, computed by `lact_kernels`.

Each function has the signature, the defaults and the results of flash-attn's function of the same name:
causal and bidirectional attention, in a window or without, with soft caps. An option that is not here raises
`NotImplementedError`, which names it.
"""

from lact_kernels.compat.flash_attn.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from lact_kernels.compat.flash_attn.kvcache import flash_attn_with_kvcache
from lact_kernels.compat.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
