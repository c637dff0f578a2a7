"""`block_causal_ttt` on the eager backend, against the reference."""

import functools
import itertools

import pytest
import torch

import reference
from lact_kernels import block_causal_ttt
from lact_kernels.eager import swiglu
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from tests.cases import TTTCase, check_block_causal_ttt

eager_block_causal_ttt = functools.partial(block_causal_ttt, backend="eager")

OPTIONS = [
    TTTCase(
        " ".join(name for name, on in zip(("momentum", "muon", "prenorm"), flags) if on) or "plain",
        momentum=flags[0],
        muon=flags[1],
        prenorm=flags[2],
    )
    for flags in itertools.product((False, True), repeat=3)
]
PACKED = (0, 0, 3, 7, 7, 16, 24)  # nothing, less than a chunk, one chunk, more than two, two
SHAPES = [
    TTTCase("one token", T=1),
    TTTCase("one chunk", T=4),
    TTTCase("chunk minus one", T=3),
    TTTCase("chunk plus one", T=5),
    TTTCase("whole chunks", T=12),
    TTTCase("chunks of one token", T=5, chunk_size=1, momentum=True),
    TTTCase("chunk beyond T", T=5, chunk_size=100),
    TTTCase("no tokens", T=0),
    TTTCase("no batch", B=0),
    TTTCase("weights for each row", batched_weights=True, momentum=True, prenorm=True),
    TTTCase("wide hidden layer", Dk=8, Dv=3, Dh=20, T=9, muon=True),
    TTTCase("narrow hidden layer", Dk=9, Dv=12, Dh=2, T=9, muon=True),
    TTTCase("packed", B=1, T=24, cu_seqlens=PACKED, momentum=True, muon=True),
    TTTCase("packed prenorm", B=1, T=24, cu_seqlens=PACKED, prenorm=True, batched_weights=True),
    TTTCase("packed with nothing", B=1, T=0, cu_seqlens=(0, 0)),
    TTTCase("larger", B=2, T=300, chunk_size=96, H=3, Dk=32, Dv=24, Dh=40, momentum=True),
]
# float32 and half inputs at sizes where rounding has its usual statistics.
LARGER = [
    TTTCase(case.reason, B=2, T=250, chunk_size=64, H=2, Dk=24, Dv=20, Dh=32,
            momentum=case.momentum, muon=case.muon, prenorm=case.prenorm)
    for case in OPTIONS
]  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS + SHAPES, ids=str)
def test_float64_equals_the_reference(case):
    """In float64 nothing hides in rounding: the hand-written backward is autograd's."""
    inputs, options = case.inputs(torch.float64), case.options()
    expected, ours = (
        fn(**inputs, **options) for fn in (reference.block_causal_ttt, eager_block_causal_ttt)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    do = torch.randn_like(expected)
    leaves = list(inputs.values())
    for name, *grads in zip(
        inputs,
        torch.autograd.grad(ours, leaves, do, materialize_grads=True),
        torch.autograd.grad(expected, leaves, do, materialize_grads=True),
    ):
        scale = grads[1].abs().max().item() if grads[1].numel() else 1.0
        torch.testing.assert_close(
            *grads, rtol=0, atol=1e-9 * max(1.0, scale), msg=lambda m, name=name: f"d{name}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_against_float64(case, dtype):
    check_block_causal_ttt(eager_block_causal_ttt, case, dtype)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_gradcheck(case):
    case = TTTCase(
        case.reason, T=5, chunk_size=2, B=1, H=1, Dk=2, Dv=2, Dh=3,
        momentum=case.momentum, muon=case.muon, prenorm=case.prenorm,
    )  # fmt: skip
    inputs = case.inputs(torch.float64)

    def through_output_and_state(*tensors):
        o, state = block_causal_ttt(
            **dict(zip(inputs, tensors)), **case.options(), return_state=True
        )
        pending = [x for piece in state.pending for x in piece.tensors if x is not None]
        return o, *state.weights, *state.norms, *state.masters, *state.buffers, *pending

    torch.autograd.gradcheck(through_output_and_state, tuple(inputs.values()))


def test_gradcheck_packed():
    case = TTTCase("", T=7, chunk_size=2, B=1, H=1, Dk=2, Dv=2, Dh=2, cu_seqlens=(0, 0, 5, 7))
    inputs = case.inputs(torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: block_causal_ttt(**dict(zip(inputs, tensors)), **case.options()),
        tuple(inputs.values()),
    )


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 14])
def test_pieces_of_any_size_give_the_same(size, monkeypatch):
    monkeypatch.setattr(swiglu, "CPU_PIECE", size)
    monkeypatch.setattr(swiglu, "MIN_PIECE_TOKENS", 1)
    check_block_causal_ttt(
        eager_block_causal_ttt,
        TTTCase("", T=41, chunk_size=6, H=4, momentum=True, prenorm=True),
        torch.float32,
    )


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 3, 7), (2, 7, 3)], ids=str)
def test_newton_schulz_gradient(shape):
    g = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dx = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(newton_schulz(g), g, dx)[0]
    torch.testing.assert_close(newton_schulz_bwd(dx, g.detach()), expected)


def test_newton_schulz_of_zeros_is_zero_with_a_finite_gradient():
    g = torch.zeros(2, 3, 4)
    assert not newton_schulz(g).any()
    assert newton_schulz_bwd(torch.ones_like(g), g).isfinite().all()


def test_rows_of_zeros_stay_finite():
    """A dead row of an initial weight has a target norm of 0."""
    inputs = TTTCase("", momentum=True, muon=True).inputs(torch.float32)
    with torch.no_grad():
        inputs["w0"][:, 2] = 0
    o = block_causal_ttt(**inputs, chunk_size=4, muon=True)
    grads = torch.autograd.grad(o.sum(), list(inputs.values()))
    assert all(x.isfinite().all() for x in (o, *grads))


def test_strides_are_read_in_place():
    inputs = TTTCase("", Dk=6, Dv=6).inputs(torch.float32)
    expected = block_causal_ttt(**inputs, chunk_size=4)
    q, k, v = torch.stack([inputs[name].detach() for name in "qkv"], dim=2).unbind(dim=2)
    strided = {**inputs, "q": q, "k": k, "v": v}
    strided["lr0"] = inputs["lr0"].detach().mT.contiguous().mT
    torch.testing.assert_close(block_causal_ttt(**strided, chunk_size=4), expected)


def test_muon_in_float16_is_accurate():
    """Newton-Schulz in the inputs' bfloat16 or float16 would cost 1e-1 or 1e-2 here."""
    case = TTTCase("", B=1, T=256 * 4, chunk_size=256, H=1, Dk=64, Dv=64, Dh=64, muon=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float16).items()}
    exact = reference.block_causal_ttt(
        **{name: x.double() for name, x in inputs.items()}, **case.options()
    )
    error = block_causal_ttt(**inputs, **case.options()).double() - exact
    assert error.norm() / exact.norm() < 5e-3
