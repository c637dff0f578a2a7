"""`ttt_apply` on the eager and Triton kernels: values and gradients, registration, launches, what it refuses.

Without a GPU these run in Triton's interpreter in float32; 16-bit dtypes and the blocks of the table are in
`emulated/test_ttt_apply.py`. What transforms of `torch.func` and export make of it is tested with the others.
"""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import reference
from benchmarks.launches import count_launches
from lact_kernels import ttt_apply
from lact_kernels.autograd import ttt_apply as ops
from lact_kernels.triton import configs
from lact_kernels.triton.configs import TTTConfig
from lact_kernels.triton.fast_weights import apply
from tests.cases import (
    BACKWARD_OPCHECKS,
    LAYOUTS,
    OPCHECKS,
    ApplyCase,
    check_ttt_apply,
    filled_with_nan,
    laid_out,
)

ON_CPU = not torch.cuda.is_available()
DEVICE = "cpu" if ON_CPU else "cuda"
BACKENDS = pytest.mark.parametrize("backend", ["eager", "triton"])
triton_ttt_apply = functools.partial(ttt_apply, backend="triton")
eager_ttt_apply = functools.partial(ttt_apply, backend="eager")

CASES = [
    ApplyCase("weights that all rows share"),
    ApplyCase("weights for each row", batched="012"),
    ApplyCase("some for each row", batched="1"),
    ApplyCase("one row with its own weights", B=1, batched="012"),
    ApplyCase("control steps", T=1, B=5),
    ApplyCase("several tiles", T=20, B=1, H=1, Dk=20, Dv=36, Dh=33),
    ApplyCase("no tokens", T=0),
    ApplyCase("no rows", B=0),
    ApplyCase("no rows with their own weights", B=0, batched="012"),
    ApplyCase("one channel", Dk=1, Dv=1, Dh=1),
]
SHARED, EACH = CASES[:2]


@pytest.fixture
def blocks(monkeypatch):
    """Small ones in every pass, which few tokens straddle."""
    use_blocks(monkeypatch, 16, 16, 16)


def use_blocks(monkeypatch, *sizes):
    config = TTTConfig(*sizes, 4, 1)
    monkeypatch.setattr(configs, "_TTT_TABLE", dict.fromkeys(configs._TTT_TABLE, config))


def values(case, dtype=torch.float32):
    return [x.detach() for x in case.inputs(dtype, DEVICE)]


def with_gradients(fn, inputs):
    """The output, and all gradients of a fixed cotangent."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = fn(*inputs)
    do = torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_in_float64(case):
    inputs = values(case, torch.float64)
    actual, expected = (with_gradients(f, inputs) for f in (eager_ttt_apply, reference.ttt_apply))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("float32_weights", [False, True], ids=["", "float32 weights"])
def test_eager(dtype, float32_weights):
    case = ApplyCase("", T=150, Dk=16, Dv=24, Dh=32, float32_weights=float32_weights)
    check_ttt_apply(eager_ttt_apply, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, blocks):
    with filled_with_nan():
        check_ttt_apply(triton_ttt_apply, case, torch.float32, DEVICE)


LONGEST = [
    ApplyCase("hidden units", T=9, B=1, H=1, Dk=64, Dv=64, Dh=4096),
    ApplyCase("keys", T=9, B=1, H=1, Dk=2048, Dv=32, Dh=64),
    ApplyCase("values", T=9, B=1, H=1, Dk=32, Dv=2048, Dh=64),
]


@pytest.mark.parametrize("case", LONGEST, ids=str)
def test_longest_rows(case, monkeypatch):
    """In large tiles, of which there are few."""
    use_blocks(monkeypatch, 32, 256, 64)
    with filled_with_nan():
        check_ttt_apply(triton_ttt_apply, case, torch.float32, DEVICE)


@pytest.mark.parametrize("case", [SHARED, EACH], ids=str)
def test_tokens_take_turns_where_memory_is_short(case, blocks, monkeypatch):
    """Forward in two goes, backward one or two tokens at a time."""
    inputs = values(dataclasses.replace(case, T=5))
    expected = with_gradients(triton_ttt_apply, inputs)
    monkeypatch.setattr(apply, "ACTIVATION_BYTES", 400)
    launches = count_launches(lambda: triton_ttt_apply(*inputs))
    assert launches.kernels == 2 * 2 and not launches.ops
    with filled_with_nan():
        actual = with_gradients(triton_ttt_apply, inputs)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def where_they_lie(case):
    """Inputs that no kernel has to have copied, by how they lie."""
    q, *weights = values(case)
    for layout in LAYOUTS:
        yield f"q, {layout}", [laid_out(q, layout), *weights]
    heads = [
        torch.stack([w, w.new_full(w.shape, torch.nan)], dim=-3)[..., 0, :, :] for w in weights
    ]
    yield "every second matrix", [q, *heads]
    batched = [w.expand(len(q), *w.shape[-3:]) for w in weights]
    yield "rows of one memory", [q, *batched]


@pytest.mark.parametrize("case", [SHARED, EACH], ids=str)
def test_inputs_are_read_where_they_lie(case, blocks):
    torch.manual_seed(0)
    expected = with_gradients(eager_ttt_apply, values(case))
    torch.manual_seed(0)
    for name, inputs in where_they_lie(case):
        launches = count_launches(lambda: triton_ttt_apply(*inputs))  # noqa: B023
        assert (launches.ops, launches.kernels) == (0, 2), name
        actual = with_gradients(triton_ttt_apply, inputs)
        for a, e in zip(actual[:2], expected):
            torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")
        for a, e in zip(actual[2:], expected[2:]):  # of weights that were expanded there is a sum
            torch.testing.assert_close(a if a.shape == e.shape else a.sum(dim=0), e)


def test_what_the_kernels_cannot_read_is_copied(blocks):
    inputs = [x.mT.contiguous().mT for x in values(SHARED)]
    launches = count_launches(lambda: triton_ttt_apply(*inputs))
    assert launches.kernels == 2 and launches.ops == 4
    actual, expected = (with_gradients(f, inputs) for f in (triton_ttt_apply, eager_ttt_apply))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_share_weights_are_one_row_of_tokens(layout):
    """Where that needs no copy."""
    q, *weights = values(SHARED)
    weights = [w[None] for w in weights]
    (rows,) = apply._rows(weights, laid_out(q, layout))
    assert rows.shape[:2] == ((2, 11) if layout == "heads first" else (1, 22))
    (rows,) = apply._rows([w.expand(2, -1, -1, -1) for w in weights], q)
    assert rows.shape[:2] == (2, 11)


def test_launches(blocks):
    """Two kernels and nothing else forward, three backward; a cast for each weight of another dtype."""
    for case, dtype in ((SHARED, torch.float32), (EACH, torch.float16), (CASES[4], torch.bfloat16)):
        inputs, outputs = [x.requires_grad_() for x in values(case, dtype)], []
        forward = count_launches(lambda: outputs.append(triton_ttt_apply(*inputs)))  # noqa: B023
        assert (forward.kernels, forward.ops, forward.syncs) == (2, 0, 0), forward
        do = torch.ones_like(outputs[0])
        backward = count_launches(lambda: torch.autograd.grad(outputs[0], inputs, do))  # noqa: B023
        assert (backward.kernels, backward.syncs) == (3, 0)
        assert backward.op_names == {"aten::sum": 1, "aten::_to_copy": 3}
    q, *weights = values(SHARED)
    for stored in (weights, [w.mT.contiguous().mT for w in weights]):
        launches = count_launches(lambda: outputs.append(triton_ttt_apply(q.half(), *stored)))  # noqa: B023
        torch.testing.assert_close(outputs[-1], eager_ttt_apply(q.half(), *stored))
        assert launches.kernels == 2 and launches.op_names == {"aten::_to_copy": 1 + 3}


@BACKENDS
@pytest.mark.parametrize("case", [SHARED, EACH], ids=str)
def test_opcheck(case, backend, blocks):
    """What the graph traces does not depend on what computes."""
    in_16_bits = backend == "eager" and case is EACH
    q, *weights = values(case, torch.bfloat16 if in_16_bits else torch.float32)
    weights = [w if w.ndim == 4 else w[None] for w in weights]
    q = laid_out(q, "heads first")  # whose rows do not make one row
    checks = OPCHECKS if backend == "eager" else ("test_schema", "test_faketensor")
    inputs = [x.requires_grad_() for x in (q, *weights)]
    torch.library.opcheck(ops.ttt_apply_fwd, (*inputs, backend), test_utils=checks)
    inputs = [x.detach() for x in inputs]
    do = torch.ones_like(ops.ttt_apply_fwd(*inputs, backend))
    checks = [check for check in checks if check in BACKWARD_OPCHECKS]
    torch.library.opcheck(ops.ttt_apply_bwd, (do, *inputs, backend), test_utils=checks)


def test_gradcheck():
    case = ApplyCase("", T=3, H=1, Dk=2, Dv=2, Dh=3, batched="1")
    torch.autograd.gradcheck(ttt_apply, case.inputs(torch.float64))


def test_compiles_as_one_graph_for_all_lengths():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ttt_apply, fullgraph=True, dynamic=True, backend=graphs)
    for T in (17, 9, 13):
        inputs = values(ApplyCase("", T=T, batched="02"))
        actual, expected = (with_gradients(fn, inputs) for fn in (compiled, ttt_apply))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert graphs.frame_count == 1


@BACKENDS
def test_a_second_backward_gives_the_same_and_nothing_is_mutated(backend, blocks):
    inputs = SHARED.inputs(torch.float32, DEVICE)
    before = [x.detach().clone() for x in inputs]
    o = ttt_apply(*inputs, backend=backend)
    first, second = (torch.autograd.grad(o.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))


def test_nothing_is_kept_beside_the_inputs():
    inputs, kept = SHARED.inputs(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ttt_apply(*inputs)
    addresses = {x.data_ptr() for x in inputs}
    assert len(kept) == 4 and {x.data_ptr() for x in kept} == addresses


def test_autocast():
    """What fits is computed as it is; what autocast has made elsewhere is cast to what fits."""
    q, *weights = values(SHARED)
    half = [w.half() for w in weights]
    for inputs, by_hand in (
        ((q, *weights), (q, *weights)),
        ((q.bfloat16(), *weights), (q.bfloat16(), *weights)),
        ((q.half(), *half), (q.half(), *half)),
        ((q, weights[0], *(w.bfloat16() for w in weights[1:])),
         (q.bfloat16(), weights[0], *(w.bfloat16() for w in weights[1:]))),
        ((q.bfloat16(), *half), (q.bfloat16(), *(w.float() for w in half))),
    ):  # fmt: skip
        with torch.autocast(DEVICE, torch.bfloat16):
            o = ttt_apply(*inputs)
        assert torch.equal(o, ttt_apply(*by_hand)) and o.dtype == by_hand[0].dtype
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(TypeError, match="w1 .*float64"):
        ttt_apply(q, weights[0], weights[1].double(), weights[2])


BAD = [
    ({"q": None}, TypeError, r"q must be a tensor \[B, T, H, Dk\], got NoneType"),
    ({"q": torch.ones(6, 2, 5)}, ValueError, r"q must have the shape .*\(6, 2, 5\)"),
    ({"q": torch.ones(2, 11, 2, 5).int()}, TypeError, "q must have one of the dtypes .*int32"),
    ({"w0": torch.ones(2, 7, 4)}, ValueError, r"w0 .*\[H, Dh, Dk\] = \(2, 7, 5\), got \(2, 7, 4\)"),
    ({"w0": torch.ones(3, 2, 7, 5)}, ValueError, r"w0 .*\[B, H, Dh, Dk\] = \(2, 2, 7, 5\)"),
    ({"w0": torch.ones(7, 5)}, ValueError, "w0 must have the shape"),
    ({"w1": torch.ones(2, 6, 8)}, ValueError, r"w1 .*\[H, Dv, Dh\] = \(2, 6, 7\), got \(2, 6, 8\)"),
    ({"w1": torch.ones(2, 6, 0)}, ValueError, "w1 .* empty"),
    ({"w1": torch.ones(3, 6, 7)}, ValueError, r"w1 .*\(2, 6, 7\), got \(3, 6, 7\)"),
    ({"w2": torch.ones(2, 8, 5)}, ValueError, r"w2 .*\[H, Dh, Dk\] = \(2, 7, 5\)"),
    ({"w2": [1.0]}, TypeError, "w2 must be a tensor .* got list"),
    ({"w2": torch.ones(2, 7, 5).to_sparse()}, TypeError, "w2 must be a dense tensor"),
    ({"w1": torch.ones(2, 6, 7).half()}, TypeError, "w1 must have the dtype torch.float32 .*float16"),
    ({"q": torch.ones(2, 11, 2, 5).half(), "w1": torch.ones(2, 6, 7).bfloat16()}, TypeError,
     "w1 must have the dtype torch.float16 or torch.float32 beside q, got torch.bfloat16"),
    ({"q": torch.ones(2, 11, 2, 5).double()}, TypeError, "w0 .*float64 beside q, got .*float32"),
    ({"w1": torch.ones(2, 6, 7, device="meta")}, ValueError, "w1 must be on cpu like q, got meta"),
    ({"backend": "cuda"}, ValueError, "backend must be .* got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD)
def test_bad_input(changed, error, message):
    inputs = dict(zip(("q", "w0", "w1", "w2"), SHARED.inputs(torch.float32)))
    with pytest.raises(error, match=message):
        ttt_apply(**inputs | changed)


@pytest.mark.parametrize(
    "sizes, dtype, message",
    [
        ({}, torch.float64, "float64"),
        ({"Dk": 2049}, torch.float32, "Dk goes up to 2048, got Dk = 2049"),
        ({"Dv": 2064}, torch.bfloat16, "Dv goes up to 2048, got Dv = 2064"),
        ({"Dh": 4097}, torch.float16, "Dh goes up to 4096, got Dh = 4097"),
    ],
)
def test_explicit_triton_says_why_it_cannot_run(sizes, dtype, message):
    inputs = values(ApplyCase("", T=1, B=1, H=1, **sizes), dtype)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{message}"):
        triton_ttt_apply(*inputs)
    assert ttt_apply(*(x.cpu() for x in inputs)).shape == (1, 1, 1, sizes.get("Dv", 6))


LARGE = [
    ApplyCase("D768", T=700, B=2, Dk=768, Dv=768, Dh=1536),
    ApplyCase("largest", T=130, B=1, H=1, Dk=1024, Dv=1024, Dh=4096),
    ApplyCase("rows with their own", T=300, Dk=96, Dv=160, Dh=272, batched="012"),
    ApplyCase("control steps", T=1, B=50, Dk=64, Dv=64, Dh=64, float32_weights=True),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_gpu(case, dtype):
    with filled_with_nan():
        check_ttt_apply(triton_ttt_apply, case, dtype, "cuda")


@pytest.mark.gpu
def test_a_cuda_graph_serves_other_queries_and_weights():
    case = ApplyCase("", T=1, B=3, Dk=64, Dv=64, Dh=128)
    inputs = values(case, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_ttt_apply(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = triton_ttt_apply(*inputs)
    for _ in range(2):
        others = values(case, torch.bfloat16)
        for x, y in zip(inputs, others):
            x.copy_(y)
        graph.replay()
        assert torch.equal(o, triton_ttt_apply(*others))


def test_weights_that_no_descriptor_takes():
    """Then all goes by pointers: descriptors would read whole blocks, which these store to the last token."""
    q, *weights = values(ApplyCase("", T=100, B=1, H=1, Dk=16, Dv=16, Dh=16), torch.float16)
    shifted = []
    for w in weights:
        room = torch.zeros(w.numel() + 1, dtype=torch.float16, device=DEVICE)
        shifted.append(room[1:].view(w.shape).copy_(w.half()))
    with filled_with_nan():
        results = with_gradients(triton_ttt_apply, [q, *shifted])
        expected = with_gradients(triton_ttt_apply, [q, *(w.half() for w in weights)])
    for x, y in zip(results, expected):
        torch.testing.assert_close(x, y, atol=2e-3 * y.abs().max().item(), rtol=0)
