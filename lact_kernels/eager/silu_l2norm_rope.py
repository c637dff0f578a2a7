"""`silu_l2norm_rope` in plain PyTorch, forward and backward by hand, on any device.

Names follow `lact_kernels/triton/layer/silu_l2norm_rope.py`, where the formulas are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lact_kernels.core.silu_l2norm_rope import Gradients, Inputs, Options, Outputs, thirds
from lact_kernels.eager.token_blocks import compute_dtype, token_blocks

NORM_EPS = 1e-5

silu_backward = torch.ops.aten.silu_backward  # (grad, x) -> grad * silu'(x)


def silu_l2norm_rope_fwd(inputs: Inputs, options: Options) -> Outputs:
    """The inputs of both branches."""
    qkv, qk_scale, qk_offset, cos, sin = inputs
    num_attn_heads, num_lact_heads, silu, silu_v, rotate_fast, with_attn_v = options
    q, k, v = thirds(qkv)
    dtype = compute_dtype(q)
    scales, offsets = _columns(qk_scale, dtype), _columns(qk_offset, dtype)
    attn = [_empty_heads(x, num_attn_heads) for x in (q, k)]
    fast = [_empty_heads(x, num_lact_heads) for x in (q, k)]
    attn_v = [_empty_heads(v, num_attn_heads)] if with_attn_v else []
    fast_v = [_empty_heads(v, num_lact_heads)] if silu_v else []
    for tokens in token_blocks(q):
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
        for out in attn_v:
            out[:, tokens].flatten(2).copy_(v[:, tokens])
        for out in fast_v:
            out[:, tokens].flatten(2).copy_(F.silu(v[:, tokens].to(dtype)))
    return Outputs(*attn, attn_v, *fast, fast_v)


def silu_l2norm_rope_bwd(grads: Outputs, inputs: Inputs, options: Options) -> Gradients:
    """Those of q, k and v laid out as they are, so that they need not be joined afterwards."""
    dattn_q, dattn_k, dattn_v, dfast_q, dfast_k, dfast_v = grads
    qkv, qk_scale, qk_offset, cos, sin = inputs
    num_attn_heads, num_lact_heads, silu, _, rotate_fast, _ = options
    q, k, v = thirds(qkv)
    dtype = compute_dtype(q)
    scales, offsets = _columns(qk_scale, dtype), _columns(qk_offset, dtype)
    dscale, doffset = (x.new_zeros(x.shape, dtype=dtype) for x in (qk_scale, qk_offset))
    dqkv = [x.new_empty(x.shape) for x in qkv]
    dq, dk, dv = thirds(dqkv)
    dattn, dfast = (dattn_q, dattn_k), (dfast_q, dfast_k)
    parts = list(enumerate(zip((q, k), (dq, dk), dattn, dfast, scales, offsets)))
    as_attn, as_fast = (-1, (num_attn_heads, -1)), (-1, (num_lact_heads, -1))
    for tokens in token_blocks(q):
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
        total = 0
        for dy in dfast_v:
            total = silu_backward(dy[:, tokens].to(dtype).flatten(2), v[:, tokens].to(dtype))
        for dy in dattn_v:
            total += dy[:, tokens].flatten(2)
        dv[:, tokens] = total
    return Gradients(dqkv, dscale.to(qk_scale.dtype), doffset.to(qk_offset.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate `[B, T, H, D]` by the angles `[1 or B, T, 1, D / 2]`, into `out` of any dtype if given."""
    y = out if out is not None and out.dtype == x.dtype else torch.empty_like(x)
    x1, x2 = x.chunk(2, dim=-1)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return y if out is None or out is y else out.copy_(y)


def _columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two columns of `[C, 2]`, one after the other."""
    return tuple(x.to(dtype).T.contiguous())


def _empty_heads(x: Tensor, heads: int) -> Tensor:
    """For the heads of `[B, T, C]`: `[B, T, heads, C / heads]`."""
    return x.new_empty(*x.shape[:2], heads, x.shape[2] // heads)
