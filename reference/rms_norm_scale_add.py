"""What a LaCT layer does with the outputs of its two operations, one formula after the other."""

import torch
from torch import Tensor


def rms_norm_scale_add(
    attn: Tensor,  # [B, T, Hq, D]
    ttt: Tensor,  # [B, T, Hf, Df]
    norm_weight: Tensor,  # [Df]
    scale: Tensor | None,  # [B, T, Hf]
    *,
    eps: float,
) -> Tensor:
    """The attention's output plus the normed and scaled one of the fast weights, `[B, T, C]`."""
    normed = ttt / torch.sqrt(ttt.square().mean(dim=-1, keepdim=True) + eps)
    normed = normed * norm_weight.to(ttt.dtype)
    if scale is not None:
        normed = normed * scale[..., None]
    return attn.flatten(2) + normed.flatten(2)
