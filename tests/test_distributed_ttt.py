"""`ttt` of a plan that is split over ranks, against one process: values, gradients, states, messages."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh

import lact_kernels
from lact_kernels import Apply, NewtonSchulz, TTTPlan, Update
from lact_kernels.distributed import ttt
from tests.cases import filled_with_nan
from tests.ranks import Ranks, counted, mesh_of
from tests.test_distributed_block_causal_ttt import cotangent, tensors_of
from tests.test_distributed_failures import catches
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.xdist_group("ranks")

H, DK, DV, DH = 2, 4, 6, 5
TOKENS = ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")
WEIGHTS = ("w0", "w1", "w2")


@dataclasses.dataclass(frozen=True)
class Case:
    plan: TTTPlan  # of all tokens
    queries: tuple[int, ...]  # how many each rank has
    keys: tuple[int, ...]
    options: dict = dataclasses.field(default_factory=dict)
    given: str = ""  # of momentum, own-weights, state, end, apart; rates that are None
    B: int = 1

    @property
    def size(self):
        return len(self.keys)

    def mine(self, group):
        """The borders of this rank's queries and keys."""
        rank = dist.get_rank(group)
        places = ([0, *itertools.accumulate(x)] for x in (self.queries, self.keys))
        return [(x[rank], x[rank + 1]) for x in places]


ORDER = [
    Apply(0, 3),  # before any update
    Update([(2, 9), (14, 17)]),  # rank 1 has none of these keys, and rank 3 none at all
    Apply(4, 20),
    Update(9, 14),
    Update(1, 6),  # keys that an update has had
    Apply(0, 16),  # and queries
    Update(10, 17),  # which nothing sees
]
TRIPLES = NewtonSchulz([(3.4445, -4.7750, 2.0315)] * 2)
CASES = {
    "any-order": Case(
        TTTPlan(ORDER), (7, 2, 0, 11), (9, 5, 3, 0), B=2,
        options={"muon": True, "prenorm": True}, given="momentum own-weights state end",
    ),
    "bidirectional": Case(TTTPlan.bidirectional(), (5, 8), (5, 8), {"muon": TRIPLES}),
    "keys-on-one-rank-queries-on-the-other": Case(
        TTTPlan([Update(0, 4), Update(4, 9), Apply(0)]), (0, 6), (9, 0), given="momentum",
    ),
    "update-first": Case(
        TTTPlan.update_first(14, 4), (3, 6, 4, 1), (3, 6, 4, 1), B=2,
        options={"muon": TRIPLES, "momentum_after_muon": True, "checkpoint_interval": 2},
        given="momentum",
    ),
    "without-norms": Case(
        TTTPlan(ORDER[:4]), (9, 11), (9, 8), {"weight_norm": False}, "momentum state end lr0 lr2",
    ),
    "detached-norms": Case(
        TTTPlan(ORDER[2:]), (9, 11), (12, 5), {"detach_norms": True}, "end apart lr1",
    ),
    "no-update": Case(TTTPlan([Apply(0, 5)]), (2, 3), (2, 3), given="momentum end"),
}  # fmt: skip


def inputs(case, dtype):
    """Of all ranks."""
    Tq, Tk = sum(case.queries), sum(case.keys)
    shapes = {"q": (case.B, Tq, H, DK), "k": (case.B, Tk, H, DK), "v": (case.B, Tk, H, DV)}
    lead = (case.B,) if "own-weights" in case.given else ()
    shapes |= {"w0": (*lead, H, DH, DK), "w1": (*lead, H, DV, DH), "w2": (*lead, H, DH, DK)}
    shapes |= dict.fromkeys(("lr0", "lr1", "lr2", "momentum"), (case.B, Tk, H))
    x = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("k", *WEIGHTS):
        x[name] /= x[name].shape[-1] ** 0.5
    for name in ("lr0", "lr1", "lr2"):
        x[name] = None if name in case.given else 0.1 * x[name].sigmoid()
    x["momentum"] = x["momentum"].sigmoid() if "momentum" in case.given else None
    return {name: None if value is None else value.to(dtype) for name, value in x.items()}


def initial_state(case, x):
    if "state" not in case.given:
        return None
    return lact_kernels.ttt(**x, plan=TTTPlan([Update(0, 5)]), return_state=True, **case.options)[1]


def take(x, mine):
    """This rank's tokens."""
    queries, keys = (slice(*borders) for borders in mine)
    return {
        name: value[:, queries if name == "q" else keys]
        if name in TOKENS and value is not None
        else value
        for name, value in x.items()
    }


def places_of(case, queries):
    """Where in the outputs of the whole plan those of some queries are."""
    tokens = range(sum(case.queries))
    steps = [step for step in case.plan.steps if isinstance(step, Apply)]
    applied = [t for step in steps for t in tokens[step.start : step.stop]]
    return [i for i, t in enumerate(applied) if t in range(*queries)]


def value_and_gradients(function, x, state, loss, **options):
    """Outputs, the end's tensors, and gradients by name."""
    x = {
        name: value if value is None else value.detach().clone().requires_grad_()
        for name, value in x.items()
    }
    if state is not None:
        state = state.map(lambda s: s.detach().clone().requires_grad_())
    o, end = function(**x, **options, initial_state=state), []
    if options["return_state"]:
        o, end = o[0], tensors_of(o[1])
    leaves = {name: value for name, value in x.items() if value is not None}
    leaves |= dict(enumerate([] if state is None else tensors_of(state)))
    grads = torch.autograd.grad(loss(o, end), list(leaves.values()), materialize_grads=True)
    return o, end, dict(zip(leaves, grads))


def on_ranks(case, dtype, backend="eager", by="mesh"):
    """This rank's share of what one process computes, and what it computes itself; gradients are summed.

    The first rank alone derives the end, and if that is all ("apart") its outputs have no gradient.
    """
    mesh = mesh_of(case.size)
    group = mesh.get_group()
    first, apart = dist.get_rank(group) == 0, "apart" in case.given
    mine = case.mine(group)
    places = places_of(case, mine[0])
    x = inputs(case, dtype)
    state = initial_state(case, x)
    options = case.options | {"return_state": "end" in case.given}

    def of_end(end):
        return sum(((e * cotangent(e)).sum() for e in end), torch.zeros(()))

    def whole_loss(o, end):
        do = cotangent(o)
        if apart:
            do[:, places_of(case, (0, case.queries[0]))] = 0
        return (o * do).sum() + of_end(end)

    def my_loss(o, end):
        if first and apart:
            return of_end(end)
        loss = (o * cotangent(whole[0])[:, places]).sum()
        return loss + of_end(end) if first else loss

    def of_one_process(x, state):
        return value_and_gradients(
            lact_kernels.ttt, x, state, whole_loss, plan=case.plan, **options
        )

    def my_share(o, end, grads):
        return o[:, places], end, take(grads, mine)

    whole = of_one_process(x, state)
    with filled_with_nan():
        o, end, grads = value_and_gradients(
            ttt, take(x, mine), state, my_loss, plan=case.plan.shard(queries=mine[0], keys=mine[1]),
            group=mesh if by == "mesh" else group, backend=backend, **options,
        )  # fmt: skip
    for name, grad in grads.items():
        if name not in TOKENS:
            grads[name] = grad.contiguous()
            dist.all_reduce(grads[name], group=group)
    return my_share(*whole), (o, end, grads)


def equals_one_process(name, by):
    case = CASES[name]
    (o, end, grads), (my_o, my_end, my_grads) = on_ranks(case, torch.float64, by=by)
    pairs = {"o": (my_o, o)} | {key: (my_grads[key], grads[key]) for key in grads}
    pairs |= {f"end {i}": pair for i, pair in enumerate(zip(my_end, end, strict=True))}
    for label, (actual, expected) in pairs.items():
        assert actual.shape == expected.shape, label
        if expected.numel():
            error, size = (actual - expected).abs().max(), expected.abs().max()
            assert error <= 1e-10 * size, f"{label}: {error} of {size}"


@pytest.mark.parametrize("name, by", [*zip(CASES, itertools.cycle(("mesh", "group")))])
def test_equals_one_process(ranks: Ranks, name, by):
    ranks.run(equals_one_process, name, by)


KERNELS = {
    "kernels": Case(
        TTTPlan([Update(0, 6), Apply(0, 4), Update(6, 9), Apply(4, 9)]), (5, 4), (7, 2), B=2,
        options={"prenorm": True}, given="momentum",
    ),
}  # fmt: skip


def is_as_exact(name):
    """Error against float64 by that of one process in float32."""
    case = KERNELS[name]
    (exact, _, exact_grads), _ = on_ranks(case, torch.float64)
    (same, _, same_grads), (o, _, grads) = on_ranks(case, torch.float32, "triton")
    assert_close_to_float64(o, same, exact, "o")
    for label, grad in grads.items():
        assert_close_to_float64(grad, same_grads[label], exact_grads[label], label)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(two_ranks: Ranks, name):
    two_ranks.run(is_as_exact, name)


def call_without_gradients():
    case = CASES["bidirectional"]
    mesh = mesh_of(case.size)
    mine = case.mine(mesh.get_group())
    x = inputs(case, torch.float32)
    how = {"plan": case.plan.shard(queries=mine[0], keys=mine[1]), "group": mesh}
    whole = lact_kernels.ttt(**x, plan=case.plan)[:, slice(*mine[0])]
    with torch.inference_mode():
        o = ttt(**take(x, mine), **how)
    assert not o.requires_grad
    torch.testing.assert_close(o, whole)
    x |= {name: x[name].bfloat16() for name in ("q", "lr0", "w1")}  # as linear layers give them
    with torch.autocast("cpu", torch.bfloat16):
        o = ttt(**take(x, mine), **how)
        whole = lact_kernels.ttt(**x, plan=case.plan)[:, slice(*mine[0])]
    one_rounding = torch.finfo(o.dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(o, whole, rtol=0, atol=one_rounding)


def test_without_gradients_and_under_autocast(ranks: Ranks):
    ranks.run(call_without_gradients)


def messages(case, backward):
    mesh = mesh_of(case.size)
    mine = case.mine(mesh.get_group())
    x = take(inputs(case, torch.float32), mine)
    x = {name: value if value is None else value.requires_grad_() for name, value in x.items()}
    how = {"plan": case.plan.shard(queries=mine[0], keys=mine[1]), "group": mesh} | case.options
    ttt(**x, **how)  # the ranks agree on what they call
    with counted() as counts:
        o = ttt(**x, **how)
        if backward:
            counts.clear()
            o.sum().backward()
    return dict(counts)


SIZES = {"lr0": H * DH * DK, "lr1": H * DV * DH, "lr2": H * DH * DK}


@pytest.mark.parametrize("name", ["any-order", "without-norms", "detached-norms", "no-update"])
@pytest.mark.parametrize("backward", [False, True])
def test_sends_one_sum_per_update(ranks: Ranks, name, backward):
    """No update is left out, and nothing is sent per token."""
    case = CASES[name]
    updates = sum(isinstance(step, Update) for step in case.plan.steps)
    summed = sum(size for lr, size in SIZES.items() if backward or lr not in case.given)
    calls, elements = updates, updates * case.B * summed
    size = 4 * elements
    if "momentum" in case.given and updates:  # whose sums the eager backward takes again
        calls, elements = calls + 1, elements + updates * case.B * H
        size += 4 * updates * case.B * H
        if not backward:  # the numbers of keys
            calls, elements, size = calls + 1, elements + updates, size + 8 * updates
    expected = {"all_reduce calls": calls, "all_reduce": elements, "all_reduce bytes": size}
    for counts in ranks.run(messages, case, backward)[: case.size]:
        assert counts == {kind: number for kind, number in expected.items() if number}


def changed(change, rank=1):
    """The error of a call in which one rank has something else than in the call before."""
    mesh = mesh_of(4)
    case = dataclasses.replace(CASES["any-order"], given="momentum")
    mine = case.mine(mesh.get_group())
    x = take(inputs(case, torch.float32), mine)
    how = {"plan": case.plan.shard(queries=mine[0], keys=mine[1]), "group": mesh}
    ttt(**x, **how)
    if mesh.get_local_rank() == rank:
        change = {"k": x["k"][:, 1:]} if change == "fewer keys" else change
        x, how = ({key: change.get(key, value) for key, value in y.items()} for y in (x, how))
        how |= {key: value for key, value in change.items() if key not in x}
    return catches(lambda: ttt(**x, **how))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": TTTPlan([Update(0, 1)])}, "different number of updates: 4 on rank 0, 1 on rank 1"),
        ({"lr1": None}, "different trained weights: ('w0', 'w1', 'w2') on rank 0, ('w0', 'w2') on rank 1"),
        ({"momentum": None}, "different momentum: True on rank 0, False on rank 1"),
        ({"muon": TRIPLES}, "different muon: False on rank 0"),
        ({"checkpoint_interval": 2}, "different checkpoint_interval: 1 on rank 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_ranks_that_disagree_all_say_so(ranks: Ranks, change, message):
    for text in ranks.run(changed, change):
        assert text.startswith("ValueError: the ranks call ttt with ") and message in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": TTTPlan([Update(0, 9)] * 4)}, "ValueError: step 0 of plan, Update(0, 9), goes beyond"),
        ({"plan": [TTTPlan([])]}, "TypeError: plan must be one TTTPlan"),
        ("fewer keys", "ValueError: v must have the shape"),
        ({"lr0": None, "lr1": None, "lr2": None}, "ValueError: lr0, lr1 and lr2 are all None"),
    ],
    ids=["plan", "plans", "keys", "rates"],
)  # fmt: skip
def test_one_wrong_argument_is_an_error_on_all_ranks(ranks: Ranks, change, message):
    texts = ranks.run(changed, change)
    assert texts[1].startswith(message)
    for text in texts[:1] + texts[2:]:
        assert text.startswith(f"RuntimeError: rank 1 of 4 failed: {message}")


def groups_that_do_not_fit():
    x = take(inputs(CASES["no-update"], torch.float32), [(0, 5), (0, 5)])
    mesh = device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    return [catches(lambda y: ttt(**x, plan=TTTPlan([]), group=y), y) for y in (None, mesh)]


def test_wrong_groups(ranks: Ranks):
    for texts in ranks.run(groups_that_do_not_fit):
        assert (
            texts[0] == "TypeError: group must be a ProcessGroup or a 1-D DeviceMesh, got NoneType"
        )
        assert texts[1].startswith("ValueError: group must have one dimension, got ('data',")


def test_shards_of_a_plan():
    plan = TTTPlan([Update([(0, 4), (6, None)]), Apply(2, 5), Apply(4), Update(0, 3), Apply(0, 3)])
    assert plan.shard(queries=(3, 8), keys=(2, 7)) == TTTPlan(
        [Update([(0, 2), (4, 5)]), Apply(0, 2), Apply(1, 5), Update(0, 1)]
    )
    assert plan.shard(queries=(2, 2), keys=(4, 6)) == TTTPlan([Update(0, 0)] * 2)
    with pytest.raises(ValueError, match="keys must have a range 0 <= start <= stop"):
        plan.shard(queries=(0, 1), keys=(2, 1))
    with pytest.raises(TypeError, match="stop of queries must be an int, got None"):
        plan.shard(queries=(0, None), keys=(0, 1))
