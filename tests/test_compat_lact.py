"""The LaCT authors' signatures: against the reference, and against their own functions where given."""

import inspect
import itertools
import os
from unittest import mock

import pytest
import torch

import reference
from benchmarks import peers
from lact_kernels.compat import block_causal_lact_swiglu, prenorm_block_causal_lact_swiglu
from lact_kernels.compat.lact import language_model

FUNCTIONS = {False: block_causal_lact_swiglu, True: prenorm_block_causal_lact_swiglu}
NAMES = ("w0", "w1", "w2", "q", "k", "v", "lr0", "lr1", "lr2")
PARAMETERS = (*NAMES, "chunk_size", "use_muon", "momentum")
ALL = list(itertools.product((False, True), repeat=3))
OPTION_NAMES = ("prenorm", "muon", "momentum")


def name_of(flags):
    return " ".join(name for name, on in zip(OPTION_NAMES, flags) if on) or "plain"


def make(dtype=torch.float64, rows=4, l=19, dk=6, dv=5, dh=7, momentum=False):
    """Every tensor of a call as a leaf, in their layout; `dtype` is that of all of them."""
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    inputs = {
        "w0": normal(rows, dh, dk) * dk**-0.5,
        "w1": normal(rows, dv, dh) * dh**-0.5,
        "w2": normal(rows, dh, dk) * dk**-0.5,
        "q": normal(rows, l, dk),
        "k": normal(rows, l, dk),
        "v": normal(rows, l, dv),
    }
    for name in ("lr0", "lr1", "lr2"):
        inputs[name] = 0.1 * torch.rand(rows, l, 1, dtype=torch.float64)
    if momentum:
        inputs["momentum"] = torch.rand(rows, l, 1, dtype=torch.float64)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def by_heads(inputs, chunk_size, muon, prenorm):
    """The reference, with b*h as heads of one batch row: another mapping than the one under test."""
    tokens = {name: inputs[name].transpose(0, 1)[None] for name in "qkv"}
    weights = {name: inputs[name] for name in ("w0", "w1", "w2")}
    names = [name for name in ("lr0", "lr1", "lr2", "momentum") if name in inputs]
    rates = {name: inputs[name].squeeze(-1).T[None] for name in names}
    o = reference.block_causal_ttt(
        **tokens, **weights, **rates, chunk_size=chunk_size, muon=muon, prenorm=prenorm
    )
    return o[0].transpose(0, 1)


def gradients(o, inputs, do):
    return torch.autograd.grad(o, list(inputs.values()), do.to(o.dtype), materialize_grads=True)


@pytest.mark.parametrize("prenorm", [False, True])
def test_signature_is_theirs(prenorm):
    parameters = inspect.signature(FUNCTIONS[prenorm]).parameters
    assert tuple(parameters) == (*PARAMETERS, "backend")
    defaults = [parameters[name].default for name in ("chunk_size", "use_muon", "momentum")]
    assert defaults == [2048, False, None]
    assert all(parameters[name].default is inspect.Parameter.empty for name in NAMES)
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("flags", ALL, ids=name_of)
def test_outputs_and_gradients_are_those_of_the_reference(flags):
    prenorm, muon, momentum = flags
    inputs = make(momentum=momentum)
    # Positional, in their order.
    ours = FUNCTIONS[prenorm](
        *(inputs.get(name) for name in NAMES), 4, muon, inputs.get("momentum")
    )
    expected = by_heads(inputs, 4, muon, prenorm)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    do = torch.randn_like(expected)
    for name, a, b in zip(inputs, gradients(ours, inputs, do), gradients(expected, inputs, do)):
        tolerance = 1e-9 * max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance, msg=lambda m, name=name: f"d{name}: {m}"
        )


@pytest.mark.parametrize("l", [0, 1, 4, 5], ids="l{}".format)
def test_lengths_around_a_chunk(l):  # noqa: E741
    inputs = make(l=l)
    torch.testing.assert_close(
        block_causal_lact_swiglu(**inputs, chunk_size=4), by_heads(inputs, 4, False, False)
    )


def test_default_is_one_chunk_of_2048():
    inputs = {name: x.detach() for name, x in make(rows=1, l=2050).items()}
    expected = by_heads(inputs, 2048, False, False)
    torch.testing.assert_close(block_causal_lact_swiglu(**inputs), expected)


MIXED = {
    "half weights": ({name: torch.bfloat16 for name in ("w0", "w1", "w2")}, torch.float32),
    "everything half": ({name: torch.bfloat16 for name in (*NAMES, "momentum")}, torch.bfloat16),
    "q and k wider than v": ({"v": torch.bfloat16}, torch.bfloat16),
    "v wider than q and k": ({"q": torch.float16, "k": torch.bfloat16}, torch.float32),
    "wide rates": ({"lr0": torch.float64, "momentum": torch.float64}, torch.float32),
}


@pytest.mark.parametrize("case", MIXED)
def test_dtypes_are_cast_and_gradients_come_back_in_them(case):
    """Rounding aside, the cast call is the float32 one; the dtype of v is that of the output."""
    dtypes, out = MIXED[case]
    leaves = {
        name: x.detach().to(dtypes.get(name, torch.float32)).requires_grad_()
        for name, x in make(momentum=True).items()
    }
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    ours = block_causal_lact_swiglu(**leaves, chunk_size=4)
    expected = by_heads(wide, 4, False, False)
    assert ours.dtype == out
    tolerance = 1e-4 if out == torch.float32 else 5e-2
    assert (ours - expected).norm() < tolerance * expected.norm()
    do = torch.randn_like(expected)
    got, wanted = gradients(ours, leaves, do), gradients(expected, wide, do)
    for name, a, b in zip(leaves, got, wanted):
        assert a.dtype == leaves[name].dtype, name
        rounding = 2 * torch.finfo(a.dtype).eps
        assert (a - b).norm() < (2 * tolerance + rounding) * b.norm(), name


def test_autocast_changes_nothing():
    inputs = make(torch.float32, momentum=True)
    expected = block_causal_lact_swiglu(**inputs, chunk_size=4, use_muon=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = block_causal_lact_swiglu(**inputs, chunk_size=4, use_muon=True)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    do = torch.randn_like(ours)
    for a, b in zip(gradients(ours, inputs, do), gradients(expected, inputs, do)):
        assert torch.equal(a, b)


def test_layout_costs_no_copy(monkeypatch):
    given, op = [], language_model.block_causal_ttt

    def watch(*tensors, momentum, **options):
        given.extend([*tensors, momentum])
        return op(*tensors, momentum=momentum, **options)

    monkeypatch.setattr(language_model, "block_causal_ttt", watch)
    inputs = make(torch.float32, momentum=True)
    block_causal_lact_swiglu(**inputs, chunk_size=4)
    names = ("q", "k", "v", "w0", "w1", "w2", "lr0", "lr1", "lr2", "momentum")
    assert [x.data_ptr() for x in given] == [inputs[name].data_ptr() for name in names]


def test_compiles_as_one_graph():
    inputs = make(torch.float32, momentum=True)
    compiled = torch.compile(prenorm_block_causal_lact_swiglu, fullgraph=True, backend="aot_eager")
    ours, expected = (
        fn(**inputs, chunk_size=4) for fn in (compiled, prenorm_block_causal_lact_swiglu)
    )
    assert torch.equal(ours, expected)
    do = torch.randn_like(ours)
    for a, b in zip(gradients(ours, inputs, do), gradients(expected, inputs, do)):
        torch.testing.assert_close(a, b)


R = torch.randn
BAD = [
    ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
    ({"lr1": 0.1}, TypeError, "lr1 must be a tensor, got float"),
    ({"momentum": 0.9}, TypeError, "momentum must be a tensor, got float"),
    ({"k": torch.ones(4, 19, 6, dtype=torch.int32)}, TypeError, "k must be of a floating dtype"),
    ({"w0": R(4, 7, 6).double()}, TypeError, "w0 must be float32.* v is torch.float32.*float64"),
    ({"v": R(4, 19, 5).double()}, TypeError, "q must be float64 as v is torch.float64"),
    ({"q": R(4, 19, 1, 6)}, ValueError, "q must have three axes"),
    ({"lr0": R(4, 19)}, ValueError, r"lr0 must have three axes, .* got \(4, 19\)"),
    ({"lr0": R(4, 19, 6)}, ValueError, r"lr0 .*\[b\*h, l, 1\].* per channel.* got \(4, 19, 6\)"),
    ({"momentum": R(4, 19, 2)}, ValueError, "momentum .*per channel"),
    ({"lr2": R(1, 19, 1)}, ValueError, r"lr2 .*\(4, 19, 1\), got \(1, 19, 1\)"),
    ({"lr1": R(4, 18, 1)}, ValueError, r"lr1 .*\(4, 19, 1\), got \(4, 18, 1\)"),
    ({"k": R(4, 18, 6)}, ValueError, r"k .*\[b\*h, l, dk\] = \(4, 19, 6\)"),
    ({"v": R(3, 19, 5)}, ValueError, r"v .*\[b\*h, l, dv\]"),
    ({"w0": R(2, 7, 6)}, ValueError, r"w0 .*\[b\*h, dh, dk\] = \(4, 7, 6\), got \(2, 7, 6\)"),
    ({"w1": R(4, 7, 5)}, ValueError, r"w1 .*\[b\*h, dv, dh\]"),
    ({"w2": R(4, 8, 6)}, ValueError, r"w2 .*\[b\*h, dh, dk\]"),
    ({"w2": R(4, 7, 6, device="meta")}, ValueError, "w2 must be on cpu like v, got meta"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    ({"chunk_size": 4.0}, TypeError, "chunk_size must be an int"),
    ({"use_muon": 1}, TypeError, "use_muon must be True or False"),
    ({"backend": "fast"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize(
    "changed, error, message", BAD, ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
def test_bad_input(prenorm, changed, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[prenorm](**(make(torch.float32) | changed))


@pytest.fixture
def theirs():
    """The authors' plain-PyTorch functions by prenorm, uncompiled."""
    try:
        module = peers.lact_module(os.environ.get("LACT_CHECKOUT"), "ttt_operation")
    except peers.Unavailable as error:
        pytest.skip(f"LACT_CHECKOUT: {error}")
    with torch.compiler.set_stance("force_eager"):
        yield {
            False: module.block_causal_lact_swiglu,
            True: module.prenorm_block_causal_lact_swiglu,
        }


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def both(theirs, flags, dims):
    """Ours and theirs on the same float32 inputs: output and every gradient."""
    prenorm, muon, momentum = flags
    inputs = make(torch.float32, momentum=momentum, **dims)
    with torch.no_grad():
        for name in "qk":
            inputs[name] /= inputs[name].norm(dim=-1, keepdim=True)
    results = []
    for fn in (FUNCTIONS[prenorm], theirs[prenorm]):
        o = fn(**inputs, chunk_size=48, use_muon=muon)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
        results.append([o, *gradients(o, inputs, do)])
    return dict(zip(("o", *(f"d{name}" for name in inputs)), zip(*results)))


DIMS = {"rows": 3, "l": 250, "dk": 24, "dv": 20, "dh": 32}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("flags", ALL, ids=name_of)
def test_equals_the_authors_functions_in_float32(theirs, flags):
    """Their Newton-Schulz iteration, in bfloat16 otherwise, is given float32 here."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
        results = both(theirs, flags, DIMS)
    errors = {name: relative(*pair) for name, pair in results.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < (1e-3 if flags[1] else 2e-5), errors


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
def test_muon_differs_from_theirs_by_their_bfloat16_alone(theirs, prenorm):
    ours, their = both(theirs, (prenorm, True, False), DIMS)["o"]
    print(f"{relative(their, ours):.1e}")
    assert 1e-3 < relative(their, ours) < 0.3


def test_signatures_are_those_of_the_checkout(theirs):
    for prenorm, ours in FUNCTIONS.items():
        expected = inspect.signature(theirs[prenorm]).parameters.values()
        actual = list(inspect.signature(ours).parameters.values())[:-1]
        assert [(x.name, x.default) for x in actual] == [(x.name, x.default) for x in expected]
