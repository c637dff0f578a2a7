"""Ranks that have the chunks in turn: each sends fast weights to the next, and gets their gradients back."""

import bisect
import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.core.call import Call
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.plan import Plan
from lact_kernels.core.ranks import Ranks, remember
from lact_kernels.core.state import TTTState, joined_tokens
from lact_kernels.core.tokens import Tokens
from lact_kernels.distributed.exchange import TokenExchange, exchanged
from lact_kernels.distributed.pending import behind_pending, pending_lengths
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.ops import checks
from lact_kernels.ops.fast_weights import run


class Chain(Ranks):
    """Ranks that follow one another: each sends its fast weights to the next, and gets their gradients back.

    Target norms are not sent, as every rank has the initial weights.

    Args:
        pieces: who holds what.
        receives: the first sequence of this scan began on an earlier rank.
        sends: its last sequence goes on on the next rank.
        packed: the entries of the fast weights are sequences, and not the rows of a batch.
    """

    def __init__(self, pieces: SequencePieces, receives: bool, sends: bool, packed: bool):
        self.pieces, self.receives, self.sends = pieces, receives, sends
        self.last = slice(-1, None) if packed else slice(None)
        self.name = f"across chunks, {pieces.group.group_name}, {receives}, {sends}, {packed}"

    def receive(self, start: FastWeights) -> FastWeights:
        return self._received(start, self.pieces.rank - 1) if self.receives else start

    def send(self, end: FastWeights) -> None:
        if self.sends:
            self._send(end.at(self.last), self.pieces.rank + 1)

    def receive_gradients(self, dend: FastWeights) -> FastWeights:
        if not self.sends:
            return dend
        total = dend.map(torch.clone)
        mine = total.at(self.last)
        theirs = self._received(mine, self.pieces.rank + 1)
        for own, other in zip(mine.updated, theirs.updated):
            own += other
        return total

    def send_gradients(self, dstart: FastWeights) -> None:
        if not self.receives:
            return
        self._send(dstart, self.pieces.rank - 1)
        for x in dstart.updated:
            x.zero_()  # the weights that this rank was given itself have had no part

    def _send(self, x: FastWeights, rank: int) -> None:
        self.pieces.send(torch.cat([part.reshape(-1) for part in x.updated]), rank)

    def _received(self, like: FastWeights, rank: int) -> FastWeights:
        parts = like.updated
        flat = parts[0].new_empty(sum(x.numel() for x in parts))
        self.pieces.receive(flat, rank)
        flats = flat.split([x.numel() for x in parts])
        return like.with_updated([flat.view(x.shape) for flat, x in zip(flats, parts)])


class _Links(NamedTuple):
    """What one rank has to do with the others across chunks. Numbers are those of sequences."""

    halo: TokenExchange  # the tokens of the chunk that is unfinished where each shard begins
    continuing: int | None  # the sequence that has begun on an earlier rank
    from_pending: bool  # the pending tokens of that sequence are in its unfinished chunk, too
    tokens: int  # of this rank in that sequence
    new: range  # the sequences that begin here
    sends: bool  # the last sequence goes on on the next rank
    ends: list[range]  # for each rank, the sequences that end there

    @classmethod
    def of(cls, pieces: SequencePieces, pending, chunk_size: int) -> "_Links":
        borders, wanted, ends, mine = pieces.borders, [], [], None
        N = len(borders) - 1
        for rank, (start, stop) in enumerate(pieces.spans):
            first = bisect.bisect_left(borders, start)  # the first border not before the shard
            continuing = first - 1 if borders[first] > start else None
            new = range(first, bisect.bisect_left(borders, stop, hi=N))
            if rank == pieces.size - 1:  # and those without a token at the end of the row
                new = range(first, N)
            sends = borders[bisect.bisect_left(borders, stop)] > stop
            fetched, from_pending, tokens = 0, False, 0
            if continuing is not None:
                begin, end = borders[continuing : continuing + 2]
                unfinished = (pending[continuing] + start - begin) % chunk_size
                fetched = min(unfinished, start - begin)
                from_pending = unfinished > fetched
                tokens = min(end, stop) - start
            wanted.append([(start - fetched, start)] if fetched else [])
            present = ([] if continuing is None else [continuing]) + list(new)
            done = present[: len(present) - sends]
            ends.append(range(done[0], done[-1] + 1) if done else range(0))
            if rank == pieces.rank:
                mine = (continuing, from_pending, tokens, new, sends)
        return cls(TokenExchange(pieces, wanted), *mine, ends)


def scan_across_chunks(
    call: Call, state: TTTState, pieces: SequencePieces, backend: str
) -> tuple[Tensor, FastWeights | None]:
    """Outputs and end (if asked for, on every rank) of ranks that have the chunks in turn.

    The sequences that begin here are scanned before the one that goes on: the next rank may wait for them.
    """
    q, tokens, options = call.q, call.tokens, call.options
    return_end, C = options.return_end, options.chunk_size
    pending = pending_lengths(state, pieces)
    links = pieces.once(("across", C, pending), lambda: _Links.of(pieces, pending, C))
    halo = None if links.halo.is_empty else exchanged(links.halo, tokens)
    if halo is not None and links.continuing is None:
        # Nothing comes to this rank, but its backward has a part in sending gradients home.
        tokens = tokens._replace(v=torch.cat([halo.v, tokens.v], dim=1))
    lengths = [links.tokens, q.shape[1] - links.tokens]
    q_old, q_new = q.split(lengths, dim=1)
    old_tokens, new_tokens = tokens.split(lengths)
    outputs, ends = [], []

    def scan(q, tokens, rows: slice, ranks: Chain, plan: Tensor | None = None) -> None:
        part = Call(
            q,
            tokens,
            call.start.at(rows),
            plan,
            options._replace(return_end=return_end or ranks.sends),
            remember(ranks),
        )
        o, end = run(part, backend)
        outputs.insert(0, o)
        if return_end and (pieces.packed or not ranks.sends):
            ends.insert(0, end.at(slice(0, -1) if ranks.sends else slice(None)))

    if links.new:
        plan, rows = None, slice(None)
        if pieces.packed:
            plan = pieces.once(
                ("across plan", C, pending, return_end),
                lambda: _packed_plan(pieces, links, pending, call).to_tensor(),
            )
            rows = slice(links.new.start, links.new.stop)
        joined = behind_pending(state, new_tokens, pieces, links.new)
        scan(q_new, joined, rows, Chain(pieces, False, links.sends, pieces.packed), plan)
    if links.continuing is not None:
        n = links.continuing
        joined = old_tokens if halo is None else Tokens.cat([halo, old_tokens])
        if links.from_pending:
            joined = joined_tokens(state.entry(n) if pieces.packed else state, joined)
        rows = slice(n, n + 1) if pieces.packed else slice(None)
        scan(q_old, joined, rows, Chain(pieces, True, links.sends and not links.new, False))
    if not outputs:  # a rank without a token, but with a part in the gradients
        one = slice(0, 1) if pieces.packed else slice(None)
        alone = Call(q, tokens, call.start.at(one), None, options._replace(return_end=False))
        outputs.append(run(alone, backend)[0])
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return o, _shared_ends(ends, o, links.ends, call, pieces) if return_end else None


def _packed_plan(
    pieces: SequencePieces, links: _Links, pending: tuple[int, ...], call: Call
) -> Plan:
    """The chunks of the sequences that begin here; the last one may send what follows its full ones."""
    options = call.options
    borders = [pieces.local_index(b) for b in pieces.borders[links.new.start : links.new.stop + 1]]
    queries = [border - borders[0] for border in borders]
    before = [0, *itertools.accumulate(pending[n] for n in links.new)]
    keys = [query + number for query, number in zip(queries, before)]
    plan = Plan.block_causal(keys, queries, options.chunk_size, options.return_end)
    if links.sends:
        last = Plan.block_causal(keys[-2:], queries[-2:], options.chunk_size, True)
        plan.keys[-1:], plan.queries[-1:] = last
    return plan


def _shared_ends(
    ends: list[FastWeights], o: Tensor, owned: list[range], call: Call, pieces: SequencePieces
) -> FastWeights:
    """The fast weights at the end of every sequence, on every rank."""
    parts = call.start.updated
    N, sizes = len(parts[0]), [x[0].numel() for x in parts]
    if not pieces.packed:  # one rank has the ends of all rows
        owned = [range(N) if ranks else range(0) for ranks in owned]
    mine = [torch.cat([x.flatten(1) for x in end.updated], dim=1) for end in ends]
    flat = torch.cat([parts[0].new_zeros(0, sum(sizes)), *mine])
    if checks.needs_gradient(call.q, *call.tokens, *call.start.to_list()):
        # Every rank has a part in the backward, also one that has no ends.
        flat = flat + o.reshape(-1)[:0].sum().to(flat.dtype)
    flat = _FromOwners.apply(flat, owned, pieces)
    columns = zip(flat.split(sizes, dim=1), parts)
    return call.start.with_updated([x.unflatten(1, part.shape[1:]) for x, part in columns])


class _FromOwners(FirstOrderFunction):
    """Rows of a matrix that each rank has some of, to all; the gradients are summed on the way back."""

    op = "lact_kernels.distributed.block_causal_ttt"

    @staticmethod
    def forward(ctx, mine: Tensor, owned: list[range], pieces: SequencePieces):
        ctx.owned, ctx.pieces = owned, pieces
        out = mine.new_empty(sum(map(len, owned)), mine.shape[1])
        for rank, rows in enumerate(owned):
            if rows:
                part = out[rows.start : rows.stop]
                if rank == pieces.rank:
                    part.copy_(mine)
                dist.broadcast(part, group=pieces.group, group_src=rank)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        dout = dout.clone(memory_format=torch.contiguous_format)
        for rank, rows in enumerate(ctx.owned):
            if rows:
                part = dout[rows.start : rows.stop]
                dist.reduce(part, group=ctx.pieces.group, group_dst=rank)
        mine = ctx.owned[ctx.pieces.rank]
        return dout[mine.start : mine.stop], None, None
