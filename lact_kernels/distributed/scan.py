"""One rank's part of a scan, as an autograd function around a backend of `block_causal_ttt`."""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.autograd.block_causal_ttt import backend_of
from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.core.offsets import ChunkOffsets
from lact_kernels.core.ttt_types import FastWeights, Ranks, Tokens
from lact_kernels.ops import checks


class Scan(NamedTuple):
    """How this rank computes its part."""

    ranks: Ranks
    offsets: ChunkOffsets | None
    options: tuple  # of the registered op `block_causal_ttt_fwd`, the backend's name last

    @classmethod
    def of(
        cls, ranks, offsets, state, return_end: bool, how: tuple[int, str], gradients: bool
    ) -> "Scan":
        interval, backend = how
        if not gradients:
            interval = 0
        prenorm = len(state.masters) > 0
        options = (state.chunk_size, state.muon, prenorm, return_end, interval, backend)
        return cls(ranks, offsets, options)

    def __call__(
        self, q: Tensor, tokens: Tokens, start: FastWeights
    ) -> tuple[Tensor, FastWeights | None]:
        """Outputs, and with `return_end` the fast weights behind the last update."""
        o, *end = _Scan.apply(self, q, *tokens, *start.to_list())
        return o, FastWeights.from_list(end, self.options[2]) if end else None


class _Scan(FirstOrderFunction):
    op = "lact_kernels.distributed.block_causal_ttt"

    @staticmethod
    def forward(ctx, scan: Scan, q, k, v, lr0, lr1, lr2, momentum, *start):
        backend, options = backend_of(scan.options)
        start = FastWeights.from_list(list(start), options.prenorm)
        start = scan.ranks.receive(start)
        tokens = Tokens(k, v, lr0, lr1, lr2, momentum)
        with torch.autocast(q.device.type, enabled=False):
            o, end, history = backend.block_causal_ttt_fwd(
                q, tokens, start, scan.offsets, options, scan.ranks
            )
        ctx.scan, ctx.num_history = scan, len(history)
        ctx.save_for_backward(q, *tokens, *history, *start.to_list())
        return o, *([] if end is None else end.to_list())

    @staticmethod
    def backward(ctx, do, *dend):
        backend, options = backend_of(ctx.scan.options)
        q, *saved = ctx.saved_tensors
        tokens, saved = Tokens(*saved[:6]), saved[6:]
        history, start = list(saved[: ctx.num_history]), list(saved[ctx.num_history :])
        start = FastWeights.from_list(start, options.prenorm)
        ranks = ctx.scan.ranks
        if dend:
            dend = FastWeights.from_list([x.clone() for x in dend], options.prenorm)
            if ranks.share_chunks:
                ranks.sum_(*dend.to_list())
        with torch.autocast(q.device.type, enabled=False):
            dq, dtokens, dstart = backend.block_causal_ttt_bwd(
                do, dend or None, q, tokens, start, history, ctx.scan.offsets, options, ranks
            )
        return None, dq, *dtokens, *dstart.to_list()


def needs_gradient(q: Tensor, tokens: Tokens, state) -> bool:
    fields = [x for triple in state[:4] for x in triple]
    return checks.needs_gradient(q, *tokens, *fields)
