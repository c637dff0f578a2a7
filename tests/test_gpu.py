"""Both operations through their public functions on a GPU: every backend, dtype and option.

The kernels' own cases are in test_window_attn_triton.py. Nothing here runs without a GPU.
"""

import functools

import pytest
import torch

import reference
from lact_kernels import block_causal_ttt, window_attn
from lact_kernels.autograd.window_attn import window_attn_bwd, window_attn_fwd
from tests.cases import TTT_SHAPES, TTTCase, check_block_causal_ttt, check_window_attn
from tests.test_block_causal_ttt import LARGER
from tests.test_window_attn import CASES

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def full_float32_products():
    """The oracle's float32 products must not be TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_window_attn_triton(case, dtype):
    check_window_attn(functools.partial(window_attn, backend="triton"), case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_window_attn_eager(case, dtype):
    check_window_attn(functools.partial(window_attn, backend="eager"), case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGER + TTT_SHAPES[-1:], ids=str)
def test_block_causal_ttt_eager(case, dtype):
    check_block_causal_ttt(
        functools.partial(block_causal_ttt, backend="eager"), case, dtype, "cuda"
    )


def qkv(T, H=2, D=64, dtype=torch.bfloat16):
    return [torch.randn(1, T, H, D, dtype=dtype, device="cuda") for _ in range(3)]


def test_auto_takes_triton():
    q, k, v = qkv(300)
    cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    for options in ({}, {"cu_seqlens": cu_seqlens}):
        auto, triton = (
            window_attn(q, k, v, 64, **options, backend=backend) for backend in ("auto", "triton")
        )
        assert torch.equal(auto, triton)


TTT = TTTCase("", B=2, T=300, chunk_size=128, H=2, Dk=64, Dv=64, Dh=64, momentum=True)


def test_auto_takes_triton_for_fast_weights():
    inputs = TTT.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        auto, triton = (
            block_causal_ttt(**inputs, **TTT.options("cuda"), backend=backend)
            for backend in ("auto", "triton")
        )
    assert torch.equal(auto, triton)


def test_fast_weights_compiled_with_inductor():
    inputs = TTT.inputs(torch.bfloat16, "cuda")
    options = TTT.options("cuda")

    def fn(**x):
        o, state = block_causal_ttt(**x, **options, return_state=True)
        return o * 2, *state.weights

    for a, b in zip(torch.compile(fn, fullgraph=True)(**inputs), fn(**inputs)):
        torch.testing.assert_close(a, b)


def test_fast_weights_backward_is_deterministic():
    inputs = TTT.inputs(torch.bfloat16, "cuda")
    leaves = list(inputs.values())
    o = block_causal_ttt(**inputs, **TTT.options("cuda"))
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(o, leaves, do, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_triton_op_is_registered_right():
    q, k, v = (x.requires_grad_() for x in qkv(150))
    args = (q, k, v, 40, 0.125, None, None, "triton")
    torch.library.opcheck(window_attn_fwd, args)
    o, lse = (x.detach() for x in window_attn_fwd(*args))
    torch.library.opcheck(
        window_attn_bwd,
        (torch.ones_like(o), None, *(x.detach() for x in (q, k, v)), o, lse, *args[3:]),
    )


def test_compiled_with_inductor():
    def fn(q, k, v):
        return window_attn(q, k, v, 64) * 2

    q, k, v = qkv(300)
    assert torch.equal(torch.compile(fn, fullgraph=True)(q, k, v), fn(q, k, v))


def test_backward_is_deterministic():
    q, k, v = (x.requires_grad_() for x in qkv(3000, H=4))
    o = window_attn(q, k, v, 500)
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_more_than_two_to_the_31_elements():
    """The last tokens of the last head lie beyond 32-bit offsets, from the start of the tensor."""
    T, H, D, W = 2**17 + 64, 128, 128, 128
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    q, k, v = (torch.randn(1, T, H, D, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = window_attn(q, k, v, W, backend="triton")
    grads = torch.autograd.grad(o, leaves, o.detach())
    tail = [x[:, -300:, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    expected = reference.window_attn(*tail, W)
    torch.testing.assert_close(o[:, -100:, -1:], expected[:, -100:], rtol=2e-2, atol=2e-2)
    expected = torch.autograd.grad(expected, tail, o[:, -300:, -1:].detach())
    for ours, theirs in zip(grads, expected):
        torch.testing.assert_close(ours[:, -100:, -1:], theirs[:, -100:], rtol=5e-2, atol=5e-2)
