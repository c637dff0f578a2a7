"""`window_attn`, backward: dq, and the row statistics that the dk/dv pass reads. See `bwd`."""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import (
    key_tile_bounds,
    load_rows,
    nth_tile,
    packed_tile,
    query_tile_program,
    softmax_from_lse,
    softmax_from_shift,
    store_rows,
    visible,
)


@triton.jit
def _dq_segment(
    dq,  # [BLOCK_M, BLOCK_D]
    row_sum,  # [BLOCK_M], of the probabilities: float32 only
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse,  # [BLOCK_M], in float32 the shift
    delta,  # [BLOCK_M]
    k_ptr,  # of this kv head
    v_ptr,
    k_offsets,  # within a tile: [BLOCK_N, BLOCK_D]
    v_offsets,  # [BLOCK_N, BLOCK_DV]
    positions,  # [BLOCK_M]
    first_tile,
    num_tiles,
    gap_start,
    gap,
    stride_kt,
    stride_vt,
    Tk,
    window_size,
    softmax_scale,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols_qk = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    for step in range(0, num_tiles):
        first_key = nth_tile(first_tile, step, gap_start, gap, MASKED) * BLOCK_N
        keys = first_key + tl.arange(0, BLOCK_N)
        k_pointers = k_ptr + tl.cast(first_key, tl.int64) * stride_kt + k_offsets
        v_pointers = v_ptr + tl.cast(first_key, tl.int64) * stride_vt + v_offsets
        k = load_rows(k_pointers, keys, Tk, cols_qk, HEAD_DIM_QK, BLOCK_D, MASKED)
        v = load_rows(v_pointers, keys, Tk, cols_v, HEAD_DIM_V, BLOCK_DV, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = visible(positions[:, None], keys[None, :], window_size)
            scores = tl.where(seen, scores, float("-inf"))
        if q.dtype == tl.float32:
            probs = softmax_from_shift(scores, lse[:, None], softmax_scale)
            row_sum += tl.sum(probs, axis=1)
        else:
            probs = softmax_from_lse(scores, lse[:, None], softmax_scale)
        dprobs = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dscores = probs * (dprobs - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return dq, row_sum


@triton.jit(do_not_specialize=["num_sequences", "window_size", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,  # [B, Hq, Tq], contiguous, like dlse
    dlse_ptr,  # or None
    stats_ptr,  # [B, Hq, Tq, STATS_WIDTH], contiguous
    dq_ptr,
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
    stride_ob,
    stride_ot,
    stride_oh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
):
    b, h, h_kv, tile = query_tile_program(Tq, num_sequences, Hq, Hkv, BLOCK_M)
    b, h, h_kv = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h_kv, tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
    row_offset = (b * Hq + h) * Tq
    if cu_seqlens_q_ptr is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens_q_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_M
        )
        if tile * BLOCK_M >= Tq:
            return
        q_ptr += q_start * stride_qt
        k_ptr += k_start * stride_kt
        v_ptr += k_start * stride_vt
        o_ptr += q_start * stride_ot
        do_ptr += q_start * stride_dot
        dq_ptr += q_start * stride_dqt
        row_offset += q_start

    first_query = tile * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)
    positions = queries + (Tk - Tq)
    cols_qk = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    rows_m = queries.to(tl.int64)[:, None]
    rows_n = tl.arange(0, BLOCK_N)[:, None]
    k_offsets = rows_n * stride_kt + cols_qk[None, :]  # [BLOCK_N, BLOCK_D]
    v_offsets = rows_n * stride_vt + cols_v[None, :]  # [BLOCK_N, BLOCK_DV]
    q_pointers = q_ptr + rows_m * stride_qt + cols_qk[None, :]
    o_pointers = o_ptr + rows_m * stride_ot + cols_v[None, :]
    do_pointers = do_ptr + rows_m * stride_dot + cols_v[None, :]
    do = load_rows(do_pointers, queries, Tq, cols_v, HEAD_DIM_V, BLOCK_DV, True)
    o = load_rows(o_pointers, queries, Tq, cols_v, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_offset + queries, mask=queries < Tq, other=0.0)
    lse = tl.load(lse_ptr + row_offset + queries, mask=queries < Tq, other=0.0)
    # A row that saw nothing: any finite value makes its probabilities 0.
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    if q_ptr.dtype.element_ty == tl.float32:
        lse = tl.div_rn(lse, softmax_scale)
    stats_pointers = stats_ptr + (row_offset + queries) * STATS_WIDTH
    tl.store(stats_pointers, lse, mask=queries < Tq)
    tl.store(stats_pointers + STATS_WIDTH // 2, delta, mask=queries < Tq)
    q = load_rows(q_pointers, queries, Tq, cols_qk, HEAD_DIM_QK, BLOCK_D, True)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first, interior, diagonal, end = key_tile_bounds(
        first_query, Tq, Tk, window_size, BLOCK_M, BLOCK_N
    )
    inside = diagonal - interior
    dq, row_sum = _dq_segment(
        dq, row_sum, q, do, lse, delta, k_ptr, v_ptr, k_offsets, v_offsets, positions,
        first, end - first - inside, interior, inside,
        stride_kt, stride_vt, Tk, window_size, softmax_scale,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASKED=True,
    )  # fmt: skip
    dq, row_sum = _dq_segment(
        dq, row_sum, q, do, lse, delta, k_ptr, v_ptr, k_offsets, v_offsets, positions,
        interior, inside, interior, 0,
        stride_kt, stride_vt, Tk, window_size, softmax_scale,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASKED=False,
    )  # fmt: skip
    # Rows are counted from the tile's first query here: nothing computed above stays in registers.
    rows = tl.arange(0, BLOCK_M)
    if q_ptr.dtype.element_ty == tl.float32:
        normaliser = tl.where(row_sum == 0.0, 0.0, tl.div_rn(1.0, row_sum))
        dq *= normaliser[:, None]
        tl.store(stats_pointers + STATS_WIDTH // 4, normaliser, mask=queries < Tq)
    dq_offsets = rows[:, None] * stride_dqt + cols_qk[None, :]
    dq_pointers = dq_ptr + tl.cast(first_query, tl.int64) * stride_dqt + dq_offsets
    store_rows(dq_pointers, dq * softmax_scale, rows, Tq - first_query, cols_qk, HEAD_DIM_QK)
