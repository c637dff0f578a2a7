"""`window_attn` as a pair of registered ops: what the backward remembers, and what shapes come out.

Both ops are functional and opaque to `torch.compile`. The backward keeps the inputs, the output and
the lse, nothing else.

A query that sees no key, as the first ones of a sequence with more queries than keys, has the output 0, and
as lse -inf, or its sink. `left` and `right` are as in `AttentionOptions`, and `sinks [B, Hq]` in lse's dtype.
`cu_seqlens_q` and `cu_seqlens_k` come together or not at all.
"""

import torch
from torch import Tensor

from lact_kernels.autograd.registration import register_op
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.core.offsets import Offsets, read_borders
from lact_kernels.eager import window_attn as eager
from lact_kernels.eager.masked_attention import Saved, lse_dtype

SCORES = "SymInt? left, SymInt? right, float softmax_scale, float? softcap, Tensor? sinks"
OPTIONS = f"{SCORES}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, str backend"


def empty_outputs(q, k, v, *_):
    """Outputs and lse without values, of all attention."""
    B, Tq, Hq, _ = q.shape
    return q.new_empty(B, Tq, Hq, v.shape[-1]), q.new_empty(B, Hq, Tq, dtype=lse_dtype(q.dtype))


def _empty_gradients(do, dlse, *inputs):
    """Gradients without values. That of no sinks is an empty one, as an op returns tensors."""
    q, k, v, _, lse, *_, sinks, _, _, _ = inputs
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    return *gradients, lse.new_empty(0 if sinks is None else sinks.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, *options, sinks, cu_seqlens_q, cu_seqlens_k, backend = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    *tensors, sinks, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(tensors[3])  # as o
    *grads, dsinks = window_attn_bwd(
        do, dlse, *tensors, *ctx.options, sinks, cu_seqlens_q, cu_seqlens_k, ctx.backend
    )
    of_options = None, None, None, None
    return *grads, *of_options, None if sinks is None else dsinks, None, None, None


@register_op(
    f"window_attn_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)",
    empty_outputs,
    backward=_backward,
    setup_context=_setup_context,
    batched=True,
)
def window_attn_fwd(
    q, k, v, left, right, softmax_scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k, backend
):
    options = AttentionOptions(left, right, softmax_scale, softcap).within(q.shape[1], k.shape[1])
    capturing = cu_seqlens_q is not None and backend == "triton" and _capturing(k)
    if capturing and cu_seqlens_q.is_cpu:
        raise ValueError("cu_seqlens must be on the GPU while a CUDA graph is recorded")
    # The Triton backend takes the borders as they are, once their values are checked.
    offsets = None if capturing else _read_offsets(q, k, cu_seqlens_q, cu_seqlens_k)
    if backend == "triton":
        from lact_kernels.triton.window_attn.fwd import window_attn_fwd as launch

        return launch(q, k, v, options, sinks, cu_seqlens_q, cu_seqlens_k)
    return eager.window_attn_fwd(q, k, v, options, sinks, offsets)


@register_op(
    "window_attn_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" {OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _empty_gradients,
    batched=True,
)
def window_attn_bwd(
    do, dlse, q, k, v, o, lse, left, right, softmax_scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k,
    backend,
):  # fmt: skip
    options = AttentionOptions(left, right, softmax_scale, softcap).within(q.shape[1], k.shape[1])
    if backend == "triton":
        from lact_kernels.triton.window_attn.bwd import window_attn_bwd as launch

        return launch(do, dlse, q, k, v, o, lse, options, sinks, cu_seqlens_q, cu_seqlens_k)
    offsets = _read_offsets(q, k, cu_seqlens_q, cu_seqlens_k)
    return eager.window_attn_bwd(do, dlse, Saved(q, k, v, o, lse), options, sinks, offsets)


def _read_offsets(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Offsets | None:
    """Both borders, checked against the tokens of `q [1, Tq, ..]` and `k [1, Tk, ..]`.

    Where an op is traced no value is known, and so they are read here, inside of it.
    """
    if cu_seqlens_q is None:
        return None
    names = ("cu_seqlens",) if cu_seqlens_q is cu_seqlens_k else ("cu_seqlens_q", "cu_seqlens_k")
    borders = []
    for name, cu_seqlens, x in zip(names, (cu_seqlens_q, cu_seqlens_k), (q, k)):
        borders.append(read_borders(cu_seqlens, name))
        T, end = x.shape[1], borders[-1][-1]
        if end != T:
            raise ValueError(f"{name} must end at T = {T}, got {end}")
    return Offsets(borders[0], borders[-1])


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which no value can be read on the host."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
