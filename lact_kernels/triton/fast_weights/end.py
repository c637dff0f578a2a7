"""The fast weights after each sequence's last update, as the op returns them.

A row of the weights is one of the last sums, renormed in float32: `ttt_update` gives the weights in the dtype
of the products. One launch computes them, and takes masters and buffers out of their packed arrays.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.call import Options
from lact_kernels.core.fast_weights import FastWeights, Triple
from lact_kernels.triton.configs import TRITON
from lact_kernels.triton.fast_weights.history import Arrays, Segment
from lact_kernels.triton.fast_weights.layout import Chunks, Dims
from lact_kernels.triton.fast_weights.primitives import matrix_place, matrix_shape
from lact_kernels.triton.fast_weights.update import (
    RENORM_EPS,
    matrix_rows,
    row_config,
    row_lengths,
    row_programs,
)
from lact_kernels.triton.launch import launch


@triton.jit
def _store(ptr0, ptr1, ptr2, matrix, offsets, x, inside):
    """Of the matrix that a program has, into the tensor for it."""
    ptr = ptr0
    if matrix == 1:
        ptr = ptr1
    if matrix == 2:
        ptr = ptr2
    tl.store(ptr + offsets, x, mask=inside)


@triton.jit(do_not_specialize=["H"])
def _ttt_end_kernel(
    sums_ptr,  # [heads, SIZE], float32 like all
    steps_ptr,  # [heads, SIZE], or None without buffers
    norms_ptr,  # [heads, ROWS], or None without renorm
    order_ptr,  # [N], int64: where a sequence belongs, or None
    w0_ptr,  # [N, H, ..] each, like the next: written
    w1_ptr,
    w2_ptr,
    masters0_ptr,  # or None
    masters1_ptr,
    masters2_ptr,
    buffers0_ptr,  # with steps
    buffers1_ptr,
    buffers2_ptr,
    H,
    NET: tl.constexpr,
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    head, matrix, rows, real, offsets, inside = matrix_rows(
        NET, TILES0, TILES1, TILES2, BLOCK_ROWS, BLOCK_COLUMNS
    )
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    element, row = matrix_place(head, matrix, NET)
    place = head
    if order_ptr is not None:
        place = tl.load(order_ptr + head // H) * H + head % H
    out = place * num_rows * num_columns + offsets
    x = tl.load(sums_ptr + element + offsets, mask=inside, other=0.0)
    if masters0_ptr is not None:
        _store(masters0_ptr, masters1_ptr, masters2_ptr, matrix, out, x, inside)
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + row + rows, mask=real, other=0.0)
        x *= tl.div_rn(norm, row_lengths(x) + RENORM_EPS)[:, None]
    _store(w0_ptr, w1_ptr, w2_ptr, matrix, out, x, inside)
    if steps_ptr is not None:
        step = tl.load(steps_ptr + element + offsets, mask=inside, other=0.0)
        _store(buffers0_ptr, buffers1_ptr, buffers2_ptr, matrix, out, step, inside)


END_KERNELS = {TRITON: _ttt_end_kernel}


def ttt_end(
    sums: Tensor,  # `[N, H, SIZE]`, float32 like all
    steps: Tensor | None,  # `[N, H, SIZE]`, with buffers
    norms: Tensor | None,  # `[heads, ROWS]`; None without renorm
    order: Tensor | None,  # `[N]`: where each belongs
    out: FastWeights,  # written: of the matrices of `dims` the weights, masters and buffers, `[N, H, ..]`
    dims: Dims,
) -> None:
    N, H, _ = sums.shape
    programs, constexprs = row_programs(dims)
    nothing = (None,) * 3
    launch(
        END_KERNELS, row_config(dims), (N * H * programs,), sums, steps, norms, order, *out.weights,
        *(out.masters or nothing), *(out.buffers or nothing), H, **constexprs,
    )  # fmt: skip


class End(NamedTuple):
    """The last chunk of each sequence, collected where it is."""

    chunks: Chunks
    arrays: Arrays

    @classmethod
    def of(cls, chunks: Chunks, like: Arrays) -> "End":
        """Room for all of them, if they are not at one place at the end."""
        if chunks.counts[chunks.steps - 1] == chunks.N:
            return cls(chunks, like)
        rooms = [None if x is None else torch.empty_like(x[: chunks.N]) for x in like[1:3]]
        return cls(chunks, Arrays(like.weights, *rooms))

    def add(self, segment: Segment) -> "End":
        """With the sequences whose last chunk is in this segment: behind those that go on."""
        chunks = self.chunks
        for step in segment.steps:
            goes_on, number = chunks.active(step), chunks.counts[step]
            if goes_on == 0 and number == chunks.N:
                return End(chunks, segment.at(step))
            if goes_on < number:
                arrays = segment.at(step)
                for place, x in zip(self.arrays[1:3], arrays[1:3]):
                    if x is not None:
                        place[goes_on:number] = x[goes_on:]
        return self

    def fast_weights(
        self, start: FastWeights, options: Options, norms: Tensor, dims: Dims
    ) -> FastWeights:
        """All there is, in the order of the sequences. What no update has changed is that of the start.

        `norms` are the target norms of the rows, `[N, H, ROWS]` in the order of `layout`.
        """
        chunks, updated = self.chunks, self.chunks.active(0)
        weights = start.weights
        masters = (start.masters or weights) if options.prenorm else ()
        buffers = start.buffers
        if options.momentum and not buffers:
            buffers = tuple(w.new_zeros(()).expand(w.shape) for w in weights)

        def results(matrices: Triple) -> Triple:
            """Room for what is updated, and copies of the rest."""
            return tuple(
                x.new_empty(x.shape) if trained and updated else own(x)
                for x, trained in zip(matrices, dims.matrices)
            )

        targets = tuple(map(own, dims.unpack_rows(chunks.unsorted(norms))))
        end = FastWeights(results(weights), targets, results(masters), results(buffers))
        if updated:
            steps = self.arrays.steps if options.momentum else None
            norms = norms if options.weight_norm else None
            ttt_end(self.arrays.sums, steps, norms, chunks.order, end, dims)
        if 0 < updated < chunks.N:
            rest = slice(updated, None) if chunks.order is None else chunks.order[updated:]
            for place, w in zip(end.weights, weights):
                place[rest] = w[rest]
        return end


def own(x: Tensor) -> Tensor:
    """A contiguous copy: what an op returns shares no memory."""
    return x.clone(memory_format=torch.contiguous_format)
