"""Regression timings of `window_attn`, to compare two commits with.

pytest benchmarks/bench_*.py --benchmark-autosave     # at each of the two commits
pytest-benchmark compare                              # everything saved, side by side
"""

import pytest

from benchmarks.registry import MODES, WindowAttn
from benchmarks.regression import OPTIONS, time_point

POINTS = {
    "W128": WindowAttn(T=4096, window_size=128),
    "W1024": WindowAttn(T=4096, window_size=1024),
    "W1024-grouped": WindowAttn(T=4096, window_size=1024, Hq=4, Hkv=1),
    "W1024-packed": WindowAttn(T=4096, window_size=1024, sequences=8),
}


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_window_attn(benchmark, point, mode):
    time_point(benchmark, point, mode)
