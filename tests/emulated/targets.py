"""For which architectures, and in which dtypes, the kernels are compiled and emulated."""

import pytest
import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def target(arch: int, name: str):
    """`arch, dtype` of a test, whose id names both.

    One worker has all tests of a target: what a process has compiled it does not compile again.
    """
    label = f"sm_{arch}-{name}"
    return pytest.param(arch, DTYPES[name], id=label, marks=pytest.mark.xdist_group(label))


# Products of 16-bit numbers are made by matrix instructions, those of float32 by others or by none.
HALF_TARGETS = [target(arch, name) for arch in (90, 80) for name in ("bfloat16", "float16")]
FLOAT_TARGETS = [target(arch, "float32") for arch in (90, 80)]
TARGETS = HALF_TARGETS + FLOAT_TARGETS
# One of each architecture and of each 16-bit dtype, for what need not run on all.
TWO_TARGETS = [target(90, "bfloat16"), target(80, "float16")]
# Both generations with little shared memory, for what is different there.
SMALL_TARGETS = [target(86, "bfloat16"), target(120, "float16")]
