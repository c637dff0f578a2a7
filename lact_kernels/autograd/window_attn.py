"""`window_attn` as a pair of registered ops: what the backward remembers, and what shapes come out.

Both ops are functional and opaque to `torch.compile`. The backward keeps the inputs, the output and
the lse, nothing else.
"""

import torch
from torch import Tensor

from lact_kernels.eager import window_attn as eager
from lact_kernels.ops import checks


@torch.library.custom_op(
    "lact_kernels::window_attn_fwd",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt? window_size, float softmax_scale,"
    " Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
)
def window_attn_fwd(q, k, v, window_size, softmax_scale, cu_seqlens, backend):
    window_size = _clamp_window(window_size, k)
    if backend == "triton":
        from lact_kernels.triton.window_attn_fwd import window_attn_fwd as launch

        return launch(q, k, v, window_size, softmax_scale)
    offsets = None if cu_seqlens is None else checks.packed_offsets(cu_seqlens, q.shape[1])
    return eager.window_attn_fwd(q, k, v, window_size, softmax_scale, offsets)


@window_attn_fwd.register_fake
def _(q, k, v, window_size, softmax_scale, cu_seqlens, backend):
    B, Tq, Hq, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, Tq, Hq, v.shape[-1]), q.new_empty(B, Hq, Tq, dtype=lse_dtype)


@torch.library.custom_op(
    "lact_kernels::window_attn_bwd",
    mutates_args=(),
    schema="(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    " SymInt? window_size, float softmax_scale, Tensor? cu_seqlens, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def window_attn_bwd(do, dlse, q, k, v, o, lse, window_size, softmax_scale, cu_seqlens, backend):
    window_size = _clamp_window(window_size, k)
    if backend == "triton":
        from lact_kernels.triton.window_attn_bwd import window_attn_bwd as launch

        return launch(do, dlse, q, k, v, o, lse, window_size, softmax_scale)
    offsets = None if cu_seqlens is None else checks.packed_offsets(cu_seqlens, q.shape[1])
    return eager.window_attn_bwd(do, dlse, q, k, v, o, lse, window_size, softmax_scale, offsets)


@window_attn_bwd.register_fake
def _(do, dlse, q, k, v, o, lse, window_size, softmax_scale, cu_seqlens, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _clamp_window(window_size: int | None, k: Tensor) -> int:
    """A window beyond the keys sees all of them, and so does none at all."""
    Tk = max(k.shape[1], 1)
    return Tk if window_size is None else min(window_size, Tk)


def _setup_context(ctx, inputs, output):
    q, k, v, window_size, softmax_scale, cu_seqlens, backend = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
    ctx.options = (window_size, softmax_scale)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    grads = window_attn_bwd(do, dlse, q, k, v, o, lse, *ctx.options, cu_seqlens, ctx.backend)
    return (*grads, None, None, None, None)


window_attn_fwd.register_autograd(_backward, setup_context=_setup_context)
