"""`block_causal_ttt` in Triton: launch order, and what is kept for the backward.

```
    forward    scan            gradients -> momentum -> Muon -> renorm, step by step: each chunk's weights
               apply           the queries of all chunks through the weights of their chunk, at once
    backward   apply backward  dq, and the weights' gradients by apply, of all chunks at once
               reverse scan    the weights' gradients by the updates, step by step, the last first
               deferred        dk, dv and the gradients of rates and momentum, of all chunks at once
```

Sequences of a batch, packed or not, are scanned side by side; `ttt_layout` numbers their chunks. "At once" is
bounded: as many steps at a time as have activations within ACTIVATION_BYTES.

The *history* has, for each chunk, in rank order step by step:

    weights  in the dtype of the products, which the queries of the chunk are applied to
    sums     float32, before the renorm that gave these weights (the start: the weights or masters)
    steps    float32, M before the chunk's update: with momentum or Muon
    betas    the mean momentum of the chunk: with momentum

So beside its inputs the backward keeps, for each update, `e + 4` bytes for each fast weight, or `e + 8` with
momentum or Muon, where e is the item size of the tokens. With a checkpoint interval of n it keeps this of
every n-th step only, and computes the others again, n steps at a time.
"""

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.offsets import ChunkOffsets
from lact_kernels.core.ttt_types import (
    ALONE,
    RENORM_EPS,
    FastWeights,
    Options,
    Ranks,
    Tokens,
    Triple,
    num_updates,
    phase,
)
from lact_kernels.triton.fast_weights.activations import num_rate_tiles, ttt_hidden, ttt_hidden_bwd
from lact_kernels.triton.fast_weights.layout import Chunks, Dims
from lact_kernels.triton.fast_weights.newton_schulz import NewtonSchulz
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.update import ttt_mean_momentum, ttt_update
from lact_kernels.triton.fast_weights.update_bwd import ttt_rates_bwd, ttt_update_bwd
from lact_kernels.triton.launch import on_device, readable_in_place

ACTIVATION_BYTES = 2**30


def block_causal_ttt_fwd(
    q: Tensor,
    tokens: Tokens,
    start: FastWeights,
    offsets: ChunkOffsets | None,
    options: Options,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, FastWeights | None, list[Tensor]]:
    """Outputs `[B, Tq, H, Dv]`, the fast weights after the last update if asked for, and the history."""
    updates = 0 if offsets is None else sum(len(borders) - 2 for borders in offsets.keys)
    packed = offsets is not None
    history = block_causal_ttt_history(tokens.k, start, packed, options, updates)
    arrays = history
    if not arrays:  # those of the first step only, which say what a segment's are like
        alone = options._replace(checkpoint_interval=sys.maxsize)
        arrays = block_causal_ttt_history(tokens.k, start, packed, alone, updates)
    with on_device(q):
        o, end = _Call(q, tokens, start, offsets, options, arrays, ranks).forward()
    return o, end, history


def block_causal_ttt_bwd(
    do: Tensor,
    dend: FastWeights | None,
    q: Tensor,
    tokens: Tokens,
    start: FastWeights,
    history: list[Tensor],
    offsets: ChunkOffsets | None,
    options: Options,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tokens, FastWeights]:
    """Gradients of the queries, the tokens and the starting weights."""
    with on_device(q):
        return _Call(q, tokens, start, offsets, options, history, ranks).backward(do, dend)


def block_causal_ttt_history(
    k: Tensor, start: FastWeights, packed: bool, options: Options, at_least: int = 0
) -> list[Tensor]:
    """Room for weights, sums, steps (with momentum or Muon) and betas (with momentum), knowing shapes only.

    Of packed sequences the number of updates is known by its upper bound, with all tokens in one; ranks that
    share chunks have more of them than their own tokens make.
    """
    if options.checkpoint_interval == 0:
        return []
    N, H = start.weights[0].shape[:2]
    Tk, C = k.shape[1], options.chunk_size
    updates = max(Tk // C, at_least) if packed else num_updates(Tk, C, options.return_end)
    kept = updates // options.checkpoint_interval
    dims = Dims.of(start.weights)
    shape = (N + kept if packed else N * (1 + kept), H, dims.size)
    # What is not written is zero, so that the op gives the same whenever it is run.
    room = k.new_zeros if packed or dims.is_padded else k.new_empty
    history = [room(shape), room(shape, dtype=torch.float32)]
    if start.buffers or options.muon:
        history.append(room(shape, dtype=torch.float32))
    if start.buffers:
        chunks = N + updates if packed else N * (1 + updates)
        history.append(room(chunks, H, dtype=torch.float32))
    return history


class _Arrays(NamedTuple):
    """What the history says of some chunks, each tensor with one entry per chunk."""

    weights: Tensor  # [chunks, H, SIZE]
    sums: Tensor
    steps: Tensor | None

    def at(self, first: int, number: int) -> "_Arrays":
        return _Arrays(*(None if x is None else x[first : first + number] for x in self))

    def heads(self) -> "_Arrays":
        """Chunks and heads in one axis."""
        return _Arrays(*(None if x is None else x.flatten(0, 1) for x in self))

    def copy_(self, other: "_Arrays") -> None:
        for place, x in zip(self, other):
            if place is not None:
                place.copy_(x)


class _Segment(NamedTuple):
    """Steps whose arrays are at hand, with those of the step that follows."""

    steps: range
    arrays: _Arrays
    chunks: Chunks

    def at(self, step: int, number: int | None = None) -> _Arrays:
        """The first `number` chunks of a step, or all."""
        number = self.chunks.counts[step] if number is None else number
        return self.arrays.at(self._place(step), number)

    def weights(self, steps: range) -> Tensor:
        """Of the chunks of some steps, `[chunks, H, SIZE]`."""
        return self.arrays.at(self._place(steps.start), self.chunks.num_chunks(steps)).weights

    def _place(self, step: int) -> int:
        return self.chunks.firsts[step] - self.chunks.firsts[self.steps.start]


class _Call:
    """The phases of one call, and what they share."""

    def __init__(
        self,
        q: Tensor,
        tokens: Tokens,
        start: FastWeights,
        offsets: ChunkOffsets | None,
        options: Options,
        history: list[Tensor],
        ranks: Ranks,
    ):
        self.ranks = ranks
        self.q, self.k, self.v = readable_in_place(q, tokens.k, tokens.v)
        self.lr = torch.stack([lr.mT for lr in tokens[2:5]])  # [3, B, H, T]
        self.momentum = tokens.momentum
        self.start, self.options, self.dims = start, options, Dims.of(start.weights)
        self.H = q.shape[2]
        self.chunks = Chunks(q, tokens.k, start.weights[0].shape[0], offsets, options)
        self.norms = self.chunks.ranked(torch.cat(start.norms, dim=-1)).flatten(0, 1)
        self.betas = history[3] if self.momentum is not None else None  # [chunks, H]
        self.history = _Arrays(*history[:3]) if len(history) > 2 else _Arrays(*history, None)

    @functools.cached_property
    def lr1_v(self) -> Tensor:
        """The values times their learning rates, rounded once."""
        lr, _ = self.update_rates
        return torch.mul(self.v, lr[1].mT[..., None], out=self.v.new_empty(self.v.shape))

    @property
    def has_units(self) -> bool:
        """Whether what is rounded needs units: in float16 with Muon, which divides a step by its norm."""
        return self.options.muon and self.k.dtype == torch.float16

    @functools.cached_property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """w `[H, 1]`, k and v `[B, H, T]`, so that `w k` and `w v` bound the products with the weights."""
        length = functools.partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
        w = self.norms.view(self.chunks.N, self.H, -1).amax(dim=(0, 2))[:, None]
        return w, length(self.k).mT, length(self.v).mT * self.dims.Dv**0.5

    @functools.cached_property
    def update_rates(self) -> tuple[Tensor, Tensor | None]:
        """The rates of an update, and the units of its products, `[N, H, 4]`, of which the last counts.

        A head's is the power of two that brings what the rates multiply to at most 2^14. None without units.
        """
        if not self.has_units or not self.k.numel():
            return self.lr, None
        w, k, v = self.lengths
        bound = (self.lr * v * (1.2 * w * w * k).clamp(min=1.0)).amax(dim=(0, 1, 3))  # [H]
        _, exponent = torch.frexp(bound)
        unit = torch.ldexp(torch.ones_like(bound), exponent.clamp(-80, 80) - 14)
        return self.lr / unit[:, None], unit[:, None].expand(self.chunks.N, -1, 4).contiguous()

    @functools.cached_property
    def reach(self) -> Tensor | None:
        """`[N, H, 3]`, see `ttt_activations`. None where gradients need no units."""
        if not self.has_units:
            return None
        if not self.k.numel():
            return self.lr.new_zeros(self.chunks.N, self.H, 3)
        w, k, v = self.lengths
        reach = w * k * (k + v + w * k * v) * self.lr
        reach = torch.linalg.vector_norm(reach, ord=torch.inf, dim=-1)  # [3, B, H]
        return reach.movedim(0, -1).expand(self.chunks.N, -1, -1).contiguous()

    def forward(self) -> tuple[Tensor, FastWeights | None]:
        o = self.q.new_empty(*self.q.shape[:3], self.dims.Dv)
        end = _End(self) if self.options.return_end else None
        if self.momentum is not None:
            steps = range(self.chunks.steps)
            momentum = self.momentum.mT.contiguous()  # [B, H, T]
            ttt_mean_momentum(momentum, self.betas, self.chunks.keys(steps, steps))
            number = self.chunks.num_chunks(steps)  # on some ranks there is room for more
            self.ranks.sum_(self.betas[:number])
        before = None
        for number, steps in enumerate(self.segments()):
            segment = self.segment(steps)
            first = segment.at(steps.start)
            if before is None:
                self.write_start(first)
            else:
                first.copy_(before.at(steps.start))
            if self.options.checkpoint_interval > 1:
                self.checkpoint(number).copy_(first)
            with phase("scan"):
                self.scan(segment)
            if end is not None:
                end.add(segment)
                if steps.stop == self.chunks.steps:
                    end.finish()
                    self.ranks.hand_on(end.result)
            with phase("apply"):
                self.apply(segment, o)
            before = segment
        return o, None if end is None else end.result

    def backward(self, do: Tensor, dend: FastWeights | None) -> tuple[Tensor, Tokens, FastWeights]:
        (do,) = readable_in_place(do)
        grads = _Gradients(self)
        for number, steps in reversed(list(enumerate(self.segments()))):
            segment = self.segment(steps)
            if self.options.checkpoint_interval > 1:
                segment.at(steps.start).copy_(self.checkpoint(number))
                with phase("scan"):
                    self.scan(segment)
            for batch in reversed(self.batches(steps, planes=6)):
                self.batch_backward(segment, batch, do, dend, grads)
        return grads.dq, grads.dtokens(), grads.dstart

    def segments(self) -> list[range]:
        """The steps from one checkpoint to the next; all, if every step is kept."""
        last, interval = self.chunks.steps, self.options.segment
        if interval == 1:
            return [range(last)]
        return [range(first, min(first + interval, last)) for first in range(0, last, interval)]

    def segment(self, steps: range) -> _Segment:
        """The arrays of `steps` and the one after them: the history's own, or else new ones."""
        if self.options.checkpoint_interval == 1:
            return _Segment(steps, self.history, self.chunks)
        last = min(steps.stop + 1, self.chunks.steps)
        number = self.chunks.num_chunks(range(steps.start, last))
        room = torch.zeros_like if self.dims.is_padded else torch.empty_like
        arrays = (None if x is None else room(x[:1].expand(number, -1, -1)) for x in self.history)
        return _Segment(steps, _Arrays(*arrays), self.chunks)

    def checkpoint(self, number: int) -> _Arrays:
        """The history's arrays for the first step of segment `number`."""
        counts = self.chunks.counts[: self.chunks.steps : self.options.checkpoint_interval]
        return self.history.at(sum(counts[:number]), counts[number])

    def write_start(self, first: _Arrays) -> None:
        start = self.start
        self.write(first.weights, start.weights)
        self.write(first.sums, start.masters or start.weights)
        if start.buffers:
            self.write(first.steps, start.buffers)
        elif first.steps is not None:
            first.steps.zero_()  # read by nobody

    def write(self, packed: Tensor | None, matrices: Triple) -> None:
        """Three matrices of each sequence, if there are any, into `[N, H, SIZE]` by rank."""
        if not matrices:
            return
        for place, matrix in zip(self.dims.unpack(packed), matrices):
            place.copy_(self.chunks.ranked(matrix))

    def batches(self, steps: range, planes: int) -> list[range]:
        """Runs of steps whose activations, `planes` numbers for each hidden unit, are held at once."""
        row_bytes = planes * self.H * self.dims.Dh * self.k.element_size()
        return self.chunks.batches(steps, ACTIVATION_BYTES // row_bytes)

    def scan(self, segment: _Segment) -> None:
        for step in segment.steps:
            if self.chunks.active(step):
                self.update(segment, step)

    def update(self, segment: _Segment, step: int) -> None:
        """From the weights of a step's chunks to those of the next step."""
        chunks, dims = self.chunks, self.dims
        number = chunks.active(step)
        steps = range(step, step + 1)
        run = chunks.keys(steps, steps, number)
        now, then = segment.at(step, number), segment.at(step + 1, number)
        acts = self.activations(3, steps)
        lr, units = self.update_rates
        ttt_hidden(self.k, self.v, lr, now.weights, acts, run, dims)
        splits = num_outer_splits(self.k, number, run.width, dims)
        parts = self.floats(splits, number, self.H, dims.size)
        ttt_outer(self.k, self.lr1_v, acts, parts, run, dims, units)
        if self.ranks.share_chunks:
            parts = parts.sum(dim=0, keepdim=True)
            self.ranks.sum_(parts)

        now, then, parts = now.heads(), then.heads(), parts.flatten(1, 2)
        norms = self.norms[: len(now.sums)]
        places = (now.sums, then.sums, then.weights, norms, dims)
        how = {"is_start": step == 0, "prenorm": self.options.prenorm}
        momentum = {"next_steps": then.steps}
        if self.betas is not None:
            momentum |= {"betas": self.betas_of(step, number), "steps": now.steps}
        if not self.options.muon:
            ttt_update(parts, *places, **how, **momentum)
            return
        squares = self.floats(len(norms), dims.rows)
        ttt_update(parts, *places, **how, **momentum, squares=squares)
        orthogonal = self.newton_schulz(number).forward(then.steps, squares)
        ttt_update(orthogonal, *places, **how)

    def apply(self, segment: _Segment, o: Tensor) -> None:
        for batch in self.batches(segment.steps, planes=1):
            run, weights = self.chunks.queries(batch), segment.weights(batch)
            acts = self.activations(1, batch)
            ttt_hidden(self.q, None, None, weights, acts, run, self.dims)
            ttt_project(acts, weights, o, run, self.dims, to_values=True)

    def batch_backward(
        self,
        segment: _Segment,
        batch: range,
        do: Tensor,
        dend: FastWeights | None,
        grads: "_Gradients",
    ) -> None:
        """The backward of some steps, given what the later ones leave in `grads`."""
        chunks, dims = self.chunks, self.dims
        weights = segment.weights(batch)
        acts = self.activations(3, batch)
        with phase("apply backward"):
            run = chunks.queries(batch)
            ttt_hidden(self.q, do, None, weights, acts, run, dims)
            splits = num_outer_splits(self.q, run.num_chunks, run.width, dims)
            dapply = self.floats(splits, run.num_chunks, self.H, dims.size)
            ttt_outer(self.q, do, acts, dapply, run, dims)
            ttt_project(acts, weights, grads.dq, run, dims, to_values=False)
        if batch.stop == chunks.steps:
            grads.begin(dend)

        updating = range(batch.start, min(batch.stop, chunks.updates))
        number = chunks.num_chunks(updating)
        deferred = _Deferred(
            acts,
            dacts=self.activations(3, batch),
            dsteps=self.k.new_empty(number, self.H, dims.size),
            units=None if self.reach is None else self.floats(number, self.H, 4),
            dlr=self.floats(num_rate_tiles(self.k, dims), *acts.shape[:3]),
            dbetas=None if self.betas is None else self.floats(number, self.H, dims.rows),
        )
        with phase("reverse scan"):
            for step in reversed(updating):
                self.update_backward(segment, batch, step, dapply, deferred, grads)
            first = chunks.counts[batch.start]
            grads.dweights[0, :first] += dapply[:, :first].sum(dim=0)
            if batch.start == 0:
                grads.finish()
                self.ranks.hand_back(grads.dstart)
        if updating:
            with phase("deferred"):
                run, dsteps = chunks.keys(updating, batch), deferred.dsteps
                second = (deferred.dacts, weights)
                to_keys = {"to_values": False, "second": second, "units": deferred.units}
                ttt_project(acts, dsteps, grads.dk, run, dims, **to_keys)
                second = (deferred.dacts[1:2], weights)
                to_values = {"to_values": True, "second": second, "units": deferred.units}
                ttt_project(acts[1:2], dsteps, grads.dv, run, dims, lr=self.lr[1], **to_values)
                ttt_rates_bwd(deferred.dlr, deferred.dbetas, grads.dlr, grads.dmomentum, run, dims)

    def update_backward(
        self,
        segment: _Segment,
        batch: range,
        step: int,
        dapply: Tensor,
        deferred: "_Deferred",
        grads: "_Gradients",
    ) -> None:
        """From the gradients of the next step's weights to those of this step's, and of its dG."""
        chunks, dims = self.chunks, self.dims
        number = chunks.active(step)
        heads = number * self.H
        run = chunks.keys(range(step, step + 1), batch, number)
        now, then = segment.at(step, number), segment.at(step + 1, number).heads()
        place = chunks.firsts[step] - chunks.firsts[batch.start]
        mine = slice(place, place + number)
        next_ = slice(place + chunks.counts[step], place + chunks.counts[step] + number)

        dapply = dapply[:, next_] if step + 1 in batch else None
        if self.ranks.share_chunks:
            total = grads.dweights[:, :number].sum(dim=0)
            if dapply is not None:
                total += dapply.sum(dim=0)
            self.ranks.sum_(total)
            grads.dweights[0, :number], grads.dweights[1:, :number] = total, 0
            dapply = None

        places = (
            grads.dweights.flatten(1, 2),
            None if dapply is None else dapply.flatten(1, 2),
            grads.carry.flatten(0, 1), then.sums, self.norms[:heads], grads.dnorms, dims,
        )  # fmt: skip
        dsteps = deferred.dsteps[mine]
        units = None if deferred.units is None else deferred.units[mine]
        momentum = {"prenorm": self.options.prenorm, "dsteps": dsteps.flatten(0, 1), "units": units}
        if self.betas is not None:
            momentum |= {
                "betas": self.betas_of(step, number),
                "steps": now.steps.flatten(0, 1),
                "dbuffers": grads.dbuffers.flatten(0, 1),
                "dbetas": deferred.dbetas[mine].flatten(0, 1),
            }
        muon = {}
        if self.options.muon:
            squares = (self.floats(heads, dims.rows), self.floats(heads, dims.rows))
            muon = {"next_steps": then.steps, "squares": squares}
            ttt_update_bwd(*places, prenorm=self.options.prenorm, **muon)
            dx = grads.carry.flatten(0, 1)[:heads]
            muon["iteration"] = self.newton_schulz(number).backward(
                dx, then.steps, *squares, momentum.get("dbuffers"), with_sizes=units is not None
            )
        ttt_update_bwd(*places, **momentum, **muon)

        ttt_hidden_bwd(
            self.k, self.v, self.lr, now.weights, dsteps, deferred.acts, deferred.dacts,
            deferred.dlr, run, dims, units, self.reach,
        )  # fmt: skip
        ttt_outer(self.k, self.v, deferred.dacts, grads.dweights, run, dims, units)

    def activations(self, planes: int, steps: range) -> Tensor:
        """Room for `planes` numbers for each hidden unit, of the tokens of these steps."""
        return self.k.new_empty(planes, self.H, self.chunks.num_rows(steps), self.dims.Dh)

    def floats(self, *shape: int) -> Tensor:
        return self.k.new_empty(shape, dtype=torch.float32)

    def unpack(self, packed: Tensor) -> Triple:
        """`[N, H, SIZE]` by rank, as three matrices of each sequence in order."""
        return tuple(map(_own, self.dims.unpack(self.chunks.unranked(packed))))

    def newton_schulz(self, number: int) -> NewtonSchulz:
        """The iteration for the steps of `number` chunks."""
        return NewtonSchulz(number * self.H, self.dims, self.k.dtype, self.k.device)

    def betas_of(self, step: int, number: int) -> Tensor | None:
        """`[heads]`, of the first `number` chunks of a step."""
        first = self.chunks.firsts[step]
        return None if self.betas is None else self.betas[first : first + number].flatten()


class _End:
    """The fast weights after each sequence's last update, collected where it happens."""

    def __init__(self, call: _Call):
        self.call = call
        self.sums = call.floats(call.chunks.N, call.H, call.dims.size)
        self.steps = torch.empty_like(self.sums) if call.start.buffers else None

    def add(self, segment: _Segment) -> None:
        """The sequences whose last chunk is in this segment: behind those that go on."""
        chunks = self.call.chunks
        for step in segment.steps:
            goes_on = chunks.active(step)
            if goes_on < chunks.counts[step]:
                arrays = segment.at(step)
                self.sums[goes_on : len(arrays.sums)] = arrays.sums[goes_on:]
                if self.steps is not None:
                    self.steps[goes_on : len(arrays.sums)] = arrays.steps[goes_on:]

    def finish(self) -> None:
        """All there is, in the order of the sequences, as the `result`."""
        call, start = self.call, self.call.start
        updated = call.chunks.active(0)
        weights = []
        for x, w, norm in zip(call.dims.unpack(self.sums), start.weights, start.norms):
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + RENORM_EPS
            x = x * (call.chunks.ranked(norm)[..., None] / length)
            x[updated:] = call.chunks.ranked(w)[updated:]
            weights.append(call.chunks.unranked(x))
        masters = call.unpack(self.sums) if start.masters else ()
        buffers = call.unpack(self.steps) if start.buffers else ()
        norms = tuple(map(_own, start.norms))
        self.result = FastWeights(tuple(weights), norms, masters, buffers)


class _Deferred(NamedTuple):
    """What the reverse scan leaves for the gradients per token, of the chunks of a batch."""

    acts: Tensor  # [3, H, rows, Dh]
    dacts: Tensor  # [3, H, rows, Dh]
    dsteps: Tensor  # [chunks, H, SIZE]
    units: Tensor | None  # [chunks, H, 4]: where dsteps and dacts have any
    dlr: Tensor  # [tiles, 3, H, rows]
    dbetas: Tensor | None  # [chunks, H, ROWS]


class _Gradients:
    """The results of the backward, and what it carries from step to step, by rank."""

    def __init__(self, call: _Call):
        self.call = call
        chunks, dims, H = call.chunks, call.dims, call.H
        self.dq = call.q.new_empty(call.q.shape)
        self.dk, self.dv = call.k.new_zeros(call.k.shape), call.v.new_zeros(call.v.shape)
        self.dlr = torch.zeros_like(call.lr)
        self.dmomentum = None if call.momentum is None else torch.zeros_like(call.lr[0])

        splits = num_outer_splits(call.k, chunks.counts[chunks.steps // 2], chunks.max_length, dims)
        zeros = call.lr.new_zeros
        self.dweights = zeros(splits, chunks.N, H, dims.size)
        self.carry = zeros(chunks.N, H, dims.size)
        self.dbuffers = zeros(chunks.N, H, dims.size) if call.start.buffers else None
        self.dnorms = zeros(chunks.N * H, dims.rows)

    def begin(self, dend: FastWeights | None) -> None:
        """The gradients of the last weights, which the reverse scan starts from."""
        call = self.call
        dend = call.ranks.handed_back(dend)
        if dend is None:
            return
        call.write(self.dweights[0], tuple(map(call.ranks.part, dend.weights)))
        call.write(self.carry, dend.masters)
        call.write(self.dbuffers, dend.buffers)
        self.dnorms.copy_(call.chunks.ranked(torch.cat(dend.norms, dim=-1)).flatten(0, 1))

    def finish(self) -> None:
        """What the reverse scan has left, as the gradients `dstart` of the first weights."""
        call, part = self.call, self.call.ranks.part
        dweights = self.dweights.sum(dim=0)
        if not call.start.masters:
            dweights += part(self.carry)
        dmasters = call.unpack(part(self.carry)) if call.start.masters else ()
        dbuffers = call.unpack(part(self.dbuffers)) if call.start.buffers else ()
        dnorms = call.chunks.unranked(part(self.dnorms).unflatten(0, (call.chunks.N, call.H)))
        dnorms = tuple(map(_own, call.dims.unpack_rows(dnorms)))
        self.dstart = FastWeights(call.unpack(dweights), dnorms, dmasters, dbuffers)

    def dtokens(self) -> Tokens:
        dmomentum = None if self.dmomentum is None else _own(self.dmomentum.mT)
        return Tokens(self.dk, self.dv, *map(_own, self.dlr.mT), dmomentum)


def _own(x: Tensor) -> Tensor:
    """A contiguous copy: what an op returns shares no memory."""
    return x.clone(memory_format=torch.contiguous_format)
