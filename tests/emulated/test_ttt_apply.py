"""`ttt_apply` as it is compiled, in the tiles of the table: outputs and all gradients against float64."""

import functools

import pytest

from benchmarks.emulation import emulated_device
from lact_kernels import ttt_apply
from tests.cases import ApplyCase, check_ttt_apply, filled_with_nan
from tests.emulated.layouts import bordered
from tests.emulated.targets import TWO_TARGETS

triton_ttt_apply = functools.partial(ttt_apply, backend="triton")

MULTIPROCESSORS = 132
FORWARD = ["_ttt_hidden_kernel", "_ttt_project_kernel"]
BACKWARD = ["_ttt_hidden_kernel", "_ttt_outer_kernel", "_ttt_project_kernel"]


def check(arch, dtype, case, fn=triton_ttt_apply, num_multiprocessors=1):
    with emulated_device(arch, num_multiprocessors) as emulation, filled_with_nan():
        check_ttt_apply(fn, case, dtype)
    assert [launch.kernel for launch in emulation.launches] == FORWARD + BACKWARD


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_whole_tiles_of_weights_that_all_rows_share(arch, dtype):
    """The gradients of the weights are sums in parts. Stored in float32, the weights are rounded once."""
    case = ApplyCase("", B=2, T=140, H=1, Dk=128, Dv=128, Dh=128, float32_weights=True)
    check(arch, dtype, case, num_multiprocessors=MULTIPROCESSORS)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_odd_strides_pointers_and_dims_of_weights_for_each_row(arch, dtype):
    """Matrices of rows and heads that are not at multiples of 16 elements, of tiles that are not full."""

    def fn(q, *weights):
        return triton_ttt_apply(bordered(q), *(bordered_matrices(w) for w in weights))

    check(arch, dtype, ApplyCase("", T=30, H=1, Dk=71, Dv=39, Dh=137, batched="012"), fn)


def bordered_matrices(w):
    """The same weights, each matrix amid NaN and from an odd address on."""
    return bordered(w.flatten(-2)).unflatten(-1, w.shape[-2:])


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_control_steps(arch, dtype):
    """Rows of one token in one tile."""
    check(arch, dtype, ApplyCase("", B=9, T=1, Dk=16, Dv=32, Dh=48))
