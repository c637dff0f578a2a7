"""Test-time training in Triton: the forward is in `scan`, the backward in `reverse_scan`."""

import sys

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
    with on_device(call.q):
        history = arrays = ttt_history(call)
        if not arrays:  # those of the first step only, which say what a segment's are like
            alone = call.options._replace(checkpoint_interval=sys.maxsize)
            arrays = ttt_history(call._replace(options=alone))
        o, end = Scan(call, arrays).forward()
    return o, end, history


def ttt_bwd(
    call: Call, history: list[Tensor], do: Tensor, dend: FastWeights | None
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of the queries, the tokens and the starting weights."""
    with on_device(call.q):
        return ReverseScan(call, history).backward(do, dend)
