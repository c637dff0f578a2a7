"""`window_attn` of sequences in pieces, against one process: values, gradients, and what is sent."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lact_kernels
import reference
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.distributed import SequencePieces, window_attn
from lact_kernels.distributed.window_attn import _Plan
from tests.cases import filled_with_nan
from tests.ranks import Ranks, counted, mesh_of
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.xdist_group("ranks")


class Case(NamedTuple):
    size: int  # ranks
    lengths: tuple[int, ...]  # tokens of each
    window_size: int | tuple[int, int] | None
    cu_seqlens: tuple[int, ...] | None = None  # borders of packed sequences
    B: int = 1
    softcap: float | None = None
    sinks: bool = False

    @property
    def T(self):
        return sum(self.lengths)

    @property
    def borders(self):
        if self.cu_seqlens is None:
            return None
        return torch.tensor(self.cu_seqlens, dtype=torch.int32)


PACKED = (0, 5, 5, 20, 40)
CASES = {
    "even": Case(2, (20, 20), 7, B=2),
    "uneven": Case(4, (13, 2, 18, 7), 9, B=2),
    "window-of-a-piece": Case(4, (10, 10, 10, 10), (9, 0)),
    "window-of-a-piece-and-one": Case(4, (10, 10, 10, 10), 12),
    "window-longer-than-pieces": Case(4, (13, 0, 20, 7), 25, B=2),
    "window-longer-than-all": Case(4, (13, 10, 10, 7), 1000),
    "no-window": Case(4, (13, 10, 10, 7), None),
    "window-of-one": Case(2, (20, 20), 1, B=2),
    "packed": Case(4, (13, 10, 10, 7), 9, PACKED),
    "packed-at-borders": Case(4, (5, 15, 0, 20), 9, PACKED),
    "packed-longer-than-sequences": Case(2, (17, 23), np.int64(30), (0, 5, 16, 18, 40)),
    "empty-pieces": Case(4, (0, 3, 0, 0), 5),
    "no-tokens": Case(2, (0, 0), 5),
    "two-sided": Case(4, (13, 2, 18, 7), (5, 3), B=2),
    "edges-that-meet": Case(4, (10, 10, 10, 10), (6, 4)),
    "edges-that-overlap": Case(4, (10, 10, 10, 10), (6, 5)),
    "sides-longer-than-pieces": Case(4, (5, 0, 3, 22), (9, np.int64(12))),
    "later-keys-only": Case(2, (20, 20), (0, 6), B=2),
    "no-limit-on-the-right": Case(4, (13, 10, 10, 7), (4, -1)),
    "no-limits": Case(4, (13, 0, 20, 7), (-1, -1), B=2),
    "packed-two-sided": Case(4, (5, 15, 0, 20), (4, 6), PACKED),
    "packed-last-of-several": Case(2, (17, 23), (3, 2), (0, 5, 9, 30, 40)),
    "two-sided-empty-pieces": Case(4, (0, 3, 0, 2), (2, 2)),
    "softcap": Case(4, (13, 2, 18, 7), 9, softcap=1.5),
    "sinks": Case(4, (13, 0, 20, 7), 9, B=2, sinks=True),
    "all-at-once": Case(4, (13, 10, 10, 7), (3, 4), PACKED, softcap=1.5, sinks=True),
}


def inputs(T, B, dtype):
    shapes = [(B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 6)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def value_and_gradients(attend, tensors, do, dlse):
    tensors = [x.detach().requires_grad_() for x in tensors]
    o, lse = attend(*tensors)
    loss = (o * do).sum() + (lse * dlse).sum()
    return o, lse, *torch.autograd.grad(loss, tensors)


def equals_one_process(name, dtype, backend):
    case = CASES[name]
    mesh, T, B, borders = mesh_of(case.size), case.T, case.B, case.borders
    tensors = inputs(T, B, dtype)
    sinks = [torch.randn(4, dtype=torch.float64).to(dtype)] if case.sinks else []
    do, dlse = torch.randn(B, T, 4, 6).to(dtype), torch.randn(B, 4, T).to(dtype)

    def attend_by(function, **options):
        def attend(q, k, v, sinks=None):
            return function(
                *(q, k, v, case.window_size),
                sinks=sinks,
                softcap=case.softcap,
                return_lse=True,
                **options,
            )

        return attend

    one_process = attend_by(lact_kernels.window_attn, cu_seqlens=borders)
    plain = attend_by(reference.window_attn, cu_seqlens=borders)
    pieces = SequencePieces.of(mesh, case.lengths[mesh.get_local_rank()], borders)
    in_pieces = attend_by(window_attn, pieces=pieces, backend=backend)
    axes = {"o": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}  # of tokens; all ranks have the sinks

    def mine(whole):
        parts = [pieces.take(x, axis) for x, axis in zip(whole, axes.values())]
        return parts + list(whole[len(axes) :])

    own = [pieces.take(x) for x in tensors] + sinks
    with filled_with_nan():
        actual = value_and_gradients(in_pieces, own, pieces.take(do), pieces.take(dlse, 2))
    for dsinks in actual[len(axes) :]:
        dist.all_reduce(dsinks, group=pieces.group)
    tensors += sinks
    if dtype == torch.float64:
        expected = mine(value_and_gradients(one_process, tensors, do, dlse))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
        return
    same = mine(value_and_gradients(plain, tensors, do, dlse))
    doubles = [x.double() for x in tensors], do.double(), dlse.double()
    exact = mine(value_and_gradients(plain, *doubles))
    for a, s, e, label in zip(actual, same, exact, (*axes, "dsinks")):
        assert_close_to_float64(a, s, e, label)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name):
    ranks.run(equals_one_process, name, torch.float64, "eager")


@pytest.mark.parametrize("name", ["uneven", "packed", "two-sided", "all-at-once"])
def test_is_as_exact_as_plain_pytorch(ranks: Ranks, name):
    ranks.run(equals_one_process, name, torch.float32, "eager")


@pytest.mark.parametrize("name", ["uneven", "packed", "all-at-once"])
def test_kernels(ranks: Ranks, name):
    ranks.run(equals_one_process, name, torch.float32, "triton")


def elements_sent(T, window_size, backward):
    mesh = mesh_of(4)
    pieces = SequencePieces.even(mesh, T)
    q, k, v = (pieces.take(x) for x in inputs(T, 3, torch.float32))
    v = torch.randn(3, k.shape[1], 2, 8)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    o = window_attn(*tensors, window_size, pieces=pieces)  # the ranks agree on what they call
    with counted() as counts:
        o = window_attn(*tensors, window_size, pieces=pieces)
        if backward:
            counts.clear()
            o.sum().backward()
    return dict(counts)


@pytest.mark.parametrize("backward", [False, True])
def test_sends_the_halo_and_nothing_else(ranks: Ranks, backward):
    """2 (W - 1) Hkv D elements per row, whatever T is: all that a rank receives forward, or sends back."""
    B, Hkv, D, W = 3, 2, 8, 11
    halo = B * 2 * (W - 1) * Hkv * D
    for T in (80, 160):
        sent = ranks.run(elements_sent, T, W, backward)
        # The last rank has no keys that others want, the first wants none.
        expected = [0, halo, halo, halo] if backward else [halo, halo, halo, 0]
        assert [counts.get("all_to_all_single", 0) for counts in sent] == expected
        assert set().union(*sent) == {"all_to_all_single", "all_to_all_single bytes"}


def test_sends_to_several_ranks(ranks: Ranks):
    """Pieces of 10 tokens, a window of 25: the last rank wants the two pieces before it, and 4 tokens."""
    sent = ranks.run(elements_sent, 40, 25, False)
    tokens = (10 + 10 + 4, 10 + 10, 10, 0)  # of each rank, wanted by later ones
    elements = [3 * 2 * 2 * 8 * n for n in tokens]
    assert [counts.get("all_to_all_single", 0) for counts in sent] == elements


def nothing_to_send():
    pieces = SequencePieces.even(mesh_of(4), 40)
    x = [pieces.take(x).requires_grad_() for x in inputs(40, 1, torch.float32)]
    with counted() as counts:
        window_attn(*x, 1, pieces=pieces).sum().backward()
    return set(counts)


def test_a_window_of_one_needs_no_other_rank(ranks: Ranks):
    assert ranks.run(nothing_to_send) == [{"all_gather_object"}] * 4


def attention_under_autocast():
    pieces = SequencePieces.even(mesh_of(4), 40)
    x = [pieces.take(x).requires_grad_() for x in inputs(40, 2, torch.float32)]
    sinks = torch.zeros(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), counted() as counts:
        o = window_attn(*x, 9, pieces=pieces, sinks=sinks)
        assert o.dtype == torch.bfloat16
    o.sum().backward()
    assert {y.grad.dtype for y in (*x, sinks)} == {torch.float32}
    return counts["all_to_all_single bytes"]


def test_autocast_sends_its_own_dtype(ranks: Ranks):
    expected = 2 * 2 * 8 * 2 * (8 + 6)  # bytes, rows, tokens, heads, channels
    assert ranks.run(attention_under_autocast)[:3] == [expected] * 3


# What calls a rank makes, of its positions as keys and queries.


def pieces_of(lengths, borders, rank):
    stops = list(itertools.accumulate(lengths))
    mesh = SimpleNamespace(
        get_group=lambda: None,
        get_local_rank=lambda: rank,
        size=lambda: len(lengths),
        device_type="cpu",
    )
    return SequencePieces(mesh, [[(stop - n, stop)] for n, stop in zip(lengths, stops)], borders)


def seen_in(call, options, queries, keys):
    """Pairs of a query and a key that it sees, by what the operation does with such a call."""
    left, right = call.options(options)[:2]
    assert right is None or right >= 0
    borders = [
        (0, len(x)) if b is None else b.tolist() for x, b in zip((queries, keys), call.borders)
    ]
    for (q0, q1), (k0, k1) in zip(*map(itertools.pairwise, borders), strict=True):
        for i, j in itertools.product(range(q0, q1), range(k0, k1)):
            behind = j - k1 - (i - q1)  # of the query's own key
            if (left is None or behind >= -left) and (right is None or behind <= right):
                yield queries[i], keys[j]


def check_plans(lengths, borders, left, right):
    """Every query is in one call with all keys that it sees; what none sees is not received, nor copied."""
    T, pairs, options = sum(lengths), set(), AttentionOptions(left, right, 1.0)
    low, high = (-math.inf if left is None else -left), (math.inf if right is None else right)
    for start, stop in itertools.pairwise([0, T] if borders is None else borders):
        tokens = range(start, stop)
        pairs |= {(i, j) for i in tokens for j in tokens if low <= j - i <= high}
    seen = []
    for rank in range(len(lengths)):
        pieces = pieces_of(lengths, borders, rank)
        plan, own = _Plan.of(pieces, left, right), range(pieces.start, pieces.stop)
        halo = sorted({j for i, j in pairs if i in own} - set(own))
        assert plan.halo.num_tokens == len(halo)
        own, halo = torch.tensor([own]), torch.tensor([halo], dtype=torch.long)
        calls = [*plan.edges, *plan.interior]
        for call in calls:
            keys = call.keys(own, halo)
            assert torch.equal(call.parts(keys)[1], own[:, call.own])
            queries, keys = own[0, call.queries].tolist(), keys[0].tolist()
            in_call = list(seen_in(call, options, queries, keys))
            assert call in plan.interior or {j for _, j in in_call} == set(keys)
            seen += in_call
        assert torch.equal(plan.in_order([own[:, call.queries] for call in calls], 1), own)
        assert torch.equal(torch.cat([own[:, call.own] for call in plan.interior], 1), own)
    assert len(seen) == len(pairs) and set(seen) == pairs


def test_plans_of_any_pieces():
    draw = random.Random(0)
    for _ in range(500):
        lengths = [draw.choice([0, 1, 2, draw.randint(0, 12)]) for _ in range(draw.randint(1, 4))]
        T, borders = sum(lengths), None
        if draw.random() < 0.6:
            borders = sorted([0, T, *(draw.randint(0, T) for _ in range(draw.randint(0, 5)))])
        left, right = (
            draw.choice([None, 0, draw.randint(1, 8), draw.randint(0, 30)]) for _ in "lr"
        )
        check_plans(lengths, borders, left, right)
