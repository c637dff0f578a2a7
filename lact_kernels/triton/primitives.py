r"""What the attention kernels share: tile bounds, the window's mask, tile loads.

Query i stands at position `i + Tk - Tq` and sees the keys `position - W < j <= position`. A window with a
right side of R keys is a causal one: its queries stand at `i + Tk - Tq + R`, where W counts the keys of both
sides, and no key comes after Tk - 1. `right` is R, or None for 0: then nothing is compared with Tk.
The keys that a tile of queries sees form one interval, cut into key tiles in three segments:

```
    keys ->       first      interior         diagonal  end
    queries         | \ # # # | # # # # # # # | # .     |
       |            | . \ # # | # # # # # # # | # # .   |
       v            | . . \ # | # # # # # # # | # # # . |
                    masked     no mask and     masked
                               no bounds check
```

Seen from a tile of keys, the queries that see it form an interval too: diagonal, interior, right
edge. Every tile from `first` up to `end` holds at least one visible pair, and no other tile does.
In an interior tile every pair is visible and every row is in bounds. Kernels have one loop, whose pipeline
fills once, and a branch around the mask. The order of tiles does not matter, so the forward by pointers
visits both masked segments in one loop and the interior in another.

Packed sequences are cut into tiles one by one, so that no tile belongs to two. A sequence of `l`
tokens from token `c` on needs ceil(l / BLOCK) tiles, and gets the slots from `c // BLOCK + n` up to
those of sequence n + 1: enough for any lengths, and at most one to spare. So the number of programs
follows from T and N alone, and a program finds its sequence in `cu_seqlens` itself: nothing is read on
the host, and a recorded CUDA graph serves all lengths that add up to T.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from lact_kernels.triton.configs import KernelConfig

LOG2_E = tl.constexpr(1.4426950408889634)
# Borders that a program reads at once in its search for a sequence.
FANOUT = tl.constexpr(128)
# Channels that products of three TF32 products sum at once: see `product`.
TF32_CHANNELS = 32


@functools.cache
def block_dim(head_dim: int) -> int:
    """The padded head dim: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


class Sizes(NamedTuple):
    """The sizes that an attention kernel is compiled for.

    The head dims of q and k and of v, the same padded, how many queries and keys a tile has, and how many
    channels of q and k a product takes at once.

    In Triton 3.4 they are plain numbers to a kernel: `tl.full` takes these as a shape, `tl.zeros` does not.
    """

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int
    CHUNK: int

    @classmethod
    def of(cls, D: int, Dv: int, config: KernelConfig) -> "Sizes":
        block = block_dim(D)
        chunk = block if config.precision == "ieee" else min(block, TF32_CHANNELS)
        return cls(D, Dv, block, block_dim(Dv), config.block_m, config.block_n, chunk)


def num_tile_slots(T: int, num_sequences: int, block: int) -> int:
    """How many tiles, or slots of tiles, T tokens of `num_sequences` packed sequences take (0: dense)."""
    return T // block + num_sequences if num_sequences else -(-T // block)


@triton.jit
def tile_slots(T, num_sequences, BLOCK: tl.constexpr):
    """`num_tile_slots`, in a kernel."""
    return tl.where(num_sequences > 0, T // BLOCK + num_sequences, tl.cdiv(T, BLOCK))


@triton.jit
def sequence_of_slot(slot, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    """The sequence that owns a slot, and which of its tiles the slot is (beyond its last: none)."""
    low = 0
    high = num_sequences
    while high - low > 1:
        step = tl.cdiv(high - low, FANOUT)
        candidates = low + tl.arange(0, FANOUT) * step
        exists = candidates < high
        borders = tl.load(cu_seqlens_ptr + candidates, mask=exists, other=0)
        begun = exists & (borders // BLOCK + candidates <= slot)
        low += (tl.sum(begun.to(tl.int32), axis=0) - 1) * step
        high = tl.minimum(low + step, high)
    return low, slot - (tl.load(cu_seqlens_ptr + low) // BLOCK + low)


@triton.jit
def packed_tile(slot, own_ptr, cu_seqlens, num_sequences, BLOCK: tl.constexpr):
    """Tile, and first row and length of its sequence in q and in k.

    `cu_seqlens` has the borders in q and in k, and `own_ptr` is that of the two which is cut into tiles.
    """
    n, tile = sequence_of_slot(slot, own_ptr, num_sequences, BLOCK)
    q_start, Tq = span_of_sequence(cu_seqlens[0], n)
    k_start, Tk = span_of_sequence(cu_seqlens[1], n)
    return tile, q_start, Tq, k_start, Tk


@triton.jit
def span_of_sequence(cu_seqlens_ptr, n):
    """First row, 64-bit, and length of sequence n."""
    start = tl.load(cu_seqlens_ptr + n)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + n + 1) - start


@triton.jit
def head_offset(strides, b, h):
    """Elements before head h of batch row b; `strides` are those of batch row, token and head."""
    return b * strides[0] + h * strides[2]


@triton.jit
def query_tile_program(Tq, num_sequences, Hq, Hkv, BLOCK_M: tl.constexpr):
    """Batch row, query head, kv head and tile (packed: slot) of this program.

    Neighbours are the query heads of one kv head, then the query tiles of these heads, so that
    programs that read the same keys run at the same time. The last queries, which see the most
    keys, come first.
    """
    groups = Hq // Hkv
    num_tiles = tile_slots(Tq, num_sequences, BLOCK_M)
    pid = tl.program_id(0)
    group = pid % groups
    tile = num_tiles - 1 - (pid // groups) % num_tiles
    batch_head = pid // (groups * num_tiles)
    kv_head = batch_head % Hkv
    return batch_head // Hkv, kv_head * groups + group, kv_head, tile


@triton.jit
def key_tile_bounds(
    first_query, Tq, Tk, window_size, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Key tiles seen by the queries of one tile: (first, interior, diagonal, end)."""
    first_position = first_query + Tk - Tq
    last_position = tl.minimum(first_query + BLOCK_M, Tq) - 1 + Tk - Tq
    if right is not None:
        first_position += right
        last_position += right
    first = tl.maximum(first_position - window_size + 1, 0) // BLOCK_N
    end = tl.cdiv(tl.maximum(_num_keys_until(last_position, Tk, right), 0), BLOCK_N)
    # From here on the last query still sees the whole tile.
    interior = tl.minimum(tl.cdiv(tl.maximum(last_position - window_size + 1, 0), BLOCK_N), end)
    # Up to here the first query sees the whole tile.
    diagonal = tl.maximum(_num_keys_until(first_position, Tk, right), 0) // BLOCK_N
    diagonal = tl.maximum(diagonal, interior)
    return first, interior, diagonal, end


@triton.jit
def _num_keys_until(position, Tk, right):
    """Keys that do not come after a position; negative before the first."""
    keys = position + 1
    if right is not None:
        keys = tl.minimum(keys, Tk)
    return keys


@triton.jit
def query_tile_bounds(
    first_key, Tq, Tk, window_size, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Query tiles that see the keys of one tile: (first, interior, right edge, end)."""
    offset = Tk - Tq
    if right is not None:
        offset += right
    last_key = tl.minimum(first_key + BLOCK_N, Tk) - 1
    first = tl.maximum(first_key - offset, 0) // BLOCK_M
    end = tl.cdiv(tl.maximum(tl.minimum(last_key + window_size - offset, Tq), 0), BLOCK_M)
    end = tl.maximum(end, first)
    # From here on every query comes after the last key.
    interior = tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_M)
    interior = tl.minimum(tl.maximum(interior, first), end)
    # Up to here every query exists and still sees the first key.
    edge = tl.maximum(tl.minimum(first_key + window_size - offset, Tq), 0) // BLOCK_M
    edge = tl.maximum(edge, interior)
    return first, interior, edge, end


@triton.jit
def nth_tile(tiles, step, HAS_GAP: tl.constexpr):
    """Tile number `step` of a segment.

    `tiles` are its first tile and their number, and with a gap: where it begins, and how many tiles it has.
    """
    first_tile, _, gap_start, gap = tiles
    tile = first_tile + step
    if HAS_GAP:
        tile = tl.where(tile >= gap_start, tile + gap, tile)
    return tile


@triton.jit
def visible(positions, keys, window_size):
    """The window's mask; the two arguments broadcast against each other.

    The keys a query sees exist by construction: no check against Tk is needed here, but for a right side.
    """
    return (keys <= positions) & (keys > positions - window_size)


@triton.jit
def is_below(distance, limit):
    """0 <= distance < limit in one comparison: without a sign, what is negative is large."""
    return distance.to(tl.uint32) < limit.to(tl.uint32)


@triton.jit
def mask_before_window(scores, own, window_size, hidden=float("-inf")):
    """Scores of a tile, `hidden` for keys that have left the window: one comparison for each element.

    `own` is the place in the tile of the key of the first query, of which each row has the next.
    """
    columns, rows = _mask_places(scores)
    seen = tl.reshape(columns >= rows + (own - window_size + 1), scores.shape)
    return tl.where(seen, scores, hidden)


@triton.jit
def mask_after_query(scores, own, hidden=float("-inf"), last=None):
    """Scores of a tile, `hidden` for keys that come after the query; else as `mask_before_window`.

    Also for those after `last`, the place in the tile of the last key, unless that is None.
    """
    columns, rows = _mask_places(scores)
    own_columns = rows + own
    if last is not None:
        own_columns = tl.minimum(own_columns, last - tl.arange(0, 8)[None, None, :])
    return tl.where(tl.reshape(columns <= own_columns, scores.shape), scores, hidden)


@triton.jit
def _mask_places(scores):
    """Columns and rows of a tile, each less its column modulo 8: [1, N / 8, 1] and [M, 1, 8].

    A thread owns elements of one column modulo 8, or of two: so their columns are constants to it, and a
    mask costs no registers.
    """
    ROWS: tl.constexpr = scores.shape[0]
    COLS: tl.constexpr = scores.shape[1]
    rows = tl.arange(0, ROWS)[:, None, None] - tl.arange(0, 8)[None, None, :]
    return 8 * tl.arange(0, COLS // 8)[None, :, None], rows


@triton.jit
def head_rows(ptr, strides, b, h, start):
    """Pointer to row `start` of head h of batch row b; `strides` are those of batch row, token and head."""
    b, h, start = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(start, tl.int64)
    return ptr + (head_offset(strides, b, h) + start * strides[1])


@triton.jit
def head_tiles(ptr, strides, b, h, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tiles of a head from row `start` on, as `tile_pointers` takes them."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    return head_rows(ptr, strides, b, h, start), rows * strides[1] + cols, strides


@triton.jit
def described_rows(descriptor, b, h, start):
    """Row `start` of head h of batch row b of [B, H, T, D], as `load_described_rows` takes it."""
    return descriptor, b, h, tl.cast(start, tl.int32)


@triton.jit
def load_described_rows(head, first_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile [ROWS, COLS] that begins with row `first_row`, zero beyond the columns and rows of the tensor.

    Beyond a packed sequence it goes on with the next one.
    """
    descriptor, b, h, start = head
    return tl.reshape(descriptor.load([b, h, start + first_row, 0]), [ROWS, COLS])


@triton.jit
def tile_pointers(tensor, first_row):
    """Pointers to the tile of rows that begins with row `first_row`.

    `tensor` is a pointer to a head, offsets within a tile, and strides.
    """
    ptr, offsets, strides = tensor
    return ptr + tl.cast(first_row, tl.int64) * strides[1] + offsets


@triton.jit
def load_rows(
    pointers,  # [ROWS, BLOCK_COLS]
    rows,
    num_rows,
    cols,
    NUM_COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """A tile of rows, zero beyond `num_rows` (if asked) and beyond NUM_COLS (if the tiles exceed it)."""
    return load_tile(
        pointers, rows, num_rows, cols, NUM_COLS, CHECK_ROWS, NUM_COLS % BLOCK_COLS != 0
    )


@triton.jit
def load_tile(
    pointers,  # [ROWS, COLS]
    rows,
    num_rows,
    cols,
    num_cols,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLS: tl.constexpr,
):
    """A tile, zero beyond `num_rows` and beyond `num_cols`, where that is asked for."""
    if CHECK_ROWS:
        if CHECK_COLS:
            inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        if CHECK_COLS:
            tile = tl.load(pointers, mask=(cols < num_cols)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_channels(
    pointers,  # to the first CHUNK columns: [ROWS, CHUNK]
    rows,
    num_rows,
    NTH: tl.constexpr,
    SIZES: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Of a tile of q or k the NTH chunk of channels, zero where `load_rows` is."""
    FIRST: tl.constexpr = NTH * SIZES.CHUNK
    cols = FIRST + tl.arange(0, SIZES.CHUNK)
    CHECK_COLS: tl.constexpr = FIRST + SIZES.CHUNK > SIZES.D
    return load_tile(pointers + FIRST, rows, num_rows, cols, SIZES.D, CHECK_ROWS, CHECK_COLS)


@triton.jit
def scores_of(
    q,  # a tuple of tiles [BLOCK_M, CHUNK]
    k_pointers,  # [BLOCK_N, CHUNK]
    keys,
    Tk,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Q K^T, [BLOCK_M, BLOCK_N], a sum of products over CHUNK channels each."""
    k = load_channels(k_pointers, keys, Tk, 0, SIZES, CHECK_ROWS)
    scores = product(q[0], tl.trans(k), None, PRECISION)
    for nth in tl.static_range(1, len(q)):
        k = load_channels(k_pointers, keys, Tk, nth, SIZES, CHECK_ROWS)
        scores = product(q[nth], tl.trans(k), scores, PRECISION)
    return scores


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a b, [M, K] times [K, N], added to `acc` [M, N] unless it is None.

    "tf32x3" makes a float32 product of three TF32 products. Tensor cores cut off, and do not round, what
    their running sum has no bits for: an error towards zero every few terms (arXiv 2203.03341, 2512.07004).
    So the sum over K begins anew, and ordinary instructions, which round, add it to `acc`: with K up to
    TF32_CHANNELS it is accurate enough (`docs/window_attn.md`). Triton's own "tf32x3" differs where scores
    overflow: it adds up infinities of both signs, and a score of -inf becomes NaN. Here products with a rest
    count where they are finite: an infinite product is what it is without them.

    Numbers within 2^-12 of the largest, which no TF32 number is close to, are infinite, and those below 1e-34
    lose digits.
    """
    if PRECISION == "tf32x3":
        a, a_rest = _tf32_parts(a)
        b, b_rest = _tf32_parts(b)
        rest = tl.dot(a_rest, b, input_precision="tf32")
        rest = tl.dot(a, b_rest, rest, input_precision="tf32")
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
        result = tl.dot(a, b, rest, input_precision="tf32")
        if acc is not None:
            result += acc
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def _tf32_parts(x):
    """x as a sum of two TF32 numbers, which have 13 bits less: one close to x, and the rest.

    x times 1 + 2^-12, cut off, is x rounded, to within 3/4 of a last bit. Unlike an addition to the bits it
    leaves a NaN a NaN. Of the rest tensor cores ignore the 13 bits, so half a last bit is added here.
    """
    close = (x * (1.0 + 2.0**-12)).to(tl.int32, bitcast=True) & -0x2000
    close = close.to(tl.float32, bitcast=True)
    rest = (x - close).to(tl.int32, bitcast=True) + 0x1000
    return close, rest.to(tl.float32, bitcast=True)


@triton.jit
def store_rows(pointers, tile, rows, num_rows, cols, num_cols):
    """Store the rows and columns of `tile` that exist, in the dtype of the memory."""
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)
