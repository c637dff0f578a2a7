"""`rms_norm_scale_add` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The backward keeps inputs, nothing else: what it needs
beside them costs less to compute again than to read. With `scale` the list `dscale` holds one tensor.
"""

from types import ModuleType

from lact_kernels.autograd.registration import register_op
from lact_kernels.eager import rms_norm_scale_add as eager

INPUTS = "Tensor ttt, Tensor norm_weight, Tensor? scale, float eps, str backend"


def _empty_output(attn, ttt, *_):
    B, T, Hf, Df = ttt.shape
    return attn.new_empty(B, T, Hf * Df)


def _setup(ctx, inputs, output):
    attn, ttt, norm_weight, scale, *options = inputs
    ctx.save_for_backward(ttt, norm_weight, scale)
    ctx.attn_heads = attn.shape[2:]
    ctx.options = options


def _backward(ctx, dout):
    dttt, dnorm_weight, dscale = rms_norm_scale_add_bwd(dout, *ctx.saved_tensors, *ctx.options)
    dattn = dout.unflatten(-1, ctx.attn_heads)
    return dattn, dttt, dnorm_weight, dscale[0] if dscale else None, None, None


@register_op(
    f"rms_norm_scale_add_fwd(Tensor attn, {INPUTS}) -> Tensor",
    _empty_output,
    backward=_backward,
    setup_context=_setup,
)
def rms_norm_scale_add_fwd(attn, ttt, norm_weight, scale, eps, backend):
    return _launchers(backend).rms_norm_scale_add_fwd(attn, ttt, norm_weight, scale, eps)


def _empty_gradients(dout, ttt, norm_weight, scale, *_):
    dscale = [] if scale is None else [scale.new_empty(scale.shape)]
    return ttt.new_empty(ttt.shape), norm_weight.new_empty(norm_weight.shape), dscale


@register_op(
    f"rms_norm_scale_add_bwd(Tensor dout, {INPUTS})"
    " -> (Tensor dttt, Tensor dnorm_weight, Tensor[] dscale)",
    _empty_gradients,
)
def rms_norm_scale_add_bwd(dout, ttt, norm_weight, scale, eps, backend):
    return _launchers(backend).rms_norm_scale_add_bwd(dout, ttt, norm_weight, scale, eps)


def _launchers(backend: str) -> ModuleType:
    """The module with the chosen backend's functions, imported only now."""
    if backend == "triton":
        from lact_kernels.triton.layer import rms_norm_scale_add

        return rms_norm_scale_add
    return eager
