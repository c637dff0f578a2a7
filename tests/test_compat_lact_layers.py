"""The layers of LaCT's views and minimal implementations: against plain ones, and the authors' own."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from benchmarks import plain_family
from lact_kernels.compat import swap_lact_layers
from lact_kernels.compat.lact import (
    BidirectionalLaCTSwiGLU,
    CausalLaCTSwiGLUWithSlidingWindowAttn,
    FastWeightGluMLPMultihead,
    TTTOperator,
)
from lact_kernels.compat.lact.projections import learning_rates, silu_heads
from tests import lact_authors

pytestmark = pytest.mark.filterwarnings("ignore:use_muon. the orthogonalised update is added")
WIDE = torch.float64
INFO = {"ttt_op_order": [TTTOperator(0, 13, True, True), TTTOperator(13, -1, False, True)]}
CASES = {
    "views": (FastWeightGluMLPMultihead, (24, 12), {"inter_multi": 2, "muon_update_steps": 2}),
    "views, no steps": (FastWeightGluMLPMultihead, (24, 8), {"bias": True, "base_lr": 0.3}),
    "ZipMap": (
        FastWeightGluMLPMultihead,
        (24, 24),
        {"inter_multi": 2, "bias": True, "muon_update_steps": 5, "use_gate_fn": True},
    ),
    "gate of heads": (FastWeightGluMLPMultihead, (24, 12), {"use_gate_fn": True}),
    "bidirectional": (BidirectionalLaCTSwiGLU, (24, 12), {"inter_multi": 1.5}),
    "bidirectional, bare": (
        BidirectionalLaCTSwiGLU,
        (24, 8),
        {"use_o_norm": False, "qk_l2_norm": False, "use_muon": False, "base_lr": 0.1},
    ),
    "causal": (
        CausalLaCTSwiGLUWithSlidingWindowAttn,
        (24, 12, 6),
        {"lact_chunk_size": 6, "window_size": 5, "inter_multi": 2},
    ),
    "causal, bare": (
        CausalLaCTSwiGLUWithSlidingWindowAttn,
        (24, 8, 12),
        {
            "lact_chunk_size": 5,
            "window_size": None,
            "use_o_norm": False,
            "use_momentum": False,
            "use_muon": False,
            "base_lr": 0.2,
            "ttt_scale_before_sum": False,
        },
    ),
}


def pair(case, dtype=WIDE):
    """Ours, and the plain layer with other parameters than at the start."""
    ours, sizes, options = CASES[case]
    old = getattr(plain_family, ours.__name__)(*sizes, **options, muon_dtype=dtype).to(dtype)
    with torch.no_grad():
        for p in old.parameters():
            p.add_(0.1 * torch.randn_like(p))
    new = ours(*sizes, **options, dtype=dtype)
    assert list(new.state_dict()) == list(old.state_dict())
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in old.named_parameters()]
    new.load_state_dict(old.state_dict(), strict=True)
    return new, old


def call(layer, x, info=INFO):
    """All results in one list."""
    if not hasattr(layer, "lr_fc"):
        return [layer(x)]
    y, weights = layer(x, info)
    assert list(weights) == ["w0", "w1", "w2"]
    return [y, *weights.values()]


def assert_same(ours, expected, x, tolerance=1e-9):
    """Results, and the gradients of the tokens and all parameters."""
    results = [call(layer, x) for layer in (ours, expected)]
    factors = [torch.randn_like(y) for y in results[1]]
    gradients = []
    for layer, outputs in zip((ours, expected), results):
        total = sum((y * factor).sum() for y, factor in zip(outputs, factors))
        names = ["x", *dict(layer.named_parameters())]
        leaves = [x, *layer.parameters()]
        gradients.append(dict(zip(names, torch.autograd.grad(total, leaves))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name, b in gradients[1].items():
        atol = tolerance * max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            gradients[0][name], b, rtol=0, atol=atol, msg=lambda m, name=name: f"d{name}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_plain_one(case):
    ours, old = pair(case)
    assert_same(ours, old, torch.randn(2, 19, 24, dtype=WIDE, requires_grad=True))


@pytest.mark.parametrize("case", CASES)
def test_swapped_layer_is_the_old_one(case):
    _, old = pair(case)
    model = nn.Sequential(old).eval()
    model[0].w0.requires_grad_(False)
    parameters = dict(model.named_parameters())
    if hasattr(old.o_norm, "eps"):
        old.o_norm.eps = 0.1
    x = torch.randn(2, 19, 24, dtype=WIDE)
    expected, rng = call(old, x), torch.get_rng_state()
    assert swap_lact_layers(model) == {"0": old}
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(model[0]) is CASES[case][0] and not model[0].training
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[n] is p for n, p in parameters.items())
    for a, b in zip(call(model[0], x), expected):
        torch.testing.assert_close(a, b)
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in ("muon_dtype", "lr_dim", "training"):
            assert getattr(model[0], name) == pytest.approx(value, rel=1e-12), name
    assert swap_lact_layers(model) == {}


def test_hidden_widths_are_exact():
    """49 * (1 / 49) is less than 1."""
    model = nn.Sequential(plain_family.FastWeightGluMLPMultihead(49, 49, 1.5 / 49))
    swap_lact_layers(model)
    assert model[0].w0.shape == (1, 49, 1)


def test_options_that_ours_does_not_have_are_refused_by_name():
    class Fork(plain_family.FastWeightGluMLPMultihead):
        def __init__(self, *args, use_fused_kernels=False, mode="plain", **options):
            super().__init__(*args, **options)
            self.use_fused_kernels, self.mode = use_fused_kernels, mode

    off = nn.Sequential(Fork(24, 12, mode=""))
    assert list(swap_lact_layers(off)) == ["0"]
    for options, said in (
        ({"use_fused_kernels": True, "mode": ""}, "use_fused_kernels=True"),
        ({}, "mode='plain'"),
    ):
        model = nn.ModuleDict({"good": Fork(24, 12, mode=""), "bad": Fork(24, 12, **options)})
        before = list(model.modules())
        with pytest.raises(NotImplementedError, match=f"bad has the option {said}, which FastW"):
            swap_lact_layers(model)
        assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_layers_that_are_called_otherwise_are_refused():
    class Fork(plain_family.FastWeightGluMLPMultihead):
        def forward(self, x, vis_dict=None, shape_info=None, *args):
            return super().forward(x, shape_info)

    with pytest.raises(NotImplementedError, match=r"0 is called with \['vis_dict', 'shape_info'\]"):
        swap_lact_layers(nn.Sequential(Fork(24, 12)))


def test_subclasses_with_a_forward_of_their_own_are_refused():
    class Doubled(plain_family.BidirectionalLaCTSwiGLU):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="0 is a .*Doubled, whose forward is not that of"):
        swap_lact_layers(nn.Sequential(Doubled(24, 12)))


def test_tied_weights_of_a_layer_and_norms_without_eps_are_refused():
    _, tied = pair("views")
    tied.w2 = tied.w0
    with pytest.raises(ValueError, match="0 must have the parameters of FastWeightGluMLPMultihead"):
        swap_lact_layers(nn.Sequential(tied))
    _, old = pair("causal")
    old.o_norm.eps = None
    with pytest.raises(ValueError, match="0.o_norm must be an RMS norm with an eps"):
        swap_lact_layers(nn.Sequential(old))


@pytest.mark.parametrize("case", ["views", "bidirectional", "causal"])
def test_parameters_that_ours_does_not_have_are_refused(case):
    _, old = pair(case)
    old.more = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="0 must have the parameters of .*'more'"):
        swap_lact_layers(nn.Sequential(old))


@pytest.mark.parametrize("case", ["views", "bidirectional", "causal"])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda old: setattr(old, "o_norm", nn.LayerNorm(12, bias=False)),
            r"0\.o_norm .*LayerNorm",
        ),
        (lambda old: delattr(old.o_norm, "eps"), r"0\.o_norm must be an RMS norm with an eps"),
        (lambda old: old.register_buffer("more", torch.zeros(3)), r"0 has the buffers \['more'\]"),
    ],
)
def test_what_would_be_lost_is_refused(case, change, message):
    _, old = pair(case)
    change(old)
    model = nn.Sequential(old)
    with pytest.raises(ValueError, match=message):
        swap_lact_layers(model)
    assert model[0] is old


def test_a_compiled_layer_is_refused_and_a_compiled_model_is_not():
    """A compiled layer would go on to call the old one."""
    _, old = pair("bidirectional")
    with pytest.raises(ValueError, match=r"0\._orig_mod is compiled"):
        swap_lact_layers(nn.Sequential(torch.compile(old, backend="eager")))
    model = torch.compile(nn.Sequential(old), backend="eager")
    assert list(swap_lact_layers(model)) == ["_orig_mod.0"]


@pytest.mark.parametrize("case", ["ZipMap", "views"])
def test_weights_are_handed_on(case):
    """Frame by frame is the whole at once; what is rendered changes no weight, and sees no other row."""
    layer, _ = pair(case)
    x = torch.randn(2, 15, 24, dtype=WIDE)
    frames = [TTTOperator(start, start + 5, True, True) for start in (0, 5, 10)]
    expected, last = layer(x, {"ttt_op_order": frames})
    weights, outputs = {}, []
    for frame in x.split(5, dim=1):
        y, weights = layer(frame, {"ttt_op_order": [(0, -1, True, True)], **weights})
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-4)
    for name in last:
        torch.testing.assert_close(weights[name], last[name], rtol=0, atol=1e-4)
    queries = torch.randn(2, 3, 24, dtype=WIDE)
    info = {"ttt_op_order": [TTTOperator(0, 500, False, True)]}
    seen, same = layer(queries, info | last)
    assert all(same[name] is last[name] for name in last) and seen.shape == (2, 3, 24)
    alone, _ = layer(queries[1:], info | {name: w[layer.num_heads :] for name, w in last.items()})
    torch.testing.assert_close(alone, seen[1:])
    fresh, own = layer(queries, info | {"w0": None, "w1": None, "w2": None})
    assert not torch.allclose(fresh, seen)
    for name, w in own.items():
        assert torch.equal(w, getattr(layer, name).repeat(2, 1, 1))


@pytest.mark.parametrize("case", ["views", "ZipMap", "bidirectional", "causal"])
def test_autocast_and_half(case):
    """Products in bfloat16, rates and weights wide; as near to float64 as the plain layer's twice."""
    ours, old = pair(case, torch.float32)
    exact = copy.deepcopy(old).double()
    exact.muon_dtype = WIDE
    x = torch.randn(2, 19, 24)
    expected = call(exact, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, plain = call(ours, x), call(old, x)
    assert cast[0].dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in cast[1:])
    for a, b, wide in zip(cast, plain, expected):
        assert (a - wide).norm() < 2 * (b - wide).norm() + 4e-3 * wide.norm()
    half = call(copy.deepcopy(ours).bfloat16(), x.bfloat16())
    assert half[0].dtype == torch.bfloat16
    assert (half[0] - expected[0]).norm() < 0.1 * expected[0].norm()


def test_rates_and_norms_are_wide():
    """Rates never see autocast, nor 16 bits behind their projection; norms round once."""
    linear, x = nn.Linear(24, 6), torch.randn(2, 9, 24)
    expected = torch.nn.functional.softplus(linear(x) - 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learning_rates(linear, x, -3.0), expected)
    linear, x = linear.bfloat16(), x.bfloat16()
    expected = torch.nn.functional.softplus(linear(x).float() - 3)
    assert torch.equal(learning_rates(linear, x, -3.0), expected)
    qkv = torch.randn(2, 9, 72).bfloat16()
    q, exact = (silu_heads(qkv, 2, l2_norm)[0].double() for l2_norm in (True, False))
    exact /= exact.norm(dim=-1, keepdim=True) + 1e-5
    assert ((q - exact) / exact).abs().max() < 1.01 * 2**-8


@pytest.mark.parametrize("case", ["views", "bidirectional"])
def test_norms_may_be_wider_than_the_rest(case):
    layer = pair(case, torch.float32)[0].bfloat16()
    layer.o_norm.float()
    assert call(layer, torch.randn(2, 19, 24).bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["views", "bidirectional", "causal"])
def test_the_backend_is_handed_on(case):
    """Triton has no float64, and says so where it is asked for."""
    layer, _ = pair(case)
    layer.backend = "triton"
    with pytest.raises((TypeError, ValueError), match="triton"):
        call(layer, torch.randn(2, 19, 24, dtype=WIDE))


@pytest.mark.parametrize("case", ["ZipMap", "bidirectional", "causal"])
def test_compiles_and_copies(case):
    ours, _ = pair(case, torch.float32)
    x = torch.randn(2, 19, 24)
    expected = call(ours, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = compiled(x, INFO) if hasattr(ours, "lr_fc") else compiled(x)
    torch.testing.assert_close(results[0] if hasattr(ours, "lr_fc") else results, expected[0])
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(call(copied, x)[0], expected[0])
    assert "head_dim=" in repr(ours)


@pytest.mark.parametrize("case", ["views", "bidirectional", "causal"])
def test_shapes_of_no_memory(case):
    x = torch.randn(2, 19, 24, device="meta")
    assert call(pair(case)[0].to("meta", torch.float32), x)[0].shape == x.shape


@pytest.mark.parametrize("case", ["views", "bidirectional", "causal"])
def test_sizes_that_are_empty(case):
    layer, _ = pair(case)
    for shape in ((2, 0, 24), (0, 19, 24)):
        assert call(layer, torch.zeros(*shape, dtype=WIDE))[0].shape == shape


V, S, C = (
    FastWeightGluMLPMultihead,
    BidirectionalLaCTSwiGLU,
    CausalLaCTSwiGLUWithSlidingWindowAttn,
)
BAD = [
    (V, (24, 7), {}, ValueError, "head_dim must divide dim = 24, got 7"),
    (V, (24, 0), {}, ValueError, "head_dim must be at least 1, got 0"),
    (V, (24.0, 8), {}, TypeError, "dim must be an int"),
    (V, (24, 8), {"inter_multi": 0.1}, ValueError, "inter_multi must leave .*, got 0.1"),
    (V, (24, 8), {"base_lr": 0}, ValueError, "base_lr must be positive, got 0"),
    (V, (24, 8), {"bias": 1}, TypeError, "bias must be True or False"),
    (V, (24, 8), {"muon_update_steps": -1}, ValueError, "muon_update_steps must not be neg"),
    (V, (24, 8), {"backend": "gpu"}, ValueError, "backend must be"),
    (S, (24, 7), {}, ValueError, "head_dim must divide dim = 24, got 7"),
    (S, (24, 8), {"use_muon": None}, TypeError, "use_muon must be True or False"),
    (S, (24, 8), {"base_lr": float("inf")}, ValueError, "base_lr must be finite"),
    (C, (24, 8, 7), {}, ValueError, "attn_head_dim must divide dim = 24, got 7"),
    (C, (24, 8, 8), {"window_size": 0}, ValueError, "window_size must be at least 1"),
    (C, (24, 8, 8), {"lact_chunk_size": 0}, ValueError, "lact_chunk_size must be at least 1"),
    (C, (24, 8, 8), {"backend": "gpu"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize(
    "layer, sizes, options, error, message", BAD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_options(layer, sizes, options, error, message):
    with pytest.raises(error, match=message):
        layer(*sizes, **options)


def test_bad_input():
    layer = FastWeightGluMLPMultihead(24, 12)
    x, w = torch.randn(2, 19, 24), torch.randn(4, 12, 12)
    for tokens, info, error, message in (
        (x[0], INFO, ValueError, r"x must have the shape \[B, T, dim\] with dim = 24, got \(19"),
        (x[..., :8], INFO, ValueError, r"x must have the shape .* got \(2, 19, 8\)"),
        (x.int(), INFO, TypeError, "x must have one of the dtypes"),
        (x.double(), INFO, TypeError, "x must have the dtype torch.float32 of this layer"),
        (x.to("meta"), INFO, ValueError, "x must be on cpu like this layer, got meta"),
        (x, {}, ValueError, "info must have 'ttt_op_order'"),
        (x, {1: 2, "w0": w}, ValueError, "info must have 'ttt_op_order', got .1, 'w0'"),
        (x, None, TypeError, "info must be a mapping"),
        (x, INFO | {"w0": w}, ValueError, r"info must have .* \['w1', 'w2'\] are not there"),
        (x, INFO | dict.fromkeys(("w0", "w1", "w2"), w[:2]), ValueError, r"w0 .*\(4, 12, 12\)"),
        (x, INFO | dict.fromkeys(("w0", "w1", "w2"), 1), TypeError, "w0 must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            layer(tokens, info)
    for other in (BidirectionalLaCTSwiGLU(24, 12), C(24, 12, 12)):
        with pytest.raises(ValueError, match=r"x must have the shape \[B, T, dim\]"):
            other(x[0])
        with pytest.raises(TypeError, match="x must have the dtype torch.float32 of this layer"):
            other(x.double())


THEIRS = {
    V: ("lact_nvs", "lact_ttt"),
    S: ("minimal_implementations", "bidirectional_lact_layer"),
    C: ("minimal_implementations", "causal_lact_with_sliding_window_attn"),
}
# Theirs has no gate; it fails without a scale, and computes something else with bidirectional Muon.
COMPARED = [
    ("views", {}),
    ("views, no steps", {}),
    ("bidirectional, bare", {}),
    ("bidirectional", {"use_muon": False}),
    ("causal", {}),
    ("causal, bare", {"ttt_scale_before_sum": True}),
]


@pytest.mark.filterwarnings("ignore:.*cuda")
@pytest.mark.parametrize("case, changed", COMPARED)
def test_equals_the_authors_layers(case, changed):
    """Swapped for theirs: the same in float64, and within 1e-5 in float32."""
    ours, sizes, options = CASES[case]
    theirs = getattr(lact_authors.module(*THEIRS[ours]), ours.__name__)
    info = {"ttt_op_order": [TTTOperator(0, 13, True, True), TTTOperator(13, 19, False, True)]}
    for dtype, tolerance in ((WIDE, 1e-9), (torch.float32, 1e-5)):
        x = torch.randn(2, 19, 24, dtype=dtype)
        with lact_authors.computing_in(dtype):
            old = theirs(*sizes, **(options | changed)).to(dtype)
            expected = call(old, x, info)
        model = nn.Sequential(old)
        assert list(swap_lact_layers(model)) == ["0"]
        pairs = zip(call(model[0], x, info), expected)
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        print(dtype, [f"{error:.1e}" for error in errors])
        assert max(errors) < tolerance, errors


@pytest.mark.parametrize("layer", THEIRS)
def test_signatures_are_those_of_the_checkout(layer):
    theirs = getattr(lact_authors.module(*THEIRS[layer]), layer.__name__)
    theirs = [(x.name, x.default) for x in inspect.signature(theirs).parameters.values()]
    ours = [(x.name, x.default) for x in inspect.signature(layer).parameters.values()]
    more = ["use_gate_fn"] if layer is V else []
    assert ours[: len(theirs)] == theirs
    assert [name for name, _ in ours[len(theirs) :]] == [*more, "backend", "device", "dtype"]
