"""Any plan and every option as they are compiled: outputs, end and all gradients against float64.

Each option is on one of the targets: `test_block_causal_ttt` has all kernels on all of them, and what is new
here is what an option adds to a kernel, or takes out of it.
"""

import dataclasses

import pytest

from benchmarks.emulation import emulated_device
from lact_kernels import NewtonSchulz
from tests.cases import filled_with_nan
from tests.emulated.targets import target
from tests.plan_cases import PACKED, ScanCase, check_scan

PLAN = ScanCase(
    "gaps and unseen versions", plan=PACKED, scale=8, momentum=True, Dk=16, Dv=32, Dh=48
)
# More keys than channels: see test_block_causal_ttt. One step of Newton-Schulz: others have more.
MUON = ScanCase("", scale=8, muon=NewtonSchulz([(1.5, -0.5, 0.1)]), H=1, Dk=5, Dv=6, Dh=7)
GROWING = {"momentum": True, "momentum_after_muon": True, "weight_norm": False}
OF_TARGETS = [
    (target(90, "bfloat16"), PLAN),
    (target(80, "float16"), dataclasses.replace(PLAN, reason="no renorm", weight_norm=False)),
    (target(90, "float16"), dataclasses.replace(MUON, reason="momentum after Muon", **GROWING)),
    (target(80, "bfloat16"), dataclasses.replace(PLAN, reason="w1", trained=(1,), prenorm=True)),
    (target(90, "bfloat16"), dataclasses.replace(PLAN, reason="w2", trained=(2,), prenorm=True)),
    (target(80, "float16"), dataclasses.replace(PLAN, reason="w0", trained=(0,))),
]


def on(of_target, case):
    return pytest.param(*of_target.values, case, id=f"{of_target.id}-{case}", marks=of_target.marks)


@pytest.mark.parametrize("arch, dtype, case", [on(*pair) for pair in OF_TARGETS])
def test_scan(arch, dtype, case):
    with emulated_device(arch), filled_with_nan():
        check_scan("triton", case, dtype)
