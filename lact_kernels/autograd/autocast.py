"""What `torch.autocast` does to the registered ops.

Every op computes as if autocast were off: its backend chooses the dtype of each product. Some ops
have their inputs cast first, as PyTorch's own attention has.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE_TYPES = ("cpu", "cuda")

_library = torch.library.Library("lact_kernels", "FRAGMENT")
_keys = [getattr(torch._C.DispatchKey, f"Autocast{device.upper()}") for device in DEVICE_TYPES]
_key_set = torch._C.DispatchKeySet(_keys[0]) | torch._C.DispatchKeySet(_keys[1])


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for `x`. It leaves float64 and all that is not floating-point alone."""
    device = x.device.type
    castable = x.is_floating_point() and x.dtype != torch.float64 and device in DEVICE_TYPES
    return castable and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op with `cast_inputs` reads `x`: autocast's, where that is on.

    `torch.library.register_autocast` is no help: it fixes the dtype when an op is registered.
    """
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def register_autocast(name: str, cast_inputs: bool) -> None:
    """Register the rule of the op `lact_kernels::name`."""
    op = getattr(torch.ops.lact_kernels, name).default

    def rule(*args):
        if cast_inputs:
            args = tree_map_only(Tensor, lambda x: x.to(autocast_dtype(x)), args)
        with torch._C._ExcludeDispatchKeyGuard(_key_set):
            return op(*args)

    for device in DEVICE_TYPES:
        _library.impl(name, rule, f"Autocast{device.upper()}")
