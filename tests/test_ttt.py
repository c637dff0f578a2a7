"""`ttt` against the plain loop over the plan, whatever the plan."""

import collections
import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.launches import count_launches
from lact_kernels import Apply, NewtonSchulz, TTTPlan, Update, block_causal_ttt, ttt, ttt_update
from lact_kernels.core.lowering import gather, lower
from lact_kernels.eager import swiglu
from tests.cases import filled_with_nan
from tests.ttt_plans import (
    PUBLISHED,
    PlanCase,
    cases,
    check_case,
    outputs_and_gradients,
    state_tensors,
)

drawn = functools.partial(settings, deadline=None, derandomize=True, database=None)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@drawn(max_examples=300)
@given(cases(), st.integers(1, 3))
def test_any_plan(case, interval):
    """Outputs, weights, masters, momentum and all gradients, through the outputs and the state."""
    torch.manual_seed(0)
    x = case.tensors(torch.float64)
    exact = case.reference(**x)
    cotangents = [torch.randn_like(o) for o in exact]
    fn = case.call(backend="eager", checkpoint_interval=interval, return_state=True)

    def ours(**x):
        o, state = fn(**x)
        return [o, *state_tensors(state)]

    actual, grads = outputs_and_gradients(ours, x, cotangents)
    expected, exact_grads = outputs_and_gradients(case.reference, x, cotangents)
    for a, e in zip((*actual, *grads), (*expected, *exact_grads), strict=True):
        close(a, e)
    o = case.call(backend="eager")(**x)  # without a state some updates are left out
    close(o, expected[0])


@drawn(max_examples=60)
@given(cases(), st.integers(0, 6))
def test_a_plan_in_two_calls(case, cut):
    """The state after the first steps is all that the others need, gradients included."""
    torch.manual_seed(0)
    x = case.tensors(torch.float64)
    if dict(case.options)["detach_norms"]:
        x = {name: t.detach() if name[0] == "w" else t for name, t in x.items()}
    whole, state = case.call(backend="eager", return_state=True)(**x)
    first, second = (
        dataclasses.replace(case, plans=tuple(TTTPlan(plan.steps[part]) for plan in case.plans))
        for part in (slice(cut), slice(cut, None))
    )
    o1, middle = first.call(backend="eager", return_state=True)(**x)
    again = second.call(backend="eager", return_state=True, initial_state=middle)
    o2, end = again(**x)
    if len(case.lengths) == 1:
        close(torch.cat([o1, o2], dim=1), whole)
    for a, e in zip(state_tensors(end), state_tensors(state), strict=True):
        close(a, e)
    leaves = [t for t in x.values() if t.requires_grad]
    grads = [
        torch.autograd.grad(
            sum(w.square().sum() for w in state.weights),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for state in (end, state)
        if state.weights[0].requires_grad
    ]
    for a, e in zip(*grads) if grads else ():
        close(a, e)


T, C = (
    44,
    16,
)  # more keys in a chunk than rows in a weight: Muon knows no small singular values then
NAMED = {
    "block causal": TTTPlan.block_causal(T, C),
    "bidirectional": TTTPlan.bidirectional(),
    "update first": TTTPlan.update_first(T, C),
    "views": TTTPlan([Update(0, 28), Apply(0, T)]),
    "ranges in one step, twice": TTTPlan([Update([(0, 12), (24, T)]), Update(24, T), Apply(8, 36)]),
    "later queries first": TTTPlan(
        [Apply(32, T), Update(16, 32), Apply(0, 16), Update(0, 16), Apply(20, 32)]
    ),
}
OPTIONS = {
    "plain": {},
    "muon": {"muon": True},
    "published": {"muon": PUBLISHED, "detach_norms": True},
    "no weight norm": {"weight_norm": False, "muon": NewtonSchulz([])},
    "late momentum": {"muon": True, "momentum_after_muon": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "plan, options", itertools.product(NAMED, OPTIONS), ids=lambda x: x.replace(" ", "-")
)
def test_precision(plan, options, dtype):
    """Outputs, weights and gradients hold the bar of plain PyTorch in the same dtype."""
    momentum = "momentum" in options
    case = PlanCase(
        (NAMED[plan],), ((T, T),), tuple(OPTIONS[options].items()), momentum=momentum, rows=1,
        sizes=(2, 8, 12, 16),
    )  # fmt: skip
    check_case(case, dtype, backend="eager")


@pytest.mark.parametrize(
    "plan, options", [("views", "published"), ("later queries first", "plain")]
)
def test_triton(plan, options):
    """Two rows of a batch, which the kernels take as one; any plan and option is in `test_plan`."""
    case = PlanCase(
        (NAMED[plan],), ((T, T),), tuple(OPTIONS[options].items()), rows=2, sizes=(1, 8, 12, 16)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with filled_with_nan():
        check_case(case, torch.float32, device, backend="triton")


def inputs(T=T, momentum=False, B=1, trained=(True, True, True)):
    case = PlanCase((), ((T, T),), momentum=momentum, rows=B, trained=trained)
    return {"lr0": None, "lr1": None, "lr2": None} | case.tensors(torch.float64)


def test_block_causal_ttt_is_a_plan():
    x = inputs(momentum=True, B=2)
    o = ttt(**x, plan=TTTPlan.block_causal(T, C), muon=True, prenorm=True)
    close(o, block_causal_ttt(**x, chunk_size=C, muon=True, prenorm=True))
    options = {"muon": True, "return_state": True}
    _, state = ttt(**x, plan=TTTPlan.block_causal(T, T // 4), **options)
    _, expected = block_causal_ttt(**x, chunk_size=T // 4, **options)
    for a, e in zip(state_tensors(state), state_tensors(expected), strict=True):
        close(a, e)
    assert TTTPlan.block_causal(0, C).steps == ()


@dataclasses.dataclass
class Operator:  # as LaCT's code has it
    start: int
    end: int
    update: bool
    apply: bool


def test_plans_of_ttt_operators():
    """An entry updates first, then applies; -1 is the end of the sequence."""
    order = [Operator(0, 8, False, True), Operator(8, 12, True, False), Operator(4, -1, True, True)]
    plan = TTTPlan.of_ttt_operators(order)
    assert plan == TTTPlan([Apply(0, 8), Update(8, 12), Update(4), Apply(4)])
    with pytest.raises(TypeError, match="entry 0 of the order has no apply"):
        TTTPlan.of_ttt_operators([collections.namedtuple("O", "start end update")(0, 1, True)])
    # Sequences of four, an end of None, and no queries at all.
    assert TTTPlan.of_ttt_operators([(4, None, 1, 0), [3, 3, False, True]]).steps == (Update(4),)
    # Entries of a configuration are sequences, too, of a library's kind.
    entry = collections.UserList([0, 4, True, True])
    assert TTTPlan.of_ttt_operators([entry]) == TTTPlan([Update(0, 4), Apply(0, 4)])


@pytest.mark.parametrize("field", ["compute_grad", "fast_weight"])
def test_gradients_that_no_update_follows_are_refused(field):
    entry = collections.namedtuple("O", f"start end {field} update apply")
    plan = TTTPlan.of_ttt_operators([entry(0, 4, True, True, False), entry(0, -1, 0, 0, True)])
    assert plan == TTTPlan([Update(0, 4), Apply(0)])
    with pytest.raises(ValueError, match=f"entry 0 of the order must have the same {field}"):
        TTTPlan.of_ttt_operators([entry(0, 4, True, False, True)])


def test_open_ranges_are_those_of_each_packed_sequence():
    """One plan for sequences of any lengths, none among them."""
    lengths, x = (3, 0, 8), inputs(11)
    x |= {name: x[name][0] for name in ("w0", "w1", "w2")}
    borders = torch.tensor([0, 3, 3, 11], dtype=torch.int32)
    o = ttt(**x, plan=TTTPlan.bidirectional(), cu_seqlens=borders)
    starts = itertools.accumulate(lengths, initial=0)
    for start, length in zip(starts, lengths):
        part = slice(start, start + length)
        alone = {name: t if name[0] == "w" else t[:, part] for name, t in x.items()}
        close(o[:, part], ttt(**alone, plan=TTTPlan.bidirectional()))


def test_update_alone():
    x = inputs(momentum=True, B=2)
    q = x.pop("q")
    options = {"muon": True, "prenorm": True}
    w, state = ttt_update(**x, **options, return_state=True)
    _, expected = ttt(q, **x, plan=TTTPlan([Update(0)]), **options, return_state=True)
    for a, e in zip((*w, *state_tensors(state)), (*expected.weights, *state_tensors(expected))):
        close(a, e)
    again = ttt_update(**x, **options, initial_state=state)
    plan = TTTPlan([Update(0), Update(0)])
    _, expected = ttt(q, **x, plan=plan, **options, return_state=True)
    for a, e in zip(again, expected.weights):
        close(a, e)


def update_inputs(device):
    case = PlanCase((), ((T, T),), rows=1, sizes=(2, 16, 16, 32))
    x = case.tensors(torch.float32, device)
    return {name: t.detach() for name, t in x.items() if name != "q"}


def test_update_alone_waits_for_nothing():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = update_inputs(device)
    counted = count_launches(lambda: ttt_update(**x, backend="triton"))
    assert counted.syncs == 0 and counted.kernels == 5


@pytest.mark.gpu
def test_a_cuda_graph_updates_other_weights():
    x = update_inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ttt_update(**x, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = ttt_update(**x, backend="triton")
    others = update_inputs("cuda")
    for name, t in x.items():
        t.copy_(others[name])
    graph.replay()
    for a, e in zip(weights, ttt_update(**others, backend="triton")):
        assert torch.equal(a, e)


def updates_of(fn, monkeypatch):
    """The tokens of each update, and which gradients are computed."""
    seen, gradients = [], swiglu.gradients

    def spy(tokens, weights):
        seen.append((tokens.k.shape[1], tuple(lr is not None for lr in tokens.rates)))
        return gradients(tokens, weights)

    monkeypatch.setattr(swiglu, "gradients", spy)
    fn()
    return seen


def test_what_nobody_sees_is_not_computed(monkeypatch):
    x = inputs(trained=(False, True, False))
    plan = TTTPlan([Update(0, 3), Apply(0, 4), Update(3, 8), Update(0, 8)])
    only_w1 = (False, True, False)
    seen = updates_of(lambda: ttt(**x, plan=plan), monkeypatch)
    assert seen == [(3, only_w1)]
    seen = updates_of(lambda: ttt(**x, plan=plan, return_state=True), monkeypatch)
    assert seen == [(3, only_w1), (5, only_w1), (8, only_w1)]


@pytest.mark.parametrize(
    "steps, queries, keys",
    [
        ([Update(4, 8), Apply(0, 2), Update(0, 3), Apply(2, 11)], [(0, 11)], None),
        ([Update(0, 4), Update(4, 8), Apply(3, 6)], [(3, 6)], None),
        ([Apply(0, 4), Update([(4, 8), (0, 4)]), Apply(4, 8)], [(0, 8)], None),
        ([Update(0, 4), Update(2, 8), Apply(0, 4)], [(0, 4)], [(0, 4), (2, 8)]),
        ([Update([(0, 2), (4, 6)]), Apply(4, 8), Apply(0, 4)], [(4, 8), (0, 4)], [(0, 2), (4, 6)]),
    ],
    ids=["keys with gaps", "some queries", "joined", "keys twice", "scattered"],
)
def test_what_is_read_in_place(steps, queries, keys):
    lowered = lower([TTTPlan(steps)], [0, 11], [0, 11], False)
    assert (lowered.queries, lowered.keys) == (queries, keys)
    q = torch.arange(11)[None]
    assert (gather(q, lowered.queries).data_ptr() == q[:, queries[0][0] :].data_ptr()) == (
        len(queries) == 1
    )
    assert gather(q, queries).tolist() == [[i for a, b in queries for i in range(a, b)]]


BEYOND = [
    (r"step 1 of plan, Update\(0, 45\), goes beyond", [Apply(0), Update(0, 45), Apply(0)]),
    (r"step 0 of plan, Apply\(40, 50\), goes beyond", [Apply(40, 50)]),
    (r"step 0 of plan, Update\(3, 3\), has no key", [Update(3, 3), Apply(0)]),
]


@pytest.mark.parametrize("message, steps", BEYOND)
def test_plans_of_other_tokens_are_refused(message, steps):
    with pytest.raises(ValueError, match=message):
        ttt(**inputs(), plan=TTTPlan(steps))


BAD_STEPS = [
    (ValueError, "Apply must have at least one query", lambda: Apply(3, 3)),
    (ValueError, "Apply must have a range 0 <= start <= stop", lambda: Apply(-3, 4)),
    (ValueError, "Update must have a range 0 <= start <= stop", lambda: Update(4, 3)),
    (ValueError, "Update must have at least one range", lambda: Update([])),
    (TypeError, "stop of Update must be an int, got 4.0", lambda: Update(0, 4.0)),
    (TypeError, "Update must have ranges .start, stop., got 3", lambda: Update([3, 4])),
    (TypeError, "step 0 of a plan must be an Update or an Apply", lambda: TTTPlan([(0, 4)])),
    (TypeError, "steps must be a sequence of Update and Apply, got 3", lambda: TTTPlan(3)),
    (ValueError, "chunk_size must be at least 1", lambda: TTTPlan.block_causal(4, 0)),
    (TypeError, "^T must be an int, got 4.0", lambda: TTTPlan.update_first(4.0, 2)),
    (TypeError, "^T must be an int, got False", lambda: TTTPlan.bidirectional(False)),
    (TypeError, "^chunk_size must be an int, got True", lambda: TTTPlan.block_causal(4, True)),
]


@pytest.mark.parametrize("error, message, make", BAD_STEPS)
def test_bad_steps_are_refused(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_borders_may_be_numpy_ints():
    """And are plain ints in the plan, which is the same as one of these."""
    a, b = np.int64(3), np.int32(7)
    plan = TTTPlan([Update(a, b), Apply(a, b)])
    assert repr(plan) == "TTTPlan([Update(3, 7), Apply(3, 7)])"
    assert TTTPlan.block_causal(b, a) == TTTPlan.block_causal(7, 3)
    assert TTTPlan.bidirectional(b) == TTTPlan.bidirectional(7)
    assert plan.shard(queries=(a, b), keys=(a, b)) == TTTPlan([Update(0, 4), Apply(0, 4)])


TWO_PLANS = [TTTPlan([]), TTTPlan([])]
ONE, TWO = (torch.tensor(x, dtype=torch.int32) for x in ([0, T], [0, 3, T]))
BAD_CALLS = [
    (ValueError, "lr0, lr1 and lr2 are all None", {"lr0": None, "lr1": None, "lr2": None}),
    (ValueError, "momentum_after_muon=True needs muon", {"momentum_after_muon": True}),
    (TypeError, "muon must be True, False or a NewtonSchulz, got 5", {"muon": 5}),
    (TypeError, "weight_norm must be True or False", {"weight_norm": 1}),
    (TypeError, "plan must be a TTTPlan, which", {"plan": [Update(0, 4)]}),
    (TypeError, "plan must be one TTTPlan without cu_seqlens, got 2", {"plan": TWO_PLANS}),
    (ValueError, "one TTTPlan for each of 1 seq", {"plan": TWO_PLANS, "cu_seqlens": ONE}),
    (ValueError, "cu_seqlens must be borders of as many", {"cu_seqlens": (ONE, TWO)}),
    (ValueError, "v must have the shape .B, Tk, H, Dv.", {"v": torch.zeros(1, 3, 2, 6).double()}),
]


@pytest.mark.parametrize("error, message, wrong", BAD_CALLS)
def test_bad_calls_are_refused(error, message, wrong):
    with pytest.raises(error, match=message):
        ttt(**inputs() | {"plan": TTTPlan.bidirectional()} | wrong)


def test_states_of_other_options_are_refused():
    x = inputs()
    _, state = block_causal_ttt(**x, chunk_size=C, return_state=True)
    with pytest.raises(ValueError, match="made with chunk_size=16.*this call has a plan"):
        ttt(**x, plan=TTTPlan.bidirectional(), initial_state=state)
    _, state = ttt(**x, plan=TTTPlan([Update(0)]), weight_norm=False, return_state=True)
    with pytest.raises(ValueError, match="weight_norm=False; this call has a plan, muon=False"):
        ttt(**x, plan=TTTPlan.bidirectional(), initial_state=state)


@pytest.mark.parametrize("muon", [False, NewtonSchulz([])], ids=["plain", "no triples"])
def test_compiles_whole(muon):
    """The plan is a constant of the program."""
    x = inputs(momentum=True, trained=(True, True, False))

    def fn(**x):
        return ttt(**x, plan=NAMED["ranges in one step, twice"], muon=muon) * 2

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    leaves = [t for t in x.values() if t is not None]
    for a, e in zip(*(torch.autograd.grad(f(**x).sum(), leaves) for f in (compiled, fn))):
        close(a, e)


def test_vmap():
    x = {name: t.detach() for name, t in inputs().items()}
    many = {name: torch.stack([t, t.flip(1)]) if name == "k" else t for name, t in x.items()}
    plan = NAMED["views"]
    o = torch.vmap(lambda k: ttt(**x | {"k": k}, plan=plan))(many["k"])
    close(o, torch.stack([ttt(**x | {"k": k}, plan=plan) for k in many["k"]]))
