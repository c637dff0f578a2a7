"""The functions that the attention kernels compute scores and probabilities with, one by one."""

import math

import pytest
import torch
import triton
import triton.language as tl

from lact_kernels.triton.primitives import mask_after_query, mask_before_window
from lact_kernels.triton.softmax import softmax_end, tanh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 16


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, factor, BLOCK: tl.constexpr, FULL_PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tanh(tl.load(x_ptr + i), factor, FULL_PRECISION))


@pytest.mark.parametrize("full_precision", [True, False], ids=["float32", "16_bits"])
def test_tanh(full_precision):
    small, large = torch.logspace(-38, 0.5, 1024), torch.linspace(0.1, 40.0, 1024)
    x = torch.cat([small, -small, large, -large])
    x[-4:] = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    x, out = x.to(DEVICE), torch.empty(4096, device=DEVICE)
    _tanh_kernel[(1,)](x, out, 0.5, BLOCK=4096, FULL_PRECISION=full_precision)
    exact = torch.tanh(x.double() * 0.5)
    assert out[-1].isnan()
    error, exact = (out.double() - exact)[:-1].abs(), exact[:-1].abs()
    bound = exact * 2e-7 + 1e-44 if full_precision else 6e-7
    assert (error <= bound).all()


@triton.jit
def _softmax_end_kernel(
    acc_ptr, row_max_ptr, row_sum_ptr, sinks_ptr, o_ptr, lse_ptr, scale,
    ROWS: tl.constexpr, FULL_PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    sink = None if sinks_ptr is None else tl.load(sinks_ptr + rows)
    acc, row_max = tl.load(acc_ptr + rows)[:, None], tl.load(row_max_ptr + rows)
    row_sum = tl.load(row_sum_ptr + rows)
    o, lse = softmax_end(acc, row_max, row_sum, scale, sink, FULL_PRECISION)
    tl.store(o_ptr + rows[:, None], o)
    tl.store(lse_ptr + rows, lse)


@pytest.mark.parametrize("full_precision", [True, False], ids=["float32", "16_bits"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_end_of_a_softmax(with_sinks, full_precision):
    """Rows with keys and without any, with sinks below the keys, above them and far from them."""
    row_max = torch.tensor([3.0, -70.0, 900.0, -1e38]).repeat_interleave(4)  # the last saw no key
    row_sum = torch.tensor([1.5, 20.0, 3.0, 0.0]).repeat_interleave(4)
    sinks = torch.tensor([-math.inf, -300.0, 2.0, 400.0]).repeat(4)
    acc, scale = 0.5 * row_sum, 0.25
    o, lse = torch.empty(ROWS, device=DEVICE), torch.empty(ROWS, device=DEVICE)
    inputs = [x.to(DEVICE) for x in (acc, row_max, row_sum, sinks)]
    inputs[-1] = inputs[-1] if with_sinks else None
    _softmax_end_kernel[(1,)](*inputs, o, lse, scale, ROWS=ROWS, FULL_PRECISION=full_precision)
    unit = scale if full_precision else math.log(2)
    of_keys = row_max.double() * unit + row_sum.double().log()
    exact = torch.logaddexp(of_keys, sinks.double()) if with_sinks else of_keys
    probs = torch.where(row_sum == 0, 0.0, (of_keys - exact).exp())
    torch.testing.assert_close(lse.cpu().double(), exact, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(o.cpu().double(), 0.5 * probs, rtol=1e-5, atol=1e-30)


@triton.jit
def _mask_kernel(out_ptr, own, last, window_size, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    ones = tl.full([ROWS, COLS], 1.0, tl.float32)
    before = mask_before_window(ones, own, window_size, hidden=0.0)
    after = mask_after_query(ones, own, hidden=0.0, last=last)
    tl.store(out_ptr + rows * COLS + cols, before + 2.0 * after)


@pytest.mark.parametrize("last", [None, 40, 21, 3, -2])
def test_masks(last):
    rows, cols = torch.arange(ROWS)[:, None], torch.arange(32)
    out = torch.empty(ROWS, 32, device=DEVICE)
    for own in (-20, -3, 0, 9, 30):
        _mask_kernel[(1,)](out, own, last, 7, ROWS=ROWS, COLS=32)
        in_window = cols > rows + own - 7
        there = (cols <= rows + own) & (cols <= (32 if last is None else last))
        assert torch.equal(out.cpu(), in_window + 2.0 * there)
