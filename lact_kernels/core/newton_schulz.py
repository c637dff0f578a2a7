"""`NewtonSchulz`: the polynomial that Muon orthogonalises a step by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

EPS = 1e-7  # added to the norm that the iteration begins with a division by

Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, init=False)
class NewtonSchulz:
    """Newton-Schulz steps `X <- a X + b (X X^T) X + c (X X^T)^2 X`, one for each triple (a, b, c).

    They follow the division by the Frobenius norm, `X = G / (|G|_F + 1e-7)`. No triple at all means this
    division alone. `muon=True` stands for the five triples of LaCT's language model.

    Raises:
        TypeError: the coefficients are no sequence of triples of numbers.
        ValueError: a triple has not three numbers, or one of them is not finite.
    """

    coefficients: Coefficients

    def __init__(self, coefficients: Sequence[Sequence[float]]):
        if not isinstance(coefficients, Sequence) or isinstance(coefficients, str):
            raise TypeError(f"coefficients must be a sequence of triples, got {coefficients!r}")
        object.__setattr__(self, "coefficients", tuple(map(_triple, coefficients)))


def _triple(triple: object) -> tuple[float, float, float]:
    if not isinstance(triple, Sequence) or isinstance(triple, str):
        raise TypeError(f"coefficients must be triples (a, b, c) of numbers, got {triple!r}")
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in triple):
        raise TypeError(f"coefficients must be triples (a, b, c) of numbers, got {triple!r}")
    if len(triple) != 3 or not all(map(math.isfinite, triple)):
        raise ValueError(
            f"coefficients must be triples (a, b, c) of finite numbers, got {triple!r}"
        )
    return tuple(map(float, triple))


LACT = NewtonSchulz(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
)
