"""Newton-Schulz with any triples, in eager and in Triton, and what is taken together in the Gram form.

The kernels of the Gram form are float16, and are emulated.
"""

import numpy as np
import pytest
import torch

from benchmarks.accuracy import compare
from benchmarks.newton_schulz_accuracy import Rounded, measure, operations
from lact_kernels import NewtonSchulz
from lact_kernels.core.newton_schulz import LACT, groups
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.triton.fast_weights.layout import Dims
from tests.newton_schulz_cases import (
    TRIPLES,
    exact,
    gram_form_of_small_matrices,  # noqa: F401
    iterate,
    matrices,
)

ELONGATED = Dims(8, 6, 13)  # taller than wide, and wider than tall


@pytest.mark.parametrize("number", TRIPLES)
def test_eager_with_any_number_of_triples(number):
    triples = TRIPLES[number]
    g, dx = (matrices(ELONGATED, 2).double() for _ in range(2))
    expected = exact(g, dx, ELONGATED, triples)
    for g_, dx_, x, gradient in zip(*map(ELONGATED.unpack, (g, dx, *expected))):
        torch.testing.assert_close(newton_schulz(g_, triples), x, rtol=0, atol=1e-11)
        found = newton_schulz_bwd(dx_, g_, triples)
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("number", [0, 2])
def test_triton_interpreted(number):
    dims, triples = ELONGATED, TRIPLES[number]
    g, dx = matrices(dims, 1), matrices(dims, 1)
    eager = torch.zeros_like(g), torch.zeros_like(g)
    for g_, dx_, *outs in zip(*map(dims.unpack, (g, dx, *eager))):
        outs[0].copy_(newton_schulz(g_, triples))
        outs[1].copy_(newton_schulz_bwd(dx_, g_, triples))
    actual = iterate(g, dx, dims, torch.float32, triples)
    for packed in zip(actual, eager, exact(g, dx, dims, triples)):
        for results in zip(*map(dims.unpack, packed)):
            comparison = compare(*results)
            assert comparison.ok, comparison


def test_the_gram_form_is_as_exact_as_single_steps():
    """At the smallest size that has it, with fewer tokens than rows."""
    ((x, dx, gram_x, gram_dx),) = measure(512, 768, ("low",), LACT.coefficients)
    assert gram_x < x and gram_dx < 1.5 * dx


@pytest.mark.usefixtures("gram_form_of_small_matrices")
def test_a_gradient_in_one_place_stays_within_float16():
    """One live row, and a gradient in its column alone, at the size that is largest: 22,000 cancel to 45."""
    g, dx = torch.zeros(4, 6), torch.zeros(4, 6)
    g[0, 0], dx[1, 0] = 1.0, 1.0
    rounded = LargestScale(LACT.coefficients, Dims(4, 4, 6))
    (gradient,) = rounded.backward((dx,), (g,))
    assert gradient.isfinite().all()
    assert abs(gradient[1, 0] / 2048**0.5 - newton_schulz_bwd(dx, g)[1, 0]) < 490 * 2**-10


class LargestScale(Rounded):
    """Gradients are scaled as those of matrices of 2048 rows are."""

    def _normalized(self, matrices, is_gradient):
        scale = (2048 / len(matrices[0])) ** 0.5 if is_gradient else 1.0
        return tuple(scale * x for x in super()._normalized(matrices, is_gradient))


def test_the_first_steps_of_large_elongated_matrices_are_taken_together():
    a, b, c, d, e = five = LACT.coefficients
    alone, half = ((a,), (b,), (c,), (d,), (e,)), torch.float16
    assert groups(five, [(512, 768), (768, 512)], half) == ((a, b, c), (d,), (e,))
    assert groups(five, [(512, 767)], half) == groups(five, [(511, 1024)], half) == alone
    assert groups(five, [(512, 1024), (1024, 900)], half) == alone  # of all, or of none
    assert groups(five, [(512, 1024)], torch.float32) == alone
    assert groups((a, b), [(512, 1024)], half) == ((a, b),)
    assert groups((a,), [(512, 1024)], half) == ((a,),)
    assert groups((), [(512, 1024)], half) == groups((), [(8, 8)], half) == ()


@pytest.mark.parametrize(
    "error, coefficients, said",
    [
        (TypeError, 5, "5"),
        (TypeError, "abc", "'abc'"),
        (TypeError, [1.0, 2.0, 3.0], "1.0"),
        (TypeError, [(1.0, 2.0, None)], "None"),
        (ValueError, [(1.0, 2.0)], r"\(1.0, 2.0\)"),
        (ValueError, [(1.0, 2.0, float("nan"))], "nan"),
        (TypeError, [(1.0, 2.0, True)], "True"),
    ],
)
def test_bad_coefficients_are_named(error, coefficients, said):
    with pytest.raises(error, match=f"coefficients must be .* got .*{said}"):
        NewtonSchulz(coefficients)


def test_coefficients_become_tuples_of_floats():
    given = NewtonSchulz([[2, -1.5, 0.5]])
    assert given.coefficients == ((2.0, -1.5, 0.5),)
    assert {given: 1}[NewtonSchulz(((2, -1.5, 0.5),))]
    assert NewtonSchulz([]).coefficients == ()
    assert NewtonSchulz([(np.int64(2), np.float32(-1.5), np.float64(0.5))]) == given


def test_operations_of_both_forms():
    """In whole tiles. A step of the standard form is one symmetric product of X, one of R, and one with X."""
    m, n, tile = 512, 1024, 128
    lower = (
        m // tile * (m // tile + 1) // 2 * tile**2
    )  # elements of the tiles on and below the diagonal
    standard, gram = (operations(m, n, gram) for gram in (False, True))
    once = 2 * (lower * n + lower * m + m * n * m)  # R, B and X of one step
    assert standard[0] == 3 * 5 * once
    assert all(few < many for few, many in zip(gram, standard))
