"""Attention of a few queries over a cache: the slots they see are gathered, and nothing else is read."""

import torch
from torch import Tensor

from lact_kernels.eager import masked_attention


def window_attn_with_kvcache(
    q: Tensor,  # [B, Tq, Hq, D]
    k_cache: Tensor,  # [B, S, Hkv, D]
    v_cache: Tensor,  # [B, S, Hkv, Dv]
    cache_seqlens: Tensor | None,  # [B]; S each by default
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Tq, Hq, Dv]` and lse `[B, Hq, Tq]`; NaN for a row whose keys the cache has lost."""
    (B, Tq, Hq, D), (S, Hkv, Dv) = q.shape, v_cache.shape[1:]
    span = min(window_size + Tq - 1, S)
    if q.numel() == 0 or span == 0:
        lse = q.new_full((B, Hq, Tq), -torch.inf, dtype=masked_attention.lse_dtype(q.dtype))
        return q.new_zeros(B, Tq, Hq, Dv), lse
    if cache_seqlens is None:
        cache_seqlens = torch.full((B,), S, dtype=torch.int32, device=q.device)
    lengths = cache_seqlens[:, None]  # [B, 1]
    keys = lengths - span + torch.arange(span, device=q.device)  # [B, span]: their positions
    queries = lengths - Tq + torch.arange(Tq, device=q.device)  # [B, Tq]
    distance = queries[:, :, None] - keys[:, None]  # [B, Tq, span]
    visible = (distance >= 0) & (distance < window_size) & (keys >= 0)[:, None]
    mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)

    # Memory that was never written may hold anything, NaN included: the first token stands in for it.
    slots = keys.clamp(min=0).remainder(S)
    k, v = (_gather(x, slots, max(D, Dv)) for x in (k_cache, v_cache))
    # The queries of a group are rows of one product.
    q = masked_attention.pad_channels(q, max(D, Dv))
    q = q.unflatten(2, (Hkv, Hq // Hkv)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Tq, D]
    mask = mask[:, None, None].expand(B, 1, Hq // Hkv, Tq, span).flatten(2, 3)
    o, lse = masked_attention.forward(q.flatten(2, 3), k, v, mask, softmax_scale)
    o = o[..., :Dv].unflatten(2, (Hq // Hkv, Tq)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.unflatten(2, (Hq // Hkv, Tq)).flatten(1, 2)

    blind = ~visible.any(dim=-1)  # [B, Tq]
    o = o.masked_fill(blind[..., None, None], 0.0)
    lse = lse.masked_fill(blind[:, None], -torch.inf)
    if S < window_size + Tq - 1:
        lost = lengths[:, :, None] > S  # [B, 1, 1]
        o, lse = o.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    return o.contiguous(), lse.contiguous()


def _gather(cache: Tensor, slots: Tensor, channels: int) -> Tensor:
    """Slots `[B, span]` of `[B, S, Hkv, D]`, as `[B, Hkv, span, channels]`."""
    # Row by row: indexing both axes at once is fifty times slower on a CPU.
    rows = [x.index_select(0, row_slots) for x, row_slots in zip(cache, slots)]
    return masked_attention.pad_channels(torch.stack(rows).transpose(1, 2), channels)
