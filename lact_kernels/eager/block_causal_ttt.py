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

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.eager import swiglu
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.ops.offsets import Offsets
from lact_kernels.ops.ttt_types import (
    RENORM_EPS,
    FastWeights,
    Options,
    Tokens,
    Triple,
    num_updates,
    phase,
)


class Update(NamedTuple):
    """What one update leaves behind for its backward."""

    weights: Triple  # after the update
    masters: Triple  # after the update: pre-norm only
    steps: Triple  # gradients plus momentum, before Muon

    def after(self, state: FastWeights) -> FastWeights:
        """The fast weights that follow `state`."""
        return FastWeights(self.weights, state.norms, self.masters, state.buffers and self.steps)


class _Segment(NamedTuple):
    """Updates that are computed in one go, and their tokens; a sequence's last has its tail, too."""

    rows: slice  # of the fast weights: the batch, or one packed sequence
    queries: slice
    keys: slice
    offset: int  # of the first query among the keys
    updates: int
    kept: range  # what this segment adds to the history
    is_first: bool
    is_last: bool


def block_causal_ttt_fwd(
    q: Tensor, tokens: Tokens, start: FastWeights, offsets: Offsets | None, options: Options
) -> tuple[Tensor, FastWeights | None, list[Tensor]]:
    """Outputs `[B, Tq, H, Dv]`, the fast weights after the last update, and the history.

    The queries are those of the last Tq of the Tk tokens.
    """
    o = q.new_empty(*q.shape[:3], tokens.v.shape[-1])
    history = block_causal_ttt_history(tokens.k, start, offsets is not None, options)
    ends = []
    for s in _segments(q, tokens, offsets, options):
        if s.is_first:
            state = start.at(s.rows)
        with phase("scan"):
            updates = _scan(tokens.at(s.keys), state, s.updates, options)
        with phase("apply"):
            o[:, s.queries] = swiglu.apply(
                q[:, s.queries], s.offset, options.chunk_size, *_all_weights(state, updates)
            )
        kept = updates if options.checkpoint_interval == 1 else updates[-1:]
        for row, update in zip(s.kept, kept):
            for stack, x in zip(history, (*update.weights, *update.masters, *update.steps)):
                stack[row] = x
        if updates:
            state = updates[-1].after(state)
        if s.is_last:
            ends.append(state)
        del updates, kept  # before the next segment makes its own
    return o, _concatenated(ends) if options.return_end else None, history


def block_causal_ttt_bwd(
    do: Tensor,
    dend: FastWeights | None,
    q: Tensor,
    tokens: Tokens,
    start: FastWeights,
    history: list[Tensor],
    offsets: Offsets | None,
    options: Options,
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of q, the tokens and the starting weights.

    `do` and `dend` are the gradients of the outputs and of the weights after the last update.
    """
    dq = q.new_empty(q.shape)
    dtokens = Tokens(*(None if x is None else x.new_zeros(x.shape) for x in tokens))
    dend = dend or FastWeights(*(tuple(map(torch.zeros_like, triple)) for triple in start))
    dstarts = []
    for s in reversed(_segments(q, tokens, offsets, options)):
        state, chunks = start.at(s.rows), tokens.at(s.keys)
        if s.is_last:
            dstate = dend.at(s.rows)
        if not s.is_first:
            state = _read(history, s.kept.start - 1, options).after(state)
        if options.checkpoint_interval == 1:
            updates = [_read(history, row, options) for row in s.kept]
        else:
            with phase("scan"):
                updates = _scan(chunks, state, s.updates, options)
        with phase("apply backward"):
            dq[:, s.queries], *dapply = swiglu.apply_bwd(
                do[:, s.queries],
                q[:, s.queries],
                s.offset,
                options.chunk_size,
                *_all_weights(state, updates),
            )
        with phase("reverse scan"):
            dstate = _reverse_scan(
                dstate, dapply, chunks, state, updates, options, dtokens.at(s.keys)
            )
        if s.is_first:
            dstarts.append(dstate)
        del updates, dapply  # before the next segment makes its own
    return dq, dtokens, _concatenated(dstarts[::-1])


def block_causal_ttt_history(
    k: Tensor, start: FastWeights, packed: bool, options: Options
) -> list[Tensor]:
    """Room for the history, knowing shapes only: of packed sequences as much as they may need."""
    B, Tk = k.shape[:2]
    interval = options.checkpoint_interval
    updates = num_updates(Tk, options.chunk_size, options.return_end)
    if packed:
        rows = Tk // options.chunk_size // interval
    elif interval == 1:
        rows = updates
    else:
        rows = max(updates - 1, 0) // interval
    steps = start.weights if interval == 1 else start.buffers  # a scan restarts from momentum alone
    like = (*start.weights, *start.masters, *steps)
    return [x.new_zeros(rows, B, *x.shape[1:]) for x in like]


def _segments(
    q: Tensor, tokens: Tokens, offsets: Offsets | None, options: Options
) -> list[_Segment]:
    """In order, sequence by sequence."""
    C, interval = options.chunk_size, options.checkpoint_interval
    borders = offsets or Offsets([0, q.shape[1]], [0, tokens.k.shape[1]])
    segments, num_kept = [], 0
    for n, (first_key, stop_key) in enumerate(zip(borders.keys, borders.keys[1:])):
        first_query, stop_query = borders.queries[n : n + 2]
        ahead = stop_key - stop_query  # of a query's place in its row, its key's
        updates = num_updates(stop_key - first_key, C, options.return_end)
        length = interval if interval > 1 else max(updates, 1)
        for begin in range(0, max(updates, 1), length):
            stop = min(begin + length, updates)
            is_last = stop == updates
            keys = slice(first_key + begin * C, stop_key if is_last else first_key + stop * C)
            first = max(keys.start - ahead, first_query)
            queries = slice(first, max(keys.stop - ahead, first))
            rows = updates if interval == 1 else int(not is_last)
            kept, num_kept = range(num_kept, num_kept + rows), num_kept + rows
            segments.append(
                _Segment(
                    rows=slice(None) if offsets is None else slice(n, n + 1),
                    queries=queries,
                    keys=keys,
                    offset=first + ahead - keys.start,
                    updates=stop - begin,
                    kept=kept,
                    is_first=begin == 0,
                    is_last=is_last,
                )
            )
    return segments


def _scan(tokens: Tokens, state: FastWeights, count: int, options: Options) -> list[Update]:
    """The updates of the first `count` chunks."""
    updates = []
    for c in range(count):
        chunk = tokens.chunk(c, options.chunk_size)
        steps = swiglu.gradients(*chunk[:5], *state.weights)
        if state.buffers:
            beta = _mean_momentum(chunk)
            steps = tuple(g + beta * m for g, m in zip(steps, state.buffers))
        sums = _add_steps(state, steps, options.muon)
        weights = tuple(_renorm(x, norm) for x, norm in zip(sums, state.norms))
        updates.append(Update(weights, state.masters and sums, steps))
        state = updates[-1].after(state)
    return updates


def _reverse_scan(
    dend: FastWeights,
    dapply: list[Tensor],
    tokens: Tokens,
    state: FastWeights,
    updates: list[Update],
    options: Options,
    dtokens: Tokens,
) -> FastWeights:
    """Gradients of the tokens into `dtokens`; that of `state`, before the first update, is returned.

    `dapply` are the gradients that the weights, `[updates + 1, B, H, ...]`, get from their queries.
    """
    states = [state]
    for update in updates[:-1]:
        states.append(update.after(state))
    dweights, dnorms, dmasters, dbuffers = dend
    for c in reversed(range(len(updates))):
        chunk = tokens.chunk(c, options.chunk_size)
        dchunk = dtokens.chunk(c, options.chunk_size)
        state, steps = states[c], updates[c].steps

        # renorm and the sum before it
        dweights = tuple(dw + da[c + 1] for dw, da in zip(dweights, dapply))
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
            dbuffers = tuple(_mean_momentum(chunk) * d for d in dsteps)
            dbeta = sum((d * m).sum(dim=(-2, -1)) for d, m in zip(dsteps, state.buffers))  # [B, H]
            dchunk.momentum.copy_((dbeta / options.chunk_size)[:, None])

        dgradients = swiglu.gradients_bwd(*dsteps, *chunk[:5], *state.weights, out=dchunk[:5])
        dweights = tuple(dw + dg for dw, dg in zip(dweights, dgradients))

    dweights = tuple(dw + da[0] for dw, da in zip(dweights, dapply))
    return FastWeights(dweights, dnorms, dmasters, dbuffers)


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
    radial = x * (along / length.clamp_min(torch.finfo(x.dtype).tiny))
    return (dout - radial) * (norm[..., None] / (length + RENORM_EPS)), along[..., 0]


def _mean_momentum(chunk: Tokens) -> Tensor:
    return chunk.momentum.mean(dim=1)[..., None, None]  # [B, H, 1, 1]
