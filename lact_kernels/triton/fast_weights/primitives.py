"""What the fast-weight kernels share: matrices, a chunk's tokens, the loops of their products.

Kernels work on a run of chunks. Arrays with an entry per chunk are of all chunks that are at hand, and the
run's first one is at `place` in them; `first_chunk` is its number in the order of `layout`, and `first_row`
the first row that there is of activations.
"""

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.launch import strides
from lact_kernels.triton.primitives import load_tile, store_rows

# Where gradients are given a power of two as their unit: |dG|_F is at most 2^14 of its unit. Smaller units
# than the first of these limits would be of no use, and quotients of two stay in float32's range.
GRADIENT_BITS = tl.constexpr(14)
SMALLEST_UNIT, LARGEST_UNIT = tl.constexpr(2.0**-40), tl.constexpr(2.0**60)

TOTAL_BLOCK = tl.constexpr(4096)  # numbers that one program adds up at once


@triton.jit
def chunk_tokens(chunk, table_ptr, first_chunk, first_row, B, T, shift, chunk_size, width):
    """Batch row, first token and number of tokens of a chunk, and its first row of activations.

    Dense tokens start at position `shift` of the sequence; packed ones have a table.
    """
    chunk += first_chunk
    if table_ptr is not None:
        entry = table_ptr + chunk * 3
        b = 0
        first = tl.load(entry)
        number = tl.load(entry + 1)
        row = tl.load(entry + 2) - first_row
    else:
        b = chunk % B
        start = chunk // B * chunk_size - shift
        first = tl.maximum(start, 0)
        number = tl.maximum(tl.minimum(start + chunk_size, T) - first, 0)
        row = chunk * width - first_row
    return tl.cast(b, tl.int64), tl.cast(first, tl.int64), number, tl.cast(row, tl.int64)


@triton.jit
def head_weights(weights, strides, place, b, h, H, NET: tl.constexpr, DESCRIBED: tl.constexpr):
    """w0, w1 and w2 of one chunk and head, each as `load_block` takes it.

    Either they lie packed `[places, H, SIZE]`, to which the first of `weights` points, and strides are None;
    or there are three pointers, to weights that all chunks of a batch row share, and `strides` are those of
    batch row and head of each; or three descriptors of [places, H, rows, columns], of which the first may be
    one of w0 and w2, [places, H, 2, rows, columns], and there is no third.
    """
    if DESCRIBED:
        at = (tl.cast(place, tl.int32), tl.cast(h, tl.int32))
        w0, w1 = (weights[0], at, 0), (weights[1], at, 0)
        w2 = w0 if weights[2] is None else (weights[2], at, 0)
    else:
        if strides is None:
            w0_ptr = weights[0] + (place * H + h) * NET.SIZE
            w1_ptr = w0_ptr + NET.OFFSET1
            w2_ptr = w0_ptr + NET.OFFSET2
        else:
            w0_ptr = weights[0] + b * strides[0] + h * strides[1]
            w1_ptr = weights[1] + b * strides[2] + h * strides[3]
            w2_ptr = weights[2] + b * strides[4] + h * strides[5]
        w0 = (w0_ptr, NET.DK, NET.DH, NET.DK)
        w1 = (w1_ptr, NET.DH, NET.DV, NET.DH)
        w2 = (w2_ptr, NET.DK, NET.DH, NET.DK)
    return w0, w1, w2


def weight_arguments(
    weights: Tensor | Triple | None,
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...] | None]:
    """`weights` and `strides` of `head_weights` by pointers.

    The weights are packed `[places, H, SIZE]`, or three tensors `[B or 1, H, rows, columns]`, of which
    each head's matrix is contiguous; with 1 all batch rows share them.
    """
    if weights is None or isinstance(weights, Tensor):
        return (weights, None, None), None
    return tuple(weights), tuple(stride for w in weights for stride in strides(w)[:2])


@triton.jit
def matrix_tile(TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr):
    """Head, matrix and tile of this program, where w0, w1 and w2 have so many tiles, which may be none."""
    pid = tl.program_id(0)
    tile = pid % (TILES0 + TILES1 + TILES2)
    head = tl.cast(pid // (TILES0 + TILES1 + TILES2), tl.int64)
    matrix = tl.where(tile < TILES0, 0, tl.where(tile < TILES0 + TILES1, 1, 2))
    tile -= tl.where(matrix == 0, 0, tl.where(matrix == 1, TILES0, TILES0 + TILES1))
    return head, matrix, tile


@triton.jit
def matrix_shape(matrix, num_k, num_v, num_h):
    """Rows and columns: [Dh, Dk] of w0 and w2, [Dv, Dh] of w1."""
    return tl.where(matrix == 1, num_v, num_h), tl.where(matrix == 1, num_h, num_k)


@triton.jit
def matrix_place(head, matrix, NET: tl.constexpr):
    """First element in `[heads, SIZE]`, and first row in `[heads, ROWS]`."""
    element = head * NET.SIZE
    element += tl.where(matrix == 0, 0, tl.where(matrix == 1, NET.OFFSET1, NET.OFFSET2))
    row = head * (2 * NET.DH + NET.DV)
    row += tl.where(matrix == 0, 0, tl.where(matrix == 1, NET.DH, NET.DH + NET.DV))
    return element, row


@triton.jit
def matrix_total(rows_ptr, num_rows, BLOCK: tl.constexpr):
    """The sum of what is given for each row, of which there are at most BLOCK."""
    if BLOCK <= TOTAL_BLOCK:
        rows = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(rows_ptr + rows, mask=rows < num_rows, other=0.0))
    else:
        parts = tl.zeros([TOTAL_BLOCK], tl.float32)
        for first in range(0, num_rows, TOTAL_BLOCK):
            rows = first + tl.arange(0, TOTAL_BLOCK)
            parts += tl.load(rows_ptr + rows, mask=rows < num_rows, other=0.0)
        total = tl.sum(parts)
    return total


@triton.jit
def power_of_two(x):
    """The smallest that is not below the float32 x >= 0, within the limits of units."""
    bits = x.to(tl.int32, bitcast=True) + 0x7FFFFF
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, SMALLEST_UNIT), LARGEST_UNIT)


@triton.jit
def token_tile(
    table_ptr, place, first_chunk, first_row, B, T, shift, chunk_size, width, H,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Place of this program's chunk, head and first column; its tokens' batch row, first, row and number.

    Neighbours have the same tokens. Beyond a chunk's end the number is 0 or less.
    """
    tiles = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    tiles_t = tl.cdiv(width, BLOCK_T)
    pid = tl.program_id(0)
    chunk_head = pid // (tiles * tiles_t)
    chunk = chunk_head // H
    b, first, number, row = chunk_tokens(
        chunk, table_ptr, first_chunk, first_row, B, T, shift, chunk_size, width
    )
    skipped = pid // tiles % tiles_t * BLOCK_T
    place, h = tl.cast(place + chunk, tl.int64), tl.cast(chunk_head % H, tl.int64)
    column = pid % tiles * BLOCK_COLUMNS
    return place, h, column, b, first + skipped, row + skipped, number - skipped


@triton.jit
def token_offset(strides, b, token, h):
    """Elements before head h of a token; `strides` are those of batch row, token and head."""
    return b * strides[0] + token * strides[1] + h * strides[2]


@triton.jit
def token_block(tensor, strides, b, first, h, number, num_channels):
    """The `number` tokens of head h from token `first` on, as `load_block` takes them.

    `tensor` is a pointer, or without strides a descriptor of [B, H, T, D].
    """
    if strides is None:
        block = (tensor, (tl.cast(b, tl.int32), tl.cast(h, tl.int32)), tl.cast(first, tl.int32))
    else:
        block = (tensor + token_offset(strides, b, first, h), strides[1], number, num_channels)
    return block


@triton.jit
def load_block(
    source,
    row,
    column,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLS: tl.constexpr,
):
    """The block [ROWS, COLS] that begins with this row and column of a matrix.

    The matrix is given by a descriptor of four axes, its place on the first two of them and its first row; or
    by a pointer, the stride of rows and how many rows and columns it has. Beyond these a block is zero where
    that is asked for, and by a descriptor beyond those of the tensor.
    """
    if len(source) == 3:
        descriptor, place, first = source
        block = descriptor.load([place[0], place[1], tl.cast(first + row, tl.int32), column])
        block = tl.reshape(block, [ROWS, COLS])
    else:
        ptr, stride, num_rows, num_cols = source
        rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
        ptr += tl.cast(row, tl.int64) * stride + column
        pointers = ptr + (rows[:, None] * stride + cols[None, :])
        block = load_tile(
            pointers, row + rows, num_rows, column + cols, num_cols, CHECK_ROWS, CHECK_COLS
        )
    return block


@triton.jit
def load_pair(source, row, column, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The same block of w0 and of w2, by one descriptor of both: [2 ROWS, COLS], a factor of one product."""
    descriptor, place, _ = source
    pair = descriptor.load([place[0], place[1], 0, row, column])
    return tl.reshape(pair, [2 * ROWS, COLS])


@triton.jit
def halves(x):
    """The left and the right half of the columns, which stay in their registers."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def dot_rows(
    acc, x, w, first, length,
    INNER: tl.constexpr, NUM_W_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + x w^T`, of the rows of w `[NUM_W_ROWS, INNER]` from `first` on. x and w as for `load_block`.

    `length` is INNER as a runtime value, which keeps the compiler from unrolling the whole loop: that
    takes registers, and seconds to compile. That it is positive must be said: where a loop may be skipped,
    ptxas waits for each matrix instruction on its own (C7515).
    """
    ROWS: tl.constexpr = acc.shape[0]
    CHECK_INNER: tl.constexpr = INNER % BLOCK_K != 0
    tl.assume(length > 0)
    for start in range(0, length, BLOCK_K):
        a = load_block(x, 0, start, ROWS, BLOCK_K, True, CHECK_INNER)
        b = load_block(w, first, start, BLOCK_N, BLOCK_K, NUM_W_ROWS % BLOCK_N != 0, CHECK_INNER)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def dot_columns(
    acc, x, w, first, length,
    INNER: tl.constexpr, NUM_W_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + x w`, of the columns of w `[INNER, NUM_W_COLUMNS]` from `first` on. Otherwise as `dot_rows`."""
    ROWS: tl.constexpr = acc.shape[0]
    CHECK_INNER: tl.constexpr = INNER % BLOCK_K != 0
    tl.assume(length > 0)
    for start in range(0, length, BLOCK_K):
        a = load_block(x, 0, start, ROWS, BLOCK_K, True, CHECK_INNER)
        b = load_block(w, start, first, BLOCK_K, BLOCK_N, CHECK_INNER, NUM_W_COLUMNS % BLOCK_N != 0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def activation_block(
    acts, h, row, first_unit, num_rows, H, number, NET: tl.constexpr, DESCRIBED: tl.constexpr
):
    """A program's place in the activations `[planes, H, rows, DH]`, as `store_activations` takes it.

    `acts` is a pointer or a descriptor; by the latter all rows of a block are stored, also beyond the tokens.
    """
    if DESCRIBED:
        block = (acts, tl.cast(h, tl.int32), tl.cast(row, tl.int32), first_unit)
    else:
        ptr = acts + (h * num_rows + row) * NET.DH
        block = (ptr, tl.cast(num_rows, tl.int64) * H * NET.DH, number, first_unit, NET.DH)
    return block


@triton.jit
def store_activations(block, plane: tl.constexpr, x):
    """Store `x` [tokens, hidden units] in one of the planes, in the dtype of the memory."""
    if len(block) == 4:
        acts, h, row, first_unit = block
        x = tl.reshape(x.to(acts.dtype), [1, 1, x.shape[0], x.shape[1]])
        acts.store([plane, h, row, first_unit], x)
    else:
        ptr, stride, number, first_unit, num_units = block
        tokens, units = tl.arange(0, x.shape[0]), first_unit + tl.arange(0, x.shape[1])
        pointers = ptr + plane * stride + (tokens[:, None] * num_units + units[None, :])
        store_rows(pointers, x, tokens, number, units, num_units)
