"""Regression timings of `ttt`; bench_window_attn.py says how to compare two commits."""

import pytest

from benchmarks.registry import MODES, ORDERS, TTT
from benchmarks.regression import OPTIONS, time_point

POINTS = {plan: TTT.of(plan, small=True) for plan in ORDERS}
POINTS["views-only-w1"] = TTT.of("views", small=True, only_w1=True)


@pytest.mark.benchmark(**OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_ttt(benchmark, point, mode):
    time_point(benchmark, point, mode)
