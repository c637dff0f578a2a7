"""`block_causal_ttt` as a pair of registered ops: what the backward remembers, and what shapes come out.

Fast weights travel through the ops as lists, three tensors (for w0, w1, w2) at a time: weights, target
norms, then masters with pre-norm, then buffers with momentum.

    start    before the first token, `[B, H, ...]`, or `[N, H, ...]` for N packed sequences
    end      the same after the last update; empty unless `return_end`. Packed sequences have no
             end: they are at different places of their chunks
    history  for the backward: weights, masters and steps of every update, `[updates, B, H, ...]`;
             of packed sequences one behind the other

Beside its inputs the backward keeps the history: two (pre-norm: three) copies of the fast weights, in
float32, for each update.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.eager import block_causal_ttt as eager
from lact_kernels.eager.block_causal_ttt import FastWeights, Tokens, Update
from lact_kernels.ops import checks

TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor lr0, Tensor lr1, Tensor lr2, Tensor? momentum,"
    " Tensor[] start, Tensor? cu_seqlens"
)
OPTIONS = "SymInt chunk_size, bool muon, bool prenorm, bool return_end"


def num_updates(Tk: int, chunk_size: int, return_end: bool) -> int:
    """All full chunks, or without an end: the last chunk's update would change no output."""
    return Tk // chunk_size if return_end else max(Tk - 1, 0) // chunk_size


@torch.library.custom_op(
    "lact_kernels::block_causal_ttt_fwd",
    mutates_args=(),
    schema=f"({TENSORS}, {OPTIONS}) -> (Tensor o, Tensor[] end, Tensor[] history)",
)
def block_causal_ttt_fwd(
    q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens, chunk_size, muon, prenorm, return_end
):
    tokens = Tokens(k, v, lr0, lr1, lr2, momentum)
    start = FastWeights.from_list(start, prenorm)
    o = _empty_outputs(q, v)
    history = _empty_history(k, start, cu_seqlens, chunk_size, return_end)
    end = []
    for run in _runs(k, cu_seqlens, chunk_size, return_end):
        run_start = start.at(run.rows)
        out, updates = eager.block_causal_ttt_fwd(
            q[:, run.tokens], tokens.at(run.tokens), run_start, chunk_size, muon, len(run.updates)
        )
        o[:, run.tokens] = out
        for c, update in zip(run.updates, updates):
            for stack, x in zip(history, _flat(update)):
                stack[c] = x
        if return_end:
            end = _flat(updates[-1].after(run_start) if updates else run_start)
    return o, [x.clone() for x in end], history


@block_causal_ttt_fwd.register_fake
def _(q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens, chunk_size, muon, prenorm, return_end):
    history = _empty_history(
        k, FastWeights.from_list(start, prenorm), cu_seqlens, chunk_size, return_end
    )
    return _empty_outputs(q, v), _empty_like(start) if return_end else [], history


@torch.library.custom_op(
    "lact_kernels::block_causal_ttt_bwd",
    mutates_args=(),
    schema=f"(Tensor do, Tensor[] dend, {TENSORS}, Tensor[] history, {OPTIONS})"
    " -> (Tensor dq, Tensor[] dtokens, Tensor[] dstart)",
)
def block_causal_ttt_bwd(
    do, dend, q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens, history,
    chunk_size, muon, prenorm, return_end,
):  # fmt: skip
    tokens = Tokens(k, v, lr0, lr1, lr2, momentum)
    dend = FastWeights.from_list(dend or [torch.zeros_like(x) for x in start], prenorm)
    dq = _empty_like([q])[0]
    dtokens = Tokens(*(None if x is None else _empty_like([x])[0] for x in tokens))
    dstart = FastWeights.from_list(_empty_like(start), prenorm)
    start = FastWeights.from_list(start, prenorm)
    for run in _runs(k, cu_seqlens, chunk_size, return_end):
        updates = [
            Update(tuple(x[:3]), tuple(x[3:-3]), tuple(x[-3:]))
            for x in ([stack[c] for stack in history] for c in run.updates)
        ]
        grads = eager.block_causal_ttt_bwd(
            do[:, run.tokens], dend.at(run.rows), q[:, run.tokens], tokens.at(run.tokens),
            start.at(run.rows), chunk_size, muon, updates,
        )  # fmt: skip
        places = (dq[:, run.tokens], dtokens.at(run.tokens), dstart.at(run.rows))
        for place, grad in zip(_flat(places), _flat(grads)):
            place.copy_(grad)
    return dq, _flat(dtokens), _flat(dstart)


@block_causal_ttt_bwd.register_fake
def _(
    do, dend, q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens, history,
    chunk_size, muon, prenorm, return_end,
):  # fmt: skip
    tokens = [k, v, lr0, lr1, lr2] + ([] if momentum is None else [momentum])
    return _empty_like([q])[0], _empty_like(tokens), _empty_like(start)


def _setup_context(ctx, inputs, output):
    q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens, *ctx.options = inputs
    o, end, history = output
    ctx.num_start = len(start)
    ctx.save_for_backward(q, k, v, lr0, lr1, lr2, momentum, cu_seqlens, *start, *history)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dend, _dhistory):
    q, k, v, lr0, lr1, lr2, momentum, cu_seqlens, *lists = ctx.saved_tensors
    start, history = lists[: ctx.num_start], lists[ctx.num_start :]
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    if dend:
        dend = [torch.zeros_like(x) if g is None else g for x, g in zip(start, dend)]
    tensors = (q, k, v, lr0, lr1, lr2, momentum, start, cu_seqlens)
    dq, dtokens, dstart = block_causal_ttt_bwd(do, dend or [], *tensors, history, *ctx.options)
    dmomentum = dtokens[5] if momentum is not None else None
    return dq, *dtokens[:5], dmomentum, dstart, None, None, None, None, None


block_causal_ttt_fwd.register_autograd(_backward, setup_context=_setup_context)


class _Run(NamedTuple):
    """Rows that are scanned together: the whole batch, or one packed sequence."""

    rows: slice  # of the fast weights
    tokens: slice
    updates: range  # in the history


def _runs(
    k: Tensor, cu_seqlens: Tensor | None, chunk_size: int, return_end: bool
) -> Iterator[_Run]:
    if cu_seqlens is None:
        updates = range(num_updates(k.shape[1], chunk_size, return_end))
        yield _Run(slice(None), slice(None), updates)
        return
    offsets = checks.packed_offsets(cu_seqlens, k.shape[1])
    first = 0
    for n, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        updates = range(first, first + num_updates(stop - start, chunk_size, return_end))
        yield _Run(slice(n, n + 1), slice(start, stop), updates)
        first = updates.stop


def _empty_history(
    k: Tensor, start: FastWeights, cu_seqlens: Tensor | None, chunk_size: int, return_end: bool
) -> list[Tensor]:
    """Room for every update. What packed sequences need is known by its upper bound, T // chunk_size."""
    B, Tk = k.shape[:2]
    packed = cu_seqlens is not None
    updates = Tk // chunk_size if packed else num_updates(Tk, chunk_size, return_end)
    like = [*start.weights, *start.masters, *start.weights]
    return [x.new_zeros(updates, B, *x.shape[1:]) for x in like]


def _empty_outputs(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous, whatever the strides of the originals."""
    return [x.new_empty(x.shape) for x in tensors]


def _flat(tree) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(tree, tuple):
        return [x for branch in tree for x in _flat(branch)]
    return [] if tree is None else [tree]
