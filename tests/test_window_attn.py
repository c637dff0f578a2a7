"""`window_attn` on the eager backend, against the reference."""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from lact_kernels import window_attn
from lact_kernels.autograd.window_attn import window_attn_fwd
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.eager import masked_attention
from lact_kernels.eager import window_attn as eager
from lact_kernels.ops.window_attn import run_window_attn
from tests.cases import WindowCase, check_window_attn
from tests.tolerance import assert_close_to_float64

eager_window_attn = functools.partial(window_attn, backend="eager")

CASES = [
    WindowCase("one token", 1, 4),
    WindowCase("window of one", 67, 1, B=2, Hq=8, Hkv=8),
    WindowCase("window one less than T", 66, 65),
    WindowCase("window of T", 66, 66),
    WindowCase("window beyond T", 66, 1000),
    WindowCase("no window", 130, None),
    WindowCase("block minus one", 63, 16),
    WindowCase("block plus one", 65, 16),
    WindowCase("batch with an odd tail", 151, 40, B=2),
    WindowCase("larger blocks", 600, 256, Hq=1, Hkv=1),
    WindowCase("grouped heads", 140, 33, B=2, Hq=6, Hkv=2),
    WindowCase("single query on a cache", 1, 20, B=64, Tk=40, Hq=8, Hkv=8),
    WindowCase("few queries on a cache", 70, 20, Tk=173, Hq=4),
    WindowCase("queries before a full window", 40, 100, Tk=45),
    WindowCase("values wider than keys", 90, 30, B=8, Hq=8, Hkv=8, D=8, Dv=20),
    WindowCase("values narrower than keys", 90, 30, B=8, Hq=8, Hkv=8, D=24, Dv=5),
    WindowCase("no tokens", 0, 4),
    WindowCase("no batch", 3, 4, B=0),
    WindowCase("no queries", 0, 4, Tk=5),
    WindowCase("no window with grouped heads", 97, None, B=2, Hq=6, Hkv=2),
    WindowCase("no window and wider values", 67, None, B=2, D=24, Dv=40),
    WindowCase("few queries without window", 70, None, Tk=330),
    WindowCase("one query behind the blocks", 32 * 3 + 17, 16, B=2),
    WindowCase("packed", 200, 17, cu_seqlens=(0, 0, 1, 70, 70, 135, 200), Hq=4),
    WindowCase("packed without window", 90, None, cu_seqlens=(0, 25, 90)),
    WindowCase("packed with nothing", 0, 4, cu_seqlens=(0, 0, 0)),
    WindowCase("two sides", 151, (20, 11), B=2, Hq=4),
    WindowCase("two sides in many blocks", 300, (5, 3), Hq=4),
    WindowCase("more to the right", 100, (3, 30)),
    WindowCase("right without limit", 150, (5, -1), Hq=4),
    WindowCase("left without limit", 150, (-1, 5)),
    WindowCase("everything", 67, (-1, -1), B=2, Hq=4),
    WindowCase("two sides of queries on a cache", 40, (9, 6), Tk=101),
    WindowCase(
        "packed with two sides", 200, (17, 40), cu_seqlens=(0, 0, 1, 70, 70, 135, 200), Hq=4
    ),
    WindowCase("packed without a limit", 200, (-1, -1), cu_seqlens=(0, 0, 1, 70, 70, 135, 200)),
    WindowCase("sinks", 151, 20, B=2, Hq=4, sinks=1.0),
    WindowCase("sinks above the scores", 67, None, sinks=8.0),
    WindowCase("one key and sinks", 67, 1, sinks=1.0),
    WindowCase("soft cap", 151, 20, B=2, Hq=4, softcap=2.0),
    WindowCase("soft cap far off", 67, None, softcap=50.0),
    WindowCase(
        "packed with all",
        200,
        (9, 12),
        cu_seqlens=(0, 1, 70, 70, 200),
        Hq=4,
        softcap=1.5,
        sinks=2.0,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    check_window_attn(eager_window_attn, case, dtype)


LARGE_SCORES = [
    (torch.float32, WindowCase("no window, some scores large", 300, None, size=3, D=16, Dv=16)),
    (torch.float32, WindowCase("no window, scores of hundreds", 90, None, size=10, D=17, Dv=4)),
    (torch.float32, WindowCase("scores of ten", 30, 2, size=1.5, D=17, Dv=4)),
    (torch.float32, WindowCase("scores of hundreds", 30, 3, size=10, D=17, Dv=4)),
    (torch.float32, WindowCase("grouped heads", 90, 8, size=30, Hq=4)),
    (torch.float32, WindowCase("one key", 30, 1, size=10, D=17, Dv=4)),
    (torch.float32, WindowCase("grouped heads and sinks", 90, 8, size=9, Hq=4, sinks=100.0)),
    (
        torch.float32,
        WindowCase("scores of hundreds, capped", 90, 8, size=9, softcap=30.0, sinks=30.0),
    ),
    (torch.bfloat16, WindowCase("scores of millions", 30, 3, size=1e3, D=17, Dv=4)),
    (torch.float16, WindowCase("scores of thousands", 30, 3, size=60, D=17, Dv=4)),
]


@pytest.mark.parametrize("dtype, case", LARGE_SCORES, ids=str)
@pytest.mark.parametrize("part_scores", [masked_attention.PART_SCORES, 2 * 64 * 79, 1])
def test_large_scores(dtype, case, part_scores, monkeypatch):
    """Whose lse has no digits left for the probabilities."""
    monkeypatch.setattr(masked_attention, "PART_SCORES", part_scores)
    check_window_attn(eager_window_attn, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [0.0, 50.0])
@pytest.mark.parametrize(
    "W, size, D",
    [(4, 1e3, 17), (None, 1e3, 17), (None, 0.55, 128), (30, 0.55, 128), (None, 1.6, 64)],
)
def test_scores_of_equal_keys(W, size, D, apart, dtype):
    """Every key has the same probability, which neither the rounding of the lse nor scaling must change.

    Also where q and k are larger than their products tell.
    """
    q, k = (torch.full((1, 50, 2, D), x, dtype=dtype) for x in (size, 1.1 * size))
    q[..., 0], k[..., 0], q[..., 1], k[..., 1] = apart, 0.0, 0.0, apart
    v, do = torch.randn(2, 1, 50, 2, 8, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    (dv,) = torch.autograd.grad(window_attn(q, k, v, W), v, do)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (expected,) = torch.autograd.grad(reference.window_attn(*exact, W), exact[2], do.double())
    (same,) = torch.autograd.grad(reference.window_attn(q, k, v, W), v, do)
    assert_close_to_float64(dv, same, expected, "dv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES[8:16], *CASES[26:29], CASES[35]], ids=str)
def test_path_of_other_devices(case, dtype, monkeypatch):
    monkeypatch.setattr(masked_attention, "has_flash", lambda *_: False)
    check_window_attn(eager_window_attn, case, dtype)


@pytest.mark.parametrize("max_blocks", [1, 2, 3])
def test_batches_of_blocks_cut_anywhere(max_blocks, monkeypatch):
    monkeypatch.setattr(eager, "MAX_BLOCKS", max_blocks)
    case = WindowCase("several batches", 64 * 7 + 5, 10, Hq=4)
    check_window_attn(eager_window_attn, case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        WindowCase("window", 9, 3, Hq=1, Hkv=1, D=3, Dv=2),
        WindowCase("grouped on a cache", 4, 3, Tk=7, Hq=2, Hkv=1, D=2, Dv=3),
        WindowCase("packed", 8, 3, cu_seqlens=(0, 3, 3, 8), Hq=1, Hkv=1, D=2, Dv=2),
    ],
    ids=str,
)
def test_gradcheck(case):
    options = case.options()
    inputs = case.inputs(torch.float64)
    torch.autograd.gradcheck(lambda *x: window_attn(*x, **options, return_lse=True), inputs)


def test_gradient_through_lse_alone():
    q, k, v = WindowCase("", 80, 20).inputs(torch.float64)
    window_attn(q, k, v, 20, return_lse=True)[1].sum().backward()
    expected = reference.window_attn(q, k, v, 20, return_lse=True)[1].sum()
    dq, dk = torch.autograd.grad(expected, (q, k))
    torch.testing.assert_close(q.grad, dq)
    torch.testing.assert_close(k.grad, dk)
    assert not v.grad.any()


def test_strides_are_read_in_place():
    qkv = torch.randn(2, 100, 3, 4, 16)
    q, k, v = qkv.unbind(dim=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_last = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    expected = window_attn(*(x.contiguous() for x in (q, k, v)), 30)
    for inputs in ((q, k, v), heads_first, channels_last):
        assert torch.equal(window_attn(*inputs, 30), expected)


def test_scale_of_scores():
    q, k, v = WindowCase("", 50, 20).inputs(torch.float64)
    scaled = window_attn(q, k, v, 20, softmax_scale=0.5)
    torch.testing.assert_close(scaled, window_attn(q * 2, k, v, 20, softmax_scale=0.25))
    assert not torch.allclose(scaled, window_attn(q, k, v, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-50, 3.0])
@pytest.mark.parametrize("W", [None, 20])
def test_any_scale(W, scale, dtype):
    inputs = WindowCase("", 80, W).inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    do = torch.randn(1, 80, 2, 16, dtype=torch.float64)
    results = []
    for fn, xs in (
        (window_attn, inputs),
        (reference.window_attn, inputs),
        (reference.window_attn, exact),
    ):
        o = fn(*xs, W, softmax_scale=scale)
        results.append([o, *torch.autograd.grad(o, xs, do.to(o.dtype))])
    for name, *values in zip(("o", "dq", "dk", "dv"), *results):
        assert_close_to_float64(*values, name)


class Operations(TorchDispatchMode):
    """The names of all that runs, and how often a kernel of it was causal."""

    def __init__(self):
        super().__init__()
        self.names, self.causal = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if "flash_attention" in self.names[-1]:
            self.causal += any(args[7:8] if "backward" in self.names[-1] else args[4:5])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("W", [None, 60])
@pytest.mark.parametrize("D", [64, 40])
def test_a_window_that_hides_nothing_is_one_causal_kernel(W, D):
    """Forward and backward, of inputs as they are: strided, and scaled where the scale is no power of two."""
    qkv = torch.randn(2, 60, 3, 2, D)
    q, k, v = qkv.unbind(2)
    with Operations() as ran:
        options = AttentionOptions(W and W - 1, 0, D**-0.5).within(60, 60)
        o, lse = eager.window_attn_fwd(q, k, v, options)
        eager.window_attn_bwd(o, None, masked_attention.Saved(q, k, v, o, lse), options)
    kernels = [name for name in ran.names if "flash_attention" in name]
    assert len(kernels) == 2 and ran.causal == 2
    copies = {"aten::cat", "aten::copy_", "aten::zeros", "aten::masked_fill_", "aten::new_zeros"}
    assert not copies & set(ran.names)
    assert ran.names.count("aten::clone") == 1  # of lse
    assert o.is_contiguous() and lse.is_contiguous()


def test_a_window_without_limits_is_one_kernel_without_a_mask():
    q, k, v = (torch.randn(2, 60, 2, 16) for _ in range(3))
    options = AttentionOptions(None, None, 0.25).within(60, 60)
    with Operations() as ran:
        o, lse = eager.window_attn_fwd(q, k, v, options)
        eager.window_attn_bwd(o, None, masked_attention.Saved(q, k, v, o, lse), options)
    assert sum("flash_attention" in name for name in ran.names) == 2 and ran.causal == 0
    assert not {"aten::cat", "aten::copy_", "aten::new_full"} & set(ran.names)


def test_some_queries_behind_many_keys_are_one_call():
    q, k, v = (torch.randn(1, n, 2, 16) for n in (200, 600, 600))
    with Operations() as ran:
        eager.window_attn_fwd(q, k, v, AttentionOptions(599, 0, 0.25))
    assert sum("flash_attention" in name for name in ran.names) == 1


def test_the_backward_of_many_keys_is_as_precise_with_a_larger_lse(monkeypatch):
    """Than that of a few, and needs no other way."""
    monkeypatch.setattr(masked_attention, "backward_written_out", None)
    q, k, v = (x.detach() for x in WindowCase("", 500, None, D=128).inputs(torch.float32))
    q, k = torch.full_like(q, 0.55), torch.full_like(k, 0.55)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, lse = window_attn(*inputs, return_lse=True)
    assert lse.max() > masked_attention.PRECISE_LSE[torch.float32]
    do = torch.randn_like(o)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = [torch.autograd.grad(o, inputs, do)]
    for xs in (inputs, exact):
        o = reference.window_attn(*xs)
        results.append(torch.autograd.grad(o, xs, do.to(o.dtype)))
    for name, *grads in list(zip(("dq", "dk", "dv"), *results))[1:]:
        assert_close_to_float64(*grads, name)


def test_huge_scores_stay_finite():
    q, k, v = WindowCase("", 100, 20).inputs(torch.float32)
    o, lse = window_attn(q * 1e3, k * 1e3, v, 20, return_lse=True)
    (o.sum() + lse.sum()).backward()
    assert all(x.isfinite().all() for x in (o, lse, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_minus_infinity(dtype, written_out, monkeypatch):
    """A row whose every score is -inf has the output 0, and nothing becomes NaN."""
    if written_out:
        monkeypatch.setattr(masked_attention, "has_flash", lambda *_: False)
    q, k, v = (x.detach() for x in WindowCase("", 100, 20).inputs(dtype))
    q = torch.full_like(q, 1e30).requires_grad_()
    k[:, 20:70] = -1e30
    k, v = k.requires_grad_(), v.requires_grad_()
    o, lse = window_attn(q, k, v, 10, return_lse=True)
    outputs = (o, lse)
    grads = torch.autograd.grad(outputs, (q, k, v), [torch.randn_like(x) for x in outputs])
    assert all(x.isfinite().all() for x in (o, *grads))
    assert not o[:, 29:70].any() and o[:, :20].all() and o[:, 70:].all()
    assert (lse[..., 29:70] == -math.inf).all()
    assert lse[..., :29].isfinite().all() and lse[..., 70:].isfinite().all()
    assert not grads[0][:, 29:70].any()


@pytest.mark.parametrize("W", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_minus_infinity_before_others(dtype, W):
    """The first 30 of a sequence see nothing else, as long as nobody looks ahead."""
    q, k, v = (x.detach() for x in WindowCase("", 100, 20).inputs(dtype))
    q, k[:, :30] = torch.full_like(q, 1e30), -1e30
    q.requires_grad_()
    o, lse = window_attn(q, k, v, W, return_lse=True)
    (dq,) = torch.autograd.grad(o, q, torch.randn_like(o))
    assert not o[:, :30].any() and (lse[..., :30] == -math.inf).all() and not dq[:, :30].any()
    assert o[:, 30:].all() and lse[..., 30:].isfinite().all() and dq.isfinite().all()


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("score", [math.inf, math.nan])
def test_scores_without_a_value_give_none(score, written_out, monkeypatch):
    if written_out:
        monkeypatch.setattr(masked_attention, "has_flash", lambda *_: False)
    q, k, v = (x.detach() for x in WindowCase("", 100, 20).inputs(torch.float32))
    q[:, 50], k[:, 50] = score, 1.0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, lse = window_attn(q, k, v, 10, return_lse=True)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert o[:, 50].isnan().all() and not lse[..., 50].isfinite().any()
    assert all(x.isnan().all() for x in (dq[:, 50], dk[:, 41:51], dv[:, 41:51]))
    seen = torch.arange(100) != 50
    assert o[:, seen].isfinite().all() and lse[..., seen].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 15, 20])
def test_rows_of_nothing_but_nan(T, dtype):
    """Of a query, and of the first key for the query that sees no other."""
    for name in "qk":
        tensors = {x: torch.randn(1, T, 1, 16, dtype=dtype) for x in "qkv"}
        tensors[name][:, 0] = math.nan
        q, k, v = (x.requires_grad_() for x in tensors.values())
        o, lse = window_attn(q, k, v, 3, return_lse=True, backend="eager")
        (dq,) = torch.autograd.grad(o.sum(), q)
        assert all(x.isnan().all() for x in (o[:, 0], lse[..., 0], dq[:, 0]))


@pytest.mark.parametrize("T", [15, 20])
@pytest.mark.parametrize("window_size", [None, (-1, -1)])
def test_a_row_of_nan_leaves_the_others_as_they_are(T, window_size):
    """Those of few keys are computed again, under a mask, with all the keys that they have."""
    q, k, v = (torch.randn(1, T, 1, 16) for _ in range(3))
    expected = window_attn(q, k, v, window_size, backend="eager")
    q[:, 0] = math.nan
    o = window_attn(q, k, v, window_size, backend="eager")
    assert o[:, 0].isnan().all()
    torch.testing.assert_close(o[:, 1:], expected[:, 1:])


def test_an_lse_of_zero_is_a_number():
    q, k, v = WindowCase("", 100, 1).inputs(torch.float32)
    lse = window_attn(q * 0, k, v, 1, return_lse=True)[1]
    assert (lse == 0).all()


@pytest.mark.parametrize(
    "options", [AttentionOptions(63, 0, 1.0), AttentionOptions(40, 23, 1.0, 2.0)], ids=str
)
def test_memory_does_not_grow_with_the_square_of_T(options):
    """The largest tensor that any op makes stays linear in T."""

    class LargestTensor(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return out

    sizes = []
    for T in (2048, 4096):
        q, k, v = (torch.randn(1, T, 1, 8) for _ in range(3))
        with LargestTensor() as largest:
            o, lse = eager.window_attn_fwd(q, k, v, options)
            eager.window_attn_bwd(o, None, masked_attention.Saved(q, k, v, o, lse), options)
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 4096 * 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinks_in_float32_beside_16_bits(dtype):
    """The same numbers, and a gradient that is not rounded."""
    case = WindowCase("", 60, (7, 3), Hq=4, sinks=1.0)
    q, k, v, sinks = case.inputs(dtype)
    wide = sinks.detach().float().requires_grad_()
    results = []
    for x in (sinks, wide):
        o, lse = window_attn(q, k, v, (7, 3), sinks=x, return_lse=True)
        (dsinks,) = torch.autograd.grad(o.sum() + lse.sum(), x)
        results.append((o, lse, dsinks))
    (o, lse, dsinks), (same_o, same_lse, dwide) = results
    assert torch.equal(o, same_o) and torch.equal(lse, same_lse)
    assert dwide.dtype == torch.float32 and torch.equal(dwide.to(dtype), dsinks)
    between = window_attn(q, k, v, (7, 3), sinks=wide + 1e-4, return_lse=True)[1]
    assert not torch.equal(between, lse)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_of_each_row(softcap):
    """Of a batch, as `torch.func.vmap` makes them: those of one row are not those of another."""
    q, k, v = WindowCase("", 300, None, B=2, Hq=4).inputs(torch.float64)
    sinks = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    leaves = q, k, v, sinks

    def results(rows: slice) -> tuple[torch.Tensor, ...]:
        tensors = [x[rows] for x in leaves]
        o, lse = window_attn_fwd(*tensors[:3], 5, 3, 0.25, softcap, tensors[3], None, None, "eager")
        return o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), tensors)

    apart = [torch.cat(x) for x in zip(results(slice(0, 1)), results(slice(1, 2)))]
    torch.testing.assert_close(results(slice(0, 2)), tuple(apart))


def test_packed_queries_that_end_with_the_window_behind_the_last_key():
    """The first sequence has five queries more than keys, the second five keys more."""
    borders = [torch.tensor(x, dtype=torch.int32) for x in ((0, 20, 40), (0, 15, 40))]
    q, k, v = WindowCase("", 40, None).inputs(torch.float64)
    ours = run_window_attn(q, k, v, AttentionOptions(30, 5, 0.25), None, borders, "eager")
    packing = dict(zip(("cu_seqlens", "cu_seqlens_k"), borders))
    exact = reference.window_attn(q, k, v, (30, 5), **packing, return_lse=True)
    torch.testing.assert_close(ours, exact)


def test_limits_of_a_window():
    for limit in (None, 2**62, 100):
        assert AttentionOptions(limit, limit, 1.0).within(7, 9)[:2] == (8, 6)
    assert AttentionOptions(2, 3, 1.0).within(7, 9)[:2] == (2, 3)
    assert AttentionOptions(None, None, 1.0).within(0, 0)[:2] == (0, 0)


def test_windows_beyond_64_bits_are_without_limit():
    q, k, v = WindowCase("", 9, 1).inputs(torch.float32)
    for window, same in ((2**70, None), ((2**70, 2**70), (-1, -1))):
        assert torch.equal(window_attn(q, k, v, window), window_attn(q, k, v, same))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_minus_infinity_are_none(dtype):
    q, k, v = WindowCase("", 60, 7, Tk=50).inputs(dtype)
    sinks = torch.full((2,), -math.inf, requires_grad=True)
    options = AttentionOptions(6, 0, 0.25)
    plain = run_window_attn(q, k, v, options, backend="eager")
    ours = run_window_attn(q, k, v, options, sinks, backend="eager")
    for a, b in zip(ours, plain):
        assert torch.equal(a, b)
    grads = torch.autograd.grad(
        [x.masked_fill(x == -math.inf, 0).sum() for x in ours], (q, k, v, sinks)
    )
    assert all(x.isfinite().all() for x in grads) and not grads[-1].any()


def test_a_row_without_keys_has_its_sink():
    q, k, v, sinks = WindowCase("", 9, 4, Tk=5, sinks=1.0).inputs(torch.float32)
    o, lse = run_window_attn(q, k, v, AttentionOptions(3, 0, 0.25), sinks, backend="eager")
    assert not o[:, :4].any() and o[:, 4:].all()
    torch.testing.assert_close(lse[0, :, :4], sinks[:, None].expand(2, 4))
    (dsinks,) = torch.autograd.grad(lse[..., :4].sum(), sinks)
    torch.testing.assert_close(dsinks, torch.full((2,), 4.0))
