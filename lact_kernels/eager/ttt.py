"""Chunked test-time training of SwiGLU fast weights in plain PyTorch, on any device.

    scan    for every chunk in turn: gradients -> momentum -> Muon -> renorm -> the next weights
    apply   all chunks' queries through their chunk's weights, as one batch

and backward in the opposite order: the apply branch of all chunks, then the scan in reverse. Packed
sequences take turns. With a checkpoint interval n > 1 so do segments of n updates: the forward keeps
the fast weights between two of them, and the backward scans each again when its turn comes. The
products over tokens are in `swiglu.py`; this file is the recurrence over weights.

The history is a stack `[rows, B, H, ...]` for each tensor of an `Updated`: a row for each update, or,
with an interval n > 1, for each border between segments.

Weights are `[B, H, rows, columns]`, float32 (float64 for float64 tokens), tokens `[B, T, H, D]`.
"""

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
from lact_kernels.eager.newton_schulz import Iterates, newton_schulz, newton_schulz_bwd


class Updated(NamedTuple):
    """What one update leaves behind for its backward, of each weight that is trained."""

    weights: Triple  # after the update
    masters: Triple  # after the update: pre-norm only
    steps: Triple  # what momentum has been added to, if there is any
    gradients: Triple  # with momentum after Muon, which is applied to these

    def after(self, state: FastWeights, trained: Sequence[int]) -> FastWeights:
        """The fast weights that follow `state`."""
        weights = _replaced(state.weights, trained, self.weights)
        masters = _replaced(state.masters, trained, self.masters)
        buffers = _replaced(state.buffers, trained, self.steps)
        return FastWeights(weights, state.norms, masters, buffers)


class _Segment(NamedTuple):
    """Updates that are computed in one go; a sequence's last has the queries behind all updates, too."""

    rows: slice  # of the fast weights: the batch, or one packed sequence
    queries: list[int]  # borders of each version's queries
    keys: list[tuple[int, int]]  # of each update
    kept: range  # what this segment adds to the history
    is_first: bool
    is_last: bool
    is_of_last_sequence: bool

    @property
    def updates(self) -> int:
        return len(self.keys)

    def of_queries(self, x: Tensor) -> Tensor:
        return x[:, self.queries[0] : self.queries[-1]]

    @property
    def applied(self) -> list[int]:
        """The versions that have queries, counted from that before the first update."""
        return [c for c in range(len(self.queries) - 1) if self.queries[c] < self.queries[c + 1]]

    @property
    def local_queries(self) -> list[int]:
        """The borders of their queries, counted from the first query of this segment."""
        first = self.queries[0]
        return [0, *(self.queries[c + 1] - first for c in self.applied)]


def ttt_fwd(call: Call) -> tuple[Tensor, FastWeights | None, list[Tensor]]:
    """Outputs `[B, Tq, H, Dv]`, the fast weights after the last update, and the history.

    The last sequence is scanned first: another rank may wait for it.
    """
    call = _begun(call)
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
            end = updates[-1].after(state, call.trained) if updates else state
            ends.append(end)
            if s.is_of_last_sequence:
                ranks.send(end)
        with phase("apply"):
            if s.applied:
                weights = _applied_weights(state, updates, s, call.trained)
                swiglu.apply(s.of_queries(q), s.local_queries, weights, out=s.of_queries(o))
                del weights
        kept = updates if options.checkpoint_interval == 1 else updates[-1:]
        for row, update in zip(s.kept, kept):
            for stack, x in zip(history, (x for triple in update for x in triple)):
                stack[row] = x
        if updates:
            state = updates[-1].after(state, call.trained)
        del updates, kept  # before the next segment makes its own
    return o, _concatenated(ends[::-1]) if options.return_end else None, history


def ttt_bwd(
    call: Call, history: list[Tensor], do: Tensor, dend: FastWeights | None
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of q, the tokens and the starting weights.

    `do` and `dend` are the gradients of the outputs and of the weights after the last update.
    """
    given, call = call.start, _begun(call)
    q, tokens, start, _, options, _ = call
    ranks = named(call.ranks)
    dq = q.new_empty(q.shape)
    dtokens = tokens.map(lambda x: x.new_zeros(x.shape))
    dend = dend or start.map(torch.zeros_like)
    dstarts = []
    for s in reversed(_segments(call)):
        state = start.at(s.rows)
        if not s.is_first:
            state = _read(history, s.kept.start - 1, call).after(state, call.trained)
        if options.checkpoint_interval == 1:
            updates = [_read(history, row, call) for row in s.kept]
        else:
            with phase("scan"):
                updates = _scan(call, state, s.keys)
        dapply = {}
        with phase("apply backward"):
            if s.applied:
                weights = _applied_weights(state, updates, s, call.trained)
                stacks = swiglu.apply_bwd(
                    *map(s.of_queries, (do, q)), s.local_queries, weights, out=s.of_queries(dq)
                )
                dapply = dict(zip(s.applied, zip(*stacks)))
                del weights, stacks
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
    return dq, dtokens, given.gradient(dstart)


def ttt_history(call: Call) -> list[Tensor]:
    """Room for the history, knowing shapes only: of packed sequences as much as they may need."""
    call = _begun(call)
    start, updates, interval = call.start, call.num_updates, call.options.checkpoint_interval
    if interval == 0:
        return []
    rows = updates // interval
    if call.plan is None and interval > 1:
        rows = max(updates - 1, 0) // interval
    steps = start.weights if interval == 1 else start.buffers  # a scan restarts from momentum alone
    gradients = start.weights if interval == 1 and call.options.momentum_after_muon else ()
    kept = (start.weights, start.masters, steps, gradients)
    like = (x for triple in kept for x in _of(call.trained or range(3), triple))
    return [x.new_zeros(rows, call.q.shape[0], *x.shape[1:]) for x in like]


def _begun(call: Call) -> Call:
    """With all that an update needs."""
    options = call.options
    return call._replace(start=call.start.begun(options.prenorm, options.momentum))


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
        segments, updates = [], len(keys)
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
                    keys=keys[begin:stop],
                    kept=kept,
                    is_first=begin == 0,
                    is_last=is_last,
                    is_of_last_sequence=n == len(plan.keys) - 1,
                )
            )
        sequences.append(segments)
    return [s for segments in reversed(sequences) for s in segments]


def _scan(call: Call, state: FastWeights, keys: list[tuple[int, int]]) -> list[Updated]:
    """The updates with these keys."""
    ranks, options, trained = named(call.ranks), call.options, call.trained
    late = options.momentum_after_muon
    updates, betas = [], _betas(call, keys)
    for chunk, beta in zip(_chunks(call.tokens, keys), betas):
        steps = gradients = _of(trained, swiglu.gradients(chunk, state.weights))
        ranks.sum_(*steps)
        if late:
            steps = _orthogonalised(steps, options)
        if state.buffers:
            steps = tuple(g + beta * m for g, m in zip(steps, _of(trained, state.buffers)))
        sums = _add_steps(call, state, steps)
        weights = sums
        if options.weight_norm:
            weights = tuple(map(_renorm, sums, _of(trained, state.norms)))
        masters = sums if state.masters else ()
        updates.append(Updated(weights, masters, steps, gradients if late else ()))
        state = updates[-1].after(state, trained)
    return updates


class _Scan(NamedTuple):
    """A scan of some chunks, to be gone through in reverse."""

    state: FastWeights  # before the first update
    updates: list[Updated]
    keys: list[tuple[int, int]]
    dapply: dict[int, Triple]  # gradients of the versions that have queries, by these

    def with_apply(self, dweights: Triple, version: int) -> Triple:
        """These gradients of a version's weights and those by its queries."""
        return tuple(map(torch.add, dweights, self.dapply.get(version, (0, 0, 0))))


def _reverse_scan(
    call: Call, scan: _Scan, dend: FastWeights, dpart: Triple, dtokens: Tokens
) -> tuple[FastWeights, Triple]:
    """Gradients of the tokens into `dtokens`; those of the state before the first update are returned.

    The gradient of the weights comes in two parts: what ranks that share chunks know alike, in `dend` and the
    first result, and what this one has from its own tokens, `dpart`.
    """
    options, ranks, trained, updates = call.options, named(call.ranks), call.trained, scan.updates
    states = [scan.state]
    for update in updates[:-1]:
        states.append(update.after(states[-1], trained))
    dweights, dnorms, dmasters, dbuffers = dend
    chunks, dchunks = (list(_chunks(x, scan.keys)) for x in (call.tokens, dtokens))
    betas = _betas(call, scan.keys)
    for c in reversed(range(len(updates))):
        chunk, dchunk = chunks[c], dchunks[c]
        state = states[c]

        # renorm, the sum before it, and Muon
        dpart = scan.with_apply(dpart, c + 1)
        ranks.sum_(*dpart)
        dweights = tuple(map(torch.add, dweights, dpart))
        dsums, dtargets, dsteps = _update_bwd(call, updates[c], state, dweights, dmasters)
        if options.weight_norm:
            dtargets = map(torch.add, _of(trained, dnorms), dtargets)
            dnorms = _replaced(dnorms, trained, tuple(dtargets))
        if state.masters:
            dmasters = _replaced(dmasters, trained, dsums)
            dweights = _replaced(dweights, trained, tuple(map(torch.zeros_like, dsums)))
        else:
            dweights = _replaced(dweights, trained, dsums)

        # momentum, and Muon where it is before that
        if state.buffers:
            before = _of(trained, state.buffers)
            dsteps = tuple(map(torch.add, dsteps, _of(trained, dbuffers)))
            dbuffers = _replaced(dbuffers, trained, tuple(betas[c] * d for d in dsteps))
            dbeta = sum((d * m).sum(dim=(-2, -1)) for d, m in zip(dsteps, before))  # [B, H]
            dchunk.momentum.copy_((dbeta / options.chunk_size)[:, None])
        if options.momentum_after_muon:
            gradients = updates[c].gradients
            dsteps = tuple(
                newton_schulz_bwd(d, g, options.coefficients) for d, g in zip(dsteps, gradients)
            )

        dsteps = _replaced((None, None, None), trained, dsteps)
        dpart = swiglu.gradients_bwd(dsteps, chunk, state.weights, out=dchunk)

    return FastWeights(dweights, dnorms, dmasters, dbuffers), scan.with_apply(dpart, 0)


def _update_bwd(
    call: Call, update: Updated, state: FastWeights, dweights: Triple, dmasters: Triple
) -> tuple[Triple, Triple, Triple]:
    """Gradients of the trained weights before renorm, of their target norms, and of their steps.

    One weight after the other: what Newton-Schulz keeps for its gradient is several times a weight.
    """
    options, results = call.options, []
    muon = options.coefficients is not None and not options.momentum_after_muon
    for n, i in enumerate(call.trained):
        step, dsum, dtarget = update.steps[n], dweights[i], None
        if muon:
            iterates = Iterates(step, options.coefficients)
        if options.weight_norm:
            if update.masters:
                x = update.masters[n]
            else:
                x = state.weights[i] + (iterates.last() if muon else step)
            dsum, dtarget = _renorm_bwd(dsum, x, state.norms[i])
        if dmasters:
            dsum = dmasters[i] + dsum
        results.append((dsum, dtarget, iterates.backward(dsum) if muon else dsum))
    return tuple(zip(*results))


def _of(trained: Sequence[int], triple: Triple) -> Triple:
    """Those of the weights that are trained; none where there are none at all."""
    return tuple(triple[i] for i in trained) if triple else ()


def _replaced(triple: Triple, trained: Sequence[int], new: Triple) -> Triple:
    """The triple with `new` in the places of the weights that are trained."""
    if not triple:
        return ()
    replaced = list(triple)
    for i, x in zip(trained, new):
        replaced[i] = x
    return tuple(replaced)


def _read(history: list[Tensor], row: int, call: Call) -> Updated:
    """The update that this row of the history holds."""
    x, number = [stack[row] for stack in history], len(call.trained)
    triples = [tuple(x[i : i + number]) for i in range(0, len(x), number)]
    weights, masters = triples.pop(0), triples.pop(0) if call.options.prenorm else ()
    return Updated(weights, masters, *triples, *((),) * (2 - len(triples)))


def _concatenated(states: list[FastWeights]) -> FastWeights:
    """The fast weights of several sequences as one, in order, copied."""
    return FastWeights(*(tuple(map(torch.cat, zip(*triples))) for triples in zip(*states)))


def _applied_weights(start: FastWeights, updates: list[Updated], segment, trained) -> Triple:
    """The weights of the versions that have queries, `[versions, B, H, ...]`."""
    versions = [start.weights]
    for update in updates:
        versions.append(_replaced(start.weights, trained, update.weights))
    return tuple(map(torch.stack, zip(*(versions[c] for c in segment.applied))))


def _add_steps(call: Call, state: FastWeights, steps: Triple) -> Triple:
    """The weights before renorm: `w + step`, or `m + step` of pre-norm's masters."""
    if not call.options.momentum_after_muon:
        steps = _orthogonalised(steps, call.options)
    return tuple(map(torch.add, _of(call.trained, state.masters or state.weights), steps))


def _orthogonalised(steps: Triple, options: Options) -> Triple:
    """The steps by Newton-Schulz, without Muon as they are."""
    if options.coefficients is None:
        return steps
    return tuple(newton_schulz(step, options.coefficients) for step in steps)


def _renorm(x: Tensor, norm: Tensor) -> Tensor:
    """Rows of `x` rescaled to the target norms."""
    return x * (norm[..., None] / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + RENORM_EPS))


def _renorm_bwd(dout: Tensor, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and norm; a row of zeros has no direction, and only its length's part is lost."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (dout * x).sum(dim=-1, keepdim=True) / (length + RENORM_EPS)
    radial = x * torch.where(length > 0, along / length, 0)
    return (dout - radial) * (norm[..., None] / (length + RENORM_EPS)), along[..., 0]


def _chunks(tokens: Tokens, keys: Sequence[tuple[int, int]]) -> Iterator[Tokens]:
    return (tokens.at(slice(*chunk)) for chunk in keys)


def _betas(call: Call, keys: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The mean momentum of each chunk, `[B, H, 1, 1]`; without momentum None for each."""
    momentum = call.tokens.momentum
    if momentum is None or not keys:
        return [None] * len(keys)
    sums = torch.stack([momentum[:, a:b].sum(dim=1) for a, b in keys])
    betas = sums / call.options.chunk_size
    named(call.ranks).sum_(betas)
    return list(betas[..., None, None])
