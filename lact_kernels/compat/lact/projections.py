"""What the LaCT authors' layers make of their tokens before the fast weights read them."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lact_kernels.core.fast_weights import wide_dtype
from lact_kernels.ops import checks

NORM_EPS = 1e-5


def inv_softplus(x: float) -> float:
    """The number whose softplus is x."""
    return x + math.log(-math.expm1(-x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def silu_heads(qkv: Tensor, num_heads: int, l2_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The SiLU of `[B, T, 3 C]` as q, k, v `[B, T, H, C / H]`, q and k divided by their norms + 1e-5.

    Norms are computed in float32 (float64 for float64).
    """
    q, k, v = F.silu(qkv).unflatten(-1, (3, num_heads, -1)).unbind(2)
    return (_l2_norm(q), _l2_norm(k), v) if l2_norm else (q, k, v)


def _l2_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))
    return (x / (norm + NORM_EPS)).to(x.dtype)


def learning_rates(projection: nn.Linear, x: Tensor, base: float) -> Tensor:
    """`softplus(projection(x) + base)`, `[B, T, 3 H]`, in float32 (float64 for float64) without autocast."""
    # Of meta tensors PyTorch knows no autocast.
    off = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with off:
        rates = projection(x.to(projection.weight.dtype))
    return F.softplus(rates.to(wide_dtype(x)) + base)


def head_norm(norm: nn.Module, o: Tensor) -> Tensor:
    """The norm over the channels of each head, in the dtype of its weight; o keeps its own."""
    weight = getattr(norm, "weight", None)
    return norm(o) if weight is None else norm(o.to(weight.dtype)).to(o.dtype)


def check_sizes(dim: int, inter_multi: float, **head_dims: int) -> None:
    """Heads divide the channels, and the hidden layer of the fast network is not empty.

    Raises:
        TypeError, ValueError: where not; both name the argument.
    """
    checks.check_positive_int("dim", dim)
    checks.check_finite_number("inter_multi", inter_multi)
    for name, head_dim in head_dims.items():
        checks.check_positive_int(name, head_dim)
        if dim % head_dim:
            raise ValueError(f"{name} must divide dim = {dim}, got {head_dim}")
    if int(head_dims["head_dim"] * inter_multi) < 1:
        raise ValueError(f"inter_multi must leave at least one hidden channel, got {inter_multi}")


def check_base_lr(base_lr: float) -> float:
    base_lr = checks.check_finite_number("base_lr", base_lr)
    if base_lr <= 0:
        raise ValueError(f"base_lr must be positive, got {base_lr}")
    return base_lr
