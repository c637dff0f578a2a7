"""`window_attn_with_kvcache` on both backends, against the reference.

Without a GPU the Triton kernels run in the interpreter, in float32 and with tiles of 16 keys. Those of
tests/emulated run what is compiled of them, in every dtype and in the tiles of the table.
"""

import contextlib
import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lact_kernels
import reference
from lact_kernels import window_attn_with_kvcache
from lact_kernels.autograd.window_attn_with_kvcache import UNLIMITED
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.eager import window_attn_with_kvcache as eager
from lact_kernels.ops.checks import check_window
from lact_kernels.ops.window_attn import attention_options, inner_sinks, run_window_attn
from lact_kernels.triton.configs import KernelConfig
from lact_kernels.triton.window_attn.with_kvcache import choose_splits
from lact_kernels.triton.window_attn.with_kvcache import window_attn_with_kvcache as launch
from tests.cases import filled_with_nan
from tests.tolerance import assert_close_to_float64

ON_CPU = not torch.cuda.is_available()
DEVICE = "cpu" if ON_CPU else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = KernelConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)


@dataclasses.dataclass(frozen=True)
class CacheCase:
    """One cache, how many tokens each row has had, and why it is there."""

    reason: str
    slots: int
    window_size: int | tuple[int, int] | None
    lengths: tuple[int, ...] | None = None  # None: as many as there are slots
    Tq: int = 1
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    Dv: int = 16
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    def inputs(self, dtype: torch.dtype):
        """q, the cache, and the options. Slots that were never written are NaN."""
        B = len(self.lengths or (0, 0))
        q = torch.randn(B, self.Tq, self.Hq, self.D, dtype=dtype)
        caches = [torch.randn(B, self.slots, self.Hkv, d, dtype=dtype) for d in (self.D, self.Dv)]
        for b, length in enumerate(self.lengths or ()):
            for cache in caches:
                cache[b, length:] = math.nan
        options = {"window_size": self.window_size, "softcap": self.softcap}
        if self.sinks:  # numbers that every dtype has
            options["sinks"] = torch.randn(self.Hq, device=DEVICE).bfloat16().float()
        if self.lengths is not None:
            options["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return [x.to(DEVICE) for x in (q, *caches)], options


CASES = [
    CacheCase("whole cache", 40, None),
    CacheCase("window inside a tile", 40, 5),
    CacheCase("window of one", 40, 1, (40, 7, 1)),
    CacheCase("rows of different lengths", 70, 20, (1, 19, 20, 21, 70, 33)),
    CacheCase("row without tokens", 20, 8, (0, 3)),
    CacheCase("no window", 50, None, (50, 17)),
    CacheCase("window beyond the cache", 30, 1000, (30, 4)),
    CacheCase("ring before and at its end", 20, 20, (19, 20)),
    CacheCase("ring after its end", 20, 20, (21, 39, 40, 41, 1000)),
    CacheCase("ring larger than the window", 33, 20, (34, 33, 65, 500)),
    CacheCase("ring of one slot more", 21, 20, (22, 45)),
    CacheCase("ring far away", 20, 20, (10**6 + 7, 2**31 - 1)),
    CacheCase("several queries", 50, 9, (50, 30, 12), Tq=5),
    CacheCase("several queries on a ring", 24, 20, (24, 25, 48, 77), Tq=5),
    CacheCase("queries before the first token", 24, 20, (2, 0, 5, 1), Tq=5),
    CacheCase("many queries", 60, 11, (60, 45), Tq=26, Hq=6),
    CacheCase("one head each", 40, 12, (40, 3), Hq=2),
    CacheCase("padded head dims", 40, 12, (40, 3), D=24, Dv=40),
    CacheCase("one slot", 1, 1, (1, 5, 0)),
    CacheCase("two sides", 50, (6, 3), (50, 30, 12, 9), Tq=7),
    CacheCase("two sides on a ring", 24, (18, 4), (24, 25, 48, 77), Tq=6),
    CacheCase("two sides on a ring far away", 24, (18, 4), (10**6 + 7, 2**31 - 1), Tq=6),
    CacheCase("two sides before the first token", 24, (7, 2), (2, 0, 5, 1), Tq=5),
    CacheCase("right side beyond the queries", 24, (8, 40), (24, 5), Tq=3),
    CacheCase("no end on the right", 50, (11, -1), (50, 45, 3), Tq=18, Hq=6),
    CacheCase("no end at all", 30, (-1, -1), (30, 2, 0), Tq=5),
    CacheCase("later tokens of one query", 20, (19, 5), (7, 41)),
    CacheCase("soft cap", 40, 12, (40, 3), softcap=1.5),
    CacheCase("soft cap around the end of a ring", 23, 20, (30, 30), softcap=0.7),
    CacheCase("sinks", 40, 12, (40, 3, 0), sinks=True),
    CacheCase("sinks around the end of a ring", 23, 20, (30, 30), sinks=True),
    CacheCase("sinks before the first token", 24, 20, (2, 0, 5), Tq=5, Hq=6, sinks=True),
    CacheCase("all of it", 24, (18, 4), (24, 48, 77, 2), Tq=6, softcap=2.0, sinks=True),
]


def check(fn, case, dtype):
    (q, k, v), options = case.inputs(dtype)
    actual = fn(q, k, v, **options)
    same = reference.window_attn_with_kvcache(q, k, v, **options, return_lse=True)
    exact = (x.double() for x in (q, k, v))
    exact = reference.window_attn_with_kvcache(*exact, **options, return_lse=True)
    assert [x.dtype for x in actual] == [dtype, torch.float32]
    blind = exact[1] == -math.inf
    assert torch.equal(actual[1] == -math.inf, blind)
    assert_close_to_float64(actual[0], same[0], exact[0], "o")
    lses = (x.masked_fill(blind, 0.0) for x in (actual[1], same[1], exact[1]))
    assert_close_to_float64(*lses, "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_matches_reference(case, dtype):
    def fn(*tensors, **options):
        return window_attn_with_kvcache(*tensors, **options, return_lse=True, backend="eager")

    check(fn, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_equal_keys_on_both_sides_of_the_end_of_a_ring(size, dtype):
    """The shares of two results are those of the numbers of keys, whatever the scores are."""
    W, S, length = 20, 23, 30
    q, k = (torch.full((2, n, 2, 17), size, dtype=dtype, device=DEVICE) for n in (1, S))
    v = torch.randn(2, S, 2, 16, dtype=dtype, device=DEVICE)
    options = {"window_size": W, "cache_seqlens": torch.tensor([length] * 2, device=DEVICE).int()}
    if dtype == torch.float16:
        options["softmax_scale"] = 1.0  # plain PyTorch scales what has overflowed
    actual = window_attn_with_kvcache(q, k, v, **options, return_lse=True, backend="eager")
    same = reference.window_attn_with_kvcache(q, k, v, **options, return_lse=True)
    exact = (x.double() for x in (q, k, v))
    exact = reference.window_attn_with_kvcache(*exact, **options, return_lse=True)
    for a, s, e, name in zip(actual, same, exact, ("o", "lse")):
        assert_close_to_float64(a, s, e, name)


@pytest.mark.parametrize("slots", [20, 23])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_row_whose_every_score_is_minus_infinity(backend, slots):
    q, k, v = (torch.ones(2, n, 2, 16, device=DEVICE) for n in (1, slots, slots))
    q[1] = -math.inf
    options = {"window_size": 20, "cache_seqlens": 30, "return_lse": True, "backend": backend}
    o, lse = window_attn_with_kvcache(q, k, v, **options)
    assert (o[0] == 1).all() and not o[1].any()
    assert lse[0].isfinite().all() and (lse[1] == -math.inf).all()


class Operations(TorchDispatchMode):
    """The names of all that runs, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not ON_CPU, reason="of the eager backend")
@pytest.mark.parametrize(
    "slots, lengths, kernels",
    [(20, (50, 50), 1), (20, (50, 77), 1), (23, (45, 45), 1), (23, (50, 50), 2)],
    ids=["ring", "ring of uneven rows", "slice", "around the end"],
)
def test_decoding_runs_one_kernel_over_the_cache_as_it_is(slots, lengths, kernels):
    """No mask, no copy of keys or values, and little else."""
    q, k, v = (torch.randn(2, n, 4, 16) for n in (1, slots, slots))
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    with Operations() as ran:
        eager.window_attn_with_kvcache(q, k, v, seqlens, AttentionOptions(19, 0, 0.25), None)
    assert ran.names.count("aten::_scaled_dot_product_flash_attention_for_cpu") == kernels
    copies = {"aten::cat", "aten::clone", "aten::copy_", "aten::repeat", "aten::masked_fill_"}
    assert not copies & set(ran.names)
    assert len(ran.names) <= 40


def kernels(num_splits, config):
    """The launcher, with the arguments of the function."""

    def fn(q, k, v, window_size, softcap, sinks=None, cache_seqlens=None):
        window = check_window("window_size", window_size)
        options = attention_options(q, window, None, softcap).within(q.shape[1], UNLIMITED)
        inputs = q, k, v, cache_seqlens, options, inner_sinks(q, sinks)
        return launch(*inputs, config=config, num_splits=num_splits)

    return fn


def check_kernels(case, dtype, num_splits, config):
    with filled_with_nan():
        check(kernels(num_splits, config), case, dtype)


@pytest.mark.skipif(not ON_CPU, reason="runs in the interpreter only")
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_reference(case, num_splits):
    check_kernels(case, torch.float32, num_splits, SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, Dv", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_kernels_match_reference_on_gpu(D, Dv, dtype, num_splits):
    """All cases at each size, narrow and wide, with the tiles of the table."""
    for case in CASES:
        check_kernels(dataclasses.replace(case, D=D, Dv=Dv), dtype, num_splits, None)


def test_parts_are_as_many_as_a_device_and_the_keys_allow():
    with mock.patch(f"{choose_splits.__module__}.num_multiprocessors", lambda device: 100):
        choices = [choose_splits(n, p, SMALL, None) for n, p in ((10_000, 4), (40, 4), (500, 4000))]
    assert choices == [50, 3, 1]


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_any_scale(backend, scale):
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (3, 20, 20))
    options = {"softmax_scale": scale, "window_size": 9}
    o = window_attn_with_kvcache(q, k, v, **options, backend=backend)
    torch.testing.assert_close(o, reference.window_attn_with_kvcache(q, k, v, **options))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_caches(backend):
    """Heads before time, keys and values in one tensor, and some rows of a larger cache."""
    kv = torch.randn(6, 2, 2, 40, 16, device=DEVICE)[::2]
    k, v = (x.transpose(1, 2) for x in kv.unbind(1))
    q = torch.randn(3, 2, 4, 32, device=DEVICE)[..., ::2]
    o = window_attn_with_kvcache(q, k, v, 13, cache_seqlens=30, backend=backend)
    seqlens = torch.full((3,), 30, device=DEVICE)
    expected = reference.window_attn_with_kvcache(q, k, v, 13, cache_seqlens=seqlens)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_sinks_of_each_row(backend):
    """As the ops take them, of any strides; `vmap` may make them differ."""
    op = lact_kernels.autograd.window_attn_with_kvcache.window_attn_with_kvcache
    q, k, v = (torch.randn(3, n, 4, 16, device=DEVICE) for n in (1, 20, 20))
    sinks = torch.randn(4, 3, device=DEVICE).T
    o, lse = op(q, k, v, None, 8, 0, 0.25, None, sinks, backend)
    for b in range(3):
        options = {"window_size": 9, "sinks": sinks[b], "softmax_scale": 0.25, "return_lse": True}
        row = reference.window_attn_with_kvcache(*(x[b : b + 1] for x in (q, k, v)), **options)
        torch.testing.assert_close((o[b : b + 1], lse[b : b + 1]), row)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("B, Tq, S", [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_empty_inputs(B, Tq, S, backend):
    q, k, v = (torch.randn(B, n, 2, 16, device=DEVICE) for n in (Tq, S, S))
    o, lse = window_attn_with_kvcache(q, k, v, 4, return_lse=True, backend=backend)
    assert o.shape == (B, Tq, 2, 16) and lse.shape == (B, 2, Tq)
    assert not o.any() and (lse == -math.inf).all()


@contextlib.contextmanager
def count_loaded_elements():
    """What the interpreter loads from memory, where it is not masked off."""
    from triton.runtime.interpreter import InterpreterBuilder

    loaded = []

    def counting(name, mask_of):
        method = getattr(InterpreterBuilder, name)

        def counted(builder, pointers, *rest):
            loaded.append(int(mask_of(pointers, *rest).sum()))
            return method(builder, pointers, *rest)

        return mock.patch.object(InterpreterBuilder, name, counted)

    with counting("create_masked_load", lambda pointers, mask, *rest: mask.data):
        yield loaded


@pytest.mark.skipif(not ON_CPU, reason="counts in the interpreter")
@pytest.mark.parametrize("length", [100, 10**6])
def test_a_query_reads_its_window_and_nothing_else(length):
    """At any position of a cache of a million slots. Each part reads the query and the length of its row."""
    W, S, D, Dv = 50, 10**6, 16, 24
    q, k, v = (torch.zeros(1, n, 1, d) for n, d in ((1, D), (S, D), (S, Dv)))
    seqlens, options = torch.tensor([length], dtype=torch.int32), AttentionOptions(W - 1, 0, 1.0)
    for num_splits in (1, 2):
        with count_loaded_elements() as loaded:
            launch(q, k, v, seqlens, options, None, config=SMALL, num_splits=num_splits)
        combined = 0 if num_splits == 1 else num_splits * (Dv + 1)
        assert sum(loaded) == W * (D + Dv) + num_splits * (D + 1) + combined


@pytest.mark.skipif(not ON_CPU, reason="counts in the interpreter")
@pytest.mark.parametrize("right", [0, 5, 12, 39])
def test_a_tile_of_queries_reads_what_it_sees_and_nothing_else(right):
    Tq, W, D, S = 40, 50, 16, 1000
    q, k, v = (torch.zeros(1, n, 1, D) for n in (Tq, S, S))
    options = AttentionOptions(W - 1, right, 1.0)
    with count_loaded_elements() as loaded:
        o, _ = launch(q, k, v, None, options, None, config=SMALL, num_splits=1)
    after = [min(right, later) for later in (24, 8, 0)]  # tokens after the last query of a tile
    keys = sum(W - 1 + rows + later for rows, later in zip((16, 16, 8), after))
    assert sum(loaded) == 2 * D * keys + D * Tq


@pytest.mark.skipif(not ON_CPU, reason="counts in the interpreter")
def test_nothing_outside_the_cache_is_read():
    """Of a row that has outgrown it, whose result is NaN."""
    D, S = 16, 40
    q, k, v = (torch.zeros(1, n, 1, D) for n in (1, S, S))
    seqlens = torch.tensor([1000], dtype=torch.int32)
    with count_loaded_elements() as loaded:
        options = AttentionOptions(UNLIMITED, 0, 1.0)
        o, _ = launch(q, k, v, seqlens, options, None, config=SMALL, num_splits=1)
    assert o.isnan().all()
    assert sum(loaded) == 2 * D * S + D + 1


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_nothing_outside_the_window_matters(backend):
    """NaN in every slot but those of the window, a million tokens into the sequence."""
    W, S = 20, 4096
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (1, S, S))
    length = 10**6
    kept = [p % S for p in range(length - W, length)]
    expected = reference.window_attn(q, k[:, kept], v[:, kept])
    for x in (k, v):
        others = torch.ones(S, dtype=torch.bool, device=DEVICE)
        others[kept] = False
        x[:, others] = math.nan
    o = window_attn_with_kvcache(q, k, v, W, cache_seqlens=length, backend=backend)
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Hq, n", [(2, 1), (2, 3), (4, 3)])
def test_outputs_are_contiguous(Hq, n, dtype):
    """As compiled code takes for granted, which is told so."""
    q, k, v = (torch.randn(2, *shape, 16, dtype=dtype) for shape in ((n, Hq), (9, 2), (9, 2)))
    results = window_attn_with_kvcache(q, k, v, 4, return_lse=True, backend="eager")
    assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_query_of_nan_shows(backend):
    """With as few keys as at the start of a generation."""
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (1, 8, 8))
    for length in (1, 7):
        o = window_attn_with_kvcache(q * math.nan, k, v, 8, cache_seqlens=length, backend=backend)
        assert o.isnan().all()


@pytest.mark.parametrize("right", [0, 2])
def test_few_queries_of_window_attn_take_this_kernel(right):
    """And have their gradients from the usual ones."""
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE, requires_grad=True) for n in (3, 30, 30))
    softcap, sinks = (2.0 if right else None), torch.randn(2, device=DEVICE, requires_grad=True)
    options = AttentionOptions(8, right, 0.25, softcap)
    name = "lact_kernels.triton.window_attn.fwd.window_attn_with_kvcache"
    with mock.patch(name, side_effect=launch) as launched:
        actual = run_window_attn(q, k, v, options, sinks, backend="triton")
    assert launched.call_count == 1
    options = {"softmax_scale": 0.25, "softcap": softcap, "sinks": sinks, "return_lse": True}
    expected = reference.window_attn(q, k, v, (8, right), **options)
    torch.testing.assert_close(actual, expected)
    douts = [torch.randn_like(x) for x in actual]
    ours, theirs = (torch.autograd.grad(x, (q, k, v, sinks), douts) for x in (actual, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_row_that_has_lost_its_window_is_not_a_number(backend):
    """What is known without reading lengths on the host is an error: see the bad inputs."""
    op = lact_kernels.autograd.window_attn_with_kvcache.window_attn_with_kvcache
    q, k, v = (torch.randn(3, n, 2, 16, device=DEVICE) for n in (2, 10, 10))
    seqlens = torch.tensor([10, 11, 4], dtype=torch.int32, device=DEVICE)
    o, lse = op(q, k, v, seqlens, 9, 0, 0.25, None, None, backend)
    assert [bool(x.isnan().all()) for x in o] == [False, True, False]
    assert [bool(x.isnan().any()) for x in lse] == [False, True, False]
    o, _ = op(q, k, v, seqlens, 8, 0, 0.25, None, None, backend)
    assert not o.isnan().any()


BAD = [
    (
        {name: torch.ones(2, 8, 3, 4) for name in ("k_cache", "v_cache")},
        ValueError,
        "4 heads of q .* 3 heads of k_cache and v_cache",
    ),
    ({"v_cache": torch.ones(2, 9, 2, 4)}, ValueError, "v_cache must have the shape"),
    ({"k_cache": torch.ones(2, 8, 2, 4).half()}, TypeError, "k_cache .*float32.*float16"),
    ({"window_size": 0}, ValueError, "window_size must be at least 1"),
    ({"cache_seqlens": 3.0}, TypeError, r"cache_seqlens must be an int32 tensor \[B\] or an int"),
    ({"cache_seqlens": True}, TypeError, "cache_seqlens must be an int32 tensor"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens must not be negative, got -1"),
    ({"cache_seqlens": torch.tensor([3, 3])}, TypeError, "cache_seqlens .*int32, got torch.int64"),
    ({"cache_seqlens": torch.ones(3).int()}, ValueError, r"cache_seqlens .*\(2,\), got \(3,\)"),
    ({"cache_seqlens": 9}, ValueError, "cache_seqlens is 9, but the cache has fewer slots: 8"),
    (
        {"cache_seqlens": torch.tensor([3, 9]).int(), "window_size": 8},
        ValueError,
        "fewer slots, and than the 9 that the window needs: 8",
    ),
    ({"q": torch.ones(2, 2, 4, 4, requires_grad=True)}, ValueError, "q requires a gradient, and"),
    ({"sinks": torch.ones(4, requires_grad=True)}, ValueError, "sinks requires a gradient, and"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks must have the shape \[Hq\] = \(4,\)"),
    ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
    ({"window_size": (3, -2)}, ValueError, "window_size must have sides of at least 0, or -1"),
    ({"cache_seqlens": 9, "window_size": (-1, 3)}, ValueError, "fewer slots: 8"),
    ({"return_lse": None}, TypeError, "return_lse must be True or False"),
    ({"backend": "fast"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize("changed, error, message", BAD)
def test_bad_input(changed, error, message):
    inputs = {
        "q": torch.ones(2, 2, 4, 4),
        "k_cache": torch.ones(2, 8, 2, 4),
        "v_cache": torch.ones(2, 8, 2, 4),
    }
    with pytest.raises(error, match=message):
        window_attn_with_kvcache(**inputs | changed)


def test_a_ring_of_just_enough_slots_is_accepted():
    q, k = torch.ones(2, 2, 4, 4), torch.ones(2, 8, 2, 4)
    window_attn_with_kvcache(q, k, k, 7, cache_seqlens=9)
