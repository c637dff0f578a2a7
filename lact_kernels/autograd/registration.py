"""How an operation is registered with PyTorch: one place for what all of them have in common.

`torch.library.custom_op` does part of it, at a cost: each call looks for outputs that share memory with its
inputs, which tests do here, and the first one imports TorchDynamo, and with it Triton, to turn it off.
"""

from collections.abc import Callable

import torch
from torch._C._dynamo import eval_frame

from lact_kernels.autograd.autocast import DEVICE_TYPES, without_autocast
from lact_kernels.autograd.derivatives import NO_SECOND_DERIVATIVES, first_derivatives
from lact_kernels.autograd.vmap import vmap_rule

_library = torch.library.Library("lact_kernels", "FRAGMENT")
# How TorchDynamo takes a function that it meets between two graphs: not at all, nor what that calls.
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def register_op(
    schema: str,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    without_backward: str = NO_SECOND_DERIVATIVES,
    recorded: Callable | None = None,
    batched: bool = False,
) -> Callable[[Callable], torch._ops.OpOverload]:
    """A decorator: it makes what computes an op, on any device, the op of this schema.

    The op is functional, and opaque to `torch.compile`. Its outputs share no memory with each other or with
    what it is given.

    Args:
        schema: its name, arguments and results.
        fake: of the same arguments, makes results of the right shapes without values.
        backward: of a context and the gradients of results, the gradients of all arguments; by default there
            are none, and a call for one raises `without_backward`, formatted with the name of the op.
        setup_context: of a context, the arguments and the results, keeps what `backward` needs.
        recorded: of a function that computes the op, and its arguments, makes the results where autograd
            alone records a call with plain tensors. There they may be views of arguments: autograd knows
            what those are, and nobody else is told.
        batched: see `vmap_rule`.
    """

    def register(implementation: Callable) -> torch._ops.OpOverload:
        name = _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        overload = getattr(torch.ops.lact_kernels, name.split("::")[-1]).default
        torch.library.register_fake(overload, fake, lib=_library)
        torch.library.register_vmap(overload, vmap_rule(overload, batched), lib=_library)
        autograd = first_derivatives(
            overload, implementation, backward, setup_context, without_backward, recorded
        )
        kernels = {
            "CompositeExplicitAutograd": implementation,
            "Autograd": autograd,
            **{f"Autocast{device.upper()}": without_autocast(overload) for device in DEVICE_TYPES},
        }
        for key, kernel in kernels.items():
            eval_frame.set_code_exec_strategy(kernel.__code__, _SKIP)
            _library.impl(overload, kernel, key, with_keyset=key == "Autograd")
        return overload

    return register
