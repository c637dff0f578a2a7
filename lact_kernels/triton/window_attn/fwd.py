"""`window_attn`, forward: one program per tile of queries, online softmax over the key tiles it sees.

```
    S = Q K^T      P = exp2((S - max S) * scale * log2 e)      O = P V / sum P
    lse = max S * scale + ln sum P
```

With a soft cap S is a tanh (see `softmax`), and a sink is added to sum P at the end. What a call does not
have is None, which is known when the kernel is compiled: it costs nothing.

Products take the input dtype and accumulate in float32; for float32 input and head dims of up to 64 each is
a sum of three TF32 products, over few channels at a time (`primitives.product`), otherwise it is made without
tensor cores. Row statistics are float32. The window and the lengths are runtime values: no length, window,
batch size or head count makes the kernel compile again.

By pointers the tiles of both edges are visited in one loop with a mask and bounds checks, the interior in
another with neither (see `primitives`).

On Hopper tiles are copied by descriptors (rows of the table with `descriptors`). One loop visits them from
the left edge of the window to the diagonal, and masks only those at the two ends, which a branch decides.
The two products of a tile are a loop apart: the scores of the next tile are computed before the product with
the values of this one, which then runs beside the softmax of the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.attention import AttentionOptions
from lact_kernels.triton.configs import (
    TRITON,
    KernelConfig,
    capability_of,
    kernel_config,
)
from lact_kernels.triton.descriptors import aligned_strides, attention_descriptors
from lact_kernels.triton.launch import (
    launch,
    on_device,
    outer_strides,
    packing_arguments,
    positive_scale,
    readable_in_place,
)
from lact_kernels.triton.primitives import (
    LOG2_E,
    Sizes,
    described_rows,
    head_rows,
    head_tiles,
    key_tile_bounds,
    load_channels,
    load_described_rows,
    load_rows,
    mask_after_query,
    mask_before_window,
    nth_tile,
    num_tile_slots,
    packed_tile,
    product,
    query_tile_program,
    scores_of,
    store_rows,
    tile_pointers,
)
from lact_kernels.triton.softmax import LOWEST, softcapped, softmax_end, softmax_step
from lact_kernels.triton.window_attn.with_kvcache import window_attn_with_kvcache

FEW_QUERIES = 16  # of a row: up to here the kernel that splits the keys takes them


@triton.jit
def _segment(
    state,  # acc [BLOCK_M, BLOCK_DV], row_max and row_sum [BLOCK_M]
    q,  # as `scores_of` takes it
    k_tiles,  # as `tile_pointers` takes them
    v_tiles,
    tiles,  # of keys, as `nth_tile` takes them
    first_position,
    Tk,
    window_size,
    right,
    scale_log2,
    bend,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tiles of a segment. A branch in the loop would cost Ampere the layout of its products."""
    acc, row_max, row_sum = state
    FULL_PRECISION: tl.constexpr = q[0].dtype == tl.float32
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    for step in range(0, tiles[1]):
        first_key = nth_tile(tiles, step, MASKED) * SIZES.BLOCK_N
        keys = first_key + tl.arange(0, SIZES.BLOCK_N)
        k_pointers = tile_pointers(k_tiles, first_key)
        v_pointers = tile_pointers(v_tiles, first_key)
        scores = scores_of(q, k_pointers, keys, Tk, SIZES, PRECISION, MASKED)
        scores = softcapped(scores, bend, FULL_PRECISION)
        if MASKED:
            last = None if right is None else Tk - 1 - first_key
            scores = mask_before_window(scores, first_position - first_key, window_size)
            scores = mask_after_query(scores, first_position - first_key, last=last)
        probs, decay, row_max, row_sum = softmax_step(
            scores, row_max, row_sum, scale_log2, FULL_PRECISION
        )
        v = load_rows(v_pointers, keys, Tk, cols_v, SIZES.DV, SIZES.BLOCK_DV, MASKED)
        acc = product(probs.to(v.dtype), v, acc * decay[:, None], PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _scores_by_descriptor(q, k_head, tile, SIZES: tl.constexpr):
    k = load_described_rows(k_head, tile * SIZES.BLOCK_N, SIZES.BLOCK_N, SIZES.BLOCK_D)
    return tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]


@triton.jit
def _masked_at_edge(scores, tile, edges, num_keys, window_size, SIZES: tl.constexpr):
    """`num_keys` where the tile may go on beyond keys that a query would see, else None."""
    first_position, interior = edges
    own = first_position - tile * SIZES.BLOCK_N
    last = None if num_keys is None else num_keys - 1 - tile * SIZES.BLOCK_N
    if tile < interior:
        scores = mask_before_window(scores, own, window_size)
    if (own if last is None else tl.minimum(own, last)) < SIZES.BLOCK_N - 1:
        scores = mask_after_query(scores, own, last=last)
    return scores


@triton.jit
def _described_tiles(
    state,  # as in `_segment`, like q and the last lines
    q,
    k_head,  # descriptors, as `load_described_rows` takes them
    v_head,
    tiles,  # of keys: the first and the last that are seen
    edges,  # position of the first query, and the first tile without keys that have left the window
    Tk,
    window_size,
    right,
    scale_log2,
    bend,
    SIZES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All tiles in order. The scores of each are computed one tile ahead, before the product with the
    values, which then runs beside the next softmax. Descriptors leave the registers for it.
    """
    acc, row_max, row_sum = state
    first, last = tiles
    scores = _scores_by_descriptor(q, k_head, first, SIZES)
    for tile in range(first, last):
        scores = softcapped(scores, bend, False)
        scores = _masked_at_edge(scores, tile, edges, None, window_size, SIZES)
        probs, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2, False)
        scores = _scores_by_descriptor(q, k_head, tile + 1, SIZES)
        v = load_described_rows(v_head, tile * SIZES.BLOCK_N, SIZES.BLOCK_N, SIZES.BLOCK_DV)
        acc = tl.dot(probs.to(v.dtype), v, acc * decay[:, None])  # [BLOCK_M, BLOCK_DV]
    scores = softcapped(scores, bend, False)
    num_keys = None if right is None else Tk
    scores = _masked_at_edge(scores, last, edges, num_keys, window_size, SIZES)
    probs, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2, False)
    v = load_described_rows(v_head, last * SIZES.BLOCK_N, SIZES.BLOCK_N, SIZES.BLOCK_DV)
    if PACKED:
        # Values of the next sequence: their probabilities are 0, but they may be NaN.
        keys = last * SIZES.BLOCK_N + tl.arange(0, SIZES.BLOCK_N)
        v = tl.where((keys < Tk)[:, None], v, 0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * decay[:, None])
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_sequences", "window_size", "right", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_fwd_kernel(
    q_tensor,  # a pointer, or a descriptor of [B, H, T, D] and no strides, like the next two
    k_tensor,
    v_tensor,
    o_ptr,
    lse_ptr,  # [B, Hq, Tq], contiguous
    sinks_ptr,  # [B, Hq], contiguous, or None
    cu_seqlens,  # borders in q and in k, [N + 1] each, or None
    num_sequences,  # N, or 0
    softmax_scale,  # of the exponents, > 0
    bend,  # of the scores, or None
    window_size,  # keys that a query sees
    right,  # how far after it the last of them is, or None: it is its own
    Tq,
    Tk,
    Hq,
    Hkv,
    q_strides,  # of batch row, token and head, like the others
    k_strides,
    v_strides,
    o_strides,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products, as `product` takes it
):
    b, h, h_kv, tile = query_tile_program(Tq, num_sequences, Hq, Hkv, SIZES.BLOCK_M)
    row_offset = tl.cast(b * Hq + h, tl.int64) * Tq
    q_start, k_start = 0, 0
    if cu_seqlens is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens[0], cu_seqlens, num_sequences, SIZES.BLOCK_M
        )
        if tile * SIZES.BLOCK_M >= Tq:
            return
    first_query = tile * SIZES.BLOCK_M
    num_rows = Tq - first_query
    first_position = first_query + Tk - Tq
    if right is not None:
        first_position += right
    lse_ptr += row_offset + (q_start + first_query)
    o_ptr = head_rows(o_ptr, o_strides, b, h, q_start + first_query)

    FULL_PRECISION: tl.constexpr = o_ptr.dtype.element_ty == tl.float32
    scale_log2 = softmax_scale * LOG2_E
    acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_DV], 0.0, tl.float32)
    row_max = tl.full([SIZES.BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
    state = (acc, row_max, row_sum)
    first, interior, diagonal, end = key_tile_bounds(
        first_query, Tq, Tk, window_size, right, SIZES.BLOCK_M, SIZES.BLOCK_N
    )
    if q_strides is None:
        q_head = described_rows(q_tensor, b, h, q_start)
        k_head = described_rows(k_tensor, b, h_kv, k_start)
        v_head = described_rows(v_tensor, b, h_kv, k_start)
        q = load_described_rows(q_head, first_query, SIZES.BLOCK_M, SIZES.BLOCK_D)
        acc, row_max, row_sum = _described_tiles(
            state, q, k_head, v_head, (first, tl.maximum(end - 1, 0)),
            (first_position, interior), Tk, window_size, right, scale_log2, bend,
            SIZES, cu_seqlens is not None,
        )  # fmt: skip
    else:
        queries, cols = first_query + tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.CHUNK)
        q_rows = queries.to(tl.int64)[:, None] * q_strides[1] + cols[None, :]
        q_pointers = head_rows(q_tensor, q_strides, b, h, q_start) + q_rows
        q = (load_channels(q_pointers, queries, Tq, 0, SIZES, True),)
        CHUNKS: tl.constexpr = (SIZES.D + SIZES.CHUNK - 1) // SIZES.CHUNK
        for nth in tl.static_range(1, CHUNKS):
            q += (load_channels(q_pointers, queries, Tq, nth, SIZES, True),)
        k_tiles = head_tiles(k_tensor, k_strides, b, h_kv, k_start, SIZES.BLOCK_N, SIZES.CHUNK)
        v_tiles = head_tiles(v_tensor, v_strides, b, h_kv, k_start, SIZES.BLOCK_N, SIZES.BLOCK_DV)
        inside = diagonal - interior
        state = _segment(
            state, q, k_tiles, v_tiles, (first, end - first - inside, interior, inside),
            first_position, Tk, window_size, right, scale_log2, bend, SIZES, PRECISION, MASKED=True,
        )  # fmt: skip
        acc, row_max, row_sum = _segment(
            state, q, k_tiles, v_tiles, (interior, inside, interior, 0),
            first_position, Tk, window_size, right, scale_log2, bend, SIZES, PRECISION, MASKED=False,
        )  # fmt: skip

    sink = None if sinks_ptr is None else tl.load(sinks_ptr + (b * Hq + h))
    o, lse = softmax_end(acc, row_max, row_sum, softmax_scale, sink, FULL_PRECISION)
    rows, cols = tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.BLOCK_DV)
    o_pointers = o_ptr + (rows[:, None] * o_strides[1] + cols[None, :])
    store_rows(o_pointers, o, rows, num_rows, cols, SIZES.DV)
    tl.store(lse_ptr + rows, lse, mask=rows < num_rows)


FWD_KERNELS = {TRITON: _window_attn_fwd_kernel}


def window_attn_fwd(
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    options: AttentionOptions,
    sinks: Tensor | None = None,  # [B, Hq], float32
    cu_seqlens_q: Tensor | None = None,  # [N + 1], int32, contiguous, with B = 1; likewise:
    cu_seqlens_k: Tensor | None = None,
    *,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` in the dtype of `q`, and the lse `[B, Hq, Tq]` in float32.

    `options` has limits on both sides (`AttentionOptions.within`). A query that sees no key has the output
    0 and as the lse the sink of its head, or -inf. Inputs are read in place unless their last stride is not
    1. `config` overrides the table.
    """
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    o = q.new_empty(B, Tq, Hq, Dv)
    lse = q.new_empty(B, Hq, Tq, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    if Tq <= FEW_QUERIES and cu_seqlens_q is None and config is None:
        return window_attn_with_kvcache(q, k, v, None, options, sinks)
    q, _, scale, bend = positive_scale(q, options)
    q, k, v = readable_in_place(q, k, v)
    strides = list(map(aligned_strides, (q, k, v)))
    config = config or kernel_config(
        "window_attn_fwd", D, Dv, q.dtype, capability_of(q.device),
        described=None not in strides, softcap=bend is not None,
    )  # fmt: skip
    packing = packing_arguments(cu_seqlens_q, cu_seqlens_k, q.device)
    slots = num_tile_slots(Tq, packing[-1], config.block_m)
    sizes = Sizes.of(D, Dv, config)
    tensors = (q, k, v)
    if config.descriptors:
        tensors = attention_descriptors(tensors, strides, sizes)
        strides = (None, None, None, *outer_strides(o))
    else:
        strides = outer_strides(q, k, v, o)
    with on_device(q):
        launch(
            FWD_KERNELS, config, (slots * B * Hq,),
            *tensors, o, lse, None if sinks is None else sinks.contiguous(), *packing,
            scale, bend, options.width, options.right or None, Tq, Tk, Hq, Hkv, *strides,
            SIZES=sizes, PRECISION=config.precision,
        )  # fmt: skip
    return o, lse
