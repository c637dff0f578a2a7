"""`NewtonSchulz`: the polynomial that Muon orthogonalises a step by."""

import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

EPS = 1e-7  # added to the norm that the iteration begins with a division by

Coefficients = tuple[tuple[float, float, float], ...]

# Where X X^T has so much less to compute than X, some steps are taken on it alone.
GRAM_RATIO = 1.5  # of the longer side to the shorter
GRAM_SIDE = 512  # at least the shorter side
GRAM_STEPS = 3


@dataclass(frozen=True, init=False)
class NewtonSchulz:
    """Newton-Schulz steps `X <- a X + b (X X^T) X + c (X X^T)^2 X`, one for each triple (a, b, c).

    They follow the division by the Frobenius norm, `X = G / (|G|_F + 1e-7)`. No triple at all means this
    division alone. `muon=True` stands for the five triples of LaCT's language model.

    Raises:
        TypeError: the coefficients are no sequence of triples of numbers.
        ValueError: a triple has not three numbers, or one of them is not finite.
    """

    coefficients: Coefficients = field(compare=False)
    # The same as text: what a registered op takes. Compiled code would take floats for variables.
    text: str = field(repr=False)

    def __init__(self, coefficients: Sequence[Sequence[float]]):
        if not isinstance(coefficients, Sequence) or isinstance(coefficients, str):
            raise TypeError(f"coefficients must be a sequence of triples, got {coefficients!r}")
        triples = tuple(map(_triple, coefficients))
        object.__setattr__(self, "coefficients", triples)
        object.__setattr__(self, "text", " ".join(repr(x) for triple in triples for x in triple))

    @classmethod
    @functools.cache
    def of_text(cls, text: str) -> "NewtonSchulz":
        numbers = list(map(float, text.split()))
        return cls([numbers[i : i + 3] for i in range(0, len(numbers), 3)])


def _triple(triple: object) -> tuple[float, float, float]:
    if not isinstance(triple, Sequence) or isinstance(triple, str):
        raise TypeError(f"coefficients must be triples (a, b, c) of numbers, got {triple!r}")
    if not all(map(_is_number, triple)):
        raise TypeError(f"coefficients must be triples (a, b, c) of numbers, got {triple!r}")
    if len(triple) != 3 or not all(map(math.isfinite, triple)):
        raise ValueError(
            f"coefficients must be triples (a, b, c) of finite numbers, got {triple!r}"
        )
    return tuple(map(float, triple))


def _is_number(x: object) -> bool:
    """Python's or NumPy's."""
    return type(x) in (int, float) or (isinstance(x, numbers.Real) and not isinstance(x, bool))


LACT = NewtonSchulz(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
)


def groups(
    coefficients: Coefficients, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Coefficients, ...]:
    """The steps in runs, each one polynomial of X X^T, for matrices iterated side by side in this dtype.

    In float16, and where all of them are large and elongated, the first three steps, or as many as there are,
    are taken together: the Gram form, which has fewer products with the long X. Otherwise every step is a run
    of its own.

    More steps, or later ones, or smaller matrices would not do. A step multiplies the small values of X X^T
    by a^2, about 16, and the rounding errors among them, too, which are relative to the largest values. That
    is little as long as all are small, as they are in the beginning where there are many. Float32 is there
    for its digits, and would lose some.
    """
    elongated = all(max(x) >= GRAM_RATIO * min(x) and min(x) >= GRAM_SIDE for x in shapes)
    first = min(GRAM_STEPS if elongated and dtype == torch.float16 else 1, len(coefficients))
    rest = tuple((triple,) for triple in coefficients[first:])
    return (coefficients[:first], *rest) if first else ()
