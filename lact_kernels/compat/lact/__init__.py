"""What the LaCT authors' repository offers, computed by `lact_kernels`: functions, layers, whole models.

Functions and layers are called as theirs are. `swap_lact_layers` puts our layers in the place of theirs in a
model that exists.
"""

from lact_kernels.compat.lact.language_model import (
    LaCTSWIGLULayer,
    block_causal_lact_swiglu,
    prenorm_block_causal_lact_swiglu,
)
from lact_kernels.compat.lact.swap import swap_lact_layers

__all__ = [
    "LaCTSWIGLULayer",
    "block_causal_lact_swiglu",
    "prenorm_block_causal_lact_swiglu",
    "swap_lact_layers",
]
