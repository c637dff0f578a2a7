"""Regression timings of `block_causal_ttt`; bench_window_attn.py says how to compare two commits."""

import pytest

from benchmarks.registry import MODES, BlockCausalTTT
from benchmarks.regression import OPTIONS, time_point

POINTS = {
    "C256": BlockCausalTTT(T=4096, chunk_size=256, Dk=128, Dv=128, Dh=128),
    "C1024": BlockCausalTTT(T=4096, chunk_size=1024, Dk=128, Dv=128, Dh=128),
    "C1024-muon-momentum": BlockCausalTTT(
        T=4096, chunk_size=1024, Dk=128, Dv=128, Dh=128, muon=True, momentum=True
    ),
}


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_block_causal_ttt(benchmark, point, mode):
    time_point(benchmark, point, mode)
