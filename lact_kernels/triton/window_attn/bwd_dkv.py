"""`window_attn`, backward: dk and dv, from the row statistics that the dq pass has left. See `bwd`."""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import (
    LOG2_E,
    head_offset,
    is_below,
    load_rows,
    packed_tile,
    query_tile_bounds,
    store_rows,
    tile_slots,
)
from lact_kernels.triton.softmax import softcapped, softmax_from_lse, softmax_from_shift


@triton.jit
def _load_statistics(
    pointers,  # [COPIES, BLOCK_M]: even rows have the addresses of one statistic, odd ones of another
    queries,
    Tq,
    BLOCK_M: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Two numbers for each query, [BLOCK_M] each; `bwd._copies` says why they are loaded several times."""
    values = tl.trans(tl.load(pointers, mask=(queries < Tq)[None, :], other=0.0))
    first, second = tl.split(tl.reshape(values, [BLOCK_M, COPIES // 2, 2]))
    for i in tl.static_range(2, COPIES.bit_length()):
        first, _ = tl.split(tl.reshape(first, [BLOCK_M, COPIES >> i, 2]))
        second, _ = tl.split(tl.reshape(second, [BLOCK_M, COPIES >> i, 2]))
    return tl.reshape(first, [BLOCK_M]), tl.reshape(second, [BLOCK_M])


@triton.jit
def _dkv_tiles(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_DV]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    q_tiles,  # pointer to the first query head, offsets within a tile, strides
    do_tiles,
    stats_ptr,  # of the first query head
    stats_strides,  # of a statistic and of a head
    diagonal,  # the first query that may see each key: [BLOCK_N]
    bounds,  # of the query tiles, from `query_tile_bounds`
    groups,
    Tq,
    window_size,
    softmax_scale,
    bend,
    SIZES: tl.constexpr,
    COPIES: tl.constexpr,
    OWNS_DK: tl.constexpr,
    OWNS_DV: tl.constexpr,
):
    # dv's product first runs beside the arithmetic of dS, and takes registers that wide heads do not have.
    DV_FIRST: tl.constexpr = SIZES.BLOCK_D <= 64 and SIZES.BLOCK_DV <= 64
    # `delta` comes in a tile of its own, late, where registers are short, and with the lse where shared
    # memory is.
    APART: tl.constexpr = SIZES.BLOCK_D <= 128 and SIZES.BLOCK_DV <= 128
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows = tl.arange(0, SIZES.BLOCK_M)
    first, interior, edge, end = bounds
    first_query, last_tile = first * SIZES.BLOCK_M, (end - 1) * SIZES.BLOCK_M
    # Pointers move from tile to tile, and from a head's last tile to the first of the next head: products
    # of 64 bits for each tile would be a tenth of the loop.
    back = tl.cast(last_tile - first_query, tl.int64)
    q_ptr, q_offsets, q_strides = q_tiles
    do_ptr, do_offsets, do_strides = do_tiles
    q_ptr += tl.cast(first_query, tl.int64) * q_strides[1]
    do_ptr += tl.cast(first_query, tl.int64) * do_strides[1]
    stats_ptr += first_query
    odd = (tl.arange(0, COPIES) % 2)[:, None]
    stats_offsets = (0 if APART else odd * stats_strides[0]) + rows[None, :]
    stats_offsets = tl.broadcast_to(stats_offsets, [COPIES, SIZES.BLOCK_M])
    start = first_query
    # One loop over the tiles of every query head, so that its pipeline fills only once.
    for _ in range(0, (end - first) * groups):
        queries = start + rows
        q = load_rows(q_ptr + q_offsets, queries, Tq, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
        do = load_rows(do_ptr + do_offsets, queries, Tq, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)
        stats_pointers = stats_ptr + stats_offsets
        lse, delta = _load_statistics(stats_pointers, queries, Tq, SIZES.BLOCK_M, COPIES)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        # Before the exponentials, which then run beside this product.
        if OWNS_DK:
            dprobs = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        scores = softcapped(scores, bend, q.dtype == tl.float32)
        if q.dtype == tl.float32:
            # In every row, also where odd ones are one statistic ahead: the last head has no fourth.
            ahead = 2 if APART else 2 - odd
            normaliser_pointers = stats_pointers + ahead * stats_strides[0]
            normaliser, _ = _load_statistics(
                normaliser_pointers, queries, Tq, SIZES.BLOCK_M, COPIES
            )
            probs = softmax_from_shift(scores, lse[None, :], softmax_scale) * normaliser[None, :]
        else:
            probs = softmax_from_lse(scores, lse[None, :], softmax_scale * LOG2_E)
        if (start < interior * SIZES.BLOCK_M) | (start >= edge * SIZES.BLOCK_M):
            distance = (start - diagonal)[:, None] + rows[None, :]
            limit = tl.maximum(tl.minimum(Tq - diagonal, window_size), 0)
            probs = tl.where(is_below(distance, limit[:, None]), probs, 0.0)
        if OWNS_DV and DV_FIRST:
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
        if OWNS_DK:
            if APART:
                stats_pointers += stats_strides[0]
                delta, _ = _load_statistics(stats_pointers, queries, Tq, SIZES.BLOCK_M, COPIES)
            dscores = probs * (dprobs - delta[None, :])
            if bend is not None:
                dscores *= 1.0 - scores * scores  # the derivative of tanh
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
        if OWNS_DV and not DV_FIRST:
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
        is_last = start == last_tile
        start = tl.where(is_last, first_query, start + SIZES.BLOCK_M)
        q_ptr += _step(q_strides[1], q_strides[2], back, is_last, SIZES.BLOCK_M)
        do_ptr += _step(do_strides[1], do_strides[2], back, is_last, SIZES.BLOCK_M)
        stats_ptr += _step(1, stats_strides[1], back, is_last, SIZES.BLOCK_M)
    return dk, dv


@triton.jit
def _step(row_stride, head_stride, back, is_last, BLOCK_M: tl.constexpr):
    """From a tile to the next; `back` counts the rows from the first tile of a head to its last one."""
    return tl.where(is_last, head_stride - back * row_stride, BLOCK_M * row_stride)


@triton.jit(do_not_specialize=["num_sequences", "window_size", "right", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # [B, Hq, NUM_STATS, Tq], contiguous
    dk_ptr,
    dv_ptr,
    cu_seqlens,  # borders in q and in k, [N + 1] each, or None
    num_sequences,  # N, or 0
    softmax_scale,  # of the exponents, > 0
    bend,  # of the scores, or None
    window_size,  # keys that a query sees
    right,  # those of them that come after it, or None: none
    Tq,
    Tk,
    Hq,
    Hkv,
    q_strides,  # of batch row, token and head, like the others
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    SIZES: tl.constexpr,
    NUM_STATS: tl.constexpr,
    COPIES: tl.constexpr,
    OWNS_DK: tl.constexpr,
    OWNS_DV: tl.constexpr,
):
    # The key tiles of one kv head follow each other: neighbours share most of their queries.
    num_tiles = tile_slots(Tk, num_sequences, SIZES.BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    h_kv = tl.cast(pid // num_tiles % Hkv, tl.int64)
    b = tl.cast(pid // num_tiles // Hkv, tl.int64)
    groups = Hq // Hkv
    q_ptr += head_offset(q_strides, b, h_kv * groups)
    k_ptr += head_offset(k_strides, b, h_kv)
    v_ptr += head_offset(v_strides, b, h_kv)
    do_ptr += head_offset(do_strides, b, h_kv * groups)
    stats_strides = (Tq, tl.cast(Tq, tl.int64) * NUM_STATS)
    stats_ptr += (b * Hq + h_kv * groups) * stats_strides[1]
    dk_ptr += head_offset(dk_strides, b, h_kv)
    dv_ptr += head_offset(dv_strides, b, h_kv)
    if cu_seqlens is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens[1], cu_seqlens, num_sequences, SIZES.BLOCK_N
        )
        if tile * SIZES.BLOCK_N >= Tk:
            return
        q_ptr += q_start * q_strides[1]
        k_ptr += k_start * k_strides[1]
        v_ptr += k_start * v_strides[1]
        do_ptr += q_start * do_strides[1]
        stats_ptr += q_start
        dk_ptr += k_start * dk_strides[1]
        dv_ptr += k_start * dv_strides[1]

    first_key = tile * SIZES.BLOCK_N
    keys = first_key + tl.arange(0, SIZES.BLOCK_N)
    diagonal = keys - (Tk - Tq)
    if right is not None:
        diagonal -= right
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows_m = tl.arange(0, SIZES.BLOCK_M)[:, None]
    # Without a sign, so that they are extended to 64 bits at no cost.
    q_offsets = (rows_m * q_strides[1] + cols_qk[None, :]).to(tl.uint32)  # [BLOCK_M, BLOCK_D]
    do_offsets = (rows_m * do_strides[1] + cols_v[None, :]).to(tl.uint32)  # [BLOCK_M, BLOCK_DV]
    rows_n = keys.to(tl.int64)[:, None]
    k_pointers = k_ptr + rows_n * k_strides[1] + cols_qk[None, :]
    v_pointers = v_ptr + rows_n * v_strides[1] + cols_v[None, :]
    k = load_rows(k_pointers, keys, Tk, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
    v = load_rows(v_pointers, keys, Tk, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)

    dk = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_D], 0.0, tl.float32)
    dv = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_DV], 0.0, tl.float32)
    bounds = query_tile_bounds(first_key, Tq, Tk, window_size, right, SIZES.BLOCK_M, SIZES.BLOCK_N)
    dk, dv = _dkv_tiles(
        dk, dv, k, v, (q_ptr, q_offsets, q_strides), (do_ptr, do_offsets, do_strides),
        stats_ptr, stats_strides, diagonal, bounds, groups, Tq, window_size, softmax_scale, bend,
        SIZES, COPIES, OWNS_DK, OWNS_DV,
    )  # fmt: skip
    # Rows are counted from the tile's first key here: nothing computed above stays in registers.
    first_row = tl.cast(first_key, tl.int64)
    rows = tl.arange(0, SIZES.BLOCK_N)
    num_rows = Tk - first_key
    if OWNS_DK:
        if bend is not None:
            softmax_scale *= bend
        dk_offsets = rows[:, None] * dk_strides[1] + cols_qk[None, :]
        dk_pointers = dk_ptr + first_row * dk_strides[1] + dk_offsets
        store_rows(dk_pointers, dk * softmax_scale, rows, num_rows, cols_qk, SIZES.D)
    if OWNS_DV:
        dv_offsets = rows[:, None] * dv_strides[1] + cols_v[None, :]
        dv_pointers = dv_ptr + first_row * dv_strides[1] + dv_offsets
        store_rows(dv_pointers, dv, rows, num_rows, cols_v, SIZES.DV)
