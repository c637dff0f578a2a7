"""Regression timings of `window_attn_with_kvcache`; bench_window_attn.py says how to compare two commits.

Beside it stands PyTorch's attention over the window, so that the table shows the ratio of the two.
"""

import functools

import pytest

from benchmarks.peers import CACHE_SDPA
from benchmarks.registry import WindowAttnWithKVCache
from benchmarks.regression import DEVICE, DTYPE, OPTIONS, time_call, time_point

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


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("name", ["lact_kernels", CACHE_SDPA[0].name])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("window_size", [128, 1024, 4096])
def test_decoding_beside_sdpa(benchmark, window_size, batch_size, name):
    """One query per row, a kv head for each query head, and a window that ends with the cache."""
    size = {"S": 2 * window_size, "window_size": window_size, "B": batch_size}
    point = WindowAttnWithKVCache(**size, Hq=8, Hkv=8)
    ours = name == "lact_kernels"
    inputs = point.inputs(DTYPE, DEVICE)
    function = functools.partial(point.run, "auto") if ours else CACHE_SDPA[0].build(point, "fwd")
    benchmark.group = f"decoding, window {window_size}, {batch_size} rows"
    time_call(benchmark, lambda: function(**inputs))
