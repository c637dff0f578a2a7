"""The operations as plainly as they can be written: the oracle that every backend is held against.

Dense masks and chunk loops, gradients by autograd, any float dtype, float64 included. Nothing in
`lact_kernels` imports this package, and this package imports only torch.
"""

from reference.block_causal_ttt import block_causal_ttt
from reference.lact_layer import lact_layer
from reference.ttt import ttt
from reference.ttt_apply import ttt_apply
from reference.window_attn import window_attn
from reference.window_attn_with_kvcache import window_attn_with_kvcache

__all__ = [
    "block_causal_ttt",
    "lact_layer",
    "ttt",
    "ttt_apply",
    "window_attn",
    "window_attn_with_kvcache",
]
