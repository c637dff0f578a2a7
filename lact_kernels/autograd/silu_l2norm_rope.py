"""`silu_l2norm_rope` as a pair of registered ops: what the backward remembers, what comes out.

Both are functional and opaque to `torch.compile`. The backward keeps inputs, nothing else: what it needs
beside them costs less to compute again than to read.

`v` is None where the fast weights take it as it is, and with `v` the lists `fast_v` and `dv` hold one
tensor. An op may not return a view of what it is given.
"""

from types import ModuleType

from lact_kernels.autograd.registration import register_op
from lact_kernels.core.silu_l2norm_rope import Inputs, Options, Outputs
from lact_kernels.eager import silu_l2norm_rope as eager

INPUTS = (
    "Tensor q, Tensor k, Tensor? v, Tensor qk_scale, Tensor qk_offset, Tensor cos, Tensor sin,"
    " SymInt num_attn_heads, SymInt num_lact_heads, bool silu, bool rotate_fast, str backend"
)


def _empty_outputs(*args):
    (q, _, v, *_), heads = args[:7], args[7:9]
    B, T, C = q.shape
    attn, fast = ((B, T, number, C // number) for number in heads)
    fast_v = [] if v is None else [q.new_empty(fast)]
    return q.new_empty(attn), q.new_empty(attn), q.new_empty(fast), q.new_empty(fast), fast_v


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx, *grads):
    *grads, dfast_v = grads
    dq, dk, dv, dqk_scale, dqk_offset = silu_l2norm_rope_bwd(
        *grads, dfast_v, *ctx.saved_tensors, *ctx.options
    )
    rest = (None,) * (2 + len(ctx.options))  # cos, sin and the options
    return dq, dk, dv[0] if dv else None, dqk_scale, dqk_offset, *rest


@register_op(
    f"silu_l2norm_rope_fwd({INPUTS})"
    " -> (Tensor attn_q, Tensor attn_k, Tensor fast_q, Tensor fast_k, Tensor[] fast_v)",
    _empty_outputs,
    backward=_backward,
    setup_context=_setup,
)
def silu_l2norm_rope_fwd(*args):
    inputs, options, backend = _read(args)
    return tuple(backend.silu_l2norm_rope_fwd(inputs, options))


def _empty_gradients(*args):
    q, k, v, qk_scale, qk_offset = (x if x is None else x.new_empty(x.shape) for x in args[5:10])
    return q, k, [] if v is None else [v], qk_scale, qk_offset


@register_op(
    "silu_l2norm_rope_bwd(Tensor dattn_q, Tensor dattn_k, Tensor dfast_q, Tensor dfast_k, Tensor[] dfast_v,"
    f" {INPUTS}) -> (Tensor dq, Tensor dk, Tensor[] dv, Tensor dqk_scale, Tensor dqk_offset)",
    _empty_gradients,
)
def silu_l2norm_rope_bwd(*args):
    inputs, options, backend = _read(args[5:])
    return backend.silu_l2norm_rope_bwd(Outputs(*args[:5]), inputs, options)


def _read(args: tuple) -> tuple[Inputs, Options, ModuleType]:
    """INPUTS, and of the backend the module with its functions, which is imported only now."""
    inputs, options = Inputs(*args[:7]), Options(*args[7:-1])
    if args[-1] == "triton":
        from lact_kernels.triton.layer import silu_l2norm_rope

        return inputs, options, silu_l2norm_rope
    return inputs, options, eager
