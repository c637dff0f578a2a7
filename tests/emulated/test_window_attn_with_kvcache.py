"""`window_attn_with_kvcache` as it is compiled, in the tiles of the table: outputs and lse against float64.

Nothing may be reported either. What reads the cache comes in two widths, as few rows or many share its
keys, and writes the result or, for a device with multiprocessors to fill, parts that another kernel
combines.
"""

import functools

import pytest

from benchmarks.emulation import emulated_device
from lact_kernels import window_attn_with_kvcache
from tests.cases import filled_with_nan
from tests.emulated.layouts import bordered
from tests.emulated.targets import TARGETS, TWO_TARGETS
from tests.test_window_attn_with_kvcache import CacheCase, check

MULTIPROCESSORS = 132
ATTEND = "_window_attn_with_kvcache_kernel"
COMBINE = "_window_attn_combine_kernel"

case_of = functools.partial(CacheCase, Hkv=1, D=64, Dv=64)
ALL_OF_IT = {"softcap": 2.0, "sinks": True}
IN_PARTS = [
    case_of("rows of different lengths in parts", 700, 600, (700, 130, 1)),
    case_of("all of it in parts", 300, (296, 2), (700, 299, 2, 0), Tq=4, **ALL_OF_IT),
]
OTHERS_IN_PARTS = [
    case_of("several queries on rings", 128, 120, (1000, 131, 3), Tq=4, Hkv=2, D=128, Dv=128),
    case_of("many rows and padded head dims", 160, 100, (500, 159), Tq=20, D=80, Dv=72),
]
WHOLE = [
    case_of("rows of different lengths", 500, 450, (500, 77)),
    case_of("window of one and queries before the keys", 100, 1, (100, 2, 0), Tq=3, Hq=2),
    case_of("many rows and no window", 290, None, (290, 20), Tq=40),
    case_of("widest head dim and no lengths", 150, 100, Hq=2, Hkv=2, D=256, Dv=256),
    case_of("many rows of the widest head dim", 150, 70, (150,), Tq=20, D=256, Dv=256),
    case_of("all of it with many rows", 140, (100, 7), (1000, 9), Tq=40, D=80, Dv=72, **ALL_OF_IT),
]


def check_emulated(arch, dtype, case, num_multiprocessors=1, layout=lambda x: x):
    def fn(*tensors, **options):
        tensors = map(layout, tensors)
        return window_attn_with_kvcache(*tensors, **options, return_lse=True, backend="triton")

    with emulated_device(arch, num_multiprocessors) as emulation, filled_with_nan():
        check(fn, case, dtype)
    in_parts = num_multiprocessors > 1
    expected = [ATTEND, COMBINE] if in_parts else [ATTEND]
    assert [launch.kernel for launch in emulation.launches] == expected


@pytest.mark.parametrize("arch, dtype", TARGETS)
@pytest.mark.parametrize("case", IN_PARTS, ids=str)
def test_in_parts(arch, dtype, case):
    check_emulated(arch, dtype, case, MULTIPROCESSORS)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
@pytest.mark.parametrize("case", OTHERS_IN_PARTS, ids=str)
def test_others_in_parts(arch, dtype, case):
    check_emulated(arch, dtype, case, MULTIPROCESSORS)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole(arch, dtype, case):
    check_emulated(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_rows_at_odd_addresses(arch, dtype):
    check_emulated(arch, dtype, case_of("", 150, 100, (150, 40), Tq=2, Hkv=2), layout=bordered)
