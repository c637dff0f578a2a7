"""`window_attn`, forward: one program per tile of queries, online softmax over the tiles it sees.

```
    S = Q K^T      P = exp2((S - max S) * scale * log2 e)      O = P V / sum P
    lse = max S * scale + ln sum P
```

The key tiles form three segments (see `primitives`): left edge and diagonal are visited in one
loop with a mask and bounds checks, the interior in another with neither. Products take the input
dtype and accumulate in float32; for float32 input they are full float32 products. Row statistics
are float32. The window and the lengths are runtime values: no length, window, batch size or head
count makes the kernel compile again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.triton.configs import (
    TRITON,
    KernelConfig,
    capability_of,
    kernel_config,
)
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
    LOWEST,
    Sizes,
    head_offset,
    key_tile_bounds,
    load_rows,
    nth_tile,
    num_tile_slots,
    packed_tile,
    query_tile_program,
    softmax_end,
    softmax_step,
    store_rows,
    tile_pointers,
    visible,
)
from lact_kernels.triton.window_attn.with_kvcache import window_attn_with_kvcache

FEW_QUERIES = 16  # of a row: up to here the kernel that splits the keys takes them


@triton.jit
def _fwd_segment(
    acc,  # [BLOCK_M, BLOCK_DV]
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    k_tiles,  # of this kv head, as `tile_pointers` takes them
    v_tiles,
    positions,  # [BLOCK_M]
    tiles,  # of keys, as `nth_tile` takes them
    Tk,
    window_size,
    scale_log2,
    SIZES: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    for step in range(0, tiles[1]):
        first_key = nth_tile(tiles, step, MASKED) * SIZES.BLOCK_N
        keys = first_key + tl.arange(0, SIZES.BLOCK_N)
        k_pointers = tile_pointers(k_tiles, first_key)
        v_pointers = tile_pointers(v_tiles, first_key)
        k = load_rows(k_pointers, keys, Tk, cols_qk, SIZES.D, SIZES.BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = visible(positions[:, None], keys[None, :], window_size)
            scores = tl.where(seen, scores, float("-inf"))
        probs, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        acc = acc * decay[:, None]
        v = load_rows(v_pointers, keys, Tk, cols_v, SIZES.DV, SIZES.BLOCK_DV, MASKED)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_sequences", "window_size", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,  # [B, Hq, Tq], contiguous
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
    o_strides,
    SIZES: tl.constexpr,
):
    b, h, h_kv, tile = query_tile_program(Tq, num_sequences, Hq, Hkv, SIZES.BLOCK_M)
    b, h, h_kv = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h_kv, tl.int64)
    q_ptr += head_offset(q_strides, b, h)
    k_ptr += head_offset(k_strides, b, h_kv)
    v_ptr += head_offset(v_strides, b, h_kv)
    o_ptr += head_offset(o_strides, b, h)
    lse_ptr += (b * Hq + h) * Tq
    if cu_seqlens is not None:
        tile, q_start, Tq, k_start, Tk = packed_tile(
            tile, cu_seqlens[0], cu_seqlens, num_sequences, SIZES.BLOCK_M
        )
        if tile * SIZES.BLOCK_M >= Tq:
            return
        q_ptr += q_start * q_strides[1]
        k_ptr += k_start * k_strides[1]
        v_ptr += k_start * v_strides[1]
        o_ptr += q_start * o_strides[1]
        lse_ptr += q_start

    first_query = tile * SIZES.BLOCK_M
    queries = first_query + tl.arange(0, SIZES.BLOCK_M)
    positions = queries + (Tk - Tq)
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    rows_m = queries.to(tl.int64)[:, None]
    rows_n = tl.arange(0, SIZES.BLOCK_N)[:, None]
    k_offsets = rows_n * k_strides[1] + cols_qk[None, :]  # [BLOCK_N, BLOCK_D]
    v_offsets = rows_n * v_strides[1] + cols_v[None, :]  # [BLOCK_N, BLOCK_DV]
    q_pointers = q_ptr + rows_m * q_strides[1] + cols_qk[None, :]
    q = load_rows(q_pointers, queries, Tq, cols_qk, SIZES.D, SIZES.BLOCK_D, True)

    scale_log2 = softmax_scale * LOG2_E
    acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_DV], 0.0, tl.float32)
    row_max = tl.full([SIZES.BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
    first, interior, diagonal, end = key_tile_bounds(
        first_query, Tq, Tk, window_size, SIZES.BLOCK_M, SIZES.BLOCK_N
    )
    inside = diagonal - interior
    k_tiles, v_tiles = (k_ptr, k_offsets, k_strides), (v_ptr, v_offsets, v_strides)
    acc, row_max, row_sum = _fwd_segment(
        acc, row_max, row_sum, q, k_tiles, v_tiles, positions,
        (first, end - first - inside, interior, inside), Tk, window_size, scale_log2,
        SIZES, MASKED=True,
    )  # fmt: skip
    acc, row_max, row_sum = _fwd_segment(
        acc, row_max, row_sum, q, k_tiles, v_tiles, positions,
        (interior, inside, interior, 0), Tk, window_size, scale_log2,
        SIZES, MASKED=False,
    )  # fmt: skip

    o, lse = softmax_end(acc, row_max, row_sum, softmax_scale)
    # Rows are counted from the tile's first query here: nothing computed above stays in registers.
    first_row = tl.cast(first_query, tl.int64)
    rows = tl.arange(0, SIZES.BLOCK_M)
    num_rows = Tq - first_query
    o_pointers = o_ptr + first_row * o_strides[1] + (rows[:, None] * o_strides[1] + cols_v[None, :])
    store_rows(o_pointers, o, rows, num_rows, cols_v, SIZES.DV)
    tl.store(lse_ptr + first_row + rows, lse, mask=rows < num_rows)


FWD_KERNELS = {TRITON: _window_attn_fwd_kernel}


def window_attn_fwd(
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    window_size: int,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None = None,  # [N + 1], int32, contiguous, with B = 1; likewise:
    cu_seqlens_k: Tensor | None = None,
    *,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` in the dtype of `q`, and the lse `[B, Hq, Tq]` in float32.

    `window_size` counts the query itself, is at least 1 and at most Tk (or 1). A query before the first
    key has the output 0 and the lse -inf. Inputs are read in place unless their last stride is not 1.
    `config` overrides the table.
    """
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    o = q.new_empty(B, Tq, Hq, Dv)
    lse = q.new_empty(B, Hq, Tq, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    if Tq <= FEW_QUERIES and cu_seqlens_q is None and config is None:
        return window_attn_with_kvcache(q, k, v, None, window_size, softmax_scale)
    q, sign, softmax_scale = positive_scale(q, softmax_scale)
    q, k, v = readable_in_place(q, k, v)
    config = config or kernel_config("window_attn_fwd", D, Dv, q.dtype, capability_of(q.device))
    packing = packing_arguments(cu_seqlens_q, cu_seqlens_k, q.device)
    slots = num_tile_slots(Tq, packing[-1], config.block_m)
    with on_device(q):
        launch(
            FWD_KERNELS, config, (slots * B * Hq,),
            q, k, v, o, lse, *packing, softmax_scale, window_size, Tq, Tk, Hq, Hkv,
            *outer_strides(q, k, v, o),
            SIZES=Sizes.of(D, Dv, config),
        )  # fmt: skip
    return o, lse
