"""Some small linear layers of the same input, as one product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

_PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor)  # the last while a program is exported
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def joint_linear(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """`module(x)` for each of some modules, of which x is read once where all are `can_be_joined`.

    A product with few output channels takes as long as reading x, and so does its part of the gradient of x,
    which also has to be added up. The weights are joined in each call, since they are small beside x.
    """
    if not can_be_joined(modules):
        return tuple(module(x) for module in modules)
    weight, bias = (torch.cat([getattr(m, name) for m in modules]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([len(m.weight) for m in modules], dim=-1)


def can_be_joined(modules: tuple[nn.Module, ...]) -> bool:
    """Whether nobody can tell that these were not called: a call is that of their class, and no more.

    Not so where a module is of another class (LoRA, quantised, wrapped, parametrised), has hooks (weight
    norm, FSDP) or a forward of its own (accelerate), or a parameter with products of its own (a DTensor, a
    quantised weight). There is no joint product where dtypes or devices differ, or some have no bias.
    """
    return (
        len(modules) > 1
        and not _has_any_global_hook()
        and all(type(module) is nn.Linear and not _is_intercepted(module) for module in modules)
        and all(type(w) in _PLAIN_WEIGHTS for m in modules for w in (m.weight, m.bias))
        and len({(w.dtype, w.device) for m in modules for w in (m.weight, m.bias)}) == 1
    )


def _is_intercepted(module: nn.Module) -> bool:
    """Whether something stands between a call of the module and the forward of its class."""
    own = vars(module)
    return "forward" in own or any(own[name] for name in _HOOKS)
