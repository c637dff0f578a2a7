"""What `torch.autocast` makes of an operation's arguments. The registered ops compute as if it were off."""

import torch
from torch import Tensor

from lact_kernels.autograd.autocast import DEVICE_TYPES


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for `x`. It leaves float64 and all that is not floating-point alone."""
    device = x.device.type
    is_on = device in DEVICE_TYPES and torch.is_autocast_enabled(device)
    return is_on and x.is_floating_point() and x.dtype != torch.float64


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x` after `cast_inputs`."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def matching_dtype(x: Tensor, other: Tensor) -> torch.dtype:
    """The dtype that x must have beside `other`: its own where autocast makes the same of both."""
    if x.dtype == other.dtype or autocast_dtype(x) != autocast_dtype(other):
        return other.dtype
    return x.dtype


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as PyTorch's own attention casts them: where autocast is on for the first, all."""
    if not autocasts(tensors[0]):
        return tensors
    return tuple([x.to(autocast_dtype(x)) for x in tensors])
