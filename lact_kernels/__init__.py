"""Fused kernels for the two operations of a LaCT layer.

`window_attn` is attention in a sliding window, causal or with later tokens. `block_causal_ttt` is the
chunk-by-chunk training of a SwiGLU fast-weight network while the sequence is read ("Test-Time Training Done
Right", arXiv 2505.23884), and `ttt` the same in any order of updates and applies. They run forward and
backward on any device, and on NVIDIA GPUs through Triton. Importing this package imports no Triton and
touches no GPU.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.ttt_plan import Apply, TTTPlan, Update
from lact_kernels.core.version import __version__ as __version__
from lact_kernels.layers import LaCTCache, LaCTLayer
from lact_kernels.layers.contexts import Context, context_of_pieces
from lact_kernels.ops.block_causal_ttt import TTTState, TTTTokens, block_causal_ttt
from lact_kernels.ops.ring_kv_cache import RingKVCache
from lact_kernels.ops.ttt import ttt, ttt_update
from lact_kernels.ops.ttt_apply import ttt_apply
from lact_kernels.ops.window_attn import window_attn
from lact_kernels.ops.window_attn_with_kvcache import window_attn_with_kvcache

__all__ = [
    "Apply",
    "LaCTCache",
    "LaCTLayer",
    "NewtonSchulz",
    "RingKVCache",
    "TTTPlan",
    "TTTState",
    "TTTTokens",
    "Update",
    "block_causal_ttt",
    "ttt",
    "ttt_apply",
    "ttt_update",
    "window_attn",
    "window_attn_with_kvcache",
]


@context_of_pieces.register(DeviceMesh)
def _context_of_mesh(mesh: DeviceMesh, x: Tensor, cu_seqlens: Tensor | None) -> Context:
    # Imported when a layer is first given a mesh: it takes a second, and imports Triton.
    from lact_kernels.distributed import SequencePieces

    return context_of_pieces(SequencePieces.of(mesh, x.shape[1], cu_seqlens), x, None)
