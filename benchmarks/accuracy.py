"""The one rule by which a result is held against the float64 reference.

A result may be at most twice as wrong as plain PyTorch of the same dtype, plus one rounding:

    rms(actual - exact)  <=  2 rms(same_dtype - exact) + eps rms(exact)

where `exact` is `reference/` in float64, `same_dtype` is `reference/` in the dtype of `actual`, and
eps belongs to that dtype. The root mean square is compared, not the largest error, because the
largest error is a sample of one: on small tensors two equally accurate float32 paths differ by more than a
factor of two in it. So that no single wrong element hides in a mean, the largest error is held too,
at twice that factor:

    max|actual - exact|  <=  4 max|same_dtype - exact| + 2 eps max|exact|
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Root-mean-square and largest errors against the float64 reference, and their bounds."""

    error: float  # of what is judged
    same_dtype_error: float  # of plain PyTorch in the same dtype
    bound: float  # the largest error that passes
    max_error: float
    max_bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound and self.max_error <= self.max_bound  # False for NaN


def compare(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> Comparison:
    """Hold `actual` against `exact`; all three have one shape, `exact` is float64.

    Differences are taken in float64. A value that is not finite in `actual` makes the comparison fail.
    """
    if not actual.shape == same_dtype.shape == exact.shape:
        shapes = [tuple(x.shape) for x in (actual, same_dtype, exact)]
        raise ValueError(f"the three results must have one shape, got {shapes}")
    eps = torch.finfo(actual.dtype).eps
    error, max_error = rms_and_max(actual.detach().double() - exact)
    same_error, same_max_error = rms_and_max(same_dtype.detach().double() - exact)
    size, largest = rms_and_max(exact)
    return Comparison(
        error,
        same_error,
        2 * same_error + eps * size,
        max_error,
        4 * same_max_error + 2 * eps * largest,
    )


def rms_and_max(x: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude; 0 for an empty tensor, NaN where `x` has one."""
    if not x.numel():
        return 0.0, 0.0
    return x.square().mean().sqrt().item(), x.abs().max().item()


def compare_all(
    actual: dict[str, Tensor], same_dtype: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, Comparison]:
    """`compare` for every named tensor; all three have the same names."""
    if not actual.keys() == same_dtype.keys() == exact.keys():
        raise ValueError(f"different names: {list(actual)}, {list(same_dtype)}, {list(exact)}")
    return {name: compare(actual[name], same_dtype[name], exact[name]) for name in actual}


COMPARISON_HEADER = (
    f"  {'':<10} {'rms error':>10} {'plain PyTorch':>14} {'bound':>10}"
    f" {'max error':>11} {'bound':>10}"
)


def comparison_line(name: str, comparison: Comparison) -> str:
    """One row of a table under COMPARISON_HEADER."""
    return (
        f"  {name:<10} {comparison.error:>10.2e} {comparison.same_dtype_error:>14.2e}"
        f" {comparison.bound:>10.2e} {comparison.max_error:>11.2e} {comparison.max_bound:>10.2e}"
        f"  {'ok' if comparison.ok else 'TOO FAR OFF'}"
    )
