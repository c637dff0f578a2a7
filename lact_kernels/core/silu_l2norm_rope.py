"""What the backends of `silu_l2norm_rope` are given."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


def thirds(qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[B, T, C]`: of the one `[B, T, 3C]` that they share, or each a tensor of its own."""
    return qkv[0].chunk(3, dim=-1) if len(qkv) == 1 else tuple(qkv)


class Inputs(NamedTuple):
    """The projections, and what is applied to each of their tokens."""

    qkv: list[Tensor]  # as in `thirds`
    qk_scale: Tensor  # [C, 2]
    qk_offset: Tensor  # [C, 2]
    cos: Tensor  # [1 or B, T, D / 2]
    sin: Tensor  # [1 or B, T, D / 2]


class Options(NamedTuple):
    num_attn_heads: int  # Hq
    num_lact_heads: int  # Hf
    silu: bool
    silu_v: bool  # if not, there is no fast_v
    rotate_fast: bool
    attn_v: bool  # whether there is one


class Outputs(NamedTuple):
    """Queries, keys and values of both branches; or their gradients."""

    attn_q: Tensor  # [B, T, Hq, D]
    attn_k: Tensor  # [B, T, Hq, D]
    attn_v: list[Tensor]  # [B, T, Hq, D], or empty
    fast_q: Tensor  # [B, T, Hf, Df]
    fast_k: Tensor  # [B, T, Hf, Df]
    fast_v: list[Tensor]  # [B, T, Hf, Df], or empty


class Gradients(NamedTuple):
    qkv: list[Tensor]  # as many as were given
    qk_scale: Tensor
    qk_offset: Tensor
