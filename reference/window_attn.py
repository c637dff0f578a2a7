"""Sliding-window attention with a dense mask."""

import math

import torch
from torch import Tensor


def window_attn(
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    window_size: int | tuple[int, int] | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query i sees keys `i - left <= j <= i + right`, aligned at the ends.

    A window of W tokens is `(W - 1, 0)`, None is `(-1, 0)`, and -1 is no limit. A query that sees no key has
    the output 0. `softcap` bends the scores, and each of `sinks` is a logit of its own in every row of a
    head. The sequences of queries and of keys have the same borders unless `cu_seqlens_k` is given.

    Everything is computed in the dtype of `q`. Returns `[B, Tq, Hq, Dv]`, and with `return_lse` also
    the log of the softmax denominators, `[B, Hq, Tq]`, -inf where nothing is in one.
    """
    Tq, Tk = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    if window_size is None:
        window_size = (-1, 0)
    elif not isinstance(window_size, (tuple, list)):
        window_size = (window_size - 1, 0)
    left, right = (math.inf if side == -1 else side for side in window_size)

    key = torch.arange(Tk, device=q.device)
    query = torch.arange(Tq, device=q.device)[:, None]
    position, first_key, end = query + (Tk - Tq), 0, Tk
    if cu_seqlens is not None:
        of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        sequence = torch.bucketize(query, cu_seqlens[1:].to(query.dtype), right=True)
        position = query + (of_keys - cu_seqlens)[sequence + 1]
        first_key, end = of_keys[sequence], of_keys[sequence + 1]
    visible = (key >= position - left) & (key <= position + right)  # [Tq, Tk]
    visible = visible & (key >= first_key) & (key < end)

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[:, None, None].expand(len(q), -1, Tq, 1)
        scores = torch.cat([scores, column], dim=-1)
    blind = (scores == -math.inf).all(dim=-1, keepdim=True)  # their softmax would be NaN
    probs = scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    o = torch.einsum("bhij,bjhd->bihd", probs[..., :Tk], v)
    lse = scores.logsumexp(dim=-1)
    return (o, lse) if return_lse else o
