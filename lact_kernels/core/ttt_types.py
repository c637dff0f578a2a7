"""What travels between the layers of `block_causal_ttt`, and the numbers that define it, for every layer.

It needs torch alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RENORM_EPS = 1e-5
NEWTON_SCHULZ_EPS = 1e-7
INFERENCE_SEGMENT = 16  # updates that are computed in one go where no backward will come
NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

Triple = tuple[Tensor, ...]  # one tensor for each of w0, w1, w2; empty where an option is off


class FastWeights(NamedTuple):
    """The fast weights between two chunks, and what their next update needs, `[B, H, ...]`."""

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

    def to_list(self) -> list[Tensor]:
        return [x for triple in self for x in triple]


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


class Options(NamedTuple):
    """How one call computes."""

    chunk_size: int
    muon: bool
    prenorm: bool
    return_end: bool
    checkpoint_interval: int  # 0: no backward will come, and the history is empty

    @property
    def segment(self) -> int:
        """Updates that are computed in one go; 1 stands for all."""
        return self.checkpoint_interval or INFERENCE_SEGMENT


class Ranks:
    """What a scan has to do with those of other processes: nothing, which is what this class does.

    `lact_kernels.distributed` has the others: ranks that share each chunk (they take part in `sum_`), and
    ranks that have the chunks in turn (they hand fast weights on, and gradients back).
    """

    share_chunks = False  # whether each rank has a part of every chunk's tokens

    def receive(self, start: FastWeights) -> FastWeights:
        """The fast weights to start from: those given, or what another rank hands on."""
        return start

    def sum_(self, *tensors: Tensor) -> None:
        """Sum each tensor over the ranks that share chunks, in place."""

    def part(self, x: Tensor) -> Tensor:
        """A gradient that ranks which share chunks know alike, as this rank's part of a sum over them."""
        return x

    def hand_on(self, end: FastWeights) -> None:
        """The fast weights after the last update, before any query of the last sequence is applied."""

    def handed_back(self, dend: FastWeights) -> FastWeights:
        """The gradients of `end`, given what this rank has of them. The reverse scan waits for it."""
        return dend

    def hand_back(self, dstart: FastWeights) -> None:
        """The gradients of the fast weights before the first update, as soon as they are known."""


ALONE = Ranks()


def num_updates(Tk: int, chunk_size: int, return_end: bool) -> int:
    """All full chunks, or without an end: the last chunk's update would change no output."""
    return Tk // chunk_size if return_end else max(Tk - 1, 0) // chunk_size


def phase(name: str) -> torch.profiler.record_function:
    """A context that marks a phase of the computation in profiles."""
    return torch.profiler.record_function(f"block_causal_ttt {name}")
