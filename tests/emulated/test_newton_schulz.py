"""Newton-Schulz as it is compiled, on elongated matrices in float16: the Gram form, and no steps at all.

Rounded results are held against those of PyTorch, which have the same roundings. So the steps are few, or
mild: after LaCT's five, differences in the last bit have grown to the size of the error itself.
"""

import re

import pytest
import torch

from benchmarks.emulation import emulated_device
from lact_kernels.triton.fast_weights.layout import Dims
from ptx_emulator import Options, Reported
from tests.emulated.targets import target
from tests.newton_schulz_cases import (
    MILD,
    PUBLISHED,
    errors,
    exact,
    gram_form_of_small_matrices,  # noqa: F401
    iterate,
    matrices,
    matrices_of,
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


# Programs that run side by side, one after the other in turns, and on a device that holds one or three.
ORDERS = [
    Options(),
    Options(threads_per_batch=256),
    Options(resident_programs=1),
    Options(threads_per_batch=256, resident_programs=3),
]


@pytest.mark.parametrize("arch, dtype", TARGETS)
@pytest.mark.usefixtures("gram_form_of_small_matrices")
def test_values_do_not_depend_on_the_order_of_programs(arch, dtype):
    """Nor does anybody wait for what only later programs compute, which on a device of one were for ever."""
    g, dx = matrices(ONE_TILE, 2), matrices(ONE_TILE, 2)
    results = []
    for options in ORDERS:
        with emulated_device(arch, options=options) as emulation:
            found = iterate(g, dx, ONE_TILE, dtype, MILD[:2])
        results.append([matrices_of(x, ONE_TILE) for x in found])
        assert [x.kernel for x in emulation.launches] == ["_newton_schulz_kernel"] * 2
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


# What a tile's program does before it reads and after it has written, and what is left of it.
WAIT, STORED = (
    r"(ld\.global\.gpu\.)acquire(.*?)(@%p\d+ bra\s+\$L__BB0_\d+;)",
    r"(.*)bar\.sync\s+0;(.*gpu\.)acq_rel",
)
FAULTS = {
    "no wait": (WAIT, r"\1acquire\2"),
    "a wait that acquires nothing": (WAIT, r"\1relaxed\2\3"),
    "no barrier": (STORED, r"\1\2acq_rel"),
    "nothing is released": (STORED, r"\1bar.sync 0;\2relaxed"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("arch, dtype", TARGETS)
def test_programs_wait_for_each_other(arch, dtype, fault):
    """Without any part of it the emulator finds a race."""
    pattern, replacement = FAULTS[fault]

    def broken(name, ptx):
        edited, number = re.subn(pattern, replacement, ptx, count=1, flags=re.DOTALL)
        assert number == 1
        return edited

    g, dx = matrices(ONE_TILE, 1), matrices(ONE_TILE, 1)
    with pytest.raises(Reported, match="race: "):
        with emulated_device(arch, edit=broken):
            iterate(g, dx, ONE_TILE, dtype, MILD[:1])
