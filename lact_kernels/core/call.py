"""`Call`: what a backend is asked to compute."""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.plan import num_updates
from lact_kernels.core.tokens import Tokens

INFERENCE_SEGMENT = 16  # updates that are computed in one go where no backward will come


class Options(NamedTuple):
    """How fast weights are updated, which all calls of one sequence share, and what one call wants of it."""

    chunk_size: int
    muon: bool
    prenorm: bool
    momentum: bool  # whether the tokens have one
    return_end: bool = False
    checkpoint_interval: int = 1  # 0: no backward will come, and the history is empty

    @property
    def shared(self) -> "Options":
        """Without what is one call's own."""
        return Options(*self[:4])

    @property
    def segment(self) -> int:
        """Updates that are computed in one go; 1 stands for all."""
        return self.checkpoint_interval or INFERENCE_SEGMENT

    def __str__(self) -> str:
        given = "given" if self.momentum else "not given"
        return (
            f"chunk_size={self.chunk_size}, muon={self.muon}, prenorm={self.prenorm},"
            f" momentum {given}"
        )


class Call(NamedTuple):
    """The queries `[B, Tq, H, Dk]`, the tokens of the updates, and the fast weights before the first of them.

    `plan` is that of packed sequences, or of all rows alike, as a tensor (`Plan.to_tensor`). Without one each
    row is a sequence that is cut every `chunk_size` tokens, and the queries are those of its last Tq tokens.
    """

    q: Tensor
    tokens: Tokens
    start: FastWeights
    plan: Tensor | None
    options: Options
    ranks: str = ""  # the name of those that share the work, see `core/ranks.py`

    @property
    def num_updates(self) -> int:
        """Of each row, or with a plan the most that all its sequences have. It is known from shapes alone."""
        B, Tk = self.tokens.k.shape[:2]
        if self.plan is None:
            return num_updates(Tk, self.options.chunk_size, self.options.return_end)
        sequences = len(self.start.weights[0]) if B == 1 else 1  # 1: a plan of all rows alike
        return (
            self.plan.shape[0] - sequences
        )  # of whose versions all but the first follow an update


def phase(name: str) -> torch.profiler.record_function:
    """A context that marks a phase of the computation in profiles."""
    return torch.profiler.record_function(f"block_causal_ttt {name}")
