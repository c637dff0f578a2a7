"""Muon's orthogonalisation by five Newton-Schulz steps, and its gradient.

With X0 = G / (||G||_F + 1e-7), transposed if G is tall, each step is

    S = X X^T        P = b S + c S S        X <- a X + P X

and, with S and P symmetric, its gradient

    D = dX X^T + X dX^T        R = b D + c (D S + S D)        dX <- a dX + P dX + R X

in which D S and S D are each other's transposes. S and P of each step are kept beside X: seven products a
step in all, three of them the iterates again.

The steps amplify small singular values, and rounding noise with them, about 490 times: the iteration
runs in float32 (float64 for float64) whatever the dtype of the op's inputs, and rounds where the formulas
above have an operation, as the reference does. Fused differently its noise is as large, but another.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.newton_schulz import EPS, LACT, Coefficients


class _Step(NamedTuple):
    """X, S and P before a step."""

    x: Tensor
    s: Tensor
    p: Tensor

    @classmethod
    def of(cls, x: Tensor, b: float, c: float) -> "_Step":
        s = x @ x.mT
        return cls(x, s, (b * s).add_(c * s @ s))

    def next(self, a: float) -> Tensor:
        return (a * self.x).add_(self.p @ self.x)

    def backward(self, dx: Tensor, a: float, b: float, c: float) -> Tensor:
        """The gradient of X, of that of the next."""
        d = dx @ self.x.mT
        d = d + d.mT
        ds = d @ self.s
        r = torch.add(ds, ds.mT).mul_(c).add_(d, alpha=b)
        return torch.baddbmm(dx, self.p, dx, beta=a).baddbmm_(r, self.x)


class Iterates:
    """The steps of each matrix of `[..., rows, columns]`, kept until the gradient of the last is known."""

    def __init__(self, g: Tensor, coefficients: Coefficients):
        self._g, self._coefficients = g, coefficients
        self._first, self._norm = _normalized(g)
        self._steps: list[_Step] = []
        for n, (_, b, c) in enumerate(coefficients):
            x = self._steps[-1].next(coefficients[n - 1][0]) if n else self._first
            self._steps.append(_Step.of(x, b, c))

    def last(self) -> Tensor:
        """`newton_schulz(g)`."""
        if not self._steps:
            return _like(self._g, self._first)
        return _like(self._g, self._steps[-1].next(self._coefficients[-1][0]))

    def backward(self, dx: Tensor) -> Tensor:
        """The gradient of g, of that of `last()`."""
        dx = _wide(dx)
        for step, triple in zip(reversed(self._steps), reversed(self._coefficients)):
            dx = step.backward(dx, *triple)
        dx, g, norm = _like(self._g, dx), self._g, self._norm
        along = (dx * g).sum(dim=(-2, -1), keepdim=True)
        along = torch.where(
            norm > 0, along / norm, 0
        )  # next to nothing where the squares underflow
        return torch.addcmul(dx, g, along / (norm + EPS), value=-1).div_(norm + EPS)


def newton_schulz(g: Tensor, coefficients: Coefficients = LACT.coefficients) -> Tensor:
    """Orthogonalise each matrix of `[..., rows, columns]`."""
    x, _ = _normalized(g)
    for a, b, c in coefficients:
        x = _Step.of(x, b, c).next(a)
    return _like(g, x)


def newton_schulz_bwd(
    dx: Tensor, g: Tensor, coefficients: Coefficients = LACT.coefficients
) -> Tensor:
    """Gradient of `newton_schulz(g)` with respect to g, iterates recomputed."""
    return Iterates(g, coefficients).backward(dx)


def _normalized(g: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.matrix_norm(g, keepdim=True)
    return _wide(g / (norm + EPS)), norm


def _wide(x: Tensor) -> Tensor:
    """Matrices `[..., rows, columns]` as one batch, transposed if they are tall."""
    x = x.reshape(-1, *x.shape[-2:])
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _like(g: Tensor, x: Tensor) -> Tensor:
    """The way back, to the shape of g."""
    return (x.mT if g.shape[-2] > g.shape[-1] else x).reshape(g.shape)
