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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query i sees keys `i - window_size < j <= i`.

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
    query = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq)
    visible = (key <= query) & (key > query - window_size)  # [Tq, Tk]
    if cu_seqlens is not None:
        sequence = torch.bucketize(key, cu_seqlens[1:].to(key.dtype), right=True)
        visible &= sequence[query] == sequence

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~visible, -math.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
    return (o, scores.logsumexp(dim=-1)) if return_lse else o
