"""Muon's orthogonalisation by five Newton-Schulz steps, and its gradient.

With X0 = G / (||G||_F + 1e-7), transposed if G is tall, each step is

    A = X X^T        B = b A + c A A        X <- a X + B X

and, with A and B symmetric, its gradient

    dB = dX X^T      dA = b dB + c (dB A + A dB)      dX <- a dX + B dX + (dA + dA^T) X

The steps amplify small singular values, and rounding noise with them, about 490 times: the iteration
runs in float32 (float64 for float64) whatever the dtype of the op's inputs.
"""

import torch
from torch import Tensor

from lact_kernels.core.newton_schulz import EPS, LACT, Coefficients


def newton_schulz(g: Tensor, coefficients: Coefficients = LACT.coefficients) -> Tensor:
    """Orthogonalise each matrix of `[..., rows, columns]`."""
    x, _ = _normalized(g)
    for triple in coefficients:
        x = _step(x, *triple)
    return _wide(x, like=g)


def newton_schulz_bwd(
    dx: Tensor, g: Tensor, coefficients: Coefficients = LACT.coefficients
) -> Tensor:
    """Gradient of `newton_schulz(g)` with respect to g, iterates recomputed."""
    x, norm = _normalized(g)
    iterates = [x]
    for triple in coefficients[:-1]:
        iterates.append(_step(iterates[-1], *triple))
    dx = _wide(dx, like=g)
    for x, (a, b, c) in zip(reversed(iterates[: len(coefficients)]), reversed(coefficients)):
        s = x @ x.mT
        ds = dx @ x.mT
        ds, dx = b * ds + c * (ds @ s + s @ ds), a * dx + (b * s + c * s @ s) @ dx
        dx = dx + (ds + ds.mT) @ x
    dx = _wide(dx, like=g)
    along = (dx * g).sum(dim=(-2, -1), keepdim=True)
    along = torch.where(norm > 0, along / norm, 0)  # next to nothing where the squares underflow
    return (dx - g * (along / (norm + EPS))) / (norm + EPS)


def _normalized(g: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.matrix_norm(g, keepdim=True)
    return _wide(g / (norm + EPS), like=g), norm


def _step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    s = x @ x.mT
    return a * x + (b * s + c * s @ s) @ x


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """The transpose where `like` has more rows than columns: there and back again."""
    return x.mT if like.shape[-2] > like.shape[-1] else x
