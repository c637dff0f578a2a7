"""`silu_l2norm_rope` and `rms_norm_scale_add` on both backends, against the reference.

Without a GPU the kernels run in Triton's interpreter, in float32 and in tiles so small that few tokens make
several blocks for each of several programs, and a rest. The tests of tests/emulated run what is compiled
of them, in every dtype and in the sizes of models.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.launches import count_launches
from lact_kernels.autograd.rms_norm_scale_add import rms_norm_scale_add_bwd, rms_norm_scale_add_fwd
from lact_kernels.autograd.silu_l2norm_rope import silu_l2norm_rope_bwd, silu_l2norm_rope_fwd
from lact_kernels.eager import token_blocks
from lact_kernels.ops.rms_norm_scale_add import rms_norm_scale_add
from lact_kernels.ops.silu_l2norm_rope import silu_l2norm_rope
from lact_kernels.triton import configs
from lact_kernels.triton.layer import rows
from reference.rms_norm_scale_add import rms_norm_scale_add as plain_rms_norm_scale_add
from reference.silu_l2norm_rope import silu_l2norm_rope as plain_silu_l2norm_rope
from tests.cases import BACKWARD_OPCHECKS, filled_with_nan
from tests.tolerance import assert_close_to_float64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and set of options, and why it is there. Flags as by default in the layer."""

    reason: str
    T: int = 13
    C: int = 24
    Hq: int = 6
    Hf: int = 2
    B: int = 2
    silu: bool = True
    silu_v: bool = True
    rotate_fast: bool = True
    rows_of_angles: int = 1
    scaled: bool = True  # rms_norm_scale_add
    parameter_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    def qkv(self, dtype, device=DEVICE, gradients=True):
        """Leaves and options of `silu_l2norm_rope`."""
        B, T, C, D = self.B, self.T, self.C, self.C // self.Hq
        wide = torch.float64 if dtype == torch.float64 else self.parameter_dtype
        tensors = {
            "projection": random(B, T, 3 * C).to(dtype),
            "qk_scale": random(C, 2).to(wide),
            "qk_offset": random(C, 2).to(wide),
        }
        tensors = {name: x.to(device).requires_grad_(gradients) for name, x in tensors.items()}
        angles = random(self.rows_of_angles, T, D // 2).mul_(3)
        angles = angles.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        options = {
            "num_attn_heads": self.Hq,
            "num_lact_heads": self.Hf,
            "silu": self.silu,
            "silu_v": self.silu_v,
            "rotate_fast": self.rotate_fast,
        }
        return tensors, {"cos": angles.cos(), "sin": angles.sin(), **options}

    def sum(self, dtype, device=DEVICE, gradients=True):
        """Leaves of `rms_norm_scale_add`; norms around 1, so that eps counts where the input is small."""
        B, T, C, Hq, Hf = self.B, self.T, self.C, self.Hq, self.Hf
        wide = torch.float64 if dtype == torch.float64 else self.parameter_dtype
        tensors = {
            "attn": random(B, T, Hq, C // Hq).to(dtype),
            "ttt": (random(B, T, Hf, C // Hf) * random(B, T, Hf, 1).exp() * 0.01).to(dtype),
            "norm_weight": random(C // Hf).to(wide),
            "scale": random(B, T, Hf).to(dtype) if self.scaled else None,
        }
        return {
            name: x if x is None else x.to(device).requires_grad_(gradients)
            for name, x in tensors.items()
        }


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


FLAGS = [
    Case(f"silu {silu} v {silu_v} rotate {rotate}", silu=silu, silu_v=silu_v, rotate_fast=rotate)
    for silu, silu_v, rotate in itertools.product((True, False), repeat=3)
    if silu or not silu_v
]
SHAPES = [
    Case("one token", T=1),
    Case("one sequence", B=1, scaled=False),
    Case("angles of their own for each row", rows_of_angles=2, T=5),
    Case("parameters in bfloat16", parameter_dtype=torch.bfloat16),
    Case("one fast head", Hf=1),
    Case("heads of two channels", Hq=12, Hf=2),
    Case("same heads in both", Hf=6),
    Case("no tokens", T=0),
    Case("no batch", B=0),
]
# As in models tiles are padded or full, and half a head is a power of two or not.
MODEL_LIKE = [Case("Df 12"), Case("Df 20", C=40, Hq=4, Hf=2), Case("Df 8", C=16, Hq=4, Hf=2)]
EAGER_ONLY = [Case("fast heads inside attention heads", Hq=2, Hf=4, rows_of_angles=2)]


def call_qkv(fn, tensors, options):
    return fn(tensors["projection"], tensors["qk_scale"], tensors["qk_offset"], **options)


def call_three(fn, tensors, options):
    """With q, k and v as tensors of their own."""
    qkv = tensors["projection"].chunk(3, dim=-1)
    return fn(qkv, tensors["qk_scale"], tensors["qk_offset"], **options)


def call_sum(fn, tensors, options):
    return (fn(**tensors, **options),)


def check(call, ours, plain, tensors, options):
    """Outputs and all gradients of `ours` against float64.

    The gradients are small: in plain float16 the one of a mean of squares overflows easily, near eps above
    all, and who is compared with infinity is always right.
    """

    def run(fn, tensors, options, cotangents=None):
        outputs = call(fn, tensors, options)
        leaves = [x for x in tensors.values() if x is not None]
        cotangents = cotangents or [torch.randn_like(x) / 64 for x in outputs]
        grads = torch.autograd.grad(
            outputs, leaves, [c.to(x.dtype) for c, x in zip(cotangents, outputs)]
        )
        return [*outputs, *grads], cotangents

    def exactly(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    exact, cotangents = run(
        plain,
        {name: exactly(x) for name, x in tensors.items()},
        {name: exactly(x) for name, x in options.items()},
    )
    same, _ = run(plain, tensors, options, cotangents)
    with filled_with_nan():
        actual, _ = run(ours, tensors, options, cotangents)
    outputs = [f"output {i}" for i in range(len(cotangents))]
    names = outputs + [f"d{name}" for name, x in tensors.items() if x is not None]
    for name, a, s, e in zip(names, actual, same, exact):
        assert a.shape == s.shape, name
        assert s.isfinite().all(), name
        if a.dtype == torch.float64:  # the reference's own error is 0 here
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        else:
            assert_close_to_float64(a, s, e, name)


def check_qkv(case, dtype, backend, device=DEVICE):
    ours = functools.partial(silu_l2norm_rope, backend=backend)
    check(call_qkv, ours, plain_silu_l2norm_rope, *case.qkv(dtype, device))


def check_sum(case, dtype, backend, device=DEVICE):
    ours = functools.partial(rms_norm_scale_add, backend=backend)
    check(call_sum, ours, plain_rms_norm_scale_add, case.sum(dtype, device), {"eps": EPS})


CHECKS = [check_qkv, check_sum]
both = pytest.mark.parametrize("check", CHECKS, ids=["silu_l2norm_rope", "rms_norm_scale_add"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for each program: of tokens in the eager backend, of rows in the kernels."""
    monkeypatch.setattr(token_blocks, "CPU_BLOCK", 96)
    monkeypatch.setattr(token_blocks, "DEVICE_BLOCK", 96)
    if DEVICE == "cpu":
        monkeypatch.setattr(configs, "_ROW_TABLE", dict.fromkeys(configs._ROW_TABLE, (32, 4)))
        monkeypatch.setattr(rows, "MIN_BLOCKS", 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FLAGS + SHAPES + MODEL_LIKE + EAGER_ONLY, ids=str)
@both
def test_eager(check, case, dtype, small_blocks):
    check(case, dtype, "eager")


@pytest.mark.parametrize("case", SHAPES + MODEL_LIKE, ids=str)
@both
def test_triton(check, case, small_blocks):
    check(case, torch.float32, "triton")


@pytest.mark.parametrize("case", FLAGS, ids=str)
def test_triton_flags(case, small_blocks):
    check_qkv(case, torch.float32, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "sizes", [(768, 12, 4), (640, 8, 4), (1536, 24, 4), (1024, 16, 8), (64, 4, 2)], ids=str
)
@both
def test_gpu(check, sizes, dtype):
    C, Hq, Hf = sizes
    check(Case("", T=1999, C=C, Hq=Hq, Hf=Hf, rows_of_angles=2), dtype, "triton", "cuda")


def test_more_tokens_than_a_block_of_the_table_on_a_cpu():
    check_qkv(Case("", T=400, C=384, Hq=6, Hf=2), torch.float32, "eager")


def leaves_and_function(call, fn, tensors, options):
    """What gradcheck takes."""
    names = [name for name, x in tensors.items() if x is not None]

    def function(*leaves):
        return call(fn, dict.fromkeys(tensors) | dict(zip(names, leaves)), options)

    return function, [tensors[name] for name in names]


TINY = [
    Case("all", T=3, C=8, Hq=2, Hf=2, B=1),
    Case("nothing", 2, 8, 4, 2, 1, False, False, False, scaled=False),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case):
    fn = functools.partial(silu_l2norm_rope, backend="eager")
    function, leaves = leaves_and_function(call_qkv, fn, *case.qkv(torch.float64, "cpu"))
    torch.autograd.gradcheck(function, leaves)
    fn = functools.partial(rms_norm_scale_add, backend="eager", eps=EPS)
    function, leaves = leaves_and_function(call_sum, fn, case.sum(torch.float64, "cpu"), {})
    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradient_of_zeros_is_that_of_the_plain_formula(backend):
    """Rows of zeros and rows so small that only the 1e-5 counts, beside others."""
    results = []
    for fn in (functools.partial(silu_l2norm_rope, backend=backend), plain_silu_l2norm_rope):
        torch.manual_seed(0)
        tensors, options = Case("", silu=False, silu_v=False).qkv(torch.float32)
        with torch.no_grad():
            tensors["qk_offset"].zero_()
            tensors["projection"][0, :4] = 0
            tensors["projection"][0, 4:8] *= 1e-18
        outputs = call_qkv(fn, tensors, options)
        grads = torch.autograd.grad(outputs, list(tensors.values()), [x + 1 for x in outputs])
        results.append([*outputs, *grads])
    for actual, expected in zip(*results):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_norm_of_zeros_is_finite(backend):
    tensors = Case("", T=3).sum(torch.float32)
    with torch.no_grad():
        tensors["ttt"].zero_()
    out = rms_norm_scale_add(**tensors, eps=EPS, backend=backend)
    assert torch.equal(out, tensors["attn"].flatten(2))
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_any_strides(backend):
    """Of inputs and of the gradients that arrive; q, k and v have different ones, and one is not dense."""
    case = Case("", T=7)
    tensors, options = case.qkv(torch.float32, gradients=False)
    q, k, v = tensors.pop("projection").chunk(3, dim=-1)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    v = v.repeat_interleave(2, dim=-1)[..., ::2]
    D = case.C // case.Hq
    angles = {x: options.pop(x).repeat(1, 1, 2)[..., : D // 2] for x in ("cos", "sin")}
    x = case.sum(torch.float32, gradients=False)
    attn = x["attn"].transpose(1, 2).contiguous().transpose(1, 2)
    ttt = x["ttt"].transpose(1, 2).contiguous().transpose(1, 2)
    scale = x["scale"].permute(2, 0, 1).contiguous().permute(1, 2, 0)

    def run(copy):
        leaves = [copy(x).requires_grad_() for x in (q, k, v, attn, ttt, scale)]
        turn = {name: copy(x) for name, x in angles.items()}
        outputs = silu_l2norm_rope(leaves[:3], **tensors, **turn, **options, backend=backend)
        out = rms_norm_scale_add(
            *leaves[3:5], x["norm_weight"], leaves[5], eps=EPS, backend=backend
        )
        # A transposed gradient with heads apart, an expanded one, and contiguous ones.
        cotangents = [y.detach().transpose(1, 2).contiguous().transpose(1, 2) for y in outputs]
        cotangents[3:] = [y.detach()[:1, :1].expand_as(y) for y in outputs[3:]]
        cotangents = [copy(c) for c in (*cotangents, out.detach().mT.contiguous().mT)]
        return [*outputs, out, *torch.autograd.grad((*outputs, out), leaves, cotangents)]

    for strided, dense in zip(run(torch.Tensor.detach), run(torch.Tensor.contiguous)):
        torch.testing.assert_close(strided, dense, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied_before_or_joined_after_the_kernels():
    tensors, options = Case("").qkv(torch.float32)
    outputs, x = [], Case("").sum(torch.float32)
    ours = functools.partial(silu_l2norm_rope, backend="triton")
    forward = count_launches(lambda: outputs.extend(call_qkv(ours, tensors, options)))
    assert forward.total == forward.kernels == 1
    cotangents = [torch.ones_like(y) for y in outputs]
    backward = count_launches(
        lambda: torch.autograd.grad(outputs, list(tensors.values()), cotangents)
    )
    assert backward.kernels == 1
    assert backward.op_names == {"aten::sum": 2}  # over programs, of the parameters' gradients
    forward = count_launches(lambda: rms_norm_scale_add(**x, eps=EPS, backend="triton"))
    assert forward.total == forward.kernels == 1


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("silu_v", [True, False])
def test_one_tensor_and_three_are_the_same(backend, silu_v, small_blocks):
    tensors, options = Case("", silu_v=silu_v).qkv(torch.float32)
    leaves, results = list(tensors.values()), []
    for call in (call_qkv, call_three):
        torch.manual_seed(0)
        outputs = call(functools.partial(silu_l2norm_rope, backend=backend), tensors, options)
        cotangents = [torch.randn_like(y) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("gradients", [True, False])
def test_values_are_views(backend, gradients):
    for silu_v, views in ((True, 1), (False, 2)):
        tensors, options = Case("", silu_v=silu_v).qkv(torch.float32, gradients=gradients)
        outputs = call_qkv(functools.partial(silu_l2norm_rope, backend=backend), tensors, options)
        place = tensors["projection"].untyped_storage().data_ptr()
        assert [x.untyped_storage().data_ptr() for x in outputs].count(place) == views
        expected = call_qkv(plain_silu_l2norm_rope, tensors, options)
        for x, y in zip(outputs, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def storages(*tensors):
    return {x.untyped_storage().data_ptr() for x in tensors}


def test_a_view_is_for_autograd_alone():
    """Which refuses to have it written. Compiled code and modes are told of no view, and get a copy."""
    tensors, options = Case("").qkv(torch.float32)
    one = storages(tensors["projection"])
    recorded = call_qkv(silu_l2norm_rope, tensors, options)
    assert storages(recorded[2]) == one
    with pytest.raises(RuntimeError, match="is a view"):
        recorded[2].add_(1)
    with FlopCounterMode(display=False):
        under_a_mode = call_qkv(silu_l2norm_rope, tensors, options)
    torch._dynamo.reset()
    compiled = torch.compile(call_qkv, fullgraph=True, backend="aot_eager")
    traced = compiled(silu_l2norm_rope, tensors, options)
    with torch.no_grad():  # where the public function, in the graph, makes the view
        inference = compiled(silu_l2norm_rope, tensors, options)
    for outputs in (under_a_mode, traced):
        assert not storages(*outputs) & one
    for outputs in (under_a_mode, traced, inference):
        assert all(torch.equal(a, b) for a, b in zip(outputs, recorded, strict=True))


def test_some_gradients_alone():
    """Outputs that nobody uses, inputs that need no gradient."""
    tensors, options = Case("").qkv(torch.float32, "cpu")
    thirds = tensors["projection"].detach().chunk(3, dim=-1)
    scale, offset = tensors["qk_scale"].detach(), tensors["qk_offset"].detach()
    for index, needed in ((0, 0), (2, 2), (4, 1), (5, 2)):
        results = []
        for fn in (silu_l2norm_rope, plain_silu_l2norm_rope):
            qkv = [x.clone().requires_grad_(n == needed) for n, x in enumerate(thirds)]
            output = fn(qkv, scale, offset, **options)[index]
            results.append(torch.autograd.grad(output.square().sum(), qkv[needed])[0])
        torch.testing.assert_close(*results)


OPCHECK = [Case("all", T=5), Case("v as it is and no scale", T=5, silu_v=False, scaled=False)]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case, backend):
    tensors, options = case.qkv(torch.float32)
    one = tensors.pop("projection")
    three = [x.detach().requires_grad_() for x in one.chunk(3, dim=-1)]
    for qkv in ([one], three):
        for attn_v in (True, False):
            args = [qkv, *tensors.values(), *options.values(), attn_v, backend]
            torch.library.opcheck(silu_l2norm_rope_fwd, args)
            grads = tree_map(torch.ones_like, silu_l2norm_rope_fwd(*args))
            args = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args)
            backward = {"test_utils": BACKWARD_OPCHECKS}
            torch.library.opcheck(silu_l2norm_rope_bwd, (*grads, *args), **backward)

    attn, *rest = case.sum(torch.float32).values()
    torch.library.opcheck(rms_norm_scale_add_fwd, (attn, *rest, EPS, backend))
    rest = [x if x is None else x.detach() for x in rest]
    dout = torch.ones_like(attn).flatten(2)
    torch.library.opcheck(rms_norm_scale_add_bwd, (dout, *rest, EPS, backend), **backward)


def layer(tensors, options, x):
    """Both operations, with something between them."""
    q, k, v, fast_q, fast_k, fast_v = call_qkv(silu_l2norm_rope, tensors, options)
    attn, ttt = q * k * v, fast_q * fast_k * fast_v
    return rms_norm_scale_add(attn, ttt, x["norm_weight"], x["scale"], eps=EPS)


@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_compile(case):
    """Traced whole; a second length needs no second trace."""
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=frames, dynamic=True)
    counts = []
    for T in (5, 9):
        case = dataclasses.replace(case, T=T)
        tensors, options = case.qkv(torch.float32)
        x = case.sum(torch.float32)
        leaves = [*tensors.values(), x["norm_weight"]]
        results = []
        for fn in (layer, compiled):
            out = fn(tensors, options, x)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for plain, traced in zip(*results):
            torch.testing.assert_close(plain, traced)
        counts.append(frames.frame_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_second_backward_gives_the_same_and_nothing_is_mutated(backend):
    tensors, options = Case("").qkv(torch.float32)
    x = Case("").sum(torch.float32)
    leaves = [*tensors.values(), *x.values()]
    before = [leaf.detach().clone() for leaf in leaves]
    outputs = [
        *call_qkv(functools.partial(silu_l2norm_rope, backend=backend), tensors, options),
        rms_norm_scale_add(**x, eps=EPS, backend=backend),
    ]
    cotangents = [torch.randn_like(y) for y in outputs]
    kept = [y.detach().clone() for y in (*outputs, *cotangents)]
    first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves))
    assert all(torch.equal(a, b) for a, b in zip(kept, (*outputs, *cotangents)))


def test_autocast_changes_nothing():
    tensors, options = Case("").qkv(torch.float32)
    x = Case("").sum(torch.float32)
    leaves = [*tensors.values(), *x.values()]
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            outputs = [
                *call_qkv(silu_l2norm_rope, tensors, options),
                rms_norm_scale_add(**x, eps=EPS),
            ]
            cotangents = [y.detach() for y in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing_is_kept_beside_the_inputs():
    kept = []
    tensors, options = Case("").qkv(torch.float32)
    x = Case("").sum(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        call_qkv(silu_l2norm_rope, tensors, options)
        rms_norm_scale_add(**x, eps=EPS)
    given = (*tensors.values(), options["cos"], options["sin"], *x.values())
    inputs = {y.untyped_storage().data_ptr() for y in given}
    assert kept and {y.untyped_storage().data_ptr() for y in kept} <= inputs


def qkv_arguments(**changed):
    tensors, options = Case("", T=3, B=2).qkv(torch.float32, "cpu", gradients=False)
    return {"qkv": tensors.pop("projection"), **tensors, **options, **changed}


def sum_arguments(**changed):
    return {**Case("", T=3, B=2).sum(torch.float32, "cpu", gradients=False), "eps": EPS, **changed}


def meta(*shape):
    return torch.empty(*shape, device="meta")


ROWS = torch.ones(3, 2, 3, 24).unbind()
BAD_QKV = [
    ({"qkv": 1.0}, TypeError, r"qkv must be a tensor \[B, T, 3C\] or three .*, got float"),
    ({"qkv": ROWS[:2]}, TypeError, r"qkv must be .* three of \[B, T, C\], got 2"),
    (
        {"qkv": torch.ones(2, 3, 72).int()},
        TypeError,
        "qkv must have one of the dtypes .*torch.int32",
    ),
    ({"qkv": torch.ones(3, 72)}, ValueError, r"qkv must have the shape .*got \(3, 72\)"),
    ({"qkv": torch.ones(2, 3, 0)}, ValueError, r"qkv .* C > 0, got \(2, 3, 0\)"),
    ({"qkv": torch.ones(2, 3, 71)}, ValueError, r"qkv .*3C.*, got \(2, 3, 71\)"),
    ({"qkv": [1.0, *ROWS[:2]]}, TypeError, r"q must be a tensor \[B, T, C\], got float"),
    ({"qkv": [ROWS[0].int(), *ROWS[1:]]}, TypeError, "q must have one of the dtypes .*torch.int32"),
    ({"qkv": [ROWS[0][0], *ROWS[1:]]}, ValueError, r"q must have the shape .*got \(3, 24\)"),
    ({"qkv": [torch.ones(2, 3, 0)] * 3}, ValueError, r"q .* C > 0, got \(2, 3, 0\)"),
    ({"qkv": [ROWS[0], ROWS[1].half(), ROWS[2]]}, TypeError, "k .*float32.*float16"),
    ({"qkv": [ROWS[0], ROWS[1][..., 1:], ROWS[2]]}, ValueError, r"k .*24\), got \(2, 3, 23\)"),
    ({"qkv": [*ROWS[:2], meta(2, 3, 24)]}, ValueError, "v must be on cpu like q, got meta"),
    ({"qkv": [*ROWS[:2], None]}, TypeError, "v must be a tensor .* got NoneType"),
    ({"qk_scale": torch.ones(24)}, ValueError, r"qk_scale .*\(24, 2\), got \(24,\)"),
    ({"qk_scale": None}, TypeError, "qk_scale must be a tensor"),
    ({"qk_offset": torch.ones(24, 2).int()}, TypeError, "qk_offset .*torch.int32"),
    ({"qk_offset": meta(24, 2)}, ValueError, "qk_offset must be on cpu like q"),
    ({"num_attn_heads": 5}, ValueError, "num_attn_heads must divide the 24 channels of q, got 5"),
    ({"num_lact_heads": 5}, ValueError, "num_lact_heads must divide the 24 channels of q, got 5"),
    ({"num_attn_heads": 0}, ValueError, "num_attn_heads must be at least 1, got 0"),
    ({"num_lact_heads": 2.0}, TypeError, "num_lact_heads must be an int, got 2.0"),
    ({"num_attn_heads": 8}, ValueError, "num_attn_heads = 8 heads are 3 each, expected an even"),
    ({"cos": torch.ones(1, 3, 3)}, ValueError, r"cos .*\(1, 3, 2\), got \(1, 3, 3\)"),
    ({"cos": torch.ones(3, 3, 2)}, ValueError, r"cos .*\(2, 3, 2\), got \(3, 3, 2\)"),
    ({"cos": torch.ones(1, 3, 2).double()}, TypeError, "cos .*float32.*float64"),
    ({"sin": torch.ones(1, 3, 2).half()}, TypeError, "sin .*float32.*float16"),
    ({"sin": torch.ones(3, 2)}, ValueError, r"sin .*got \(3, 2\)"),
    ({"sin": torch.ones(2, 3, 2)}, ValueError, r"sin .* of cos \(1, 3, 2\), got \(2, 3, 2\)"),
    ({"sin": torch.ones(1, 3, 2, requires_grad=True)}, ValueError, "sin requires a gradient"),
    ({"silu": 1}, TypeError, "silu must be True or False, got 1"),
    ({"silu_v": None}, TypeError, "silu_v must be True or False, got None"),
    ({"rotate_fast": "yes"}, TypeError, "rotate_fast must be True or False, got 'yes'"),
    ({"backend": "cuda"}, ValueError, "backend must be .* got 'cuda'"),
    ({"num_lact_heads": 12, "backend": "triton"}, ValueError, "the 4 channels .* divide its 2"),
]
BAD_SUM = [
    ({"attn": torch.ones(2, 3, 24)}, ValueError, r"attn .*\[B, T, Hq, D\], got \(2, 3, 24\)"),
    ({"ttt": None}, TypeError, "ttt must be a tensor"),
    ({"ttt": torch.ones(2, 3, 2, 11)}, ValueError, "24 channels of attn, got 2 heads of 11: 22"),
    ({"ttt": torch.ones(2, 4, 2, 12)}, ValueError, "ttt must have the shape"),
    ({"ttt": torch.ones(2, 3, 2, 12).half()}, TypeError, "ttt .*float32.*float16"),
    ({"ttt": meta(2, 3, 2, 12)}, ValueError, "ttt must be on cpu like attn, got meta"),
    ({"norm_weight": torch.ones(24)}, ValueError, r"norm_weight .*\(12,\), got \(24,\)"),
    ({"norm_weight": torch.ones(12).int()}, TypeError, "norm_weight .*torch.int32"),
    ({"norm_weight": meta(12)}, ValueError, "norm_weight must be on cpu like attn"),
    ({"scale": torch.ones(2, 3, 2, 1)}, ValueError, r"scale .*\(2, 3, 2\), got \(2, 3, 2, 1\)"),
    ({"scale": torch.ones(2, 3, 2).half()}, TypeError, "scale .*float32.*float16"),
    ({"scale": 1.0}, TypeError, "scale must be a tensor"),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ({"eps": float("inf")}, ValueError, "eps must be finite"),
    ({"eps": None}, TypeError, "eps must be a number"),
    ({"backend": 1}, ValueError, "backend must be .* got 1"),
]


@pytest.mark.parametrize("changed,error,message", BAD_QKV)
def test_bad_input_of_silu_l2norm_rope(changed, error, message):
    with pytest.raises(error, match=message):
        silu_l2norm_rope(**qkv_arguments(**changed))


@pytest.mark.parametrize("changed,error,message", BAD_SUM)
def test_bad_input_of_rms_norm_scale_add(changed, error, message):
    with pytest.raises(error, match=message):
        rms_norm_scale_add(**sum_arguments(**changed))


@pytest.mark.parametrize("arguments", [qkv_arguments, sum_arguments])
def test_triton_refuses_what_it_cannot_run(arguments):
    fn = silu_l2norm_rope if arguments is qkv_arguments else rms_norm_scale_add
    doubles = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments().items()
    }
    with pytest.raises(ValueError, match="no kernels for torch.float64"):
        fn(**doubles, backend="triton")
    C = 2 * 2050
    wide = {"num_attn_heads": C // 2, "num_lact_heads": 2}
    if fn is silu_l2norm_rope:
        x, angles = torch.ones(1, 2, C), torch.ones(1, 2, 1)
        arguments = qkv_arguments(
            qkv=(x, x, x), qk_scale=torch.ones(C, 2), qk_offset=torch.ones(C, 2),
            cos=angles, sin=angles, **wide,
        )  # fmt: skip
    else:
        arguments = sum_arguments(
            attn=torch.ones(1, 2, 2, C // 2), ttt=torch.ones(1, 2, 2, C // 2),
            norm_weight=torch.ones(C // 2), scale=None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="up to 2048 channels, got 2050"):
        fn(**arguments, backend="triton")
