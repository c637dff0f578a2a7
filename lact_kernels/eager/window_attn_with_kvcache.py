"""Attention of a few queries over a cache: the slots they see are a slice of it, or two where a ring ends.

The lengths are read on the host to know which. Rows of one length run together.
"""

import math

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
    (B, Tq, Hq, _), (S, Hkv, Dv) = q.shape, v_cache.shape[1:]
    o = q.new_zeros(B, Tq, Hq, Dv)
    lse = q.new_full((B, Hq, Tq), -math.inf, dtype=masked_attention.lse_dtype(q.dtype))
    lengths = [S] * B if cache_seqlens is None else cache_seqlens.tolist()
    together = len(set(lengths)) == 1
    rows = [slice(None)] if together else [slice(b, b + 1) for b in range(B)]
    for row, length in zip(rows, lengths):
        if S < min(length, window_size + Tq - 1):
            o[row], lse[row] = math.nan, math.nan
            continue
        n = min(Tq, length)  # queries that are tokens of the row, the last ones
        if n == 0:
            continue
        span = min(window_size + n - 1, length)
        # The queries of a group are rows of one product.
        queries = q[row, Tq - n :].unflatten(2, (Hkv, Hq // Hkv)).permute(0, 2, 3, 1, 4)
        in_order = n > 1 or span < S  # a single query that sees every slot needs no order
        keys, values = (
            (_last_tokens(x[row], length, span) if in_order else x[row]).transpose(1, 2)
            for x in (k_cache, v_cache)
        )
        mask = masked_attention.band(n, min(window_size, length), q)[:, -span:]
        mask = mask.repeat(Hq // Hkv, 1)  # [G * n, span]
        out, out_lse = masked_attention.forward(
            *_equally_wide(queries.flatten(2, 3), keys, values), mask, softmax_scale
        )
        out = out[..., :Dv].unflatten(2, (Hq // Hkv, n)).permute(0, 3, 1, 2, 4)
        o[row, Tq - n :] = out.flatten(2, 3)
        lse[row, :, Tq - n :] = out_lse.unflatten(2, (Hq // Hkv, n)).flatten(1, 2)
    return o, lse


def _last_tokens(cache: Tensor, length: int, span: int) -> Tensor:
    """The last `span` of `length` tokens, `[B, span, Hkv, D]`: a view, unless the ring ends among them."""
    S = cache.shape[1]
    first, last = (length - span) % S, (length - 1) % S + 1
    if first < last:
        return cache[:, first:last]
    return torch.cat([cache[:, first:], cache[:, :last]], dim=1)


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    channels = max(x.shape[-1] for x in tensors)
    return [masked_attention.pad_channels(x, channels) for x in tensors]
