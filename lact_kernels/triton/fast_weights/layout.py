"""Where the fast-weight kernels find things: chunks, tokens, matrices. Needs torch alone.

*Matrices.* w0 `[Dh, Dk]`, w1 `[Dv, Dh]` and w2 `[Dh, Dk]` of one head lie one behind the other in `SIZE`
elements, each from a multiple of 16 on, so that one kernel works on all three. What has one number
per row lies behind each other in `ROWS` = Dh + Dv + Dh.

*Chunks.* All chunks of all sequences are numbered step by step: first every sequence's chunk 0, then
the chunks 1, and so on. Sequences are sorted by falling number of chunks, so that in every step

    chunk = firsts[step] + place      and the next chunk of that sequence is counts[step] further

The weights of a chunk, those its queries are applied to, have the number of the chunk.

*Rows.* Activations of a run of chunks are `[.., H, rows, Dh]`, one row for each token, chunk behind chunk:
keys by themselves, and queries.
"""

import bisect
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Call
from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.configs import TTTConfig, capability_of, has_descriptors
from lact_kernels.triton.launch import launch

ALIGNMENT = 16  # elements
# Of a block that is copied by a descriptor: chunks have room for a multiple in the activations.
DESCRIBED_TOKENS = 128
SUMMED_TOKENS = 64  # at once in a product over tokens
ALL_MATRICES = (True, True, True)

Shapes = Sequence[tuple[int, int]]


def round_up(x: int, multiple: int = ALIGNMENT) -> int:
    return -(-x // multiple) * multiple


def power_of_two_from(x: int) -> int:
    """The smallest that is not below x >= 1."""
    return 1 << (x - 1).bit_length()


class Dims(NamedTuple):
    """The sizes of one head's fast network, and which of w0, w1 and w2 kernels have to do with."""

    Dk: int
    Dv: int
    Dh: int
    matrices: tuple[bool, ...] = ALL_MATRICES

    @classmethod
    def of(cls, weights: Triple, matrices: tuple[bool, ...] = ALL_MATRICES) -> "Dims":
        w0, w1, _ = weights
        return cls(w0.shape[-1], w1.shape[-2], w0.shape[-2], matrices)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.Dk, self.Dv, self.Dh

    def having(self, *matrices: bool) -> "Dims":
        """The same network with others of its matrices."""
        return self._replace(matrices=matrices)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.Dh, self.Dk), (self.Dv, self.Dh), (self.Dh, self.Dk)

    @property
    def iterated(self) -> list[tuple[int, int]]:
        """The shapes of these matrices alone."""
        return [shape for shape, on in zip(self.shapes, self.matrices) if on]

    @property
    def offsets(self) -> list[int]:
        """First element of each matrix, and the end of the last."""
        return _borders(self.shapes)

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
        return _borders(tuple((min(shape), min(shape)) for shape in self.shapes))

    def spans(self, matrices: Sequence[bool]) -> list[slice]:
        """The elements of some matrices; of neighbours in one."""
        spans: list[slice] = []
        for start, stop in (
            pair for pair, on in zip(itertools.pairwise(self.offsets), matrices) if on
        ):
            if spans and spans[-1].stop == start:
                start = spans.pop().start
            spans.append(slice(start, stop))
        return spans

    def unpack(self, packed: Tensor) -> Triple:
        """Views `[.., rows, columns]` of `[.., SIZE]`."""
        return tuple(
            packed[..., start : start + r * c].unflatten(-1, (r, c))
            for start, (r, c) in zip(self.offsets, self.shapes)
        )

    def unpack_rows(self, packed: Tensor) -> Triple:
        """Views `[.., rows]` of `[.., ROWS]`."""
        return packed.split([r for r, _ in self.shapes], dim=-1)


def _borders(shapes: Shapes) -> list[int]:
    """Where matrices of these shapes begin that lie one behind the other, and the end of the last."""
    return [0, *itertools.accumulate(round_up(rows * columns) for rows, columns in shapes)]


def have_descriptors(dims: Dims, tokens: Tensor) -> bool:
    """Whether the device can copy blocks of matrices of these sizes and the tokens' dtype by descriptors."""
    unit = 16 // tokens.itemsize
    divisible = not any(size % unit for size in dims.sizes)
    return divisible and has_descriptors(tokens.dtype, capability_of(tokens.device))


class Run(NamedTuple):
    """Consecutive chunks, and where a kernel finds their tokens and their rows of activations."""

    num_chunks: int
    table: Tensor | None
    place: int  # of the first one, in arrays with an entry per chunk
    first_chunk: int
    first_row: int  # of the activations' buffer
    B: int
    T: int
    shift: int
    chunk_size: int
    width: int


def launcher_over_tokens(
    kernels: Mapping[str, Any],
    config: TTTConfig,
    columns: int,  # of the result: a program has a tile of tokens by columns, of one head and chunk
    arguments: tuple,  # before the table of a run
    more_arguments: tuple,  # after TOKEN_ARGUMENTS
    acts: Tensor,  # `[.., H, rows, ..]`
    dims: Dims,
    **constexprs: Any,
) -> Callable[[Run], None]:
    """What launches a kernel over the tokens of a run of chunks."""
    H, num_rows = acts.shape[1:3]
    sizes = (num_rows, H, *dims.sizes)
    block, programs = config.block_m, H * -(-columns // config.block_n)

    def launch_over(run: Run) -> None:
        grid = (run.num_chunks * programs * -(-run.width // block),)
        launch(kernels, config, grid, *arguments, *run[1:], *sizes, *more_arguments, **constexprs)

    return launch_over


class Heads(NamedTuple):
    """The heads of a step's chunks that go on, where arrays with an entry per chunk and head have them."""

    number: int
    first: int
    next_first: int  # of the chunks that follow


class Rows(NamedTuple):
    """Of the chunks' keys, or of their queries: where each step has them among the rows of activations."""

    widths: list[int]  # the longest chunk of each step
    firsts: list[int]  # first row of each step, and the end
    table: Tensor | None  # with a plan: first token, number of tokens and first row of each chunk

    @classmethod
    def of(cls, widths: list[int], rows: list[int], table: Tensor | None = None) -> "Rows":
        return cls(widths, [0, *itertools.accumulate(rows)], table)

    def number(self, steps: range) -> int:
        return round_up(self.firsts[steps.stop] - self.firsts[steps.start])

    def most(self, steps: range) -> int:
        """Of one step."""
        firsts = self.firsts[steps.start : steps.stop + 1]
        return round_up(max(map(operator.sub, firsts[1:], firsts)))

    def reach(self, start: int, number: int) -> int:
        """The step to which the steps from `start` on have no more than so many."""
        number -= number % ALIGNMENT
        return bisect.bisect_right(self.firsts, self.firsts[start] + number) - 1

    def width(self, steps: range) -> int:
        return max(self.widths[steps.start : steps.stop])


class Chunks:
    """The chunks of a call. With a plan they have tables, of which kernels read a chunk's tokens."""

    def __init__(self, call: Call):
        q, k = call.q, call.tokens.k
        self.N = call.start.weights[0].shape[0]
        self.B, self.Tk, self.Tq = q.shape[0], k.shape[1], q.shape[1]
        self.chunk_size = C = call.options.chunk_size
        self.order, self.device = None, q.device
        self.may_be_described = call.plan is None and have_descriptors(
            Dims.of(call.start.weights), q
        )
        if call.plan is None:
            steps = call.num_updates + 1
            self.counts = [self.N] * steps
            width = min(C, self.Tk)
            if self.are_in_blocks(0):
                width = round_up(width, DESCRIBED_TOKENS)
            self.of_keys = self.of_queries = Rows.of([width] * steps, [self.N * width] * steps)
            first = (self.Tk - self.Tq) // C  # with a query, where there is any
            stop = -(-self.Tk // C)
            self.has_queries = [self.Tq > 0 and first <= step < stop for step in range(steps)]
        else:
            self._read(call.plan, q.device)
        self.firsts = [0, *itertools.accumulate(self.counts)]
        self.counts.append(0)

    def _read(self, plan: Tensor, device: torch.device) -> None:
        """A plan's rows are in the order of the chunks: tables of first token, number and first row."""
        sequence, step, *borders = plan[plan[:, 0] >= 0].unbind(1)
        self.counts = step.bincount().tolist()
        tables, rows = [], []
        for first, last in (borders[:2], borders[2:]):
            number = last - first
            zeros = number.new_zeros(len(self.counts))
            widths = zeros.scatter_reduce(0, step.long(), number, "amax").tolist()
            rows.append((widths, zeros.index_add(0, step, number).tolist()))
            first_row = number.cumsum(0, dtype=torch.int32) - number
            tables.append(torch.stack([first, number, first_row], dim=1))
        self.has_queries = [width > 0 for width in rows[1][0]]
        table = torch.stack(tables).to(device, non_blocking=True)
        self.of_keys, self.of_queries = (Rows.of(*r, t) for r, t in zip(rows, table))
        order = sequence[: self.N].long()
        if order.tolist() != list(range(self.N)):
            self.order = order.to(device, non_blocking=True)

    def keys(self, steps: range, arrays: int, rows: int, num_chunks: int | None = None) -> Run:
        """The chunks of `steps`, or the first `num_chunks` of them, with their keys and values.

        Arrays with an entry per chunk begin with the step `arrays`, and the activations with the step `rows`.
        """
        return self._run(steps, arrays, rows, num_chunks, self.of_keys, self.Tk, 0)

    def heads(self, step: int, arrays: int, H: int) -> Heads:
        """Of the sequences that `step` updates; arrays begin with the step `arrays`."""
        first, place = self.firsts[arrays], self.firsts[step]
        return Heads(
            self.active(step) * H, (place - first) * H, (self.firsts[step + 1] - first) * H
        )

    def queries(self, steps: range, arrays: int) -> Run:
        """The chunks of `steps` with their queries."""
        shift = self.Tk - self.Tq
        return self._run(steps, arrays, steps.start, None, self.of_queries, self.Tq, shift)

    def _run(self, steps, arrays, rows, num_chunks, of_tokens: Rows, T, shift) -> Run:
        if num_chunks is None:
            num_chunks = self.num_chunks(steps)
        width = of_tokens.width(steps)
        if of_tokens.table is not None:
            width = max(width, 1)  # a chunk without tokens has a program, which says so
        first = self.firsts[steps.start]
        return Run(
            num_chunks, of_tokens.table, first - self.firsts[arrays], first, of_tokens.firsts[rows],
            self.B, T, shift, self.chunk_size, width,
        )  # fmt: skip

    def are_in_blocks(self, shift: int) -> bool:
        """Whether tokens from position `shift` of their sequences on can be copied in blocks by descriptors.

        A block then reaches beyond its chunk only where the sequence ends, and zeros follow.
        """
        if not self.may_be_described or min(self.Tk, self.chunk_size) < SUMMED_TOKENS:
            return False  # a chunk has room for whole blocks, which would be many times its tokens
        is_one_chunk = self.Tk <= self.chunk_size
        return is_one_chunk or not (self.chunk_size % SUMMED_TOKENS or shift % SUMMED_TOKENS)

    def zero_unread(self, x: Tensor) -> Tensor:
        """`[B, Tk, ...]` with zeros for the keys of no update."""
        if self.of_keys.table is None:
            read = self.updates * self.chunk_size
            if read < self.Tk:
                x[:, read:].zero_()
        elif self.of_keys.firsts[-1] < self.Tk:
            x.zero_()
        return x

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

    def sorted(self, x: Tensor) -> Tensor:
        """`[N, ...]`, sequences as they are given, in the order of their places."""
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return torch.empty_like(x).index_copy_(0, self.order, x)

    def places(self, steps: range) -> Tensor:
        """`[chunks]`: for each chunk of these steps the place of its sequence."""
        places = torch.cat([torch.arange(self.counts[step]) for step in steps])
        return places.to(self.device, non_blocking=True)

    def applied(self, steps: range) -> list[range]:
        """Of these steps those whose weights any query is applied to, in runs."""
        runs = itertools.groupby(steps, key=self.has_queries.__getitem__)
        spans = [list(run) for has_queries, run in runs if has_queries]
        return [range(span[0], span[-1] + 1) for span in spans]

    def batches(self, steps: range, most_rows: int) -> list[range]:
        """Cut the steps into runs of one or more, which together have at most about `most_rows` rows."""
        batches, start = [], steps.start
        while start < steps.stop:
            stops = (rows.reach(start, most_rows) for rows in (self.of_keys, self.of_queries))
            batches.append(range(start, min(max(min(stops), start + 1), steps.stop)))
            start = batches[-1].stop
        return batches

    def most_rows(self, steps: range) -> int:
        """Of activations, those of the keys or those of the queries."""
        return max(self.of_keys.number(steps), self.of_queries.number(steps))


# Where a run of chunks has its tokens and its rows, and the sizes of the network once more as runtime values,
# for loops that the compiler is not to unroll. Kernels take these one by one: a new length must not compile
# anew, so Triton may not specialise them, and it specialises all that comes in a tuple.
TOKEN_ARGUMENTS = (
    "place", "first_chunk", "first_row", "B", "T", "shift", "chunk_size", "width", "num_rows", "H",
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
    W0: bool  # the matrices that there are to be computed
    W1: bool
    W2: bool


@functools.cache
def dims_constexprs(dims: Dims) -> dict[str, Any]:
    """The compile-time argument that all kernels have."""
    return {"NET": Net(*dims.sizes, *dims.offsets[1:], *dims.squares[1:], *dims.matrices)}


def tile_constexprs(
    dims: Dims, shapes: Shapes, block_m: int, block_n: int, triangular: bool = False
) -> dict[str, int]:
    """Tiles of w0, w1 and w2, if they have these shapes: all, or only those on and below the diagonal."""
    counts = [-(-rows // block_m) * -(-columns // block_n) for rows, columns in shapes]
    if triangular:
        sides = (-(-rows // block_m) for rows, _ in shapes)
        counts = [side * (side + 1) // 2 for side in sides]
    return {f"TILES{i}": n * on for i, (n, on) in enumerate(zip(counts, dims.matrices))}


def num_tiles(constexprs: dict[str, int]) -> int:
    """Tiles of all matrices."""
    return sum(constexprs[f"TILES{i}"] for i in range(3))
