"""Causal sliding-window attention with a dense mask."""

import math

import torch
from torch import Tensor


def window_attn(
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    window_size: int | None = None,
    *,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query i sees keys `i - window_size < j <= i`, aligned at the ends.

    A query before the first key of its sequence sees nothing: its output is 0, its lse -inf. The
    sequences of queries and of keys have the same borders unless `cu_seqlens_k` is given.

    Everything is computed in the dtype of `q`. Returns `[B, Tq, Hq, Dv]`, and with `return_lse` also
    the log of the softmax denominators, `[B, Hq, Tq]`.
    """
    Tq, Tk = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window_size = Tk if window_size is None else window_size
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)

    key = torch.arange(Tk, device=q.device)
    query = torch.arange(Tq, device=q.device)[:, None]
    position, first_key = query + (Tk - Tq), 0
    if cu_seqlens is not None:
        of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        sequence = torch.bucketize(query, cu_seqlens[1:].to(query.dtype), right=True)
        position = query + (of_keys - cu_seqlens)[sequence + 1]
        first_key = of_keys[sequence]
    visible = (key <= position) & (key > position - window_size) & (key >= first_key)  # [Tq, Tk]
    blind = ~visible.any(dim=-1, keepdim=True)  # [Tq, 1]

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~(visible | blind), -math.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1) * visible, v)
    lse = scores.masked_fill(blind, -math.inf).logsumexp(dim=-1)
    return (o, lse) if return_lse else o
