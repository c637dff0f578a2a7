"""Chunked test-time training of SwiGLU fast weights in plain PyTorch, on any device.

    scan    for every chunk in turn: gradients -> momentum -> Muon -> renorm -> the next weights
    apply   all chunks' queries through their chunk's weights, as one batch

and backward in the opposite order: the apply branch of all chunks, then the scan in reverse. Packed
sequences take turns. With a checkpoint interval n > 1 so do segments of n updates: the forward keeps
the fast weights between two of them, and the backward scans each again when its turn comes. The
products over tokens are in `swiglu.py`; this file is the recurrence over weights.

The history is a stack `[rows, B, H, ...]` for each tensor of an `Update`: a row for each update, or,
with an interval n > 1, for each border between segments.

Weights are `[B, H, rows, columns]`, float32 (float64 for float64 tokens), tokens `[B, T, H, D]`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Call, Options, phase
from lact_kernels.core.fast_weights import RENORM_EPS, FastWeights, Triple
from lact_kernels.core.plan import Plan
from lact_kernels.core.ranks import named
from lact_kernels.core.tokens import Tokens
from lact_kernels.eager import swiglu
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd


class Update(NamedTuple):
    """What one update leaves behind for its backward."""

    weights: Triple  # after the update
    masters: Triple  # after the update: pre-norm only
    steps: Triple  # gradients plus momentum, before Muon

    def after(self, state: FastWeights) -> FastWeights:
        """The fast weights that follow `state`."""
        return FastWeights(self.weights, state.norms, self.masters, state.buffers and self.steps)


class _Segment(NamedTuple):
    """Updates that are computed in one go; a sequence's last has the queries behind all updates, too."""

    rows: slice  # of the fast weights: the batch, or one packed sequence
    queries: list[int]  # borders of each version's queries
    keys: list[int]  # borders of each update's keys
    kept: range  # what this segment adds to the history
    is_first: bool
    is_last: bool
    is_of_last_sequence: bool

    @property
    def updates(self) -> int:
        return len(self.keys) - 1

    def of_queries(self, x: Tensor) -> Tensor:
        return x[:, self.queries[0] : self.queries[-1]]

    @property
    def local_queries(self) -> list[int]:
        """The borders, counted from the first query of this segment."""
        return [border - self.queries[0] for border in self.queries]


def ttt_fwd(call: Call) -> tuple[Tensor, FastWeights | None, list[Tensor]]:
    """Outputs `[B, Tq, H, Dv]`, the fast weights after the last update, and the history.

    The last sequence is scanned first: another rank may wait for it.
    """
    q, tokens, start, _, options, _ = call
    ranks = named(call.ranks)
    o = q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    segments = _segments(call)
    history = ttt_history(call)
    ends = []
    for s in segments:
        if s.is_first:
            state = start.at(s.rows)
        with phase("scan"):
            updates = _scan(call, state, s.keys)
        if s.is_last:
            end = updates[-1].after(state) if updates else state
            ends.append(end)
            if s.is_of_last_sequence:
                ranks.send(end)
        with phase("apply"):
            s.of_queries(o).copy_(
                swiglu.apply(s.of_queries(q), s.local_queries, _all_weights(state, updates))
            )
        kept = updates if options.checkpoint_interval == 1 else updates[-1:]
        for row, update in zip(s.kept, kept):
            for stack, x in zip(history, (*update.weights, *update.masters, *update.steps)):
                stack[row] = x
        if updates:
            state = updates[-1].after(state)
        del updates, kept  # before the next segment makes its own
    return o, _concatenated(ends[::-1]) if options.return_end else None, history


def ttt_bwd(
    call: Call, history: list[Tensor], do: Tensor, dend: FastWeights | None
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of q, the tokens and the starting weights.

    `do` and `dend` are the gradients of the outputs and of the weights after the last update.
    """
    q, tokens, start, _, options, _ = call
    ranks = named(call.ranks)
    dq = q.new_empty(q.shape)
    dtokens = tokens.map(lambda x: x.new_zeros(x.shape))
    dend = dend or start.map(torch.zeros_like)
    dstarts = []
    for s in reversed(_segments(call)):
        state = start.at(s.rows)
        if not s.is_first:
            state = _read(history, s.kept.start - 1, options).after(state)
        if options.checkpoint_interval == 1:
            updates = [_read(history, row, options) for row in s.kept]
        else:
            with phase("scan"):
                updates = _scan(call, state, s.keys)
        with phase("apply backward"):
            dq_part, dapply = swiglu.apply_bwd(
                s.of_queries(do), s.of_queries(q), s.local_queries, _all_weights(state, updates)
            )
            s.of_queries(dq).copy_(dq_part)
        if s.is_last:
            dstate = dend.at(s.rows)
            if s.is_of_last_sequence:
                dstate = ranks.receive_gradients(dstate)
            dpart = tuple(map(torch.zeros_like, dstate.weights))
        with phase("reverse scan"):
            scan = _Scan(state, updates, s.keys, dapply)
            dstate, dpart = _reverse_scan(call, scan, dstate, dpart, dtokens)
        if s.is_first:
            alike = dstate.map(ranks.part)
            dweights = tuple(map(torch.add, alike.weights, dpart))
            dstarts.append(alike._replace(weights=dweights))
        del updates, dapply, scan  # before the next segment makes its own
    dstart = _concatenated(dstarts)
    ranks.send_gradients(dstart)
    return dq, dtokens, dstart


def ttt_history(call: Call) -> list[Tensor]:
    """Room for the history, knowing shapes only: of packed sequences as much as they may need."""
    start, updates, interval = call.start, call.num_updates, call.options.checkpoint_interval
    if interval == 0:
        return []
    rows = updates // interval
    if call.plan is None and interval > 1:
        rows = max(updates - 1, 0) // interval
    steps = start.weights if interval == 1 else start.buffers  # a scan restarts from momentum alone
    like = (*start.weights, *start.masters, *steps)
    return [x.new_zeros(rows, call.q.shape[0], *x.shape[1:]) for x in like]


def _segments(call: Call) -> list[_Segment]:
    """Sequence by sequence, the last one first, and each in its order."""
    options, interval = call.options, call.options.checkpoint_interval
    if call.plan is not None:
        plan = Plan.from_tensor(call.plan)
    else:
        borders = [0, call.tokens.k.shape[1]], [0, call.q.shape[1]]
        plan = Plan.block_causal(*borders, options.chunk_size, options.return_end)
    sequences, num_kept = [], 0
    for n, (keys, queries) in enumerate(zip(*plan)):
        segments, updates = [], len(keys) - 1
        length = options.segment if interval != 1 else max(updates, 1)
        for begin in range(0, max(updates, 1), length):
            stop = min(begin + length, updates)
            is_last = stop == updates
            rows = updates if interval == 1 else int(interval > 1 and not is_last)
            kept, num_kept = range(num_kept, num_kept + rows), num_kept + rows
            segments.append(
                _Segment(
                    rows=slice(None) if len(plan.keys) == 1 else slice(n, n + 1),
                    queries=queries[begin : stop + 1 + is_last],
                    keys=keys[begin : stop + 1],
                    kept=kept,
                    is_first=begin == 0,
                    is_last=is_last,
                    is_of_last_sequence=n == len(plan.keys) - 1,
                )
            )
        sequences.append(segments)
    return [s for segments in reversed(sequences) for s in segments]


def _scan(call: Call, state: FastWeights, borders: list[int]) -> list[Update]:
    """The updates of the chunks between these borders."""
    ranks = named(call.ranks)
    updates, betas = [], _betas(call, borders)
    for chunk, beta in zip(_chunks(call.tokens, borders), betas):
        steps = swiglu.gradients(chunk, state.weights)
        ranks.sum_(*steps)
        if state.buffers:
            steps = tuple(g + beta * m for g, m in zip(steps, state.buffers))
        sums = _add_steps(state, steps, call.options.muon)
        weights = tuple(_renorm(x, norm) for x, norm in zip(sums, state.norms))
        updates.append(Update(weights, state.masters and sums, steps))
        state = updates[-1].after(state)
    return updates


class _Scan(NamedTuple):
    """A scan of some chunks, to be gone through in reverse."""

    state: FastWeights  # before the first update
    updates: list[Update]
    borders: list[int]  # of the chunks' keys
    dapply: Triple  # gradients that the weights, `[updates + 1, B, H, ...]`, get from their queries


def _reverse_scan(
    call: Call, scan: _Scan, dend: FastWeights, dpart: Triple, dtokens: Tokens
) -> tuple[FastWeights, Triple]:
    """Gradients of the tokens into `dtokens`; those of the state before the first update are returned.

    The gradient of the weights comes in two parts: what ranks that share chunks know alike, in `dend` and the
    first result, and what this one has from its own tokens, `dpart`.
    """
    options, ranks = call.options, named(call.ranks)
    updates, dapply = scan.updates, scan.dapply
    states = [scan.state]
    for update in updates[:-1]:
        states.append(update.after(states[-1]))
    dweights, dnorms, dmasters, dbuffers = dend
    chunks, dchunks = (list(_chunks(x, scan.borders)) for x in (call.tokens, dtokens))
    betas = _betas(call, scan.borders)
    for c in reversed(range(len(updates))):
        chunk, dchunk = chunks[c], dchunks[c]
        state, steps = states[c], updates[c].steps

        # renorm and the sum before it
        dpart = tuple(dp + da[c + 1] for dp, da in zip(dpart, dapply))
        ranks.sum_(*dpart)
        dweights = tuple(map(torch.add, dweights, dpart))
        sums = updates[c].masters or _add_steps(state, steps, options.muon)
        dsums, dtargets = zip(*map(_renorm_bwd, dweights, sums, state.norms))
        dnorms = tuple(dn + dt for dn, dt in zip(dnorms, dtargets))
        if state.masters:
            dsums = dmasters = tuple(dm + ds for dm, ds in zip(dmasters, dsums))
            dweights = tuple(torch.zeros_like(ds) for ds in dsums)
        else:
            dweights = dsums

        # Muon and momentum
        dsteps = tuple(map(newton_schulz_bwd, dsums, steps)) if options.muon else dsums
        if state.buffers:
            dsteps = tuple(d + db for d, db in zip(dsteps, dbuffers))
            dbuffers = tuple(betas[c] * d for d in dsteps)
            dbeta = sum((d * m).sum(dim=(-2, -1)) for d, m in zip(dsteps, state.buffers))  # [B, H]
            dchunk.momentum.copy_((dbeta / options.chunk_size)[:, None])

        dpart = swiglu.gradients_bwd(dsteps, chunk, state.weights, out=dchunk)

    dpart = tuple(dp + da[0] for dp, da in zip(dpart, dapply))
    return FastWeights(dweights, dnorms, dmasters, dbuffers), dpart


def _read(history: list[Tensor], row: int, options: Options) -> Update:
    """The update that this row of the history holds."""
    x = [stack[row] for stack in history]
    masters = 3 if options.prenorm else 0
    return Update(tuple(x[:3]), tuple(x[3 : 3 + masters]), tuple(x[3 + masters :]))


def _concatenated(states: list[FastWeights]) -> FastWeights:
    """The fast weights of several sequences as one, in order, copied."""
    return FastWeights(*(tuple(map(torch.cat, zip(*triples))) for triples in zip(*states)))


def _all_weights(start: FastWeights, updates: list[Update]) -> Triple:
    """The weights of every chunk, `[updates + 1, B, H, ...]`."""
    return tuple(map(torch.stack, zip(start.weights, *(update.weights for update in updates))))


def _add_steps(state: FastWeights, steps: Triple, muon: bool) -> Triple:
    """The weights before renorm: `w + step`, or `m + step` of pre-norm's masters."""
    if muon:
        steps = map(newton_schulz, steps)
    return tuple(x + step for x, step in zip(state.masters or state.weights, steps))


def _renorm(x: Tensor, norm: Tensor) -> Tensor:
    """Rows of `x` rescaled to the target norms."""
    return x * (norm[..., None] / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + RENORM_EPS))


def _renorm_bwd(dout: Tensor, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and norm; a row of zeros has no direction, and only its length's part is lost."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (dout * x).sum(dim=-1, keepdim=True) / (length + RENORM_EPS)
    radial = x * torch.where(length > 0, along / length, 0)
    return (dout - radial) * (norm[..., None] / (length + RENORM_EPS)), along[..., 0]


def _chunks(tokens: Tokens, borders: Sequence[int]) -> Iterator[Tokens]:
    return (tokens.at(slice(*chunk)) for chunk in itertools.pairwise(borders))


def _betas(call: Call, borders: Sequence[int]) -> list[Tensor]:
    """The mean momentum of each chunk, `[B, H, 1, 1]`; without momentum None for each."""
    momentum = call.tokens.momentum
    if momentum is None or len(borders) < 2:
        return [None] * (len(borders) - 1)
    sums = torch.stack([momentum[:, a:b].sum(dim=1) for a, b in itertools.pairwise(borders)])
    betas = sums / call.options.chunk_size
    named(call.ranks).sum_(betas)
    return list(betas[..., None, None])
