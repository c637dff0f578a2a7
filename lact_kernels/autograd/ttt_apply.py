"""`ttt_apply` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The weights are `[B, H, ...]`, or `[1, H, ...]` where all
rows share them. The backward keeps inputs, nothing else: the hidden activations, more than all inputs
together, cost less to compute again than to keep.
"""

from types import ModuleType

from lact_kernels.autograd.registration import register_op
from lact_kernels.eager import ttt_apply as eager

INPUTS = "Tensor q, Tensor w0, Tensor w1, Tensor w2, str backend"


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    return *ttt_apply_bwd(do, *ctx.saved_tensors, ctx.backend), None


@register_op(
    f"ttt_apply_fwd({INPUTS}) -> Tensor",
    lambda q, w0, w1, w2, backend: q.new_empty(*q.shape[:3], w1.shape[-2]),
    backward=_backward,
    setup_context=_setup,
)
def ttt_apply_fwd(q, w0, w1, w2, backend):
    return _launchers(backend).ttt_apply_fwd(q, (w0, w1, w2))


@register_op(
    f"ttt_apply_bwd(Tensor do, {INPUTS}) -> (Tensor dq, Tensor dw0, Tensor dw1, Tensor dw2)",
    lambda do, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:4]),
)
def ttt_apply_bwd(do, q, w0, w1, w2, backend):
    dq, dweights = _launchers(backend).ttt_apply_bwd(do, q, (w0, w1, w2))
    return dq, *dweights


def _launchers(backend: str) -> ModuleType:
    """The module with the chosen backend's functions, imported only now."""
    if backend == "triton":
        from lact_kernels.triton.fast_weights import apply

        return apply
    return eager
