"""Registered ops compute as if `torch.autocast` were off: their backends choose the dtype of each product.

What it makes of the arguments is said in `ops/autocast.py`. `torch.library.register_autocast` is no help: it
casts the inputs of every op, to a dtype that is fixed when the op is registered.
"""

from collections.abc import Callable

import torch

DEVICE_TYPES = ("cpu", "cuda")

_keys = [getattr(torch._C.DispatchKey, f"Autocast{device.upper()}") for device in DEVICE_TYPES]
_key_set = torch._C.DispatchKeySet(_keys[0]) | torch._C.DispatchKeySet(_keys[1])


def without_autocast(overload: torch._ops.OpOverload) -> Callable:
    """The kernel of an op for the keys of autocast, which is off inside of it."""

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(_key_set):
            return overload(*args)

    return kernel
