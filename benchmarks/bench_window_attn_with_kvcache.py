"""Regression timings of `window_attn_with_kvcache`; bench_window_attn.py says how to compare two commits."""

import pytest

from benchmarks.registry import WindowAttnWithKVCache
from benchmarks.regression import OPTIONS, time_point

POINTS = {
    "S4096": WindowAttnWithKVCache(S=4096, window_size=1024),
    "S65536": WindowAttnWithKVCache(S=65536, window_size=1024),
    "S4096-Tq8": WindowAttnWithKVCache(S=4096, window_size=1024, Tq=8),
}


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("mode", WindowAttnWithKVCache.modes)
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_window_attn_with_kvcache(benchmark, point, mode):
    time_point(benchmark, point, mode)
