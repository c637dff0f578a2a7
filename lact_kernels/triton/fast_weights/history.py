"""What a scan of fast weights keeps for its backward, in Triton.

The *history* has, for each chunk, step by step and in each step in the order of `layout`:

    weights  in the dtype of the products, which the queries of the chunk are applied to
    sums     float32, before the renorm that gave these weights (the start: the weights or masters)
    steps    float32, M before the chunk's update: with momentum or Muon
    betas    the mean momentum of the chunk: with momentum

So beside its inputs the backward keeps, for each update, `e + 4` bytes for each fast weight, or `e + 8` with
momentum or Muon, where e is the item size of the tokens. With a checkpoint interval of n it keeps this of
every n-th step only, and computes the others again, n steps at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Call
from lact_kernels.triton.fast_weights.layout import Chunks, Dims


def ttt_history(call: Call) -> list[Tensor]:
    """Room for weights, sums, steps (with momentum or Muon) and betas (with momentum), by shapes alone."""
    k, start, options, packed = call.tokens.k, call.start, call.options, call.plan is not None
    if options.checkpoint_interval == 0:
        return []
    N, H = start.weights[0].shape[:2]
    updates = call.num_updates
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


class Arrays(NamedTuple):
    """What the history says of some chunks, each tensor with one entry per chunk."""

    weights: Tensor  # [chunks, H, SIZE]
    sums: Tensor
    steps: Tensor | None

    def at(self, first: int, number: int) -> "Arrays":
        return Arrays(*(None if x is None else x[first : first + number] for x in self))

    def heads(self) -> "Arrays":
        """Chunks and heads in one axis."""
        return Arrays(*(None if x is None else x.flatten(0, 1) for x in self))

    def copy_(self, other: "Arrays") -> None:
        for place, x in zip(self, other):
            if place is not None:
                place.copy_(x)


class Segment(NamedTuple):
    """Steps whose arrays are at hand, with those of the step that follows."""

    steps: range
    arrays: Arrays
    chunks: Chunks

    def at(self, step: int, number: int | None = None) -> Arrays:
        """The first `number` chunks of a step, or all."""
        number = self.chunks.counts[step] if number is None else number
        return self.arrays.at(self._place(step), number)

    def weights(self, steps: range) -> Tensor:
        """Of the chunks of some steps, `[chunks, H, SIZE]`."""
        return self.arrays.at(self._place(steps.start), self.chunks.num_chunks(steps)).weights

    def _place(self, step: int) -> int:
        return self.chunks.firsts[step] - self.chunks.firsts[self.steps.start]
