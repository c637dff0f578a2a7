"""One rank's part of a scan as an autograd function, and the two ways in which ranks take part in one."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.autograd.block_causal_ttt import backend_of
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import INFERENCE_INTERVAL
from lact_kernels.ops.offsets import ChunkOffsets
from lact_kernels.ops.ttt_types import FastWeights, Ranks, Tokens


class SharedChunks(Ranks):
    """Ranks that have a part of each chunk's tokens: the weight gradients are summed before each update.

    All of them then make the same updates. Of the gradients that they know alike, the first rank gives all.
    """

    share_chunks = True

    def __init__(self, pieces: SequencePieces):
        self.group, self.is_first = pieces.group, pieces.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0], group=self.group)
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat, group=self.group)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view(x.shape))

    def part(self, x: Tensor) -> Tensor:
        return x if self.is_first else torch.zeros_like(x)


class Chain(Ranks):
    """Ranks that follow one another: fast weights are handed on to the next, their gradients handed back.

    Target norms are not sent, as every rank has the initial weights.

    Args:
        pieces: who holds what.
        receives: the first sequence of this scan began on an earlier rank.
        hands_on: its last sequence goes on on the next rank.
        packed: the entries of the fast weights are sequences, and not the rows of a batch.
    """

    def __init__(self, pieces: SequencePieces, receives: bool, hands_on: bool, packed: bool):
        self.pieces, self.receives, self.hands_on = pieces, receives, hands_on
        self.last = slice(-1, None) if packed else slice(None)

    def receive(self, start: FastWeights) -> FastWeights:
        """The fast weights before the first chunk: `start`, or what the rank before hands on."""
        return self._received(start, self.pieces.rank - 1) if self.receives else start

    def hand_on(self, end: FastWeights) -> None:
        if self.hands_on:
            self._send(end.at(self.last), self.pieces.rank + 1)

    def handed_back(self, dend: FastWeights) -> FastWeights:
        if not self.hands_on:
            return dend
        mine = dend.at(self.last)
        theirs = self._received(mine, self.pieces.rank + 1)
        for own, other in zip(mine.to_list(), theirs.to_list()):
            if own is not other:  # as the norms are
                own += other
        return dend

    def hand_back(self, dstart: FastWeights) -> None:
        if not self.receives:
            return
        self._send(dstart, self.pieces.rank - 1)
        for x in _sent_parts(dstart):
            x.zero_()  # the weights that this rank was given itself have had no part

    def _send(self, x: FastWeights, rank: int) -> None:
        self.pieces.send(torch.cat([part.reshape(-1) for part in _sent_parts(x)]), rank)

    def _received(self, like: FastWeights, rank: int) -> FastWeights:
        parts = _sent_parts(like)
        flat = parts[0].new_empty(sum(x.numel() for x in parts))
        self.pieces.receive(flat, rank)
        parts = iter(flat.split([x.numel() for x in parts]))
        weights, masters, buffers = (
            tuple(next(parts).view(x.shape) for x in triple)
            for triple in (like.weights, like.masters, like.buffers)
        )
        return FastWeights(weights, like.norms, masters, buffers)


def _sent_parts(x: FastWeights) -> list[Tensor]:
    return [*x.weights, *x.masters, *x.buffers]


class Scan(NamedTuple):
    """How this rank computes its part."""

    ranks: SharedChunks | Chain
    offsets: ChunkOffsets | None
    options: tuple  # of the registered op `block_causal_ttt_fwd`, the backend's name last

    @classmethod
    def of(
        cls, ranks, offsets, state, return_end: bool, how: tuple[int, str], gradients: bool
    ) -> "Scan":
        interval, backend = how
        if not gradients:
            interval = max(interval, INFERENCE_INTERVAL)
        prenorm = len(state.masters) > 0
        options = (state.chunk_size, state.muon, prenorm, return_end, interval, backend)
        return cls(ranks, offsets, options)

    def __call__(
        self, q: Tensor, tokens: Tokens, start: FastWeights
    ) -> tuple[Tensor, FastWeights | None]:
        """Outputs, and with `return_end` the fast weights behind the last update."""
        o, *end = _Scan.apply(self, q, *tokens, *start.to_list())
        return o, FastWeights.from_list(end, self.options[2]) if end else None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan: Scan, q, k, v, lr0, lr1, lr2, momentum, *start):
        backend, options = backend_of(scan.options)
        start = FastWeights.from_list(list(start), options.prenorm)
        if isinstance(scan.ranks, Chain):
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
