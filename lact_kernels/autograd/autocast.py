"""Registered ops compute as if `torch.autocast` were off: their backends choose the dtype of each product.

What it makes of the arguments is said in `ops/autocast.py`. `torch.library.register_autocast` is no help: it
casts the inputs of every op, to a dtype that is fixed when the op is registered.
"""

import torch
from torch.library import CustomOpDef

DEVICE_TYPES = ("cpu", "cuda")

_library = torch.library.Library("lact_kernels", "FRAGMENT")
_keys = [getattr(torch._C.DispatchKey, f"Autocast{device.upper()}") for device in DEVICE_TYPES]
_key_set = torch._C.DispatchKeySet(_keys[0]) | torch._C.DispatchKeySet(_keys[1])


def register_autocast(op: CustomOpDef) -> None:
    """Switch autocast off inside of `op`."""
    overload = op._opoverload

    def rule(*args):
        with torch._C._ExcludeDispatchKeyGuard(_key_set):
            return overload(*args)

    for device in DEVICE_TYPES:
        _library.impl(overload, rule, f"Autocast{device.upper()}")
