"""`block_causal_ttt` of sequences in pieces, against one process: values, gradients, states, messages."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist

import lact_kernels
import reference
from lact_kernels import TTTTokens
from lact_kernels.distributed import SequencePieces, block_causal_ttt
from tests.cases import filled_with_nan
from tests.ranks import Ranks, counted, mesh_of
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.xdist_group("ranks")

TOKENS = ("q", "k", "v", "lr0", "lr1", "lr2", "momentum")
H, DK, DV, DH = 2, 4, 6, 5


@dataclasses.dataclass(frozen=True)
class Case:
    size: int
    lengths: tuple[int, ...] | None  # of each rank; None: pieces of chunks
    scheme: str
    chunk_size: int = 8
    T: int = 40
    B: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    before: tuple[int, ...] | None = (
        None  # tokens that an initial state has read, of all rows or each sequence
    )
    options: str = ""  # of momentum, muon, prenorm, own-weights, interval, ragged

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


ALL = "momentum muon prenorm own-weights"
PACKED = (0, 5, 5, 20, 40)
ACROSS = {
    "whole-chunks": Case(2, (16, 24), "across_chunks", options="momentum"),
    "unfinished-chunks": Case(2, (20, 20), "across_chunks", B=2),
    "uneven": Case(4, (13, 0, 20, 7), "across_chunks", B=2, options=ALL),
    "pieces-within-a-chunk": Case(
        4, (3, 2, 1, 34), "across_chunks", B=2, options="momentum interval"
    ),
    "behind-a-state": Case(4, (13, 0, 20, 7), "across_chunks", B=2, before=(11,), options=ALL),
    "behind-ragged-pieces": Case(
        4, (1, 2, 1, 36), "across_chunks", B=2, before=(3,), options="momentum ragged"
    ),
    "pieces-within-pending": Case(
        4, (1, 2, 1, 36), "across_chunks", before=(3,), options="prenorm"
    ),
    "packed": Case(4, (13, 10, 10, 7), "across_chunks", cu_seqlens=PACKED, options=ALL),
    "packed-behind-a-state": Case(
        4, (13, 10, 10, 7), "across_chunks", cu_seqlens=PACKED, before=(3, 0, 9, 15), options=ALL
    ),
    "packed-empty-at-the-ends": Case(
        4, (5, 0, 15, 20), "across_chunks", 4, cu_seqlens=(0, 0, 5, 20, 40, 40), options="prenorm"
    ),
    "no-update": Case(4, (3, 0, 0, 0), "across_chunks", T=3, options="momentum"),
    "empty-first-pieces": Case(4, (0, 0, 20, 20), "across_chunks", options="momentum"),
}
WITHIN = {
    "shared-chunks": Case(4, (13, 0, 20, 7), "within_chunks", 16, B=2, options=ALL),
    "two-ranks": Case(2, (20, 20), "within_chunks"),
    "state-before-shared-chunks": Case(
        4, (13, 0, 20, 7), "within_chunks", 16, B=2, before=(19,), options=ALL
    ),
    "ragged-before-shared-chunks": Case(
        4, (13, 0, 20, 7), "within_chunks", 16, B=2, before=(3,), options="ragged"
    ),
    "packed-shared-chunks": Case(
        4, (13, 10, 10, 7), "within_chunks", cu_seqlens=PACKED, before=(3, 0, 9, 15), options=ALL
    ),
    "checkpoints": Case(4, (10, 10, 10, 10), "within_chunks", 4, options="momentum interval"),
    "slices": Case(4, None, "within_chunks", B=2, options=ALL),
    "slices-packed": Case(
        4, None, "auto", cu_seqlens=PACKED, before=(8, 0, 16, 8), options="momentum interval"
    ),
}
CASES = ACROSS | WITHIN


def inputs(case, T, dtype):
    """Of all ranks."""
    shapes = {name: (case.B, T, H) for name in TOKENS}
    shapes |= {"q": (case.B, T, H, DK), "k": (case.B, T, H, DK), "v": (case.B, T, H, DV)}
    lead = (case.N,) if "own-weights" in case.options else ()
    shapes |= {"w0": (*lead, H, DH, DK), "w1": (*lead, H, DV, DH), "w2": (*lead, H, DH, DK)}
    if "momentum" not in case.options:
        del shapes["momentum"]
    x = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("k", "w0", "w1", "w2"):
        x[name] /= x[name].shape[-1] ** 0.5
    for name in ("lr0", "lr1", "lr2"):
        x[name] = 0.1 * x[name].sigmoid()
    if "momentum" in x:
        x["momentum"] = x["momentum"].sigmoid()
    return {name: value.to(dtype) for name, value in x.items()}


def options_of(case, backend="eager"):
    return {
        "chunk_size": case.chunk_size,
        "muon": "muon" in case.options,
        "prenorm": "prenorm" in case.options,
        "checkpoint_interval": 2 if "interval" in case.options else 1,
        "backend": backend,
    }


def borders_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tensors_of(state):
    fields = [x for triple in state[:4] for x in triple]
    return fields + [x for waiting in state.pending for x in waiting.tokens if x is not None]


def weighted_sum(x, y):
    return (x * y).sum()


def cotangent(x):
    return torch.cos(0.7 * torch.arange(x.numel(), dtype=torch.float64) + 1).view(x.shape).to(x)


def value_and_gradients(function, x, state, size=1, take=None, **options):
    """Outputs, the state's tensors, and gradients by name; states have a loss that all ranks share."""
    x = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    if state is not None:
        state = state.map(lambda s: s.detach().clone().requires_grad_())
    o, end = function(**x, **options, initial_state=state, return_state=True)
    loss = (o * take).sum() + sum((e * cotangent(e)).sum() for e in tensors_of(end)) / size
    leaves = x | dict(enumerate([] if state is None else tensors_of(state)))
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return o, end, dict(zip(leaves, grads))


def pieces_of(case):
    borders = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    mesh = mesh_of(case.size)
    if case.lengths is None:
        return SequencePieces.of_chunks(mesh, case.T, case.chunk_size, borders), borders
    return SequencePieces.of(mesh, case.lengths[mesh.get_local_rank()], borders), borders


def initial_state(case, x, dtype):
    if case.before is None:
        return None
    earlier = inputs(case, sum(case.before), dtype) | {w: x[w] for w in ("w0", "w1", "w2")}
    cu_seqlens = None if case.cu_seqlens is None else borders_of(case.before)
    _, state = lact_kernels.block_causal_ttt(
        **earlier, **options_of(case), cu_seqlens=cu_seqlens, return_state=True
    )
    return in_ragged_pieces(state) if "ragged" in case.options else state


def in_ragged_pieces(state):
    """The same state, row n of which has read n of its waiting tokens in another call than the others."""
    rows = state.pending[0].sequences()
    cut = [row.split([n, len(row.k) - n], dim=0) for n, row in enumerate(rows)]
    return state._replace(pending=tuple(map(TTTTokens.padded, zip(*cut))))


def in_pieces(case, dtype, backend="eager"):
    """Whole results of one process, and of this rank those of a call in pieces, gradients summed."""
    pieces, borders = pieces_of(case)
    x = inputs(case, case.T, dtype)
    state = initial_state(case, x, dtype)
    do = cotangent(x["q"][..., :1].expand(-1, -1, -1, DV))
    expected = value_and_gradients(
        lact_kernels.block_causal_ttt, x, state, take=do, **options_of(case), cu_seqlens=borders
    )
    mine = {name: pieces.take(value) if name in TOKENS else value for name, value in x.items()}
    how = {"pieces": pieces, "scheme": case.scheme}
    with filled_with_nan():
        o, end, grads = value_and_gradients(
            block_causal_ttt, mine, state, case.size, pieces.take(do),
            **options_of(case, backend), **how,
        )  # fmt: skip
    for name, grad in grads.items():
        if name not in TOKENS:
            grads[name] = grad.contiguous()
            dist.all_reduce(grads[name], group=pieces.group)
    return pieces, expected, (o, end, grads), (x, state, do)


def equals_one_process(name):
    case = CASES[name]
    pieces, (o, end, grads), (mine, my_end, my_grads), _ = in_pieces(case, torch.float64)

    def assert_equal(label, actual, expected):
        assert actual.shape == expected.shape, label
        if expected.numel():
            error, size = (actual - expected).abs().max(), expected.abs().max()
            assert error <= 1e-10 * size, f"{label}: {error} of {size}"

    assert_equal("o", mine, pieces.take(o))
    assert my_end.pending_lengths == end.pending_lengths and my_end.options == end.options
    for i, (a, e) in enumerate(zip(tensors_of(my_end), tensors_of(end), strict=True)):
        assert_equal(f"state {i}", a, e)
    for label, expected in grads.items():
        assert_equal(label, my_grads[label], pieces.take(expected) if label in TOKENS else expected)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name):
    ranks.run(equals_one_process, name)


def equals_one_process_without_a_state(name):
    """The last update of a sequence is left out, unless the next rank goes on with it."""
    case = CASES[name]
    pieces, borders = pieces_of(case)
    x = inputs(case, case.T, torch.float64)
    mine = {key: pieces.take(value) if key in TOKENS else value for key, value in x.items()}
    results = []
    for function, tensors, options in (
        (lact_kernels.block_causal_ttt, x, {"cu_seqlens": borders}),
        (block_causal_ttt, mine, {"pieces": pieces, "scheme": case.scheme}),
    ):
        tensors = {key: value.requires_grad_() for key, value in tensors.items()}
        o = function(**tensors, **options_of(case), **options)
        do = cotangent(x["q"][..., :1].expand(-1, -1, -1, DV))
        loss = (o * (do if function is lact_kernels.block_causal_ttt else pieces.take(do))).sum()
        results.append((o, dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()))))))
    (o, grads), (my_o, my_grads) = results
    torch.testing.assert_close(my_o, pieces.take(o), rtol=0, atol=1e-10)
    for key, expected in grads.items():
        actual = my_grads[key].contiguous()
        if key in TOKENS:
            expected = pieces.take(expected)
        else:
            dist.all_reduce(actual, group=pieces.group)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["uneven", "packed", "no-update", "shared-chunks", "slices-packed"]
)
def test_equals_one_process_without_a_state(ranks: Ranks, name):
    ranks.run(equals_one_process_without_a_state, name)


def is_as_exact(name, backend):
    """Error against float64 by that of one process in float32."""
    case = CASES[name]
    pieces, (same_o, _, same), (o, _, grads), (x, state, do) = in_pieces(
        case, torch.float32, backend
    )
    wide = {name: value.double() for name, value in x.items()}
    if state is not None:
        state = state.map(torch.Tensor.double)._replace(dtype=torch.float64)
    borders = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    exact_o, _, exact = value_and_gradients(
        lact_kernels.block_causal_ttt, wide, state, take=do.double(), **options_of(case),
        cu_seqlens=borders,
    )  # fmt: skip
    assert_close_to_float64(pieces.gather(o), same_o, exact_o, "o")
    whole = {name: pieces.gather(g) if name in TOKENS else g for name, g in grads.items()}
    whole, same, exact = (with_pending(g, state) for g in (whole, same, exact))
    for label, grad in whole.items():
        assert_close_to_float64(grad, same[label], exact[label], str(label))


def with_pending(grads, state):
    """The few pending tokens of a state beside the new ones: alone they are too few to judge rounding by."""
    grads = dict(grads)
    names = [name for name in TOKENS[1:] if name in grads]
    pending = [] if state is None else [x for waiting in state.pending for x in waiting.tokens]
    pending = [x for x in pending if x is not None]
    fields = 0 if state is None else len(tensors_of(state)) - len(pending)
    for i in range(len(pending)):
        name = names[i % len(names)]
        grads[name] = torch.cat([grads[name].flatten(), grads.pop(fields + i).flatten()])
    return grads


@pytest.mark.parametrize("name", ["uneven", "packed", "two-ranks", "slices"])
def test_is_as_exact_as_one_process(ranks: Ranks, name):
    ranks.run(is_as_exact, name, "eager")


KERNELS = {
    "across-kernels": Case(4, (3, 10, 0, 11), "across_chunks", T=24, cu_seqlens=(0, 5, 5, 20, 24),
                           before=(3, 0, 9, 5), options="momentum prenorm"),
    "within-kernels": Case(4, (3, 10, 0, 2), "within_chunks", T=15, before=(2,), options="momentum prenorm"),
    "rows-kernels": Case(2, (9, 0), "within_chunks", 4, 9, 2, before=(5,), options="momentum"),
    "slices-kernels": Case(2, None, "auto", T=20, cu_seqlens=(0, 17, 20), options="prenorm interval"),
}  # fmt: skip
CASES |= KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(request, name):
    group = request.getfixturevalue({2: "two_ranks", 4: "ranks"}[KERNELS[name].size])
    group.run(is_as_exact, name, "triton")


def muon_kernels_are_close(case):
    """Newton-Schulz magnifies rounding, and this is too small a sample to judge it by."""
    _, (_, _, expected), (_, _, grads), _ = in_pieces(case, torch.float32, "triton")
    for name in ("w0", "w1", "w2"):
        error = (grads[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-3, f"{name}: {error}"


def test_muon_kernels(two_ranks: Ranks):
    """Both ranks have tokens of the chunk, and one the token that sees its update."""
    case = Case(2, (3, 2), "within_chunks", 4, T=5, options="muon")
    two_ranks.run(muon_kernels_are_close, case)


def test_reference_agrees():
    """The oracle of these tests, one process, is the reference's equal in one of their cases."""
    x = inputs(CASES["uneven"], 40, torch.float64)
    options = options_of(CASES["uneven"])
    o = lact_kernels.block_causal_ttt(**x, **options)
    for name in ("backend", "checkpoint_interval"):
        del options[name]
    torch.testing.assert_close(o, reference.block_causal_ttt(**x, **options))


def communication(case, backward, return_state=False):
    pieces, _ = pieces_of(case)
    x = inputs(case, case.T, torch.float32)
    mine = {name: pieces.take(value) if name in TOKENS else value for name, value in x.items()}
    mine = {name: value.requires_grad_() for name, value in mine.items()}
    options = options_of(case) | {"pieces": pieces, "scheme": case.scheme}
    block_causal_ttt(**mine, **options)  # the ranks agree on what they call
    with counted() as counts:
        o = block_causal_ttt(**mine, **options)
        if backward:
            counts.clear()
            o.sum().backward()
    return dict(counts)


WEIGHTS = H * (2 * DH * DK + DV * DH)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("T", [64, 128])
def test_within_chunks_sends_one_sum_per_chunk(ranks: Ranks, T, backward):
    """3 weight gradients per chunk that has an update, nothing per token."""
    case = Case(4, None, "within_chunks", T=T, B=3)
    updates = T // case.chunk_size - 1
    for counts in ranks.run(communication, case, backward):
        assert counts.pop("all_reduce bytes") == 4 * counts["all_reduce"]
        assert counts == {"all_reduce calls": updates, "all_reduce": updates * 3 * WEIGHTS}


def test_within_chunks_sends_momentum_once(ranks: Ranks):
    case = Case(4, None, "within_chunks", T=64, B=3, options="momentum")
    updates = 64 // case.chunk_size - 1
    for counts in ranks.run(communication, case, False):
        assert counts["all_reduce calls"] == updates + 1
        assert counts["all_reduce"] == updates * 3 * (WEIGHTS + H)


@pytest.mark.parametrize("options, copies", [("", 1), ("momentum", 2), ("momentum prenorm", 3)])
@pytest.mark.parametrize("backward", [False, True])
def test_across_chunks_sends_the_weights_once(ranks: Ranks, options, copies, backward):
    case = Case(4, (16,) * 4, "across_chunks", T=64, B=3, options=options)
    message = 3 * copies * WEIGHTS
    sent = ranks.run(communication, case, backward)
    expected = [0, message, message, message] if backward else [message, message, message, 0]
    assert [counts.get("isend", 0) for counts in sent] == expected
    assert set().union(*sent) == {"isend", "isend calls", "isend bytes"}


def test_across_chunks_fetches_unfinished_chunks(ranks: Ranks):
    """Pieces of 10 tokens, chunks of 8: ranks 1, 2 and 3 begin 2, 4 and 6 tokens into a chunk."""
    case = Case(4, (10,) * 4, "across_chunks")
    per_token = H * (DK + DV + 3)
    sent = ranks.run(communication, case, False)
    elements = [counts.get("all_to_all_single", 0) for counts in sent]
    assert elements == [n * per_token for n in (2, 4, 6, 0)]


def scheme_is_chosen_by_shape(chunk_size, T):
    case = Case(4, None, "auto", chunk_size, T)
    pieces = SequencePieces.even(mesh_of(4), T)
    x = inputs(case, T, torch.float32)
    mine = {name: pieces.take(value) if name in TOKENS else value for name, value in x.items()}
    with counted() as counts:
        block_causal_ttt(**mine, pieces=pieces, chunk_size=chunk_size)
    return "all_reduce calls" in counts


def test_scheme_is_chosen_by_shape(ranks: Ranks):
    assert ranks.run(scheme_is_chosen_by_shape, 10, 40) == [False] * 4  # as many chunks as ranks
    assert ranks.run(scheme_is_chosen_by_shape, 11, 40) == [True] * 4


def call_without_gradients():
    case = CASES["uneven"]
    pieces, _ = pieces_of(case)
    x = inputs(case, case.T, torch.float32)
    mine = {name: pieces.take(value) if name in TOKENS else value for name, value in x.items()}
    whole = lact_kernels.block_causal_ttt(**x, **options_of(case))
    for scheme in ("across_chunks", "within_chunks"):
        with torch.inference_mode():
            o = block_causal_ttt(**mine, **options_of(case), pieces=pieces, scheme=scheme)
        assert not o.requires_grad
        torch.testing.assert_close(o, pieces.take(whole), rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            o = block_causal_ttt(**mine, **options_of(case), pieces=pieces, scheme=scheme)
        torch.testing.assert_close(o, pieces.take(whole), rtol=1e-3, atol=1e-4)


def test_without_gradients_and_under_autocast(ranks: Ranks):
    ranks.run(call_without_gradients)
