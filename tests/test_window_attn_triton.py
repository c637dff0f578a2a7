"""The window attention kernels against the dense reference, launched directly.

Without a GPU they run in Triton's interpreter, in float32 and with blocks of 16 so that a few dozen
tokens straddle every edge. The tests marked `gpu` run the same cases with the blocks of the table, those
of tests/emulated run what is compiled of these, in every dtype.
"""

import copy
import dataclasses
import math

import pytest
import torch

from benchmarks.compile_report import window_attn_cases
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.triton import configs
from lact_kernels.triton.configs import TRITON, KernelConfig
from lact_kernels.triton.window_attn import bwd, fwd
from lact_kernels.triton.window_attn.bwd import window_attn_bwd
from lact_kernels.triton.window_attn.fwd import window_attn_fwd
from reference.window_attn import window_attn
from tests.cases import assert_cancelled, filled_with_nan
from tests.tolerance import assert_close_to_float64

SMALL = KernelConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
ON_CPU = not torch.cuda.is_available()
DEVICE = "cpu" if ON_CPU else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_interpreter = pytest.mark.skipif(not ON_CPU, reason="runs in the interpreter only")

# B, Tq, Tk, Hq, Hkv, D, Dv, W, why
CASES = [
    pytest.param(1, 1, 1, 1, 1, 16, 16, 1, id="one_token"),
    pytest.param(1, 33, 33, 1, 1, 16, 16, 1, id="window_of_itself"),
    pytest.param(1, 33, 33, 1, 1, 16, 16, None, id="full_one_past_a_tile"),
    pytest.param(1, 20, 20, 1, 1, 16, 16, 50, id="window_longer_than_keys"),
    pytest.param(1, 64, 64, 1, 1, 16, 16, 16, id="window_of_one_tile"),
    pytest.param(1, 65, 65, 1, 1, 16, 16, 33, id="all_three_segments_ragged"),
    pytest.param(2, 31, 31, 4, 2, 16, 16, 9, id="two_heads_per_kv_head"),
    pytest.param(1, 18, 18, 3, 1, 16, 16, 5, id="one_kv_head"),
    pytest.param(1, 19, 52, 2, 1, 16, 16, 21, id="kv_cache_of_odd_length"),
    pytest.param(4, 1, 40, 4, 2, 16, 16, 17, id="decode_leaves_keys_unseen"),
    pytest.param(1, 40, 19, 2, 1, 16, 16, 9, id="queries_before_the_keys"),
    pytest.param(1, 34, 34, 1, 1, 24, 16, 18, id="padded_head_dim"),
    pytest.param(1, 20, 20, 1, 1, 16, 40, 7, id="value_dim_differs"),
]
LARGE_CASES = [
    pytest.param(2, 300, 300, 4, 2, 64, 64, 100, id="d64"),
    pytest.param(1, 700, 700, 2, 2, 128, 128, 257, id="d128"),
    pytest.param(1, 130, 515, 4, 1, 128, 128, 300, id="d128_kv_cache"),
    pytest.param(1, 400, 400, 2, 1, 80, 96, 129, id="d80_dv96"),
    pytest.param(1, 390, 390, 2, 1, 192, 128, 200, id="d192_dv128"),
    pytest.param(1, 385, 385, 2, 1, 256, 256, None, id="d256_full"),
]
# Borders (of the queries, and of the keys), Hq, Hkv, D, Dv, W, why
PACKED_CASES = [
    pytest.param((0, 1, 16, 33, 34, 60), 2, 2, 16, 16, 9, id="a_token_a_tile_and_ragged_ones"),
    pytest.param((0, 0, 20, 20, 20, 37, 37), 1, 1, 16, 16, None, id="sequences_of_nothing"),
    pytest.param(tuple(range(0, 262, 2)), 1, 1, 16, 16, 3, id="more_than_one_search_reads"),
    pytest.param((0, 5, 15, 60), 4, 2, 16, 24, 20, id="grouped_heads_and_wider_values"),
    pytest.param(((0, 3, 20, 21, 50), (0, 18, 37, 70, 99)), 2, 1, 16, 16, 21, id="on_a_cache"),
    pytest.param(((0, 20, 20, 45), (0, 4, 9, 30)), 1, 1, 16, 16, 7, id="queries_before_the_keys"),
    pytest.param(((0, 4, 8, 12), (0, 0, 8, 8)), 1, 1, 16, 16, 7, id="queries_without_any_key"),
]
LARGE_PACKED_CASES = [
    pytest.param((0, 1, 300, 301, 1500, 1500, 1700), 4, 2, 128, 128, 257, id="d128"),
    pytest.param(((0, 130, 500), (0, 700, 1100)), 2, 2, 64, 64, 300, id="d64_on_a_cache"),
    pytest.param((0, 700, 710, 1100), 2, 1, 192, 128, 129, id="d192_dv128"),
    pytest.param((0, 200, 600), 1, 1, 256, 256, None, id="d256"),
    # The small ones in one size, as each size compiles its own kernels.
    *(pytest.param(*case.values[:3], 64, 64, case.values[5], id=case.id) for case in PACKED_CASES),
]


# B, Tq, Tk, Hq, Hkv, D, Dv, window, softcap, size of sinks, why
OPTION_CASES = [
    pytest.param(1, 65, 65, 2, 1, 16, 16, (20, 18), None, 1.0, id="two_sides_and_sinks"),
    pytest.param(1, 33, 33, 2, 2, 16, 16, (-1, -1), 2.0, None, id="all_keys_and_a_soft_cap"),
    pytest.param(2, 19, 52, 2, 1, 16, 24, (8, 13), 2.0, 1.0, id="all_of_them_on_a_cache"),
    pytest.param(1, 40, 19, 1, 1, 16, 16, (9, 6), None, 1.0, id="queries_that_see_nothing"),
]


def make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, dtype):
    q = torch.randn(B, Tq, Hq, D, device=DEVICE, dtype=dtype)
    k = torch.randn(B, Tk, Hkv, D, device=DEVICE, dtype=dtype)
    v = torch.randn(B, Tk, Hkv, Dv, device=DEVICE, dtype=dtype)
    do = torch.randn(B, Tq, Hq, Dv, device=DEVICE, dtype=dtype)
    dlse = torch.randn(B, Hq, Tq, device=DEVICE)
    return q, k, v, do, dlse


def options_of(q, k, window_size, scale, softcap=None):
    """As the launchers take them."""
    if window_size is None:
        window_size = -1, 0
    elif isinstance(window_size, int):
        window_size = window_size - 1, 0
    left, right = (None if side == -1 else side for side in window_size)
    return AttentionOptions(left, right, scale, softcap).within(q.shape[1], k.shape[1])


def run_kernels(q, k, v, do, dlse, options, config, cu_seqlens=(None, None), sinks=None):
    """Outputs, lse, dq, dk and dv, and dsinks if there are any."""
    sinks = None if sinks is None else sinks.expand(len(q), -1)
    with filled_with_nan():
        o, lse = window_attn_fwd(q, k, v, options, sinks, *cu_seqlens, config=config)
        *grads, dsinks = window_attn_bwd(
            do, dlse, q, k, v, o, lse, options, sinks, *cu_seqlens, config=config
        )
    if sinks is None:
        assert dsinks.shape == (0,)
        return o, lse, *grads
    return o, lse, *grads, dsinks.sum(dim=0)


def run_reference(q, k, v, do, dlse, window, cu_seqlens, dtype, sinks=None):
    """`window` has the arguments that the reference calls so, and softmax_scale and softcap."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, sinks) if x is not None]
    packing = dict(zip(("cu_seqlens", "cu_seqlens_k"), cu_seqlens))
    window = {**window, "sinks": None if sinks is None else inputs[3]}
    o, lse = window_attn(*inputs[:3], **window, **packing, return_lse=True)
    if dlse is None:
        grads = torch.autograd.grad(o, inputs, do.to(dtype))
    else:
        grads = torch.autograd.grad((o, lse), inputs, (do.to(dtype), dlse.to(dtype)))
    return o.detach(), lse.detach(), *grads


def check(
    q, k, v, do, dlse, window_size, config,
    scale=None, cu_seqlens=(None, None), softcap=None, sinks=None,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = options_of(q, k, window_size, scale, softcap)
    actual = run_kernels(q, k, v, do, dlse, options, config, cu_seqlens, sinks)
    window = {"window_size": window_size, "softmax_scale": scale, "softcap": softcap}
    same, exact = (
        run_reference(q, k, v, do, dlse, window, cu_seqlens, dtype, sinks)
        for dtype in (q.dtype, torch.float64)
    )
    float32 = torch.float32
    assert [x.dtype for x in actual] == [q.dtype, float32, *3 * [q.dtype], float32][: len(exact)]
    single_key = 1 in (window_size, k.shape[1]) and sinks is None
    for name, a, s, e in zip(("o", "lse", "dq", "dk", "dv", "dsinks"), actual, same, exact):
        if name == "lse":  # -inf where nothing is seen, on which no difference is possible
            assert torch.equal(a == -math.inf, e == -math.inf)
            a, s, e = (x.masked_fill(e == -math.inf, 0.0) for x in (a, s, e))
        if name == "dsinks":
            a = a.to(s.dtype)  # as autograd does
        if single_key and name in ("dq", "dk"):
            assert_cancelled(a, e, [q, k, v], do, name)
        else:
            assert_close_to_float64(a, s, e, name)


@needs_interpreter
@pytest.mark.parametrize("B, Tq, Tk, Hq, Hkv, D, Dv, window_size", CASES)
def test_kernels_match_reference(B, Tq, Tk, Hq, Hkv, D, Dv, window_size):
    check(*make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, torch.float32), window_size, SMALL)


@needs_interpreter
@pytest.mark.parametrize("B, Tq, Tk, Hq, Hkv, D, Dv, window, softcap, sinks", OPTION_CASES)
def test_options(B, Tq, Tk, Hq, Hkv, D, Dv, window, softcap, sinks):
    inputs = make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, torch.float32)
    sinks = None if sinks is None else sinks * torch.randn(Hq)
    check(*inputs, window, SMALL, softcap=softcap, sinks=sinks)


def check_packed(borders, Hq, Hkv, D, Dv, dtype, window_size, config, **options):
    """`borders` are those of the queries, and of the keys if they differ."""
    borders = borders if isinstance(borders[0], tuple) else (borders, borders)
    inputs = make_inputs(1, borders[0][-1], borders[1][-1], Hq, Hkv, D, Dv, dtype)
    cu_seqlens = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in borders]
    check(*inputs, window_size, config, cu_seqlens=cu_seqlens, **options)


@needs_interpreter
@pytest.mark.parametrize("borders, Hq, Hkv, D, Dv, window_size", PACKED_CASES)
def test_packed_sequences_match_reference(borders, Hq, Hkv, D, Dv, window_size):
    check_packed(borders, Hq, Hkv, D, Dv, torch.float32, window_size, SMALL)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_packed_sequences_with_all_options(dtype):
    """Sequences of fewer keys than a tile has, whose windows go beyond both of their ends."""
    borders, sinks = ((0, 3, 23, 24, 50), (0, 6, 26, 26, 60)), torch.randn(4)
    check_packed(borders, 4, 2, 16, 24, dtype, (9, 7), SMALL, softcap=2.0, sinks=sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("borders, Hq, Hkv, D, Dv, window_size", LARGE_PACKED_CASES)
def test_packed_sequences_match_reference_on_gpu(borders, Hq, Hkv, D, Dv, window_size, dtype):
    check_packed(borders, Hq, Hkv, D, Dv, dtype, window_size, None)


@needs_interpreter
@pytest.mark.parametrize(
    "block_m, block_n", [(32, 16), (16, 32)], ids=["wide_queries", "wide_keys"]
)
def test_unequal_blocks(block_m, block_n):
    config = KernelConfig(block_m, block_n, num_warps=4, num_stages=1)
    for window_size in (15, 16, 17, 40, (9, 7)):
        check(*make_inputs(1, 70, 84, 1, 1, 16, 16, torch.float32), window_size, config)


@needs_interpreter
def test_dk_and_dv_in_launches_of_their_own():
    config = KernelConfig(16, 16, num_warps=4, num_stages=1, split=True)
    inputs = make_inputs(1, 31, 40, 4, 2, 16, 24, torch.float32)
    check(*inputs, 13, config)
    check(*inputs, (6, 6), config, softcap=2.0, sinks=torch.randn(4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, Tq, Tk, Hq, Hkv, D, Dv, window_size", CASES + LARGE_CASES)
def test_kernels_match_reference_on_gpu(B, Tq, Tk, Hq, Hkv, D, Dv, window_size, dtype):
    check(*make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, dtype), window_size, None)


def test_without_gradient_of_lse():
    q, k, v, do, _ = make_inputs(1, 20, 20, 1, 1, 16, 16, torch.float32)
    check(q, k, v, do, None, 7, SMALL)


def test_strided_inputs_are_read_in_place(monkeypatch):
    """Slices of one projection, heads before time, and a gradient expanded from one number."""
    B, T, H, D = 2, 20, 2, 16
    qkv = torch.randn(B, T, 3, H, D, device=DEVICE)
    q, k, v = qkv.unbind(2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    do = torch.randn(B, T, H, 2 * D, device=DEVICE)[..., :D]
    copied = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x) or x)
    run_kernels(q, k, v, do, None, options_of(q, k, 7, 0.25), SMALL)
    assert all(x.is_contiguous() for x in copied)
    monkeypatch.undo()
    check(q, k, v, do, None, 7, SMALL)
    check(q, k, v, torch.ones((), device=DEVICE).expand(B, T, H, D), None, 7, SMALL)
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, do, None, 7, SMALL)


@pytest.mark.parametrize("stride", ["time", "batch"])
def test_offsets_beyond_32_bits(stride):
    """Views over memory that is never touched between the tokens, so only a few pages are real."""
    T, D = 300, 16
    strides = (2**31 + 64, D, D, 1) if stride == "batch" else (D, 2**23 - 64, D, 1)
    B = 2 if stride == "batch" else 1
    size = 1 + sum((n - 1) * step for n, step in zip((B, T, 1, D), strides))
    far = torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided((B, T, 1, D), strides)
    far.copy_(torch.randn(B, T, 1, D))
    config = KernelConfig(128, 128, num_warps=4, num_stages=1)
    near = far.contiguous()
    do = torch.randn(B, T, 1, D, device=DEVICE).half()
    options = AttentionOptions(39, 0, 0.25)
    expected = run_kernels(near, near, near, do, None, options, config)
    actual = run_kernels(far, far, far, far, None, options, config)
    again = run_kernels(near, near, near, near, None, options, config)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual, again))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale):
    inputs = make_inputs(1, 20, 20, 1, 1, 16, 16, torch.float32)
    check(*inputs, 7, SMALL, scale)
    check(*inputs, 7, SMALL, scale, softcap=0.7)


@pytest.mark.parametrize("split", [False, True], ids=["", "dk_and_dv_apart"])
@pytest.mark.parametrize(
    "B, Tq, Tk, Hq, Hkv, D, Dv, window_size",
    [(1, 41, 41, 1, 1, 17, 17, None), (1, 16, 16, 1, 1, 33, 33, None), (2, 20, 41, 2, 1, 16, 24, 9)],
    ids=["all_keys", "one_tile", "window_on_a_cache"],
)  # fmt: skip
def test_large_scores(B, Tq, Tk, Hq, Hkv, D, Dv, window_size, split):
    """Of some hundreds, whose float32 lse has too few digits for the probabilities."""
    torch.manual_seed(0)
    q, k, *rest = make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, torch.float32)
    config = dataclasses.replace(SMALL, split=split)
    check(q, 20 * k, *rest, window_size, config, 3.0)


def test_sink_like_a_large_score():
    """The probability of each is 1/2, of which the float32 lse, 320 and a bit, has too few digits."""
    _, _, v, do, dlse = make_inputs(1, 20, 20, 2, 2, 16, 16, torch.float32)
    q, k = torch.full_like(v, 4.0), torch.full_like(v, 5.0)
    check(q, k, v, do, dlse, 1, SMALL, 1.0, sinks=torch.full((2,), 320.0, device=DEVICE))


def test_sinks_of_each_row():
    """Each row of a batch has its own, as those of a vmapped axis."""
    inputs = make_inputs(2, 20, 20, 4, 2, 16, 16, torch.float32)
    sinks, options = torch.randn(2, 4, device=DEVICE), AttentionOptions(5, 3, 0.25)

    def run(q, k, v, do, dlse, sinks):
        o, lse = window_attn_fwd(q, k, v, options, sinks, config=SMALL)
        return o, lse, *window_attn_bwd(do, dlse, q, k, v, o, lse, options, sinks, config=SMALL)

    rows = [run(*(x[b : b + 1] for x in (*inputs, sinks))) for b in range(2)]
    for actual, *expected in zip(run(*inputs, sinks), *rows):
        assert torch.equal(actual, torch.cat(expected))


@needs_interpreter
def test_soft_caps_have_rows_of_their_own(monkeypatch):
    """Every pass asks for them, and there are some."""
    asked = []

    def row(name, D, Dv, dtype, capability, described=False, softcap=False):
        asked.append(softcap)
        return configs.kernel_config(name, D, Dv, dtype, capability, described, softcap)

    for module in (fwd, bwd):
        monkeypatch.setattr(module, "kernel_config", row)
    inputs = make_inputs(1, 20, 20, 1, 1, 16, 16, torch.float32)
    for softcap in (None, 2.0):
        run_kernels(*inputs, AttentionOptions(3, 0, 0.25, softcap), None)
    assert asked == 3 * [False] + 3 * [True]
    wide = "window_attn_bwd_dkv", 128, 128, torch.bfloat16, (9, 0)
    assert configs.kernel_config(*wide) != configs.kernel_config(*wide, softcap=True)


def test_sink_of_minus_infinity():
    """It is none, also of a row that sees nothing."""
    inputs = make_inputs(1, 40, 19, 2, 1, 16, 16, torch.float32)
    options = AttentionOptions(8, 2, 0.25)
    sinks = torch.full((2,), -math.inf, device=DEVICE)
    *results, dsinks = run_kernels(*inputs, options, SMALL, sinks=sinks)
    for actual, expected in zip(results, run_kernels(*inputs, options, SMALL)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(dsinks, torch.zeros_like(sinks))


@needs_interpreter
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_keys_that_do_not_exist_have_no_gradient(descriptors):
    """Tiles go on with zeros beyond the last key. Times a gradient beyond float16's numbers they are NaN."""
    zeros = torch.zeros(1, 20, 1, 16, dtype=torch.float16)
    config = dataclasses.replace(SMALL, descriptors=descriptors)
    inputs = zeros, zeros, zeros + 16.0, zeros + 1e4, None
    *_, dq, dk, dv = run_kernels(*inputs, AttentionOptions(0, 19, 0.25), config)
    assert torch.equal(dq, zeros) and torch.equal(dk, zeros) and dv.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_huge_scores_stay_finite(dtype):
    """Scores around 1e9, where float32 no longer resolves 1: the forward is still right."""
    q, k, v, do, dlse = make_inputs(1, 40, 40, 1, 1, 64, 64, dtype)
    q, k, scale = q * 1e4, k * 1e4, 0.125
    actual = run_kernels(q, k, v, do, dlse, AttentionOptions(16, 0, scale), SMALL)
    window, dense = {"window_size": 17, "softmax_scale": scale}, (None, None)
    same = run_reference(q.float(), k.float(), v.float(), do, dlse, window, dense, torch.float32)
    exact = run_reference(q, k, v, do, dlse, window, dense, torch.float64)
    assert all(x.isfinite().all() for x in actual)
    assert_close_to_float64(actual[0].float(), same[0].to(dtype).float(), exact[0], "o")
    assert_close_to_float64(actual[1], same[1], exact[1], "lse")


@pytest.mark.parametrize("D", [16, 80, 128])
def test_products_over_few_channels_at_a_time(D):
    """Head dims of less than one chunk of channels, of two and a half, and of four."""
    config = KernelConfig(16, 16, num_warps=4, num_stages=1, precision="tf32x3")
    check(*make_inputs(1, 20, 30, 1, 1, D, 16, torch.float32), 9, config)


def test_scores_of_minus_infinity():
    """A row whose every score is -inf sees nothing; elsewhere only finite scores count."""
    q, k, v, do, dlse = make_inputs(1, 40, 40, 1, 1, 16, 16, torch.float32)
    q, k = torch.full_like(q, 1e30), k.clone()
    k[:, 7:31] = -1e30
    o, lse, *grads = run_kernels(q, k, v, do, dlse, AttentionOptions(9, 0, 0.25), SMALL)
    assert all(x.isfinite().all() for x in (o, *grads))
    assert torch.equal(o == 0, (lse.mT == -math.inf)[..., None].expand_as(o))
    assert (lse == -math.inf).nonzero()[:, 2].tolist() == list(range(16, 31))


@pytest.mark.parametrize("B, Tq, Tk", [(0, 5, 5), (2, 0, 0), (2, 0, 7)])
def test_empty_inputs(B, Tq, Tk):
    q, k, v, do, dlse = make_inputs(B, Tq, Tk, 2, 1, 16, 32, torch.float32)
    options, sinks = options_of(q, k, None, 0.25), torch.randn(2, device=DEVICE)
    o, lse, dq, dk, dv, dsinks = run_kernels(q, k, v, do, dlse, options, None, sinks=sinks)
    assert o.shape == (B, Tq, 2, 32) and lse.shape == (B, 2, Tq)
    assert dq.shape == q.shape
    for grad, x in ((dk, k), (dv, v), (dsinks, sinks)):
        assert torch.equal(grad, torch.zeros_like(x))


def test_nothing_saved_is_written_and_backward_repeats():
    q, k, v, do, dlse = make_inputs(1, 33, 33, 2, 1, 16, 16, torch.float32)
    options, sinks = AttentionOptions(8, 4, 0.25, softcap=2.0), torch.randn(1, 2, device=DEVICE)
    o, lse = window_attn_fwd(q, k, v, options, sinks, config=SMALL)
    saved = (do, dlse, q, k, v, o, lse, options, sinks)
    before = copy.deepcopy(saved)
    first = window_attn_bwd(*saved, config=SMALL)
    second = window_attn_bwd(*saved, config=SMALL)
    assert all(a == b if a is options else torch.equal(a, b) for a, b in zip(saved, before))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_row_names_the_implementation_that_runs(monkeypatch):
    grids = []

    class Other:
        def __getitem__(self, grid):
            grids.append(grid)
            return fwd.FWD_KERNELS[TRITON][grid]

    monkeypatch.setitem(fwd.FWD_KERNELS, "other", Other())
    q, k, v, _, _ = make_inputs(1, 33, 33, 1, 1, 16, 16, torch.float32)
    options = AttentionOptions(8, 0, 0.25)
    plain = window_attn_fwd(q, k, v, options, config=SMALL)
    assert not grids
    row = dataclasses.replace(SMALL, implementation="other")
    other = window_attn_fwd(q, k, v, options, config=row)
    assert grids == [(3,)]
    assert all(map(torch.equal, plain, other))


def test_same_kernel_for_every_length():
    """Lengths, windows, batch sizes and head counts are runtime values, never compile-time ones."""
    for case in window_attn_cases.compile_cases(90):
        assert not {"Tq", "Tk", "Hq", "Hkv", "window_size"} & set(case.constexprs)
        assert case.constexprs.get("right") is None
        strides = (x for name, x in case.constexprs.items() if "stride" in name)
        assert all(x is None for x in strides)  # a descriptor has them
