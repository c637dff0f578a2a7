"""`block_causal_ttt` of sequences in pieces, in two ways.

*Across chunks.* Each rank scans the chunks of its piece, and hands the fast weights on to the next before it
applies its queries. Scans follow one another; all else is parallel, and so are different layers: while a
rank waits for the fast weights of one, those before it are in the next. The tokens of a chunk that has begun
on an earlier rank are fetched from there.

*Within chunks.* Each rank has a part of the tokens of a chunk. The weight gradients are summed over the
ranks, once per chunk, and every rank makes the same update.
"""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.distributed.exchange import TokenExchange, exchanged
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.scan import Chain, Scan, SharedChunks, needs_gradient
from lact_kernels.ops import block_causal_ttt as ops
from lact_kernels.ops import checks
from lact_kernels.ops.offsets import ChunkOffsets, Offsets
from lact_kernels.ops.ttt_state import TTTState, TTTTokens
from lact_kernels.ops.ttt_types import FastWeights, Tokens, num_updates

SCHEMES = ("auto", "across_chunks", "within_chunks")


def block_causal_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    *,
    pieces: SequencePieces,
    scheme: str = "auto",
    chunk_size: int = 2048,
    momentum: Tensor | None = None,
    muon: bool = False,
    prenorm: bool = False,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    checkpoint_interval: int = 1,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TTTState]:
    """`lact_kernels.block_causal_ttt` of sequences that the ranks of a mesh hold in pieces.

    Every rank gives its own t tokens, and gets their outputs. All ranks must call it, and all must run the
    backward if one does.

    Args:
        q: queries of this rank's tokens, `[B, t, H, Dk]`.
        k: their keys, `[B, t, H, Dk]`.
        v: their values, `[B, t, H, Dv]`.
        w0, w1, w2: the initial weights, the same on every rank. `[H, ...]` as in
            `lact_kernels.block_causal_ttt`, or `[N, H, ...]` with one set for each batch row or each packed
            sequence of the whole row.
        lr0, lr1, lr2: learning rates of this rank's tokens, `[B, t, H]`.
        pieces: who holds which tokens, with the borders of packed sequences if there are any.
        scheme: `"across_chunks"` for contiguous pieces: a rank receives and sends 3 H Dh D float32 weights
            (twice that with pre-norm or momentum, three times with both) for each row, and as many gradients
            in the backward, and the tokens of an unfinished chunk. `"within_chunks"` for any pieces: one
            all-reduce of 3 H Dh D float32 per chunk and row in each direction, and one of the chunks' mean
            momentum. `"auto"` is across chunks where there are at least as many chunks as ranks.
        momentum: of this rank's tokens, `[B, t, H]`.
        initial_state: go on where an earlier call stopped; the same on every rank. The rows of a batch must
            stand at the same place of their chunks.
        return_state: also return the state after the last token, whole on every rank. It is sent to all, and
            so are the tokens of unfinished chunks.
        chunk_size, muon, prenorm, checkpoint_interval, backend: as in `lact_kernels.block_causal_ttt`. With a
            checkpoint interval in the scheme within chunks the backward repeats the all-reduces of the scan.

    Returns:
        The outputs `[B, t, H, Dv]`, and with `return_state` the `TTTState`. Gradients are exact, and the
        objective is the sum of what the ranks derive. What is the same on every rank (weights, states) gets
        on each rank a part of its gradient, whose sum over the ranks is the whole; use a returned state
        alike on all ranks.

    Raises:
        TypeError, ValueError: as `lact_kernels.block_causal_ttt`, or what the ranks give does not fit
            together.
        RuntimeError: a wrong argument on another rank, or a rank that does not answer within the timeout of
            the process group.

    Source: arXiv 2505.23884, section 3.4 (context parallelism), for the scheme within chunks.
    """
    tokens, weights = Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2)

    def facts():
        checks.check_floating("q", q, "[B, T, H, Dk]")
        rows = len(pieces.borders) - 1 if pieces.packed else q.shape[0]
        ops.check_call(
            q, tokens, weights, rows, initial_state, chunk_size, muon, prenorm, checkpoint_interval
        )
        checks.check_flag("return_state", return_state)
        checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0))
        _check_pieces(q, pieces, scheme, chunk_size, initial_state)
        given = initial_state or weights
        fields = [x for triple in given[:4] for x in triple] if initial_state else weights
        return {
            "q": (q.shape[0], *q.shape[2:]),
            "v": tuple(v.shape[2:]),
            "dtype": str(q.dtype),
            "weights": tuple(tuple(w.shape) for w in weights),
            "chunk_size": chunk_size,
            "muon": muon,
            "prenorm": prenorm,
            "momentum": momentum is not None,
            "scheme": scheme,
            "initial_state": initial_state and initial_state.pending_lengths,
            "return_state": return_state,
            "gradients": checks.needs_gradient(q, *tokens, *fields),
        }

    pieces.agree("block_causal_ttt", facts)
    backend = checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0))
    N = len(pieces.borders) - 1 if pieces.packed else q.shape[0]
    state = initial_state or ops.new_state(weights, N, tokens, chunk_size, muon, prenorm)
    if scheme == "auto":
        contiguous = pieces.chunk_size is None
        across = contiguous and pieces.num_tokens >= pieces.size * chunk_size
        scheme = "across_chunks" if across else "within_chunks"
    scan = _scan_across if scheme == "across_chunks" else _scan_within
    o, end = scan(q, tokens, state, pieces, return_state, (checkpoint_interval, backend))
    if not return_state:
        return o
    return o, _end_state(state, end, tokens, pieces)


def _check_pieces(q, pieces, scheme, chunk_size, state) -> None:
    if q.shape[1] != pieces.num_local_tokens:
        raise ValueError(
            f"q must have the {pieces.num_local_tokens} tokens of this rank's piece, got"
            f" {tuple(q.shape)}"
        )
    if pieces.packed and q.shape[0] != 1:
        raise ValueError(f"packed sequences need B = 1, got q with B = {q.shape[0]}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    pending = () if state is None else state.pending_lengths
    if not pieces.packed and len(set(pending)) > 1:
        raise ValueError(
            "the rows of initial_state must stand at the same place of their chunks, got"
            f" {pending} pending tokens"
        )
    if pieces.chunk_size is not None:
        if scheme == "across_chunks":
            raise ValueError(f"scheme='across_chunks' needs contiguous pieces, got {pieces}")
        if pieces.chunk_size != chunk_size:
            raise ValueError(
                f"pieces are of chunks of {pieces.chunk_size} tokens, and chunk_size is {chunk_size}"
            )
        if any(pending):
            raise ValueError(
                f"initial_state must end with a full chunk for pieces of chunks, got {pending}"
                " pending tokens"
            )


def _scan_within(q, tokens: Tokens, state: TTTState, pieces, return_state: bool, how):
    """Outputs and end (if asked for) of ranks that share the chunks. The first has the pending tokens."""
    B, t = q.shape[:2]
    pending = _pending_lengths(state, pieces)
    offsets = pieces.once(
        ("within", state.chunk_size, pending, return_state),
        lambda: _shared_offsets(pieces, pending, state.chunk_size, return_state),
    )
    if any(pending) and pieces.rank == 0:
        tokens = _behind_pending(state, tokens, pieces, range(len(pending)))
    if how[1] == "triton" and B > 1:  # whose kernels find chunks of such borders in one row only
        q, tokens, offsets = _as_one_row(q, tokens, offsets)
    gradients = needs_gradient(q, tokens, state)
    scan = Scan.of(SharedChunks(pieces), offsets, state, return_state, how, gradients)
    o, end = scan(q, tokens, FastWeights(*state[:4]))
    return o.view(B, t, *o.shape[2:]), end


def _shared_offsets(pieces, pending, chunk_size: int, return_end: bool) -> ChunkOffsets:
    """Where the chunks of every sequence are among this rank's tokens."""
    queries, keys, shift = [], [], 0
    for (start, stop), before in zip(itertools.pairwise(pieces.borders), pending):
        updates = num_updates(before + stop - start, chunk_size, return_end)
        firsts = (start - before + c * chunk_size for c in range(updates + 1))
        places = [*(min(max(first, start), stop) for first in firsts), stop]
        borders = [pieces.local_index(place) for place in places]
        queries.append(borders)
        if pieces.rank > 0:
            before = 0
        keys.append([borders[0] + shift, *(border + shift + before for border in borders[1:])])
        shift += before
    return ChunkOffsets(queries, keys)


def _as_one_row(q, tokens: Tokens, offsets: ChunkOffsets):
    B = q.shape[0]

    def repeated(borders: list[int], t: int) -> list[list[int]]:
        return [[border + b * t for border in borders] for b in range(B)]

    (queries,), (keys,) = offsets
    offsets = ChunkOffsets(repeated(queries, q.shape[1]), repeated(keys, tokens.k.shape[1]))
    tokens = Tokens(*(None if x is None else x.flatten(0, 1)[None] for x in tokens))
    return q.flatten(0, 1)[None], tokens, offsets


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
        sequences = list(enumerate(itertools.pairwise(pieces.borders)))
        wanted, ends, mine = [], [], None
        for rank, (start, stop) in enumerate(pieces.spans):
            is_last = rank == pieces.size - 1
            continuing = next((n for n, (a, b) in sequences if a < start < b), None)
            here = [
                n
                for n, (a, _) in sequences
                if start <= a < stop or (is_last and a == pieces.num_tokens)
            ]
            new = range(here[0], here[-1] + 1) if here else range(0)
            hands_on = any(a < stop < b for _, (a, b) in sequences)
            fetched, from_pending, tokens = 0, False, 0
            if continuing is not None:
                begin, end = sequences[continuing][1]
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


def _scan_across(q, tokens: Tokens, state: TTTState, pieces, return_state: bool, how):
    """Outputs and end (if asked for, on every rank) of ranks that have the chunks in turn.

    The sequences that begin here are scanned before the one that goes on: the next rank may wait for them.
    """
    pending = _pending_lengths(state, pieces)
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
        joined = _behind_pending(state, new_tokens, pieces, links.new)
        offsets, rows = None, slice(None)
        if pieces.packed:
            offsets = _packed_offsets(pieces, links, pending, state.chunk_size, return_state)
            rows = slice(links.new.start, links.new.stop)
        scan(q_new, joined, offsets, rows, receives=False, hands_on=links.hands_on)
    if links.continuing is not None:
        n = links.continuing
        before = [] if halo is None else [halo]
        if links.from_pending:
            before.insert(0, _pending(state, n if pieces.packed else None))
        joined = Tokens(
            *(None if x[0] is None else torch.cat(x, dim=1) for x in zip(*before, old_tokens))
        )
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
    parts = [*template.weights, *template.masters, *template.buffers]
    N, sizes = len(parts[0]), [x[0].numel() for x in parts]
    if not pieces.packed:  # one rank has the ends of all rows
        owned = [range(N) if ranks else range(0) for ranks in owned]
    mine = [
        torch.cat([x.flatten(1) for x in (*e.weights, *e.masters, *e.buffers)], dim=1) for e in ends
    ]
    flat = torch.cat([parts[0].new_zeros(0, sum(sizes)), *mine])
    if gradients:  # every rank has a part in the backward, also one that has no ends
        flat = flat + o.reshape(-1)[:0].sum().to(flat.dtype)
    flat = _FromOwners.apply(flat, owned, pieces)
    columns = iter(x.unflatten(1, p.shape[1:]) for x, p in zip(flat.split(sizes, dim=1), parts))
    weights, masters, buffers = (
        tuple(next(columns) for _ in triple)
        for triple in (template.weights, template.masters, template.buffers)
    )
    return FastWeights(weights, template.norms, masters, buffers)


class _FromOwners(torch.autograd.Function):
    """Rows of a matrix that each rank has some of, to all; the gradients are summed on the way back."""

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


def _end_state(state: TTTState, end: FastWeights, tokens: Tokens, pieces) -> TTTState:
    """The state after the last token: `end`, and the tokens of chunks that are not full."""
    C, pending = state.chunk_size, _pending_lengths(state, pieces)
    spans = list(itertools.pairwise(pieces.borders))
    lengths = [stop - start for start, stop in spans]
    left = [(before + length) % C for before, length in zip(pending, lengths)]
    fetched = [min(rest, length) for rest, length in zip(left, lengths)]
    new = TTTState(*end, (), *state[5:])
    if not any(left):
        return new

    def exchange():
        wanted = [(stop - n, stop) for (_, stop), n in zip(spans, fetched) if n]
        return TokenExchange(pieces, [wanted] * pieces.size)

    exchange = pieces.once(("end", C, pending), exchange)
    rest = exchanged(exchange, tokens) if not exchange.is_empty else [
        None if x is None else x[:, :0] for x in tokens
    ]  # fmt: skip
    if not pieces.packed:
        if left[0] > fetched[0]:
            rest = _joined(_pending(state, None), rest)
        return new.append(TTTTokens(*rest, (left[0],) * len(state.weights[0])))
    columns = []
    for n, parts in enumerate(
        zip(*(itertools.repeat(None) if x is None else x.split(fetched, dim=1) for x in rest))
    ):
        if left[n] > fetched[n]:
            parts = _joined(_pending(state, n), parts)
        columns.append(parts)
    sequences = [None if x[0] is None else [part[0] for part in x] for x in zip(*columns)]
    return new.append(TTTTokens.padded(sequences))


def _joined(first, second) -> list[Tensor | None]:
    return [None if x is None else torch.cat([x, y], dim=1) for x, y in zip(first, second)]


def _pending_lengths(state: TTTState, pieces) -> tuple[int, ...]:
    """Of each packed sequence, or one number for all rows of a batch."""
    lengths = state.pending_lengths
    return lengths if pieces.packed else lengths[:1] or (0,)


def _pending(state: TTTState, n: int | None) -> list[Tensor | None]:
    """The pending tokens of one sequence, or of all rows of a batch, `[.., p, ...]`."""
    entry = state if n is None else state.entry(n)
    columns = zip(*(piece.tensors for piece in entry.pending))
    return [None if column[0] is None else torch.cat(column, dim=1) for column in columns]


def _behind_pending(state: TTTState, tokens: Tokens, pieces, numbers: range) -> Tokens:
    """The tokens of some sequences, each behind its pending ones."""
    if not any(state.pending_lengths):
        return tokens
    if not pieces.packed:
        return Tokens(*_joined(_pending(state, None), tokens))
    borders = [pieces.local_index(b) for b in pieces.borders[numbers.start : numbers.stop + 1]]
    lengths = [stop - start for start, stop in itertools.pairwise(borders)]
    columns = [[] if x is None else x.split(lengths, dim=1) for x in tokens]
    parts = [[] for _ in tokens]
    for i, n in enumerate(numbers):
        before = _pending(state, n) if state.pending_lengths[n] else None
        for j, column in enumerate(columns):
            if column:
                parts[j] += [column[i]] if before is None else [before[j], column[i]]
    return Tokens(*(torch.cat(x, dim=1) if x else None for x in parts))
