"""The forward of test-time training in Triton.

    scan     gradients -> momentum -> Muon -> renorm, step by step: each chunk's weights
    apply    the queries of all chunks through the weights of their chunk, at once

Sequences of a batch, packed or not, are scanned side by side; `layout` numbers their chunks. "At once" is
bounded: as many steps at a time as have activations within ACTIVATION_BYTES.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lact_kernels.core.call import Call, phase
from lact_kernels.core.fast_weights import FastWeights, Triple
from lact_kernels.core.ranks import named
from lact_kernels.triton.fast_weights.activations import ttt_hidden
from lact_kernels.triton.fast_weights.blocks import can_be_described
from lact_kernels.triton.fast_weights.end import End
from lact_kernels.triton.fast_weights.history import (
    Arrays,
    Segment,
    num_float_arrays,
    trained_matrices,
)
from lact_kernels.triton.fast_weights.layout import ALL_MATRICES, Chunks, Dims, Heads
from lact_kernels.triton.fast_weights.newton_schulz import Iteration
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.start import ttt_start
from lact_kernels.triton.fast_weights.update import ttt_mean_momentum, ttt_update
from lact_kernels.triton.launch import readable_in_place

ACTIVATION_BYTES = 2**30


class Scan:
    """The phases of one call, and what they share."""

    def __init__(self, call: Call, history: list[Tensor]):
        q, tokens, start = call.q, call.tokens, call.start
        self.ranks, self.options, self.start = named(call.ranks), call.options, start
        self.q, self.k, self.v = readable_in_place(q, tokens.k, tokens.v)
        self.tokens, self.rates, self.momentum = tokens, tokens.rates, tokens.momentum
        self.dims, self.H = Dims.of(start.weights, trained_matrices(call)), q.shape[2]
        self.chunks = Chunks(call)
        self.norms = history[-1]  # [N, H, ROWS]
        arrays = 1 + num_float_arrays(call)
        self.history = Arrays(*history[:arrays])
        self.betas = history[arrays] if self.momentum is not None else None  # [chunks, H]
        self.iterations: dict[int, Iteration] = {}

    @functools.cached_property
    def lr(self) -> Tensor:
        """`[3, B, H, T]`. What stands for rates that there are not is read by nobody."""
        given = [lr for lr in self.rates if lr is not None] or [self.k[..., 0].float()]
        return torch.stack([(given[0] if lr is None else lr).mT for lr in self.rates])

    @functools.cached_property
    def describes_keys(self) -> bool:
        """Whether descriptors copy keys and values, and what is computed of them."""
        return self.chunks.are_in_blocks(0) and can_be_described(self.k, self.v)

    def describes_queries(self, do: Tensor | None = None) -> bool:
        """The same of queries, and of the gradients of their outputs."""
        chunks = self.chunks
        return chunks.are_in_blocks(chunks.Tk - chunks.Tq) and can_be_described(self.q, do)

    @property
    def of_all(self) -> Dims:
        """Those of the apply: also of the matrices that are not trained."""
        return self.dims.having(*ALL_MATRICES)

    @property
    def has_untrained(self) -> bool:
        return self.dims.matrices != ALL_MATRICES

    @functools.cached_property
    def lr1_v(self) -> Tensor:
        """The values times their learning rates, rounded once."""
        if self.rates[1] is None:
            return self.v
        lr, _ = self.update_rates
        return torch.mul(self.v, lr[1].mT[..., None], out=self.v.new_empty(self.v.shape))

    @property
    def has_units(self) -> bool:
        """Whether what is rounded needs units: in float16 with Muon, which divides a step by its norm."""
        return self.options.coefficients is not None and self.k.dtype == torch.float16

    @functools.cached_property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        """w `[H, 1]`, k and v `[B, H, T]`, so that `w k` and `w v` bound the products with the weights."""
        length = functools.partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
        if self.options.weight_norm:
            w = self.norms.amax(dim=(0, 2))
        else:
            w = self._longest_rows(self.start.weights) + self._growth()
        return w[:, None], length(self.k).mT, length(self.v).mT * self.dims.Dv**0.5

    def _growth(self) -> Tensor | float:
        """What all updates together can add to the length of a row, without renorm and with Muon."""
        updates, step = self.chunks.updates, largest_singular_value(self.options.coefficients)
        if not self.options.momentum_after_muon:
            return updates * step
        # M grows by a step at a time, from that of the start.
        first = self._longest_rows(self.start.buffers) if self.start.buffers else 0.0
        return updates * (first + step * (updates + 1) / 2)

    def _longest_rows(self, matrices: Triple) -> Tensor:
        """`[H]`, of all sequences and all three matrices."""
        lengths = (torch.linalg.vector_norm(x, dim=-1).amax(dim=(0, 2)) for x in matrices)
        return functools.reduce(torch.maximum, lengths)

    @functools.cached_property
    def update_rates(self) -> tuple[Tensor, Tensor | None]:
        """The rates of an update, and the units of its products, `[chunks, H, 4]`, of which the last counts.

        A head's is the power of two that brings what the rates multiply to at most 2^14. None without units.
        """
        if not self.has_units or not self.k.numel():
            return self.lr, None
        w, k, v = self.lengths
        bound = (self.lr * v * (1.2 * w * w * k).clamp(min=1.0)).amax(dim=(0, 1, 3))  # [H]
        _, exponent = torch.frexp(bound)
        unit = torch.ldexp(torch.ones_like(bound), exponent.clamp(-80, 80) - 14)
        number = self.chunks.firsts[-1]
        return self.lr / unit[:, None], unit[:, None].expand(number, -1, 4).contiguous()

    def forward(self) -> tuple[Tensor, FastWeights | None]:
        o = self.q.new_empty(*self.q.shape[:3], self.dims.Dv)
        end, result = End.of(self.chunks, self.history), None
        if self.momentum is not None:
            steps = range(self.chunks.steps)
            ttt_mean_momentum(self.momentum, self.betas, self.chunks.keys(steps, 0, 0))
            number = self.chunks.num_chunks(steps)  # on some ranks there is room for more
            self.ranks.sum_(self.betas[:number])
        before = None
        for number, steps in enumerate(self.segments()):
            segment = self.segment(steps)
            first = segment.at(steps.start)
            if before is None:
                ttt_start(self.start, self.chunks.order, first, self.norms, self.dims)
            else:
                first.copy_(before.at(steps.start))
            if self.options.checkpoint_interval > 1:
                self.checkpoint(number).copy_(first)
            with phase("scan"):
                self.scan(segment)
            if self.options.return_end:
                end = end.add(segment)
                if steps.stop == self.chunks.steps:
                    result = end.fast_weights(self.start, self.options, self.norms, self.dims)
                    self.ranks.send(result)
            with phase("apply"):
                self.apply(segment, o)
            before = segment
        return o, result

    @functools.cached_property
    def splits(self) -> int:
        """Parts of an update's gradients: one number for all steps, that of one in the middle."""
        steps = range(self.chunks.steps)
        number, longest = self.chunks.counts[len(steps) // 2], self.chunks.of_keys.width(steps)
        return num_outer_splits(self.k, number, longest, self.dims, self.describes_keys)

    def segments(self) -> list[range]:
        """The steps from one checkpoint to the next; all, if every step is kept."""
        last, interval = self.chunks.steps, self.options.segment
        if interval == 1:
            return [range(last)]
        return [range(first, min(first + interval, last)) for first in range(0, last, interval)]

    def segment(self, steps: range) -> Segment:
        """The arrays of `steps` and the one after them: the history's own, or else new ones."""
        if self.options.checkpoint_interval == 1:
            return Segment(steps, self.history, self.betas, self.chunks)
        number = self.chunks.num_chunks(self._and_next(steps))
        room = torch.zeros_like if self.dims.is_padded else torch.empty_like
        arrays = self.history.map(lambda x: room(x[:1].expand(number, -1, -1)))
        betas = None if self.betas is None else self.betas[self.chunks.firsts[steps.start] :]
        return Segment(steps, arrays, betas, self.chunks)

    def _and_next(self, steps: range) -> range:
        return range(steps.start, min(steps.stop + 1, self.chunks.steps))

    def checkpoint(self, number: int) -> Arrays:
        """The history's arrays for the first step of segment `number`."""
        counts = self.chunks.counts[: self.chunks.steps : self.options.checkpoint_interval]
        return self.history.at(sum(counts[:number]), counts[number])

    def write(self, packed: Tensor | None, matrices: Triple) -> None:
        """Three matrices of each sequence, if there are any, into `[N, H, SIZE]` in the order of `layout`."""
        if not matrices:
            return
        if not self.dims.is_padded and self.chunks.order is None:
            torch.cat([x.flatten(2) for x in matrices], dim=-1, out=packed)
            return
        for place, matrix in zip(self.dims.unpack(packed), matrices):
            place.copy_(self.chunks.sorted(matrix))

    def batches(self, steps: range, planes: int) -> list[range]:
        """Runs of steps whose activations, `planes` numbers for each hidden unit, are held at once."""
        row_bytes = planes * self.H * self.dims.Dh * self.k.element_size()
        return self.chunks.batches(steps, ACTIVATION_BYTES // row_bytes)

    def scan(self, segment: Segment) -> None:
        """From each step's weights to the next one's: gradients -> momentum -> Muon -> renorm."""
        chunks, dims, first = self.chunks, self.dims, segment.steps.start
        steps = range(first, min(segment.steps.stop, chunks.updates))
        if self.has_untrained:
            self.write_untrained(segment)
        if not steps or not chunks.active(first):
            return
        acts = self.activations(3, chunks.of_keys.most(steps))
        parts = self.floats(self.splits, chunks.active(first), self.H, dims.size)
        lr, units = self.update_rates
        described = self.describes_keys
        hidden = ttt_hidden(self.k, self.v, lr, segment.arrays.weights, acts, dims, described)
        outer = ttt_outer(self.k, self.lr1_v, acts, parts, dims, units, described)
        update = self.update(segment)
        for step in steps:
            run = chunks.keys(range(step, step + 1), first, step, chunks.active(step))
            hidden(run)
            outer(run)
            gradients = self.shared(parts) if self.ranks.share_chunks else parts
            update(gradients, chunks.heads(step, first, self.H), step == 0)

    def write_untrained(self, segment: Segment) -> None:
        """The matrices that no update changes: from the first chunks of a segment to all others."""
        steps = self._and_next(segment.steps)
        weights = segment.arrays.weights[: self.chunks.num_chunks(steps)]
        first = len(segment.at(steps.start).weights)
        if len(weights) == first:
            return
        sequences = self.chunks.places(range(steps.start + 1, steps.stop))
        for span in self.dims.spans([not trained for trained in self.dims.matrices]):
            weights[first:, :, span] = weights[:first, :, span][sequences]

    def update(self, segment: Segment) -> Callable[[Tensor, Heads, bool], None]:
        """What `ttt_update` returns, which with Muon has two parts."""
        arrays, dims, options = segment.arrays, self.dims, self.options
        launch = functools.partial(
            ttt_update,
            arrays.sums,
            arrays.weights,
            self.target_norms,
            dims,
            prenorm=options.prenorm,
        )
        momentum = {"next_steps": arrays.steps}
        if self.betas is not None:
            momentum |= {"betas": segment.betas, "steps": arrays.steps}
        if options.coefficients is None:
            return launch(**momentum)
        squares = self.floats(self.chunks.N * self.H, dims.rows)
        if options.momentum_after_muon:
            before, after = launch(next_steps=arrays.gradients, squares=squares), launch(**momentum)
        else:
            before, after = launch(**momentum, squares=squares), launch()
        given = arrays.muon.flatten(0, 1)

        def update(gradients: Tensor, heads: Heads, is_start: bool) -> None:
            before(gradients, heads, is_start)
            g = given[heads.next_first : heads.next_first + heads.number]
            orthogonal = self.newton_schulz(heads.number).forward(g, squares[: heads.number])
            after(orthogonal, heads, is_start)

        return update

    def shared(self, parts: Tensor) -> Tensor:
        """The sum of gradients in parts, over all ranks that share chunks, as one part."""
        total = parts.sum(dim=0, keepdim=True)
        self.ranks.sum_(total)
        return total

    def apply(self, segment: Segment, o: Tensor) -> None:
        for steps in self.chunks.applied(segment.steps):
            for batch in self.batches(steps, planes=1):
                run = self.chunks.queries(batch, segment.steps.start)
                weights = segment.arrays.weights
                acts = self.activations(1, self.chunks.of_queries.number(batch))
                described = self.describes_queries()
                ttt_hidden(self.q, None, None, weights, acts, self.of_all, described)(run)
                ttt_project(acts, weights, o, self.of_all, True, described=described)(run)

    def activations(self, planes: int, rows: int) -> Tensor:
        """Room for `planes` numbers for each hidden unit, of as many tokens."""
        return self.k.new_empty(planes, self.H, rows, self.dims.Dh)

    @property
    def target_norms(self) -> Tensor | None:
        """`[N, H, ROWS]`; None without renorm."""
        return self.norms if self.options.weight_norm else None

    def floats(self, *shape: int) -> Tensor:
        return self.k.new_empty(shape, dtype=torch.float32)

    def newton_schulz(self, heads: int) -> Iteration:
        """The iteration for so many heads."""
        if heads not in self.iterations:
            k, triples = self.k, self.options.coefficients
            self.iterations[heads] = Iteration(heads, self.dims, k.dtype, k.device, triples)
        return self.iterations[heads]


@functools.cache
def largest_singular_value(coefficients: tuple[tuple[float, float, float], ...]) -> float:
    """A bound of what Muon makes of a matrix, whose own are at most 1 before the first step."""
    top, points = 1.0, 1000
    for a, b, c in coefficients:
        singular_values = (top * i / points for i in range(points + 1))
        top = 1.01 * max(abs(a * s + b * s**3 + c * s**5) for s in singular_values)
    return top
