"""The functions of LaCT's views, video and minimal implementations: against the reference, plain rewritings,
and the authors' own where given."""

import collections
import inspect
import warnings

import pytest
import torch

import reference
from benchmarks import plain_family
from lact_kernels.compat.lact import (
    BidirectionalLaCTSwiGLU,
    TTTOperator,
    ar_fast_weight_swish_glu_weight_norm_mini_batch,
    ar_fast_weight_swish_glu_weight_norm_mini_batch_inference,
    bidirectional_lact_swiglu,
    fast_weight_swish_glu_weight_norm_mini_batch_apply,
)
from tests import lact_authors
from tests.tolerance import assert_close_to_float64

NAMES = ("w0", "w1", "w2", "q", "k", "v", "lr0", "lr1", "lr2")
TRIPLE = (3.4445, -4.7750, 2.0315)
VIEWS = fast_weight_swish_glu_weight_norm_mini_batch_apply
VIDEO = ar_fast_weight_swish_glu_weight_norm_mini_batch
INFERENCE = ar_fast_weight_swish_glu_weight_norm_mini_batch_inference
pytestmark = pytest.mark.filterwarnings("ignore:use_muon. the orthogonalised update is added")


def make(dtype=torch.float64, transposed=False, rows=4, l=19, lq=None, dk=6, dv=5, dh=7):
    """Every tensor of a call as a leaf, in their layouts; `transposed` is that of views."""
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    inputs = {
        "w0": normal(rows, dh, dk) * dk**-0.5,
        "w1": normal(rows, dv, dh) * dh**-0.5,
        "w2": normal(rows, dh, dk) * dk**-0.5,
        "q": normal(rows, l if lq is None else lq, dk),
        "k": normal(rows, l, dk),
        "v": normal(rows, l, dv),
    }
    for name in ("lr0", "lr1", "lr2"):
        inputs[name] = torch.rand(rows, l, 1, dtype=torch.float64)
    if transposed:
        inputs |= {name: inputs[name].mT.contiguous() for name in ("w0", "w1", "w2")}
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def normed(inputs):
    """Queries and keys of norm 1 and small rates, as the authors' layers make them."""
    with torch.no_grad():
        for name in "qk":
            inputs[name] /= inputs[name].norm(dim=-1, keepdim=True)
        for name in ("lr0", "lr1", "lr2"):
            inputs[name] *= 0.02
    return inputs


def by_reference(inputs, steps, transposed=False, **options):
    """The reference, with b*h as heads of one batch row: another mapping than the one under test."""
    weights = [x.mT if transposed else x for x in (inputs["w0"], inputs["w1"], inputs["w2"])]
    tokens = [inputs[name].transpose(0, 1)[None] for name in "qkv"]
    rates = [inputs[name].squeeze(-1).T[None] for name in ("lr0", "lr1", "lr2")]
    o, new, _, _ = reference.ttt(*tokens, *weights, *rates, steps, **options)
    return o[0].transpose(0, 1), *(w[0].mT if transposed else w[0] for w in new)


def assert_same(ours, expected, inputs, tolerance=1e-9):
    """Values, and the gradients of all results with random factors."""
    for name, a, b in zip(("o", "w0", "w1", "w2"), ours, expected):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in expected]
    gradients = [
        torch.autograd.grad(
            sum((x * factor).sum() for x, factor in zip(results, factors)),
            list(inputs.values()),
            materialize_grads=True,
        )
        for results in (ours, expected)
    ]
    for name, a, b in zip(inputs, *gradients):
        atol = tolerance * max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"d{name}: {m}"
        )


O = TTTOperator
ORDERS = {
    "views": (
        [O(0, 11, True, False), O(0, 19, False, True)],
        [("update", [(0, 11)]), ("apply", [(0, 19)])],
    ),
    "frame by frame": (
        [O(0, 7, True, True), O(7, 14, True, True), O(14, -1, True, True)],
        [(kind, [r]) for r in ((0, 7), (7, 14), (14, 19)) for kind in ("update", "apply")],
    ),
    "an end beyond the tokens": (
        [(0, 30, True, False), [5, 100, False, True]],
        [("update", [(0, 19)]), ("apply", [(5, 19)])],
    ),
    "a start beyond the tokens": (
        [O(3, -1, True, True), O(25, 30, False, True)],
        [("update", [(3, 19)]), ("apply", [(3, 19)])],
    ),
    "an empty range": (
        [O(4, 4, False, True), O(0, 19, True, True)],
        [("update", [(0, 19)]), ("apply", [(0, 19)])],
    ),
    "nothing but queries": ([O(0, 4, False, True), O(2, 9, 0, 1)], [("apply", [(0, 4), (2, 9)])]),
    "nothing but keys": ([O(0, -1, True, False)], [("update", [(0, 19)])]),
    "neither": ([O(0, 4, False, False)], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_views_are_those_of_the_reference(order, steps):
    inputs = make(transposed=True)
    given, expected = ORDERS[order]
    ours = VIEWS(*inputs.values(), given, steps)  # positional, in their order
    options = {"coefficients": (TRIPLE,) * steps, "detach_norms": True}
    assert_same(ours, by_reference(inputs, expected, True, **options), inputs)


def test_orders_of_any_objects_with_the_fields():
    inputs = make(transposed=True)
    entry = collections.namedtuple("Other", "apply update end start more")
    objects = [entry(True, True, -1, 2, None)]
    expected = VIEWS(**inputs, ttt_ua_order=[(2, 19, True, True)])
    for a, b in zip(VIEWS(**inputs, ttt_ua_order=iter(objects)), expected):
        assert torch.equal(a, b)


def test_views_with_another_number_of_queries_than_keys():
    inputs = make(transposed=True, lq=31)
    ours = VIEWS(**inputs, ttt_ua_order=[O(0, -1, True, True)])
    steps = [("update", [(0, 19)]), ("apply", [(0, 31)])]
    assert_same(ours, by_reference(inputs, steps, True, coefficients=(), detach_norms=True), inputs)


def test_weights_that_nothing_updates_are_those_that_were_given():
    inputs = make(torch.bfloat16, transposed=True)
    _, *weights = VIEWS(**inputs, ttt_ua_order=[O(0, 19, False, True)])
    assert all(w is inputs[name] for w, name in zip(weights, NAMES))
    video = make(torch.bfloat16)
    o, *weights = INFERENCE(**video, w_scale=1.0)
    assert all(w is video[name] for w, name in zip(weights, NAMES)) and o.dtype == torch.bfloat16


VIDEOS = {
    "the default: one update of nothing but noise": (
        {},
        [("apply", [(0, 19)])],
    ),
    "a piece longer than the video": ({"mini_batch_size": 30}, [("apply", [(0, 19)])]),
    "pairs": (
        {"mini_batch_size": 4},
        [
            ("apply", [(0, 4)]),
            *[("update", [(4, 8)]), ("apply", [(4, 12)])],
            *[("update", [(12, 16)]), ("apply", [(12, 19)])],
        ],
    ),
    "more noisy pieces than clean ones, twice": (
        {"mini_batch_size": 3, "update_every": 9, "num_repeat": 2},
        [
            ("apply", [(0, 6)]),
            *[("update", [(6, 9)]), ("update", [(15, 18)])],
            *[("update", [(6, 9)]), ("apply", [(6, 15)])],
            *[("update", [(15, 18)]), ("apply", [(15, 19)])],
        ],
    ),
    "no noise": (
        {"mini_batch_size": 10, "update_every": 10, "weight_norm": False},
        [
            ("update", [(0, 10)]),
            ("apply", [(0, 10)]),
            ("update", [(10, 19)]),
            ("apply", [(10, 19)]),
        ],
    ),
    "ends early, with Newton-Schulz": (
        {"mini_batch_size": 3, "update_length": 8, "use_moun": True, "num_moun_iters": 2},
        [("apply", [(0, 3)]), ("update", [(3, 6)]), ("apply", [(3, 9)])],
    ),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_videos_are_those_of_the_reference(case):
    options, steps = VIDEOS[case]
    inputs = make()
    o, *weights = VIDEO(*inputs.values(), 0.3, **options)
    scaled = inputs | {name: 0.3 * inputs[name] for name in ("lr0", "lr1", "lr2")}
    coefficients = (TRIPLE,) * 2 if options.get("use_moun") else None
    expected, *new = by_reference(
        scaled, steps, coefficients=coefficients, weight_norm=options.get("weight_norm", True)
    )
    zeros = o.new_zeros(len(o), 19 - expected.shape[1], o.shape[2])
    assert_same((o, *weights), (torch.cat([expected, zeros], dim=1), *new), inputs)


@pytest.mark.parametrize("repeat, size, lq", [(1, -1, None), (2, 7, 40)])
def test_video_inference_is_that_of_the_reference(repeat, size, lq):
    inputs = make(lq=lq)
    ours = INFERENCE(*inputs.values(), -0.3, repeat, size, True)
    scaled = inputs | {name: -0.3 * inputs[name] for name in ("lr0", "lr1", "lr2")}
    steps = [("update", [(0, 19 if size == -1 else size)])] * repeat
    steps.append(("apply", [(0, inputs["q"].shape[1])]))
    assert_same(ours, by_reference(scaled, steps), inputs)


def test_a_video_piece_by_piece_is_the_whole_one():
    """The norms of weights that are passed on are, but for 1e-5, those of the first."""
    x = {name: value.detach() for name, value in make(l=20).items()}
    expected, *last = VIDEO(**x, w_scale=0.3, mini_batch_size=4)

    def piece(tokens, weights, **options):
        sliced = {name: x[name][:, tokens] for name in NAMES[3:]}
        o, *weights = INFERENCE(*weights, **sliced, w_scale=0.3, **options)
        return o, weights

    o, weights = piece(slice(0, 4), [x["w0"], x["w1"], x["w2"]])
    outputs = [o]
    for start in (4, 12):
        update = {"do_update": True, "mini_batch_size": 4}
        o, weights = piece(slice(start, start + 8), weights, **update)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=2e-4)
    for a, b in zip(weights, last):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("use_muon", [False, True])
def test_bidirectional_is_that_of_the_reference(use_muon):
    inputs = make(lq=23)
    ours = bidirectional_lact_swiglu(*inputs.values(), use_muon)
    coefficients = plain_family.LACT_COEFFICIENTS if use_muon else None
    steps = [("update", [(0, 19)]), ("apply", [(0, 23)])]
    assert_same((ours,), by_reference(inputs, steps, coefficients=coefficients)[:1], inputs)


def test_bidirectional_muon_says_what_differs_once():
    inputs = make(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            bidirectional_lact_swiglu(**inputs)
        bidirectional_lact_swiglu(**inputs, use_muon=False)
    assert [str(x.message)[:9] for x in caught] == ["use_muon:"] and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="loses the weights"):
        BidirectionalLaCTSwiGLU(12, 6)


CALLS = {
    "views": (VIEWS, True, {"ttt_ua_order": [O(0, 11, True, False), O(0, -1, True, True)]}),
    "video": (VIDEO, False, {"w_scale": 0.3, "mini_batch_size": 4, "use_moun": True}),
    "inference": (INFERENCE, False, {"w_scale": 0.3, "do_update": True}),
    "bidirectional": (bidirectional_lact_swiglu, False, {}),
}


def call(name, inputs, **more):
    function, _, options = CALLS[name]
    results = function(**inputs, **options, **more)
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("name", CALLS)
def test_dtypes(name):
    """Rounding aside, a call in 16 bits is the one in float64; outputs have the dtype of v."""
    inputs = make(torch.bfloat16, CALLS[name][1])
    wide = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    ours, expected = call(name, inputs), call(name, wide)
    assert [x.dtype for x in ours] == [torch.bfloat16, *[torch.float32] * (len(ours) - 1)]
    for a, b in zip(ours, expected):
        assert (a - b).norm() < 5e-2 * b.norm()
    gradients = torch.autograd.grad(sum(x.sum() for x in ours), list(inputs.values()))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", CALLS)
def test_triton_takes_their_layouts(name):
    """Values and gradients, by the bar of all kernels."""
    inputs = normed(make(torch.float32, CALLS[name][1], rows=2, dk=16, dv=16, dh=32))
    wide = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    results = [
        call(name, inputs, backend="triton"),
        call(name, inputs, backend="eager"),
        call(name, wide),
    ]
    factors = [torch.randn_like(x) for x in results[0]]
    for given, outputs in zip((inputs, inputs, wide), results):
        total = sum((x * factor).sum() for x, factor in zip(outputs, factors))
        outputs += torch.autograd.grad(total, list(given.values()))
    names = ("o", "new w0", "new w1", "new w2")[: len(factors)] + NAMES
    for key, *x in zip(names, *results, strict=True):
        assert_close_to_float64(*x, key)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name):
    function, transposed, options = CALLS[name]
    inputs = make(torch.float32, transposed)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = compiled(**inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    assert_same(results, call(name, inputs), inputs, 1e-5)


@torch.no_grad()
def test_compiles_with_dynamic_sizes():
    """Numbers, too, are variables then."""
    compiled = torch.compile(VIEWS, fullgraph=True, backend="eager", dynamic=True)
    inputs = make(torch.float32, transposed=True)
    options = {"ttt_ua_order": [O(0, 19, True, True)], "muon_update_steps": 1}
    torch.testing.assert_close(compiled(**inputs, **options), VIEWS(**inputs, **options))


@pytest.mark.parametrize("name", CALLS)
def test_no_token_is_copied(name, monkeypatch):
    module = inspect.getmodule(CALLS[name][0])
    given, op = [], module.ttt
    monkeypatch.setattr(module, "ttt", lambda *a, **o: given.extend(a[:6]) or op(*a, **o))
    inputs = make(torch.float32, CALLS[name][1])
    call(name, inputs)
    order = ("q", "k", "v", "w0", "w1", "w2")
    assert [x.data_ptr() for x in given] == [inputs[key].data_ptr() for key in order]


def test_autocast_changes_nothing():
    for name in CALLS:
        inputs = make(torch.float32, CALLS[name][1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = call(name, inputs)
        for a, b in zip(ours, call(name, inputs)):
            assert torch.equal(a, b)


R = torch.randn
BAD = [
    ("views", {"w0": R(4, 7, 6)}, ValueError, r"w0 .*\[b\*h, dk, dh\]"),
    ("views", {"w1": R(4, 6, 5)}, ValueError, r"w1 .*\[b\*h, dh, dv\] = \(4, 7, 5\)"),
    ("views", {"lr0": R(4, 19, 6)}, ValueError, "lr0 .*per channel"),
    ("views", {"k": R(4, 18, 6)}, ValueError, r"v .*\(4, 18, 5\)"),
    ("views", {"v": None}, TypeError, "v must be a tensor, got NoneType"),
    ("views", {"muon_update_steps": -1}, ValueError, "muon_update_steps must not be negative"),
    ("views", {"muon_update_steps": 1.5}, TypeError, "muon_update_steps must be an int"),
    ("views", {"ttt_ua_order": [O(0, -2, True, True)]}, ValueError, "got \\(0, -2\\)"),
    ("views", {"ttt_ua_order": [O(-1, 4, True, True)]}, ValueError, "got \\(-1, 4\\)"),
    ("views", {"ttt_ua_order": [(0, 4, True)]}, TypeError, "entry 0 of the order has no start"),
    ("views", {"ttt_ua_order": None}, TypeError, "the order must be a sequence of TTTOperator"),
    ("views", {"ttt_ua_order": [O(0.0, 4, True, True)]}, TypeError, "start .*int, got 0.0"),
    ("views", {"backend": "fast"}, ValueError, "backend must be"),
    ("video", {"w0": R(4, 6, 7)}, ValueError, r"w0 .*\[b\*h, dh, dk\]"),
    ("video", {"q": R(4, 20, 6)}, ValueError, r"k .*\(4, 20, 6\)"),
    ("video", {"w_scale": "1"}, TypeError, "w_scale must be a number"),
    ("video", {"w_scale": float("nan")}, ValueError, "w_scale must be finite"),
    ("video", {"num_repeat": 0}, ValueError, "num_repeat must be at least 1"),
    ("video", {"mini_batch_size": 0}, ValueError, "mini_batch_size must be at least 1, or -1"),
    ("video", {"update_every": 3}, ValueError, "update_every .* mini_batch_size = 4, got 3"),
    ("video", {"update_length": 20}, ValueError, "update_length must be from 1 to the 19 tokens"),
    ("video", {"use_moun": 1}, TypeError, "use_moun must be True or False"),
    ("video", {"num_moun_iters": -1}, ValueError, "num_moun_iters must not be negative"),
    ("video", {"weight_norm": None}, TypeError, "weight_norm must be True or False"),
    ("inference", {"do_update": 1}, TypeError, "do_update must be True or False"),
    ("inference", {"mini_batch_size": 20}, ValueError, "mini_batch_size must be from 1 to the 19"),
    ("inference", {"backend": "fast"}, ValueError, "backend must be"),
    ("bidirectional", {"use_muon": 1}, TypeError, "use_muon must be True or False"),
    ("bidirectional", {"w2": R(4, 8, 6)}, ValueError, r"w2 .*\[b\*h, dh, dk\]"),
]


@pytest.mark.parametrize(
    "name, changed, error, message", BAD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(name, changed, error, message):
    function, transposed, options = CALLS[name]
    with pytest.raises(error, match=message):
        function(**(make(torch.float32, transposed) | options | changed))


@pytest.mark.parametrize("name", CALLS)
def test_no_tokens_and_no_rows(name):
    for sizes in ({"l": 0}, {"rows": 0}):
        inputs = make(torch.float32, CALLS[name][1], **sizes)
        options = {} if name != "video" else {"mini_batch_size": -1}
        function, _, more = CALLS[name]
        results = function(**inputs, **(more | options))
        o = results[0] if isinstance(results, tuple) else results
        assert o.shape[0] == inputs["q"].shape[0] and o.numel() == 0


THEIRS = {
    "views": ("lact_nvs", "lact_ttt"),
    "video": ("lact_ar_video", "minVid.models.blocks.ar_lact_swa_repeat"),
    "inference": ("lact_ar_video", "minVid.models.blocks.ar_lact_swa_repeat"),
    "bidirectional": ("minimal_implementations", "bidirectional_lact_layer"),
}
AUTHORS_CALLS = {
    "views": [{"ttt_ua_order": order, "muon_update_steps": n} for n in (0, 5) for order in (
        [O(0, 130, True, False), O(0, 500, False, True)],
        [O(0, 90, True, True), O(90, 180, True, True), O(180, 250, False, True)],
    )],
    "video": [
        {"w_scale": 0.7, "mini_batch_size": 48},
        {"w_scale": 0.7, "mini_batch_size": 48, "num_repeat": 2, "weight_norm": False},
        {"w_scale": 0.7, "mini_batch_size": 50, "update_every": 150, "use_moun": True},
    ],
    "inference": [
        {"w_scale": 0.7},
        {"w_scale": 0.7, "do_update": True, "mini_batch_size": 100, "num_repeat": 2},
        {"w_scale": 0.7, "do_update": True, "use_moun": True},
    ],
    "bidirectional": [{"use_muon": False}],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*cuda")
@pytest.mark.parametrize(
    "name, options", [(name, x) for name, calls in AUTHORS_CALLS.items() for x in calls]
)
def test_equals_the_authors_functions(name, options):
    """In float64 the same, in float32 as exact as theirs, and but for Newton-Schulz within 1e-6 of it.

    Their iteration, in bfloat16 otherwise, is given the dtype of the rest.
    """
    theirs = getattr(lact_authors.module(*THEIRS[name]), CALLS[name][0].__name__)
    wide = normed(make(torch.float64, CALLS[name][1], rows=3, l=250, dk=24, dv=24, dh=32))
    narrow = {key: x.detach().float() for key, x in wide.items()}
    iterates = options.get("muon_update_steps") or options.get("use_moun")

    def run(function, inputs):
        with lact_authors.computing_in(inputs["q"].dtype):
            results = function(**inputs, **options)
        return results if isinstance(results, tuple) else (results,)

    exact = run(theirs, {key: x.detach() for key, x in wide.items()})
    assert_same(run(CALLS[name][0], wide), run(theirs, wide), wide, 1e-10)
    ours, expected = (run(function, narrow) for function in (CALLS[name][0], theirs))
    errors, their_errors, differences = (
        [((a - b).norm() / b.norm()).item() for a, b in zip(*pair)]
        for pair in ((ours, exact), (expected, exact), (ours, expected))
    )
    print("error", errors, "of theirs", their_errors, "difference", differences)
    assert all(a < 2 * b + 1e-7 for a, b in zip(errors, their_errors)), (errors, their_errors)
    assert iterates or max(differences) < 1e-6, differences


@pytest.mark.parametrize("name", CALLS)
def test_signatures_are_those_of_the_checkout(name):
    ours = CALLS[name][0]
    theirs = getattr(lact_authors.module(*THEIRS[name]), ours.__name__)
    *expected, backend = inspect.signature(ours).parameters.values()
    assert backend.name == "backend"
    theirs = inspect.signature(theirs).parameters.values()
    assert [(x.name, x.default) for x in theirs] == [(x.name, x.default) for x in expected]
