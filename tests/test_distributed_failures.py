"""Ranks that disagree, fail or die: every rank gets an error, and none waits for ever."""

import datetime
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lact_kernels.distributed import SequencePieces, block_causal_ttt, window_attn
from tests.ranks import RankError, Ranks, mesh_of
from tests.test_distributed_block_causal_ttt import CASES, TOKENS, inputs, options_of

pytestmark = pytest.mark.xdist_group("ranks")


def errors_of(ranks, function, *args):
    """What each rank raised, its last line."""
    with pytest.raises(RankError) as error:
        ranks.run(function, *args)
    return [text and text.strip().splitlines()[-1] for text in error.value.errors]


def catches(function, *args):
    """The exception of this rank, as text, so that the processes go on."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def attention(change, rank=2):
    """A call in which one rank has something else."""
    mesh = mesh_of(4)
    pieces = SequencePieces.even(mesh, 40)
    x = {name: torch.randn(2, 10, 2, 8) for name in "qkv"}
    options = {"window_size": 5}
    if mesh.get_local_rank() == rank:
        x, options = change(x, options)
    window_attn(*x.values(), **options, pieces=pieces)


CHANGES = {
    "window": lambda x, options: (x, {"window_size": 6}),
    "sides": lambda x, options: (x, {"window_size": (4, -1)}),
    "softcap": lambda x, options: (x, options | {"softcap": 30}),
    "sinks": lambda x, options: (x, options | {"sinks": torch.zeros(2)}),
    "heads": lambda x, options: ({name: y[:, :, :1] for name, y in x.items()}, options),
    "dtype": lambda x, options: ({name: y.double() for name, y in x.items()}, options),
    "rows": lambda x, options: ({name: y[:1] for name, y in x.items()}, options),
    "tokens": lambda x, options: ({name: y[:, 1:] for name, y in x.items()}, options),
    "type": lambda x, options: (x | {"k": None}, options),
}


def attention_changed(name):
    return catches(attention, CHANGES[name])


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "window",
            "different window_size: (4, 0) on rank 0, (4, 0) on rank 1, (5, 0) on rank 2, (4, 0)",
        ),
        (
            "sides",
            "different window_size: (4, 0) on rank 0, (4, 0) on rank 1, (4, -1) on rank 2, (4, 0)",
        ),
        (
            "softcap",
            "different softcap: None on rank 0, None on rank 1, 30.0 on rank 2, None on rank 3",
        ),
        (
            "sinks",
            "different sinks: None on rank 0, None on rank 1, (2,) on rank 2, None on rank 3",
        ),
        ("heads", "different heads of q: "),
        ("dtype", "different dtype: torch.float32 on rank 0"),
        ("rows", "different B: 2 on rank 0, 2 on rank 1, 1 on rank 2"),
    ],
)
def test_ranks_that_disagree_all_say_so(ranks: Ranks, name, message):
    for text in ranks.run(attention_changed, name):
        assert text.startswith("ValueError: the ranks call window_attn with ") and message in text


@pytest.mark.parametrize(
    "name, message",
    [
        ("tokens", "ValueError: q must have the 10 tokens of this rank's piece"),
        ("type", "TypeError: k must be a tensor"),
    ],
)
def test_one_wrong_argument_is_an_error_on_all_ranks(ranks: Ranks, name, message):
    texts = ranks.run(attention_changed, name)
    assert texts[2].startswith(message)
    for text in texts[:2] + texts[3:]:
        assert text.startswith(f"RuntimeError: rank 2 of 4 failed: {message}")


def fast_weights(options, changed, rank=1):
    case, mesh = CASES["two-ranks"], mesh_of(4)
    pieces = options.pop("pieces", SequencePieces.even)(mesh, 40)
    x = inputs(case, 40, torch.float32)
    x = {name: pieces.take(y) if name in TOKENS else y for name, y in x.items()}
    if mesh.get_local_rank() == rank:
        options = options | changed
    block_causal_ttt(**x, **(options_of(case) | options), pieces=pieces)


def fast_weights_changed(options, changed):
    return catches(fast_weights, options, changed)


def slices(mesh, T):
    return SequencePieces.of_chunks(mesh, T, 8)


@pytest.mark.parametrize(
    "options, changed, message",
    [
        ({}, {"chunk_size": 16}, "different chunk_size: 8 on rank 0, 16 on rank 1"),
        ({}, {"muon": True}, "different muon: False on rank 0, True on rank 1"),
        ({}, {"return_state": True}, "different return_state"),
        ({"scheme": "across_chunks"}, {"scheme": "within_chunks"}, "different scheme"),
        ({"scheme": "across"}, {}, "scheme must be one of auto, across_chunks, within_chunks"),
        ({"pieces": slices, "scheme": "across_chunks"}, {}, "needs contiguous pieces"),
        ({"pieces": slices, "chunk_size": 16}, {}, "pieces are of chunks of 8 tokens, and chunk_size is 16"),
    ],
)  # fmt: skip
def test_fast_weights_that_do_not_fit(ranks: Ranks, options, changed, message):
    for text in ranks.run(fast_weights_changed, options, changed):
        assert message in text


def differs_later(name):
    """Behind calls in which all was alike: rank 2 comes with what is new, or what was agreed on earlier."""
    mesh = mesh_of(4)
    pieces, others = (SequencePieces.even(mesh, T) for T in (40, 48))
    window_attn(*torch.randn(3, 1, 12, 2, 8), 5, pieces=others)
    for B in (1, 2):
        window_attn(*torch.randn(3, B, 10, 2, 8), 5, pieces=pieces)
    calls = {
        "new": lambda: window_attn(*torch.randn(3, 3, 10, 2, 8), 5, pieces=pieces),
        "agreed": lambda: window_attn(*torch.randn(3, 1, 10, 2, 8), 5, pieces=pieces),
        "wrong": lambda: window_attn(*torch.randn(3, 1, 10, 2, 8), 0, pieces=pieces),
        "pieces": lambda: window_attn(*torch.randn(3, 2, 12, 2, 8), 5, pieces=others),
    }
    other = mesh.get_local_rank() == 2
    usual = lambda: window_attn(*torch.randn(3, 2, 10, 2, 8), 5, pieces=pieces)  # noqa: E731
    return catches(calls[name] if other else usual)


@pytest.mark.parametrize(
    "name, message",
    [
        ("new", "window_attn with different B: 2 on rank 0, 2 on rank 1, 3 on rank 2, 2 on rank 3"),
        ("agreed", "window_attn with different B: 2 on rank 0, 2 on rank 1, 1 on rank 2, 2 on rank 3"),
        ("wrong", "window_size must be at least 1, got 0"),
        ("pieces", "window_attn with different pieces: [[(0, 10)], [(10, 20)], [(20, 30)], [(30, 40)]] on"),
    ],
)  # fmt: skip
def test_a_call_that_differs_later_has_a_name_at_once(ranks: Ranks, name, message):
    for text in ranks.run(differs_later, name):
        assert message in text


def pieces_refused():
    mesh = mesh_of(4)
    first = mesh.get_local_rank() == 0
    borders = torch.tensor([0, 7, 40], dtype=torch.int32)
    calls = [
        lambda: SequencePieces.of(mesh, -1 if first else 3),
        lambda: SequencePieces.of(mesh, 10, borders if first else None),
        lambda: SequencePieces.of(mesh, 9, borders),
        lambda: SequencePieces.of(mesh, 10, borders.long()),
        lambda: SequencePieces.even(mesh, 41 if first else 40),
        lambda: SequencePieces.even(mesh, 40, multiple_of=0),
        lambda: SequencePieces.of_chunks(mesh, 40, 8 if first else 4),
        lambda: SequencePieces.of(None, 10),
        lambda: SequencePieces.even(mesh, 40).take(torch.zeros(2, 39)),
        lambda: SequencePieces.even(mesh, 40).gather(torch.zeros(2, 9)),
        lambda: window_attn(*3 * [torch.randn(1, 10, 2, 4)], 3, pieces=slices(mesh, 40)),
    ]
    return [catches(call) for call in calls]


def test_pieces_that_do_not_fit(ranks: Ranks):
    messages = (
        "num_tokens must not be negative, got -1",
        "different cu_seqlens: [0, 7, 40] on rank 0, None on rank 1",
        "cu_seqlens must end at T = 36, got 40",
        "cu_seqlens must have the dtype torch.int32, got torch.int64",
        "different num_tokens: 41 on rank 0, 40 on rank 1",
        "multiple_of must be at least 1, got 0",
        "different chunk_size: 8 on rank 0, 4 on rank 1",
        "mesh must be a 1-D DeviceMesh, got NoneType",
        "x must have all 40 tokens in axis 1, got (2, 39)",
        "x must have this rank's 10 tokens in axis 1, got (2, 9)",
        "pieces must be contiguous for window_attn",
    )
    for texts in ranks.run(pieces_refused):
        for text, message in zip(texts, messages, strict=True):
            assert message in text


def layouts(T):
    """All tokens are somewhere, once, and come back in order."""
    mesh = mesh_of(4)
    borders = torch.tensor([0, 7, 7, T], dtype=torch.int32)
    x = torch.arange(2 * T).view(2, T, 1).double()
    for pieces in (
        SequencePieces.of(mesh, (T, 0, 0, 0)[mesh.get_local_rank()]),
        SequencePieces.even(mesh, T, borders),
        SequencePieces.even(mesh, np.int64(T), multiple_of=np.int32(8)),
        SequencePieces.of_chunks(mesh, T, np.int64(8), borders),
        SequencePieces.of_chunks(mesh, T, 3),
    ):
        mine = pieces.take(x).requires_grad_()
        assert mine.shape[1] == pieces.num_local_tokens
        whole = pieces.gather(mine)
        assert torch.equal(whole, x)
        (whole * x).sum().backward()  # of every rank
        assert torch.equal(mine.grad, 4 * pieces.take(x))
        lengths = (7, 0, T - 7) if pieces.packed else (T,)
        positions = torch.cat([torch.arange(n) for n in lengths])
        assert torch.equal(pieces.positions(), pieces.take(positions, dim=0))
        assert pieces.local_index(T) == pieces.num_local_tokens and pieces.local_index(0) == 0
        assert f"{pieces.num_local_tokens} of {T} tokens" in repr(pieces)
    return [len(r) for r in SequencePieces.even(mesh, 21, multiple_of=8).ranges]


def test_layouts(ranks: Ranks):
    assert ranks.run(layouts, 21) == [[1, 1, 1, 0]] * 4


# In groups of their own: what follows breaks them.


@pytest.fixture
def mortals():
    two = Ranks(2)
    yield two
    two.close()


def attention_of(pieces, window_size):
    x = [torch.randn(1, 10, 2, 8, requires_grad=True) for _ in range(3)]
    return window_attn(*x, window_size, pieces=pieces)


def no_more_patience(pieces):
    """What this group waits for from here on never comes: it may as well find out in a second.

    Only behind what all ranks have done: until then nothing but the machine decides how long it takes.
    """
    dist.barrier(pieces.group)
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), pieces.group)


def dies_after(pieces_made):
    mesh = mesh_of(2)
    if pieces_made:
        pieces = SequencePieces.even(mesh, 20)
        attention_of(pieces, 5)
    if mesh.get_local_rank() == 1:
        os._exit(7)
    attention_of(pieces if pieces_made else SequencePieces.even(mesh, 20), 5)


def forgets_the_backward():
    pieces = SequencePieces.even(mesh_of(2), 20)
    o = attention_of(pieces, 5)
    no_more_patience(pieces)
    if pieces.rank == 0:
        o.sum().backward()


@pytest.mark.parametrize("pieces_made", [True, False], ids=["in a call", "before its pieces"])
def test_a_rank_that_dies_is_an_error_on_the_other(mortals, pieces_made):
    """At once: it does not take the timeout of the group to hear of it."""
    first, second = errors_of(mortals, dies_after, pieces_made)
    assert second == "died: exit code 7"
    assert first.startswith("RuntimeError") and "Timed out" not in first


def test_a_backward_that_a_rank_forgets_is_an_error(mortals):
    first, second = errors_of(mortals, forgets_the_backward)
    assert "RuntimeError" in first
