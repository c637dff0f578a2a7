"""Both operations as registered ops: opcheck, torch.compile, repeated backward, nothing mutated."""

import dataclasses
import functools
import itertools
import types

import pytest
import torch
from torch._C._dynamo import eval_frame
from torch._dynamo.types import ConvertFrameReturn

from lact_kernels import TTTState, block_causal_ttt, window_attn
from lact_kernels.autograd import ttt as ttt_ops
from lact_kernels.autograd import window_attn as attn_ops
from lact_kernels.core.call import Options
from lact_kernels.core.newton_schulz import LACT
from lact_kernels.core.plan import Plan
from lact_kernels.eager import ttt as eager
from lact_kernels.ops.fast_weights import new_state
from lact_kernels.ops.window_attn import check_attention, inner_sinks
from lact_kernels.triton import fast_weights
from tests.cases import BACKWARD_OPCHECKS, OPCHECKS, TTTCase, WindowCase, check_window_attn

WINDOW = [
    WindowCase("window", 70, 16),
    WindowCase("no window on a cache", 5, None, Tk=9, Hq=4, Dv=8),
    WindowCase("every option", 30, (5, 3), Hq=4, softcap=2.0, sinks=1.0),
    WindowCase("packed", 40, 7, cu_seqlens=(0, 10, 10, 40)),
]
TTT = [
    TTTCase("plain"),
    TTTCase("every option", momentum=True, muon=True, prenorm=True),
    TTTCase("packed", B=1, T=24, cu_seqlens=(0, 3, 3, 16, 24), momentum=True),
]


def all_contiguous_grads(fn, leaves):
    outputs = [x for x in fn() if x.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def op_arguments(case, backend, device="cpu"):
    """Of `window_attn_fwd`."""
    q, k, v, *sinks = case.inputs(torch.float32, device)
    options = check_attention(q, k, v, case.window_size, 0.25, case.softcap)
    cu_seqlens = case.options(device).get("cu_seqlens")
    sinks = inner_sinks(q, sinks[0]) if sinks else None
    return q, k, v, *options, sinks, cu_seqlens, cu_seqlens, backend


@pytest.mark.parametrize("case", WINDOW, ids=str)
def test_opcheck_window_attn(case):
    args = op_arguments(case, "eager")
    torch.library.opcheck(attn_ops.window_attn_fwd, args)
    o, lse = (x.detach() for x in attn_ops.window_attn_fwd(*args))
    q, k, v, *args = (x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(
            attn_ops.window_attn_bwd,
            (torch.ones_like(o), dlse, q, k, v, o, lse, *args),
            test_utils=BACKWARD_OPCHECKS,
        )


def test_torchdynamo_does_not_look_into_an_op():
    """Also where one is called between two graphs, and with what the op itself calls."""
    names = []

    def hook(frame, *_):
        names.append(frame.f_code.co_filename)
        return ConvertFrameReturn(apply_to_code=False)

    args = op_arguments(WINDOW[0], "eager")
    before = eval_frame.set_eval_frame(hook)
    try:
        attn_ops.window_attn_fwd(*args)
        with torch.autocast("cpu"):
            attn_ops.window_attn_fwd(*args)
    finally:
        eval_frame.set_eval_frame(before)
    assert names and not any("lact_kernels" in name for name in names)


@pytest.mark.parametrize("case", TTT, ids=str)
def test_opcheck_block_causal_ttt(case):
    opcheck_block_causal_ttt(case, return_end=False)


@pytest.mark.parametrize("case", TTT, ids=str)
def test_opcheck_block_causal_ttt_with_checkpoints(case):
    """And with the state at the end, which has nothing to do with them."""
    case = dataclasses.replace(case, chunk_size=2)
    opcheck_block_causal_ttt(case, return_end=True, checkpoint_interval=2)


@pytest.mark.parametrize(
    "case, checks",
    [
        (dataclasses.replace(TTT[1], H=1, T=5), ("test_schema", "test_faketensor")),
        (dataclasses.replace(TTT[2], H=1, T=8, cu_seqlens=(0, 3, 3, 8)), OPCHECKS),
    ],
    ids=("every-option", "packed"),
)
def test_opcheck_block_causal_ttt_triton(case, checks):
    """With the blocks of the table, in the interpreter or on a GPU.

    A whole chunk and a token more: tensors do what the schema says, and look like the fake ones, or not. The
    graph that the rest of opcheck traces does not depend on what computes: one case has it.
    """
    opcheck_block_causal_ttt(case, True, backend="triton", checks=checks)


def opcheck_block_causal_ttt(
    case, return_end, checkpoint_interval=1, backend="eager", checks=OPCHECKS
):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x = case.inputs(torch.float32, device)
    plan, N = None, case.B
    if case.cu_seqlens:  # each sequence's first token is waiting in a state: a key without a query
        N = len(case.cu_seqlens) - 1
        queries = [0, *itertools.accumulate(max(b - a - 1, 0) for a, b in case.spans)]
        x["q"] = x["q"].detach()[:, : queries[-1]].clone().requires_grad_()
        plan = Plan.block_causal(case.cu_seqlens, queries, case.chunk_size, return_end).to_tensor()
    weights = tuple(x[name].detach().expand(N, -1, -1, -1).clone() for name in ("w0", "w1", "w2"))
    C = case.chunk_size
    tokens = [x.get(name) for name in ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")]
    shared = Options(C, case.muon, case.prenorm, case.momentum)
    state = new_state(weights, N, shared, torch.float32)
    start = [w.clone().requires_grad_() for triple in state[:4] for w in triple]
    muon = LACT.text if case.muon else None
    how = (C, muon, case.prenorm, True, False)
    options = (*how, return_end, checkpoint_interval, backend, "")
    torch.library.opcheck(
        ttt_ops.ttt_fwd,
        (*tokens, start, plan, *options),
        test_utils=checks,
        atol=1e-4,
        rtol=1e-3,
    )
    tokens = [None if t is None else t.detach() for t in tokens]
    start = [w.detach() for w in start]
    o, end, history = ttt_ops.ttt_fwd(*tokens, start, plan, *options)
    dend = [torch.ones_like(w) for w in end]
    torch.library.opcheck(
        ttt_ops.ttt_bwd,
        (torch.ones_like(o), dend, history, *tokens, start, plan, *options),
        test_utils=[check for check in checks if check in BACKWARD_OPCHECKS],
    )


def test_every_part_of_block_causal_ttt_goes_to_the_chosen_backend(monkeypatch):
    """With a stand-in for the Triton backend, which records what is asked of it."""
    calls = []

    def recording(name):
        def fn(*args):
            calls.append(name)
            return getattr(eager, name)(*args)

        return fn

    names = [f"ttt_{part}" for part in ("fwd", "bwd", "history")]
    stand_in = types.SimpleNamespace(**{name: recording(name) for name in names})
    monkeypatch.setattr(fast_weights, "ttt", stand_in, raising=False)
    inputs = TTTCase("").inputs(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    leaves = list(inputs.values())

    def fn(**tensors):
        return block_causal_ttt(**tensors, chunk_size=4, backend="triton")

    torch.autograd.grad(fn(**inputs).sum(), leaves)
    assert calls == names[:2]
    calls.clear()
    torch.autograd.grad(compiled(fn)(**inputs).sum(), leaves)
    assert sorted(set(calls)) == sorted(names)


def compiled(fn):
    """Traced whole; the graphs run as they are, which needs no C++ compiler."""
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", WINDOW, ids=str)
def test_compile_window_attn(case):
    inputs = case.inputs(torch.float32)

    def fn(*tensors):
        o, lse = case.attend(window_attn, tensors, return_lse=True)
        return o * 2, lse

    for plain, traced in zip(fn(*inputs), compiled(fn)(*inputs)):
        assert torch.equal(plain, traced)
    grads = [all_contiguous_grads(lambda f=f: f(*inputs), inputs) for f in (fn, compiled(fn))]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("case", TTT, ids=str)
def test_compile_block_causal_ttt(case, return_state):
    if case.cu_seqlens and return_state:
        pytest.skip("the shapes of a packed batch's state depend on cu_seqlens")
    inputs, options = case.inputs(torch.float32), case.options()

    def fn(**tensors):
        result = block_causal_ttt(**tensors, **options, return_state=return_state)
        if not return_state:
            return (result * 2,)
        o, state = result
        return (o * 2, *state.weights, *state.pending[0].tokens[:5])

    for plain, traced in zip(fn(**inputs), compiled(fn)(**inputs)):
        assert torch.equal(plain, traced)
    leaves = list(inputs.values())
    grads = [all_contiguous_grads(lambda f=f: f(**inputs), leaves) for f in (fn, compiled(fn))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_compiled_decoding_goes_through_a_state():
    inputs = {k: x.detach() for k, x in TTTCase("", T=9).inputs(torch.float32).items()}

    def fn(state, **tensors):
        return block_causal_ttt(**tensors, chunk_size=4, initial_state=state, return_state=True)

    def token(t):
        return {name: x if name[0] == "w" else x[:, t : t + 1] for name, x in inputs.items()}

    state, outputs, traced = None, [], compiled(fn)
    for t in range(5):
        o, state = traced(state, **token(t))
        outputs.append(o)
    assert isinstance(state, TTTState)
    whole = block_causal_ttt(**inputs, chunk_size=4)[:, :5]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


def test_packed_sequences_with_a_state_are_compiled_in_parts():
    """Their borders are read in between."""
    case = TTTCase("", B=1, T=9, cu_seqlens=(0, 3, 9))
    inputs, options = case.inputs(torch.float32), case.options()

    def fn(**tensors):
        o, state = block_causal_ttt(**tensors, **options, return_state=True)
        return o * 2, *state.weights

    traced = torch.compile(fn, backend="eager")(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(fn(**inputs), traced, strict=True))


@pytest.mark.parametrize("muon", [False, True], ids=["plain", "muon"])
def test_autocast_changes_nothing_in_block_causal_ttt(muon):
    inputs = TTTCase("", momentum=True, muon=muon).inputs(torch.float32)
    leaves = list(inputs.values())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o = block_causal_ttt(**inputs, chunk_size=4, muon=muon)
            results.append((o, *torch.autograd.grad(o.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("compiles", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_fits_what_it_has_made(dtype, compiles):
    """Projections and sigmoids of 16 bits beside normalised keys of 32: as cast by hand."""
    inputs = TTTCase("", momentum=True).inputs(torch.float32)
    made = {
        name: x.to(dtype) if name in ("v", "w0", "lr1", "momentum") else x
        for name, x in inputs.items()
    }
    fn = functools.partial(block_causal_ttt, chunk_size=4)
    with torch.autocast("cpu", dtype):
        o = (compiled(fn) if compiles else fn)(**made)
    by_hand = {
        name: x.to(dtype) if name in ("q", "k", "v") else x.float() for name, x in made.items()
    }
    assert o.dtype == dtype and torch.equal(o, fn(**by_hand))
    grads = (torch.autograd.grad(y.sum(), list(inputs.values())) for y in (o, fn(**by_hand)))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["w1", "lr0", "momentum"])
def test_without_autocast_16_bits_are_refused_with_the_remedy(name):
    inputs = TTTCase("", momentum=True).inputs(torch.float32)
    inputs[name] = inputs[name].bfloat16()
    message = f"{name} must have the dtype torch.float32, .* pass {name}.to\\(torch.float32\\)"
    with pytest.raises(TypeError, match=message):
        block_causal_ttt(**inputs, chunk_size=4)


def calls():
    window = WindowCase("", 70, 16).inputs(torch.float32)
    ttt = TTTCase("", momentum=True, muon=True, prenorm=True).inputs(torch.float32)
    yield lambda *x: window_attn(*x, 16, return_lse=True), window
    names = list(ttt)
    options = {"chunk_size": 4, "muon": True, "prenorm": True}
    yield lambda *x: (block_causal_ttt(**dict(zip(names, x)), **options),), list(ttt.values())


@pytest.mark.parametrize("call", list(calls()), ids=["window_attn", "block_causal_ttt"])
def test_second_backward_gives_the_same_and_nothing_is_mutated(call):
    fn, leaves = call
    before = [x.detach().clone() for x in leaves]
    outputs = fn(*leaves)
    cotangents = [torch.randn_like(x) for x in outputs]
    kept = [x.detach().clone() for x in (*outputs, *cotangents)]
    first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves))
    assert all(torch.equal(a, b) for a, b in zip(kept, (*outputs, *cotangents)))


def test_outputs_may_be_changed_in_place():
    """Also where an op returns what it has transposed in place: for autograd it is no view."""
    q, k, v = WindowCase("one call of PyTorch's kernel", 10, None).inputs(torch.float32)
    for name in ("o", "lse"):
        outputs = dict(zip(("o", "lse"), window_attn(q, k, v, return_lse=True, backend="eager")))
        outputs[name].mul_(2)
    with torch.no_grad():
        o, lse = window_attn(q, k, v, return_lse=True, backend="eager")
    assert not o._is_view() and not lse._is_view()


@pytest.mark.parametrize("case", WINDOW[:3], ids=str)
def test_triton_goes_through_the_same_op(case):
    """With the blocks of the table, in the interpreter or on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton_window_attn = functools.partial(window_attn, backend="triton")
    check_window_attn(triton_window_attn, case, torch.float32, device)
    torch.library.opcheck(attn_ops.window_attn_fwd, op_arguments(case, "triton", device))
