"""Ranks that have the chunks in turn: fast weights go down the chain, their gradients come back up."""

import bisect
import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.core.offsets import ChunkOffsets, Offsets
from lact_kernels.core.ttt_state import TTTState, joined_tokens
from lact_kernels.core.ttt_types import FastWeights, Ranks, Tokens
from lact_kernels.distributed.exchange import TokenExchange, exchanged
from lact_kernels.distributed.pending import behind_pending, pending_lengths
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.scan import Scan, needs_gradient


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
        flats = flat.split([x.numel() for x in parts])
        return _with_parts(like, [flat.view(x.shape) for flat, x in zip(flats, parts)])


def _sent_parts(x: FastWeights) -> list[Tensor]:
    return [*x.weights, *x.masters, *x.buffers]


def _with_parts(x: FastWeights, parts: list[Tensor]) -> FastWeights:
    """With other tensors in the place of `_sent_parts`."""
    rest = iter(parts)
    weights, masters, buffers = (
        tuple(next(rest) for _ in triple) for triple in (x.weights, x.masters, x.buffers)
    )
    return FastWeights(weights, x.norms, masters, buffers)


class _Links(NamedTuple):
    """What one rank has to do with the others across chunks. Numbers are those of sequences."""

    halo: TokenExchange  # the tokens of the chunk that is unfinished where each piece begins
    continuing: int | None  # the sequence that has begun on an earlier rank
    from_pending: bool  # the pending tokens of that sequence are in its unfinished chunk, too
    tokens: int  # of this rank in that sequence
    new: range  # the sequences that begin here
    hands_on: bool  # the last sequence goes on on the next rank
    ends: list[range]  # for each rank, the sequences that end there

    @classmethod
    def of(cls, pieces: SequencePieces, pending, chunk_size: int) -> "_Links":
        borders, wanted, ends, mine = pieces.borders, [], [], None
        N = len(borders) - 1
        for rank, (start, stop) in enumerate(pieces.spans):
            first = bisect.bisect_left(
                borders, start
            )  # the first border that is not before the piece
            continuing = first - 1 if borders[first] > start else None
            new = range(first, bisect.bisect_left(borders, stop, hi=N))
            if rank == pieces.size - 1:  # and those without a token at the end of the row
                new = range(first, N)
            hands_on = borders[bisect.bisect_left(borders, stop)] > stop
            fetched, from_pending, tokens = 0, False, 0
            if continuing is not None:
                begin, end = borders[continuing : continuing + 2]
                unfinished = (pending[continuing] + start - begin) % chunk_size
                fetched = min(unfinished, start - begin)
                from_pending = unfinished > fetched
                tokens = min(end, stop) - start
            wanted.append([(start - fetched, start)] if fetched else [])
            present = ([] if continuing is None else [continuing]) + list(new)
            done = present[: len(present) - hands_on]
            ends.append(range(done[0], done[-1] + 1) if done else range(0))
            if rank == pieces.rank:
                mine = (continuing, from_pending, tokens, new, hands_on)
        return cls(TokenExchange(pieces, wanted), *mine, ends)


def scan_across_chunks(q, tokens: Tokens, state: TTTState, pieces, return_state: bool, how):
    """Outputs and end (if asked for, on every rank) of ranks that have the chunks in turn.

    The sequences that begin here are scanned before the one that goes on: the next rank may wait for them.
    """
    pending = pending_lengths(state, pieces)
    links = pieces.once(
        ("across", state.chunk_size, pending), lambda: _Links.of(pieces, pending, state.chunk_size)
    )
    gradients = needs_gradient(q, tokens, state)
    halo = None if links.halo.is_empty else exchanged(links.halo, tokens)
    if halo is not None and links.continuing is None:
        # Nothing comes to this rank, but its backward has a part in sending gradients home.
        tokens = tokens._replace(v=torch.cat([halo[1], tokens.v], dim=1))
    lengths = [links.tokens, q.shape[1] - links.tokens]
    (q_old, q_new), *split = (
        (None, None) if x is None else x.split(lengths, dim=1) for x in (q, *tokens)
    )
    old_tokens, new_tokens = (Tokens(*x) for x in zip(*split))
    outputs, ends = [], []

    def scan(q, tokens, offsets, rows: slice, receives: bool, hands_on: bool):
        ranks = Chain(pieces, receives, hands_on, packed=offsets is not None)
        return_end = return_state or hands_on
        compute = Scan.of(ranks, offsets, state, return_end, how, gradients)
        o, end = compute(q, tokens, FastWeights(*state[:4]).at(rows))
        outputs.insert(0, o)
        if return_state:
            entries = slice(0, -1) if hands_on and pieces.packed else slice(None)
            if not hands_on or pieces.packed:
                ends.insert(0, end.at(entries))

    if links.new:
        joined = behind_pending(state, new_tokens, pieces, links.new)
        offsets, rows = None, slice(None)
        if pieces.packed:
            offsets = _packed_offsets(pieces, links, pending, state.chunk_size, return_state)
            rows = slice(links.new.start, links.new.stop)
        scan(q_new, joined, offsets, rows, receives=False, hands_on=links.hands_on)
    if links.continuing is not None:
        n = links.continuing
        joined = old_tokens
        if halo is not None:
            columns = zip(halo, joined)
            joined = Tokens(*(None if x is None else torch.cat([h, x], dim=1) for h, x in columns))
        if links.from_pending:
            joined = Tokens(*joined_tokens(state.entry(n) if pieces.packed else state, joined))
        rows = slice(n, n + 1) if pieces.packed else slice(None)
        hands_on = links.hands_on and not links.new
        scan(q_old, joined, None, rows, receives=True, hands_on=hands_on)
    if not outputs:  # a rank without a token, but with a part in the gradients
        one = FastWeights(*state[:4]).at(slice(0, 1) if pieces.packed else slice(None))
        alone = Scan.of(Chain(pieces, False, False, False), None, state, False, how, gradients)
        outputs.append(alone(q, tokens, one)[0])
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    end = _shared_ends(ends, o, links.ends, state, pieces, gradients) if return_state else None
    return o, end


def _packed_offsets(pieces, links: _Links, pending, chunk_size: int, return_state: bool):
    """The chunks of the sequences that begin here; the last one may hand on what follows its full ones."""
    borders = [pieces.local_index(b) for b in pieces.borders[links.new.start : links.new.stop + 1]]
    queries = [border - borders[0] for border in borders]
    before = [0, *itertools.accumulate(pending[n] for n in links.new)]
    keys = [query + number for query, number in zip(queries, before)]
    offsets = ChunkOffsets.of(Offsets(queries, keys), chunk_size, return_state)
    if links.hands_on:
        last = ChunkOffsets.of(Offsets(queries[-2:], keys[-2:]), chunk_size, True)
        offsets.queries[-1:], offsets.keys[-1:] = last
    return offsets


def _shared_ends(ends, o, owned: list[range], state, pieces, gradients: bool) -> FastWeights:
    """The fast weights at the end of every sequence, on every rank."""
    template = FastWeights(*state[:4])
    parts = _sent_parts(template)
    N, sizes = len(parts[0]), [x[0].numel() for x in parts]
    if not pieces.packed:  # one rank has the ends of all rows
        owned = [range(N) if ranks else range(0) for ranks in owned]
    mine = [torch.cat([x.flatten(1) for x in _sent_parts(end)], dim=1) for end in ends]
    flat = torch.cat([parts[0].new_zeros(0, sum(sizes)), *mine])
    if gradients:  # every rank has a part in the backward, also one that has no ends
        flat = flat + o.reshape(-1)[:0].sum().to(flat.dtype)
    flat = _FromOwners.apply(flat, owned, pieces)
    columns = zip(flat.split(sizes, dim=1), parts)
    return _with_parts(template, [x.unflatten(1, part.shape[1:]) for x, part in columns])


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
