"""What a scan of fast weights keeps for its backward, in Triton.

The *history* has, for each chunk, step by step and in each step in the order of `layout`:

    weights    in the dtype of the products, which the queries of the chunk are applied to
    sums       float32, before the renorm that gave these weights (the start: the weights or masters)
    steps      float32, M before the chunk's update: with momentum or Muon
    gradients  float32, G of the update that gave these weights: where momentum comes after Muon
    betas      the mean momentum of the chunk: with momentum

and once for each sequence

    norms      float32, the target norms of the rows

So beside its inputs the backward keeps, for each update, `e + 4` bytes for each fast weight, or `e + 8` with
momentum or Muon, where e is the item size of the tokens. Where momentum comes after Muon it is `e + 12`: the
backward needs G, which Muon got, as well as M, which the gradient of beta needs. M could be had from the M
before and G, but only by another iteration. With a checkpoint interval of n it keeps this of
every n-th step only, and computes the others again, n steps at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Call
from lact_kernels.triton.fast_weights.layout import ALL_MATRICES, Chunks, Dims


def trained_matrices(call: Call) -> tuple[bool, ...]:
    """Which of w0, w1 and w2 updates change. (Where there is no update, all might be changed.)"""
    return tuple(i in call.trained for i in range(3)) if call.trained else ALL_MATRICES


def ttt_history(call: Call) -> list[Tensor]:
    """Room for weights, sums, steps, gradients, betas and norms, as far as there are any, by shapes alone."""
    k, start, options, packed = call.tokens.k, call.start, call.options, call.plan is not None
    if options.checkpoint_interval == 0:
        return []
    N, H = start.weights[0].shape[:2]
    updates = call.num_updates
    if packed and k.shape[0] != 1:  # a plan for each row
        updates *= N
    kept = updates // options.checkpoint_interval
    dims = Dims.of(start.weights)
    shape = (N + kept if packed else N * (1 + kept), H, dims.size)
    # What is not written is zero, so that the op gives the same whenever it is run.
    has_gaps = packed or dims.is_padded or trained_matrices(call) != ALL_MATRICES
    room = k.new_zeros if has_gaps else k.new_empty
    history = [room(shape)]
    history += [room(shape, dtype=torch.float32) for _ in range(num_float_arrays(call))]
    if options.momentum:
        chunks = N + updates if packed else N * (1 + updates)
        history.append(room(chunks, H, dtype=torch.float32))
    history.append(k.new_empty(N, H, dims.rows, dtype=torch.float32))
    return history


def num_float_arrays(call: Call) -> int:
    """Of sums, steps and gradients those that there are."""
    options = call.options
    has_steps = options.momentum or options.coefficients is not None
    return 1 + has_steps + options.momentum_after_muon


class Arrays(NamedTuple):
    """What the history says of some chunks, each tensor with one entry per chunk."""

    weights: Tensor  # [chunks, H, SIZE]
    sums: Tensor
    steps: Tensor | None = None
    gradients: Tensor | None = None

    def map(self, fn) -> "Arrays":
        return Arrays(*(None if x is None else fn(x) for x in self))

    def at(self, first: int, number: int) -> "Arrays":
        return self.map(lambda x: x[first : first + number])

    def copy_(self, other: "Arrays") -> None:
        for place, x in zip(self, other):
            if place is not None:
                place.copy_(x)

    @property
    def muon(self) -> Tensor:
        """What Muon was given in the update that gave these weights."""
        return self.steps if self.gradients is None else self.gradients


class Segment(NamedTuple):
    """Steps whose arrays are at hand, with those of the step that follows."""

    steps: range
    arrays: Arrays
    betas: Tensor | None  # [chunks, H], with momentum
    chunks: Chunks

    def at(self, step: int) -> Arrays:
        """The chunks of a step."""
        return self.arrays.at(self._place(step), self.chunks.counts[step])

    def part(self, steps: range) -> "Segment":
        """Some of the steps, whose arrays begin with the first of them."""
        first = self._place(steps.start)
        betas = None if self.betas is None else self.betas[first:]
        return Segment(steps, self.arrays.map(lambda x: x[first:]), betas, self.chunks)

    def _place(self, step: int) -> int:
        return self.chunks.firsts[step] - self.chunks.firsts[self.steps.start]
