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
    LOG2_E,
    LOWEST,
    attention_constexprs,
    key_tile_bounds,
    load_rows,
    nth_tile,
    num_tile_slots,
    packed_tile,
    query_tile_program,
    softmax_end,
    softmax_step,
    store_rows,
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
    scale_log2,
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = visible(positions[:, None], keys[None, :], window_size)
            scores = tl.where(seen, scores, float("-inf"))
        probs, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        acc = acc * decay[:, None]
        v = load_rows(v_pointers, keys, Tk, cols_v, HEAD_DIM_V, BLOCK_DV, MASKED)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_sequences", "window_size", "Tq", "Tk", "Hq", "Hkv"])
def _window_attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,  # [B, Hq, Tq], contiguous
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
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, h, h_kv, tile = query_tile_program(Tq, num_sequences, Hq, Hkv, BLOCK_M)
    b, h, h_kv = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(h_kv, tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += (b * Hq + h) * Tq
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
        lse_ptr += q_start

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
    q = load_rows(q_pointers, queries, Tq, cols_qk, HEAD_DIM_QK, BLOCK_D, True)

    scale_log2 = softmax_scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first, interior, diagonal, end = key_tile_bounds(
        first_query, Tq, Tk, window_size, BLOCK_M, BLOCK_N
    )
    inside = diagonal - interior
    acc, row_max, row_sum = _fwd_segment(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_offsets, v_offsets, positions,
        first, end - first - inside, interior, inside,
        stride_kt, stride_vt, Tk, window_size, scale_log2,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASKED=True,
    )  # fmt: skip
    acc, row_max, row_sum = _fwd_segment(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_offsets, v_offsets, positions,
        interior, inside, interior, 0,
        stride_kt, stride_vt, Tk, window_size, scale_log2,
        HEAD_DIM_QK, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASKED=False,
    )  # fmt: skip

    o, lse = softmax_end(acc, row_max, row_sum, softmax_scale)
    # Rows are counted from the tile's first query here: nothing computed above stays in registers.
    first_row = tl.cast(first_query, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    num_rows = Tq - first_query
    o_pointers = o_ptr + first_row * stride_ot + (rows[:, None] * stride_ot + cols_v[None, :])
    store_rows(o_pointers, o, rows, num_rows, cols_v, HEAD_DIM_V)
    tl.store(lse_ptr + first_row + rows, lse, mask=rows < num_rows)


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
        _window_attn_fwd_kernel[(slots * B * Hq,)](
            q, k, v, o, lse, *packing, softmax_scale, window_size, Tq, Tk, Hq, Hkv,
            *outer_strides(q, k, v, o),
            **attention_constexprs(D, Dv, config), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return o, lse


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every shipped specialisation, for benchmarks/compile_report."""
    for dtype, head_dim, config, more in shipped_cases("window_attn_fwd", arch):
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), dtype)
        case = CompileCase(
            name="window_attn_fwd",
            kernel=_window_attn_fwd_kernel,
            arch=arch,
            dtype=dtype,
            shape=f"D{head_dim}",
            config=config,
            pointers={**pointers, "lse_ptr": torch.float32},
            constexprs=attention_constexprs(head_dim, head_dim, config),
            **more,
        )
        yield from packing_cases(case)
