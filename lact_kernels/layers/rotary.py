"""Angles of rotary position embeddings (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[..., head_dim / 2]` of `position * theta^(-2i / head_dim)`, in `dtype`.

    The angles are float64: in float32 those of position 10^6 would be wrong by 0.03.

    Args:
        positions: integers `[...]`, 0 at the first token of a sequence.
        head_dim: channels of an attention head, even.
        theta: the base, of which channel pair i has the frequency `theta^(-2i / head_dim)`.
        dtype: of the result.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions[..., None] * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)
