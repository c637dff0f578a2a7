"""Test-time training in Triton: the forward is in `scan`, the backward in `reverse_scan`."""

import sys

import torch
from torch import Tensor

from lact_kernels.core.call import Call
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.tokens import Tokens
from lact_kernels.triton.fast_weights.history import ttt_history
from lact_kernels.triton.fast_weights.reverse_scan import ReverseScan
from lact_kernels.triton.fast_weights.scan import Scan
from lact_kernels.triton.launch import on_device

__all__ = ["ttt_bwd", "ttt_fwd", "ttt_history"]


def ttt_fwd(call: Call) -> tuple[Tensor, FastWeights | None, list[Tensor]]:
    """Outputs `[B, Tq, H, Dv]`, the fast weights after the last update if asked for, and the history."""
    shape = call.q.shape[:2]
    call = _in_one_row(call)
    with on_device(call.q):
        history = arrays = ttt_history(call)
        if not arrays:  # those of the first step only, which say what a segment's are like
            alone = call.options._replace(checkpoint_interval=sys.maxsize)
            arrays = ttt_history(call._replace(options=alone))
        o, end = Scan(call, arrays).forward()
    return o.view(*shape, *o.shape[2:]), end, history


def ttt_bwd(
    call: Call, history: list[Tensor], do: Tensor, dend: FastWeights | None
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of the queries, the tokens and the starting weights."""
    q, k = call.q.shape[:2], call.tokens.k.shape[:2]
    call = _in_one_row(call)
    with on_device(call.q):
        do = do.reshape(*call.q.shape[:3], do.shape[3])
        dq, dtokens, dstart = ReverseScan(call, history).backward(do, dend)
    dtokens = dtokens.map(lambda x: x.view(*k, *x.shape[2:]))
    return dq.view(*q, *dq.shape[2:]), dtokens, dstart


def _in_one_row(call: Call) -> Call:
    """A plan of all rows alike as one of sequences in one row, where the kernels find their tokens."""
    q, tokens, plan = call.q, call.tokens, call.plan
    B = q.shape[0]
    if plan is None or B == 1:
        return call
    if B == 0:
        return call._replace(plan=None)
    row = torch.arange(B, dtype=plan.dtype)[:, None]
    queries, keys = row * q.shape[1], row * tokens.k.shape[1]
    shift = torch.cat([row, torch.zeros_like(row), keys, keys, queries, queries], dim=1)
    plan = (plan[plan[:, 0] >= 0][:, None] + shift).flatten(0, 1)
    return call._replace(q=q.flatten(0, 1)[None], tokens=tokens.as_row(), plan=plan)
