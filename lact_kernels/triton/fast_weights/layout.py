"""Where the fast-weight kernels find things: chunks, tokens, matrices. Needs torch alone.

*Matrices.* w0 `[Dh, Dk]`, w1 `[Dv, Dh]` and w2 `[Dh, Dk]` of one head lie one behind the other in `SIZE`
elements, each from a multiple of 16 on, so that one kernel works on all three. What has one number
per row lies behind each other in `ROWS` = Dh + Dv + Dh.

*Chunks.* All chunks of all sequences are numbered step by step: first every sequence's chunk 0, then
the chunks 1, and so on. Sequences are sorted by falling number of chunks, so that in every step

    chunk = firsts[step] + place      and the next chunk of that sequence is counts[step] further

The weights of a chunk, those its queries are applied to, have the number of the chunk.

*Rows.* Activations of a run of chunks are `[.., H, rows, Dh]`, one row for each token, chunk behind chunk.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Call
from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.configs import (
    TTTConfig,
)

ALIGNMENT = 16  # elements

Shapes = Sequence[tuple[int, int]]


def round_up(x: int, multiple: int = ALIGNMENT) -> int:
    return -(-x // multiple) * multiple


class Dims(NamedTuple):
    """The sizes of one head's fast network."""

    Dk: int
    Dv: int
    Dh: int

    @classmethod
    def of(cls, weights: Triple) -> "Dims":
        w0, w1, _ = weights
        return cls(w0.shape[-1], w1.shape[-2], w0.shape[-2])

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.Dh, self.Dk), (self.Dv, self.Dh), (self.Dh, self.Dk)

    @property
    def offsets(self) -> list[int]:
        """First element of each matrix, and the end of the last."""
        return [0, *itertools.accumulate(round_up(r * c) for r, c in self.shapes)]

    @property
    def size(self) -> int:
        return self.offsets[-1]

    @property
    def is_padded(self) -> bool:
        return self.size > sum(r * c for r, c in self.shapes)

    @property
    def rows(self) -> int:
        return 2 * self.Dh + self.Dv

    @property
    def squares(self) -> list[int]:
        """First element of each Newton-Schulz square, `[m, m]` with m the shorter side, and the end."""
        return [0, *itertools.accumulate(round_up(min(r, c) ** 2) for r, c in self.shapes)]

    def unpack(self, packed: Tensor) -> Triple:
        """Views `[.., rows, columns]` of `[.., SIZE]`."""
        return tuple(
            packed[..., start : start + r * c].unflatten(-1, (r, c))
            for start, (r, c) in zip(self.offsets, self.shapes)
        )

    def unpack_rows(self, packed: Tensor) -> Triple:
        """Views `[.., rows]` of `[.., ROWS]`."""
        return packed.split([r for r, _ in self.shapes], dim=-1)


class Run(NamedTuple):
    """Consecutive chunks, and where a kernel finds their tokens and their rows of activations."""

    num_chunks: int
    table: Tensor | None
    first_chunk: int
    first_row: int  # of the activations' buffer
    B: int
    T: int
    shift: int
    chunk_size: int
    width: int

    def arguments(self, acts: Tensor, dims: Dims) -> tuple:
        """The table, and the arguments TOKEN_ARGUMENTS of the kernels. `acts` is `[.., H, rows, ..]`."""
        H, num_rows = acts.shape[1:3]
        return (*self[1:], num_rows, H, *dims)

    def num_programs(self, config: TTTConfig, columns: int, H: int) -> int:
        """One for each tile of tokens by columns, of each head and chunk."""
        tiles = -(-self.width // config.block_m) * -(-columns // config.block_n)
        return self.num_chunks * H * tiles


class Chunks:
    """The chunks of a call. With a plan they have tables, of which kernels read a chunk's tokens."""

    def __init__(self, call: Call):
        q, k = call.q, call.tokens.k
        self.N = call.start.weights[0].shape[0]
        self.B, self.Tk, self.Tq = q.shape[0], k.shape[1], q.shape[1]
        self.chunk_size = C = call.options.chunk_size
        self.order = self.key_table = self.query_table = None
        if call.plan is None:
            steps = call.num_updates + 1
            self.counts = [self.N] * steps
            self.max_length = min(C, self.Tk)
            self.rows = [self.N * self.max_length] * steps
        else:
            self._read(call.plan, q.device)
        self.firsts = [0, *itertools.accumulate(self.counts)]
        self.first_rows = [0, *itertools.accumulate(self.rows)]
        self.counts.append(0)

    def _read(self, plan: Tensor, device: torch.device) -> None:
        """A plan's rows are in the order of the chunks: tables of first token, number and first row."""
        sequence, step, *borders = plan[plan[:, 0] >= 0].unbind(1)
        first_key, last_key, first_query, last_query = borders
        keys, queries = last_key - first_key, last_query - first_query
        longest = torch.maximum(keys, queries)
        self.max_length = max(1, int(longest.max()))
        counts, ends = step.bincount(), longest.cumsum(0, dtype=torch.int32)
        self.counts = counts.tolist()
        self.rows = ends[counts.cumsum(0) - 1].diff(prepend=ends.new_zeros(1)).tolist()
        first_row = ends - longest
        columns = (first_key, keys, first_row), (first_query, queries, first_row)
        table = torch.stack([torch.stack(c, dim=1) for c in columns])
        self.key_table, self.query_table = table.to(device, non_blocking=True).unbind()
        order = sequence[: self.counts[0]].long()
        self.order = order.to(device, non_blocking=True)

    def keys(self, steps: range, rows: range, num_chunks: int | None = None) -> Run:
        """The chunks of `steps`, or the first `num_chunks` of them, with their keys and values.

        The activations' buffer begins with the first of the steps `rows`.
        """
        return self._run(steps, rows, num_chunks, self.key_table, self.Tk, 0)

    def queries(self, steps: range) -> Run:
        """The chunks of `steps` with their queries."""
        return self._run(steps, steps, None, self.query_table, self.Tq, self.Tk - self.Tq)

    def _run(self, steps, rows, num_chunks, table, T, shift) -> Run:
        if num_chunks is None:
            num_chunks = self.num_chunks(steps)
        return Run(
            num_chunks, table, self.firsts[steps.start], self.first_rows[rows.start],
            self.B, T, shift, self.chunk_size, self.max_length,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return len(self.counts) - 1

    @property
    def updates(self) -> int:
        return self.steps - 1

    def active(self, step: int) -> int:
        """The sequences that `step` updates: those which have a next chunk."""
        return self.counts[step + 1]

    def num_chunks(self, steps: range) -> int:
        return self.firsts[steps.stop] - self.firsts[steps.start]

    def num_rows(self, steps: range) -> int:
        return round_up(self.first_rows[steps.stop] - self.first_rows[steps.start])

    def sorted(self, x: Tensor) -> Tensor:
        """`[N, ...]`, sequences as they are given, in the order of their places."""
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return torch.empty_like(x).index_copy_(0, self.order, x)

    def batches(self, steps: range, most_rows: int) -> list[range]:
        """Cut the steps into runs of one or more, which together have at most about `most_rows` rows."""
        batches, start = [], steps.start
        for step in steps:
            if step > start and self.num_rows(range(start, step + 1)) > most_rows:
                batches.append(range(start, step))
                start = step
        return [*batches, range(start, steps.stop)]


# Where a run of chunks has its tokens and its rows, and the sizes of the network once more as runtime values,
# for loops that the compiler is not to unroll. Kernels take these one by one: a new length must not compile
# anew, so Triton may not specialise them, and it specialises all that comes in a tuple.
TOKEN_ARGUMENTS = (
    "first_chunk", "first_row", "B", "T", "shift", "chunk_size", "width", "num_rows", "H",
    "num_k", "num_v", "num_h",
)  # fmt: skip


class Net(NamedTuple):
    """What the kernels are compiled for: the sizes of one head's fast network, and where its matrices lie."""

    DK: int
    DV: int
    DH: int
    OFFSET1: int  # the first element of w1, of w2, and the end: see Dims.offsets
    OFFSET2: int
    SIZE: int
    SQUARE1: int  # the same of the Newton-Schulz squares: see Dims.squares
    SQUARE2: int
    SQUARES: int


def dims_constexprs(dims: Dims) -> dict[str, Any]:
    """The compile-time argument that all kernels have."""
    return {"NET": Net(*dims, *dims.offsets[1:], *dims.squares[1:])}


def tile_constexprs(
    shapes: Shapes, block_m: int, block_n: int, triangular: bool = False
) -> dict[str, int]:
    """Tiles of w0 and w2, and of w1: all, or only those on and below the diagonal."""
    counts = [-(-rows // block_m) * -(-columns // block_n) for rows, columns in shapes]
    if triangular:
        sides = (-(-rows // block_m) for rows, _ in shapes)
        counts = [side * (side + 1) // 2 for side in sides]
    return {"TILES0": counts[0], "TILES1": counts[1]}


def num_tiles(constexprs: dict[str, int]) -> int:
    """Tiles of all three matrices."""
    return 2 * constexprs["TILES0"] + constexprs["TILES1"]
