"""Cutting a sequence anywhere and passing the state on gives the outputs of one call."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lact_kernels import TTTState, block_causal_ttt
from lact_kernels.ops import fast_weights as ops
from tests.cases import TTT_OPTIONS, TTTCase, tensors_of

TOKENS = ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")
CUTS = {
    "at chunk borders": (4, 8),
    "inside chunks": (3, 5, 6, 10),
    "token by token": tuple(range(1, 11)),
    "with empty pieces": (0, 4, 4, 7, 7, 11),
    "across several chunks": (2, 10),
}


def tokens_at(inputs, start, stop):
    """The inputs of one call, its tokens cut out."""
    return {name: x[:, start:stop] if name in TOKENS else x for name, x in inputs.items()}


def run_in_pieces(inputs, options, cuts):
    outputs, state = [], None
    T = inputs["q"].shape[1]
    for start, stop in zip((0, *cuts), (*cuts, T)):
        piece = tokens_at(inputs, start, stop)
        o, state = block_causal_ttt(**piece, **options, initial_state=state, return_state=True)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_cuts_change_nothing(case, cuts):
    inputs, options = case.inputs(torch.float64), case.options()
    whole = block_causal_ttt(**inputs, **options)
    pieces, _ = run_in_pieces(inputs, options, cuts)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    do = torch.randn_like(whole)
    leaves = list(inputs.values())
    for name, ours, expected in zip(
        inputs, torch.autograd.grad(pieces, leaves, do), torch.autograd.grad(whole, leaves, do)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7, msg=f"d{name}")


@pytest.mark.parametrize("muon,bound", [(False, 1e-4), (True, 2e-2)], ids=["plain", "muon"])
def test_cuts_in_float32(muon, bound):
    case = TTTCase("", T=130, chunk_size=32, Dk=16, Dv=16, Dh=16, momentum=True, muon=muon)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    whole = block_causal_ttt(**inputs, **case.options())
    for cuts in ((1, 64, 65), tuple(range(1, 130, 7))):
        pieces, _ = run_in_pieces(inputs, case.options(), cuts)
        assert (pieces - whole).abs().max() <= bound * whole.abs().max()


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_packed_sequences_go_on(case):
    """Three sequences, packed in every call, at different places of their chunks."""
    case = dataclasses.replace(case, B=3, T=13)
    inputs, options = case.inputs(torch.float64), case.options()
    whole = block_causal_ttt(**inputs, **options)
    cuts = [(0, 0, 0), (2, 4, 0), (2, 7, 5), (3, 8, 6), (9, 12, 7), (13, 13, 13)]
    state, outputs = None, [[], [], []]
    for before, after in zip(cuts, cuts[1:]):
        spans = list(zip(before, after))
        packed = {
            name: torch.cat([x[n, a:b] for n, (a, b) in enumerate(spans)])[None]
            if name in TOKENS
            else x
            for name, x in inputs.items()
        }
        lengths = torch.tensor([b - a for a, b in spans])
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        o, state = block_causal_ttt(
            **packed, **options, cu_seqlens=cu_seqlens, initial_state=state, return_state=True
        )
        assert state.pending_lengths == tuple(b % 4 for b in after)
        for n, part in enumerate(o[0].split(lengths.tolist())):
            outputs[n].append(part)
    ours = torch.stack([torch.cat(parts) for parts in outputs])
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-9)
    leaves = list(inputs.values())
    for name, *pair in zip(
        inputs, torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(whole.sum(), leaves)
    ):
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-7, msg=f"d{name}")


@pytest.fixture
def op_calls(monkeypatch):
    """How many keys each call of the registered op is given."""
    calls = []
    original = ops.ttt_fwd

    def spy(q, k, *args):
        calls.append(k.shape[1])
        return original(q, k, *args)

    monkeypatch.setattr(ops, "ttt_fwd", spy)
    return calls


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_rows_at_different_places_go_on_together(case, op_calls):
    """Rows that stand 1, 0 and 2 tokens after an update, in one dense call."""
    prompts, new = (5, 8, 2), 7
    case = dataclasses.replace(case, B=3, T=15)
    inputs, options = case.inputs(torch.float64), case.options()
    whole = block_causal_ttt(**inputs, **options)
    expected = torch.cat([whole[n, : p + new] for n, p in enumerate(prompts)])

    before, states = [], []
    for n, p in enumerate(prompts):
        prompt = {name: x[n : n + 1, :p] if name in TOKENS else x for name, x in inputs.items()}
        o, state = block_causal_ttt(**prompt, **options, return_state=True)
        before.append(o[0])
        states.append(state)
    rows = {
        name: torch.stack([x[n, p : p + new] for n, p in enumerate(prompts)])
        if name in TOKENS
        else x
        for name, x in inputs.items()
    }
    options["initial_state"] = TTTState.stack(states)
    op_calls.clear()
    after, state = block_causal_ttt(**rows, **options, return_state=True)
    assert op_calls == [sum(p % 4 + new for p in prompts)]
    assert state.pending_lengths == (0, 3, 1)
    ours = torch.cat([x for pair in zip(before, after) for x in pair])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    do, leaves = torch.randn_like(ours), list(inputs.values())
    for name, *pair in zip(
        inputs, torch.autograd.grad(ours, leaves, do), torch.autograd.grad(expected, leaves, do)
    ):
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-7, msg=f"d{name}")
    assert torch.equal(block_causal_ttt(**rows, **options), after)


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_rows_that_came_to_the_same_place_in_different_pieces(case):
    """Rows of 1 + 1 and 0 + 2 tokens have two each, and go on as a batch."""
    case = dataclasses.replace(case, B=2, T=11)
    inputs, options = case.inputs(torch.float64), case.options()
    whole = block_causal_ttt(**inputs, **options)
    state, outputs = None, []
    for spans in (((0, 1), (0, 0)), ((1, 2), (0, 2))):
        packed = {
            name: torch.cat([x[n, a:b] for n, (a, b) in enumerate(spans)])[None]
            if name in TOKENS
            else x
            for name, x in inputs.items()
        }
        borders = torch.tensor([0, spans[0][1] - spans[0][0], packed["q"].shape[1]]).int()
        _, state = block_causal_ttt(
            **packed, **options, cu_seqlens=borders, initial_state=state, return_state=True
        )
    assert state.pending_lengths == (2, 2) and [x.lengths for x in state.pending] == [
        (1, 0),
        (1, 2),
    ]
    for start, stop in ((2, 3), (3, 6), (6, 11)):  # waiting on, filling a chunk, going on
        piece = tokens_at(inputs, start, stop)
        o, state = block_causal_ttt(**piece, **options, initial_state=state, return_state=True)
        outputs.append(o)
    ours, expected, leaves = torch.cat(outputs, dim=1), whole[:, 2:], list(inputs.values())
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for name, *pair in zip(
        inputs, torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    ):
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-7, msg=f"d{name}")


def test_packed_sequences_are_scanned_together(op_calls):
    """With a state as without, whether they fill a chunk or not."""
    case = TTTCase("", B=1, T=14, cu_seqlens=(0, 9, 9, 14), momentum=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    _, state = block_causal_ttt(**inputs, **case.options(), return_state=True)
    assert op_calls == [14] and state.pending_lengths == (1, 0, 1)
    block_causal_ttt(**inputs, **case.options(), initial_state=state)
    assert op_calls == [14, 16]


class CountElements(TorchDispatchMode):
    """Elements of all tensors that are made under it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("new", [2, 6], ids=["without an update", "with updates"])
@pytest.mark.parametrize("packed", [False, True])
def test_work_is_proportional_to_the_number_of_sequences(packed, new):
    """Forward and backward, of sequences at two places of their chunks."""
    work = {}
    for N in (8, 32):
        shape = {"B": 1, "T": N * new} if packed else {"B": N, "T": new}
        inputs = TTTCase("", **shape, H=1, Dk=4, Dv=4, Dh=4).inputs(torch.float32)
        options = {"chunk_size": 4}
        if packed:
            options["cu_seqlens"] = torch.arange(N + 1, dtype=torch.int32) * new
        one = TTTCase("", B=N // 2, T=1, H=1, Dk=4, Dv=4, Dh=4).inputs(torch.float32)
        _, behind = block_causal_ttt(**one, chunk_size=4, return_state=True)
        _, fresh = block_causal_ttt(**tokens_at(one, 0, 0), chunk_size=4, return_state=True)
        state = TTTState.stack([behind, fresh]).map(lambda x: x.detach().requires_grad_())
        with CountElements() as elements:
            o, state = block_causal_ttt(**inputs, **options, initial_state=state, return_state=True)
            outputs = [x for x in tensors_of((o, state)) if x.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        work[N] = elements.count
    assert work[32] < 4.1 * work[8]


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_a_state_does_not_depend_on_the_checkpoints(case):
    inputs, options = case.inputs(torch.float64), case.options()
    results = []
    for intervals in ((1, 1), (2, 1), (1, 3)):
        state, outputs = None, []
        for (start, stop), interval in zip(((0, 6), (6, 11)), intervals):
            o, state = block_causal_ttt(
                **tokens_at(inputs, start, stop),
                **options,
                initial_state=state,
                return_state=True,
                checkpoint_interval=interval,
            )
            outputs.append(o)
        outputs = [*outputs, *tensors_of((o, state))]
        grads = torch.autograd.grad(
            outputs, list(inputs.values()), [torch.ones_like(x) for x in outputs]
        )
        results.append([*outputs, *grads])
    for result in results[1:]:
        for ours, expected in zip(result, results[0]):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_packed_prefill_then_dense_decoding():
    """Prompts of different lengths in one packed call, then one token for each at a time."""
    prompts, T = (5, 8, 2), 12
    case = TTTCase("", B=3, T=T, momentum=True, prenorm=True)
    inputs, options = case.inputs(torch.float64), case.options()
    inputs = {name: x.detach() for name, x in inputs.items()}
    whole = block_causal_ttt(**inputs, **options)
    packed = {
        name: torch.cat([x[n, :p] for n, p in enumerate(prompts)])[None] if name in TOKENS else x
        for name, x in inputs.items()
    }
    cu_seqlens = torch.tensor([0, 5, 13, 15], dtype=torch.int32)
    _, state = block_causal_ttt(**packed, **options, cu_seqlens=cu_seqlens, return_state=True)
    for step in range(T - max(prompts)):
        token = {
            name: torch.stack([x[n, p + step : p + step + 1] for n, p in enumerate(prompts)])
            if name in TOKENS
            else x
            for name, x in inputs.items()
        }
        o, state = block_causal_ttt(**token, **options, initial_state=state, return_state=True)
        expected = torch.stack([whole[n, p + step : p + step + 1] for n, p in enumerate(prompts)])
        torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)


def test_decoding_neither_updates_nor_recomputes(op_calls):
    """Up to the last token of a chunk, a token reads its own k and v, and no earlier one's."""
    case = TTTCase("", T=8, chunk_size=8)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    _, state = run_in_pieces(inputs, case.options(), range(1, 8))
    assert op_calls == [1] * 7 + [8]  # the eighth token fills the chunk, which is then read once
    assert state.pending == ()


def test_waiting_tokens_are_merged_into_few_pieces():
    case = TTTCase("", T=63, chunk_size=64)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    _, state = run_in_pieces(inputs, case.options(), range(1, 63))
    assert state.pending_lengths == (63, 63)
    assert len(state.pending) <= 6
    waiting = torch.cat([piece.k for piece in state.pending], dim=1)
    assert torch.equal(waiting, inputs["k"])


def test_state_holds_the_weights_of_the_reference():
    """With pre-norm the weights are the masters, rescaled to the norms of the initial weights."""
    case = TTTCase("", prenorm=True, momentum=True)
    inputs = case.inputs(torch.float64)
    _, state = block_causal_ttt(**inputs, **case.options(), return_state=True)
    assert state.num_sequences == 2 and state.pending_lengths == (3, 3)
    for w, m, norm, initial in zip(state.weights, state.masters, state.norms, ("w0", "w1", "w2")):
        torch.testing.assert_close(norm, inputs[initial].norm(dim=-1).expand(norm.shape))
        rescaled = m / (m.norm(dim=-1, keepdim=True) + 1e-5) * norm[..., None]
        torch.testing.assert_close(w, rescaled)


def test_state_does_not_share_memory_with_the_weights():
    inputs = TTTCase("", T=2).inputs(torch.float32)
    _, state = block_causal_ttt(**inputs, chunk_size=4, return_state=True)
    before = state.weights[0].detach().clone()
    with torch.no_grad():
        inputs["w0"].zero_()  # as an optimizer's step would
    assert torch.equal(state.weights[0], before)


def test_state_keeps_copies_of_its_tokens():
    """A caller may reuse the memory of k, and a long call is not kept alive by its last tokens."""
    inputs = {k: x.detach() for k, x in TTTCase("", T=11).inputs(torch.float32).items()}
    for start, stop in ((0, 2), (0, 6)):  # without an update, and after one
        first = {name: x.clone() for name, x in tokens_at(inputs, start, stop).items()}
        _, state = block_causal_ttt(**first, chunk_size=4, return_state=True)
        kept = state.pending[0].k
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        before = kept.clone()
        first["k"].zero_()
        assert torch.equal(kept, before)


def test_one_state_may_be_continued_twice():
    case = TTTCase("", T=11)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    first, rest = tokens_at(inputs, 0, 6), tokens_at(inputs, 6, 11)
    _, state = block_causal_ttt(**first, chunk_size=4, return_state=True)
    once, _ = block_causal_ttt(**rest, chunk_size=4, initial_state=state, return_state=True)
    twice = block_causal_ttt(**rest, chunk_size=4, initial_state=state)
    assert torch.equal(once, twice)


def test_entries_and_stack():
    case = TTTCase("", T=7, momentum=True, prenorm=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    _, state = block_causal_ttt(**inputs, chunk_size=4, return_state=True)
    swapped = TTTState.stack([state.entry(1), state.entry(0)])
    assert swapped.pending_lengths == (3, 3)
    assert torch.equal(swapped.weights[1][0], state.weights[1][1])
    assert torch.equal(swapped.pending[0].v[0], state.pending[0].v[1])
    with pytest.raises(ValueError, match="cannot stack"):
        TTTState.stack([state, state._replace(chunk_size=8)])
    with pytest.raises(ValueError, match="of torch.float32 and torch.bfloat16 tokens"):
        TTTState.stack([state, state._replace(dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="at least one"):
        TTTState.stack([])
    with pytest.raises(TypeError, match="rows must be an int64 tensor"):
        state.select([0])
    for rows in ([2], [-1], [[0]]):
        with pytest.raises(ValueError, match="rows must name sequences of 0 .. 1"):
            state.select(torch.tensor(rows))
    for n in (-1, 2):
        with pytest.raises(IndexError, match=f"n must be from 0 to 1, got {n}"):
            state.entry(n)


def test_map_detaches_every_tensor():
    inputs = TTTCase("", T=6).inputs(torch.float32)
    _, state = block_causal_ttt(**inputs, chunk_size=4, return_state=True)
    detached = state.map(torch.Tensor.detach)
    assert state.weights[0].requires_grad and state.pending[0].k.requires_grad
    assert not detached.weights[0].requires_grad and not detached.pending[0].k.requires_grad
