"""Attention of a few queries over a cache: the slots they see are a slice of it, or two where a ring ends.

`cache_seqlens` is read on the host to know which. Rows that see the same slots run together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lact_kernels.core.attention import AttentionOptions
from lact_kernels.eager import masked_attention


def window_attn_with_kvcache(
    q: Tensor,  # [B, Tq, Hq, D]
    k_cache: Tensor,  # [B, S, Hkv, D]
    v_cache: Tensor,  # [B, S, Hkv, Dv]
    cache_seqlens: Tensor | None,  # [B]; S each by default
    options: AttentionOptions,
    sinks: Tensor | None,  # [B, Hq], in the dtype of lse
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Tq, Hq, Dv]` and lse `[B, Hq, Tq]`; NaN for a row whose keys the cache has lost.

    The window has both limits.
    """
    S = k_cache.shape[1]
    seqlens = [S] if cache_seqlens is None else cache_seqlens.tolist()
    if q.shape[1] == 1 and S == options.left + 1:
        seqlens = [min(x, S) for x in seqlens]  # every slot of a full ring, in any order
    if len(set(seqlens)) <= 1:
        o, lse = _rows(q, k_cache, v_cache, seqlens[0] if seqlens else 0, options)
    else:
        rows = zip(q.split(1), k_cache.split(1), v_cache.split(1), seqlens)
        o, lse = (torch.cat(x) for x in zip(*[_rows(*row, options) for row in rows]))
    return (o, lse) if sinks is None else masked_attention.add_sinks(o, lse, sinks)


def _rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlen: int, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Outputs and lse of rows that have had so many tokens."""
    (B, Tq, Hq, D), (S, Hkv, Dv) = q.shape, v_cache.shape[1:]
    left, right = min(options.left, seqlen), options.right
    n = min(Tq, seqlen + right) if seqlen else 0  # queries that see a key, the last ones
    lost = S < min(seqlen, options.left + Tq)
    if lost or n == 0:
        o = q.new_full((B, Tq, Hq, Dv), math.nan if lost else 0.0)
        lse_dtype = masked_attention.lse_dtype(q.dtype)
        return o, q.new_full((B, Hq, Tq), math.nan if lost else -math.inf, dtype=lse_dtype)
    groups = Hq // Hkv
    span = min(left + n, seqlen)
    slots = _slots(seqlen, span, S)
    parts = [(k_cache[:, s].transpose(1, 2), v_cache[:, s].transpose(1, 2)) for s in slots]
    # The queries of a group are rows of one product.
    if n == 1:  # query, which sees all of them
        last = q if Tq == 1 else q[:, -1:]
        o, lse = _forward(last.reshape(B, Hkv, groups, D), parts, None, options)
        o, lse = o.reshape(B, 1, Hq, Dv), lse.reshape(B, Hq, 1)
    else:
        queries = q[:, Tq - n :].reshape(B, n, Hkv, groups, D).permute(0, 2, 3, 1, 4)
        # The last query stands at the last key, which is `right` columns before the end of its band.
        mask = masked_attention.band(n, left + 1 + right, q)[:, n + left + 1 - span : n + left + 1]
        o, lse = _forward(queries.flatten(2, 3), parts, mask.repeat(groups, 1), options)
        o = o.view(B, Hkv, groups, n, Dv).permute(0, 3, 1, 2, 4).reshape(B, n, Hq, Dv)
        lse = lse.reshape(B, Hq, n)
    if n < Tq:
        o, lse = F.pad(o, (0, 0, 0, 0, Tq - n, 0)), F.pad(lse, (Tq - n, 0), value=-math.inf)
    return o.contiguous(), lse.contiguous()


def _slots(seqlen: int, span: int, S: int) -> list[slice]:
    """Where the last `span` of `seqlen` tokens are, in their order."""
    first, last = (seqlen - span) % S, (seqlen - 1) % S + 1
    return [slice(first, last)] if first < last else [slice(first, S), slice(0, last)]


def _forward(
    q: Tensor, parts: list[tuple[Tensor, Tensor]], mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attention over one or two parts of keys and values, without copies of them where it can be."""
    scores = options.softmax_scale, options.softcap
    if mask is None and len(parts) == 2:
        (o, lse), (other, other_lse) = (
            masked_attention.forward(q, *x, None, *scores) for x in parts
        )
        # An error of an lse moves the share by a quarter of it at most.
        limit = 4 * masked_attention.PRECISE_LSE[q.dtype]
        if all((x.abs() <= limit).all() for x in (lse, other_lse)):
            share = torch.sigmoid(other_lse - lse)[..., None]
            o = torch.lerp(o.to(lse.dtype), other.to(lse.dtype), share)
            return o.to(q.dtype), torch.logaddexp(lse, other_lse)
    keys, values = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in zip(*parts))
    return masked_attention.forward(q, keys, values, mask, *scores)
