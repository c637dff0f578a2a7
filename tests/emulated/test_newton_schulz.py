"""Newton-Schulz as it is compiled, on elongated matrices in float16: the Gram form, and no steps at all.

Rounded results are held against those of PyTorch, which have the same roundings. So the steps are few, or
mild: after LaCT's five, differences in the last bit have grown to the size of the error itself.
"""

import pytest

from benchmarks.emulation import emulated_device
from lact_kernels.triton.fast_weights.layout import Dims
from tests.emulated.targets import target
from tests.newton_schulz_cases import (
    MILD,
    PUBLISHED,
    errors,
    exact,
    gram_form_of_small_matrices,  # noqa: F401
    iterate,
    matrices,
    rounded,
)

# Longer than the size up to which float32 is taken, and squares of one tile or of several.
ONE_TILE, SEVERAL = Dims(24, 32, 72), Dims(136, 136, 208)
TARGETS = [target(90, "float16"), target(80, "bfloat16")]


def check(arch, dtype, dims, coefficients):
    g, dx = matrices(dims, 1), matrices(dims, 1)
    with emulated_device(arch):
        actual = iterate(g, dx, dims, dtype, coefficients)
    expected = exact(g, dx, dims, coefficients)
    same, single = (rounded(g, dx, dims, coefficients, gram) for gram in (True, False))
    apart = errors(actual, [x.double() for x in same], dims)
    bars = errors(single, expected, dims)
    for distance, error, bar in zip(apart, errors(same, expected, dims), bars):
        assert distance < 0.75 * error and error < 2 * bar


@pytest.mark.parametrize("arch, dtype", TARGETS[1:])
@pytest.mark.usefixtures("gram_form_of_small_matrices")
def test_gram_form(arch, dtype):
    check(arch, dtype, ONE_TILE, MILD)


@pytest.mark.parametrize("arch, dtype", TARGETS[:1])
@pytest.mark.usefixtures("gram_form_of_small_matrices")
def test_gram_form_of_several_tiles(arch, dtype):
    check(arch, dtype, SEVERAL, PUBLISHED[:2])


@pytest.mark.parametrize("arch, dtype", TARGETS[:1])
def test_no_steps(arch, dtype):
    """Nothing is rounded to float16."""
    g, dx = matrices(ONE_TILE, 2), matrices(ONE_TILE, 2)
    with emulated_device(arch):
        actual = iterate(g, dx, ONE_TILE, dtype, ())
    assert max(errors(actual, exact(g, dx, ONE_TILE, ()), ONE_TILE)) < 1e-6
