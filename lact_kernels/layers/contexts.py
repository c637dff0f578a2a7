"""Where the tokens of a call stand in their sequences, and what comes before them.

Two operations of a layer mix tokens, windowed attention and fast weights; all else it does to each token
alone. So whatever depends on how the sequences lie in the tokens `[B, T, C]` is in a context, which counts
positions and runs the two. There are four:

    BatchContext     rows, each of them one sequence
    PackedContext    sequences laid end to end in one row
    CachedContext    either of these, behind the tokens of earlier calls
    ShardedContext   one rank's share of longer sequences (in `lact_kernels.distributed`)

Padding needs none of its own: `Padding` packs the tokens of a padded batch before, and puts them back after.
"""

import functools
import operator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils.rnn import pad_sequence

from lact_kernels.core.offsets import cu_seqlens_of, packed_offsets
from lact_kernels.layers.cache import LayerCache
from lact_kernels.layers.inputs import Window
from lact_kernels.layers.padding import position_in_sequence
from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import block_causal_ttt
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, run_window_attn, window_attn


class Context(Protocol):
    """What a layer asks of each. The tokens are axis 1 of all tensors."""

    @property
    def T(self) -> int:
        """How many tokens a row of the tensors has."""

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of the packed sequences, int32 `[N+1]` on the host; None if each row is one."""

    def of_groups(self, size: int) -> "Context":
        """The context of groups of `size` tokens, which begin anew with each sequence."""

    def positions(self, x: Tensor) -> Tensor:
        """The position in its sequence of each of the tokens x, int64 `[B, T]`, or `[1, T]` for all rows."""

    def window_attn(
        self, q: Tensor, k: Tensor, v: Tensor, window_size: Window, *, backend: Backend
    ) -> Tensor:
        """`lact_kernels.window_attn`, of these tokens to themselves and their neighbours."""

    def block_causal_ttt(self, *tensors: Tensor, **options: Any) -> Tensor:
        """`lact_kernels.block_causal_ttt`, from where the tokens before these left the fast weights."""


class BatchContext(NamedTuple):
    """B rows of T tokens, each row one sequence."""

    B: int
    T: int
    cu_seqlens = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return (self.T,) * self.B

    def of_groups(self, size: int) -> "BatchContext":
        return BatchContext(self.B, -(-self.T // size))

    def positions(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """With `before [B]`, so many tokens of each row came in earlier calls."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return positions if before is None else positions + before[:, None]

    def window_attn(self, q, k, v, window_size, *, backend) -> Tensor:
        return window_attn(q, k, v, window_size, backend=backend)

    def block_causal_ttt(self, *tensors, **options) -> Tensor:
        return block_causal_ttt(*tensors, **options)


class PackedContext(NamedTuple):
    """N sequences of T tokens together, end to end in one row. `cu_seqlens` are on the host."""

    cu_seqlens: Tensor
    T: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence has.

        Raises:
            ValueError: `cu_seqlens` are no borders of T tokens.
        """
        offsets = packed_offsets(self.cu_seqlens, self.T)
        return tuple(stop - start for start, stop in zip(offsets, offsets[1:]))

    def of_groups(self, size: int) -> "PackedContext":
        groups = [-(-length // size) for length in self.lengths]
        return PackedContext(cu_seqlens_of(groups), sum(groups))

    def positions(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """With `before [N]`, so many tokens of each sequence came in earlier calls."""
        cu_seqlens = self.cu_seqlens.to(x.device, non_blocking=True)
        return position_in_sequence(cu_seqlens, x.shape[1], before)[None]

    def window_attn(self, q, k, v, window_size, *, backend) -> Tensor:
        return window_attn(q, k, v, window_size, cu_seqlens=self.cu_seqlens, backend=backend)

    def block_causal_ttt(self, *tensors, **options) -> Tensor:
        return block_causal_ttt(*tensors, cu_seqlens=self.cu_seqlens, **options)


class CachedContext:
    """The next tokens of each row of a cache, which keeps what later ones need of them. Windows are causal.

    Args:
        past: what the cache has of this layer.
        new: the context that these tokens would have without it.
        lengths: those of `new`, which reads them from its borders.
    """

    def __init__(
        self, past: LayerCache, new: BatchContext | PackedContext, lengths: tuple[int, ...]
    ):
        self.past, self.new, self.lengths = past, new, lengths
        self.T, self.cu_seqlens = new.T, new.cu_seqlens

    def of_groups(self, size: int) -> "CachedContext":
        groups = self.new.of_groups(size)
        return CachedContext(self.past, groups, groups.lengths)

    def positions(self, x: Tensor) -> Tensor:
        kv = self.past.kv
        return self.new.positions(x, None if kv is None else kv.seqlens)

    def window_attn(self, q, k, v, window_size, *, backend) -> Tensor:
        one_each = self.cu_seqlens is None and q.shape[1] == 1
        if not any(self.past.lengths):
            o = self.new.window_attn(q, k, v, window_size, backend=backend)
        elif one_each and not checks.needs_gradient(q, k, v):
            self._append(k, v)
            return self.past.kv.window_attn(q, backend=backend)  # in place
        else:
            o = self._window_attn_over_copies(q, k, v, window_size, backend)
        self._append(k, v)
        return o

    def _window_attn_over_copies(self, q, k, v, window_size, backend) -> Tensor:
        """Copies of the cached keys and values, with the new ones behind them, row by row."""
        kv = self.past.kv
        slots = min(kv.max_seqlen, kv.k.shape[1])
        seen = slots if window_size is None else window_size - 1
        cached = [min(length, seen) for length in self.past.num_tokens]

        def joined(old, new):
            rows = zip(old, cached, new.flatten(0, 1).split(self.lengths))
            return torch.cat([x for row, n, more in rows for x in (row[slots - n :], more)])[None]

        keys, values = map(joined, kv.view(), (k, v))
        cu_seqlens = cu_seqlens_of(self.lengths) if self.cu_seqlens is None else self.cu_seqlens
        cu_seqlens_k = cu_seqlens_of(map(operator.add, cached, self.lengths))
        packed = q.flatten(0, 1)[None]
        options = check_attention(packed, keys, values, window_size, None)
        borders = cu_seqlens, cu_seqlens_k
        o, _ = run_window_attn(packed, keys, values, options, None, borders, backend)
        return o.view(*q.shape[:3], v.shape[3])

    def _append(self, k: Tensor, v: Tensor) -> None:
        k, v, lengths = k.detach(), v.detach(), None
        if self.cu_seqlens is not None:
            k, v = (pad_sequence(x[0].split(self.lengths), batch_first=True) for x in (k, v))
            lengths = torch.tensor(self.lengths, dtype=torch.int32, device=k.device)
        self.past.make_room(k, v)
        self.past.kv.append(k, v, lengths)

    def block_causal_ttt(self, *tensors, **options) -> Tensor:
        o, state = self.new.block_causal_ttt(
            *tensors, initial_state=self.past.ttt, return_state=True, **options
        )
        self.past.ttt = state.map(Tensor.detach)
        return o


class Pieces(Protocol):
    """Says which tokens of longer sequences each rank has: `lact_kernels.distributed.SequencePieces`."""

    mesh: DeviceMesh
    num_tokens: int


@functools.singledispatch
def context_of_pieces(pieces: Pieces | DeviceMesh, x: Tensor, cu_seqlens: Tensor | None) -> Context:
    """The context of tokens `x [B, t, C]` that are one rank's share of longer sequences.

    Layers stand below `lact_kernels.distributed` and do not import it. A way of sharing sequences is a type
    of `pieces` that is registered here, with a function that makes its context. `cu_seqlens` are those
    that the layer was given.
    """
    raise TypeError(f"pieces must be SequencePieces or a DeviceMesh, got {type(pieces).__name__}")
