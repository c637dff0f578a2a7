"""Every wrong argument is an error that names it, what came and what was expected."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lact_kernels import TTTState, block_causal_ttt, window_attn, window_attn_with_kvcache
from lact_kernels.ops import checks
from lact_kernels.ops import window_attn as window_attn_ops
from tests.cases import TTTCase


def window_inputs(**changed):
    return {
        "q": torch.randn(1, 6, 4, 8),
        "k": torch.randn(1, 6, 2, 8),
        "v": torch.randn(1, 6, 2, 8),
        "window_size": 3,
    } | changed


def ttt_inputs(**changed):
    inputs = {name: x.detach() for name, x in TTTCase("", B=1, T=6).inputs(torch.float32).items()}
    return inputs | {"chunk_size": 4} | changed


def cu_seqlens(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def nested(*shape):
    return torch.nested.nested_tensor([torch.ones(shape)], layout=torch.jagged)


STRIDED_NESTED = torch.nested.nested_tensor([torch.ones(4)])  # it has no shape to ask for


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


WINDOW = [
    ({"q": [1.0]}, TypeError, r"q must be a tensor \[B, Tq, Hq, D\], got list"),
    ({"q": torch.ones(1, 6, 4, 8, dtype=torch.int32)}, TypeError, "q .*torch.int32"),
    ({"q": torch.ones(1, 6, 4, 8).to_sparse()}, TypeError, "q must be a dense .*torch.sparse_coo"),
    ({"k": torch.ones(1, 6, 2, 8).to_sparse()}, TypeError, "k must be a dense .*torch.sparse_coo"),
    ({"q": nested(6, 4, 8)}, TypeError, "q must be a plain tensor, got a nested .* cu_seqlens"),
    ({"v": nested(6, 2, 8)}, TypeError, "v must be a plain tensor, got a nested"),
    ({"q": torch.ones(6, 4, 8)}, ValueError, r"q must have the shape .*\(6, 4, 8\)"),
    ({"q": torch.ones(1, 6, 4, 0)}, ValueError, "q .*empty"),
    ({"k": torch.ones(1, 6, 0, 8)}, ValueError, "k .*empty"),
    ({"k": torch.ones(1, 6, 2, 8).half()}, TypeError, "k .*float32.*float16"),
    ({"v": torch.ones(1, 6, 2, 8).double()}, TypeError, "v .*float32.*float64"),
    ({"k": meta(1, 6, 2, 8)}, ValueError, "k must be on cpu like q, got meta"),
    ({"k": torch.ones(1, 6, 2, 7)}, ValueError, r"k .*\(1, 6, 2, 8\), got \(1, 6, 2, 7\)"),
    ({"k": torch.ones(2, 6, 2, 8)}, ValueError, "k must have the shape"),
    ({"v": torch.ones(1, 5, 2, 8)}, ValueError, "v must have the shape"),
    ({"v": torch.ones(1, 6, 4, 8)}, ValueError, "v must have the shape"),
    ({"q": torch.ones(1, 6, 3, 8)}, ValueError, "3 heads of q .* multiple of the 2 heads"),
    (
        {"q": torch.ones(1, 7, 4, 8)},
        ValueError,
        "q has 7 tokens, more than the 6 of k: .*flash_attn_func",
    ),
    ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
    ({"window_size": -1}, ValueError, "window_size must be at least 1, got -1"),
    ({"window_size": 2.0}, TypeError, r"window_size must be an int, a pair .* or None, got 2.0"),
    ({"window_size": True}, TypeError, r"window_size must be an int, a pair .* or None, got True"),
    ({"window_size": (2, -2)}, ValueError, r"window_size must have sides .*, got \(2, -2\)"),
    ({"window_size": (2, 1.0)}, TypeError, r"an int, a pair .* or None, got \(2, 1.0\)"),
    ({"window_size": (None, 0)}, TypeError, r"an int, a pair .* or None, got \(None, 0\)"),
    ({"softcap": 0}, ValueError, "softcap must be above 0, or None for none, got 0"),
    ({"softcap": -1.5}, ValueError, "softcap must be above 0, or None for none, got -1.5"),
    ({"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
    ({"softcap": 1e-50}, ValueError, "softcap, and softmax_scale / softcap, must be finite"),
    ({"softcap": 1e50}, ValueError, "softcap, and softmax_scale / softcap, must be finite"),
    (
        {"softcap": 5e-9, "softmax_scale": 1e30},
        ValueError,
        "softmax_scale / softcap, must be finite",
    ),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
    ({"sinks": 1.0}, TypeError, r"sinks must be a tensor \[Hq\], got float"),
    ({"sinks": STRIDED_NESTED}, TypeError, "sinks must be a plain tensor, got a nested"),
    (
        {"sinks": torch.ones(2)},
        ValueError,
        r"sinks must have the shape \[Hq\] = \(4,\), got \(2,\)",
    ),
    ({"sinks": torch.ones(1, 4)}, ValueError, r"sinks must have the shape \[Hq\]"),
    (
        {"sinks": torch.ones(4).half()},
        TypeError,
        "sinks must be float32 or have .* of q, torch.float32, got",
    ),
    (
        {"sinks": torch.ones(4).double()},
        TypeError,
        "sinks must be float32 or have .* of q, torch.float32, got",
    ),
    ({"sinks": torch.ones(4).to_sparse()}, TypeError, "sinks must be a dense tensor"),
    ({"sinks": meta(4)}, ValueError, "sinks must be on cpu like q, got meta"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    ({"softmax_scale": 1e300}, ValueError, "softmax_scale must be finite in float32, got 1e\\+300"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got '1'"),
    ({"return_lse": 1}, TypeError, "return_lse must be True or False, got 1"),
    ({"backend": "cuda"}, ValueError, "backend must be .* got 'cuda'"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 tensor"),
    ({"cu_seqlens": cu_seqlens(0, 6, dtype=torch.int64)}, TypeError, "cu_seqlens .*int32.*int64"),
    ({"cu_seqlens": cu_seqlens(0, 6).to_sparse()}, TypeError, "cu_seqlens must be a dense tensor"),
    ({"cu_seqlens": cu_seqlens(0)}, ValueError, r"cu_seqlens must have the shape \[N\+1\]"),
    ({"cu_seqlens": cu_seqlens(1, 6)}, ValueError, "cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": cu_seqlens(0, 4, 3, 6)}, ValueError, "descends from 4 to 3 at index 2"),
    ({"cu_seqlens": cu_seqlens(0, 5)}, ValueError, "cu_seqlens must end at T = 6, got 5"),
    ({"cu_seqlens": meta(2, dtype=torch.int32)}, ValueError, "cu_seqlens must be on cpu"),
    (
        {name: torch.ones(2, 6, 2, 8) for name in "qkv"} | {"cu_seqlens": cu_seqlens(0, 6)},
        ValueError,
        "B = 1, got q with B = 2",
    ),
    (
        {"q": torch.ones(1, 5, 4, 8), "cu_seqlens": cu_seqlens(0, 6)},
        ValueError,
        "as many queries as keys, got 5 and 6",
    ),
]


@pytest.mark.parametrize("changed,error,message", WINDOW)
def test_window_attn(changed, error, message):
    with pytest.raises(error, match=message):
        window_attn(**window_inputs(**changed))


def accepts(q, k, v, window_size, *scores):
    """Whether the detailed checks find nothing."""
    names = "k", "v"
    try:
        window_attn_ops._check_tensors(q, k, v, names)
        window_attn_ops.check_scores(q, k.shape[2], *scores, names)
        checks.check_window("window_size", window_size)
    except (TypeError, ValueError):
        return False
    return True


def is_ordinary(q, k, v, *options):
    return window_attn_ops._are_ordinary(q, k, v) and window_attn_ops._is_ordinary(q, *options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_glance_tells_what_the_checks_tell():
    """Of tensors that are just that, and of numbers of Python's own: all that passes, and nothing else."""
    dense = torch.ones(1, 6, 2, 8)
    tensors = [
        dense,
        dense.expand(2, 6, 2, 8),
        dense[:, :0],
        dense[:, :5],
        dense[:, :, :1],
        dense[:, :, :0],
        dense[..., ::2],
        dense[..., :0],
        dense[0],
        dense.half(),
        dense.double(),
        dense.int(),
        dense.to_sparse(),
        meta(1, 6, 2, 8),
        torch.nested.nested_tensor([dense[0]]),
    ]
    windows, scales = (
        (None, -1, 0, 1, 9, 2**62),
        (None, -0.5, 0.0, 1e38, float("inf"), float("nan")),
    )
    sinks = torch.ones(2)
    all_sinks = (None, sinks, nn.Parameter(sinks), sinks[:1], sinks.half(), sinks.double())
    all_sinks += (sinks.to_sparse(), meta(2), torch.ones(1, 2), torch.ones(4)[::2])
    seen = set()
    for args in (
        *((*qkv, 3, None, None, None) for qkv in itertools.product(tensors, repeat=3)),
        *((dense, dense, dense, *x, None, None) for x in itertools.product(windows, scales)),
        *((dense, dense, dense, 3, None, None, sinks) for sinks in all_sinks),
    ):
        passes = accepts(*args)
        assert is_ordinary(*args) == passes
        seen.add(passes)
    assert seen == {False, True}


def test_a_glance_leaves_other_types_to_the_checks():
    x = torch.ones(1, 6, 2, 8)
    for args in (
        (nn.Parameter(x), x, x, 3, None, None),
        (nested(6, 2, 8), x, x, 3, None, None),
        ([1.0], x, x, 3, None, None),
        (x, x, x.bfloat16(), 3, None, None),  # which autocast may cast
        (x, x, x, True, None, None),
        (x, x, x, np.int64(3), None, None),
        (x, x, x, 2**62 + 1, None, None),
        (x, x, x, 3, np.float32(0.5), None),
        (x, x, x, 3, 1, None),
        (x, x, x, 3, None, np.float32(0.5)),
    ):
        assert not is_ordinary(*args, None)


def test_ordinary_calls_are_checked_at_a_glance(monkeypatch):
    x = torch.randn(1, 6, 4, 8, dtype=torch.float64)
    packed = functools.partial(window_attn, cu_seqlens=cu_seqlens(0, 2, 6))
    cached = functools.partial(window_attn_with_kvcache, cache_seqlens=6)
    monkeypatch.setattr(window_attn_ops, "_check_tensors", None)
    for fn in (window_attn, packed, cached):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            q = x.to(dtype)
            fn(q, q, q, 3)
            fn(q, q[:, :, ::2], q[:, :, ::2], softmax_scale=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            fn(x.float(), x.float(), x.float(), 3)
    window_attn(x.requires_grad_(), x, x, 3).sum().backward()


@pytest.mark.parametrize(
    "changed,message",
    [
        ({name: torch.ones(1, 6, 2, 8).double() for name in "qkv"}, "float64"),
        ({name: torch.ones(1, 6, 2, 272) for name in "qkv"}, "256, got 272"),
        (
            {name: torch.ones(1, 6, 2, 8).half() for name in "qkv"} | {"softcap": 2000.0},
            "softcap for 16 bits goes up to 1000, got 2000.0",
        ),
    ],
)
def test_explicit_triton_says_why_it_cannot_run(changed, message):
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{message}"):
        window_attn(**window_inputs(**changed), backend="triton")


@pytest.mark.parametrize(
    "changed,dtype,message",
    [
        ({}, torch.float64, "float64"),
        ({"Dk": 2049}, torch.float32, "Dk goes up to 2048, got Dk = 2049"),
        ({"Dv": 2064}, torch.bfloat16, "Dv goes up to 2048, got Dv = 2064"),
        (
            {"Dh": 4097},
            torch.float16,
            "Dh goes up to 4096, got Dh = 4097.*smaller one.*backend='eager'",
        ),
    ],
)
def test_explicit_triton_says_why_block_causal_ttt_cannot_run(changed, dtype, message):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = TTTCase("", B=1, T=6, **changed).inputs(dtype, device)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{message}"):
        block_causal_ttt(**inputs, backend="triton")


@pytest.mark.parametrize(
    "op,inputs", [(window_attn, window_inputs), (block_causal_ttt, ttt_inputs)]
)
def test_explicit_triton_needs_a_gpu_or_the_interpreter(op, inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run: .*q is on cpu"):
        op(**inputs(), backend="triton")


TTT = [
    ({"q": None}, TypeError, r"q must be a tensor \[B, T, H, Dk\], got NoneType"),
    ({"q": torch.ones(6, 2, 5)}, ValueError, r"q must have the shape .*\(6, 2, 5\)"),
    ({"k": torch.ones(1, 5, 2, 5)}, ValueError, "k must have the shape"),
    ({"k": torch.ones(1, 6, 2, 5).half()}, TypeError, "k .*float16"),
    ({"v": torch.ones(1, 6, 3, 6)}, ValueError, "v must have the shape"),
    ({"q": nested(6, 2, 5)}, TypeError, "q must be a plain tensor, got a nested"),
    ({"lr0": torch.ones(1, 6, 2).to_sparse()}, TypeError, "lr0 must be a dense tensor"),
    ({"w0": torch.ones(2, 7, 4)}, ValueError, r"w0 .*\[H, Dh, Dk\] = \(2, 7, 5\), got \(2, 7, 4\)"),
    ({"w0": torch.ones(3, 2, 7, 5)}, ValueError, r"w0 .*\[B, H, Dh, Dk\] = \(1, 2, 7, 5\)"),
    ({"w0": torch.ones(7, 5)}, ValueError, "w0 must have the shape"),
    ({"w1": torch.ones(2, 7, 6)}, ValueError, r"w1 .*\[H, Dv, Dh\] = \(2, 6, 7\)"),
    ({"w2": torch.ones(2, 8, 5)}, ValueError, r"w2 .*\[H, Dh, Dk\] = \(2, 7, 5\)"),
    ({"w2": torch.ones(2, 7, 5).bfloat16()}, TypeError, "w2 .*float32, got torch.bfloat16"),
    ({"w1": meta(2, 6, 7)}, ValueError, "w1 must be on cpu"),
    ({"lr0": torch.ones(1, 6)}, ValueError, r"lr0 .*\[B, T, H\] = \(1, 6, 2\), got \(1, 6\)"),
    ({"lr1": torch.ones(1, 6, 2, 1)}, ValueError, "lr1 must have the shape"),
    ({"lr2": torch.ones(1, 6, 2).half()}, TypeError, "lr2 .*float32, got torch.float16"),
    ({"lr2": None}, TypeError, "lr2 must be a tensor"),
    ({"momentum": torch.ones(1, 2)}, ValueError, "momentum must have the shape"),
    ({"momentum": 0.9}, TypeError, "momentum must be a tensor"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ({"chunk_size": 4.0}, TypeError, "chunk_size must be an int"),
    ({"muon": 1}, TypeError, "muon must be True, False or a NewtonSchulz, got 1"),
    ({"prenorm": None}, TypeError, "prenorm must be True or False"),
    ({"return_state": "yes"}, TypeError, "return_state must be True or False"),
    ({"backend": "fast"}, ValueError, "backend must be"),
    ({"checkpoint_interval": 0}, ValueError, "checkpoint_interval must be at least 1, got 0"),
    ({"checkpoint_interval": None}, TypeError, "checkpoint_interval must be an int, got None"),
    ({"cu_seqlens": cu_seqlens(0, 9)}, ValueError, "cu_seqlens must end at T = 6, got 9"),
    ({"cu_seqlens": cu_seqlens(0, 9), "return_state": True}, ValueError, "must end at T = 6"),
    ({"initial_state": {}}, TypeError, "initial_state must be a TTTState, got dict"),
]


@pytest.mark.parametrize("changed,error,message", TTT)
def test_block_causal_ttt(changed, error, message):
    with pytest.raises(error, match=message):
        block_causal_ttt(**ttt_inputs(**changed))


OPTIONS = [
    ({"chunk_size": 5}, "made with chunk_size=4.*this call has chunk_size=5"),
    ({"muon": True}, "muon=False.*muon=True"),
    ({"prenorm": True}, "prenorm=False.*prenorm=True"),
    ({"momentum": torch.ones(1, 6, 2)}, "not given.*given"),
]


@pytest.mark.parametrize("changed,message", OPTIONS)
def test_state_of_other_options(changed, message):
    _, state = block_causal_ttt(**ttt_inputs(), return_state=True)
    with pytest.raises(ValueError, match=message):
        block_causal_ttt(**ttt_inputs(**changed), initial_state=state)


def test_state_with_momentum_for_a_call_without():
    _, state = block_causal_ttt(**ttt_inputs(momentum=torch.ones(1, 6, 2)), return_state=True)
    with pytest.raises(ValueError, match="momentum given; this call has .*momentum not given"):
        block_causal_ttt(**ttt_inputs(), initial_state=state)


SIZES = [
    ({"B": 2}, ValueError, r"weights\[0\] .*\[N, H, Dh, Dk\] .*\(2, 2, 7, 5\), got \(1, 2, 7, 5\)"),
    ({"H": 3}, ValueError, r"weights\[0\] .*\(1, 3, 7, 5\), got \(1, 2, 7, 5\)"),
    ({"Dk": 4}, ValueError, r"weights\[0\] .*\(1, 2, 7, 4\), got \(1, 2, 7, 5\)"),
    (
        {"Dv": 8},
        ValueError,
        r"weights\[1\] .*\[N, H, Dv, Dh\] .*\(1, 2, 8, 7\), got \(1, 2, 6, 7\)",
    ),
    ({"Dh": 9}, ValueError, r"weights\[0\] .*\(1, 2, 9, 5\), got \(1, 2, 7, 5\)"),
    ({"dtype": torch.float64}, TypeError, r"weights\[0\] .*float64, got torch.float32"),
]


@pytest.mark.parametrize("changed,error,message", SIZES)
def test_state_of_another_size_or_weight_dtype(changed, error, message):
    """The message has what the call needs, then what the state has."""
    _, state = block_causal_ttt(**ttt_inputs(), return_state=True)
    changed = {"B": 1, "T": 6, "dtype": torch.float32} | changed
    dtype = changed.pop("dtype")
    with pytest.raises(error, match=f"initial_state.{message}"):
        block_causal_ttt(**TTTCase("", **changed).inputs(dtype), chunk_size=4, initial_state=state)


def test_state_of_another_batch_size():
    _, state = block_causal_ttt(**ttt_inputs(), return_state=True)
    two = ttt_inputs(cu_seqlens=cu_seqlens(0, 2, 6))
    with pytest.raises(ValueError, match=r"initial_state.weights\[0\] .*\(2, .*got \(1, "):
        block_causal_ttt(**two, initial_state=state)


def test_state_of_another_dtype():
    _, state = block_causal_ttt(**ttt_inputs(), return_state=True)
    assert isinstance(state, TTTState)
    half = {name: x.half() if name in "qkv" else x for name, x in ttt_inputs().items()}
    with pytest.raises(TypeError, match="initial_state.pending.k .*float16, got torch.float32"):
        block_causal_ttt(**half, initial_state=state)


def test_state_of_other_tokens_at_a_chunk_border():
    """No token is pending, whose dtype would tell."""
    _, state = block_causal_ttt(**ttt_inputs(chunk_size=6), return_state=True)
    assert not state.pending
    half = {name: x.half() if name in "qkv" else x for name, x in ttt_inputs(chunk_size=6).items()}
    with pytest.raises(
        TypeError, match="made of torch.float32 tokens; this call has torch.float16"
    ):
        block_causal_ttt(**half, initial_state=state)
