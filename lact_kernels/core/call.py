"""`Call`: what a backend is asked to compute."""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.newton_schulz import LACT, Coefficients, NewtonSchulz
from lact_kernels.core.plan import num_updates
from lact_kernels.core.tokens import Tokens

INFERENCE_SEGMENT = 16  # updates that are computed in one go where no backward will come


class Options(NamedTuple):
    """How fast weights are updated, which all calls of one sequence share, and what one call wants of it.

    `chunk_size` is what rows are cut by where there is no plan. An update divides the sum of its keys'
    momentum by it. States that have gone through a plan have none.
    """

    chunk_size: int | None
    muon: bool | NewtonSchulz  # True: LaCT's triples
    prenorm: bool
    momentum: bool  # whether the tokens have one
    weight_norm: bool = True  # whether an update ends in renorm
    momentum_after_muon: bool = False  # only with both of them
    return_end: bool = False
    checkpoint_interval: int = 1  # 0: no backward will come, and the history is empty

    @property
    def shared(self) -> "Options":
        """Without what is one call's own."""
        return Options(*self[:6])

    @property
    def coefficients(self) -> Coefficients | None:
        """The triples of Newton-Schulz, None without Muon."""
        return None if self.muon is False else self._newton_schulz.coefficients

    @property
    def muon_text(self) -> str | None:
        """The same as a registered op takes them."""
        return None if self.muon is False else self._newton_schulz.text

    @property
    def _newton_schulz(self) -> NewtonSchulz:
        return LACT if self.muon is True else self.muon

    @property
    def segment(self) -> int:
        """Updates that are computed in one go; 1 stands for all."""
        return self.checkpoint_interval or INFERENCE_SEGMENT

    def __str__(self) -> str:
        order = "a plan" if self.chunk_size is None else f"chunk_size={self.chunk_size}"
        given = "given" if self.momentum else "not given"
        said = f"{order}, muon={self.muon}, prenorm={self.prenorm}, momentum {given}"
        if not self.weight_norm:
            said += ", weight_norm=False"
        return said + ", momentum_after_muon=True" * self.momentum_after_muon


class Call(NamedTuple):
    """The queries `[B, Tq, H, Dk]`, the tokens of the updates, and the fast weights before the first of them.

    `plan` is that of packed sequences, or of all rows alike, as a tensor (`Plan.to_tensor`). Without one each
    row is a sequence that is cut every `chunk_size` tokens, and the queries are those of its last Tq tokens.
    A weight whose rates are None is not trained: updates leave it, and its master and buffer, as they are.
    """

    q: Tensor
    tokens: Tokens
    start: FastWeights
    plan: Tensor | None
    options: Options
    ranks: str = ""  # the name of those that share the work, see `core/ranks.py`

    @property
    def trained(self) -> tuple[int, ...]:
        """Which of w0, w1 and w2 are updated."""
        return tuple(i for i, lr in enumerate(self.tokens.rates) if lr is not None)

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
