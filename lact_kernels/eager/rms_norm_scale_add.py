"""`rms_norm_scale_add` in plain PyTorch, forward and backward by hand, on any device.

Names follow `lact_kernels/triton/layer/rms_norm_scale_add.py`, where the formulas are.
"""

import torch
from torch import Tensor

from lact_kernels.eager.token_blocks import compute_dtype, token_blocks


def rms_norm_scale_add_fwd(
    attn: Tensor,  # [B, T, Hq, D]
    ttt: Tensor,  # [B, T, Hf, Df]
    norm_weight: Tensor,  # [Df]
    scale: Tensor | None,  # [B, T, Hf]
    eps: float,
) -> Tensor:
    """The attention's output plus the normed and scaled one of the fast weights, `[B, T, C]`."""
    dtype = compute_dtype(ttt)
    weight = norm_weight.to(dtype)
    out = ttt.new_empty(ttt.shape)
    attn = attn.flatten(2).unflatten(-1, ttt.shape[2:])
    for tokens in token_blocks(out.flatten(2)):
        x = ttt[:, tokens].to(dtype)
        factor = _inverse_rms(x, eps)
        if scale is not None:
            factor *= scale[:, tokens, :, None]
        out[:, tokens] = (x * factor).mul_(weight).add_(attn[:, tokens])
    return out.flatten(2)


def rms_norm_scale_add_bwd(
    dout: Tensor,  # [B, T, C]
    ttt: Tensor,
    norm_weight: Tensor,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of ttt, norm_weight and (with scale) scale. That of attn is dout."""
    dtype = compute_dtype(ttt)
    weight = norm_weight.to(dtype)
    dttt, dweight = ttt.new_empty(ttt.shape), torch.zeros_like(weight)
    dscale = [] if scale is None else [scale.new_empty(scale.shape)]
    dout = dout.unflatten(-1, ttt.shape[2:])
    for tokens in token_blocks(dttt.flatten(2)):
        x, dy = ttt[:, tokens].to(dtype), dout[:, tokens].to(dtype)
        factor = _inverse_rms(x, eps)
        x = x * factor  # normed
        dx = dy * weight
        along = (dx * x).sum(dim=-1, keepdim=True)
        products = x * dy
        if scale is not None:
            dscale[0][:, tokens] = along[..., 0]
            s = scale[:, tokens, :, None].to(dtype)
            products *= s
            factor *= s
        dweight += products.sum(dim=(0, 1, 2))
        dx.addcmul_(x, along.div_(x.shape[-1]), value=-1)
        dttt[:, tokens] = dx.mul_(factor)
    return dttt, dweight.to(norm_weight.dtype), dscale


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`[..., 1]`, of rows `[..., D]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
