"""`window_attn` as it is compiled, in the tiles of the table: outputs, lse and gradients against float64.

Nothing may be reported either: an access out of bounds, a race, a read of what has not arrived. The
lengths are such that the loops over tiles meet left edge, interior and diagonal, and run often enough
for every buffer of their pipelines to be used again.
"""

import functools
import math

import pytest
import torch

import reference
from benchmarks.emulation import emulated_device
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.ops.window_attn import check_attention, run_window_attn
from tests.cases import WindowCase, check_window_attn, filled_with_nan
from tests.emulated.layouts import bordered, heads_first
from tests.emulated.targets import FLOAT_TARGETS, HALF_TARGETS, SMALL_TARGETS, TWO_TARGETS, target

case_of = functools.partial(WindowCase, D=64, Dv=64, Hq=2, Hkv=1)
# Tiles have 64 or 128 queries by 64 or 128 keys; those of float32 have 32 by 32.
CASE = case_of("all three segments", 410, 300)
FLOAT_CASE = case_of("all three segments", 170, 110)
PACKED_FLOAT_CASES = [
    case_of("packed", 150, 80, cu_seqlens=(0, 0, 1, 40, 40, 150)),
    case_of(
        "packed with all options", 150, (50, 40), cu_seqlens=(0, 50, 150), softcap=2.0, sinks=1.0
    ),
]
# Two kernels for all of them but those with options: dense and packed.
LENGTHS = [
    case_of("no window and heads of their own", 290, None, Hkv=2),
    case_of("window of one", 130, 1),
    case_of("window beyond the keys in two rows", 129, 1000, B=2),
    case_of("fewer queries than keys", 100, 180, Tk=330),
    case_of("few queries by the kernel of the cache", 5, 90, Tk=150),
    case_of("queries before the keys", 200, 50, Tk=60),
    case_of("packed with sequences of nothing and of one", 410, 200, cu_seqlens=(0, 0, 1, 120, 410)),
    case_of(
        "packed with queries without keys", 200, None, Tk=210,
        cu_seqlens=(0, 60, 60, 200), cu_seqlens_k=(0, 0, 150, 210),
    ),
    case_of("two sides and sinks", 290, (90, 70), sinks=1.0),
    case_of("all keys with all options", 140, (-1, -1), Tk=230, softcap=2.0, sinks=1.0),
    case_of(
        "packed with all options", 410, (100, 70), cu_seqlens=(0, 0, 1, 120, 410), softcap=2.0, sinks=1.0
    ),
]  # fmt: skip
WIDE = case_of("wide", 390, 260, Hq=1, D=128, Dv=128)
# Each width has one set of tiles, whole or padded with zeros: one of the two on each architecture.
HEAD_DIMS = {
    90: [
        case_of("padded", 270, None, Hq=1, D=80, Dv=80),
        # Rows of 136 bytes, which no descriptor can have.
        case_of("padded and by pointers", 270, 140, Hq=1, D=68, Dv=68),
        WIDE,
        # On sm_80 it has the tiles of the widest, and here dk and dv have launches of their own.
        case_of("widest and padded beside narrower values", 200, 150, Hq=1, D=192, Dv=128),
        # Where a soft cap has tiles of its own, and where dk and dv have launches.
        case_of("wide with a soft cap", 200, (80, 60), Hq=1, D=128, Dv=128, softcap=2.0),
        case_of("widest with a soft cap", 150, 90, Hq=1, D=256, Dv=256, softcap=2.0),
    ],
    80: [
        case_of("narrow and padded beside wider values", 150, 70, Hq=1, D=40, Dv=64),
        WIDE,
        case_of("widest", 200, 150, Hq=1, D=256, Dv=256),
    ],
}


def check(arch, dtype, case, layout=lambda x: x, attend=run_window_attn):
    """`attend` on q, k and v in another layout."""

    def fn(q, k, v, window_size, softcap=None, sinks=None, cu_seqlens=None, cu_seqlens_k=None, **_):
        options = check_attention(q, k, v, window_size, None, softcap, sinks)
        borders = None
        if cu_seqlens is not None:
            borders = cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        return attend(layout(q), layout(k), layout(v), options, sinks, borders, "triton")

    with emulated_device(arch) as emulation, filled_with_nan():
        check_window_attn(fn, case, dtype)
    launched = {launch.kernel for launch in emulation.launches}
    assert {"_window_attn_bwd_dq_kernel", "_window_attn_bwd_dkv_kernel"} < launched


@pytest.mark.parametrize("arch, dtype", HALF_TARGETS)
def test_half(arch, dtype):
    check(arch, dtype, CASE)


@pytest.mark.parametrize("arch, dtype", FLOAT_TARGETS[1:])
def test_float(arch, dtype):
    check(arch, dtype, FLOAT_CASE)


@pytest.mark.parametrize("arch, dtype", FLOAT_TARGETS[:1])
def test_wide_float(arch, dtype):
    """Beyond 128 channels the dk/dv pass loads its three statistics in another way."""
    check(arch, dtype, case_of("", 60, 30, D=160, Dv=160))


@pytest.mark.parametrize("arch, dtype", FLOAT_TARGETS[:1])
@pytest.mark.parametrize("case", PACKED_FLOAT_CASES, ids=str)
def test_packed_float(arch, dtype, case):
    """On the other architecture, for which float32 has the same tiles."""
    check(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(arch, dtype, case):
    check(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[:1])
@pytest.mark.parametrize("case", HEAD_DIMS[90], ids=str)
def test_head_dims_on_sm_90(arch, dtype, case):
    check(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS[1:])
@pytest.mark.parametrize("case", HEAD_DIMS[80], ids=str)
def test_head_dims_on_sm_80(arch, dtype, case):
    check(arch, dtype, case)


@pytest.mark.parametrize("arch, dtype", SMALL_TARGETS)
def test_widest_head_dims_in_little_shared_memory(arch, dtype):
    """These GPUs have 99 KiB, so rows of their own: the emulator refuses a kernel that takes more."""
    D = 192 if arch == 120 else 256
    check(arch, dtype, case_of("", 140, 90, Hq=1, D=D, Dv=D))


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
@pytest.mark.parametrize("layout", [bordered, heads_first])
def test_layouts(arch, dtype, layout):
    check(arch, dtype, case_of("", 200, 70), layout)


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_without_gradient_of_lse(arch, dtype):
    """As in training, where only the outputs have one: the lse comes from the reference."""

    def attend(q, k, v, options, *rest):
        o, _ = run_window_attn(q, k, v, options, *rest)
        return o, reference.window_attn(q, k, v, options.width, return_lse=True)[1]

    check(arch, dtype, case_of("", 200, 70), attend=attend)


@pytest.mark.parametrize(
    "arch, dtype", [target(90, "bfloat16"), target(80, "bfloat16"), *FLOAT_TARGETS]
)
def test_scores_of_minus_infinity(arch, dtype):
    """A row whose every score is -inf sees nothing; elsewhere only finite scores count."""
    q, k, v = case_of("", 40, None).inputs(dtype)
    with torch.no_grad():
        q.fill_(1.2e30)  # of float32 products from three, two overflow to +inf here, or to NaN
        k[:, 7:31] = -1e30
    with emulated_device(arch), filled_with_nan():
        o, lse = run_window_attn(q, k, v, AttentionOptions(9, 0, 0.125), backend="triton")
        cotangents = [torch.randn_like(x) for x in (o, lse)]
        grads = torch.autograd.grad((o, lse), (q, k, v), cotangents)
    assert all(x.isfinite().all() for x in (o, *grads))
    assert torch.equal(o == 0, (lse.mT == -math.inf)[..., None].expand_as(o))
    assert [row.nonzero().flatten().tolist() for row in lse[0] == -math.inf] == 2 * [
        [*range(16, 31)]
    ]


@pytest.mark.parametrize("arch, dtype", TWO_TARGETS)
def test_nothing_of_a_packed_sequence_reaches_the_one_before_it(arch, dtype):
    """Its last tiles go on with the next one's rows: the same bits, whether these are finite or NaN.

    By descriptors also with a window that goes on.

    A warp has 16 rows, of one of the two: the logarithm branches at a NaN, which the emulator follows with
    whole warps.
    """
    length, T = 144, 208
    q, k, v = case_of("", T, 70, cu_seqlens=(0, length, T)).inputs(dtype)
    cu_seqlens = torch.tensor((0, length, T), dtype=torch.int32)
    cotangents = torch.randn_like(v.expand_as(q)), torch.randn(1, 2, T)
    results = []
    for _ in range(2):
        parts = []
        for right in (0, 30) if arch == 90 else (0,):
            options = AttentionOptions(69, right, 0.125)
            with emulated_device(arch), filled_with_nan():
                o, lse = run_window_attn(q, k, v, options, None, (cu_seqlens, cu_seqlens), "triton")
                grads = torch.autograd.grad((o, lse), (q, k, v), cotangents)
            parts += [x[:, :length] for x in (o, lse.mT, *grads)]
        results.append(parts)
        with torch.no_grad():
            for x in (q, k, v, *cotangents):
                (x if x.dim() == 4 else x.mT)[:, length:] = math.nan
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*results))
