"""`window_attn`, backward from the lse: two deterministic passes and no atomics.

```
    P = exp(S * scale - lse)      delta = rowsum(dO * O) - dlse      dS = P * (dO V^T - delta)
    dQ = scale * dS K             dV = P^T dO                        dK = scale * dS^T Q
```

The dq pass walks the key tiles that a tile of queries sees, as the forward does, and leaves the
row statistics (lse and `delta`) for the other. The dk/dv pass walks the query tiles that see a tile
of keys, for each query head of its kv head, in three segments: diagonal and right edge (masked, one
loop) and interior (no mask, no bounds checks). Where the two accumulators do not fit in registers
(head dims beyond 128 on sm_90), dk and dv have a launch each, and the scores are computed twice.
The transposed products are computed directly, `S^T = K Q^T`: a transposed matrix product that feeds
another one is miscompiled on Hopper.

For float32 inputs P is divided by the sums of its rows, which the dq pass finds on its way and leaves
for the other: the rounding of a large lse is a relative error of P, the same for a whole row.

Products take the input dtype and accumulate in float32 (full float32 products for float32 input);
P and dS are rounded to the input dtype for their second product. Everything is read in place, and
nothing saved by the forward is written.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.triton.configs import (
    CompileCase,
    KernelConfig,
    capability_of,
    kernel_config,
    packing_cases,
    shipped_cases,
)
from lact_kernels.triton.launch import (
    on_device,
    outer_strides,
    packing_arguments,
    positive_scale,
    readable_in_place,
)
from lact_kernels.triton.primitives import (
    attention_constexprs,
    key_tile_bounds,
    load_rows,
    nth_tile,
    num_tile_slots,
    packed_tile,
    query_tile_bounds,
    query_tile_program,
    softmax_from_lse,
    softmax_from_shift,
    store_rows,
    tile_slots,
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


def window_attn_bwd(
    do: Tensor,  # [B, Tq, Hq, Dv]
    dlse: Tensor | None,  # [B, Hq, Tq]
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    o: Tensor,  # [B, Tq, Hq, Dv]
    lse: Tensor,  # [B, Hq, Tq]
    window_size: int,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None = None,  # [N + 1], int32, contiguous, with B = 1; likewise:
    cu_seqlens_k: Tensor | None = None,
    *,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(dq, dk, dv)` in the shapes and dtypes of q, k and v, contiguous.

    `window_size` counts the query itself, is at least 1 and at most Tk (or 1). `config` overrides the
    table for both passes.
    """
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if do.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, sign, softmax_scale = positive_scale(q, softmax_scale)
    q, k, v, o, do = readable_in_place(q, k, v, o, do)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    capability = capability_of(q.device)
    dq_config = config or kernel_config("window_attn_bwd_dq", D, Dv, q.dtype, capability)
    dkv_config = config or kernel_config("window_attn_bwd_dkv", D, Dv, q.dtype, capability)
    width = _stats_width(dkv_config)
    stats = lse.new_empty(B, Hq, Tq, width)
    packing = packing_arguments(cu_seqlens_q, cu_seqlens_k, q.device)
    sizes = (*packing, softmax_scale, window_size, Tq, Tk, Hq, Hkv)
    query_slots = num_tile_slots(Tq, packing[-1], dq_config.block_m)
    key_slots = num_tile_slots(Tk, packing[-1], dkv_config.block_n)
    with on_device(q):
        _window_attn_bwd_dq_kernel[(query_slots * B * Hq,)](
            q, k, v, o, do, lse, dlse, stats, dq, *sizes,
            *outer_strides(q, k, v, o, do, dq), **_constexprs(D, Dv, dq_config, width),
            num_warps=dq_config.num_warps, num_stages=dq_config.num_stages,
        )  # fmt: skip
        for owned in _owned(dkv_config):
            _window_attn_bwd_dkv_kernel[(key_slots * B * Hkv,)](
                q, k, v, do, stats, dk, dv, *sizes, *outer_strides(q, k, v, do, dk, dv),
                **_constexprs(D, Dv, dkv_config, width), **owned,
                num_warps=dkv_config.num_warps, num_stages=dkv_config.num_stages,
            )  # fmt: skip
    return (dq if sign == 1 else dq * sign), dk, dv


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every shipped specialisation, for benchmarks/compile_report."""
    passes = {
        "window_attn_bwd_dkv": (_window_attn_bwd_dkv_kernel, ("do_ptr", "dk_ptr", "dv_ptr")),
        "window_attn_bwd_dq": (_window_attn_bwd_dq_kernel, ("o_ptr", "do_ptr", "dq_ptr")),
    }
    for name, (kernel, outputs) in passes.items():
        for dtype, head_dim, config, more in shipped_cases(name, arch):
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", *outputs), dtype)
            pointers |= dict.fromkeys(("lse_ptr", "stats_ptr"), torch.float32)
            constexprs = _constexprs(head_dim, head_dim, config, _stats_width(config))
            is_dq = name == "window_attn_bwd_dq"
            for variant in [{"dlse_ptr": None}] if is_dq else _owned(config):
                case = CompileCase(
                    name=name,
                    kernel=kernel,
                    arch=arch,
                    dtype=dtype,
                    shape=f"D{head_dim}",
                    config=config,
                    pointers=pointers,
                    constexprs=constexprs | variant,
                    **more,
                )
                yield from packing_cases(case)


def _owned(config: KernelConfig) -> list[dict[str, bool]]:
    """The launches of the dk/dv pass, by the gradients that each owns: both, or one after the other."""
    both = {"OWNS_DK": True, "OWNS_DV": True}
    return [both | {"OWNS_DV": False}, both | {"OWNS_DK": False}] if config.split else [both]


def _stats_width(dkv_config: KernelConfig) -> int:
    """Floats per query in the buffer between the two passes: lse first, delta in the middle.

    In float32 the shift is first, and the normaliser of the row stands before the middle.

    Two would do, but then the compiler has every thread of the dk/dv pass copy for itself each
    value it needs, tens of small copies. A tile with at least as many elements as the program has
    threads is copied once, 16 bytes per thread.
    """
    return 4 if 4 * dkv_config.block_m >= 32 * dkv_config.num_warps else 8


def _constexprs(D: int, Dv: int, config: KernelConfig, stats_width: int) -> dict[str, int]:
    return {**attention_constexprs(D, Dv, config), "STATS_WIDTH": stats_width}
