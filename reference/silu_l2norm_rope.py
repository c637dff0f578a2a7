"""What a LaCT layer does to q, k and v before its two operations, one formula after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


def silu_l2norm_rope(
    qkv: Tensor | Sequence[Tensor],  # [B, T, 3C], or three of [B, T, C]
    qk_scale: Tensor,  # [C, 2]
    qk_offset: Tensor,  # [C, 2]
    cos: Tensor,  # [1 or B, T, D / 2]
    sin: Tensor,  # [1 or B, T, D / 2]
    *,
    num_attn_heads: int,
    num_lact_heads: int,
    silu: bool,
    silu_v: bool,
    rotate_fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of the attention, `[B, T, Hq, D]`, and of the fast weights, `[B, T, Hf, Df]`.

    Everything is computed in the dtype of `q`.
    """
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    cos, sin, qk_scale, qk_offset = (x.to(q.dtype) for x in (cos, sin, qk_scale, qk_offset))

    def rope(x: Tensor) -> Tensor:
        return rotate(x.unflatten(-1, (num_attn_heads, -1)), cos, sin)

    def fast(x: Tensor, column: int) -> Tensor:
        x = x * qk_scale[:, column] + qk_offset[:, column]
        x = x.unflatten(-1, (num_lact_heads, -1))
        if silu:
            x = F.silu(x)
        x = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + NORM_EPS)
        if rotate_fast:
            x = rope(x.flatten(2)).flatten(2).unflatten(-1, (num_lact_heads, -1))
        return x

    attn_v, fast_v = (v.unflatten(-1, (heads, -1)) for heads in (num_attn_heads, num_lact_heads))
    if silu_v:
        fast_v = F.silu(fast_v)
    return rope(q), rope(k), attn_v, fast(q, 0), fast(k, 1), fast_v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels i and i + D / 2 of each head of `[B, T, H, D]` against each other."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
