"""The formulas of `benchmarks.scaling.counts` against what is really sent: elements, bytes and calls."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks.scaling import counts as formulas
from lact_kernels.distributed import SequencePieces, block_causal_ttt, window_attn
from tests.ranks import Ranks, counted, mesh_of

pytestmark = pytest.mark.xdist_group("ranks")

B = 2
DTYPES = {torch.float32: formulas.FLOAT32, torch.bfloat16: formulas.HALF}


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # of each rank's piece; all or two ranks
    momentum: bool = False
    prenorm: bool = False
    C: int = 8

    @property
    def T(self):
        return sum(self.lengths)

    @property
    def starts(self):
        return starts_of(self.lengths)

    def pieces(self):
        mesh = mesh_of(len(self.lengths))
        return SequencePieces.of(mesh, self.lengths[mesh.get_local_rank()])


def forward_and_backward(call):
    """What this rank sends in either, in a call about which the ranks have agreed before."""
    call()
    with counted() as forward:
        o = call()
    with counted() as backward:
        o.sum().backward()
    return dict(forward), dict(backward)


def column(sent, direction, kind):
    """Of all ranks."""
    return [rank[direction].get(kind, 0) for rank in sent]


def kinds(sent):
    return set().union(*(direction for rank in sent for direction in rank))


def starts_of(lengths):
    return [0, *itertools.accumulate(lengths)][:-1]


def sent_from(starts, reach):
    """Tokens that each rank sends to others."""
    sent = [0] * len(starts)
    for by_sender in formulas.halo_tokens(starts, reach):
        for sender, tokens in by_sender.items():
            sent[sender] += tokens
    return sent


# window_attn: its halo.

HKV, D, DV = 2, 8, 6


def window_sent(case, W, dtype):
    pieces = case.pieces()
    t, shapes = pieces.num_local_tokens, ((4, D), (HKV, D), (HKV, DV))
    tensors = [torch.randn(B, t, *shape).to(dtype).requires_grad_() for shape in shapes]
    return forward_and_backward(lambda: window_attn(*tensors, W, pieces=pieces))


WINDOWS = {
    "even": ((10, 10, 10, 10), 7),
    "uneven": ((13, 2, 18, 7), 9),
    "window longer than a piece": ((10, 3, 10, 7), 16),
    "window longer than all": ((4, 9), 1000),
    "two-sided": ((10, 10, 10, 10), (4, 3)),
    "two-sided, uneven": ((13, 2, 18, 7), (9, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths, W", WINDOWS.values(), ids=WINDOWS)
def test_window_halo(ranks: Ranks, lengths, W, dtype):
    case = Case(lengths)
    sent = ranks.run(window_sent, case, W, dtype)[: len(lengths)]
    left, right = W if isinstance(W, tuple) else (W - 1, 0)

    def halo(start, side):
        return formulas.window_halo_elements(start, side + 1, B, HKV, D, DV)

    # What is behind a piece is what is before it if all is read from the end.
    sides = (case.starts, left), (starts_of(lengths[::-1]), right)
    before, behind = ([halo(x, side) for x in starts] for starts, side in sides)
    received = [x + y for x, y in zip(before, behind[::-1])]
    before, behind = (sent_from(starts, [side] * len(lengths)) for starts, side in sides)
    others = [halo(1, 1) * (x + y) for x, y in zip(before, behind[::-1])]  # so many tokens
    for direction, expected in enumerate((others, received)):  # back goes what has come
        assert column(sent, direction, "all_to_all_single") == expected
        in_bytes = [DTYPES[dtype] * x for x in expected]
        assert column(sent, direction, "all_to_all_single bytes") == in_bytes
    assert kinds(sent) == {"all_to_all_single", "all_to_all_single bytes"}


# block_causal_ttt: multiples of 16 elements in a matrix, which the kernels do not round up.

H, DK, DH = 2, 4, 8
SHAPE = H, DK, 2 * DK, DH  # H, Dk, Dv, Dh


def ttt_sent(case, scheme, dtype, backend="eager"):
    pieces = case.pieces()
    t, (_, Dk, Dv, Dh) = pieces.num_local_tokens, SHAPE
    q, k = (torch.randn(B, t, H, Dk).to(dtype).requires_grad_() for _ in range(2))
    v = torch.randn(B, t, H, Dv).to(dtype).requires_grad_()
    weights = [torch.randn(H, *x) for x in ((Dh, Dk), (Dv, Dh), (Dh, Dk))]
    rates = [torch.rand(B, t, H) for _ in range(4)]
    floats = [x.requires_grad_() for x in (*weights, *rates)]
    options = {
        "momentum": floats.pop() if case.momentum else None,
        "prenorm": case.prenorm,
        "chunk_size": case.C,
    }
    how = {"pieces": pieces, "scheme": scheme, "backend": backend}
    return forward_and_backward(lambda: block_causal_ttt(q, k, v, *floats[:6], **options, **how))


CASES = {
    "even": Case((16, 16, 16, 16)),
    "not of whole chunks": Case((10, 10, 10, 10), momentum=True),
    "uneven, within a chunk, last one full": Case((13, 2, 18, 7), momentum=True, prenorm=True),
    "two ranks, borders in a last chunk": Case((9, 26), prenorm=True),
    "a border in the chunk that trains nothing": Case((33, 2), momentum=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_across_chunks(ranks: Ranks, case, dtype):
    n, C = len(case.lengths), case.C
    sent = ranks.run(ttt_sent, case, "across_chunks", dtype)[:n]
    chain = formulas.chain_elements(B, *SHAPE, case.prenorm, case.momentum)
    for direction, expected in enumerate(([chain] * (n - 1) + [0], [0] + [chain] * (n - 1))):
        assert column(sent, direction, "isend") == expected
        in_bytes = [formulas.FLOAT32 * x for x in expected]
        assert column(sent, direction, "isend bytes") == in_bytes

    def halo(start):
        return formulas.chunk_halo_elements(start, C, B, *SHAPE[:3], case.momentum)

    (keys, rates), tokens = halo(1), sent_from(case.starts, [x % C for x in case.starts])
    others = [(n * keys, n * rates) for n in tokens]
    for direction, expected in enumerate((others, [halo(x) for x in case.starts])):
        assert column(sent, direction, "all_to_all_single") == [sum(x) for x in expected]
        in_bytes = [DTYPES[dtype] * kv + formulas.FLOAT32 * x for kv, x in expected]
        assert column(sent, direction, "all_to_all_single bytes") == in_bytes
    calls = {"isend", "isend bytes", "isend calls"}
    assert kinds(sent) - {"all_to_all_single", "all_to_all_single bytes"} == calls


def assert_reduces_as_the_formulas_say(sent, case, backend):
    elements, number = formulas.chunk_allreduce_elements(case.T, case.C, B, *SHAPE)
    means = (0, 0)
    if case.momentum:
        means = formulas.momentum_allreduce_elements(case.T, case.C, B, H, backend)
    for direction, mean in enumerate(means):
        total = number * elements + mean
        expected = {
            "all_reduce": total,
            "all_reduce bytes": formulas.FLOAT32 * total,
            "all_reduce calls": number + (mean > 0),
        }
        for kind, value in expected.items():
            assert column(sent, direction, kind) == [value] * len(sent)
    assert kinds(sent) <= set(expected)


@cases
def test_within_chunks(ranks: Ranks, case):
    sent = ranks.run(ttt_sent, case, "within_chunks", torch.bfloat16)
    assert_reduces_as_the_formulas_say(sent, case, "eager")


@pytest.mark.parametrize("T", (8, 9, 16), ids=("one chunk", "and a token", "two chunks"))
def test_within_chunks_at_the_ends_of_chunks(ranks: Ranks, T):
    case = Case((5, T - 5), momentum=True)
    sent = ranks.run(ttt_sent, case, "within_chunks", torch.float32)
    assert_reduces_as_the_formulas_say(sent, case, "eager")


def test_within_chunks_of_the_kernels(two_ranks: Ranks):
    case = Case((3, 2), momentum=True, C=4)
    sent = two_ranks.run(ttt_sent, case, "within_chunks", torch.float32, "triton")
    assert_reduces_as_the_formulas_say(sent, case, "triton")
