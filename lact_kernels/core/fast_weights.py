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
    """The fast weights between two updates, and what the next one needs, `[B, H, ...]`.

    Before the first update the weights alone may be given: all else follows from them, see `begun`.
    """

    weights: Triple
    norms: Triple = ()  # target norms of the rows, [B, H, rows]
    masters: Triple = ()  # weights before renorm: pre-norm only
    buffers: Triple = ()  # momentum, where there is any

    @classmethod
    def from_list(cls, x: list[Tensor], prenorm: bool) -> "FastWeights":
        """Of three tensors for each field that is not empty."""
        if len(x) == 3:
            return cls(tuple(x))
        masters, buffers = (x[6:9], x[9:]) if prenorm else ((), x[6:])
        return cls(tuple(x[:3]), tuple(x[3:6]), tuple(masters), tuple(buffers))

    @property
    def is_new(self) -> bool:
        """Whether these are the weights alone."""
        return not self.norms

    def begun(self, prenorm: bool, momentum: bool, detach_norms: bool = False) -> "FastWeights":
        """With the norms of the weights, masters that are the weights, and momentum of 0, if not given."""
        if not self.is_new:
            return self
        weights = self.weights
        rows = tuple(w.detach() for w in weights) if detach_norms else weights
        norms = tuple(torch.linalg.vector_norm(w, dim=-1) for w in rows)
        buffers = tuple(w.new_zeros(()).expand(w.shape) for w in weights) if momentum else ()
        return FastWeights(weights, norms, weights if prenorm else (), buffers)

    def gradient(self, d: "FastWeights") -> "FastWeights":
        """The gradient of these, from that of what `begun` makes of them."""
        if not self.is_new:
            return d
        total = []
        for i, (w, dw, dnorm) in enumerate(zip(self.weights, d.weights, d.norms)):
            norm = torch.linalg.vector_norm(w, dim=-1)
            dw = dw + torch.where(norm > 0, dnorm / norm, 0)[..., None] * w
            total.append(dw + d.masters[i] if d.masters else dw)
        return FastWeights(tuple(total))

    def to_list(self) -> list[Tensor]:
        return [x for triple in self for x in triple]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "FastWeights":
        return FastWeights(*(tuple(map(fn, triple)) for triple in self))

    def empty_end(self, prenorm: bool, momentum: bool) -> list[Tensor]:
        """Room for the fast weights after an update that began with these, as a list."""
        weights = self.weights
        shapes = [w.shape for w in weights]
        again = shapes * (prenorm + momentum)
        shapes = [*shapes, *(shape[:-1] for shape in shapes), *again]
        return [weights[0].new_empty(shape) for shape in shapes]

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
