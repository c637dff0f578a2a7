"""The same values elsewhere in memory, with gradients."""

import math

import torch.nn.functional as F
from torch import Tensor


def bordered(x: Tensor) -> Tensor:
    """Rows that are three elements longer, amid NaN, and start at an odd address."""
    return F.pad(x, (1, 2), value=math.nan)[..., 1:-2]


def heads_first(x: Tensor) -> Tensor:
    """In the order `[B, H, T, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
