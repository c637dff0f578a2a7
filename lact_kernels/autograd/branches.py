"""`branch_qkv` and `branch_sum` as pairs of registered ops: what the backward remembers, what comes out.

All four ops are functional and opaque to `torch.compile`. A backward keeps inputs, nothing else: what
it needs beside them costs less to compute again than to read.

`v` is None where the fast weights take it as it is, and with `v` the lists `fast_v` and `dv` hold one
tensor, likewise `dscale` with `scale`. An op may not return a view of what it is given.
"""

from types import ModuleType

import torch

from lact_kernels.autograd.autocast import register_autocast
from lact_kernels.autograd.derivatives import register_derivatives
from lact_kernels.autograd.vmap import register_vmap
from lact_kernels.eager import branches as eager

QKV = (
    "Tensor q, Tensor k, Tensor? v, Tensor qk_scale, Tensor qk_offset, Tensor cos, Tensor sin,"
    " SymInt num_attn_heads, SymInt num_lact_heads, bool silu, bool rotate_fast, str backend"
)
SUM = "Tensor ttt, Tensor norm_weight, Tensor? scale, float eps, str backend"


@torch.library.custom_op(
    "lact_kernels::branch_qkv_fwd",
    mutates_args=(),
    schema=f"({QKV}) -> (Tensor attn_q, Tensor attn_k, Tensor fast_q, Tensor fast_k, Tensor[] fast_v)",
)
def branch_qkv_fwd(*args):
    *args, backend = args
    return _qkv(backend).branch_qkv_fwd(*args)


@branch_qkv_fwd.register_fake
def _(q, k, v, qk_scale, qk_offset, cos, sin, num_attn_heads, num_lact_heads, *_):
    B, T, C = q.shape
    attn, fast = ((B, T, heads, C // heads) for heads in (num_attn_heads, num_lact_heads))
    fast_v = [] if v is None else [q.new_empty(fast)]
    return q.new_empty(attn), q.new_empty(attn), q.new_empty(fast), q.new_empty(fast), fast_v


@torch.library.custom_op(
    "lact_kernels::branch_qkv_bwd",
    mutates_args=(),
    schema="(Tensor dattn_q, Tensor dattn_k, Tensor dfast_q, Tensor dfast_k, Tensor[] dfast_v,"
    f" {QKV}) -> (Tensor dq, Tensor dk, Tensor[] dv, Tensor dqk_scale, Tensor dqk_offset)",
)
def branch_qkv_bwd(*args):
    *args, backend = args
    return _qkv(backend).branch_qkv_bwd(*args)


@branch_qkv_bwd.register_fake
def _(dattn_q, dattn_k, dfast_q, dfast_k, dfast_v, q, k, v, qk_scale, qk_offset, *_):
    dv = [] if v is None else [v.new_empty(v.shape)]
    dqk_scale, dqk_offset = (x.new_empty(x.shape) for x in (qk_scale, qk_offset))
    return q.new_empty(q.shape), k.new_empty(k.shape), dv, dqk_scale, dqk_offset


def _setup_qkv(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward_qkv(ctx, *grads):
    *grads, dfast_v = grads
    dq, dk, dv, dqk_scale, dqk_offset = branch_qkv_bwd(
        *grads, dfast_v, *ctx.saved_tensors, *ctx.options
    )
    rest = (None,) * (2 + len(ctx.options))  # cos, sin and the options
    return dq, dk, dv[0] if dv else None, dqk_scale, dqk_offset, *rest


@torch.library.custom_op(
    "lact_kernels::branch_sum_fwd",
    mutates_args=(),
    schema=f"(Tensor attn, {SUM}) -> Tensor",
)
def branch_sum_fwd(attn, ttt, norm_weight, scale, eps, backend):
    return _sum(backend).branch_sum_fwd(attn, ttt, norm_weight, scale, eps)


@branch_sum_fwd.register_fake
def _(attn, ttt, *_):
    B, T, Hf, Df = ttt.shape
    return attn.new_empty(B, T, Hf * Df)


@torch.library.custom_op(
    "lact_kernels::branch_sum_bwd",
    mutates_args=(),
    schema=f"(Tensor dout, {SUM}) -> (Tensor dttt, Tensor dnorm_weight, Tensor[] dscale)",
)
def branch_sum_bwd(dout, ttt, norm_weight, scale, eps, backend):
    return _sum(backend).branch_sum_bwd(dout, ttt, norm_weight, scale, eps)


@branch_sum_bwd.register_fake
def _(dout, ttt, norm_weight, scale, *_):
    dscale = [] if scale is None else [scale.new_empty(scale.shape)]
    return ttt.new_empty(ttt.shape), norm_weight.new_empty(norm_weight.shape), dscale


def _setup_sum(ctx, inputs, output):
    attn, ttt, norm_weight, scale, *options = inputs
    ctx.save_for_backward(ttt, norm_weight, scale)
    ctx.attn_heads = attn.shape[2:]
    ctx.options = options


def _backward_sum(ctx, dout):
    dttt, dnorm_weight, dscale = branch_sum_bwd(dout, *ctx.saved_tensors, *ctx.options)
    dattn = dout.unflatten(-1, ctx.attn_heads)
    return dattn, dttt, dnorm_weight, dscale[0] if dscale else None, None, None


def _qkv(backend: str) -> ModuleType:
    """The module with the chosen backend's functions, imported only now; likewise the next."""
    if backend == "triton":
        from lact_kernels.triton.layer import branch_qkv

        return branch_qkv
    return eager


def _sum(backend: str) -> ModuleType:
    if backend == "triton":
        from lact_kernels.triton.layer import branch_sum

        return branch_sum
    return eager


register_derivatives(branch_qkv_fwd, _backward_qkv, _setup_qkv)
register_derivatives(branch_qkv_bwd)
register_derivatives(branch_sum_fwd, _backward_sum, _setup_sum)
register_derivatives(branch_sum_bwd)
for _op in (branch_qkv_fwd, branch_qkv_bwd, branch_sum_fwd, branch_sum_bwd):
    register_vmap(_op)
    register_autocast(_op)
