"""Long sequences and wide layers on several devices, on PyTorch's own process groups and meshes."""

from lact_kernels.distributed.block_causal_ttt import block_causal_ttt
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.tensor_parallel import HeadParallel, tensor_parallel_plan
from lact_kernels.distributed.window_attn import window_attn

__all__ = [
    "HeadParallel",
    "SequencePieces",
    "block_causal_ttt",
    "tensor_parallel_plan",
    "window_attn",
]
