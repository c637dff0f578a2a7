"""Long sequences and wide layers on several devices, on PyTorch's own process groups and meshes."""

from lact_kernels.distributed.block_causal_ttt import block_causal_ttt
from lact_kernels.distributed.context import ShardedContext
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.tensor_parallel import HeadParallel, tensor_parallel_plan
from lact_kernels.distributed.ttt import ttt
from lact_kernels.distributed.window_attn import window_attn
from lact_kernels.layers.contexts import context_of_pieces

__all__ = [
    "HeadParallel",
    "SequencePieces",
    "block_causal_ttt",
    "tensor_parallel_plan",
    "ttt",
    "window_attn",
]

context_of_pieces.register(SequencePieces, ShardedContext.of)
