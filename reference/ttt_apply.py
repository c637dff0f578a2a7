"""A SwiGLU network of given weights, over tokens."""

import torch
from torch import Tensor


def ttt_apply(
    q: Tensor,  # [B, T, H, Dk]
    w0: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
    w1: Tensor,  # [H, Dv, Dh] or [B, H, Dv, Dh]
    w2: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
) -> Tensor:
    """`w1 (silu(w0 q) * (w2 q))` for every token and head, in the dtype of `q`: `[B, T, H, Dv]`."""
    w0, w1, w2 = (w.to(q.dtype).expand(q.shape[0], *w.shape[-3:]) for w in (w0, w1, w2))
    gate = torch.einsum("bhed,bthd->bthe", w0, q)
    up = torch.einsum("bhed,bthd->bthe", w2, q)
    return torch.einsum("bhve,bthe->bthv", w1, gate * gate.sigmoid() * up)
