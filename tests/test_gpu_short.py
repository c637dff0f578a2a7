"""Every Triton kernel on a GPU in both 16-bit dtypes, in as few compilations as that takes.

Outputs and all gradients are held against float64 by the rule of all tests. The complete cases are in
the other files; what these launch is counted here without a GPU.
"""

import functools
import importlib
import pkgutil
from unittest import mock

import pytest
import torch

from benchmarks.compile_report.kernels import compile_cases
from lact_kernels import Apply, TTTPlan, Update, block_causal_ttt, ttt_apply, window_attn
from lact_kernels import triton as package
from lact_kernels.triton import configs
from tests import test_block_causal_ttt_triton as ttt
from tests import test_branches as branches
from tests import test_window_attn_with_kvcache as kvcache
from tests.cases import (
    ApplyCase,
    TTTCase,
    WindowCase,
    check_block_causal_ttt,
    check_ttt_apply,
    check_window_attn,
    filled_with_nan,
)
from tests.ttt_pieces import in_pieces
from tests.ttt_plans import PUBLISHED, PlanCase, check_case, state_tensors

triton_window_attn = functools.partial(window_attn, backend="triton")
triton_block_causal_ttt = functools.partial(block_causal_ttt, backend="triton")
triton_ttt_apply = functools.partial(ttt_apply, backend="triton")
pytestmark = pytest.mark.usefixtures("full_float32_products")
needs_interpreter = pytest.mark.skipif(not ttt.ON_CPU, reason="counts in the interpreter")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# Windows whose tiles have a left edge, an interior and a diagonal. A head dim and packing compile anew,
# lengths and heads do not.
attention = functools.partial(WindowCase, Hq=4, Hkv=2)
ATTENTION = [
    attention("D64 grouped heads", 410, 300, B=2, D=64, Dv=64),
    attention("D64 packed", 410, 200, D=64, Dv=64, cu_seqlens=(0, 0, 1, 120, 410)),
    attention("D40 beside wider values", 150, 70, D=40, Dv=64),
    attention("D80 padded", 400, 129, D=80, Dv=96),
    attention("D68 by pointers", 400, 129, D=68, Dv=68),  # rows of 136 bytes have no descriptor
    attention("D128 on a cache", 390, 260, Tk=515, D=128, Dv=128),
    attention("D128 packed", 700, 257, D=128, Dv=128, cu_seqlens=(0, 1, 300, 300, 700)),
    attention("D192 beside narrower values", 390, 200, D=192, Dv=128),
    attention("D256 without window", 385, None, D=256, Dv=256),
    attention("D128 with all options", 390, (130, 70), D=128, Dv=128, softcap=2.0, sinks=1.0),
    attention(
        "D64 packed with all options",
        410,
        (100, 60),
        D=64,
        Dv=64,
        cu_seqlens=(0, 0, 1, 120, 410),
        softcap=2.0,
        sinks=1.0,
    ),
]
# Few rows of queries take the narrow tiles, many the wide ones.
narrow = functools.partial(kvcache.CacheCase, Hq=8, Hkv=2)
wide = functools.partial(narrow, Tq=40)
CACHES = [
    tiles(f"{kind} D{D}", 700, 600, lengths, D=D, Dv=Dv)
    for kind, tiles, lengths in (("narrow", narrow, (700, 130, 1)), ("wide", wide, (700, 39)))
    for D, Dv in ((64, 64), (80, 72), (128, 128), (192, 128), (256, 256))
]
CACHES += [
    tiles(
        f"{kind} with all options",
        700,
        (500, 2),
        (1500, 130, 1),
        Tq=Tq,
        D=64,
        Dv=64,
        softcap=2.0,
        sinks=True,
    )
    for kind, tiles, Tq in (("narrow", narrow, 4), ("wide", wide, 40))
]
# Several updates and a rest, and heads enough for the gradients of momentum to have statistics.
OPTIONS = {str(case): case for case in ttt.MEDIUM}
TTT = [
    OPTIONS["momentum"],
    OPTIONS["momentum-muon-prenorm"],
    # Sizes of models: what is timed after the tests is compiled here, by many processes at once.
    TTTCase("D768", B=1, T=600, chunk_size=256, H=1, Dk=768, Dv=768, Dh=768),
    TTTCase("D384", B=1, T=600, chunk_size=256, H=1, Dk=384, Dv=384, Dh=384),
    TTTCase("sums in parts", B=1, T=1100, chunk_size=1024, H=1, Dk=64, Dv=64, Dh=64),
    TTTCase("unequal dims muon", B=1, T=400, chunk_size=192, H=2, Dk=24, Dv=136, Dh=144, muon=True),
    TTTCase(
        "packed prenorm", B=1, T=1000, chunk_size=128, H=4, Dk=64, Dv=64, Dh=64, momentum=True,
        prenorm=True, batched_weights=True, cu_seqlens=(0, 0, 1, 130, 600, 1000),
    ),
]  # fmt: skip
# Weights that all rows share, and some for each row.
APPLY = [
    ApplyCase("D384", T=300, B=1, Dk=384, Dv=384, Dh=768, float32_weights=True),
    ApplyCase("unequal dims", T=130, B=3, H=1, Dk=20, Dv=136, Dh=144, batched="012"),
]
# Elongated weights, for which Newton-Schulz takes its Gram form; updates and queries in any order; w1 alone.
late = {"muon": True, "momentum_after_muon": True, "weight_norm": False}
GAPS = TTTPlan([Apply(0, 200), Update(300), Update(0, 250), Apply(150, 400)])
PLANS = {
    "views": PlanCase(
        (TTTPlan([Update(0, 1100), Apply(0, 300)]),), ((300, 1100),),
        (("muon", PUBLISHED), ("detach_norms", True)), rows=1, sizes=(1, 512, 512, 768),
    ),
    "gaps": PlanCase(
        (GAPS,), ((400, 600),), tuple(late.items()), momentum=True, rows=2, sizes=(4, 24, 136, 144)
    ),
    "w1 of packed sequences": PlanCase(
        (TTTPlan.bidirectional(), GAPS), ((70, 90), (400, 500)), (("prenorm", True),),
        trained=(False, True, False), sizes=(2, 64, 64, 64),
    ),
}  # fmt: skip
BRANCHES = [
    branches.Case(f"C{C}", T=499, C=C, Hq=Hq, Hf=Hf, rows_of_angles=2)
    for C, Hq, Hf in ((768, 12, 4), (640, 8, 4), (1024, 16, 8))
]


def pieces(**arguments):
    """Cut inside a chunk and at a border, so that states are read and written."""
    return in_pieces(triton_block_causal_ttt, (40, 128), **arguments)[0]


# Those that compile most come first, as they take longest.
@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", TTT, ids=str)
def test_block_causal_ttt(case, dtype):
    with filled_with_nan():
        check_block_causal_ttt(triton_block_causal_ttt, case, dtype, "cuda")


@pytest.mark.gpu
@dtypes
def test_block_causal_ttt_with_initial_states(dtype):
    with filled_with_nan():
        check_block_causal_ttt(pieces, OPTIONS["momentum"], dtype, "cuda")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", APPLY, ids=str)
def test_ttt_apply(case, dtype):
    with filled_with_nan():
        check_ttt_apply(triton_ttt_apply, case, dtype, "cuda")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_ttt(case, dtype):
    with filled_with_nan():
        check_case(case, dtype, "cuda", backend="triton")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_window_attn(case, dtype):
    with filled_with_nan():
        check_window_attn(triton_window_attn, case, dtype, "cuda")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", CACHES, ids=str)
def test_window_attn_with_kvcache(case, dtype):
    for num_splits in (1, 3):
        kvcache.check_kernels(case, dtype, num_splits, None)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("case", BRANCHES, ids=str)
@branches.both
def test_branches(check, case, dtype):
    check(case, dtype, "triton", "cuda")


def differentiate(outputs, inputs):
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    ones = [torch.ones_like(x) for x in outputs]
    torch.autograd.grad(outputs, inputs, ones, materialize_grads=True)


def run_all(dtype):
    """All that the tests above compute with the kernels, without what it is compared with."""
    for case in ATTENTION:
        inputs = case.inputs(dtype)
        differentiate(case.attend(triton_window_attn, inputs, return_lse=True), inputs)
    for case in CACHES:
        (q, k, v), options = case.inputs(dtype)
        for num_splits in (1, 3):
            kvcache.kernels(num_splits, None)(q, k, v, **options)
    for fn, case in [(triton_block_causal_ttt, case) for case in TTT] + [(pieces, TTT[0])]:
        inputs = case.inputs(dtype)
        differentiate(fn(**inputs, **case.options()), list(inputs.values()))
    for case in APPLY:
        inputs = case.inputs(dtype)
        differentiate(triton_ttt_apply(*inputs), inputs)
    for case in PLANS.values():
        x = case.tensors(dtype)
        o, state = case.call(backend="triton", return_state=True)(**x)
        differentiate((o, *state_tensors(state)), list(x.values()))
    for case in BRANCHES:
        tensors, options = case.qkv(dtype)
        qkv = branches.call_qkv(branches.silu_l2norm_rope, tensors, options | {"backend": "triton"})
        differentiate(qkv, list(tensors.values()))
        tensors = case.sum(dtype)
        out = branches.rms_norm_scale_add(**tensors, eps=branches.EPS, backend="triton")
        differentiate(out, list(tensors.values()))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def launches(request):
    """Of `run_all`: names of kernels and their arguments. No kernel runs, and no value matters."""
    from triton.runtime.interpreter import InterpretedFunction

    recorded = []

    def record(kernel, *args, grid, warmup, **options):
        recorded.append((kernel.__name__, dict(zip(kernel.arg_names, args)) | options))

    with (
        mock.patch.object(InterpretedFunction, "run", record),
        mock.patch.object(torch, "randn", torch.zeros),  # which takes less time
        mock.patch.object(torch, "rand", torch.zeros),
    ):
        run_all(request.param)
    return recorded


@needs_interpreter
def test_every_kernel_is_launched(launches):
    names = {x.name for x in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    kernels = {
        name
        for module in map(importlib.import_module, names)
        for name, x in vars(module).items()
        if name.endswith("_kernel") and hasattr(x, "arg_names")
    }
    assert len(kernels) >= 20
    assert {name for name, _ in launches} == kernels
    assert {case.kernel.__name__ for case in compile_cases((90,))} == kernels


@needs_interpreter
def test_weights_are_read_packed_and_where_they_lie(launches):
    kinds = set()
    for name, arguments in launches:
        if "weight_strides" in arguments:
            three = arguments["w1"] is not None and arguments["w2"] is not None
            described = arguments.get("DESCRIBED", arguments.get("x_strides", 0) is None)
            kinds.add((name, described, three))
    hidden, project = "_ttt_hidden_kernel", "_ttt_project_kernel"
    by_pointers = {(name, False, three) for name in (hidden, project) for three in (False, True)}
    assert kinds == by_pointers | {
        (hidden, True, False),
        (hidden, True, True),
        (project, True, True),
    }


@needs_interpreter
def test_fast_weights_are_launched_by_descriptors_in_tiles_of_either_width(launches):
    rows = {
        (name, described, arguments["BLOCK_N"])
        for name, arguments in launches
        if name in ("_ttt_outer_kernel", "_ttt_project_kernel")
        and (described := arguments.get("DESCRIBED", arguments.get("x_strides", 0) is None))
    }
    assert rows == {
        (name, True, width)
        for name in ("_ttt_outer_kernel", "_ttt_project_kernel")
        for width in (128, 256)
    }
    assert {
        arguments["k_strides"] is None
        for name, arguments in launches
        if name == "_ttt_hidden_bwd_kernel"
    } == {False, True}


@needs_interpreter
def test_attention_is_launched_in_every_row_of_the_table_and_packed(launches):
    rows, packed, described = set(), set(), set()
    for name, arguments in launches:
        if sizes := arguments.get("SIZES"):
            described.add((name, arguments["q_strides"] is None))
            size = configs._head_dim_class(sizes.D, sizes.DV)
            rows.add((name, sizes.BLOCK_M > 16, size))
            packed |= {name} if arguments.get("cu_seqlens") is not None else set()
    passes = {f"_window_attn_{x}_kernel" for x in ("fwd", "bwd_dq", "bwd_dkv")}
    kinds = {(name, True) for name in passes}
    kinds |= {("_window_attn_with_kvcache_kernel", wide) for wide in (False, True)}
    assert rows == {(*kind, size) for kind in kinds for size in configs.HEAD_DIM_CLASSES}
    assert packed == passes
    fwd = "_window_attn_fwd_kernel"
    assert {(fwd, True), (fwd, False)} <= described
