"""Which derivatives the operations have: first ones, in reverse. All others are refused, by name.

What `torch.library.register_autograd` registers cannot be differentiated by `torch.func`, and its derivatives
in forward mode are 0. `first_derivatives` takes its place: transforms of `torch.func` reach its kernel
once for each of their levels, as they reach those of PyTorch's own ops. `FirstOrderFunction` is for what is
no registered op, as it talks to other processes.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import supports_tensorlist
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_iter

# The dispatch keys below autograd of plain tensors, where no mode, trace or transform is on.
_CPU, _CUDA = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, x)) for x in ("CPU", "CUDA"))
PLAIN = {keys.raw_repr() for keys in (_CPU, _CUDA, _CPU | _CUDA)}

NO_FORWARD_MODE = (
    "{} has no forward-mode derivatives (torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad):"
    " use reverse mode (torch.autograd.grad, torch.func.vjp, torch.func.jacrev)"
)
NO_SECOND_DERIVATIVES = (
    "{} has no second derivatives (create_graph=True and then a gradient of the gradient,"
    " torch.func.hessian): lact_kernels has first derivatives only"
)
NO_TRANSFORMS = (
    "{} cannot be transformed by torch.func (grad, vjp, vmap, jvp, ...): use torch.autograd.grad or"
    " backward()"
)


def first_derivatives(
    overload: torch._ops.OpOverload,
    implementation: Callable,
    backward: Callable | None,
    setup_context: Callable | None,
    without_backward: str,
    recorded: Callable | None = None,
) -> Callable:
    """The kernel of an op for the key Autograd, of arguments as in `register_op`.

    Without a `backward` it says so where one is called for.
    """
    name = overload._schema.name

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if _is_plain(keyset):  # as redispatch would, which takes as long as all else
                return implementation(*args)
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def forward(ctx, *args):
        *args, keyset = args
        if torch._C._are_functorch_transforms_active():
            # `apply` turns these off for all levels, where that is right for its own only.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below(keyset, *args)
        elif recorded is not None and _is_plain(keyset):
            output = recorded(functools.partial(below, keyset), *args)
        else:
            output = below(keyset, *args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def run_backward(ctx, *grads):
        if backward is None:
            raise NotImplementedError(without_backward.format(name))
        return *backward(ctx, *grads), None  # of the keyset

    # The class within torch.autograd.Function whose `apply` is of one level of torch.func.
    functions = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    node = type(name.replace("::", "_"), (_SingleLevelFunction,), functions)
    if "Tensor[]" in str(overload._schema):
        node = supports_tensorlist(node)

    def autograd(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return node.apply(*args, keyset)
        return node.apply(*args, keyset)

    return autograd


def _is_plain(keyset: torch._C.DispatchKeySet) -> bool:
    """Whether there are plain tensors of a device alone below autograd."""
    return (keyset & torch._C._after_ADInplaceOrView_keyset).raw_repr() in PLAIN


def _refuse_tangents(name: str, args: tuple) -> None:
    for x in tree_iter(args):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE.format(name))


class FirstOrderFunction(torch.autograd.Function):
    """An autograd function of the operation `op`, whose backward cannot be differentiated."""

    op: str

    def __init_subclass__(cls):
        backward, op = cls.backward, cls.op

        def run_backward(ctx, *grads):
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return outputs
            message = NO_SECOND_DERIVATIVES.format(op).encode()
            error = torch._C._functions.DelayedError(message, len(outputs))
            return error(*(None if x is None else x.detach().requires_grad_() for x in outputs))

        def refuse_tangents(ctx, *tangents):
            raise NotImplementedError(NO_FORWARD_MODE.format(op))

        cls.backward, cls.jvp = staticmethod(run_backward), staticmethod(refuse_tangents)

    @classmethod
    def apply(cls, *args):
        refuse_transforms(cls.op)
        return super().apply(*args)


def refuse_transforms(op: str, *args) -> None:
    """For what talks to other processes, which know nothing of a transform of `torch.func` on this one.

    Of `args` none may have a tangent of forward mode.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(NO_TRANSFORMS.format(op))
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
