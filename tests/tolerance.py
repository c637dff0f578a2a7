"""The one bar for every backend: at most twice the error of plain PyTorch in the same dtype."""

from torch import Tensor

from benchmarks.accuracy import compare


def assert_close_to_float64(actual: Tensor, same_dtype: Tensor, exact: Tensor, name: str) -> None:
    """Hold `actual` against `exact` by the error of `same_dtype`: see `benchmarks/accuracy.py`."""
    assert actual.dtype == same_dtype.dtype or name == "lse", f"{name}: {actual.dtype}"
    result = compare(actual, same_dtype, exact)
    assert result.ok, (
        f"{name}: rms error {result.error:.2e} (bound {result.bound:.2e}), largest"
        f" {result.max_error:.2e} (bound {result.max_bound:.2e}); plain PyTorch in"
        f" {same_dtype.dtype}: rms {result.same_dtype_error:.2e}"
    )
