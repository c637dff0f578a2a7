"""The kernels of Muon's Newton-Schulz iteration, and what they are compiled for: see `newton_schulz`."""

import triton
import triton.language as tl

from lact_kernels.triton.configs import TRITON, TTTConfig
from lact_kernels.triton.fast_weights.layout import Dims, dims_constexprs, tile_constexprs
from lact_kernels.triton.fast_weights.primitives import (
    matrix_place,
    matrix_shape,
    matrix_tile,
    matrix_total,
)
from lact_kernels.triton.fast_weights.update import matrix_rows
from lact_kernels.triton.fast_weights.update_bwd import NEWTON_SCHULZ_EPS
from lact_kernels.triton.primitives import load_tile

NORMALIZE_BLOCK = 64


@triton.jit
def square_place(head, matrix, NET: tl.constexpr):
    """First element in `[heads, SQUARES]`."""
    place = head * NET.SQUARES
    place += tl.where(matrix == 0, 0, tl.where(matrix == 1, NET.SQUARE1, NET.SQUARE2))
    return place


@triton.jit
def _normalize_kernel(
    g_ptr,  # [heads, SIZE], float32
    squares_ptr,  # [heads, ROWS]: of the rows' norms
    x_ptr,  # [heads, SIZE], each matrix [m, n]
    NET: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,  # each matrix in its own shape
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOTAL: tl.constexpr,
):
    head, matrix, tile = matrix_tile(TILES0, TILES1, TILES2)
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    element, row = matrix_place(head, matrix, NET)
    tiles_n = tl.cdiv(num_columns, BLOCK)
    rows = tile // tiles_n * BLOCK + tl.arange(0, BLOCK)[:, None]
    columns = tile % tiles_n * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    norm = tl.sqrt_rn(matrix_total(squares_ptr + row, num_rows, BLOCK_TOTAL))
    if GRADIENT:
        shorter = tl.minimum(num_rows, num_columns).to(tl.float32)
        scale = tl.where(norm > 0.0, tl.div_rn(tl.sqrt_rn(shorter), norm), 0.0)
    else:
        scale = tl.div_rn(1.0, norm + NEWTON_SCHULZ_EPS)
    g = tl.load(g_ptr + element + rows * num_columns + columns, mask=inside, other=0.0)
    stride_row = num_columns
    stride_column = 1
    if not IN_PLACE:
        tall = num_rows > num_columns
        stride_row = tl.where(tall, 1, num_columns)
        stride_column = tl.where(tall, num_rows, 1)
    x_pointers = x_ptr + element + rows * stride_row + columns * stride_column
    tl.store(x_pointers, (g * scale).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dot_transposed(
    acc, a_ptr, b_ptr, rows, columns, side, length, stop,
    CHECK_M: tl.constexpr, CHECK_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + a b^T`: the given rows of a and of b, both `[side, length]`. `stop` is length, at run time."""
    for start in range(0, stop, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a_pointers = a_ptr + rows[:, None] * length + inner[None, :]
        b_pointers = b_ptr + columns[:, None] * length + inner[None, :]
        a = load_tile(a_pointers, rows, side, inner, length, CHECK_M, CHECK_K)
        b = load_tile(b_pointers, columns, side, inner, length, CHECK_M, CHECK_K)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_k", "num_v", "num_h"])
def _newton_schulz_symmetric_kernel(
    a_ptr,  # [heads, SIZE], each matrix [m, n], or if SQUARE [heads, SQUARES], each [m, m]
    b_ptr,  # or None
    y_ptr,  # [heads, SQUARES], or None
    y2_ptr,  # or None
    out_ptr,  # [heads, SQUARES]: factor (a b^T + b a^T), without b factor a a^T, + y_factor y + y2_factor y2
    exact_ptr,  # [heads, SQUARES]: the same in float32, or None
    factor,
    y_factor,
    y2_factor,
    num_k,
    num_v,
    num_h,
    NET: tl.constexpr,
    SQUARE: tl.constexpr,
    ONE_SIDED: tl.constexpr,  # a b^T is symmetric and all there is to add: no b a^T
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK_M: tl.constexpr,
    CHECK_K: tl.constexpr,
):
    head, matrix, tile = matrix_tile(TILES0, TILES1, TILES2)
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    side = tl.minimum(num_rows, num_columns)
    square = square_place(head, matrix, NET)
    stop_rows, stop_columns = matrix_shape(matrix, num_k, num_v, num_h)
    if SQUARE:
        element = square
        length = side
        stop = tl.minimum(stop_rows, stop_columns)
    else:
        stop = tl.maximum(stop_rows, stop_columns)
        element, _ = matrix_place(head, matrix, NET)
        length = tl.maximum(num_rows, num_columns)
    # Tiles are counted along the rows of the lower triangle. The root of a square number must be exact.
    tile_m = tl.cast((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) * 0.5, tl.int32)
    tile_n = tile - tile_m * (tile_m + 1) // 2
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    a_ptr += element
    if b_ptr is None:
        acc = _dot_transposed(
            acc, a_ptr, a_ptr, rows, columns, side, length, stop, CHECK_M, CHECK_K, BLOCK_K
        )
    else:
        b_ptr += element
        acc = _dot_transposed(
            acc, a_ptr, b_ptr, rows, columns, side, length, stop, CHECK_M, CHECK_K, BLOCK_K
        )
        if not ONE_SIDED:
            acc = _dot_transposed(
                acc, b_ptr, a_ptr, rows, columns, side, length, stop, CHECK_M, CHECK_K, BLOCK_K
            )
    acc *= factor
    offsets = rows[:, None] * side + columns[None, :]
    inside = (rows < side)[:, None] & (columns < side)[None, :]
    if y_ptr is not None:
        y = tl.load(y_ptr + square + offsets, mask=inside, other=0.0)
        acc += y_factor * y.to(tl.float32)
    if y2_ptr is not None:
        y2 = tl.load(y2_ptr + square + offsets, mask=inside, other=0.0)
        acc += y2_factor * y2.to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    out_ptr += square
    tl.store(out_ptr + offsets, result, mask=inside)
    if tile_m != tile_n:
        tl.store(out_ptr + columns[None, :] * side + rows[:, None], result, mask=inside)
    if exact_ptr is not None:
        exact_ptr += square
        tl.store(exact_ptr + offsets, acc, mask=inside)
        if tile_m != tile_n:
            tl.store(exact_ptr + columns[None, :] * side + rows[:, None], acc, mask=inside)


@triton.jit
def _dot_square(
    acc, square_ptr, x_ptr, rows, columns, side, length, stop, CHECK_M: tl.constexpr,
    CHECK_N: tl.constexpr, CHECK_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + square x`, of `[side, side]` and `[side, length]`. `stop` is side, at run time."""
    for start in range(0, stop, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        square_pointers = square_ptr + rows[:, None] * side + inner[None, :]
        x_pointers = x_ptr + inner[:, None] * length + columns[None, :]
        square = load_tile(square_pointers, rows, side, inner, side, CHECK_M, CHECK_K)
        x = load_tile(x_pointers, inner, side, columns, length, CHECK_K, CHECK_N)
        acc = tl.dot(square, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_k", "num_v", "num_h"])
def _newton_schulz_multiply_kernel(
    square_ptr,  # [heads, SQUARES]
    x_ptr,  # [heads, SIZE], each matrix [m, n], or if SQUARE [heads, SQUARES], each [m, m]
    square2_ptr,  # a second product to add, or None
    x2_ptr,
    out_ptr,  # like x: factor x + square x + square2 x2
    factor,
    num_k,
    num_v,
    num_h,
    NET: tl.constexpr,
    SQUARE: tl.constexpr,
    IN_PLACE: tl.constexpr,  # out has each matrix in its own shape, not as [m, n]
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK_M: tl.constexpr,
    CHECK_N: tl.constexpr,
    CHECK_K: tl.constexpr,
):
    head, matrix, tile = matrix_tile(TILES0, TILES1, TILES2)
    num_rows, num_columns = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    side = tl.minimum(num_rows, num_columns)
    square = square_place(head, matrix, NET)
    if SQUARE:
        element = square
        length = side
    else:
        element, _ = matrix_place(head, matrix, NET)
        length = tl.maximum(num_rows, num_columns)
    stop_rows, stop_columns = matrix_shape(matrix, num_k, num_v, num_h)
    stop = tl.minimum(stop_rows, stop_columns)
    tiles_n = tl.cdiv(length, BLOCK_N)
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _dot_square(
        acc, square_ptr + square, x_ptr + element, rows, columns, side, length, stop,
        CHECK_M, CHECK_N, CHECK_K, BLOCK_K,
    )  # fmt: skip
    if x2_ptr is not None:
        acc = _dot_square(
            acc, square2_ptr + square, x2_ptr + element, rows, columns, side, length, stop,
            CHECK_M, CHECK_N, CHECK_K, BLOCK_K,
        )  # fmt: skip
    offsets = element + rows[:, None] * length + columns[None, :]
    inside = (rows < side)[:, None] & (columns < length)[None, :]
    acc += factor * tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if IN_PLACE:
        tall = num_rows > num_columns
        stride_row = tl.where(tall, 1, length)
        stride_column = tl.where(tall, side, 1)
        offsets = element + rows[:, None] * stride_row + columns[None, :] * stride_column
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _inner_kernel(
    a_ptr,  # [heads, SIZE], float32
    b_ptr,
    c_ptr,  # or None
    out_ptr,  # [heads, ROWS]: rows of <a, b>
    a_squares_ptr,  # [heads, ROWS]: and of <a, a>, or None
    c_squares_ptr,  # [heads, ROWS]: and of <c, c>
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
    a = tl.load(a_ptr + element + offsets, mask=inside, other=0.0)
    b = tl.load(b_ptr + element + offsets, mask=inside, other=0.0)
    rows += row
    tl.store(out_ptr + rows, tl.sum(a * b, axis=1), mask=real)
    if a_squares_ptr is not None:
        tl.store(a_squares_ptr + rows, tl.sum(a * a, axis=1), mask=real)
    if c_ptr is not None:
        c = tl.load(c_ptr + element + offsets, mask=inside, other=0.0)
        tl.store(c_squares_ptr + rows, tl.sum(c * c, axis=1), mask=real)


SYMMETRIC_KERNELS = {TRITON: _newton_schulz_symmetric_kernel}
MULTIPLY_KERNELS = {TRITON: _newton_schulz_multiply_kernel}


def normalize_constexprs(dims: Dims, gradient: bool, in_place: bool = False) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        **tile_constexprs(dims, dims.shapes, NORMALIZE_BLOCK, NORMALIZE_BLOCK),
        "GRADIENT": gradient,
        "IN_PLACE": in_place,
        "BLOCK": NORMALIZE_BLOCK,
        "BLOCK_TOTAL": triton.next_power_of_2(max(dims.Dh, dims.Dv)),
    }


def symmetric_constexprs(
    dims: Dims, config: TTTConfig, square: bool, one_sided: bool = False
) -> dict[str, int]:
    sides, lengths = _sides(dims, square)
    return {
        **dims_constexprs(dims),
        **tile_constexprs(
            dims, [(side, side) for side in sides], config.block_m, config.block_m, triangular=True
        ),
        "SQUARE": square,
        "ONE_SIDED": one_sided,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "CHECK_M": any(side % config.block_m for side in sides),
        "CHECK_K": any(length % config.block_k for length in lengths),
    }


def multiply_constexprs(
    dims: Dims, config: TTTConfig, in_place: bool = False, square: bool = False
) -> dict[str, int]:
    sides, lengths = _sides(dims, square)
    return {
        **dims_constexprs(dims),
        **tile_constexprs(dims, list(zip(sides, lengths)), config.block_m, config.block_n),
        "SQUARE": square,
        "IN_PLACE": in_place,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "CHECK_M": any(side % config.block_m for side in sides),
        "CHECK_N": any(length % config.block_n for length in lengths),
        "CHECK_K": any(side % config.block_k for side in sides),
    }


def _sides(dims: Dims, square: bool) -> tuple[list[int], list[int]]:
    """Rows and columns of the matrices as the iteration has them, or of the squares."""
    sides = [min(shape) for shape in dims.shapes]
    return sides, sides if square else [max(shape) for shape in dims.shapes]
