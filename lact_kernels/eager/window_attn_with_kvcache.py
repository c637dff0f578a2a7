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
    (B, Tq, Hq), (S, Hkv) = q.shape[:3], k_cache.shape[1:3]
    if cache_seqlens is None:
        cache_seqlens = torch.full((B,), S, dtype=torch.int32, device=q.device)
    lengths = cache_seqlens[:, None]  # [B, 1]
    span = min(window_size + Tq - 1, S)
    keys = lengths - span + torch.arange(span, device=q.device)  # [B, span]: their positions
    queries = lengths - Tq + torch.arange(Tq, device=q.device)  # [B, Tq]
    distance = queries[:, :, None] - keys[:, None]  # [B, Tq, span]
    visible = (distance >= 0) & (distance < window_size) & (keys >= 0)[:, None]
    mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, -torch.inf)
    rows, slots = torch.arange(B, device=q.device)[:, None], keys.remainder(max(S, 1))
    written = (keys >= 0)[..., None, None]  # elsewhere the memory may hold anything, NaN included
    k, v = (torch.where(written, x[rows, slots], 0).transpose(1, 2) for x in (k_cache, v_cache))

    # k and v are [B, Hkv, span, D]. The queries of a group are rows of one product.
    q = q.unflatten(2, (Hkv, Hq // Hkv)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Tq, D]
    mask = mask[:, None, None].expand(B, 1, Hq // Hkv, Tq, span).flatten(2, 3)
    o, lse = masked_attention.forward_written_out(q.flatten(2, 3), k, v, mask, softmax_scale)
    o = o.unflatten(2, (Hq // Hkv, Tq)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.unflatten(2, (Hq // Hkv, Tq)).flatten(1, 2)
    if S < window_size + Tq - 1:
        lost = lengths[:, :, None] > S  # [B, 1, 1]
        o, lse = o.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    return o.contiguous(), lse.contiguous()
