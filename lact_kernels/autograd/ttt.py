"""Test-time training as registered ops: what the backward remembers, and what shapes come out.

Fast weights travel through the ops as lists, three tensors (for w0, w1, w2) at a time: weights, target
norms, then masters with pre-norm, then buffers with momentum.

    start    before the first token, `[B, H, ...]`, or `[N, H, ...]` for N packed sequences; the weights alone
             where all else follows from them
    end      the same after each sequence's last update; empty unless `return_end`
    plan     the updates, and the queries of each version of the weights, see `core/plan.py`; made once, by
             `packed_plan` where a compiled program cannot know the borders of packed sequences
    muon     the coefficients of Newton-Schulz as text, three for each step; None without Muon
    ranks    the name of those among which the call is split, see `core/ranks.py`; "" for none
    history  what the backend's backward needs beside its inputs; only the backend can read it. It is empty
             with a checkpoint interval of 0, where no backward will come. Behind it are the fast weights that
             another rank has sent, if one has

A backend is a module with the three functions `ttt_fwd`, `ttt_bwd` and `ttt_history` of
`lact_kernels.eager.ttt`. What they return is contiguous and shares no memory with what they are given.
"""

from types import ModuleType

import torch
from torch import Tensor

from lact_kernels.autograd.registration import register_op
from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.offsets import packed_offsets
from lact_kernels.core.plan import Plan
from lact_kernels.core.ranks import named
from lact_kernels.core.tokens import Tokens
from lact_kernels.eager import ttt as eager

NO_HISTORY = (
    "lact_kernels::ttt_fwd kept nothing for a backward: where it was called, or exported,"
    " nothing needed a gradient"
)
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? lr0, Tensor? lr1, Tensor? lr2, Tensor? momentum,"
    " Tensor[] start, Tensor? plan, SymInt chunk_size, str? muon, bool prenorm, bool weight_norm,"
    " bool momentum_after_muon, bool return_end, SymInt checkpoint_interval, str backend, str ranks"
)
NUM_TENSORS = 7  # before the start


def _plan_rows(cu_seqlens: Tensor, T: int, chunk_size: int) -> int:
    return cu_seqlens.shape[0] - 1 + T // chunk_size


@register_op(
    "packed_plan(Tensor cu_seqlens, SymInt T, SymInt chunk_size, bool return_end) -> Tensor",
    lambda cu_seqlens, T, chunk_size, return_end: cu_seqlens.new_empty(
        _plan_rows(cu_seqlens, T, chunk_size), 6, device="cpu"
    ),
)
def packed_plan(cu_seqlens: Tensor, T: int, chunk_size: int, return_end: bool) -> Tensor:
    """The plan of sequences of T tokens in all, whose borders are read and checked here.

    It has as many rows as any sequences of T tokens need, since in a compiled program shapes cannot depend
    on values.
    """
    offsets = packed_offsets(cu_seqlens, T)
    plan = Plan.block_causal(offsets, offsets, chunk_size, return_end)
    return plan.to_tensor(_plan_rows(cu_seqlens, T, chunk_size))


def _empty_outputs(*inputs):
    call, backend = _call(inputs)
    q, tokens, start, _, options, _ = call
    o = q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    end = start.empty_end(options.prenorm, options.momentum) if options.return_end else []
    if torch.compiler.is_exporting():
        # A program has the op as one call, whose backward alone reads the history. With the number of
        # chunks in its shape, the program would hold for some lengths only.
        return o, end, []
    return o, end, backend.ttt_history(call)


def _setup_context(ctx, inputs, output):
    start, plan = inputs[NUM_TENSORS : NUM_TENSORS + 2]
    ctx.num_start = len(start)
    ctx.options = inputs[NUM_TENSORS + 2 :]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], plan, *start, *output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dend, _dhistory):
    saved = ctx.saved_tensors  # a checkpoint unpacks them once
    tensors, plan, lists = saved[:NUM_TENSORS], saved[NUM_TENSORS], saved[NUM_TENSORS + 1 :]
    start, history = lists[: ctx.num_start], lists[ctx.num_start :]
    if not history:
        raise RuntimeError(NO_HISTORY)
    q, _, v, *_ = tensors
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    if dend:
        prenorm = ctx.options[2]
        end = FastWeights.from_list(start, prenorm).empty_end(prenorm, tensors[-1] is not None)
        dend = [x.zero_() if g is None else g for x, g in zip(end, dend)]
    dq, dtokens, dstart = ttt_bwd(do, dend or [], history, *tensors, start, plan, *ctx.options)
    given = iter(dtokens)
    dtokens = (None if x is None else next(given) for x in tensors[1:])
    return dq, *dtokens, dstart, None, *(None for _ in ctx.options)


@register_op(
    f"ttt_fwd({INPUTS}) -> (Tensor o, Tensor[] end, Tensor[] history)",
    _empty_outputs,
    backward=_backward,
    setup_context=_setup_context,
    batched=True,
)
def ttt_fwd(*inputs):
    call, backend = _call(inputs)
    start = named(call.ranks).receive(call.start)
    o, end, history = backend.ttt_fwd(call._replace(start=start))
    received = [] if start is call.start else [x.clone() for x in start.updated]
    return o, [] if end is None else end.to_list(), [*history, *received]


def _empty_gradients(do, dend, history, *inputs):
    q, *tokens = (x for x in inputs[:NUM_TENSORS] if x is not None)
    start = inputs[NUM_TENSORS]
    return q.new_empty(q.shape), _empty_like(tokens), _empty_like(start)


@register_op(
    f"ttt_bwd(Tensor do, Tensor[] dend, Tensor[] history, {INPUTS})"
    " -> (Tensor dq, Tensor[] dtokens, Tensor[] dstart)",
    _empty_gradients,
    batched=True,
)
def ttt_bwd(do, dend, history, *inputs):
    call, backend = _call(inputs)
    ranks = named(call.ranks)
    if ranks.receives:
        received = len(call.start.updated)
        history, start = history[:-received], call.start.with_updated(history[-received:])
        call = call._replace(start=start)
    if dend:
        dend = ranks.sum_gradients(FastWeights.from_list(dend, call.options.prenorm))
    dq, dtokens, dstart = backend.ttt_bwd(call, history, do, dend or None)
    return dq, [x for x in dtokens if x is not None], dstart.to_list()


def _call(inputs: tuple) -> tuple[Call, ModuleType]:
    """What an op is asked to compute, and the backend, imported only now."""
    q, *tokens, start, plan = inputs[: NUM_TENSORS + 2]
    chunk_size, muon, prenorm, *rest, backend, ranks = inputs[NUM_TENSORS + 2 :]
    tokens, start = Tokens(*tokens), FastWeights.from_list(start, prenorm)
    muon = muon is not None and NewtonSchulz.of_text(muon)
    options = Options(chunk_size, muon, prenorm, tokens.momentum is not None, *rest)
    call = Call(q, tokens, start, plan, options, ranks)
    if backend == "triton":
        from lact_kernels.triton.fast_weights import ttt

        return call, ttt
    return call, eager


def _empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous, whatever the strides of the originals."""
    return [x.new_empty(x.shape) for x in tensors]
