"""Muon's orthogonalisation by five Newton-Schulz steps, forward and backward, of all matrices at once.

With X = G / (|G|_F + 1e-7), `[m, n]`, transposed where G has more rows than columns, a step is

```
    S = X X^T      B = b S + c S S      X <- a X + B X
```

and its gradient, with S and B symmetric, and D = dX X^T + X dX^T, which is all of dB that counts:

```
    R = b D + c (D S + S D)      dX <- a dX + B dX + R X
```

So there are two kinds of products: symmetric ones (S, B, D, R), of which only the tiles on and below the
diagonal are computed, and those with X. For 16-bit tokens the matrices are float16, for float32 ones float32,
and so are small ones, which cost nothing; products accumulate in float32. The division by the norm brings
all values into the range of float16. Gradients, whose scale is arbitrary, are divided by theirs too,
`dX sqrt(m) / |dX|_F`, and given their scale back at the end. The five steps amplify small singular values,
and rounding noise with them, about 490 times, which is why bfloat16 would not do.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.newton_schulz import Coefficients
from lact_kernels.triton.configs import TRITON, TTTConfig, capability_of, ttt_config
from lact_kernels.triton.fast_weights.layout import (
    Dims,
    dims_constexprs,
    num_tiles,
    tile_constexprs,
)
from lact_kernels.triton.fast_weights.primitives import (
    matrix_place,
    matrix_shape,
    matrix_tile,
    matrix_total,
)
from lact_kernels.triton.fast_weights.update import (
    NUM_WARPS,
    matrix_rows,
    row_programs,
    row_warps,
)
from lact_kernels.triton.fast_weights.update_bwd import NEWTON_SCHULZ_EPS
from lact_kernels.triton.launch import launch
from lact_kernels.triton.primitives import load_tile

NORMALIZE_BLOCK = 64
SMALL = 64  # up to this size products take less time than their launches, in float32, too


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
    out_ptr,  # [heads, SQUARES]: y_factor y + factor (a b^T + b a^T), without b: factor a a^T
    y_factor,
    factor,
    num_k,
    num_v,
    num_h,
    NET: tl.constexpr,
    SQUARE: tl.constexpr,
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
        acc = _dot_transposed(
            acc, b_ptr, a_ptr, rows, columns, side, length, stop, CHECK_M, CHECK_K, BLOCK_K
        )
    acc *= factor
    offsets = rows[:, None] * side + columns[None, :]
    inside = (rows < side)[:, None] & (columns < side)[None, :]
    if y_ptr is not None:
        y = tl.load(y_ptr + square + offsets, mask=inside, other=0.0)
        acc += y_factor * y.to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    out_ptr += square
    tl.store(out_ptr + offsets, result, mask=inside)
    if tile_m != tile_n:
        tl.store(out_ptr + columns[None, :] * side + rows[:, None], result, mask=inside)


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
    x_ptr,  # [heads, SIZE]
    square2_ptr,  # a second product to add, or None
    x2_ptr,
    out_ptr,  # [heads, SIZE]: factor x + square x + square2 x2
    factor,
    num_k,
    num_v,
    num_h,
    NET: tl.constexpr,
    IN_PLACE: tl.constexpr,  # each matrix in its own shape, not as [m, n]
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
    length = tl.maximum(num_rows, num_columns)
    square = square_place(head, matrix, NET)
    element, _ = matrix_place(head, matrix, NET)
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


class NewtonSchulz:
    """The iteration for matrices packed `[heads, SIZE]`, of one shape and dtype."""

    def __init__(self, heads: int, dims: Dims, tokens_dtype: torch.dtype, device: torch.device):
        self.heads, self.dims = heads, dims
        small = max(dims.sizes) <= SMALL
        self.dtype = torch.float32 if small or tokens_dtype == torch.float32 else torch.float16
        capability = capability_of(device)
        self.symmetric_config = ttt_config("newton_schulz_symmetric", self.dtype, capability)
        self.multiply_config = ttt_config("newton_schulz_multiply", self.dtype, capability)

    def forward(self, g: Tensor, squares: Tensor, coefficients: Coefficients) -> Tensor:
        """The orthogonalised g, float32. `squares` `[heads, ROWS]` are those of the rows' norms."""
        for x, _, b, (a, _, _) in self._iterates(g, squares, coefficients):
            last = (a, b, x)
        a, b, x = last
        return self._multiply(b, x, a, in_place=True)

    def backward(
        self,
        dx: Tensor,
        g: Tensor,
        dsquares: Tensor,
        squares: Tensor,
        coefficients: Coefficients,
        dbuffers: Tensor | None = None,
        with_sizes: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradient of g / |g|_F in units of `|dx|_F / sqrt(m)`, float32, and the rows of <.., g>.

        Iterates are computed again. `dsquares` and `squares` are those of the norms of rows of dx and g. With
        sizes those of the result and of `dbuffers`, if there are any, are returned, too.
        """
        iterates = list(self._iterates(g, squares, coefficients))
        dx = self._normalize(dx, dsquares, gradient=True)
        for x, s, b, (alpha, beta, gamma) in reversed(iterates):
            d = self._symmetric(x, dx)
            r = self._symmetric(s, d, y=d, y_factor=beta, factor=gamma)
            dx = self._multiply(b, dx, alpha, (r, x), in_place=x is iterates[0][0])
        dbuffers = dbuffers if with_sizes else None
        size = torch.empty_like(squares) if with_sizes else None
        dbuffers_size = None if dbuffers is None else torch.empty_like(squares)
        inner = torch.empty_like(squares)
        programs, constexprs = row_programs(self.dims)
        _inner_kernel[(self.heads * programs,)](
            dx,
            g,
            dbuffers,
            inner,
            size,
            dbuffers_size,
            **constexprs,
            num_warps=row_warps(self.dims),
        )
        return dx, inner, size, dbuffers_size

    def _iterates(self, g: Tensor, squares: Tensor, coefficients: Coefficients) -> Iterator[tuple]:
        """X, S and B of each step, with its coefficients."""
        x = self._normalize(g, squares, gradient=False)
        for step, (a, b, c) in enumerate(coefficients):
            s = self._symmetric(x)
            polynomial = self._symmetric(s, y=s, y_factor=b, factor=c)
            yield x, s, polynomial, (a, b, c)
            if step < len(coefficients) - 1:
                x = self._multiply(polynomial, x, a)

    def _normalize(self, g: Tensor, squares: Tensor, gradient: bool) -> Tensor:
        x = torch.empty_like(g, dtype=self.dtype)
        constexprs = normalize_constexprs(self.dims, gradient)
        _normalize_kernel[(self.heads * num_tiles(constexprs),)](
            g, squares, x, **constexprs, num_warps=NUM_WARPS
        )
        return x

    def _symmetric(
        self,
        a: Tensor,
        b: Tensor | None = None,
        y: Tensor | None = None,
        y_factor: float = 0.0,
        factor: float = 1.0,
    ) -> Tensor:
        """`y_factor y + factor (a b^T + b a^T)`; without b, `a a^T` in place of the sum."""
        constexprs = symmetric_constexprs(self.dims, self.symmetric_config, square=y is not None)
        out = a.new_empty(self.heads, self.dims.squares[-1])
        launch(
            SYMMETRIC_KERNELS, self.symmetric_config, (self.heads * num_tiles(constexprs),),
            a, b, y, out, y_factor, factor, *self.dims.sizes,
            **constexprs,
        )  # fmt: skip
        return out

    def _multiply(
        self,
        square: Tensor,
        x: Tensor,
        factor: float,
        second: tuple[Tensor, Tensor] | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """`factor x + square x`, plus the second product; `in_place`: float32, in the shape of the matrix."""
        constexprs = multiply_constexprs(self.dims, self.multiply_config, in_place)
        out = torch.empty_like(x, dtype=torch.float32 if in_place else self.dtype)
        launch(
            MULTIPLY_KERNELS, self.multiply_config, (self.heads * num_tiles(constexprs),),
            square, x, *(second or (None, None)), out, factor, *self.dims.sizes,
            **constexprs,
        )  # fmt: skip
        return out


def normalize_constexprs(dims: Dims, gradient: bool) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        **tile_constexprs(dims, dims.shapes, NORMALIZE_BLOCK, NORMALIZE_BLOCK),
        "GRADIENT": gradient,
        "BLOCK": NORMALIZE_BLOCK,
        "BLOCK_TOTAL": triton.next_power_of_2(max(dims.Dh, dims.Dv)),
    }


def symmetric_constexprs(dims: Dims, config: TTTConfig, square: bool) -> dict[str, int]:
    sides = [min(shape) for shape in dims.shapes]
    lengths = sides if square else [max(shape) for shape in dims.shapes]
    return {
        **dims_constexprs(dims),
        **tile_constexprs(
            dims, [(side, side) for side in sides], config.block_m, config.block_m, triangular=True
        ),
        "SQUARE": square,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "CHECK_M": any(side % config.block_m for side in sides),
        "CHECK_K": any(length % config.block_k for length in lengths),
    }


def multiply_constexprs(dims: Dims, config: TTTConfig, in_place: bool) -> dict[str, int]:
    sides = [min(shape) for shape in dims.shapes]
    lengths = [max(shape) for shape in dims.shapes]
    return {
        **dims_constexprs(dims),
        **tile_constexprs(dims, list(zip(sides, lengths)), config.block_m, config.block_n),
        "IN_PLACE": in_place,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "CHECK_M": any(side % config.block_m for side in sides),
        "CHECK_N": any(length % config.block_n for length in lengths),
        "CHECK_K": any(side % config.block_k for side in sides),
    }
