"""What the LaCT authors' repository offers, computed by `lact_kernels`: functions, layers, whole models.

Functions and layers have the names of theirs, and are called as theirs are. `swap_lact_layers` puts our
layers in the place of theirs in a model that exists.
"""

from lact_kernels.compat.lact.bidirectional import (
    BidirectionalLaCTSwiGLU,
    bidirectional_lact_swiglu,
)
from lact_kernels.compat.lact.language_model import (
    LaCTSWIGLULayer,
    block_causal_lact_swiglu,
    prenorm_block_causal_lact_swiglu,
)
from lact_kernels.compat.lact.sliding_window import CausalLaCTSwiGLUWithSlidingWindowAttn
from lact_kernels.compat.lact.swap import swap_lact_layers
from lact_kernels.compat.lact.video import (
    ar_fast_weight_swish_glu_weight_norm_mini_batch,
    ar_fast_weight_swish_glu_weight_norm_mini_batch_inference,
)
from lact_kernels.compat.lact.views import (
    FastWeightGluMLPMultihead,
    TTTOperator,
    fast_weight_swish_glu_weight_norm_mini_batch_apply,
)

__all__ = [
    "BidirectionalLaCTSwiGLU",
    "CausalLaCTSwiGLUWithSlidingWindowAttn",
    "FastWeightGluMLPMultihead",
    "LaCTSWIGLULayer",
    "TTTOperator",
    "ar_fast_weight_swish_glu_weight_norm_mini_batch",
    "ar_fast_weight_swish_glu_weight_norm_mini_batch_inference",
    "bidirectional_lact_swiglu",
    "block_causal_lact_swiglu",
    "fast_weight_swish_glu_weight_norm_mini_batch_apply",
    "prenorm_block_causal_lact_swiglu",
    "swap_lact_layers",
]
