"""`FastWeights`: the weights between two updates, and the numbers that define an update."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RENORM_EPS = 1e-5

Triple = tuple[Tensor, ...]  # one tensor for each of w0, w1, w2; empty where an option is off


def wide_dtype(x: Tensor) -> torch.dtype:
    """That of fast weights, rates and momentum beside tokens x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class FastWeights(NamedTuple):
    """The fast weights between two updates, and what the next one needs, `[B, H, ...]`."""

    weights: Triple
    norms: Triple  # target norms of the rows, [B, H, rows]
    masters: Triple  # weights before renorm: pre-norm only
    buffers: Triple  # momentum, where there is any

    @classmethod
    def from_list(cls, x: list[Tensor], prenorm: bool) -> "FastWeights":
        """Of three tensors for each field that is not empty."""
        masters, buffers = (x[6:9], x[9:]) if prenorm else ((), x[6:])
        return cls(tuple(x[:3]), tuple(x[3:6]), tuple(masters), tuple(buffers))

    def to_list(self) -> list[Tensor]:
        return [x for triple in self for x in triple]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "FastWeights":
        return FastWeights(*(tuple(map(fn, triple)) for triple in self))

    def at(self, rows: slice) -> "FastWeights":
        return self.map(lambda x: x[rows])

    @property
    def updated(self) -> list[Tensor]:
        """What an update changes: all but the norms."""
        return [*self.weights, *self.masters, *self.buffers]

    def with_updated(self, x: list[Tensor]) -> "FastWeights":
        """With other tensors in the place of `updated`."""
        weights, rest = tuple(x[:3]), x[3:]
        masters, buffers = rest[: len(self.masters)], rest[len(self.masters) :]
        return FastWeights(weights, self.norms, tuple(masters), tuple(buffers))
