"""The `Context` of a layer whose sequences the ranks of a mesh share (see `layers/contexts.py`)."""

from torch import Tensor

from lact_kernels.distributed.block_causal_ttt import block_causal_ttt
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.window_attn import window_attn


class ShardedContext:
    """This rank's shards of the sequences. Both operations are collective."""

    def __init__(self, pieces: SequencePieces):
        self.pieces = pieces

    @classmethod
    def of(cls, pieces: SequencePieces, x: Tensor, cu_seqlens: Tensor | None) -> "ShardedContext":
        """Of the tokens `x [B, t, C]`. The borders of packed sequences come with the pieces alone."""
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens and pieces exclude each other: pieces have borders")
        pieces.check_tokens("hidden_states", x)
        return cls(pieces)

    @property
    def T(self) -> int:
        return self.pieces.num_local_tokens

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.pieces.cu_seqlens

    def of_groups(self, size: int) -> "ShardedContext":
        return ShardedContext(self.pieces.of_groups(size))

    def positions(self, x: Tensor) -> Tensor:
        return self.pieces.positions(x.device)[None]

    def window_attn(self, q, k, v, window_size, *, backend) -> Tensor:
        return window_attn(q, k, v, window_size, pieces=self.pieces, backend=backend)

    def block_causal_ttt(self, *tensors, **options) -> Tensor:
        return block_causal_ttt(*tensors, pieces=self.pieces, **options)
