"""The two kinds of products around the activations of the fast network (see `activations`).

Over the tokens of a chunk, the outer products that make up the three weight gradients:

```
    of w0: acts[0]^T x      of w1: y^T acts[1]      of w2: acts[2]^T x
```

for the update (x keys, y values times lr1), its backward (x, y keys and values) and the backward of
apply (x, y queries and output gradients). One launch computes all three, of every head and chunk; where
that would leave a device idle, the tokens are split, and whoever reads the result adds up the
parts, in order.

Over the hidden units, the way back to tokens, from activations a and weights w, for up to two pairs:

```
    to values   a[1] w1^T               (apply: o = hidden w1^T; in dv the first of two, times lr1)
    to keys     a[0] w0 + a[2] w2       (dq, dk)
```

Products take the tokens' dtype and accumulate in float32. What comes in units (see `activations`), the
gradients of the second or the weights of the first pair among them, gets its scale back in float32.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.configs import TRITON, TTTConfig, capability_of, ttt_config
from lact_kernels.triton.fast_weights.layout import (
    TOKEN_ARGUMENTS,
    Dims,
    Run,
    dims_constexprs,
    launcher_over_tokens,
    num_tiles,
    tile_constexprs,
)
from lact_kernels.triton.fast_weights.primitives import (
    chunk_tokens,
    dot_columns,
    dot_rows,
    head_weights,
    matrix_place,
    matrix_shape,
    matrix_tile,
    token_offset,
    token_pointers,
    token_tile,
    weight_arguments,
)
from lact_kernels.triton.launch import launch, num_multiprocessors, outer_strides
from lact_kernels.triton.primitives import load_tile, store_rows

MIN_SPLIT_BLOCKS = 4  # a part of a sum over tokens has at least so many steps


@triton.jit(do_not_specialize=[*TOKEN_ARGUMENTS, "num_chunks", "out_chunks", "split_length"])
def _ttt_outer_kernel(
    x_ptr,
    y_ptr,
    acts_ptr,  # [3, H, rows, DH]
    units_ptr,  # [places, H, 4]: the last is that of the activations; or None
    out_ptr,  # [splits, chunks, H, SIZE], float32
    table_ptr,
    place,
    first_chunk,
    first_row,
    B,
    T,
    shift,
    chunk_size,
    width,
    num_rows,
    H,
    num_k,
    num_v,
    num_h,
    num_chunks,
    out_chunks,
    split_length,
    x_strides,  # of batch row, token and head, like the next
    y_strides,
    NET: tl.constexpr,
    TILES0: tl.constexpr,
    TILES1: tl.constexpr,
    TILES2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK_M: tl.constexpr,
    CHECK_N: tl.constexpr,
):
    part, matrix, tile = matrix_tile(TILES0, TILES1, TILES2)
    h = part % H
    chunk = part // H % num_chunks
    split = part // (H * num_chunks)
    b, first, number, row = chunk_tokens(
        chunk, table_ptr, first_chunk, first_row, B, T, shift, chunk_size, width
    )
    # Both factors are [tokens, ..]: the activations of w0 and w2 with x, y with those of w1.
    plane = tl.cast(num_rows, tl.int64) * H * NET.DH
    acts_ptr += (h * num_rows + row) * NET.DH + matrix * plane
    x_ptr += token_offset(x_strides, b, first, h)
    y_ptr += token_offset(y_strides, b, first, h)
    if matrix == 1:
        left_ptr = y_ptr
        stride_left = y_strides[1]
        right_ptr = acts_ptr
        stride_right = NET.DH
    else:
        left_ptr = acts_ptr
        stride_left = NET.DH
        right_ptr = x_ptr
        stride_right = x_strides[1]
    num_left, num_right = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    tiles_n = tl.cdiv(num_right, BLOCK_N)
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left_offsets = inner[:, None] * stride_left + rows[None, :]
    right_offsets = inner[:, None] * stride_right + columns[None, :]
    start = split.to(tl.int32) * split_length
    stop = tl.minimum(start + split_length, number)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A part without tokens takes one step over zeros: with a loop that may be skipped, ptxas waits for each
    # matrix instruction on its own (C7515).
    end = tl.maximum(stop, start + 1)
    tl.assume(end > start)
    for token in range(start, end, BLOCK_K):
        tokens = token + inner
        left_pointers = left_ptr + tl.cast(token, tl.int64) * stride_left + left_offsets
        right_pointers = right_ptr + tl.cast(token, tl.int64) * stride_right + right_offsets
        left = load_tile(left_pointers, tokens, stop, rows, num_left, True, CHECK_M)
        right = load_tile(right_pointers, tokens, stop, columns, num_right, True, CHECK_N)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    if units_ptr is not None:
        acc *= tl.load(units_ptr + ((place + chunk) * H + h) * 4 + 3)
    element, _ = matrix_place((split * out_chunks + chunk) * H + h, matrix, NET)
    out_pointers = out_ptr + element + rows[:, None] * num_right + columns[None, :]
    store_rows(out_pointers, acc, rows, num_left, columns, num_right)


@triton.jit
def _project(
    acc,  # [BLOCK_T, BLOCK_N]
    acts_ptr,  # of the tile's first token
    weights,  # of the chunk and head: where its three matrices begin
    units_ptr,  # of the three matrices, in which the result is too, to keys that of the last; or None
    tokens,
    number,
    columns,
    plane,
    num_h,
    NET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TO_VALUES: tl.constexpr,
    W0: tl.constexpr,  # of the terms to keys those that there are
    W2: tl.constexpr,
):
    rows = acts_ptr + tokens[:, None] * NET.DH
    if TO_VALUES:
        acc, _ = dot_rows(
            acc, acc, rows, tokens, number, weights[1], None, columns, num_h,
            NET.DH, NET.DV, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        if W0:
            acc, _ = dot_columns(
                acc, acc, rows, tokens, number, weights[0], None, columns, num_h,
                NET.DH, NET.DK, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if W0 and W2 and units_ptr is not None:
            acc *= tl.div_rn(tl.load(units_ptr), tl.load(units_ptr + 2))
        if W2:
            acc, _ = dot_columns(
                acc, acc, rows + 2 * plane, tokens, number, weights[2], None, columns, num_h,
                NET.DH, NET.DK, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_project_kernel(
    acts_ptr,  # [3, H, rows, DH]; to values [H, rows, DH]: only the middle one; or None
    weights_ptr,  # [places, H, SIZE]: matrices of NET; or with strides three: see head_weights
    acts2_ptr,  # a second pair, or None
    weights2_ptr,  # [places, H, SIZE]
    units_ptr,  # [places, H, 4]: of the first pair's three matrices and the second's activations, or None
    lr_ptr,  # [B, H, T], contiguous: factors of the first pair, or None
    out_ptr,
    table_ptr,
    place,
    first_chunk,
    first_row,
    B,
    T,
    shift,
    chunk_size,
    width,
    num_rows,
    H,
    num_k,
    num_v,
    num_h,
    out_strides,  # of batch row, token and head
    weight_strides,
    NET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TO_VALUES: tl.constexpr,
):
    WIDTH: tl.constexpr = NET.DV if TO_VALUES else NET.DK
    place, h, first_column, b, first, row, number = token_tile(
        table_ptr, place, first_chunk, first_row, B, T, shift, chunk_size, width, H, WIDTH, BLOCK_T, BLOCK_N
    )  # fmt: skip
    if number <= 0:
        return
    tokens = tl.arange(0, BLOCK_T)
    columns = first_column + tl.arange(0, BLOCK_N)
    plane = tl.cast(num_rows, tl.int64) * H * NET.DH
    first_element = (h * num_rows + row) * NET.DH
    if units_ptr is not None:
        units_ptr += (place * H + h) * 4
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if acts_ptr is not None:
        weights = head_weights(weights_ptr, weight_strides, place, b, h, H, NET)
        acc = _project(
            acc, acts_ptr + first_element, weights, units_ptr, tokens, number, columns,
            plane, num_h, NET, BLOCK_N, BLOCK_K, TO_VALUES, NET.W0, NET.W2,
        )  # fmt: skip
    if lr_ptr is not None:
        lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
        acc *= tl.load(lr_pointers, mask=tokens < number, other=0.0)[:, None]
    if units_ptr is not None:
        unit = tl.load(units_ptr + 3)
        if acts_ptr is not None:
            LAST: tl.constexpr = 2 if NET.W2 else 0
            acc *= tl.div_rn(tl.load(units_ptr + (1 if TO_VALUES else LAST)), unit)
    if acts2_ptr is not None:
        weights2 = head_weights(weights2_ptr, None, place, b, h, H, NET)
        acc = _project(
            acc, acts2_ptr + first_element, weights2, None, tokens, number, columns,
            plane, num_h, NET, BLOCK_N, BLOCK_K, TO_VALUES, True, NET.W0 or NET.W1,
        )  # fmt: skip
    if units_ptr is not None:
        acc *= unit
    pointers = token_pointers(out_ptr, out_strides, b, first, h, tokens) + columns[None, :]
    store_rows(pointers, acc, tokens, number, columns, WIDTH)


OUTER_KERNELS = {TRITON: _ttt_outer_kernel}
PROJECT_KERNELS = {TRITON: _ttt_project_kernel}


def ttt_outer(
    x: Tensor,  # `[B, T, H, Dk]`
    y: Tensor,  # `[B, T, H, Dv]`
    acts: Tensor,  # `[3, H, rows, Dh]`
    out: Tensor,  # `[splits, chunks or more, H, SIZE]`, float32: written
    dims: Dims,
    units: Tensor | None = None,  # `[places, H, 4]`: the last is that of acts
) -> Callable[[Run], None]:
    """The three outer products of each chunk of a run, in as many parts as `out` has splits."""
    config = ttt_config("ttt_outer", x.dtype, capability_of(x.device))
    constexprs = outer_constexprs(dims, config)
    splits, out_chunks, H, _ = out.shape
    arguments, strides = (x, y, acts, units, out), outer_strides(x, y)
    sizes = (acts.shape[2], H, *dims.sizes)
    block, programs = config.block_k, splits * H * num_tiles(constexprs)

    def outer(run: Run) -> None:
        split_length = -(-run.width // (splits * block)) * block
        launch(
            OUTER_KERNELS, config, (run.num_chunks * programs,), *arguments, *run[1:], *sizes,
            run.num_chunks, out_chunks, split_length, *strides, **constexprs,
        )  # fmt: skip

    return outer


def num_outer_splits(x: Tensor, num_chunks: int, length: int, dims: Dims) -> int:
    """Parts into which to cut chunks of `length` tokens, so that a device with few programs is filled."""
    config = ttt_config("ttt_outer", x.dtype, capability_of(x.device))
    programs = num_chunks * x.shape[2] * num_tiles(outer_constexprs(dims, config))
    wanted = num_multiprocessors(x.device) // max(programs, 1)
    return max(1, min(wanted, length // (MIN_SPLIT_BLOCKS * config.block_k)))


def ttt_project(
    acts: Tensor | None,  # `[3, H, rows, Dh]`; to values `[1, H, rows, Dh]`
    weights: Tensor | Triple | None,  # `[places, H, SIZE]`, or three: see weight_arguments
    out: Tensor,  # `[B, T, H, Dv or Dk]`: written
    dims: Dims,
    to_values: bool,
    second: tuple[Tensor, Tensor]
    | None = None,  # the same again, with packed weights, added: of what reaches the matrices of `dims`
    lr: Tensor | None = None,  # `[B, H, T]`: factors of the first
    units: Tensor | None = None,  # `[places, H, 4]`: of the weights, and of the second activations
) -> Callable[[Run], None]:
    """Activations back to the tokens' channels: `a[0] w1^T` to values, `a[0] w0 + a[2] w2` to keys."""
    config = ttt_config("ttt_project", out.dtype, capability_of(out.device))
    columns = dims.Dv if to_values else dims.Dk
    weights, weight_strides = weight_arguments(weights)
    return launcher_over_tokens(
        PROJECT_KERNELS, config, columns, (acts, weights, *(second or (None, None)), units, lr, out),
        (*outer_strides(out), weight_strides), second[0] if acts is None else acts, dims,
        **project_constexprs(dims, config, to_values),
    )  # fmt: skip


def outer_constexprs(dims: Dims, config: TTTConfig) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        **tile_constexprs(dims, dims.shapes, config.block_m, config.block_n),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "CHECK_M": any(rows % config.block_m for rows, _ in dims.shapes),
        "CHECK_N": any(columns % config.block_n for _, columns in dims.shapes),
    }


def project_constexprs(dims: Dims, config: TTTConfig, to_values: bool) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        "BLOCK_T": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TO_VALUES": to_values,
    }
