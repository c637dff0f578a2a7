"""`window_attn_with_kvcache`: few queries, many keys, which programs share when rows and heads are few.

The queries of a group of heads read the same keys, so they are rows of one tile: row r is query
`r // groups` of the group's head `r % groups`. A program walks its part of the keys that its tile
sees, a range of positions, and finds position p in slot `p % S`. Every tile of keys is masked: these
kernels wait for memory. With several parts each writes a normalised output and its lse, in float32,
and a second kernel weighs them:

```
    lse = ln sum_s exp(lse_s)      O = sum_s exp(lse_s - lse) O_s
```

A sink is one more logit of the first part. Lengths, slots, the window and the number of parts are runtime
values.
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
from lact_kernels.triton.launch import (
    launch,
    num_multiprocessors,
    on_device,
    outer_strides,
    positive_scale,
    readable_in_place,
)
from lact_kernels.triton.primitives import (
    LOG2_E,
    Sizes,
    block_dim,
    head_offset,
    load_rows,
    visible,
)
from lact_kernels.triton.softmax import LOWEST, softcapped, softmax_end, softmax_step

NARROW_ROWS = 16  # up to here a tile of the least rows that a matrix instruction takes
MAX_SPLITS = 64
PROGRAMS_PER_MULTIPROCESSOR = 2
COMBINE_WARPS = 4


@triton.jit(
    do_not_specialize=[
        "window_size",
        "right",
        "Tq",
        "num_slots",
        "num_splits",
        "Hq",
        "Hkv",
        "stride_split",
    ]
)
def _window_attn_with_kvcache_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,  # [num_splits, B, Tq, Hq, Dv], contiguous
    lse_ptr,  # [num_splits, B, Hq, Tq], contiguous
    seqlens_ptr,  # [B], or None: num_slots each
    sinks_ptr,  # [B, Hq], the heads side by side, or None
    softmax_scale,  # of the exponents, > 0
    bend,  # of the scores, or None
    window_size,  # of the query and what comes before it
    right,  # how many keys after the query it sees, or None: none
    Tq,
    num_slots,
    num_splits,
    Hq,
    Hkv,
    q_strides,  # of batch row, token and head, like the next two
    k_strides,
    v_strides,
    sinks_strides,  # of batch row
    stride_split,  # rows of the output of one part: B * Hq * Tq
    SIZES: tl.constexpr,
):
    # Neighbours read the same keys.
    groups = Hq // Hkv
    num_tiles = tl.cdiv(Tq * groups, SIZES.BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    split = pid // num_tiles % num_splits
    batch_head = pid // (num_tiles * num_splits)
    h_kv, b = batch_head % Hkv, tl.cast(batch_head // Hkv, tl.int64)
    k_ptr += head_offset(k_strides, b, tl.cast(h_kv, tl.int64))
    v_ptr += head_offset(v_strides, b, tl.cast(h_kv, tl.int64))
    length = num_slots
    if seqlens_ptr is not None:
        length = tl.load(seqlens_ptr + b)

    rows = tile * SIZES.BLOCK_M + tl.arange(0, SIZES.BLOCK_M)
    num_rows = Tq * groups
    queries = rows // groups
    heads = h_kv * groups + rows % groups
    positions = length - Tq + queries
    cols_qk = tl.arange(0, SIZES.BLOCK_D)
    cols_v = tl.arange(0, SIZES.BLOCK_DV)
    q_rows = b * q_strides[0] + queries.to(tl.int64) * q_strides[1]
    q_rows += heads.to(tl.int64) * q_strides[2]
    q_pointers = q_ptr + q_rows[:, None] + cols_qk[None, :]
    q = load_rows(q_pointers, rows, num_rows, cols_qk, SIZES.D, SIZES.BLOCK_D, True)

    # The positions that the tile sees and that have a slot, and this program's part of them.
    last_query = tl.minimum((tile * SIZES.BLOCK_M + SIZES.BLOCK_M - 1) // groups, Tq - 1)
    first_seen = length - Tq + tile * SIZES.BLOCK_M // groups - window_size + 1
    first_seen = tl.maximum(tl.maximum(first_seen, length - num_slots), 0)
    end = length - Tq + last_query + 1
    if right is not None:
        end = length - tl.maximum(Tq - 1 - last_query - right, 0)
    num_seen = tl.maximum(end - first_seen, 0)
    part = tl.cdiv(tl.cdiv(num_seen, SIZES.BLOCK_N), num_splits) * SIZES.BLOCK_N
    first_key = first_seen + split * part
    num_keys = tl.minimum(part, num_seen - split * part)
    first_slot = first_key % tl.maximum(num_slots, 1)

    FULL_PRECISION: tl.constexpr = q.dtype == tl.float32
    scale_log2 = softmax_scale * LOG2_E
    acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_DV], 0.0, tl.float32)
    row_max = tl.full([SIZES.BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
    for start in range(0, num_keys, SIZES.BLOCK_N):
        steps = start + tl.arange(0, SIZES.BLOCK_N)
        keys = first_key + steps
        slots = first_slot + steps
        slots = tl.where(slots >= num_slots, slots - num_slots, slots).to(tl.int64)[:, None]
        k_pointers = k_ptr + slots * k_strides[1] + cols_qk[None, :]
        v_pointers = v_ptr + slots * v_strides[1] + cols_v[None, :]
        k = load_rows(k_pointers, steps, num_keys, cols_qk, SIZES.D, SIZES.BLOCK_D, True)
        v = load_rows(v_pointers, steps, num_keys, cols_v, SIZES.DV, SIZES.BLOCK_DV, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores = softcapped(scores, bend, FULL_PRECISION)
        if right is None:
            seen = visible(positions[:, None], keys[None, :], window_size)
        else:  # no sum of a position and `right`, which 32 bits need not hold
            distance = keys[None, :] - positions[:, None]
            seen = (distance <= right) & (distance > -window_size)
        scores = tl.where(seen & (steps < num_keys)[None, :], scores, float("-inf"))
        probs, decay, row_max, row_sum = softmax_step(
            scores, row_max, row_sum, scale_log2, FULL_PRECISION
        )
        acc = acc * decay[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]

    sinks = None
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + b * sinks_strides[0] + heads)  # [BLOCK_M]
        sinks = tl.where(split == 0, sinks, float("-inf"))
    o, lse = softmax_end(acc, row_max, row_sum, softmax_scale, sinks, FULL_PRECISION)
    # The window of a row that has outgrown the cache is not in it any more.
    if (length > num_slots) & (num_slots - Tq + 1 < window_size):
        o, lse = o + float("nan"), lse + float("nan")
    split_row = tl.cast(split, tl.int64) * stride_split
    lse_rows = split_row + (b * Hq + heads) * Tq + queries
    o_rows = split_row + (b * Tq + queries) * Hq + heads
    # Compared within the tile: nothing computed above stays in registers.
    inside = tl.arange(0, SIZES.BLOCK_M) < num_rows - tile * SIZES.BLOCK_M
    tl.store(lse_ptr + lse_rows, lse, mask=inside)
    o_pointers = o_ptr + o_rows[:, None] * SIZES.DV + cols_v[None, :]
    inside = inside[:, None] & (cols_v < SIZES.DV)[None, :]
    tl.store(o_pointers, o.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Tq", "num_splits", "Hq", "stride_split"])
def _window_attn_combine_kernel(
    parts_ptr,  # [num_splits, B, Tq, Hq, Dv], contiguous, like the other three
    part_lse_ptr,  # [num_splits, B, Hq, Tq]
    o_ptr,  # [B, Tq, Hq, Dv]
    lse_ptr,  # [B, Hq, Tq]
    Tq,
    num_splits,
    Hq,
    stride_split,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)  # of o: batch row, query, head
    query = row // Hq % Tq
    lse_row = (row // Hq // Tq * Hq + row % Hq) * Tq + query
    splits = tl.arange(0, BLOCK_SPLITS)
    exists = splits < num_splits
    offsets = splits.to(tl.int64) * stride_split  # [BLOCK_SPLITS]
    part_lse = tl.load(part_lse_ptr + offsets + lse_row, mask=exists, other=float("-inf"))
    largest = tl.max(part_lse, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # nothing seen: all weights are 0
    weights = tl.exp(part_lse - largest)
    total = tl.sum(weights, axis=0)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)

    cols = tl.arange(0, BLOCK_DV)
    pointers = parts_ptr + (offsets + row)[:, None] * HEAD_DIM_V + cols[None, :]
    inside = exists[:, None] & (cols < HEAD_DIM_V)[None, :]
    parts = tl.load(pointers, mask=inside, other=0.0)  # [BLOCK_SPLITS, BLOCK_DV]
    o = tl.sum(parts * weights[:, None], axis=0) / total
    o_pointers = o_ptr + row * HEAD_DIM_V + cols
    tl.store(o_pointers, o.to(o_ptr.dtype.element_ty), mask=cols < HEAD_DIM_V)
    tl.store(lse_ptr + lse_row, tl.where(blind, float("-inf"), largest + tl.log(total)))


KVCACHE_KERNELS = {TRITON: _window_attn_with_kvcache_kernel}


def window_attn_with_kvcache(
    q: Tensor,  # [B, Tq, Hq, D]
    k_cache: Tensor,  # [B, S, Hkv, D]
    v_cache: Tensor,  # [B, S, Hkv, Dv]
    cache_seqlens: Tensor | None,  # [B], int32; S each by default
    options: AttentionOptions,
    sinks: Tensor | None,  # [B, Hq], float32
    *,
    config: KernelConfig | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` in the dtype of `q`, and the lse `[B, Hq, Tq]` in float32.

    The window of `options` has both limits, at most 2^30 and Tq - 1. `config` overrides the table, and
    `num_splits` the number of parts into which the keys are cut.
    """
    B, Tq, Hq, D = q.shape
    S, Hkv, Dv = v_cache.shape[1:]
    o = q.new_empty(B, Tq, Hq, Dv)
    lse = q.new_empty(B, Hq, Tq, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    q, _, scale, bend = positive_scale(q, options)
    q, k, v = readable_in_place(q, k_cache, v_cache)
    if sinks is not None:
        (sinks,) = readable_in_place(sinks)
    rows = Tq * Hq // Hkv
    name = "window_attn_with_kvcache" + ("" if rows <= NARROW_ROWS else "_wide")
    config = config or kernel_config(name, D, Dv, q.dtype, capability_of(q.device))
    programs = B * Hkv * -(-rows // config.block_m)
    if num_splits is None:
        num_splits = choose_splits(min(options.left + Tq, S), programs, config, q.device)
    # Without parts to combine the kernel writes the result itself.
    parts, part_lse = o, lse
    if num_splits > 1:
        parts = lse.new_empty(num_splits, *o.shape)
        part_lse = lse.new_empty(num_splits, *lse.shape)
    with on_device(q):
        launch(
            KVCACHE_KERNELS, config, (programs * num_splits,),
            q, k, v, parts, part_lse, None if cache_seqlens is None else cache_seqlens.contiguous(),
            sinks, scale, bend, options.left + 1, options.right or None, Tq, S, num_splits, Hq, Hkv,
            *outer_strides(q, k, v, sinks), lse.numel(),
            SIZES=Sizes.of(D, Dv, config),
        )  # fmt: skip
        if num_splits > 1:
            _window_attn_combine_kernel[(lse.numel(),)](
                parts, part_lse, o, lse, Tq, num_splits, Hq, lse.numel(),
                **_combine_constexprs(Dv), num_warps=COMBINE_WARPS,
            )  # fmt: skip
    return o, lse


def choose_splits(num_keys: int, programs: int, config: KernelConfig, device: torch.device) -> int:
    """Parts of at most `num_keys` keys that a device with few programs is filled with."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // programs
    return max(1, min(wanted, -(-num_keys // config.block_n), MAX_SPLITS))


def _combine_constexprs(Dv: int) -> dict[str, int]:
    return {"HEAD_DIM_V": Dv, "BLOCK_DV": block_dim(Dv), "BLOCK_SPLITS": MAX_SPLITS}
