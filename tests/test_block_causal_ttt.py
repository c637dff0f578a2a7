"""`block_causal_ttt` on the eager backend, against the reference."""

import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import reference
from lact_kernels import block_causal_ttt
from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.tokens import Tokens
from lact_kernels.eager import swiglu
from lact_kernels.eager import ttt as eager
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.ops import fast_weights as ops
from tests.cases import (
    FLOAT16_MUON,
    TTT_OPTIONS,
    TTT_SHAPES,
    TTTCase,
    check_block_causal_ttt,
    check_float16_muon,
    tensors_of,
)

eager_block_causal_ttt = functools.partial(block_causal_ttt, backend="eager")

# float32 and half inputs at sizes where rounding has its usual statistics.
LARGER = [
    TTTCase(case.reason, B=2, T=250, chunk_size=64, H=2, Dk=24, Dv=20, Dh=32,
            momentum=case.momentum, muon=case.muon, prenorm=case.prenorm)
    for case in TTT_OPTIONS
]  # fmt: skip


@pytest.mark.parametrize("case", TTT_OPTIONS + TTT_SHAPES, ids=str)
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


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_rates_below_zero_and_momentum_above_one(case):
    """Values are nobody's business: the equations hold for any."""
    inputs = case.inputs(torch.float64)
    changed = inputs | {name: -x for name, x in inputs.items() if name.startswith("lr")}
    if case.momentum:
        changed["momentum"] = 4 * inputs["momentum"] - 2
    changed = {name: x.detach().requires_grad_() for name, x in changed.items()}
    ours, expected = (
        fn(**changed, **case.options())
        for fn in (eager_block_causal_ttt, reference.block_causal_ttt)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(o.sum(), list(changed.values())) for o in (ours, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


@pytest.mark.parametrize("name", ["lr0", "lr1", "lr2", "momentum"])
def test_nan_shows_behind_its_chunk(name):
    inputs = {k: x.detach() for k, x in TTTCase("", momentum=True).inputs(torch.float32).items()}
    inputs[name][0, 5, 0] = torch.nan
    o = eager_block_causal_ttt(**inputs, chunk_size=4)
    assert o[0, 8:, 0].isnan().all() and not o[0, :8].isnan().any() and not o[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_against_float64(case, dtype):
    check_block_causal_ttt(eager_block_causal_ttt, case, dtype)


@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_gradcheck(case):
    case = TTTCase(
        case.reason, T=5, chunk_size=2, B=1, H=1, Dk=2, Dv=2, Dh=3,
        momentum=case.momentum, muon=case.muon, prenorm=case.prenorm,
    )  # fmt: skip
    inputs = case.inputs(torch.float64)

    def through_output_and_state(*tensors):
        inputs_and_options = dict(zip(inputs, tensors)) | case.options()
        return tuple(tensors_of(block_causal_ttt(**inputs_and_options, return_state=True)))

    torch.autograd.gradcheck(through_output_and_state, tuple(inputs.values()))


def test_gradcheck_packed():
    case = TTTCase("", T=7, chunk_size=2, B=1, H=1, Dk=2, Dv=2, Dh=2, cu_seqlens=(0, 0, 5, 7))
    inputs = case.inputs(torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: block_causal_ttt(**dict(zip(inputs, tensors)), **case.options()),
        tuple(inputs.values()),
    )


CHECKPOINTED = {
    "dense": {"T": 24},  # six whole chunks: intervals 2 and 3 end where the sequence does
    "packed": {"B": 1, "T": 40, "cu_seqlens": (0, 2, 15, 15, 40)},
}


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("shape", CHECKPOINTED.values(), ids=CHECKPOINTED)
@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_checkpoints_change_nothing(case, shape, return_state):
    case = dataclasses.replace(case, **shape)
    inputs = case.inputs(torch.float64)
    options = case.options() | {"return_state": return_state}
    results = []
    for interval in (1, 2, 3, 100):
        outputs = tensors_of(
            eager_block_causal_ttt(**inputs, **options, checkpoint_interval=interval)
        )
        cotangents = [torch.linspace(-1, 1, x.numel()).double().view(x.shape) for x in outputs]
        grads = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
        results.append([*outputs, *grads])
    for result in results[1:]:
        for ours, expected in zip(result, results[0]):
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("shape", CHECKPOINTED.values(), ids=CHECKPOINTED)
@pytest.mark.parametrize("case", TTT_OPTIONS, ids=str)
def test_what_is_kept_shrinks_with_the_interval(case, shape):
    case = dataclasses.replace(case, **shape)
    inputs = case.inputs(torch.float64)
    updates = case.T // 4 if case.cu_seqlens else (case.T - 1) // 4
    weights = case.H * case.B * case.Dh * (2 * case.Dk + case.Dv) * 8  # bytes
    for interval in (1, 2, 3, 100):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            eager_block_causal_ttt(**inputs, **case.options(), checkpoint_interval=interval)
        rows = (
            updates // interval if case.cu_seqlens or interval == 1 else (updates - 1) // interval
        )
        copies = 1 + case.prenorm + (case.momentum or interval == 1)
        history = [x for x in saved if x.ndim == 5]
        assert sum(x.nbytes for x in history) == rows * copies * weights


class PeakBytes(TorchDispatchMode):
    """The most that tensors made under it have held at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.storages[x.untyped_storage()] = None
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result


def test_an_interval_bounds_the_memory_of_both_directions():
    """33 updates of large weights: at intervals of 6, five checkpoints and one segment at a time."""
    case = TTTCase("", T=34, chunk_size=1, B=1, H=1, Dk=32, Dv=32, Dh=32, momentum=True)
    x = {name: t.detach() for name, t in case.inputs(torch.float32).items()}
    tokens = Tokens(*(x[name] for name in ("k", "v", "lr0", "lr1", "lr2", "momentum")))
    weights = tuple(x[name][None] for name in ("w0", "w1", "w2"))
    norms = tuple(w.norm(dim=-1) for w in weights)
    start = FastWeights(weights, norms, (), tuple(map(torch.zeros_like, weights)))
    copy = sum(w.nbytes for w in weights)
    peaks = {}
    for interval in (1, 6):
        options = Options(1, False, False, True, checkpoint_interval=interval)
        call = Call(x["q"], tokens, start, None, options)
        with PeakBytes() as forward:
            o, _, history = eager.ttt_fwd(call)
        with PeakBytes() as backward:
            eager.ttt_bwd(call, history, torch.ones_like(o), None)
        peaks[interval] = forward.peak / copy, backward.peak / copy
    kept, segment, everything = 2 * 5, 6 + 1, 2 * 33
    assert peaks[6][0] < kept + 4 * segment < everything < peaks[1][0]
    assert peaks[6][1] < kept + 6 * segment < everything < peaks[1][1]


def test_phases_are_marked_in_profiles():
    inputs = TTTCase("").inputs(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        eager_block_causal_ttt(**inputs, chunk_size=4, checkpoint_interval=2).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    phases = {"scan": 2, "apply": 1, "apply backward": 1, "reverse scan": 1}
    assert all(counts[f"block_causal_ttt {name}"] == count for name, count in phases.items())


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 14])
def test_blocks_of_any_size_give_the_same(size, monkeypatch):
    monkeypatch.setattr(swiglu, "CPU_BLOCK", size)
    monkeypatch.setattr(swiglu, "MIN_BLOCK_TOKENS", 1)
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


@pytest.mark.parametrize("loss_scale", [2.0**-8, 2.0**6])
def test_muon_in_float16_with_few_tokens(loss_scale):
    check_float16_muon(eager_block_causal_ttt, FLOAT16_MUON, loss_scale)


def test_muon_in_float16_with_momentum_and_prenorm():
    case = dataclasses.replace(FLOAT16_MUON, momentum=True, prenorm=True)
    check_float16_muon(eager_block_causal_ttt, case, 2.0**6)


def test_muon_in_float16_with_a_chunk_of_zeros():
    check_float16_muon(eager_block_causal_ttt, FLOAT16_MUON, zeros=range(4, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_like_tokens_without_their_limits(dtype):
    x = (torch.rand(1000) + 1) * 2.0 ** torch.randint(-10, 14, (1000,)) * torch.randn(1000).sign()
    expected = x.to(dtype).float()
    for scale in (1.0, 2.0**60, 2.0**-60):
        assert torch.equal(swiglu._rounded_gradient(x * scale, dtype), expected * scale)
    assert swiglu._rounded_gradient(torch.tensor(torch.nan), dtype).isnan()


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


def test_without_gradients_nothing_is_kept(monkeypatch):
    histories = []
    original = ops.ttt_fwd

    def spy(*args):
        o, end, history = original(*args)
        histories.append([len(x) for x in history])
        return o, end, history

    monkeypatch.setattr(ops, "ttt_fwd", spy)
    case = TTTCase("", T=60, chunk_size=2, momentum=True, muon=True)
    inputs = case.inputs(torch.float64)
    expected = eager_block_causal_ttt(**inputs, **case.options())
    with torch.no_grad():
        o = eager_block_causal_ttt(**inputs, **case.options())
        eager_block_causal_ttt(**inputs, **case.options(), checkpoint_interval=100)
    assert histories == [[29] * 6, [], []]  # the weights and steps of each update, or nothing
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
