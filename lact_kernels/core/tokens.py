"""`Tokens`: what an update of the fast weights reads."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Keys `[B, T, H, Dk]`, values `[B, T, H, Dv]`, and rates and momentum `[B, T, H]`."""

    k: Tensor
    v: Tensor
    lr0: Tensor | None  # None: that weight is not trained
    lr1: Tensor | None
    lr2: Tensor | None
    momentum: Tensor | None

    @property
    def rates(self) -> tuple[Tensor | None, ...]:
        return self.lr0, self.lr1, self.lr2

    def map(self, fn: Callable[..., Tensor], *others: "Tokens") -> "Tokens":
        """`fn` of every tensor, and of those of `others` with it. What is None stays None."""
        return Tokens(*(None if x[0] is None else fn(*x) for x in zip(self, *others)))

    @staticmethod
    def cat(parts: Sequence["Tokens"], dim: int = 1) -> "Tokens":
        """Of one or more, end to end."""
        first, *rest = parts
        return first.map(lambda *xs: torch.cat(xs, dim), *rest) if rest else first

    def at(self, tokens: slice) -> "Tokens":
        return self.map(lambda x: x[:, tokens])

    def split(self, lengths: Sequence[int], dim: int = 1) -> list["Tokens"]:
        """Consecutive tokens, so many in each."""
        columns = (
            (None,) * len(lengths) if x is None else x.split(tuple(lengths), dim) for x in self
        )
        return [Tokens(*column) for column in zip(*columns)]

    def sequences(self, lengths: Sequence[int]) -> list["Tokens"]:
        """Of a packed row the sequences of these lengths, `[t, ...]`."""
        return self.map(lambda x: x[0]).split(lengths, dim=0)

    def as_row(self) -> "Tokens":
        """The rows of a batch end to end in one, `[1, B T, ...]`."""
        return self.map(lambda x: x.flatten(0, 1)[None])
