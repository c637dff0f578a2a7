"""`window_attn`, backward: dk and dv, from the row statistics that the dq pass has left. See `bwd`."""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import (
    load_rows,
    nth_tile,
    packed_tile,
    query_tile_bounds,
    softmax_from_lse,
    softmax_from_shift,
    store_rows,
    tile_slots,
    visible,
)


@triton.jit
def _dkv_segment(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_DV]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    q_ptr,  # of the first query head, like the next two
    do_ptr,
    stats_ptr,
    q_offsets,  # within a tile: [BLOCK_M, BLOCK_D]
    do_offsets,  # [BLOCK_M, BLOCK_DV]
    diagonal,  # the query that stands at each key: [BLOCK_N]
    first_tile,
    num_tiles,
    gap_start,
    gap,
    groups,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    stride_stats,
    Tq,
    window_size,
    softmax_scale,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    OWNS_DK: tl.constexpr,
    OWNS_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols_qk = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    # One loop over the tiles of every query head, so that its pipeline fills only once.
    step = 0
    group = 0
    for _ in range(0, num_tiles * groups):
        first_query = nth_tile(first_tile, step, gap_start, gap, MASKED) * BLOCK_M
        queries = first_query + tl.arange(0, BLOCK_M)
        first_row = tl.cast(first_query, tl.int64)
        head = tl.cast(group, tl.int64)
        q_pointers = q_ptr + head * stride_qh + first_row * stride_qt + q_offsets
        do_pointers = do_ptr + head * stride_doh + first_row * stride_dot + do_offsets
        stats_head = stats_ptr + head * stride_stats
        q = load_rows(q_pointers, queries, Tq, cols_qk, HEAD_DIM_QK, BLOCK_D, MASKED)
        do = load_rows(do_pointers, queries, Tq, cols_v, HEAD_DIM_V, BLOCK_DV, MASKED)
        stats_pointers = stats_head + queries[:, None] * STATS_WIDTH
        stats_pointers += tl.arange(0, STATS_WIDTH)[None, :]  # [BLOCK_M, STATS_WIDTH]
        if MASKED:
            stats = tl.load(stats_pointers, mask=(queries < Tq)[:, None], other=0.0)
        else:
            stats = tl.load(stats_pointers)
        if STATS_WIDTH == 8:
            stats, _ = tl.split(tl.reshape(stats, [BLOCK_M, 4, 2]))  # every second column
        stats, between = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2]))
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
    cu_seqlens_q_ptr,  # [N + 1], or None
    cu_seqlens_k_ptr,
    num_sequences,  # N, or 0
    softmax_scale,  # > 0
    window_size,
    Tq,
    Tk,
    Hq,
    Hkv,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    OWNS_DK: tl.constexpr,
    OWNS_DV: tl.constexpr,
):
    # The key tiles of one kv head follow each other: neighbours share most of their queries.
    num_tiles = tile_slots(Tk, num_sequences, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    h_kv = tl.cast(pid // num_tiles % Hkv, tl.int64)
    b = tl.cast(pid // num_tiles // Hkv, tl.int64)
    groups = Hq // Hkv
    q_ptr += b * stride_qb + h_kv * groups * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    do_ptr += b * stride_dob + h_kv * groups * stride_doh
    stride_stats = Tq * STATS_WIDTH  # of a head
    stats_ptr += (b * Hq + h_kv * groups) * stride_stats
    dk_ptr += b * stride_dkb + h_kv * stride_dkh
    dv_ptr += b * stride_dvb + h_kv * stride_dvh
    if cu_seqlens_q_ptr is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens_k_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_N
        )
        if tile * BLOCK_N >= Tk:
            return
        q_ptr += q_start * stride_qt
        k_ptr += k_start * stride_kt
        v_ptr += k_start * stride_vt
        do_ptr += q_start * stride_dot
        stats_ptr += q_start * STATS_WIDTH
        dk_ptr += k_start * stride_dkt
        dv_ptr += k_start * stride_dvt

    first_key = tile * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    diagonal = keys - (Tk - Tq)
    cols_qk = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    rows_m = tl.arange(0, BLOCK_M)[:, None]
    q_offsets = rows_m * stride_qt + cols_qk[None, :]  # [BLOCK_M, BLOCK_D]
    do_offsets = rows_m * stride_dot + cols_v[None, :]  # [BLOCK_M, BLOCK_DV]
    rows_n = keys.to(tl.int64)[:, None]
    k_pointers = k_ptr + rows_n * stride_kt + cols_qk[None, :]
    v_pointers = v_ptr + rows_n * stride_vt + cols_v[None, :]
    k = load_rows(k_pointers, keys, Tk, cols_qk, HEAD_DIM_QK, BLOCK_D, True)
    v = load_rows(v_pointers, keys, Tk, cols_v, HEAD_DIM_V, BLOCK_DV, True)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first, interior, edge, end = query_tile_bounds(first_key, Tq, Tk, window_size, BLOCK_M, BLOCK_N)
    inside = edge - interior
    dk, dv = _dkv_segment(
        dk, dv, k, v, q_ptr, do_ptr, stats_ptr, q_offsets, do_offsets, diagonal,
        first, end - first - inside, interior, inside,
        groups, stride_qt, stride_qh, stride_dot, stride_doh, stride_stats,
        Tq, window_size, softmax_scale,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, STATS_WIDTH,
        OWNS_DK, OWNS_DV, MASKED=True,
    )  # fmt: skip
    dk, dv = _dkv_segment(
        dk, dv, k, v, q_ptr, do_ptr, stats_ptr, q_offsets, do_offsets, diagonal,
        interior, inside, interior, 0,
        groups, stride_qt, stride_qh, stride_dot, stride_doh, stride_stats,
        Tq, window_size, softmax_scale,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, STATS_WIDTH,
        OWNS_DK, OWNS_DV, MASKED=False,
    )  # fmt: skip
    # Rows are counted from the tile's first key here: nothing computed above stays in registers.
    first_row = tl.cast(first_key, tl.int64)
    rows = tl.arange(0, BLOCK_N)
    num_rows = Tk - first_key
    if OWNS_DK:
        dk_offsets = rows[:, None] * stride_dkt + cols_qk[None, :]
        dk_pointers = dk_ptr + first_row * stride_dkt + dk_offsets
        store_rows(dk_pointers, dk * softmax_scale, rows, num_rows, cols_qk, HEAD_DIM_QK)
    if OWNS_DV:
        dv_offsets = rows[:, None] * stride_dvt + cols_v[None, :]
        dv_pointers = dv_ptr + first_row * stride_dvt + dv_offsets
        store_rows(dv_pointers, dv, rows, num_rows, cols_v, HEAD_DIM_V)
