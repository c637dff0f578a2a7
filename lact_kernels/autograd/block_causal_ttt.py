"""`block_causal_ttt` as a pair of registered ops: what the backward remembers, and what shapes come out.

Fast weights travel through the ops as lists, three tensors (for w0, w1, w2) at a time: weights, target
norms, then masters with pre-norm, then buffers with momentum.

    start    before the first token, `[B, H, ...]`, or `[N, H, ...]` for N packed sequences
    end      the same after each sequence's last update; empty unless `return_end`
    history  what the backend's backward needs beside its inputs; only the backend can read it. It is empty
             with a checkpoint interval of 0, where no backward will come

A backend is a module with the three functions `block_causal_ttt_fwd`, `block_causal_ttt_bwd` and
`block_causal_ttt_history` of `lact_kernels.eager.block_causal_ttt`. What they return is contiguous and
shares no memory with what they are given.
"""

from types import ModuleType

import torch
from torch import Tensor

from lact_kernels.autograd.autocast import register_autocast
from lact_kernels.autograd.derivatives import register_derivatives
from lact_kernels.autograd.vmap import register_vmap
from lact_kernels.core.offsets import ChunkOffsets, read_offsets
from lact_kernels.core.ttt_types import FastWeights, Options, Tokens

NO_HISTORY = (
    "lact_kernels::block_causal_ttt_fwd kept nothing for a backward: where it was called, or exported,"
    " nothing needed a gradient"
)
TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor lr0, Tensor lr1, Tensor lr2, Tensor? momentum,"
    " Tensor[] start, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
OPTIONS = (
    "SymInt chunk_size, bool muon, bool prenorm, bool return_end, SymInt checkpoint_interval,"
    " str backend"
)


@torch.library.custom_op(
    "lact_kernels::block_causal_ttt_fwd",
    mutates_args=(),
    schema=f"({TENSORS}, {OPTIONS}) -> (Tensor o, Tensor[] end, Tensor[] history)",
)
def block_causal_ttt_fwd(
    q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens_q, cu_seqlens_k, *options
):
    backend, options = backend_of(options)
    o, end, history = backend.block_causal_ttt_fwd(
        q,
        Tokens(k, v, lr0, lr1, lr2, momentum),
        FastWeights.from_list(start, options.prenorm),
        _chunk_offsets(q, k, cu_seqlens_q, cu_seqlens_k, options),
        options,
    )
    return o, [] if end is None else end.to_list(), history


@block_causal_ttt_fwd.register_fake
def _(q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens_q, cu_seqlens_k, *options):
    backend, options = backend_of(options)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    end = _empty_like(start) if options.return_end else []
    if torch.compiler.is_exporting():
        # A program has the op as one call, whose backward alone reads the history. With the number of
        # chunks in its shape, the program would hold for some lengths only.
        return o, end, []
    start = FastWeights.from_list(start, options.prenorm)
    history = backend.block_causal_ttt_history(k, start, cu_seqlens_k is not None, options)
    return o, end, history


@torch.library.custom_op(
    "lact_kernels::block_causal_ttt_bwd",
    mutates_args=(),
    schema=f"(Tensor do, Tensor[] dend, Tensor[] history, {TENSORS}, {OPTIONS})"
    " -> (Tensor dq, Tensor[] dtokens, Tensor[] dstart)",
)
def block_causal_ttt_bwd(
    do, dend, history,
    q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens_q, cu_seqlens_k, *options,
):  # fmt: skip
    backend, options = backend_of(options)
    dq, dtokens, dstart = backend.block_causal_ttt_bwd(
        do,
        FastWeights.from_list(dend, options.prenorm) if dend else None,
        q,
        Tokens(k, v, lr0, lr1, lr2, momentum),
        FastWeights.from_list(start, options.prenorm),
        history,
        _chunk_offsets(q, k, cu_seqlens_q, cu_seqlens_k, options),
        options,
    )
    return dq, [x for x in dtokens if x is not None], dstart.to_list()


@block_causal_ttt_bwd.register_fake
def _(
    do, dend, history,
    q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens_q, cu_seqlens_k, *options,
):  # fmt: skip
    tokens = [k, v, lr0, lr1, lr2] + ([] if momentum is None else [momentum])
    return q.new_empty(q.shape), _empty_like(tokens), _empty_like(start)


def _setup_context(ctx, inputs, output):
    *tokens, start, cu_seqlens_q, cu_seqlens_k = inputs[:10]
    _, _, history = output
    ctx.num_start = len(start)
    ctx.options = inputs[10:]
    ctx.save_for_backward(*tokens, cu_seqlens_q, cu_seqlens_k, *start, *history)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dend, _dhistory):
    saved = ctx.saved_tensors  # a checkpoint unpacks them once
    *tokens, cu_seqlens_q, cu_seqlens_k = saved[:9]
    lists = saved[9:]
    start, history = lists[: ctx.num_start], lists[ctx.num_start :]
    if not history:
        raise RuntimeError(NO_HISTORY)
    q, _, v, *_, momentum = tokens
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    if dend:
        dend = [torch.zeros_like(x) if g is None else g for x, g in zip(start, dend)]
    dq, dtokens, dstart = block_causal_ttt_bwd(
        do, dend or [], history, *tokens, start, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    dmomentum = dtokens[5] if momentum is not None else None
    return dq, *dtokens[:5], dmomentum, dstart, None, None, *(None for _ in ctx.options)


register_derivatives(block_causal_ttt_fwd, _backward, _setup_context)
register_derivatives(block_causal_ttt_bwd)
register_vmap(block_causal_ttt_fwd, batched=True)
register_vmap(block_causal_ttt_bwd, batched=True)
register_autocast("block_causal_ttt_fwd", cast_inputs=False)
register_autocast("block_causal_ttt_bwd", cast_inputs=False)


def backend_of(options: tuple) -> tuple[ModuleType, Options]:
    """The chosen backend, imported only now, and what it is to do."""
    *options, backend = options
    if backend == "triton":
        from lact_kernels.triton.fast_weights import block_causal_ttt
    else:
        from lact_kernels.eager import block_causal_ttt
    return block_causal_ttt, Options(*options)


def _chunk_offsets(q, k, cu_seqlens_q, cu_seqlens_k, options: Options) -> ChunkOffsets | None:
    offsets = read_offsets(q, k, cu_seqlens_q, cu_seqlens_k)
    if offsets is None:
        return None
    return ChunkOffsets.of(offsets, options.chunk_size, options.return_end)


def _empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous, whatever the strides of the originals."""
    return [x.new_empty(x.shape) for x in tensors]
