"""What a layer can be given."""

import torch
from torch import Tensor, nn

from lact_kernels.ops import checks

Window = int | tuple[int, int] | None  # tokens that a query sees, `(left, right)`, all before it


def check_input(name: str, x: Tensor, layout: str, channels: int, projection: nn.Module) -> None:
    """`x` has the layout, `channels` on its last axis, and can be multiplied by the layer's first projection.

    A projection that is wrapped or kept elsewhere may move or cast it.

    Raises:
        TypeError: no tensor, or one of the wrong dtype.
        ValueError: a wrong shape or device.
    """
    checks.check_float_dtype(name, x, layout)
    *_, last = layout.strip("[]").split(", ")
    if x.ndim != 3 or x.shape[2] != channels:
        raise ValueError(
            f"{name} must have the shape {layout} with {last} = {channels}, got {tuple(x.shape)}"
        )
    if type(projection) is not nn.Linear:
        return
    weight = projection.weight
    if weight.device != x.device and not weight.is_meta:
        raise ValueError(f"{name} must be on {weight.device} like this layer, got {x.device}")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have the dtype {weight.dtype} of this layer, got {x.dtype}")


def check_layer_window(window_size: Window) -> Window:
    """A window as a layer keeps it: a pair if its queries see later tokens, otherwise a number or None."""
    return checks.given_window(*checks.check_window("window_size", window_size))
