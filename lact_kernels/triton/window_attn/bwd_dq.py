"""`window_attn`, backward: dq, and the row statistics that the dk/dv pass reads. See `bwd`.

On Hopper tiles of dense input are copied by descriptors (rows of the table with `descriptors`), which know
where the tensor ends. Packed sequences are read by pointers, with zeros beyond each: by descriptors the last
tile of one would have keys of the next, which may be NaN, and so would 0 times them.
"""

import triton
import triton.language as tl

from lact_kernels.triton.primitives import (
    LOG2_E,
    described_rows,
    head_rows,
    is_below,
    key_tile_bounds,
    load_described_rows,
    load_rows,
    mask_after_query,
    mask_before_window,
    packed_tile,
    query_tile_program,
    store_rows,
)
from lact_kernels.triton.softmax import (
    minus_lse_log2,
    softcapped,
    softmax_from_lse,
    softmax_from_shift,
)


@triton.jit
def _dq_tiles(
    dq,  # [BLOCK_M, BLOCK_D]
    row_sum,  # [BLOCK_M], of the probabilities: float32 only
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse,  # [BLOCK_M], times -log2(e); in float32 the shift
    delta,  # [BLOCK_M]
    k_tiles,  # pointer to this kv head, offsets within a tile, strides
    v_tiles,
    last_keys,  # that each query sees: [BLOCK_M]
    limit,  # how many keys up to that one: for all queries, or [BLOCK_M, 1]
    bounds,  # of the key tiles, from `key_tile_bounds`
    Tk,
    softmax_scale,
    bend,
    SIZES: tl.constexpr,
):
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows = tl.arange(0, SIZES.BLOCK_N)
    first, interior, diagonal, end = bounds
    k_ptr, k_offsets, k_strides = k_tiles
    v_ptr, v_offsets, v_strides = v_tiles
    k_ptr += tl.cast(first * SIZES.BLOCK_N, tl.int64) * k_strides[1]
    v_ptr += tl.cast(first * SIZES.BLOCK_N, tl.int64) * v_strides[1]
    for tile in range(first, end):
        first_key = tile * SIZES.BLOCK_N
        keys = first_key + rows
        k = load_rows(k_ptr + k_offsets, keys, Tk, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
        v = load_rows(v_ptr + v_offsets, keys, Tk, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        # Before the exponentials, which then run beside this product.
        dprobs = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores = softcapped(scores, bend, q.dtype == tl.float32)
        if q.dtype == tl.float32:
            probs = softmax_from_shift(scores, lse[:, None], softmax_scale)
        else:
            probs = softmax_from_lse(scores, lse[:, None], softmax_scale * LOG2_E)
        if (tile < interior) | (tile >= diagonal):
            distance = (last_keys - first_key)[:, None] - rows[None, :]
            probs = tl.where(is_below(distance, limit), probs, 0.0)
        if q.dtype == tl.float32:
            row_sum += tl.sum(probs, axis=1)
        dscores = probs * (dprobs - delta[:, None])
        if bend is not None:
            dscores *= 1.0 - scores * scores  # the derivative of tanh
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
        k_ptr += SIZES.BLOCK_N * k_strides[1]
        v_ptr += SIZES.BLOCK_N * v_strides[1]
    return dq, row_sum


@triton.jit
def _dq_described_tiles(
    dq,  # as in `_dq_tiles`, like the next four and the last ones
    q,
    do,
    lse,
    delta,
    k_head,  # descriptors, as `load_described_rows` takes them
    v_head,
    tiles,  # of keys: the first, and the one after the last
    edges,  # position of the first query, and the first tile without keys that have left the window
    Tk,
    window_size,
    right,
    scale_log2,
    bend,
    SIZES: tl.constexpr,
):
    first, end = tiles
    first_position, interior = edges
    for tile in range(first, end):
        first_key = tile * SIZES.BLOCK_N
        k = load_described_rows(k_head, first_key, SIZES.BLOCK_N, SIZES.BLOCK_D)
        v = load_described_rows(v_head, first_key, SIZES.BLOCK_N, SIZES.BLOCK_DV)
        scores = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        # Before the exponentials, which then run beside this product.
        dprobs = tl.dot(do, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        scores = softcapped(scores, bend, False)
        probs = softmax_from_lse(scores, lse[:, None], scale_log2)
        dscores = probs * (dprobs - delta[:, None])
        if bend is not None:
            dscores *= 1.0 - scores * scores  # the derivative of tanh
        own = first_position - first_key
        if tile < interior:
            dscores = mask_before_window(dscores, own, window_size, 0.0)
        last = None if right is None else Tk - 1 - first_key
        if (own if right is None else tl.minimum(own, last)) < SIZES.BLOCK_N - 1:
            dscores = mask_after_query(dscores, own, 0.0, last)
        dq = tl.dot(dscores.to(k.dtype), k, dq)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit
def _sink_probs(sink, lse, softmax_scale, FULL_PRECISION: tl.constexpr):
    """Of a logit without a key, in each row: in full precision as `softmax_from_shift` has the others."""
    if FULL_PRECISION:
        shift = tl.div_rn(lse, softmax_scale)
        exponents = tl.minimum(tl.fma(shift, -softmax_scale, sink) * LOG2_E, 64.0)
    else:
        exponents = tl.minimum(sink * LOG2_E - lse * LOG2_E, 0.0)
    return tl.exp2(exponents)


@triton.jit(do_not_specialize=["num_sequences", "window_size", "right", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_bwd_dq_kernel(
    q_tensor,  # a pointer, or a descriptor of [B, H, T, D] and no strides, like the next two
    k_tensor,
    v_tensor,
    o_ptr,
    do_ptr,
    lse_ptr,  # [B, Hq, Tq], contiguous, like dlse
    dlse_ptr,  # or None
    sinks_ptr,  # [B, Hq], contiguous, or None
    stats_ptr,  # [B, Hq, NUM_STATS, Tq], contiguous
    dq_ptr,
    sinks_ds_ptr,  # dS of the sinks, [B, Hq, Tq], contiguous; None without them
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
    o_strides,
    do_strides,
    dq_strides,
    SIZES: tl.constexpr,
    NUM_STATS: tl.constexpr,
):
    b, h, h_kv, tile = query_tile_program(Tq, num_sequences, Hq, Hkv, SIZES.BLOCK_M)
    row_offset = tl.cast(b * Hq + h, tl.int64) * Tq
    stats_ptr += row_offset * NUM_STATS
    stride_stats = tl.cast(Tq, tl.int64)  # of a statistic
    q_start, k_start = 0, 0
    if cu_seqlens is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens[0], cu_seqlens, num_sequences, SIZES.BLOCK_M
        )
        if tile * SIZES.BLOCK_M >= Tq:
            return
        row_offset += q_start
        stats_ptr += q_start
    o_ptr = head_rows(o_ptr, o_strides, b, h, q_start)
    do_ptr = head_rows(do_ptr, do_strides, b, h, q_start)
    dq_ptr = head_rows(dq_ptr, dq_strides, b, h, q_start)

    FULL_PRECISION: tl.constexpr = o_ptr.dtype.element_ty == tl.float32
    first_query = tile * SIZES.BLOCK_M
    queries = first_query + tl.arange(0, SIZES.BLOCK_M)
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows_m = queries.to(tl.int64)[:, None]
    o_pointers = o_ptr + rows_m * o_strides[1] + cols_v[None, :]
    do_pointers = do_ptr + rows_m * do_strides[1] + cols_v[None, :]
    do = load_rows(do_pointers, queries, Tq, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)
    o = load_rows(o_pointers, queries, Tq, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_offset + queries, mask=queries < Tq, other=0.0)
    lse = tl.load(lse_ptr + row_offset + queries, mask=queries < Tq, other=0.0)
    # A row that saw nothing: any finite value makes its probabilities 0.
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    row_sum = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + b * Hq + h)
        row_sum = _sink_probs(sink, lse, softmax_scale, FULL_PRECISION)
        tl.store(sinks_ds_ptr + row_offset + queries, -row_sum * delta, mask=queries < Tq)
    if FULL_PRECISION:
        lse = tl.div_rn(lse, softmax_scale)
    else:
        lse = minus_lse_log2(lse, softmax_scale)
    stats_pointers = stats_ptr + queries
    tl.store(stats_pointers, lse, mask=queries < Tq)
    tl.store(stats_pointers + stride_stats, delta, mask=queries < Tq)

    dq = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_D], 0.0, tl.float32)
    if q_strides is None:  # dense: of a sequence that ends, tiles would go on with the next
        q_head = described_rows(q_tensor, b, h, 0)
        k_head = described_rows(k_tensor, b, h_kv, 0)
        v_head = described_rows(v_tensor, b, h_kv, 0)
        q = load_described_rows(q_head, first_query, SIZES.BLOCK_M, SIZES.BLOCK_D)
        first, interior, _, end = key_tile_bounds(
            first_query, Tq, Tk, window_size, right, SIZES.BLOCK_M, SIZES.BLOCK_N
        )
        first_position = first_query + Tk - Tq
        if right is not None:
            first_position += right
        dq = _dq_described_tiles(
            dq, q, do, lse, delta, k_head, v_head, (first, end), (first_position, interior),
            Tk, window_size, right, softmax_scale * LOG2_E, bend, SIZES,
        )  # fmt: skip
    else:
        q_ptr = head_rows(q_tensor, q_strides, b, h, q_start)
        k_ptr = head_rows(k_tensor, k_strides, b, h_kv, k_start)
        v_ptr = head_rows(v_tensor, v_strides, b, h_kv, k_start)
        q_pointers = q_ptr + rows_m * q_strides[1] + cols_qk[None, :]
        q = load_rows(q_pointers, queries, Tq, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
        rows_n = tl.arange(0, SIZES.BLOCK_N)[:, None]
        # Without a sign, so that they are extended to 64 bits at no cost.
        k_offsets = (rows_n * k_strides[1] + cols_qk[None, :]).to(tl.uint32)  # [BLOCK_N, BLOCK_D]
        v_offsets = (rows_n * v_strides[1] + cols_v[None, :]).to(tl.uint32)  # [BLOCK_N, BLOCK_DV]
        bounds = key_tile_bounds(
            first_query, Tq, Tk, window_size, right, SIZES.BLOCK_M, SIZES.BLOCK_N
        )
        last_keys, limit = queries + (Tk - Tq), window_size
        if right is not None:
            positions = last_keys + right
            last_keys = tl.minimum(positions, Tk - 1)
            limit = (window_size - (positions - last_keys))[:, None]
        dq, row_sum = _dq_tiles(
            dq, row_sum, q, do, lse, delta, (k_ptr, k_offsets, k_strides),
            (v_ptr, v_offsets, v_strides), last_keys, limit, bounds, Tk, softmax_scale, bend, SIZES,
        )  # fmt: skip
    # Rows are counted from the tile's first query here: nothing computed above stays in registers.
    rows = tl.arange(0, SIZES.BLOCK_M)
    if FULL_PRECISION:
        normaliser = tl.where(row_sum == 0.0, 0.0, tl.div_rn(1.0, row_sum))
        dq *= normaliser[:, None]
        tl.store(stats_pointers + 2 * stride_stats, normaliser, mask=queries < Tq)
    dq_offsets = rows[:, None] * dq_strides[1] + cols_qk[None, :]
    dq_pointers = dq_ptr + tl.cast(first_query, tl.int64) * dq_strides[1] + dq_offsets
    if bend is not None:
        softmax_scale *= bend
    store_rows(dq_pointers, dq * softmax_scale, rows, Tq - first_query, cols_qk, SIZES.D)
