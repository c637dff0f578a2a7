"""The fast weights before the first update, as the op is given them, and their gradients.

One launch packs them into the arrays of the scan (see `layout` and `history`), with the target norms, which
are those of the rows unless they are given. A last one takes their gradients out of what the reverse scan
has left. Of new weights, with which nothing else is given, all else is made, and so its gradients belong to
them: with t the norm of a row w, and the masters that begin as the weights,

    dw = sum of the parts + by the sum after them + dt w / t (+ dmasters)
"""

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.fast_weights import FastWeights, Triple
from lact_kernels.triton.configs import TRITON
from lact_kernels.triton.fast_weights.history import Arrays
from lact_kernels.triton.fast_weights.layout import ALL_MATRICES, Dims
from lact_kernels.triton.fast_weights.primitives import matrix_place, matrix_shape, weight_arguments
from lact_kernels.triton.fast_weights.update import (
    matrix_rows,
    row_config,
    row_lengths,
    row_programs,
    sum_parts,
)
from lact_kernels.triton.launch import launch

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def of_matrix(pointers, matrix):
    """Of three pointers, to w0, w1 and w2, the one to the matrix of this program."""
    ptr = pointers[0]
    if matrix == 1:
        ptr = pointers[1]
    if matrix == 2:
        ptr = pointers[2]
    return ptr


@triton.jit
def head_pointer(pointers, strides, matrix, sequence, h):
    """To a head's part of one of three tensors; `strides` are those of sequence and head of each."""
    stride_n = tl.where(matrix == 0, strides[0], tl.where(matrix == 1, strides[2], strides[4]))
    stride_h = tl.where(matrix == 0, strides[1], tl.where(matrix == 1, strides[3], strides[5]))
    return of_matrix(pointers, matrix) + sequence * stride_n + h * stride_h


@triton.jit
def sequence_of(head, order_ptr, H):
    """Which sequence and head the program has, whose place in the arrays is `head`."""
    sequence = head // H
    if order_ptr is not None:
        sequence = tl.load(order_ptr + sequence)
    return sequence, head % H


@triton.jit(do_not_specialize=["H"])
def _ttt_start_kernel(
    given_ptr,  # the weights: three tensors [N, H, ..], float32 like all but weights
    given_norms_ptr,  # three [N, H, rows], or None: those of the weights
    given_masters_ptr,  # three, or None: sums begin as the weights
    given_buffers_ptr,  # three, or None: zeros
    order_ptr,  # [N], int64: the sequence at each place, or None
    weights_ptr,  # [heads, SIZE], in the dtype of the products: written, like all that follow
    sums_ptr,  # [heads, SIZE]
    steps_ptr,  # [heads, SIZE], or None
    gradients_ptr,  # [heads, SIZE], or None: zeros, which nobody reads
    norms_ptr,  # [heads, ROWS]
    H,
    given_strides,
    norms_given_strides,
    masters_given_strides,
    buffers_given_strides,
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
    element, row = matrix_place(head, matrix, NET)
    sequence, h = sequence_of(head, order_ptr, H)
    given = head_pointer(given_ptr, given_strides, matrix, sequence, h)
    w = tl.load(given + offsets, mask=inside, other=0.0)
    weights_ptr += tl.max_contiguous(
        element + offsets, [1, 4]
    )  # in fours, like all else: see ttt_update
    tl.store(weights_ptr, w.to(weights_ptr.dtype.element_ty), mask=inside)
    if given_norms_ptr is None:
        norm = row_lengths(w)
    else:
        norms = head_pointer(given_norms_ptr, norms_given_strides, matrix, sequence, h)
        norm = tl.load(norms + rows, mask=real, other=0.0)
    tl.store(norms_ptr + row + rows, norm, mask=real)
    x = w
    if given_masters_ptr is not None:
        masters = head_pointer(given_masters_ptr, masters_given_strides, matrix, sequence, h)
        x = tl.load(masters + offsets, mask=inside, other=0.0)
    tl.store(sums_ptr + element + offsets, x, mask=inside)
    zeros = tl.zeros_like(w)
    if steps_ptr is not None:
        step = zeros
        if given_buffers_ptr is not None:
            buffers = head_pointer(given_buffers_ptr, buffers_given_strides, matrix, sequence, h)
            step = tl.load(buffers + offsets, mask=inside, other=0.0)
        tl.store(steps_ptr + element + offsets, step, mask=inside)
    if gradients_ptr is not None:
        tl.store(gradients_ptr + element + offsets, zeros, mask=inside)


@triton.jit(do_not_specialize=["H", "num_parts", "num_apply_parts", "begun", "apply_first"])
def _ttt_start_bwd_kernel(
    parts_ptr,  # [parts, heads, SIZE], float32 like all: gradients of the weights by the first update
    apply_ptr,  # [parts, heads of a run, SIZE]: and by apply, or None
    carry_ptr,  # [heads, SIZE]: of the first sum
    kept_ptr,  # [heads, SIZE], or None: of matrices that are not trained, beside the carry
    dbuffers_ptr,  # [heads, SIZE], or None
    dnorms_ptr,  # [heads, ROWS], or None without renorm
    given_ptr,  # the weights: three tensors [N, H, ..]
    order_ptr,  # [N], int64: the sequence at each place, or None
    out_ptr,  # three [N, H, ..], contiguous: written, like all that follow
    out_norms_ptr,  # three [N, H, rows], or None: their gradients belong to the weights, like those of
    out_masters_ptr,  # three, or None
    out_buffers_ptr,  # three, or None
    num_parts,
    stride_part,
    num_apply_parts,
    stride_apply_part,
    begun,  # heads of which the arrays hold gradients; of the others there are none but by apply
    apply_first,  # the first of the heads in those of a run
    H,
    given_strides,
    NET: tl.constexpr,
    PRENORM: tl.constexpr,
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
    sequence, h = sequence_of(head, order_ptr, H)
    out = (sequence * H + h) * num_rows * num_columns + offsets
    held = inside & (head < begun)
    element += offsets
    dw = sum_parts(parts_ptr, element, held, num_parts, stride_part)
    if apply_ptr is not None:
        applied = element + tl.cast(apply_first, tl.int64) * NET.SIZE
        dw += sum_parts(apply_ptr, applied, inside, num_apply_parts, stride_apply_part)
    carry = tl.load(carry_ptr + element, mask=held, other=0.0)
    if PRENORM and out_masters_ptr is not None:
        tl.store(of_matrix(out_masters_ptr, matrix) + out, carry, mask=inside)
    else:
        dw += carry
    if kept_ptr is not None:
        dw += tl.load(kept_ptr + element, mask=held, other=0.0)
    dnorm = tl.zeros([BLOCK_ROWS], tl.float32)
    if dnorms_ptr is not None:
        dnorm = tl.load(dnorms_ptr + row + rows, mask=real & (head < begun), other=0.0)
    if out_norms_ptr is not None:
        out_rows = (sequence * H + h) * num_rows + rows
        tl.store(of_matrix(out_norms_ptr, matrix) + out_rows, dnorm, mask=real)
    elif dnorms_ptr is not None:
        given = head_pointer(given_ptr, given_strides, matrix, sequence, h)
        w = tl.load(given + offsets, mask=inside, other=0.0)
        norm = row_lengths(w)
        dw += w * tl.div_rn(dnorm, tl.where(norm > 0.0, norm, INFINITY))[:, None]
    tl.store(of_matrix(out_ptr, matrix) + out, dw, mask=inside)
    if out_buffers_ptr is not None:
        dbuffer = tl.load(dbuffers_ptr + element, mask=held, other=0.0)
        tl.store(of_matrix(out_buffers_ptr, matrix) + out, dbuffer, mask=inside)


START_KERNELS = {TRITON: _ttt_start_kernel}
START_BWD_KERNELS = {TRITON: _ttt_start_bwd_kernel}


def ttt_start(
    given: FastWeights,
    order: Tensor | None,  # `[N]`: the sequence at each place
    first: Arrays,  # of the first step, `[N, H, SIZE]`: written, like norms
    norms: Tensor,  # `[N, H, ROWS]`
    dims: Dims,
) -> None:
    """What a scan begins with."""
    N, H, _ = first.weights.shape
    dims = dims.having(*ALL_MATRICES)
    programs, constexprs = row_programs(dims)
    pointers, strides = zip(*(weight_arguments(readable(x)) if x else (None, None) for x in given))
    launch(
        START_KERNELS, row_config(dims), (N * H * programs,), *pointers, order, first.weights, first.sums,
        first.steps, first.gradients, norms, H, *strides, **constexprs,
    )  # fmt: skip


def ttt_start_bwd(
    dweights: Tensor,  # `[parts, N, H, SIZE]`
    dapply: Tensor | None,  # `[parts, chunks, H, SIZE]`
    apply_first: int,  # which head of a run in these is the first
    begun: int,  # heads of which these, and the next, hold gradients
    carry: Tensor,  # `[N, H, SIZE]`
    kept: Tensor | None,  # `[N, H, SIZE]`: only where it is not the carry
    dbuffers: Tensor | None,  # `[N, H, SIZE]`
    dnorms: Tensor | None,  # `[N, H, ROWS]`; None without renorm
    given: FastWeights,
    order: Tensor | None,  # `[N]`: the sequence at each place
    dims: Dims,
    prenorm: bool,
) -> FastWeights:
    """The gradients of what was given, in the order of the sequences."""
    _, N, H, _ = dweights.shape
    dims = dims.having(*ALL_MATRICES)
    programs, constexprs = row_programs(dims)
    out = given.map(lambda x: x.new_empty(x.shape))
    weights, strides = weight_arguments(readable(given.weights))
    stride_apply, num_apply = (0, 0) if dapply is None else (dapply.stride(0), dapply.shape[0])
    launch(
        START_BWD_KERNELS, row_config(dims), (N * H * programs,), dweights, dapply, carry, kept,
        dbuffers, dnorms, weights, order, *(x or None for x in out), dweights.shape[0],
        dweights.stride(0), num_apply, stride_apply, begun, apply_first, H, strides, **constexprs,
        PRENORM=prenorm,
    )  # fmt: skip
    return out


def readable(matrices: Triple) -> Triple:
    """Tensors `[N, H, ..]` of which each head's part is contiguous: mostly as they are."""
    return tuple(x if x[:1, :1].is_contiguous() else x.contiguous() for x in matrices)
