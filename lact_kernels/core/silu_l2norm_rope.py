"""What the backends of `silu_l2norm_rope` are given."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The projections, and what is applied to each of their tokens."""

    q: Tensor  # [B, T, C]
    k: Tensor  # [B, T, C]
    v: Tensor | None  # [B, T, C], or None where the fast weights take it as it is
    qk_scale: Tensor  # [C, 2]
    qk_offset: Tensor  # [C, 2]
    cos: Tensor  # [1 or B, T, D / 2]
    sin: Tensor  # [1 or B, T, D / 2]


class Options(NamedTuple):
    num_attn_heads: int  # Hq
    num_lact_heads: int  # Hf
    silu: bool
    rotate_fast: bool


class Outputs(NamedTuple):
    """Queries and keys of both branches, and the values of the fast weights; or their gradients."""

    attn_q: Tensor  # [B, T, Hq, D]
    attn_k: Tensor  # [B, T, Hq, D]
    fast_q: Tensor  # [B, T, Hf, Df]
    fast_k: Tensor  # [B, T, Hf, Df]
    fast_v: list[Tensor]  # [B, T, Hf, Df], with v; else empty
