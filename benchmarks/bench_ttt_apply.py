"""Regression timings of `ttt_apply`; bench_window_attn.py says how to compare two commits."""

import pytest

from benchmarks.registry import TTTApply
from benchmarks.regression import OPTIONS, time_point

POINTS = {"control-step": TTTApply(Tq=1), "rendering": TTTApply(Tq=4096)}


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_ttt_apply(benchmark, point):
    time_point(benchmark, point, "fwd")
