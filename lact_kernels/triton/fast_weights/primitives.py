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
from lact_kernels.triton.primitives import load_rows

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
def head_weights(weights_ptr, strides, place, b, h, H, NET: tl.constexpr):
    """First elements of w0, w1 and w2 of one chunk and head.

    Either they lie packed `[places, H, SIZE]`, and strides are None; or there are three pointers, to weights
    that all chunks of a batch row share, and `strides` are those of batch row and head of each.
    """
    if strides is None:
        w0_ptr = weights_ptr + (place * H + h) * NET.SIZE
        w1_ptr = w0_ptr + NET.OFFSET1
        w2_ptr = w0_ptr + NET.OFFSET2
    else:
        w0_ptr = weights_ptr[0] + b * strides[0] + h * strides[1]
        w1_ptr = weights_ptr[1] + b * strides[2] + h * strides[3]
        w2_ptr = weights_ptr[2] + b * strides[4] + h * strides[5]
    return w0_ptr, w1_ptr, w2_ptr


def weight_arguments(
    weights: Tensor | Triple | None,
) -> tuple[Tensor | Triple | None, tuple[int, ...] | None]:
    """`weights_ptr` and `strides` of `head_weights`.

    The weights are packed `[places, H, SIZE]`, or three tensors `[B or 1, H, rows, columns]`, of which
    each head's matrix is contiguous; with 1 all batch rows share them.
    """
    if weights is None or isinstance(weights, Tensor):
        return weights, None
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
def token_pointers(ptr, strides, b, first, h, tokens):
    """`[tokens, 1]`: where the channels of head h begin, of tokens counted from the token `first`."""
    return ptr + token_offset(strides, b, first, h) + tokens[:, None] * strides[1]


@triton.jit
def dot_rows(
    acc_a,  # [BLOCK_M, BLOCK_N]
    acc_b,
    x_pointers,  # [BLOCK_M, 1]: the rows' first elements
    rows,  # [BLOCK_M]
    num_rows,
    a_ptr,
    b_ptr,  # or None
    w_rows,  # [BLOCK_N]
    length,
    INNER: tl.constexpr,
    NUM_W_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc + x w^T` for the matrices a and b: rows of x with rows of w `[NUM_W_ROWS, INNER]`.

    `length` is INNER as a runtime value, which keeps the compiler from unrolling the whole loop: that
    takes registers, and seconds to compile. That it is positive must be said: where a loop may be skipped,
    ptxas waits for each matrix instruction on its own (C7515).
    """
    CHECK: tl.constexpr = NUM_W_ROWS % BLOCK_N != 0
    tl.assume(length > 0)
    for start in range(0, length, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_pointers + inner[None, :], rows, num_rows, inner, INNER, BLOCK_K, True)
        offsets = w_rows[:, None] * INNER + inner[None, :]
        a = load_rows(a_ptr + offsets, w_rows, NUM_W_ROWS, inner, INNER, BLOCK_K, CHECK)
        acc_a = tl.dot(x, tl.trans(a), acc_a, input_precision="ieee")
        if b_ptr is not None:
            b = load_rows(b_ptr + offsets, w_rows, NUM_W_ROWS, inner, INNER, BLOCK_K, CHECK)
            acc_b = tl.dot(x, tl.trans(b), acc_b, input_precision="ieee")
    return acc_a, acc_b


@triton.jit
def dot_columns(
    acc_a,  # [BLOCK_M, BLOCK_N]
    acc_b,
    x_pointers,  # [BLOCK_M, 1]
    rows,  # [BLOCK_M]
    num_rows,
    a_ptr,
    b_ptr,  # or None
    w_columns,  # [BLOCK_N]
    length,
    INNER: tl.constexpr,
    NUM_W_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc + x w` for the matrices a and b: rows of x with columns of w `[INNER, NUM_W_COLUMNS]`."""
    CHECK: tl.constexpr = INNER % BLOCK_K != 0
    tl.assume(length > 0)
    for start in range(0, length, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_pointers + inner[None, :], rows, num_rows, inner, INNER, BLOCK_K, True)
        offsets = inner[:, None] * NUM_W_COLUMNS + w_columns[None, :]
        a = load_rows(a_ptr + offsets, inner, INNER, w_columns, NUM_W_COLUMNS, BLOCK_N, CHECK)
        acc_a = tl.dot(x, a, acc_a, input_precision="ieee")
        if b_ptr is not None:
            b = load_rows(b_ptr + offsets, inner, INNER, w_columns, NUM_W_COLUMNS, BLOCK_N, CHECK)
            acc_b = tl.dot(x, b, acc_b, input_precision="ieee")
    return acc_a, acc_b
