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
from lact_kernels.triton.fast_weights.blocks import (
    of_activations,
    of_tokens,
    of_weights,
)
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
    load_block,
    matrix_place,
    matrix_shape,
    matrix_tile,
    token_offset,
    token_tile,
    weight_arguments,
)
from lact_kernels.triton.launch import launch, num_multiprocessors, outer_strides
from lact_kernels.triton.primitives import store_rows

MIN_SPLIT_BLOCKS = 4  # a part of a sum over tokens has at least so many steps


@triton.jit(do_not_specialize=[*TOKEN_ARGUMENTS, "num_chunks", "out_chunks", "split_length"])
def _ttt_outer_kernel(
    x,  # a pointer, or without strides a descriptor, as y is then
    y,
    acts,  # [3, H, rows, DH]: a pointer, or a descriptor for the rows of a result,
    acts_right,  # and one for its columns
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
    num_left, num_right = matrix_shape(matrix, NET.DK, NET.DV, NET.DH)
    tiles_n = tl.cdiv(num_right, BLOCK_N)
    first_left = tile // tiles_n * BLOCK_M
    first_right = tile % tiles_n * BLOCK_N
    start = split.to(tl.int32) * split_length
    stop = tl.minimum(start + split_length, number)
    # A part without tokens takes one step over zeros: with a loop that may be skipped, ptxas waits for each
    # matrix instruction on its own (C7515).
    end = tl.maximum(stop, start + 1)
    tl.assume(end > start)
    # Both factors are [tokens, ..]: the activations of w0 and w2 with x, y with those of w1.
    if x_strides is None:
        left, right = acts, x
        # A descriptor knows nothing of the chunk's end: zeros are those of a head that there is not.
        head = tl.where(start < number, h, H).to(tl.int32)
        left_place, right_place = (matrix, head), (b.to(tl.int32), head)
        left_first, right_first = row.to(tl.int32), first.to(tl.int32)
        if matrix == 1:
            left, right = y, acts_right
            left_place, right_place = right_place, left_place
            left_first, right_first = right_first, left_first
        left_block = (left, left_place, left_first)
        right_block = (right, right_place, right_first)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for token in range(start, end, BLOCK_K):
            rows = load_block(left_block, token, first_left, BLOCK_K, BLOCK_M, False, False)
            columns = load_block(right_block, token, first_right, BLOCK_K, BLOCK_N, False, False)
            acc = tl.dot(tl.trans(rows), columns, acc, input_precision="ieee")
    else:
        plane = tl.cast(num_rows, tl.int64) * H * NET.DH
        left_ptr = acts + (h * num_rows + row) * NET.DH + matrix * plane
        stride_left = NET.DH
        right_ptr = x + token_offset(x_strides, b, first, h)
        stride_right = x_strides[1]
        if matrix == 1:
            right_ptr = left_ptr
            stride_right = NET.DH
            left_ptr = y + token_offset(y_strides, b, first, h)
            stride_left = y_strides[1]
        left_block = (left_ptr, stride_left, stop, num_left)
        right_block = (right_ptr, stride_right, stop, num_right)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for token in range(start, end, BLOCK_K):
            rows = load_block(left_block, token, first_left, BLOCK_K, BLOCK_M, True, CHECK_M)
            columns = load_block(right_block, token, first_right, BLOCK_K, BLOCK_N, True, CHECK_N)
            acc = tl.dot(tl.trans(rows), columns, acc, input_precision="ieee")
    rows = first_left + tl.arange(0, BLOCK_M)
    columns = first_right + tl.arange(0, BLOCK_N)
    if units_ptr is not None:
        acc *= tl.load(units_ptr + ((place + chunk) * H + h) * 4 + 3)
    element, _ = matrix_place((split * out_chunks + chunk) * H + h, matrix, NET)
    out_pointers = out_ptr + element + rows[:, None] * num_right + columns[None, :]
    store_rows(out_pointers, acc, rows, num_left, columns, num_right)


@triton.jit
def _project(
    acc,  # [BLOCK_T, BLOCK_N]
    acts,  # of the tile's first token, as `activations_of` gives it
    weights,  # of the chunk and head: its three matrices, as `load_block` takes them
    units_ptr,  # of the three matrices, in which the result is too, to keys that of the last; or None
    first_column,
    num_h,
    NET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TO_VALUES: tl.constexpr,
    W0: tl.constexpr,  # of the terms to keys those that there are
    W2: tl.constexpr,
):
    if TO_VALUES:
        acc = dot_rows(
            acc, acts[0], weights[1], first_column, num_h, NET.DH, NET.DV, BLOCK_N, BLOCK_K
        )
    else:
        if W0:
            acc = dot_columns(
                acc, acts[0], weights[0], first_column, num_h, NET.DH, NET.DK, BLOCK_N, BLOCK_K
            )
        if W0 and W2 and units_ptr is not None:
            acc *= tl.div_rn(tl.load(units_ptr), tl.load(units_ptr + 2))
        if W2:
            acc = dot_columns(
                acc, acts[1], weights[2], first_column, num_h, NET.DH, NET.DK, BLOCK_N, BLOCK_K
            )
    return acc


@triton.jit
def _activations(acts, h, row, num_rows, H, number, NET: tl.constexpr, DESCRIBED: tl.constexpr):
    """Of a tile's tokens the first and the third plane of activations, each as `load_block` takes it."""
    if DESCRIBED:
        h, row = tl.cast(h, tl.int32), tl.cast(row, tl.int32)
        planes = (acts, (0, h), row), (acts, (2, h), row)
    else:
        ptr = acts + (h * num_rows + row) * NET.DH
        third = ptr + 2 * (tl.cast(num_rows, tl.int64) * H * NET.DH)
        planes = (ptr, NET.DH, number, NET.DH), (third, NET.DH, number, NET.DH)
    return planes


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_project_kernel(
    acts,  # [3, H, rows, DH]; to values [1, H, rows, DH]: the middle one; or None
    w0,  # [places, H, SIZE]: matrices of NET; or the first of three: see head_weights
    w1,
    w2,
    acts2,  # a second pair, or None
    second_w0,  # [places, H, SIZE]
    second_w1,
    second_w2,
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
    DESCRIBED: tl.constexpr,  # acts and weights are descriptors
):
    WIDTH: tl.constexpr = NET.DV if TO_VALUES else NET.DK
    place, h, first_column, b, first, row, number = token_tile(
        table_ptr, place, first_chunk, first_row, B, T, shift, chunk_size, width, H, WIDTH, BLOCK_T, BLOCK_N
    )  # fmt: skip
    if number <= 0:
        return
    if units_ptr is not None:
        units_ptr += (place * H + h) * 4
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if acts is not None:
        acc = _project(
            acc, _activations(acts, h, row, num_rows, H, number, NET, DESCRIBED),
            head_weights((w0, w1, w2), weight_strides, place, b, h, H, NET, DESCRIBED),
            units_ptr, first_column, num_h, NET, BLOCK_N, BLOCK_K, TO_VALUES, NET.W0, NET.W2,
        )  # fmt: skip
    tokens = tl.arange(0, BLOCK_T)
    if lr_ptr is not None:
        lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
        acc *= tl.load(lr_pointers, mask=tokens < number, other=0.0)[:, None]
    if units_ptr is not None:
        unit = tl.load(units_ptr + 3)
        if acts is not None:
            LAST: tl.constexpr = 2 if NET.W2 else 0
            acc *= tl.div_rn(tl.load(units_ptr + (1 if TO_VALUES else LAST)), unit)
    if acts2 is not None:
        acc = _project(
            acc, _activations(acts2, h, row, num_rows, H, number, NET, DESCRIBED),
            head_weights((second_w0, second_w1, second_w2), None, place, b, h, H, NET, DESCRIBED),
            None, first_column, num_h, NET, BLOCK_N, BLOCK_K, TO_VALUES, True, NET.W0 or NET.W1,
        )  # fmt: skip
    if units_ptr is not None:
        acc *= unit
    columns = first_column + tl.arange(0, BLOCK_N)
    pointers = out_ptr + token_offset(out_strides, b, first, h)
    pointers += tokens[:, None] * out_strides[1] + columns[None, :]
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
    described: bool = False,  # see `blocks`
) -> Callable[[Run], None]:
    """The three outer products of each chunk of a run, in as many parts as `out` has splits."""
    config = outer_config(x, dims, described)
    constexprs = outer_constexprs(dims, config)
    splits, out_chunks, H, _ = out.shape
    tensors, strides = (x, y, acts, None), outer_strides(x, y)
    if config.descriptors:
        left, right = (config.block_k, config.block_m), (config.block_k, config.block_n)
        tensors = (
            of_tokens(x, right), of_tokens(y, left),
            of_activations(acts, left), of_activations(acts, right),
        )  # fmt: skip
        strides = [None, None]
    sizes = (acts.shape[2], H, *dims.sizes)
    block, programs = config.block_k, splits * H * num_tiles(constexprs)

    def outer(run: Run) -> None:
        split_length = -(-run.width // (splits * block)) * block
        launch(
            OUTER_KERNELS, config, (run.num_chunks * programs,), *tensors, units, out, *run[1:], *sizes,
            run.num_chunks, out_chunks, split_length, *strides, **constexprs,
        )  # fmt: skip

    return outer


def outer_config(x: Tensor, dims: Dims, described: bool) -> TTTConfig:
    name = "ttt_outer"
    if described and all(fills_wide_tiles(columns) for _, columns in dims.iterated):
        name = "ttt_outer_wide"
    return ttt_config(name, x.dtype, capability_of(x.device), described)


def fills_wide_tiles(columns: int) -> bool:
    """Whether tiles of 256 columns are no more work than tiles of 128."""
    return -(-columns // 128) % 2 == 0


def num_outer_splits(
    x: Tensor, num_chunks: int, length: int, dims: Dims, described: bool = False
) -> int:
    """Parts into which to cut chunks of `length` tokens, so that a device with few programs is filled."""
    config = outer_config(x, dims, described)
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
    described: bool = False,  # see `blocks`
) -> Callable[[Run], None]:
    """Activations back to the tokens' channels: `a[0] w1^T` to values, `a[0] w0 + a[2] w2` to keys."""
    columns = dims.Dv if to_values else dims.Dk
    name = "ttt_project_wide" if described and fills_wide_tiles(columns) else "ttt_project"
    config = ttt_config(name, out.dtype, capability_of(out.device), described)
    acts2, weights2 = second or (None, None)
    some_acts, weight_strides = acts2 if acts is None else acts, None
    if config.descriptors:
        blocks = (config.block_k, config.block_n), config.columns_block
        acts, acts2 = (of_activations(x, config.rows_block) for x in (acts, acts2))
        matrices, matrices2 = (of_weights(w, dims, *blocks) for w in (weights, weights2))
    else:
        matrices, weight_strides = weight_arguments(weights)
        matrices2, _ = weight_arguments(weights2)
    return launcher_over_tokens(
        PROJECT_KERNELS, config, columns, (acts, *matrices, acts2, *matrices2, units, lr, out),
        (*outer_strides(out), weight_strides), some_acts, dims,
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
        "DESCRIBED": config.descriptors,
    }
