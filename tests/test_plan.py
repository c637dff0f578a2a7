"""The plan of a scan: which keys update the weights, and which queries see each version of them."""

import dataclasses

import pytest
import torch

import reference
from benchmarks.launches import count_launches
from lact_kernels.autograd.ttt import ttt_fwd
from lact_kernels.core.call import Call, Options
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.plan import Plan
from lact_kernels.core.tokens import Tokens
from lact_kernels.ops.fast_weights import new_state, run
from lact_kernels.triton.fast_weights.history import ttt_history
from lact_kernels.triton.fast_weights.layout import Chunks
from lact_kernels.triton.fast_weights.scan import Scan
from tests.cases import TTTCase, filled_with_nan
from tests.plan_cases import PACKED, ScanCase, check_scan

C = 4


def borders_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("return_end", [False, True])
@pytest.mark.parametrize(
    "lengths, new",
    [((5, 0, 8), (5, 0, 8)), ((1,), (1,)), ((0, 0), (0, 0)), ((9, 4, 13), (1, 4, 6))],
    ids=["packed", "one", "empty", "behind pending tokens"],
)
def test_block_causal_plans(lengths, new, return_end):
    """By the definition: chunk c has the queries of its tokens, and its keys make the next weights."""
    plan = Plan.block_causal(borders_of(lengths), borders_of(new), C, return_end)
    for n, (length, first_key, first_query) in enumerate(
        zip(lengths, borders_of(lengths), borders_of(new))
    ):
        updates = length // C if return_end else max(length - 1, 0) // C
        firsts = [first_key + C * c for c in range(updates)]
        assert plan.keys[n] == [(first, first + C) for first in firsts]
        seen = [
            range(a - first_query, b - first_query)
            for a, b in zip(plan.queries[n], plan.queries[n][1:])
        ]
        before = length - new[n]  # tokens without a query
        expected = [[] for _ in range(updates + 1)]
        for query in range(new[n]):
            expected[min((before + query) // C, updates)].append(query)
        assert [list(r) for r in seen] == expected
    rows = plan.to_tensor(20)
    assert rows.shape == (20, 6) and Plan.from_tensor(rows) == plan
    assert Plan.from_tensor(plan.to_tensor()) == plan
    versions = rows[rows[:, 0] >= 0, 1].tolist()
    assert versions == sorted(versions) and versions.count(0) == len(lengths)


UPDATE_FIRST = Plan([[(0, 4), (4, 8), (8, 11)]], [[0, 0, 4, 8, 11]])  # each chunk sees itself
BIDIRECTIONAL = Plan([[(0, 11)]], [[0, 0, 11]])  # one update, which all see
PLANS = {"update first": UPDATE_FIRST, "bidirectional": BIDIRECTIONAL}


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_shapes_of_other_orders_are_known(backend):
    """Three updates of two whole chunks of keys: what is kept for the backward follows from the plan."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x = TTTCase("", T=11, B=1, H=1).inputs(torch.float32, device)
    options = Options(4, False, False, False)
    start = new_state([x[name] for name in ("w0", "w1", "w2")], 1, options, torch.float32)
    tensors = [x.get(name) for name in ("q", *Tokens._fields)]
    start = [w.detach() for w in start.fast_weights.to_list()]
    args = (*tensors, start, UPDATE_FIRST.to_tensor(), 4, None, False)
    args = (*args, True, False, False, 1, backend, "")
    torch.library.opcheck(ttt_fwd, args, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_other_orders(plan, backend):
    """What the plan says is computed, forward and backward, whatever order it is.

    Without momentum, which divides by the chunk size, and with as many tokens in each chunk, an order that
    updates first is the causal one with its queries a chunk later.
    """
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    case = TTTCase("", T=11, B=1, H=2)
    x = case.inputs(torch.float32, device)
    leaves = list(x.values())
    exact = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    (keys,) = plan.keys
    sizes = [b - a for a, b in keys]
    size = max(sizes)

    def later(name, value):
        """Rows of whole chunks: keys filled up at the end, and a chunk of queries before all others."""
        if name[0] == "w":
            return value
        padded = torch.nn.functional.pad(
            value, [0, 0] * (value.ndim - 2) + [0, size * len(sizes) - 11]
        )
        nothing = torch.zeros_like(padded[:, :size])
        return torch.cat([nothing, padded] if name == "q" else [padded, nothing], dim=1)

    whole = {name: later(name, value) for name, value in exact.items()}
    expected = reference.block_causal_ttt(**whole, chunk_size=size)[:, size : size + 11]

    options = Options(size, False, False, False)
    start = new_state([x[name] for name in ("w0", "w1", "w2")], 1, options, torch.float32)
    tokens = Tokens(*(x.get(name) for name in Tokens._fields))
    call = Call(x["q"], tokens, start.fast_weights, plan.to_tensor(), options)
    o, _ = run(call, backend)
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
    do = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, do)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), do.double())
    for name, ours, theirs in zip(x, grads, exact_grads):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4, msg=f"d{name}")


# One step of Newton-Schulz, and one that does not amplify what is small.
SMALL = {"muon": NewtonSchulz([(1.5, -0.5, 0.1)]), "Tk": 11, "H": 2}
MUON = SMALL | {"momentum": True, "momentum_after_muon": True}
SCANS = [
    ScanCase("gaps and unseen versions", momentum=True),
    ScanCase("rows", B=2, H=1, prenorm=True),
    ScanCase("packed", plan=PACKED, momentum=True, prenorm=True, checkpoint_interval=2),
    ScanCase("no rows", B=0, momentum=True),
    ScanCase("no keys", plan=Plan([[(0, 0)]], [[0, 2, 5]]), Tk=0, momentum=True),
    ScanCase("no queries", plan=Plan([[(0, 5), (6, 9)]], [[0, 0, 0, 0]])),
    ScanCase("no renorm", weight_norm=False, momentum=True),
    ScanCase("no renorm of masters", weight_norm=False, prenorm=True, plan=PACKED),
    ScanCase("momentum after Muon", UPDATE_FIRST, prenorm=True, checkpoint_interval=2, **MUON),
    ScanCase("w1 alone, momentum after Muon", UPDATE_FIRST, trained=(1,), **MUON),
]
# In float16 Muon's gradients have units, of the matrices that there are.
FLOAT16 = [
    ScanCase("w1", BIDIRECTIONAL, trained=(1,), **SMALL),
    ScanCase("w0 and w2", BIDIRECTIONAL, trained=(0, 2), **SMALL),
    ScanCase("growing weights", UPDATE_FIRST, weight_norm=False, **MUON),
]
TRAINED = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_scans_in_triton(case):
    check(case)


@pytest.mark.parametrize("case", FLOAT16, ids=str)
def test_units_in_float16(case):
    check(case, torch.float16)


@pytest.mark.parametrize("prenorm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("trained", TRAINED, ids=str)
def test_weights_that_are_not_trained(trained, prenorm):
    """Their gradients, masters and buffers go through, and no product is made for their steps."""
    case = ScanCase("", trained=trained, prenorm=prenorm, momentum=True, H=1, plan=PACKED)
    check(dataclasses.replace(case, checkpoint_interval=1 + prenorm))


def check(case, dtype=torch.float32):
    with filled_with_nan():
        check_scan("triton", case, dtype, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("end, forward", [(False, 6), (True, 7)], ids=["outputs", "with an end"])
def test_launches_of_a_bidirectional_plan(end, forward):
    """The start, two products, an update and the apply; of the backward three launches for the apply."""
    case = ScanCase("", plan=BIDIRECTIONAL, Tk=11, H=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = case.inputs(torch.float32, device)
    call = case.call(x)
    call = call._replace(options=call.options._replace(return_end=end))
    outputs = []
    launches = count_launches(lambda: outputs.append(run(call, "triton")[0]))
    assert launches.kernels == forward
    backward = count_launches(lambda: torch.autograd.grad(outputs[0].sum(), x["k"]))
    assert backward.kernels == 10


@pytest.mark.parametrize("queries", [[0, 0, 0, 0, 11], [0, 11, 11, 11, 11], [0, 0, 0, 11, 11]])
def test_versions_that_nobody_sees_are_not_applied(queries):
    """Three updates, and one version with queries: one pair of launches, and three backward."""
    case = ScanCase("", plan=Plan(UPDATE_FIRST.keys, [queries]), Tk=11, H=1)
    x = case.inputs(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    outputs = []
    forward = count_launches(lambda: outputs.append(run(case.call(x), "triton")[0]))
    assert forward.kernel_names["_ttt_project_kernel"] == 1
    assert forward.kernel_names["_ttt_hidden_kernel"] == 3 + 1
    backward = count_launches(lambda: torch.autograd.grad(outputs[0].sum(), x["k"]))
    # Those of the apply, and one for each update or all of them.
    assert backward.kernel_names["_ttt_hidden_kernel"] == 1
    assert backward.kernel_names["_ttt_outer_kernel"] == 1 + 3
    assert backward.kernel_names["_ttt_project_kernel"] == 1 + 2


def test_apply_is_cut_at_versions_that_nobody_sees():
    """Nothing is written, summed or filled with zeros for these."""
    case = ScanCase("", plan=Plan(UPDATE_FIRST.keys, [[0, 4, 4, 4, 11]]), Tk=11)
    chunks = Chunks(case.call(case.inputs(torch.float32)))
    assert chunks.applied(range(4)) == [range(1), range(3, 4)]
    assert chunks.applied(range(1, 3)) == []


@pytest.mark.parametrize("late", [False, True], ids=["momentum before Muon", "after"])
def test_bound_of_growing_weights(late):
    """Units of float16 rely on how long rows can become without renorm; these grow as fast as they can."""
    case = ScanCase("", plan=UPDATE_FIRST, Tk=11, H=1, muon=True, momentum=True, weight_norm=False)
    case = dataclasses.replace(case, momentum_after_muon=late)
    x = {name: t.detach() for name, t in case.inputs(torch.float32).items()}
    x["momentum"].fill_(1)
    for name, t in x.items():
        if name[:-1] in ("weights", "buffers"):
            t.mul_(0.01)
    call = case.call(x)
    _, end = run(call, "eager")
    longest = max(torch.linalg.vector_norm(w, dim=-1).max() for w in end.weights)
    (bound,) = Scan(call, ttt_history(call)).lengths[0].flatten()
    assert longest > 1.5 and longest <= bound < 20 * longest
