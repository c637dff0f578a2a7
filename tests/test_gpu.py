"""Both operations through their public functions on a GPU: every backend, dtype and option.

The kernels' own cases are in test_window_attn_triton.py. Nothing here runs without a GPU.
"""

import dataclasses
import functools
import gc

import pytest
import torch

import reference
from lact_kernels import RingKVCache, block_causal_ttt, window_attn, window_attn_with_kvcache
from lact_kernels.autograd.window_attn import window_attn_bwd, window_attn_fwd
from lact_kernels.triton.window_attn import bwd as bwd_kernels
from lact_kernels.triton.window_attn import fwd as fwd_kernels
from lact_kernels.triton.window_attn import with_kvcache as kvcache_kernels
from tests.cases import TTT_SHAPES, TTTCase, check_block_causal_ttt, check_window_attn
from tests.test_block_causal_ttt import LARGER
from tests.test_window_attn import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32_products")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def qkv(T, H=2, D=64, dtype=torch.bfloat16, B=1):
    return [torch.randn(B, T, H, D, dtype=dtype, device="cuda") for _ in range(3)]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


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
    sinks = torch.randn(len(q), q.shape[2], device="cuda")
    args = (q, k, v, 39, 5, 0.125, 2.0, sinks, None, None, "triton")
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


dense_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
BORDERS = [(0, 100, 300), (0, 0, 300), (0, 299, 300), (0, 17, 300), (0, 150, 300)]


def results(inputs, do, cu_seqlens, fn=window_attn):
    """The outputs of `fn` and its gradients. No graph of autograd stays alive."""
    o = fn(*inputs, 64, cu_seqlens=cu_seqlens)
    return o.detach(), *torch.autograd.grad(o, inputs, do)


def assert_same(actual, expected):
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def captured(fn):
    """A CUDA graph of `fn`, and what its replay fills. A call before the capture compiles the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # now, as what it frees may not be freed during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fn()
    return graph, outputs


@dense_and_packed
def test_forward_and_backward_in_a_cuda_graph(packed):
    """Whose replay finds other sequences in cu_seqlens than were there when it was recorded."""
    fixed = [*(x.requires_grad_() for x in qkv(300)), qkv(300)[0]]
    cu_seqlens = int32(0, 200, 300) if packed else None
    graph, outputs = captured(lambda: results(fixed[:3], fixed[3], cu_seqlens))
    for borders in BORDERS:
        fresh = [*(x.requires_grad_() for x in qkv(300)), qkv(300)[0]]
        with torch.no_grad():
            for old, new in zip(fixed, fresh):
                old.copy_(new)
        if packed:
            cu_seqlens.copy_(int32(*borders))
        graph.replay()
        expected = results(fresh[:3], fresh[3], int32(*borders) if packed else None)
        assert_same(outputs, expected)


@pytest.mark.parametrize("muon", [False, True], ids=["momentum", "muon"])
def test_training_step_of_fast_weights_in_cuda_graphs(muon):
    """Forward and backward, each captured by one call of torch, replayed on inputs that were not recorded."""
    case = dataclasses.replace(TTT, muon=muon)
    options = {"chunk_size": case.chunk_size, "muon": muon, "backend": "triton"}

    def inputs():
        return case.inputs(torch.bfloat16, "cuda")

    names = list(inputs())

    def fast_weights(*tensors):
        return block_causal_ttt(**dict(zip(names, tensors)), **options)

    graphed = torch.cuda.make_graphed_callables(fast_weights, tuple(inputs().values()))
    for seed in range(2):
        torch.manual_seed(seed)
        leaves = list(inputs().values())
        outputs = graphed(*leaves), fast_weights(*leaves)
        do = torch.randn_like(outputs[0])
        recorded, plain = ([o, *torch.autograd.grad(o, leaves, do)] for o in outputs)
        assert_same([x.clone() for x in recorded], plain)


@pytest.mark.parametrize("ragged", [False, True], ids=["equal-rows", "ragged-rows"])
@torch.no_grad()
def test_decoding_in_a_cuda_graph(ragged):
    """Over more steps than the cache has slots, two tokens at most at a time."""

    def step(cache, q, k, v, lengths):
        cache.append(k, v, lengths if ragged else None)
        return cache.window_attn(q, backend="triton")

    options = {"max_queries": 2, "dtype": torch.bfloat16, "device": "cuda"}
    recorded, plain = (RingKVCache(3, 16, 2, 64, **options) for _ in range(2))
    fixed = [*qkv(2, B=3), int32(2, 2, 2)]
    graph, o = captured(lambda: step(recorded, *fixed))
    recorded.seqlens.zero_()  # the call before the capture was none of the steps
    for i in range(40):
        fresh = [*qkv(2, B=3), int32(2, 1, i % 3)]
        for old, new in zip(fixed, fresh):
            old.copy_(new)
        graph.replay()
        assert torch.equal(o, step(plain, *fresh))
    assert_same((recorded.seqlens, recorded.k, recorded.v), (plain.seqlens, plain.k, plain.v))


@dense_and_packed
def test_compiled_into_cuda_graphs(packed):
    def fn(*args, **options):
        return window_attn(*args, **options) * 2

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = torch.compile(fn, fullgraph=True, mode="reduce-overhead")
    for borders in BORDERS:  # the first call warms up, the second records, the others replay
        inputs, do = [x.requires_grad_() for x in qkv(300)], qkv(300)[0]
        cu_seqlens = int32(*borders) if packed else None
        torch.compiler.cudagraph_mark_step_begin()
        actual = results(inputs, do, cu_seqlens, traced)
        assert_same(actual, results(inputs, do, cu_seqlens, fn))
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["cudagraph_recorded_non_static_inputs"] > 0
    assert counters["cudagraph_skips"] == 0


def num_compiled(*kernels):
    """How often Triton has compiled these kernels."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@dense_and_packed
def test_new_sizes_compile_no_kernel_again(packed):
    """A batch of B rows, or B sequences packed into one."""
    kernels = (
        fwd_kernels._window_attn_fwd_kernel,
        bwd_kernels._window_attn_bwd_dq_kernel,
        bwd_kernels._window_attn_bwd_dkv_kernel,
    )

    def run(B, T):
        inputs = [x.requires_grad_() for x in qkv(T, B=1 if packed else B)]
        cu_seqlens = int32(*(T * n // B for n in range(B + 1))) if packed else None
        results(inputs, torch.ones_like(inputs[0]), cu_seqlens)

    run(2, 300)
    before = num_compiled(*kernels)
    assert before >= len(kernels)
    for B, T in ((1, 300), (5, 300), (2, 301), (2, 16), (2, 4096), (1, 1)):
        run(B, T)
        assert num_compiled(*kernels) == before, (B, T)


@torch.no_grad()
def test_new_sizes_of_a_cache_compile_no_kernel_again():
    """There are two ways for the keys: in parts, where a few programs would leave the GPU idle, or not."""
    kernels = (
        kvcache_kernels._window_attn_with_kvcache_kernel,
        kvcache_kernels._window_attn_combine_kernel,
    )

    def run(B, S):
        (q, _, _), (_, k, v) = qkv(1, B=B), qkv(S, B=B)
        window_attn_with_kvcache(q, k, v, cache_seqlens=S, backend="triton")

    run(1, 4096)
    run(300, 64)
    before = num_compiled(*kernels)
    assert before >= len(kernels)
    for B, S in ((2, 4096), (1, 4099), (1, 60000), (301, 64), (300, 61), (1, 1)):
        run(B, S)
        assert num_compiled(*kernels) == before, (B, S)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_autocast_is_a_cast_by_hand(backend, dtype):
    """Its backward included, in which nothing is autocast."""
    fn = functools.partial(window_attn, backend=backend)
    q, k, v = qkv(300, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v.bfloat16())]
    do = torch.randn_like(q).to(dtype)
    with torch.autocast("cuda", dtype):
        actual = results(inputs, do, None, fn)
    o, *grads = results([x.detach().to(dtype).requires_grad_() for x in inputs], do, None, fn)
    assert_same(actual, (o, *(dx.to(x.dtype) for dx, x in zip(grads, inputs))))


@pytest.mark.parametrize("backend", ["triton", "eager"])
@torch.no_grad()
def test_autocast_casts_queries_and_cache(backend):
    fn = functools.partial(window_attn_with_kvcache, window_size=64, backend=backend)
    (q, _, _), (_, k, v) = qkv(2, dtype=torch.float32), qkv(300)
    with torch.autocast("cuda", torch.bfloat16):
        o = fn(q, k, v.float())
    assert_same([o], [fn(q.bfloat16(), k, v)])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_autocast_changes_nothing_in_fast_weights(backend):
    inputs = TTT.inputs(torch.float32, "cuda")
    outcomes = []
    for enabled in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            o = block_causal_ttt(**inputs, **TTT.options("cuda"), backend=backend)
            outcomes.append((o, *torch.autograd.grad(o.sum(), list(inputs.values()))))
    assert_same(*outcomes)


@pytest.fixture
def no_waiting():
    """A switch: from its call to the end of the test, to wait for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@dense_and_packed
def test_host_waits_for_nothing_but_borders_on_the_gpu(packed, no_waiting):
    inputs, do = [x.requires_grad_() for x in qkv(300)], qkv(300)[0]
    cu_seqlens = int32(0, 100, 300) if packed else None
    expected = results(inputs, do, cu_seqlens)
    on_host = cu_seqlens.cpu() if packed else None
    results(inputs, do, on_host)
    no_waiting()
    actual = results(inputs, do, on_host)
    if packed:
        with pytest.raises(RuntimeError, match="synchroniz"):
            results(inputs, do, cu_seqlens)
    torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)


@torch.no_grad()
def test_host_never_waits_for_a_cache(no_waiting):
    cache = RingKVCache(3, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    (q, k, v), lengths = qkv(1, B=3), int32(1, 0, 1)
    no_waiting()
    for _ in range(2):
        cache.append(k, v)
        cache.append(k, v, lengths)
        cache.window_attn(q, backend="triton")
        cache.view()


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
