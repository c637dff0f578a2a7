"""The update of fast weights from their gradients: momentum, the sum, renorm. Rows are independent.

```
    M' = G + beta M                      G: the parts of ttt_outer, added up; beta: the chunk's mean momentum
    x' = x + step                        step = M', or with Muon its orthogonalisation
    w' = x' norm / (|row of x'| + eps)   in the dtype of the products
```

What x is in the sum: pre-norm's masters, or in post-norm the weights in float32, which are computed from
the sum before, as they are not kept themselves. (At the very start the weights are their own sum.) Without
target norms there is no renorm, w' = x', and the two are the same.

One program computes some rows of one matrix of one head. Without Muon it does all of this; with Muon one
launch ends at M', and another begins with the orthogonalised step. Where momentum comes after Muon the first
ends at G, and the second has M' = NS(G) + beta M.
"""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core import fast_weights
from lact_kernels.triton.configs import TRITON, TTTConfig
from lact_kernels.triton.fast_weights.layout import (
    Dims,
    Heads,
    Run,
    dims_constexprs,
    num_tiles,
    power_of_two_from,
    tile_constexprs,
)
from lact_kernels.triton.fast_weights.primitives import (
    chunk_tokens,
    matrix_place,
    matrix_shape,
    matrix_tile,
    token_offset,
)
from lact_kernels.triton.launch import launch, strides

RENORM_EPS = tl.constexpr(fast_weights.RENORM_EPS)
PROGRAM_ELEMENTS, NUM_WARPS, WIDE_WARPS = 2048, 4, 16
TOKEN_BLOCK = 1024


@triton.jit
def matrix_rows(
    NET: tl.constexpr, TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Head and matrix of this program, and of its rows: numbers, elements and which of these exist."""
    head, matrix, tile = matrix_tile(TILES0, TILES1, TILES2)
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    offsets = rows[:, None] * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return head, matrix, rows, rows < num_rows, offsets, inside


@triton.jit
def row_lengths(x):
    """Euclidean norms of the rows, correctly rounded, as all factors of a row are: errors hit all of it."""
    return tl.sqrt_rn(tl.sum(x * x, axis=1))


@triton.jit
def sum_parts(parts_ptr, offsets, inside, num_parts, stride_part):
    """The parts of a sum, added up in order."""
    total = tl.load(parts_ptr + offsets, mask=inside, other=0.0)
    for part in range(1, num_parts):
        part_ptr = parts_ptr + tl.cast(part, tl.int64) * stride_part
        total += tl.load(part_ptr + offsets, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_parts", "first", "next_first", "is_start"])
def _ttt_update_kernel(
    parts_ptr,  # [parts, heads, SIZE], or None: then the step is in orthogonal_ptr
    orthogonal_ptr,  # [heads, SIZE]
    steps_ptr,  # [heads of all, SIZE], like the next: M, with momentum
    next_steps_ptr,  # M', or what Muon gets; None where nobody reads it
    sums_ptr,  # x, and written: x'
    weights_ptr,  # written: w', in the dtype of the products
    norms_ptr,  # [heads, ROWS], or None without renorm
    betas_ptr,  # [heads of all], or None without momentum
    squares_ptr,  # [heads, ROWS]: with it the launch ends here, with the squares of the rows' norms
    num_parts,
    stride_part,
    first,  # of the heads of all, those of the chunks that are updated
    next_first,  # and of the chunks after them
    is_start,
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
    element, row = matrix_place(head, matrix, NET)
    offsets += element
    rows += row
    now = offsets + tl.cast(first, tl.int64) * NET.SIZE
    then = offsets + tl.cast(next_first, tl.int64) * NET.SIZE
    if parts_ptr is None:
        step = tl.load(orthogonal_ptr + offsets, mask=inside, other=0.0)
    else:
        step = sum_parts(parts_ptr, offsets, inside, num_parts, stride_part)
    if betas_ptr is not None:
        beta = tl.load(betas_ptr + first + head)
        step += beta * tl.load(steps_ptr + now, mask=inside, other=0.0)
    if next_steps_ptr is not None:
        tl.store(next_steps_ptr + then, step, mask=inside)
    if squares_ptr is not None:
        tl.store(squares_ptr + rows, tl.sum(step * step, axis=1), mask=real)
    else:
        x = tl.load(sums_ptr + now, mask=inside, other=0.0)
        dtype = weights_ptr.dtype.element_ty
        if norms_ptr is None:
            x += step
            weights = x.to(dtype)
        else:
            norm = tl.load(norms_ptr + rows, mask=real, other=0.0)
            if not PRENORM:
                factor = tl.div_rn(norm, row_lengths(x) + RENORM_EPS)
                x *= tl.where(is_start != 0, 1.0, factor)[:, None]
            x += step
            factor = tl.div_rn(norm, row_lengths(x) + RENORM_EPS)
            weights = (x * factor[:, None]).to(dtype)
        tl.store(sums_ptr + then, x, mask=inside)
        # In fours, like all else: a thread with eight of these would have every other sector of the rest.
        tl.store(weights_ptr + tl.max_contiguous(then, [1, 4]), weights, mask=inside)


@triton.jit(do_not_specialize=["first_chunk", "B", "T", "chunk_size", "H"])
def _ttt_mean_momentum_kernel(
    momentum_ptr,  # [B, T, H]
    betas_ptr,  # [chunks, H]
    table_ptr,
    first_chunk,
    B,
    T,
    chunk_size,
    H,
    momentum_strides,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, first, number, _ = chunk_tokens(chunk, table_ptr, first_chunk, 0, B, T, 0, chunk_size, 0)
    total = tl.zeros([BLOCK], tl.float32)
    momentum_ptr += token_offset(momentum_strides, b, first, h)
    for start in range(0, number, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        pointers = momentum_ptr + tokens * momentum_strides[1]
        total += tl.load(pointers, mask=tokens < number, other=0.0)
    tl.store(betas_ptr + tl.program_id(0), tl.div_rn(tl.sum(total), chunk_size.to(tl.float32)))


UPDATE_KERNELS = {TRITON: _ttt_update_kernel}
MEAN_MOMENTUM_KERNELS = {TRITON: _ttt_mean_momentum_kernel}


def ttt_update(
    sums: Tensor,  # `[places, H, SIZE]`, float32 like all but weights: read, and written for the next step
    weights: Tensor,  # `[places, H, SIZE]`, in the dtype of the products: written
    norms: Tensor | None,  # `[sequences, H, ROWS]`; None without renorm
    dims: Dims,
    *,
    prenorm: bool,
    betas: Tensor | None = None,  # `[places, H]`, with momentum
    steps: Tensor | None = None,  # `[places, H, SIZE]`: M, with momentum
    next_steps: Tensor | None = None,  # `[places, H, SIZE]`: M' or G, written
    squares: Tensor
    | None = None,  # `[heads, ROWS]`: ends there, with the squares of its rows' norms
) -> Callable[[Tensor, Heads, bool], None]:
    """One update of some heads, or with Muon the first or the second part of it.

    It is given gradients in parts `[parts, sequences, H, SIZE]`, or orthogonalised steps `[heads, SIZE]`; the
    heads; and whether it is the first update of all.
    """
    programs, constexprs = row_programs(dims)
    config = row_config(dims)
    arguments = {
        "steps_ptr": steps, "next_steps_ptr": next_steps, "sums_ptr": sums, "weights_ptr": weights,
        "norms_ptr": norms, "betas_ptr": betas, "squares_ptr": squares, "PRENORM": prenorm, **constexprs,
    }  # fmt: skip

    def update(step: Tensor, heads: Heads, is_start: bool) -> None:
        in_parts = step.ndim == 4
        launch(
            UPDATE_KERNELS, config, (heads.number * programs,),
            parts_ptr=step if in_parts else None, orthogonal_ptr=None if in_parts else step,
            num_parts=step.shape[0], stride_part=step.stride(0), first=heads.first,
            next_first=heads.next_first, is_start=int(is_start), **arguments,
        )  # fmt: skip

    return update


def ttt_mean_momentum(momentum: Tensor, betas: Tensor, run: Run) -> None:
    """Momentum `[B, T, H]`, summed over each chunk's tokens and by its size, into betas `[chunks, H]`."""
    B, T, H = momentum.shape
    launch(
        MEAN_MOMENTUM_KERNELS, TTTConfig(1, TOKEN_BLOCK, 1, NUM_WARPS, 3), (run.num_chunks * H,),
        momentum, betas, run.table, run.first_chunk, B, T, run.chunk_size, H, strides(momentum),
        BLOCK=TOKEN_BLOCK,
    )  # fmt: skip


@functools.cache
def row_programs(dims: Dims, tiled: Dims | None = None) -> tuple[int, dict[str, int]]:
    """Programs per head of the kernels over rows, and their compile-time arguments.

    They have rows of the matrices of `tiled`, where these are not those of `dims`.
    """
    rows, columns = row_block(dims)
    tiles = tile_constexprs(tiled or dims, dims.shapes, rows, columns)
    blocks = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    return num_tiles(tiles), {**dims_constexprs(dims), **tiles, **blocks}


def row_block(dims: Dims) -> tuple[int, int]:
    """Rows of one program, and columns, which are all of a row."""
    columns = power_of_two_from(max(dims.Dk, dims.Dh))
    return max(1, PROGRAM_ELEMENTS // columns), columns


def row_warps(dims: Dims) -> int:
    """More for a row that is longer than what a program has otherwise."""
    rows, columns = row_block(dims)
    return NUM_WARPS if rows * columns <= PROGRAM_ELEMENTS else WIDE_WARPS


def row_config(dims: Dims) -> TTTConfig:
    """That of the kernels over rows: they are no rows of the table."""
    return TTTConfig(*row_block(dims), 1, row_warps(dims), 3)
