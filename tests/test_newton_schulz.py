"""Newton-Schulz with any triples, in eager and in Triton, and what is taken together in the Gram form.

The kernels of the Gram form are float16, and are emulated.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.accuracy import compare
from benchmarks.launches import count_launches
from benchmarks.newton_schulz_accuracy import Rounded, measure, operations
from lact_kernels import NewtonSchulz
from lact_kernels.core.newton_schulz import LACT, groups
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.triton.fast_weights import newton_schulz_schedule as schedule
from lact_kernels.triton.fast_weights.layout import Dims
from lact_kernels.triton.fast_weights.newton_schulz import Iteration, Tables, num_tiles
from lact_kernels.triton.fast_weights.newton_schulz_schedule import Form, Kind
from tests.cases import filled_with_nan
from tests.newton_schulz_cases import (
    TRIPLES,
    exact,
    gram_form_of_small_matrices,  # noqa: F401
    iterate,
    matrices,
    matrices_of,
    squares_of,
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


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_triton_interpreted(number):
    dims, triples = ELONGATED, TRIPLES[number]
    g, dx = matrices(dims, 2), matrices(dims, 2)
    eager = torch.zeros_like(g), torch.zeros_like(g)
    for g_, dx_, *outs in zip(*map(dims.unpack, (g, dx, *eager))):
        outs[0].copy_(newton_schulz(g_, triples))
        outs[1].copy_(newton_schulz_bwd(dx_, g_, triples))
    actual = iterate(g, dx, dims, torch.float32, triples)
    for packed in zip(actual, eager, exact(g, dx, dims, triples)):
        for results in zip(*map(dims.unpack, packed)):
            comparison = compare(*results)
            assert comparison.ok, comparison


def test_one_launch_in_each_direction_and_no_zeroing():
    """The counters are zeros again after a launch: an iteration is used for chunk after chunk."""
    dims = ELONGATED
    g, dx = matrices(dims, 2), matrices(dims, 2)
    iteration = Iteration(2, dims, torch.float32, g.device)
    squares, dsquares = squares_of(g, dims), squares_of(dx, dims)
    results = []
    for run in 2 * (
        lambda: [iteration.forward(g, squares)],
        lambda: iteration.backward(dx, g, dsquares, squares, dx, True),
    ):
        launches = count_launches(lambda run=run: results.append(run()))
        assert launches.kernel_names == {"_newton_schulz_kernel": 1}
        assert not launches.op_names and not launches.sync_names
        assert not iteration.counters.any()
    first, again = (
        [matrices_of(x, dims) for part in parts for x in part]
        for parts in (results[:2], results[2:])
    )
    assert all(map(torch.equal, first, again))


def test_heads_and_matrices_do_not_depend_on_each_other():
    """Each head alone, and without its w1, is what it is among others; of w1 nothing is written then."""
    dims, triples = ELONGATED, TRIPLES[2]
    g, dx = matrices(dims, 3), matrices(dims, 3)
    together = iterate(g, dx, dims, torch.float32, triples)
    for head in range(3):
        own = slice(head, head + 1)
        alone = iterate(g[own], dx[own], dims, torch.float32, triples)
        for x, y in zip(together, alone):
            assert torch.equal(matrices_of(x[own], dims), matrices_of(y, dims))
    without = dims.having(True, False, True)
    iteration = Iteration(3, without, torch.float32, g.device, triples)
    with filled_with_nan():
        result = iteration.forward(g, squares_of(g, dims))
        gradient, inner, *_ = iteration.backward(dx, g, squares_of(dx, dims), squares_of(g, dims))
    for matrix, expected in zip(dims.unpack(result), dims.unpack(together[0])):
        assert torch.equal(matrix, expected) != (matrix.shape == (3, 6, 13))
    for packed in (dims.unpack(gradient), dims.unpack_rows(inner)):
        assert [x.isnan().all().item() for x in packed] == [False, True, False]


def test_sizes_of_the_result_and_of_the_buffers():
    dims = ELONGATED
    g, dx, buffers = (matrices(dims, 2) for _ in range(3))
    iteration = Iteration(2, dims, torch.float32, g.device, TRIPLES[1])
    squares = squares_of(dx, dims), squares_of(g, dims)
    result, inner, size, buffers_size = iteration.backward(dx, g, *squares, buffers, True)
    for found, (a, b) in {
        inner: (result, g),
        size: (result,) * 2,
        buffers_size: (buffers,) * 2,
    }.items():
        expected = [(x * y).sum(dim=-1) for x, y in zip(dims.unpack(a), dims.unpack(b))]
        torch.testing.assert_close(found, torch.cat(expected, dim=-1))
    assert iteration.backward(dx, g, *squares, buffers)[2:] == (None, None)


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


class Shared(dict):
    """Memory in which arrays have the places that the schedule gives them, and overwrite each other."""

    def __init__(self, places):
        self.places = places

    def __setitem__(self, array, value):
        super().__setitem__((array.form, self.places[array]), value)

    def __getitem__(self, array):
        return super().__getitem__((array.form, self.places[array]))


class Placed(Rounded):
    """The iteration with arrays in their places, and the operations of a level in either order."""

    def __init__(self, *arguments, backwards):
        super().__init__(*arguments)
        self.places = {}
        for direction, recorded in self.schedules.items():
            levels = schedule.by_levels(recorded)
            self.places |= schedule.places(levels)
            in_order = [level[::-1] if backwards else level for level in levels]
            self.schedules[direction] = sum(in_order, [])

    def _memory(self):
        return Shared(self.places)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("number", [1, 5, 7])
@pytest.mark.usefixtures("gram_form_of_small_matrices")
def test_places_and_levels(number, backwards):
    """Nothing is overwritten that is still to be read, and nothing is read that its own level writes."""
    g, dx = (torch.randn(6, 9),), (torch.randn(6, 9),)
    for gram in (False, True):
        arguments = TRIPLES[number], Dims(6, 6, 9), gram
        expected, placed = Rounded(*arguments), Placed(*arguments, backwards=backwards)
        assert torch.equal(placed.forward(g)[0], expected.forward(g)[0])
        assert torch.equal(placed.backward(dx, g)[0], expected.backward(dx, g)[0])


def test_places_are_taken_again():
    """Of two steps and of seven the forward has two of X; of R and B there are three at most."""
    for number in (2, 7):
        runs = groups(TRIPLES[number], [(8, 8)], torch.float32)
        places = schedule.places(schedule.by_levels(schedule.forward(runs)))
        taken = Counter(
            array.form for array in {(x.form, p): x for x, p in places.items()}.values()
        )
        assert taken == {Form.LONG: 2, Form.SQUARE: 2, Form.RESULT: 1}


def test_independent_operations_share_a_level():
    """Both divisions by a norm, and in the last step D and R, dR and B: 3 of 32 take no time."""
    runs = groups(LACT.coefficients, [(8, 8)], torch.float32)
    operations = schedule.backward(runs)
    assert len(operations) == 32 and len(schedule.by_levels(operations)) == 29
    assert len(schedule.forward(runs)) == len(schedule.by_levels(schedule.forward(runs))) == 16


def test_a_tile_waits_for_all_of_the_levels_before_it():
    """Of its own matrix; these have unlike numbers of tiles, and one of them has none."""
    dims = Dims(40, 300, 170, (True, True, False))
    operations = schedule.backward(groups(TRIPLES[2], dims.iterated, torch.float16))
    levels = schedule.by_levels(operations)
    entries = iter(Tables(operations, dims, 128).entries)
    first, done = 0, [0, 0]
    for level in levels:
        before = done.copy()
        for operation in level:
            for matrix in (0, 1):
                entry = next(entries)
                assert (entry.first, entry.needed) == (first, before[matrix])
                assert (entry.kind, entry.matrix) == (operation.kind, matrix)
                tiles = num_tiles(operation.kind, dims.shapes[matrix], 128)
                first, done[matrix] = first + tiles, done[matrix] + tiles
                assert entry.total == [29, 73][matrix]
    assert next(entries, None) is None and done == [29, 73]


def test_tiles_of_an_output():
    shape = (300, 130)  # three tiles by two, and 19 blocks of rows
    found = {kind.name: num_tiles(kind, shape, 128) for kind in Kind}
    assert found == {
        "NORMALIZE": 6, "NORMALIZE_GRADIENT": 6, "SYMMETRIC": 3, "ROWS": 4, "COLUMNS": 6, "INNER": 19,
    }  # fmt: skip


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
