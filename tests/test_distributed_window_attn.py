"""`window_attn` of sequences in pieces, against one process: values, gradients, and what is sent."""

import numpy as np
import pytest
import torch

import lact_kernels
import reference
from lact_kernels.distributed import SequencePieces, window_attn
from tests.cases import filled_with_nan
from tests.ranks import Ranks, counted, mesh_of
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.xdist_group("ranks")

# What each case is there for: ranks, tokens of each, window, borders of packed sequences, rows.
CASES = {
    "even": (2, (20, 20), 7, None, 2),
    "uneven": (4, (13, 2, 18, 7), 9, None, 2),
    "window-of-a-piece": (4, (10, 10, 10, 10), (9, 0), None, 1),
    "window-of-a-piece-and-one": (4, (10, 10, 10, 10), 12, None, 1),
    "window-longer-than-pieces": (4, (13, 0, 20, 7), 25, None, 2),
    "window-longer-than-all": (4, (13, 10, 10, 7), 1000, None, 1),
    "no-window": (4, (13, 10, 10, 7), None, None, 1),
    "window-of-one": (2, (20, 20), 1, None, 2),
    "packed": (4, (13, 10, 10, 7), 9, (0, 5, 5, 20, 40), 1),
    "packed-at-borders": (4, (5, 15, 0, 20), 9, (0, 5, 5, 20, 40), 1),
    "packed-longer-than-sequences": (2, (17, 23), np.int64(30), (0, 5, 16, 18, 40), 1),
    "empty-pieces": (4, (0, 3, 0, 0), 5, None, 1),
    "no-tokens": (2, (0, 0), 5, None, 1),
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
    size, lengths, window_size, cu_seqlens, B = CASES[name]
    mesh, T = mesh_of(size), sum(lengths)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    tensors = inputs(T, B, dtype)
    do, dlse = torch.randn(B, T, 4, 6).to(dtype), torch.randn(B, 4, T).to(dtype)

    def one_process(*x):
        return lact_kernels.window_attn(*x, window_size, cu_seqlens=borders, return_lse=True)

    def plain(*x):
        return reference.window_attn(*x, window_size, cu_seqlens=borders, return_lse=True)

    pieces = SequencePieces.of(mesh, lengths[mesh.get_local_rank()], borders)

    def in_pieces(*x):
        options = {"pieces": pieces, "return_lse": True, "backend": backend}
        return window_attn(*x, window_size, **options)

    mine = [pieces.take(x) for x in tensors]
    with filled_with_nan():
        actual = value_and_gradients(in_pieces, mine, pieces.take(do), pieces.take(dlse, 2))
    if dtype == torch.float64:
        expected = value_and_gradients(one_process, tensors, do, dlse)
        for i, (a, e) in enumerate(zip(actual, expected)):
            torch.testing.assert_close(a, pieces.take(e, 2 if i == 1 else 1), rtol=0, atol=1e-12)
        return
    same = value_and_gradients(plain, tensors, do, dlse)
    exact = value_and_gradients(plain, *([x.double() for x in tensors], do.double(), dlse.double()))
    names = ("o", "lse", "dq", "dk", "dv")
    for i, (label, a, s, e) in enumerate(zip(names, actual, same, exact)):
        dim = 2 if i == 1 else 1
        assert_close_to_float64(a, pieces.take(s, dim), pieces.take(e, dim), label)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name):
    ranks.run(equals_one_process, name, torch.float64, "eager")


@pytest.mark.parametrize("name", ["uneven", "packed"])
def test_is_as_exact_as_plain_pytorch(ranks: Ranks, name):
    ranks.run(equals_one_process, name, torch.float32, "eager")


@pytest.mark.parametrize("name", ["uneven", "packed"])
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
    q, k, v = (pieces.take(x).requires_grad_() for x in inputs(40, 2, torch.float32))
    with torch.autocast("cpu", torch.bfloat16), counted() as counts:
        o = window_attn(q, k, v, 9, pieces=pieces)
        assert o.dtype == torch.bfloat16
    o.sum().backward()
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32
    return counts["all_to_all_single bytes"]


def test_autocast_sends_its_own_dtype(ranks: Ranks):
    expected = 2 * 2 * 8 * 2 * (8 + 6)  # bytes, rows, tokens, heads, channels
    assert ranks.run(attention_under_autocast)[:3] == [expected] * 3
