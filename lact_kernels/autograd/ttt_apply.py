"""`ttt_apply` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The weights are `[B, H, ...]`, or `[1, H, ...]` where all
rows share them. The backward keeps inputs, nothing else: the hidden activations, more than all inputs
together, cost less to compute again than to keep.
"""

from types import ModuleType

import torch

from lact_kernels.autograd.autocast import register_autocast
from lact_kernels.autograd.derivatives import register_derivatives
from lact_kernels.autograd.vmap import register_vmap
from lact_kernels.eager import ttt_apply as eager

INPUTS = "Tensor q, Tensor w0, Tensor w1, Tensor w2, str backend"


@torch.library.custom_op(
    "lact_kernels::ttt_apply_fwd", mutates_args=(), schema=f"({INPUTS}) -> Tensor"
)
def ttt_apply_fwd(q, w0, w1, w2, backend):
    return _launchers(backend).ttt_apply_fwd(q, (w0, w1, w2))


@ttt_apply_fwd.register_fake
def _(q, w0, w1, w2, backend):
    return q.new_empty(*q.shape[:3], w1.shape[-2])


@torch.library.custom_op(
    "lact_kernels::ttt_apply_bwd",
    mutates_args=(),
    schema=f"(Tensor do, {INPUTS}) -> (Tensor dq, Tensor dw0, Tensor dw1, Tensor dw2)",
)
def ttt_apply_bwd(do, q, w0, w1, w2, backend):
    dq, dweights = _launchers(backend).ttt_apply_bwd(do, q, (w0, w1, w2))
    return dq, *dweights


@ttt_apply_bwd.register_fake
def _(do, q, w0, w1, w2, backend):
    return tuple(x.new_empty(x.shape) for x in (q, w0, w1, w2))


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    return *ttt_apply_bwd(do, *ctx.saved_tensors, ctx.backend), None


def _launchers(backend: str) -> ModuleType:
    """The module with the chosen backend's functions, imported only now."""
    if backend == "triton":
        from lact_kernels.triton.fast_weights import apply

        return apply
    return eager


register_derivatives(ttt_apply_fwd, _backward, _setup)
register_derivatives(ttt_apply_bwd)
for _op in (ttt_apply_fwd, ttt_apply_bwd):
    register_vmap(_op)
    register_autocast(_op)
