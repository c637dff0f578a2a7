"""`silu_l2norm_rope` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The backward keeps inputs, nothing else: what it needs
beside them costs less to compute again than to read.

q, k and v are a list of one tensor that they share, or of three, and so are their gradients: what comes
back is one tensor where one was given. So the gradient of the attention's v has to come in here, too, and
where there may be a backward this v comes out: as a copy, since an op may not return a view of what it is
given, but for autograd alone, which can take one. `attn_v` and `fast_v` are lists of one tensor, or of none.
"""

from types import ModuleType

from lact_kernels.autograd.registration import register_op
from lact_kernels.core.silu_l2norm_rope import Inputs, Options, Outputs, thirds
from lact_kernels.eager import silu_l2norm_rope as eager

INPUTS = (
    "Tensor[] qkv, Tensor qk_scale, Tensor qk_offset, Tensor cos, Tensor sin, SymInt num_attn_heads,"
    " SymInt num_lact_heads, bool silu, bool silu_v, bool rotate_fast, bool attn_v, str backend"
)


def _empty_outputs(*args):
    (qkv, *_), options, _ = _split(args)
    q, _, _ = thirds(qkv)
    B, T, C = q.shape
    heads = options.num_attn_heads, options.num_lact_heads
    attn, fast = ((B, T, number, C // number) for number in heads)
    attn_v = [q.new_empty(attn)] if options.attn_v else []
    fast_v = [q.new_empty(fast)] if options.silu_v else []
    return (
        q.new_empty(attn),
        q.new_empty(attn),
        attn_v,
        q.new_empty(fast),
        q.new_empty(fast),
        fast_v,
    )


def _setup(ctx, args, output):
    (qkv, *tensors), ctx.options, ctx.backend = _split(args)
    ctx.save_for_backward(*qkv, *tensors)


def _backward(ctx, *grads):
    *qkv, qk_scale, qk_offset, cos, sin = ctx.saved_tensors
    dqkv, dqk_scale, dqk_offset = silu_l2norm_rope_bwd(
        *grads, qkv, qk_scale, qk_offset, cos, sin, *ctx.options, ctx.backend
    )
    rest = (None,) * (2 + len(ctx.options) + 1)  # cos, sin, the options and the backend
    return dqkv, dqk_scale, dqk_offset, *rest


def _recorded(compute, qkv, *args):
    """The outputs, of which attn_v is a view: nothing is written for it, and nothing kept beside qkv."""
    *args, attn_v, backend = args
    outputs = Outputs(*compute(qkv, *args, False, backend))
    if attn_v:
        _, _, v = thirds(qkv)
        outputs = outputs._replace(attn_v=[v.unflatten(-1, outputs.attn_q.shape[2:])])
    return tuple(outputs)


@register_op(
    f"silu_l2norm_rope_fwd({INPUTS}) -> (Tensor attn_q, Tensor attn_k, Tensor[] attn_v, Tensor fast_q,"
    " Tensor fast_k, Tensor[] fast_v)",
    _empty_outputs,
    backward=_backward,
    setup_context=_setup,
    recorded=_recorded,
)
def silu_l2norm_rope_fwd(*args):
    inputs, options, backend = _split(args)
    return tuple(_module(backend).silu_l2norm_rope_fwd(inputs, options))


def _empty_gradients(*args):
    (qkv, qk_scale, qk_offset, *_), _, _ = _split(args[len(Outputs._fields) :])
    dqkv = [x.new_empty(x.shape) for x in qkv]
    return dqkv, qk_scale.new_empty(qk_scale.shape), qk_offset.new_empty(qk_offset.shape)


@register_op(
    "silu_l2norm_rope_bwd(Tensor dattn_q, Tensor dattn_k, Tensor[] dattn_v, Tensor dfast_q, Tensor dfast_k,"
    f" Tensor[] dfast_v, {INPUTS}) -> (Tensor[] dqkv, Tensor dqk_scale, Tensor dqk_offset)",
    _empty_gradients,
)
def silu_l2norm_rope_bwd(*args):
    n = len(Outputs._fields)
    inputs, options, backend = _split(args[n:])
    return tuple(_module(backend).silu_l2norm_rope_bwd(Outputs(*args[:n]), inputs, options))


def _split(args: tuple) -> tuple[Inputs, Options, str]:
    """INPUTS, as the backends take them, and the name of one."""
    n = len(Inputs._fields)
    return Inputs(*args[:n]), Options(*args[n:-1]), args[-1]


def _module(backend: str) -> ModuleType:
    """With the functions of a backend, which is imported only now."""
    if backend == "triton":
        from lact_kernels.triton.layer import silu_l2norm_rope

        return silu_l2norm_rope
    return eager
