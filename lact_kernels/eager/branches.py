"""`branch_qkv` and `branch_sum` in plain PyTorch, forward and backward by hand, on any device.

All is computed in float32 (float64 for float64 inputs), in blocks of tokens so small that what lies
between reading and writing stays in a CPU's cache: beside the results little memory is needed.
Names follow `lact_kernels/triton/layer/branch_qkv.py` and `branch_sum.py`, where the formulas are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5
CPU_BLOCK, DEVICE_BLOCK = 1 << 17, 1 << 24  # elements of one tensor

silu_backward = torch.ops.aten.silu_backward  # (grad, x) -> grad * silu'(x)


def branch_qkv_fwd(
    q: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    v: Tensor | None,  # [B, T, C], or None where the fast weights take it as it is
    qk_scale: Tensor,  # [C, 2]
    qk_offset: Tensor,  # [C, 2]
    cos: Tensor,  # [1 or B, T, D / 2]
    sin: Tensor,  # [1 or B, T, D / 2]
    num_attn_heads: int,
    num_lact_heads: int,
    silu: bool,
    rotate_fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The attention's q and k `[B, T, Hq, D]`, those of the fast weights `[B, T, Hf, Df]`, and v."""
    dtype = _compute_dtype(q)
    scales, offsets = _columns(qk_scale, dtype), _columns(qk_offset, dtype)
    attn = [_empty_heads(x, num_attn_heads) for x in (q, k)]
    fast = [_empty_heads(x, num_lact_heads) for x in (q, k)]
    fast_v = [] if v is None else [_empty_heads(v, num_lact_heads)]
    for tokens in _blocks(q):
        angles = cos[:, tokens, None], sin[:, tokens, None]
        for x, scale, offset, attn_x, fast_x in zip((q, k), scales, offsets, attn, fast):
            x, fast_x = x[:, tokens].to(dtype), fast_x[:, tokens]
            _rotate(x.unflatten(-1, (num_attn_heads, -1)), *angles, out=attn_x[:, tokens])
            a = torch.addcmul(offset, x, scale)
            if silu:
                a = F.silu(a, inplace=True)
            a = a.unflatten(-1, (num_lact_heads, -1))
            a /= torch.linalg.vector_norm(a, dim=-1, keepdim=True).add_(NORM_EPS)
            if rotate_fast:
                as_attn = (-1, (num_attn_heads, -1))
                a, fast_x = (y.flatten(2).unflatten(*as_attn) for y in (a, fast_x))
                _rotate(a, *angles, out=fast_x)
            else:
                fast_x.copy_(a)
        for out in fast_v:
            out[:, tokens].flatten(2).copy_(F.silu(v[:, tokens].to(dtype)))
    return *attn, *fast, fast_v


def branch_qkv_bwd(
    dattn_q: Tensor,  # [B, T, Hq, D]
    dattn_k: Tensor,  # [B, T, Hq, D]
    dfast_q: Tensor,  # [B, T, Hf, Df]
    dfast_k: Tensor,  # [B, T, Hf, Df]
    dfast_v: list[Tensor],  # [B, T, Hf, Df], with v
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    qk_scale: Tensor,
    qk_offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_attn_heads: int,
    num_lact_heads: int,
    silu: bool,
    rotate_fast: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of q, k, v (with v), qk_scale and qk_offset."""
    dtype = _compute_dtype(q)
    scales, offsets = _columns(qk_scale, dtype), _columns(qk_offset, dtype)
    dscale, doffset = (x.new_zeros(x.shape, dtype=dtype) for x in (qk_scale, qk_offset))
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv = [] if v is None else [v.new_empty(v.shape)]
    dattn, dfast = (dattn_q, dattn_k), (dfast_q, dfast_k)
    parts = list(enumerate(zip((q, k), (dq, dk), dattn, dfast, scales, offsets)))
    as_attn, as_fast = (-1, (num_attn_heads, -1)), (-1, (num_lact_heads, -1))
    for tokens in _blocks(q):
        cos_t, minus_sin_t = cos[:, tokens, None], sin[:, tokens, None].neg()
        for column, (x, dx, dattn, dfast, scale, offset) in parts:
            x = x[:, tokens].to(dtype)
            z = torch.addcmul(offset, x, scale)
            a = (F.silu(z) if silu else z).unflatten(*as_fast)
            du = dfast[:, tokens].to(dtype)
            if rotate_fast:
                du = _rotate(du.flatten(2).unflatten(*as_attn), cos_t, minus_sin_t)
                du = du.flatten(2).unflatten(*as_fast)
            norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
            length = norm + NORM_EPS
            shrink = (du * a).sum(dim=-1, keepdim=True).div_(norm * length.square())
            da = (du / length).addcmul_(a, shrink.masked_fill_(norm == 0, 0), value=-1).flatten(2)
            dz = silu_backward(da, z) if silu else da
            doffset[:, column] += dz.sum(dim=(0, 1))
            dscale[:, column] += x.mul(dz).sum(dim=(0, 1))
            dattn = dattn[:, tokens].to(dtype)
            total = _rotate(dattn, cos_t, minus_sin_t).flatten(2)
            dx[:, tokens] = total.addcmul_(dz, scale)
        for dx in dv:
            x, dy = v[:, tokens].to(dtype), dfast_v[0][:, tokens].to(dtype).flatten(2)
            dx[:, tokens] = silu_backward(dy, x)
    return dq, dk, dv, dscale.to(qk_scale.dtype), doffset.to(qk_offset.dtype)


def branch_sum_fwd(
    attn: Tensor,  # [B, T, Hq, D]
    ttt: Tensor,  # [B, T, Hf, Df]
    norm_weight: Tensor,  # [Df]
    scale: Tensor | None,  # [B, T, Hf]
    eps: float,
) -> Tensor:
    """The attention's output plus the normed and scaled one of the fast weights, `[B, T, C]`."""
    dtype = _compute_dtype(ttt)
    weight = norm_weight.to(dtype)
    out = ttt.new_empty(ttt.shape)
    attn = attn.flatten(2).unflatten(-1, ttt.shape[2:])
    for tokens in _blocks(out.flatten(2)):
        x = ttt[:, tokens].to(dtype)
        factor = _inverse_rms(x, eps)
        if scale is not None:
            factor *= scale[:, tokens, :, None]
        out[:, tokens] = (x * factor).mul_(weight).add_(attn[:, tokens])
    return out.flatten(2)


def branch_sum_bwd(
    dout: Tensor,  # [B, T, C]
    ttt: Tensor,
    norm_weight: Tensor,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of ttt, norm_weight and (with scale) scale. That of attn is dout."""
    dtype = _compute_dtype(ttt)
    weight = norm_weight.to(dtype)
    dttt, dweight = ttt.new_empty(ttt.shape), torch.zeros_like(weight)
    dscale = [] if scale is None else [scale.new_empty(scale.shape)]
    dout = dout.unflatten(-1, ttt.shape[2:])
    for tokens in _blocks(dttt.flatten(2)):
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate `[B, T, H, D]` by the angles `[1 or B, T, 1, D / 2]`, into `out` of any dtype if given."""
    y = out if out is not None and out.dtype == x.dtype else torch.empty_like(x)
    x1, x2 = x.chunk(2, dim=-1)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return y if out is None or out is y else out.copy_(y)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`[..., 1]`, of rows `[..., D]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two columns of `[C, 2]`, one after the other."""
    return tuple(x.to(dtype).T.contiguous())


def _empty_heads(x: Tensor, heads: int) -> Tensor:
    """For the heads of `[B, T, C]`: `[B, T, heads, C / heads]`."""
    return x.new_empty(*x.shape[:2], heads, x.shape[2] // heads)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the tokens of `[B, T, C]`."""
    B, T, C = x.shape
    block = max(1, (CPU_BLOCK if x.is_cpu else DEVICE_BLOCK) // max(1, B * C))
    for start in range(0, T, block):
        yield slice(start, start + block)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
