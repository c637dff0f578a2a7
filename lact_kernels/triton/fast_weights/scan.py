"""The forward of test-time training in Triton.

    scan     gradients -> momentum -> Muon -> renorm, step by step: each chunk's weights
    apply    the queries of all chunks through the weights of their chunk, at once

Sequences of a batch, packed or not, are scanned side by side; `layout` numbers their chunks. "At once" is
bounded: as many steps at a time as have activations within ACTIVATION_BYTES.
"""

import functools

import torch
from torch import Tensor

from lact_kernels.core.call import Call, phase
from lact_kernels.core.fast_weights import RENORM_EPS, FastWeights, Triple
from lact_kernels.core.ranks import named
from lact_kernels.triton.fast_weights.activations import ttt_hidden
from lact_kernels.triton.fast_weights.history import Arrays, Segment
from lact_kernels.triton.fast_weights.layout import Chunks, Dims
from lact_kernels.triton.fast_weights.newton_schulz import NewtonSchulz
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.update import ttt_mean_momentum, ttt_update
from lact_kernels.triton.launch import readable_in_place

ACTIVATION_BYTES = 2**30


class Scan:
    """The phases of one call, and what they share."""

    def __init__(self, call: Call, history: list[Tensor]):
        q, tokens, start = call.q, call.tokens, call.start
        self.ranks, self.options, self.start = named(call.ranks), call.options, start
        self.q, self.k, self.v = readable_in_place(q, tokens.k, tokens.v)
        self.lr = torch.stack([lr.mT for lr in tokens[2:5]])  # [3, B, H, T]
        self.momentum = tokens.momentum
        self.dims, self.H = Dims.of(start.weights), q.shape[2]
        self.chunks = Chunks(call)
        self.norms = self.chunks.sorted(torch.cat(start.norms, dim=-1)).flatten(0, 1)
        self.betas = history[3] if self.momentum is not None else None  # [chunks, H]
        self.history = Arrays(*history[:3]) if len(history) > 2 else Arrays(*history, None)

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
                    self.ranks.send(end.result)
            with phase("apply"):
                self.apply(segment, o)
            before = segment
        return o, None if end is None else end.result

    def segments(self) -> list[range]:
        """The steps from one checkpoint to the next; all, if every step is kept."""
        last, interval = self.chunks.steps, self.options.segment
        if interval == 1:
            return [range(last)]
        return [range(first, min(first + interval, last)) for first in range(0, last, interval)]

    def segment(self, steps: range) -> Segment:
        """The arrays of `steps` and the one after them: the history's own, or else new ones."""
        if self.options.checkpoint_interval == 1:
            return Segment(steps, self.history, self.chunks)
        last = min(steps.stop + 1, self.chunks.steps)
        number = self.chunks.num_chunks(range(steps.start, last))
        room = torch.zeros_like if self.dims.is_padded else torch.empty_like
        arrays = (None if x is None else room(x[:1].expand(number, -1, -1)) for x in self.history)
        return Segment(steps, Arrays(*arrays), self.chunks)

    def checkpoint(self, number: int) -> Arrays:
        """The history's arrays for the first step of segment `number`."""
        counts = self.chunks.counts[: self.chunks.steps : self.options.checkpoint_interval]
        return self.history.at(sum(counts[:number]), counts[number])

    def write_start(self, first: Arrays) -> None:
        start = self.start
        self.write(first.weights, start.weights)
        self.write(first.sums, start.masters or start.weights)
        if start.buffers:
            self.write(first.steps, start.buffers)
        elif first.steps is not None:
            first.steps.zero_()  # read by nobody

    def write(self, packed: Tensor | None, matrices: Triple) -> None:
        """Three matrices of each sequence, if there are any, into `[N, H, SIZE]` in the order of `layout`."""
        if not matrices:
            return
        for place, matrix in zip(self.dims.unpack(packed), matrices):
            place.copy_(self.chunks.sorted(matrix))

    def batches(self, steps: range, planes: int) -> list[range]:
        """Runs of steps whose activations, `planes` numbers for each hidden unit, are held at once."""
        row_bytes = planes * self.H * self.dims.Dh * self.k.element_size()
        return self.chunks.batches(steps, ACTIVATION_BYTES // row_bytes)

    def scan(self, segment: Segment) -> None:
        for step in segment.steps:
            if self.chunks.active(step):
                self.update(segment, step)

    def update(self, segment: Segment, step: int) -> None:
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

    def apply(self, segment: Segment, o: Tensor) -> None:
        for batch in self.batches(segment.steps, planes=1):
            run, weights = self.chunks.queries(batch), segment.weights(batch)
            acts = self.activations(1, batch)
            ttt_hidden(self.q, None, None, weights, acts, run, self.dims)
            ttt_project(acts, weights, o, run, self.dims, to_values=True)

    def activations(self, planes: int, steps: range) -> Tensor:
        """Room for `planes` numbers for each hidden unit, of the tokens of these steps."""
        return self.k.new_empty(planes, self.H, self.chunks.num_rows(steps), self.dims.Dh)

    def floats(self, *shape: int) -> Tensor:
        return self.k.new_empty(shape, dtype=torch.float32)

    def unpack(self, packed: Tensor) -> Triple:
        """`[N, H, SIZE]` in the order of `layout`, as three matrices of each sequence in order."""
        return tuple(map(own, self.dims.unpack(self.chunks.unsorted(packed))))

    def newton_schulz(self, number: int) -> NewtonSchulz:
        """The iteration for the steps of `number` chunks."""
        return NewtonSchulz(number * self.H, self.dims, self.k.dtype, self.k.device)

    def betas_of(self, step: int, number: int) -> Tensor | None:
        """`[heads]`, of the first `number` chunks of a step."""
        first = self.chunks.firsts[step]
        return None if self.betas is None else self.betas[first : first + number].flatten()


class _End:
    """The fast weights after each sequence's last update, collected where it happens."""

    def __init__(self, scan: "Scan"):
        self.scan = scan
        self.sums = scan.floats(scan.chunks.N, scan.H, scan.dims.size)
        self.steps = torch.empty_like(self.sums) if scan.start.buffers else None

    def add(self, segment: Segment) -> None:
        """The sequences whose last chunk is in this segment: behind those that go on."""
        chunks = self.scan.chunks
        for step in segment.steps:
            goes_on = chunks.active(step)
            if goes_on < chunks.counts[step]:
                arrays = segment.at(step)
                self.sums[goes_on : len(arrays.sums)] = arrays.sums[goes_on:]
                if self.steps is not None:
                    self.steps[goes_on : len(arrays.sums)] = arrays.steps[goes_on:]

    def finish(self) -> None:
        """All there is, in the order of the sequences, as the `result`."""
        scan, start = self.scan, self.scan.start
        updated = scan.chunks.active(0)
        weights = []
        for x, w, norm in zip(scan.dims.unpack(self.sums), start.weights, start.norms):
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + RENORM_EPS
            x = x * (scan.chunks.sorted(norm)[..., None] / length)
            x[updated:] = scan.chunks.sorted(w)[updated:]
            weights.append(scan.chunks.unsorted(x))
        masters = scan.unpack(self.sums) if start.masters else ()
        buffers = scan.unpack(self.steps) if start.buffers else ()
        norms = tuple(map(own, start.norms))
        self.result = FastWeights(tuple(weights), norms, masters, buffers)


def own(x: Tensor) -> Tensor:
    """A contiguous copy: what an op returns shares no memory."""
    return x.clone(memory_format=torch.contiguous_format)
