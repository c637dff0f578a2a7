"""Hundreds of drawn shapes, windows, strides and packings of `window_attn`, against the reference.

The draws are the same in every run (`derandomize`), so that a failure is a change of the code.
"""

import collections
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.ops.checks import check_window
from lact_kernels.ops.window_attn import run_window_attn
from lact_kernels.triton.configs import KernelConfig
from tests.cases import LAYOUTS, laid_out
from tests.test_window_attn_triton import DEVICE, ON_CPU, run_kernels, run_reference

drawn = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call. `lengths` are those of packed sequences, of queries and of keys, or of one dense row."""

    B: int
    lengths: tuple[tuple[int, int], ...]
    window_size: int | tuple[int, int] | None
    softcap: float | None
    sinks: bool
    heads: tuple[int, int]
    D: int
    Dv: int
    layouts: tuple[str, str, str, str]
    seed: int

    @property
    def packed(self) -> bool:
        return self.B == 0

    @property
    def options(self) -> AttentionOptions:
        window = check_window("window_size", self.window_size)
        return AttentionOptions(*window, self.D**-0.5, self.softcap)

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], tuple]:
        """q, k, v and do, sinks or None, and the borders of the sequences."""
        generator = torch.Generator().manual_seed(self.seed)
        borders = [list(itertools.accumulate(x, initial=0)) for x in zip(*self.lengths)]
        (Tq, Tk), (Hq, Hkv), B = (x[-1] for x in borders), self.heads, self.B or 1
        shapes = [(Tq, Hq, self.D), (Tk, Hkv, self.D), (Tk, Hkv, self.Dv), (Tq, Hq, self.Dv)]
        tensors = [
            laid_out(torch.randn(B, *shape, generator=generator).to(DEVICE, dtype), layout)
            for shape, layout in zip(shapes, self.layouts)
        ]
        sinks = torch.randn(Hq, generator=generator).to(DEVICE, dtype) if self.sinks else None
        tensors.append(sinks)
        if not self.packed:
            return tensors, (None, None)
        return tensors, tuple(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in borders)


@st.composite
def draws(draw, longest: int) -> Draw:
    length = st.one_of(st.integers(0, 3), st.integers(0, longest))
    more_keys = st.one_of(st.just(0), st.just(0), st.integers(-longest, longest))
    width = st.one_of(st.integers(2, 20), st.integers(2, 2 * longest))
    side = st.one_of(st.integers(-1, 20), st.integers(0, 2 * longest))
    packed = draw(st.booleans())
    queries = draw(st.lists(length, min_size=1, max_size=8 if packed else 1))
    lengths = tuple((n, max(0, n + draw(more_keys))) for n in queries)
    Hkv, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Draw(
        B=0 if packed else draw(st.integers(1, 2)),
        lengths=lengths,
        window_size=draw(st.one_of(st.none(), width, st.tuples(side, side))),
        softcap=draw(st.sampled_from([None, None, 1.5])),
        sinks=draw(st.booleans()),
        heads=(Hkv * groups, Hkv),
        D=draw(st.sampled_from([16, 24, 32])),
        Dv=draw(st.sampled_from([16, 40])),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        seed=draw(st.integers(0, 2**31)),
    )


@drawn
@given(draws(longest=150))
def test_eager(case: Draw):
    """In float64, where there is no rounding to allow for."""
    (q, k, v, do, sinks), borders = case.inputs(torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    given = borders if case.packed else None
    ours = run_window_attn(q, k, v, case.options, sinks, given, "eager")
    packing = dict(zip(("cu_seqlens", "cu_seqlens_k"), borders))
    scores = {"softcap": case.softcap, "sinks": sinks}
    exact = reference.window_attn(q, k, v, case.window_size, **scores, **packing, return_lse=True)
    torch.testing.assert_close(ours, exact)
    grads = (torch.autograd.grad(o, inputs, do, materialize_grads=True) for o, _ in (ours, exact))
    torch.testing.assert_close(*grads)


NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")
STRUCTURE = {torch.float32: 1e-4, torch.float16: 3e-2}  # a wrong index or mask changes far more
blocks = st.sampled_from([(16, 16), (32, 16), (16, 32)])


@pytest.mark.skipif(not ON_CPU, reason="the tiles of 16 are for the interpreter")
def test_kernels():
    """Each draw alone by a coarse bound, and all of a dtype together by that of `benchmarks/accuracy.py`.

    Many a draw is a handful of numbers, too few to compare rounding errors with.
    """
    squares = collections.defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    drawn_of = collections.Counter()

    @settings(drawn, max_examples=100)
    @given(draws(longest=40), blocks, st.sampled_from(list(STRUCTURE)))
    def check(case: Draw, blocks, dtype):
        drawn_of[dtype] += 1
        (q, k, v, do, sinks), borders = case.inputs(dtype)
        config = KernelConfig(*blocks, num_warps=4, num_stages=1)
        options = case.options.within(q.shape[1], k.shape[1])
        inner_sinks = None if sinks is None else sinks.float()
        actual = run_kernels(q, k, v, do, None, options, config, borders, inner_sinks)
        window = {"window_size": case.window_size, "softcap": case.softcap}
        same, exact = (
            run_reference(q, k, v, do, None, window, borders, x, sinks)
            for x in (dtype, torch.float64)
        )
        for name, *tensors in zip(NAMES, actual, same, exact):
            assert torch.equal(tensors[0] == -math.inf, tensors[2] == -math.inf)
            a, s, e = (x.double().masked_fill(x == -math.inf, 0.0) for x in tensors)
            torch.testing.assert_close(a, e, rtol=0, atol=STRUCTURE[dtype] * (1 + _largest(e)))
            sums = torch.stack([x.square().sum() for x in (a - e, s - e, e)]).cpu()
            squares[dtype, name] += sums

    check()
    assert len(squares) == len(NAMES) * len(STRUCTURE) and min(drawn_of.values()) >= 25
    for (dtype, name), (ours, plain, size) in squares.items():
        eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        assert ours.sqrt() <= 2 * plain.sqrt() + eps * size.sqrt(), (dtype, name)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
