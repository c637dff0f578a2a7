"""`rms_norm_scale_add` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The backward keeps inputs, nothing else: what it needs
beside them costs less to compute again than to read. With `scale` the list `dscale` holds one tensor.
"""

from types import ModuleType

import torch

from lact_kernels.autograd.autocast import register_autocast
from lact_kernels.autograd.derivatives import register_derivatives
from lact_kernels.autograd.vmap import register_vmap
from lact_kernels.eager import rms_norm_scale_add as eager

INPUTS = "Tensor ttt, Tensor norm_weight, Tensor? scale, float eps, str backend"


@torch.library.custom_op(
    "lact_kernels::rms_norm_scale_add_fwd",
    mutates_args=(),
    schema=f"(Tensor attn, {INPUTS}) -> Tensor",
)
def rms_norm_scale_add_fwd(attn, ttt, norm_weight, scale, eps, backend):
    return _launchers(backend).rms_norm_scale_add_fwd(attn, ttt, norm_weight, scale, eps)


@rms_norm_scale_add_fwd.register_fake
def _(attn, ttt, *_):
    B, T, Hf, Df = ttt.shape
    return attn.new_empty(B, T, Hf * Df)


@torch.library.custom_op(
    "lact_kernels::rms_norm_scale_add_bwd",
    mutates_args=(),
    schema=f"(Tensor dout, {INPUTS}) -> (Tensor dttt, Tensor dnorm_weight, Tensor[] dscale)",
)
def rms_norm_scale_add_bwd(dout, ttt, norm_weight, scale, eps, backend):
    return _launchers(backend).rms_norm_scale_add_bwd(dout, ttt, norm_weight, scale, eps)


@rms_norm_scale_add_bwd.register_fake
def _(dout, ttt, norm_weight, scale, *_):
    dscale = [] if scale is None else [scale.new_empty(scale.shape)]
    return ttt.new_empty(ttt.shape), norm_weight.new_empty(norm_weight.shape), dscale


def _setup(ctx, inputs, output):
    attn, ttt, norm_weight, scale, *options = inputs
    ctx.save_for_backward(ttt, norm_weight, scale)
    ctx.attn_heads = attn.shape[2:]
    ctx.options = options


def _backward(ctx, dout):
    dttt, dnorm_weight, dscale = rms_norm_scale_add_bwd(dout, *ctx.saved_tensors, *ctx.options)
    dattn = dout.unflatten(-1, ctx.attn_heads)
    return dattn, dttt, dnorm_weight, dscale[0] if dscale else None, None, None


def _launchers(backend: str) -> ModuleType:
    """The module with the chosen backend's functions, imported only now."""
    if backend == "triton":
        from lact_kernels.triton.layer import rms_norm_scale_add

        return rms_norm_scale_add
    return eager


register_derivatives(rms_norm_scale_add_fwd, _backward, _setup)
register_derivatives(rms_norm_scale_add_bwd)
for _op in (rms_norm_scale_add_fwd, rms_norm_scale_add_bwd):
    register_vmap(_op)
    register_autocast(_op)
