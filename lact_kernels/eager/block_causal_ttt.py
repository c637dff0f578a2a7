"""Chunked test-time training of SwiGLU fast weights in plain PyTorch, on any device.

    scan    for every chunk in turn: gradients -> momentum -> Muon -> renorm -> the next weights
    apply   all chunks' queries through their chunk's weights, as one batch

and backward in the opposite order: the apply branch of all chunks, then the scan in reverse. The
products over tokens are in `swiglu.py`; this file is the recurrence over weights.

Weights are `[B, H, rows, columns]`, float32 (float64 for float64 tokens), tokens `[B, T, H, D]`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.eager import swiglu
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd

RENORM_EPS = 1e-5

Triple = tuple[Tensor, ...]  # one tensor for each of w0, w1, w2; empty where an option is off


class FastWeights(NamedTuple):
    """The fast weights between two chunks, and what their next update needs."""

    weights: Triple
    norms: Triple  # target norms of the rows, [B, H, rows]
    masters: Triple  # weights before renorm: pre-norm only
    buffers: Triple  # momentum, where there is any

    @classmethod
    def from_list(cls, x: list[Tensor], prenorm: bool) -> "FastWeights":
        """Of three tensors for each field that is not empty."""
        masters, buffers = (x[6:9], x[9:]) if prenorm else ((), x[6:])
        return cls(tuple(x[:3]), tuple(x[3:6]), tuple(masters), tuple(buffers))

    def at(self, rows: slice) -> "FastWeights":
        return FastWeights(*(tuple(x[rows] for x in triple) for triple in self))


class Update(NamedTuple):
    """What one update leaves behind for its backward."""

    weights: Triple  # after the update
    masters: Triple  # after the update: pre-norm only
    steps: Triple  # gradients plus momentum, before Muon

    def after(self, state: FastWeights) -> FastWeights:
        """The fast weights that follow `state`."""
        return FastWeights(self.weights, state.norms, self.masters, state.buffers and self.steps)


class Tokens(NamedTuple):
    """What an update reads: k `[B, T, H, Dk]`, v `[B, T, H, Dv]`, the rates and momentum `[B, T, H]`."""

    k: Tensor
    v: Tensor
    lr0: Tensor
    lr1: Tensor
    lr2: Tensor
    momentum: Tensor | None

    def at(self, tokens: slice) -> "Tokens":
        return Tokens(*(None if x is None else x[:, tokens] for x in self))

    def chunk(self, c: int, chunk_size: int) -> "Tokens":
        return self.at(slice(c * chunk_size, (c + 1) * chunk_size))


def block_causal_ttt_fwd(
    q: Tensor, tokens: Tokens, start: FastWeights, chunk_size: int, muon: bool, updates: int
) -> tuple[Tensor, list[Update]]:
    """Outputs `[B, Tq, H, Dv]`, and the updates of the first `updates` chunks.

    The queries are those of the last Tq of the Tk tokens.
    """
    state, history = start, []
    for c in range(updates):
        chunk = tokens.chunk(c, chunk_size)
        steps = swiglu.gradients(*chunk[:5], *state.weights)
        if state.buffers:
            beta = _mean_momentum(chunk)
            steps = tuple(g + beta * m for g, m in zip(steps, state.buffers))
        sums = _add_steps(state, steps, muon)
        weights = tuple(_renorm(x, norm) for x, norm in zip(sums, state.norms))
        history.append(Update(weights, state.masters and sums, steps))
        state = history[-1].after(state)
    return swiglu.apply(q, _offset(q, tokens), chunk_size, *_all_weights(start, history)), history


def block_causal_ttt_bwd(
    do: Tensor,
    dend: FastWeights,
    q: Tensor,
    tokens: Tokens,
    start: FastWeights,
    chunk_size: int,
    muon: bool,
    history: list[Update],
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of q, the tokens and the starting weights.

    `do` and `dend` are the gradients of the outputs and of the weights after the last update.
    """
    all_weights = _all_weights(start, history)
    dq, *dapply = swiglu.apply_bwd(do, q, _offset(q, tokens), chunk_size, *all_weights)
    dtokens = Tokens(*(None if x is None else torch.zeros_like(x) for x in tokens))

    dweights, dnorms, dmasters, dbuffers = dend
    for c in reversed(range(len(history))):
        chunk, dchunk = tokens.chunk(c, chunk_size), dtokens.chunk(c, chunk_size)
        state = history[c - 1].after(start) if c else start
        steps = history[c].steps

        # renorm and the sum before it
        dweights = tuple(dw + da[c + 1] for dw, da in zip(dweights, dapply))
        sums = history[c].masters or _add_steps(state, steps, muon)
        dsums, dtargets = zip(*map(_renorm_bwd, dweights, sums, state.norms))
        dnorms = tuple(dn + dt for dn, dt in zip(dnorms, dtargets))
        if state.masters:
            dsums = dmasters = tuple(dm + ds for dm, ds in zip(dmasters, dsums))
            dweights = tuple(torch.zeros_like(ds) for ds in dsums)
        else:
            dweights = dsums

        # Muon and momentum
        dsteps = tuple(map(newton_schulz_bwd, dsums, steps)) if muon else dsums
        if state.buffers:
            dsteps = tuple(d + db for d, db in zip(dsteps, dbuffers))
            dbuffers = tuple(_mean_momentum(chunk) * d for d in dsteps)
            dbeta = sum((d * m).sum(dim=(-2, -1)) for d, m in zip(dsteps, state.buffers))  # [B, H]
            dchunk.momentum.copy_((dbeta / chunk_size)[:, None])

        dgradients = swiglu.gradients_bwd(*dsteps, *chunk[:5], *state.weights, out=dchunk[:5])
        dweights = tuple(dw + dg for dw, dg in zip(dweights, dgradients))

    dweights = tuple(dw + da[0] for dw, da in zip(dweights, dapply))
    return dq, dtokens, FastWeights(dweights, dnorms, dmasters, dbuffers)


def _offset(q: Tensor, tokens: Tokens) -> int:
    return tokens.k.shape[1] - q.shape[1]


def _all_weights(start: FastWeights, history: list[Update]) -> Triple:
    """The weights of every chunk, `[updates + 1, B, H, ...]`."""
    return tuple(map(torch.stack, zip(start.weights, *(update.weights for update in history))))


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
