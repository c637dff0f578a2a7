"""`silu_l2norm_rope` and `rms_norm_scale_add` as compiled: outputs and all gradients against float64.

Nothing may be reported either. The sizes are those of models, the tokens so many that several programs
have several blocks each, and a rest.
"""

import pytest
import torch

from benchmarks.emulation import emulated_device
from tests.emulated.targets import TARGETS, target
from tests.test_branches import Case, both

MULTIPROCESSORS = 132

FULL_TILES = Case("full tiles", T=150, C=256, Hq=4, Hf=2, B=1)
OTHERS = [
    Case(
        "padded tiles and angles for each row", T=70, C=192, Hq=3, Hf=1, silu_v=False, scaled=False,
        rows_of_angles=2,
    ),
    Case(
        "heads of no power of two and no options", T=40, C=320, Hq=4, Hf=2, silu=False, silu_v=False,
        rotate_fast=False, parameter_dtype=torch.bfloat16,
    ),
    Case("one wide head", T=20, C=768, Hq=12, Hf=1, B=1),
]  # fmt: skip


def check_emulated(check, arch, dtype, case):
    with emulated_device(arch, MULTIPROCESSORS) as emulation:
        check(case, dtype, "triton", "cpu")
    assert len(emulation.launches) == 2  # forward and backward


@pytest.mark.parametrize("arch, dtype", TARGETS)
@both
def test_full_tiles(check, arch, dtype):
    check_emulated(check, arch, dtype, FULL_TILES)


# In float32 the bar is so low that the mean over too many channels is seen.
@pytest.mark.parametrize("arch, dtype", [target(90, "bfloat16"), target(80, "float32")])
@pytest.mark.parametrize("case", OTHERS, ids=str)
@both
def test_others(check, arch, dtype, case):
    check_emulated(check, arch, dtype, case)
