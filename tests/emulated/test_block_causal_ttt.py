"""`block_causal_ttt` as it is compiled, in the tiles of the table: outputs and all gradients against float64.

Nothing may be reported either: an access out of bounds, a race, a read of what has not arrived. Half of the
time goes into compiling, so cases share their sizes, and with these their kernels, where they can; and each
target has the cases that need it. All matrix products run on each of the six, but those of Muon, which are
float16 for either 16-bit dtype, on both architectures. In 16 bits each architecture has products dense and
packed, aligned and not, masked and not; in float32, for which both have the same tiles and no matrix
instructions, one of the two has, and states, which are the same tensors in every dtype, are interpreted. The
other combinations of options are in `test_block_causal_ttt_triton.py`.
"""

import dataclasses
import functools

import pytest

from benchmarks.emulation import emulated_device
from lact_kernels import block_causal_ttt
from lact_kernels.triton.fast_weights.layout import Dims
from lact_kernels.triton.fast_weights.products import num_outer_splits
from tests.cases import TTTCase, check_block_causal_ttt, filled_with_nan
from tests.emulated.layouts import bordered
from tests.emulated.targets import FLOAT_TARGETS, TWO_TARGETS, target
from tests.ttt_pieces import in_pieces

triton_block_causal_ttt = functools.partial(block_causal_ttt, backend="triton")

MULTIPROCESSORS = 132
# One tile for each matrix, rows and heads at multiples of 16 elements, three updates and a rest. The gradient
# of momentum is one number for each head and update but the first: there must be some.
MOMENTUM = TTTCase("", B=1, H=4, T=200, chunk_size=64, Dk=16, Dv=32, Dh=48, momentum=True)
PACKED = TTTCase(
    "", B=1, H=2, T=142, chunk_size=32, momentum=True, prenorm=True, batched_weights=True,
    cu_seqlens=(0, 0, 30, 72, 72, 142),
)  # fmt: skip
WHOLE_TILES = TTTCase(
    "", B=1, H=1, T=560, chunk_size=520, cu_seqlens=(0, 20, 560), Dk=128, Dv=128, Dh=128
)
# More tokens in a chunk than channels: a step with singular values of 0 would be rounding noise.
MUON = TTTCase("", B=1, H=1, T=170, chunk_size=160, muon=True)


def check(arch, dtype, case, fn=triton_block_causal_ttt, num_multiprocessors=1):
    with emulated_device(arch, num_multiprocessors) as emulation, filled_with_nan():
        check_block_causal_ttt(fn, case, dtype)
    launched = {launch.kernel for launch in emulation.launches}
    assert {"_ttt_update_kernel", "_ttt_hidden_bwd_kernel", "_ttt_rates_bwd_kernel"} < launched
    assert ("_newton_schulz_kernel" in launched) == case.muon


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_momentum(arch, dtype):
    check(arch, dtype, MOMENTUM)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_whole_tiles_and_sums_over_tokens_in_parts(arch, dtype):
    """No mask of channels, a chunk of several tiles beside a short one, and a device to fill."""
    check_in_parts(arch, dtype, WHOLE_TILES)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_sums_in_parts_of_which_some_have_no_tokens(arch, dtype):
    """By descriptors, which do not know where a chunk ends."""
    case = TTTCase("", B=1, H=1, T=600, chunk_size=512, Dk=16, Dv=16, Dh=16)
    check_in_parts(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", FLOAT_TARGETS[1:])
def test_whole_tiles_of_sequences_with_weights_of_their_own(arch, dtype):
    """As float32 has smaller tiles. Among the sequences is one of nothing."""
    sizes = dict(H=4, T=600, chunk_size=270, cu_seqlens=(0, 0, 30, 600), Dk=32, Dv=32, Dh=64)
    check_in_parts(arch, dtype, dataclasses.replace(PACKED, **sizes))


def check_in_parts(arch, dtype, case):
    check(arch, dtype, case, num_multiprocessors=MULTIPROCESSORS)
    with emulated_device(arch, MULTIPROCESSORS):
        q, dims = case.inputs(dtype)["q"], Dims(case.Dk, case.Dv, case.Dh)
        assert num_outer_splits(q, 1, case.chunk_size, dims) > 1


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[1:])
def test_momentum_muon_and_prenorm(arch, dtype):
    check(arch, dtype, dataclasses.replace(MOMENTUM, T=150, H=2, muon=True, prenorm=True))


@pytest.mark.parametrize("arch, dtype", [target(90, "float16"), target(80, "bfloat16")])
def test_muon_of_several_tiles(arch, dtype):
    """Squares with tiles beside the diagonal, of tall and wide matrices."""
    check(arch, dtype, dataclasses.replace(MUON, Dk=24, Dv=136, Dh=144))


@pytest.mark.parametrize("arch, dtype", FLOAT_TARGETS[:1])
def test_muon_of_several_tiles_with_momentum(arch, dtype):
    """As float32 has smaller tiles."""
    sizes = dict(H=2, T=200, chunk_size=96, Dk=24, Dv=40, Dh=48)
    check(arch, dtype, dataclasses.replace(MUON, momentum=True, **sizes))


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_states(arch, dtype):
    """Cut inside a chunk and at a border, with an update after it; gradients flow back through the states."""

    def fn(**arguments):
        return in_pieces(triton_block_causal_ttt, (40, 128), **arguments)[0]

    check(arch, dtype, MOMENTUM, fn)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_checkpoints(arch, dtype):
    check(arch, dtype, MOMENTUM, functools.partial(triton_block_causal_ttt, checkpoint_interval=2))


def check_bordered(arch, dtype, case):
    """Rows of q, k and v at addresses that are multiples of nothing."""

    def fn(q, k, v, **arguments):
        return triton_block_causal_ttt(bordered(q), bordered(k), bordered(v), **arguments)

    check(arch, dtype, case, fn)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_odd_strides_and_pointers(arch, dtype):
    check_bordered(arch, dtype, dataclasses.replace(MOMENTUM, T=150))


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_packed_sequences_of_odd_strides_pointers_and_dims(arch, dtype):
    """Rows of weights and activations, too: several tiles for a matrix, none of them full or aligned."""
    check_bordered(arch, dtype, dataclasses.replace(PACKED, Dk=71, Dv=39, Dh=137))


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_many_rows_and_heads(arch, dtype):
    check(arch, dtype, dataclasses.replace(MOMENTUM, B=3, H=7, T=3, chunk_size=2))


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
def test_longest_rows_of_hidden_units(arch, dtype):
    """1024 is the most there is. Keys and values that are so long are interpreted, in float32."""
    check(arch, dtype, TTTCase("", B=1, H=1, T=40, chunk_size=20, Dk=16, Dv=16, Dh=1024))
