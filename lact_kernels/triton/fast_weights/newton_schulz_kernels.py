"""The kernel of Muon's Newton-Schulz iteration: all operations of a schedule in one launch.

A program computes one tile of what one operation writes. Which one, it learns from the number that it takes,
its *ticket*. It waits until the operations of lower levels are done for its head and matrix, and says when it
is done itself. Tickets follow the levels, and programs take them as they start: so what a program waits for
is done or being computed, however few programs run at once, and whichever the device starts first. Nor do the
values depend on that: no two programs add to one sum.

`counters_ptr` has the next ticket, and for each head and matrix how many tiles are done. All are zero at the
beginning, and the last programs put them back to that. A program is done by an addition, which releases what
its threads wrote before the barrier; it waits by additions of nothing, which acquire that.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from lact_kernels.triton.configs import TRITON
from lact_kernels.triton.fast_weights.layout import ALIGNMENT
from lact_kernels.triton.fast_weights.newton_schulz_schedule import Kind
from lact_kernels.triton.fast_weights.update_bwd import NEWTON_SCHULZ_EPS
from lact_kernels.triton.primitives import load_tile

TOTAL_BLOCK = tl.constexpr(1024)
# A tile of the sums over rows.
INNER_ROWS, INNER_COLUMNS = tl.constexpr(16), tl.constexpr(128)
UNIT = tl.constexpr(ALIGNMENT)  # elements, in which places are given

NORMALIZE = tl.constexpr(int(Kind.NORMALIZE))
NORMALIZE_GRADIENT = tl.constexpr(int(Kind.NORMALIZE_GRADIENT))
SYMMETRIC = tl.constexpr(int(Kind.SYMMETRIC))
COLUMNS = tl.constexpr(int(Kind.COLUMNS))
INNER = tl.constexpr(int(Kind.INNER))
NOWHERE = -1  # in place of a place


class Entry(NamedTuple):
    """A row of the table: one operation on one matrix of every head. All are 32-bit integers.

    Tiles are counted from the first of a head. Places are in units of 16 elements, sizes in those of DIVISOR
    elements; factors are the bits of float32 numbers.
    """

    first: int  # its first tile
    needed: int  # of this matrix's tiles those that must be done
    total: int  # all tiles of this matrix
    kind: int
    matrix: int
    element: int  # where the matrix begins in [heads, SIZE]
    row: int  # and in [heads, ROWS], in single rows
    num_rows: int  # of the matrix in its own shape
    num_columns: int
    side: int  # rows of the output
    width: int  # columns of the output
    length: int  # what is summed over
    num_terms: int = 0
    a: int = NOWHERE
    b: int = NOWHERE
    a2: int = NOWHERE
    b2: int = NOWHERE
    factor: int = 0
    out: int = NOWHERE  # then it is the result
    num_added: int = 0  # in the iteration's dtype
    y: int = NOWHERE
    y_factor: int = 0
    y2: int = NOWHERE
    y2_factor: int = 0
    exact: int = NOWHERE
    exact_y: int = NOWHERE
    exact_y_factor: int = 0


AT = Entry(*range(len(Entry._fields)))  # the kernel's argument: which number of an entry is which
FIELDS = tl.constexpr(len(Entry._fields))


@triton.jit
def _place(entry_ptr, NTH: tl.constexpr):
    return tl.load(entry_ptr + NTH).to(tl.int64) * UNIT


@triton.jit
def _factor(entry_ptr, NTH: tl.constexpr):
    return tl.load(entry_ptr + NTH).to(tl.float32, bitcast=True)


@triton.jit
def _length(squares_ptr, num_rows):
    """The Frobenius norm, from the squares of the rows' norms."""
    parts = tl.zeros([TOTAL_BLOCK], tl.float32)
    for first in range(0, num_rows, TOTAL_BLOCK):
        rows = first + tl.arange(0, TOTAL_BLOCK)
        parts += tl.load(squares_ptr + rows, mask=rows < num_rows, other=0.0)
    return tl.sqrt_rn(tl.sum(parts))


@triton.jit
def _tile_of(tile, num_columns, BLOCK: tl.constexpr):
    """Rows and columns of a tile, where all are counted along the rows."""
    tiles_n = tl.cdiv(num_columns, BLOCK)
    rows = tile // tiles_n * BLOCK + tl.arange(0, BLOCK)
    columns = tile % tiles_n * BLOCK + tl.arange(0, BLOCK)
    return rows, columns


@triton.jit
def _store_both_ways(
    out_ptr, tile, rows, num_rows, columns, num_columns, as_it_is, transposed,
):  # fmt: skip
    """Into `[num_rows, num_columns]`, and, or instead, into `[num_columns, num_rows]`."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tile = tile.to(out_ptr.dtype.element_ty)
    if as_it_is:
        tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], tile, mask=inside)
    if transposed:
        tl.store(out_ptr + columns[None, :] * num_rows + rows[:, None], tile, mask=inside)


@triton.jit
def _normalize_tile(
    g_ptr, squares_ptr, result_ptr, arrays_ptr, entry_ptr, tile, GRADIENT: tl.constexpr,
    AT: tl.constexpr, BLOCK: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(entry_ptr + AT.num_rows) * DIVISOR
    num_columns = tl.load(entry_ptr + AT.num_columns) * DIVISOR
    norm = _length(squares_ptr + tl.load(entry_ptr + AT.row), num_rows)
    if GRADIENT:
        shorter = tl.minimum(num_rows, num_columns).to(tl.float32)
        scale = tl.where(norm > 0.0, tl.div_rn(tl.sqrt_rn(shorter), norm), 0.0)
    else:
        scale = tl.div_rn(1.0, norm + NEWTON_SCHULZ_EPS)
    element = _place(entry_ptr, AT.element)
    rows, columns = _tile_of(tile, num_columns, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = rows[:, None] * num_columns + columns[None, :]
    x = tl.load(g_ptr + element + offsets, mask=inside, other=0.0) * scale
    out = _place(entry_ptr, AT.out)
    if out < 0:
        tl.store(result_ptr + element + offsets, x, mask=inside)
    else:
        tall = num_rows > num_columns
        _store_both_ways(arrays_ptr + out, x, rows, num_rows, columns, num_columns, not tall, tall)


@triton.jit
def _dot_rows(
    acc, arrays_ptr, entry_ptr, rows, columns, side, length,
    AT: tl.constexpr, CHECK: tl.constexpr, CHECK_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + a b^T + a2 b2^T` of `[side, length]`, if there are these: the given rows of a and of b."""
    a, a2 = _place(entry_ptr, AT.a), _place(entry_ptr, AT.a2)
    b, b2 = _place(entry_ptr, AT.b), _place(entry_ptr, AT.b2)
    steps = tl.cdiv(length, BLOCK_K)
    stop = steps * tl.load(entry_ptr + AT.num_terms)
    tl.assume(stop > 0)  # a loop that may be skipped makes ptxas wait for each product (C7515)
    for step in range(0, stop):
        second = step >= steps
        inner = tl.where(second, step - steps, step) * BLOCK_K + tl.arange(0, BLOCK_K)
        a_pointers = arrays_ptr + tl.where(second, a2, a) + rows[:, None] * length + inner[None, :]
        b_pointers = (
            arrays_ptr + tl.where(second, b2, b) + columns[:, None] * length + inner[None, :]
        )
        a_tile = load_tile(a_pointers, rows, side, inner, length, CHECK, CHECK_K)
        b_tile = load_tile(b_pointers, columns, side, inner, length, CHECK, CHECK_K)
        acc = tl.dot(a_tile, tl.trans(b_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def _dot_columns(
    acc, arrays_ptr, entry_ptr, rows, columns, side, width,
    AT: tl.constexpr, CHECK: tl.constexpr, CHECK_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + a b + a2 b2` of `[side, side]` and `[side, width]`: the given rows and columns."""
    a, a2 = _place(entry_ptr, AT.a), _place(entry_ptr, AT.a2)
    b, b2 = _place(entry_ptr, AT.b), _place(entry_ptr, AT.b2)
    steps = tl.cdiv(side, BLOCK_K)
    stop = steps * tl.load(entry_ptr + AT.num_terms)
    tl.assume(stop > 0)
    for step in range(0, stop):
        second = step >= steps
        inner = tl.where(second, step - steps, step) * BLOCK_K + tl.arange(0, BLOCK_K)
        a_pointers = arrays_ptr + tl.where(second, a2, a) + rows[:, None] * side + inner[None, :]
        b_pointers = (
            arrays_ptr + tl.where(second, b2, b) + inner[:, None] * width + columns[None, :]
        )
        a_tile = load_tile(a_pointers, rows, side, inner, side, CHECK, CHECK_K)
        b_tile = load_tile(b_pointers, inner, side, columns, width, CHECK_K, CHECK)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _product_tile(
    arrays_ptr, exact_ptr, result_ptr, entry_ptr, kind, tile, AT: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHECK: tl.constexpr, CHECK_K: tl.constexpr,
):  # fmt: skip
    side = tl.load(entry_ptr + AT.side) * DIVISOR
    width = tl.load(entry_ptr + AT.width) * DIVISOR
    length = tl.load(entry_ptr + AT.length) * DIVISOR
    tiles_n = tl.cdiv(width, BLOCK)
    tile_m = tile // tiles_n
    tile_n = tile % tiles_n
    if kind == SYMMETRIC:
        # Tiles are counted along the rows of the lower triangle. The root of a square number must be exact.
        tile_m = tl.cast((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) * 0.5, tl.int32)
        tile_n = tile - tile_m * (tile_m + 1) // 2
    rows = tile_m * BLOCK + tl.arange(0, BLOCK)
    columns = tile_n * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if kind == COLUMNS:
        acc = _dot_columns(
            acc, arrays_ptr, entry_ptr, rows, columns, side, width, AT, CHECK, CHECK_K, BLOCK_K
        )
    else:
        acc = _dot_rows(
            acc, arrays_ptr, entry_ptr, rows, columns, side, length, AT, CHECK, CHECK_K, BLOCK_K
        )
    acc *= _factor(entry_ptr, AT.factor)
    offsets = rows[:, None] * width + columns[None, :]
    inside = (rows < side)[:, None] & (columns < width)[None, :]
    mirrored = (kind == SYMMETRIC) & (tile_m != tile_n)
    if exact_ptr is not None:
        exact_y = _place(entry_ptr, AT.exact_y)
        if exact_y >= 0:
            y = tl.load(exact_ptr + exact_y + offsets, mask=inside, other=0.0)
            acc += _factor(entry_ptr, AT.exact_y_factor) * y
    for nth in range(0, tl.load(entry_ptr + AT.num_added)):
        added_ptr = entry_ptr + 2 * nth
        y_pointers = arrays_ptr + _place(added_ptr, AT.y) + offsets
        y = tl.load(y_pointers, mask=inside, other=0.0).to(tl.float32)
        acc += _factor(added_ptr, AT.y_factor) * y
    out = _place(entry_ptr, AT.out)
    if out < 0:
        tall = tl.load(entry_ptr + AT.num_rows) > tl.load(entry_ptr + AT.num_columns)
        result_ptr += _place(entry_ptr, AT.element)
        _store_both_ways(result_ptr, acc, rows, side, columns, width, not tall, tall)
    else:
        _store_both_ways(arrays_ptr + out, acc, rows, side, columns, width, True, mirrored)
    if exact_ptr is not None:
        exact = _place(entry_ptr, AT.exact)
        if exact >= 0:
            _store_both_ways(exact_ptr + exact, acc, rows, side, columns, width, True, mirrored)


@triton.jit
def _inner_tile(
    a_ptr,
    b_ptr,
    c_ptr,  # or None
    out_ptr,  # rows of <a, b>
    a_squares_ptr,  # and of <a, a>, or None
    c_squares_ptr,  # and of <c, c>
    entry_ptr,
    tile,
    AT: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    num_rows = tl.load(entry_ptr + AT.num_rows) * DIVISOR
    num_columns = tl.load(entry_ptr + AT.num_columns) * DIVISOR
    rows = tile * INNER_ROWS + tl.arange(0, INNER_ROWS)
    real = rows < num_rows
    inner = tl.zeros([INNER_ROWS, INNER_COLUMNS], tl.float32)
    a_squares = inner
    c_squares = inner
    place = _place(entry_ptr, AT.element) + rows[:, None] * num_columns
    for first in range(0, num_columns, INNER_COLUMNS):
        columns = first + tl.arange(0, INNER_COLUMNS)[None, :]
        inside = real[:, None] & (columns < num_columns)
        a = tl.load(a_ptr + place + columns, mask=inside, other=0.0)
        inner += a * tl.load(b_ptr + place + columns, mask=inside, other=0.0)
        if a_squares_ptr is not None:
            a_squares += a * a
        if c_ptr is not None:
            c = tl.load(c_ptr + place + columns, mask=inside, other=0.0)
            c_squares += c * c
    rows += tl.load(entry_ptr + AT.row)
    tl.store(out_ptr + rows, tl.sum(inner, axis=1), mask=real)
    if a_squares_ptr is not None:
        tl.store(a_squares_ptr + rows, tl.sum(a_squares, axis=1), mask=real)
    if c_ptr is not None:
        tl.store(c_squares_ptr + rows, tl.sum(c_squares, axis=1), mask=real)


@triton.jit(do_not_specialize=["heads", "size", "num_rows", "arrays_size", "exact_size"])
def _newton_schulz_kernel(
    g_ptr,  # [heads, SIZE], float32
    squares_ptr,  # [heads, ROWS]: of the rows' norms
    dx_ptr,  # [heads, SIZE], float32; None: forward
    dsquares_ptr,  # [heads, ROWS], like all that follows up to the result
    dbuffers_ptr,  # [heads, SIZE], or None
    inner_ptr,  # rows of <result, g>
    result_squares_ptr,  # of the rows' norms of the result, or None
    dbuffers_squares_ptr,
    result_ptr,  # [heads, SIZE], float32
    arrays_ptr,  # [heads, ..]: all arrays that the schedule has places for
    exact_ptr,  # [heads, ..]: those in float32, or None
    entries_ptr,  # [ENTRIES, FIELDS]: class Entry, the first tiles beyond all where there is none
    counters_ptr,  # [1 + 3 heads]: zeros, before and after
    heads,
    size,  # SIZE, and what a head has of the arrays, in units of 16 elements
    arrays_size,
    exact_size,
    num_rows,  # ROWS
    AT: tl.constexpr,
    ENTRIES: tl.constexpr,  # a power of two
    DIVISOR: tl.constexpr,  # of all sizes
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK: tl.constexpr,  # whether some size is no multiple of BLOCK
    CHECK_K: tl.constexpr,
):
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.atomic_add(counters_ptr, -ticket - 1, sem="relaxed", scope="gpu")
    head = ticket % heads
    tile = ticket // heads
    firsts = tl.load(entries_ptr + tl.arange(0, ENTRIES) * FIELDS + AT.first)
    entry_ptr = entries_ptr + (tl.sum((firsts <= tile).to(tl.int32)) - 1) * FIELDS
    tile -= tl.load(entry_ptr + AT.first)
    kind = tl.load(entry_ptr + AT.kind)
    done_ptr = counters_ptr + 1 + head * 3 + tl.load(entry_ptr + AT.matrix)

    needed = tl.load(entry_ptr + AT.needed)
    while tl.atomic_add(done_ptr, 0, sem="acquire", scope="gpu") < needed:
        pass

    head = tl.cast(head, tl.int64)
    g_ptr += head * size * UNIT
    squares_ptr += head * num_rows
    result_ptr += head * size * UNIT
    arrays_ptr += head * arrays_size * UNIT
    if exact_ptr is not None:
        exact_ptr += head * exact_size * UNIT
    if kind == NORMALIZE:
        _normalize_tile(
            g_ptr, squares_ptr, result_ptr, arrays_ptr, entry_ptr, tile, False, AT, BLOCK, DIVISOR
        )
    elif kind < INNER and kind > NORMALIZE_GRADIENT:
        _product_tile(
            arrays_ptr, exact_ptr, result_ptr, entry_ptr, kind, tile,
            AT, DIVISOR, BLOCK, BLOCK_K, CHECK, CHECK_K,
        )  # fmt: skip
    elif dx_ptr is not None:
        if kind == NORMALIZE_GRADIENT:
            dx_ptr += head * size * UNIT
            _normalize_tile(
                dx_ptr, dsquares_ptr + head * num_rows, result_ptr, arrays_ptr, entry_ptr, tile,
                True, AT, BLOCK, DIVISOR,
            )  # fmt: skip
        else:
            inner_ptr += head * num_rows
            if result_squares_ptr is not None:
                result_squares_ptr += head * num_rows
            if dbuffers_ptr is not None:
                dbuffers_ptr += head * size * UNIT
                dbuffers_squares_ptr += head * num_rows
            _inner_tile(
                result_ptr, g_ptr, dbuffers_ptr, inner_ptr, result_squares_ptr,
                dbuffers_squares_ptr, entry_ptr, tile, AT, DIVISOR,
            )  # fmt: skip

    tl.debug_barrier()
    before = tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu")
    total = tl.load(entry_ptr + AT.total)
    if before == total - 1:
        tl.atomic_add(done_ptr, -total, sem="relaxed", scope="gpu")


KERNELS = {TRITON: _newton_schulz_kernel}
