"""`window_attn`, backward: dk and dv, from the row statistics that the dq pass has left. See `bwd`."""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import (
    head_offset,
    load_rows,
    nth_tile,
    packed_tile,
    query_tile_bounds,
    softmax_from_lse,
    softmax_from_shift,
    store_rows,
    tile_pointers,
    tile_slots,
    visible,
)


@triton.jit
def _dkv_segment(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_DV]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    q_tiles,  # of the first query head, as `tile_pointers` takes them
    do_tiles,
    stats_ptr,  # of the first query head
    diagonal,  # the query that stands at each key: [BLOCK_N]
    tiles,  # of queries, as `nth_tile` takes them
    groups,
    stride_stats,  # of a head
    Tq,
    window_size,
    softmax_scale,
    SIZES: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    OWNS_DK: tl.constexpr,
    OWNS_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    # One loop over the tiles of every query head, so that its pipeline fills only once.
    step = 0
    group = 0
    num_tiles = tiles[1]
    for _ in range(0, num_tiles * groups):
        first_query = nth_tile(tiles, step, MASKED) * SIZES.BLOCK_M
        queries = first_query + tl.arange(0, SIZES.BLOCK_M)
        q_pointers = tile_pointers(q_tiles, first_query, group)
        do_pointers = tile_pointers(do_tiles, first_query, group)
        stats_head = stats_ptr + tl.cast(group, tl.int64) * stride_stats
        q = load_rows(q_pointers, queries, Tq, cols_qk, SIZES.D, SIZES.BLOCK_D, MASKED)
        do = load_rows(do_pointers, queries, Tq, cols_v, SIZES.DV, SIZES.BLOCK_DV, MASKED)
        stats_pointers = stats_head + queries[:, None] * STATS_WIDTH
        stats_pointers += tl.arange(0, STATS_WIDTH)[None, :]  # [BLOCK_M, STATS_WIDTH]
        if MASKED:
            stats = tl.load(stats_pointers, mask=(queries < Tq)[:, None], other=0.0)
        else:
            stats = tl.load(stats_pointers)
        if STATS_WIDTH == 8:
            stats, _ = tl.split(tl.reshape(stats, [SIZES.BLOCK_M, 4, 2]))  # every second column
        stats, between = tl.split(tl.reshape(stats, [SIZES.BLOCK_M, 2, 2]))
        lse, delta = tl.split(stats)  # [BLOCK_M]: the first and the middle one
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if MASKED:
            seen = visible(queries[None, :], diagonal[:, None], window_size)
            scores = tl.where(seen & (queries < Tq)[None, :], scores, float("-inf"))
        if q.dtype == tl.float32:
            normaliser, _ = tl.split(between)
            probs = softmax_from_shift(scores, lse[None, :], softmax_scale) * normaliser[None, :]
        else:
            probs = softmax_from_lse(scores, lse[None, :], softmax_scale)
        if OWNS_DV:
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
        if OWNS_DK:
            dprobs = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            dscores = probs * (dprobs - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
        group = tl.where(step == num_tiles - 1, group + 1, group)
        step = tl.where(step == num_tiles - 1, 0, step + 1)
    return dk, dv


@triton.jit(do_not_specialize=["num_sequences", "window_size", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # [B, Hq, Tq, STATS_WIDTH], contiguous
    dk_ptr,
    dv_ptr,
    cu_seqlens,  # borders in q and in k, [N + 1] each, or None
    num_sequences,  # N, or 0
    softmax_scale,  # > 0
    window_size,
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
    STATS_WIDTH: tl.constexpr,
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
    stride_stats = Tq * STATS_WIDTH  # of a head
    stats_ptr += (b * Hq + h_kv * groups) * stride_stats
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
        stats_ptr += q_start * STATS_WIDTH
        dk_ptr += k_start * dk_strides[1]
        dv_ptr += k_start * dv_strides[1]

    first_key = tile * SIZES.BLOCK_N
    keys = first_key + tl.arange(0, SIZES.BLOCK_N)
    diagonal = keys - (Tk - Tq)
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows_m = tl.arange(0, SIZES.BLOCK_M)[:, None]
    q_offsets = rows_m * q_strides[1] + cols_qk[None, :]  # [BLOCK_M, BLOCK_D]
    do_offsets = rows_m * do_strides[1] + cols_v[None, :]  # [BLOCK_M, BLOCK_DV]
    rows_n = keys.to(tl.int64)[:, None]
    k_pointers = k_ptr + rows_n * k_strides[1] + cols_qk[None, :]
    v_pointers = v_ptr + rows_n * v_strides[1] + cols_v[None, :]
    k = load_rows(k_pointers, keys, Tk, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
    v = load_rows(v_pointers, keys, Tk, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)

    dk = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_D], 0.0, tl.float32)
    dv = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_DV], 0.0, tl.float32)
    first, interior, edge, end = query_tile_bounds(
        first_key, Tq, Tk, window_size, SIZES.BLOCK_M, SIZES.BLOCK_N
    )
    inside = edge - interior
    q_tiles, do_tiles = (q_ptr, q_offsets, q_strides), (do_ptr, do_offsets, do_strides)
    dk, dv = _dkv_segment(
        dk, dv, k, v, q_tiles, do_tiles, stats_ptr, diagonal,
        (first, end - first - inside, interior, inside),
        groups, stride_stats, Tq, window_size, softmax_scale,
        SIZES, STATS_WIDTH,
        OWNS_DK, OWNS_DV, MASKED=True,
    )  # fmt: skip
    dk, dv = _dkv_segment(
        dk, dv, k, v, q_tiles, do_tiles, stats_ptr, diagonal,
        (interior, inside, interior, 0),
        groups, stride_stats, Tq, window_size, softmax_scale,
        SIZES, STATS_WIDTH,
        OWNS_DK, OWNS_DV, MASKED=False,
    )  # fmt: skip
    # Rows are counted from the tile's first key here: nothing computed above stays in registers.
    first_row = tl.cast(first_key, tl.int64)
    rows = tl.arange(0, SIZES.BLOCK_N)
    num_rows = Tk - first_key
    if OWNS_DK:
        dk_offsets = rows[:, None] * dk_strides[1] + cols_qk[None, :]
        dk_pointers = dk_ptr + first_row * dk_strides[1] + dk_offsets
        store_rows(dk_pointers, dk * softmax_scale, rows, num_rows, cols_qk, SIZES.D)
    if OWNS_DV:
        dv_offsets = rows[:, None] * dv_strides[1] + cols_v[None, :]
        dv_pointers = dv_ptr + first_row * dv_strides[1] + dv_offsets
        store_rows(dv_pointers, dv, rows, num_rows, cols_v, SIZES.DV)
