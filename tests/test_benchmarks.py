"""The benchmarks count, gate and record what they say they do."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import reference
from benchmarks import (
    gate,
    measure,
    peers,
    phases,
    plain_ttt,
    report,
    run,
    timing,
)
from benchmarks.registry import (
    ORDERS,
    TTT,
    BlockCausalTTT,
    TTTApply,
    WindowAttn,
    WindowAttnWithKVCache,
    empty_output,
    forward_backward,
    in_float64,
    output_gradient,
)
from tests.commands import assert_refused_before_any_work

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# Sizes straddle the window's and the chunk's edges; no two dims are alike.
TTT_POINTS = [
    BlockCausalTTT(T=T, chunk_size=16, H=2, Dk=6, Dv=10, Dh=8, muon=muon)
    for T in (16, 17, 70)
    for muon in (False, True)
]
# Of every order in miniature, and one that trains w1 alone.
SMALL = {"pieces": 3, "piece": 5, "B": 2, "H": 2, "Dk": 6, "Dv": 10, "Dh": 8}
PLAN_POINTS = [TTT(plan, **SMALL) for plan in ORDERS]
PLAN_POINTS.append(TTT("views", **SMALL, only_w1=True))
PLAN_IDS = [*ORDERS, "only-w1"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("window_size", [1, 7, 20, 33, None])
def test_window_attn_flops_count_the_visible_pairs(window_size):
    point = WindowAttn(T=20, window_size=window_size and min(window_size, 20), Hq=3, D=8, Dv=4)
    W = window_size or 20
    pairs = sum(i - W < j <= i for i in range(20) for j in range(20))
    forward = 3 * pairs * (2 * 8 + 2 * 4)
    backward = 3 * pairs * (3 * 2 * 8 + 2 * 2 * 4)  # scores, dq, dk over D; dp, dv over Dv
    assert point.flops("fwd") == forward
    assert point.flops("fwd_bwd") == forward + backward


def test_packed_sequences_are_very_different_and_count_their_own_pairs():
    point = WindowAttn(T=200, window_size=20, Hq=3, D=8, Dv=4, sequences=5)
    lengths = point.lengths
    assert lengths == point.lengths and len(lengths) == 5 and sum(lengths) == 200
    assert min(lengths) < point.window_size < max(lengths) and max(lengths) > 10 * min(lengths)
    pairs = sum(i - 20 < j <= i for length in lengths for i in range(length) for j in range(length))
    assert point.flops("fwd") == 3 * pairs * (2 * 8 + 2 * 4)
    cu_seqlens = point.inputs(torch.float32, CPU)["cu_seqlens"]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.diff().tolist() == lengths


@pytest.mark.parametrize("window_size", [1, 7, 18, 19, 20, None])
def test_cache_flops_and_bytes_count_what_the_last_queries_see(window_size):
    point = WindowAttnWithKVCache(S=20, window_size=window_size, B=2, Tq=3, Hq=6, Hkv=3, D=8)
    seen = [(i, j) for i in (17, 18, 19) for j in range(20) if i - (window_size or 20) < j <= i]
    assert point.flops("fwd") == 2 * 6 * len(seen) * (2 * 8 + 2 * 8)
    slots = len({j for _, j in seen})
    assert point.needed_bytes(torch.float32) == 2 * 4 * (2 * slots * 3 * 8 + 2 * 3 * 6 * 8)


@pytest.mark.parametrize(
    "point", TTT_POINTS, ids=lambda p: f"T{p.T}-{'muon' if p.muon else 'plain'}"
)
def test_ttt_flops_are_those_of_the_reference(point):
    inputs = point.inputs(torch.float32, CPU)
    do = output_gradient(empty_output(point, torch.float32, CPU))
    with FlopCounterMode(display=False) as forward:
        point.reference(**inputs)
    with FlopCounterMode(display=False) as both:
        forward_backward(point.reference, inputs, do)
    # Autograd computes both factors' gradients of the symmetric X X^T; one product would do.
    spared = 0
    if point.muon:
        updates = -(-point.T // 16) - 1
        squares = [6 * 6 * 8, 8 * 8 * 10, 6 * 6 * 8]  # m^2 n of w0, w1, w2
        spared = 2 * updates * 5 * sum(2 * x for x in squares)
    assert point.flops("fwd") == forward.get_total_flops()
    assert point.flops("fwd_bwd") == both.get_total_flops() - spared


@pytest.mark.parametrize("point", PLAN_POINTS, ids=PLAN_IDS)
def test_flops_of_a_plan_are_those_of_the_reference(point):
    inputs = point.inputs(torch.float32, CPU)
    do = output_gradient(empty_output(point, torch.float32, CPU))
    with FlopCounterMode(display=False) as forward:
        point.reference(**inputs)
    with FlopCounterMode(display=False) as both:
        forward_backward(point.reference, inputs, do)
    # X X^T as above; and the reference computes w1^T v even where only w1 is trained.
    updates = sum(kind == "update" for kind, *_ in point.steps)
    squares = [8 * 8 * 10] if point.only_w1 else [6 * 6 * 8, 8 * 8 * 10, 6 * 6 * 8]
    spared = 2 * 2 * updates * 5 * sum(2 * x for x in squares) if point.muon else 0
    unneeded = 2 * 2 * point.Tk * 2 * 10 * 8 if point.only_w1 else 0
    assert point.flops("fwd") == forward.get_total_flops() - unneeded
    assert point.flops("fwd_bwd") == both.get_total_flops() - spared - unneeded


def test_orders_have_the_tokens_of_their_models():
    sizes = {plan: TTT.of(plan, small=False) for plan in ORDERS}
    tokens = {plan: (x.Tk, x.Tq, x.output_shape[1]) for plan, x in sizes.items()}
    assert tokens["views"] == (32768, 65536, 65536)
    assert tokens["bidirectional"] == (33600,) * 3
    assert tokens["update-first"] == (32768,) * 3
    # The noisy tokens behind the last clean piece are no keys.
    assert tokens["video"] == (60840 - 4680, 60840, 60840)
    assert sizes["video"].steps[:3] == [
        ("apply", 0, 4680),
        ("update", 4680, 9360),
        ("apply", 4680, 14040),
    ]
    small = TTT.of("video", small=True)
    assert (small.pieces, small.piece, small.H, small.Dk, small.Dh) == (4, 585, 2, 96, 192)


def test_flops_and_bytes_of_stored_weights():
    point = TTTApply(Tq=7, B=2, H=3, Dk=6, Dv=10, Dh=8)
    inputs = point.inputs(torch.float16, CPU)
    assert {x.dtype for x in inputs.values()} == {torch.float16}
    with FlopCounterMode(display=False) as counted:
        o = point.reference(**inputs)
    assert point.flops("fwd") == counted.get_total_flops()
    assert point.needed_bytes(torch.float16) == sum(x.nbytes for x in [o, *inputs.values()])


@pytest.mark.parametrize(
    "point", [*PLAN_POINTS, TTTApply(Tq=7, B=2, H=3)], ids=[*PLAN_IDS, "apply"]
)
def test_plain_functions_compute_it(monkeypatch, point):
    """In their layout, with the gradients; but for the dtype of their Newton-Schulz steps."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(plain_ttt, "MUON_DTYPE", torch.float32)
    monkeypatch.setattr(measure, "_time", lambda *_: None)
    variants = [peers._ours("eager"), *peers.PLAIN]
    settings = measure.Settings(torch.float32, CPU, rounds=3, seconds=1)
    _, *theirs = measure.measure_point(point, point.modes[-1], point.swept, variants, settings)
    assert [row.variant for row in theirs] == ["compiled plain function", "plain function"]
    assert all(row.difference < 1e-3 for row in theirs), [row.status for row in theirs]


def test_percentiles():
    assert timing.percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.percentiles([float(x) for x in range(11)]) == (2.0, 5.0, 8.0)


def test_variants_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(runs, CPU, rounds=4, seconds=60)
    assert calls == list("abababab")
    assert [len(x) for x in times.values()] == [4, 4]
    assert len(timing.interleaved(runs, CPU, rounds=9, seconds=0)["a"]) == timing.MIN_ROUNDS


def test_caches_are_overwritten_before_a_call():
    flush, seen = torch.ones(8, dtype=torch.uint8), []
    timing._wall_time(lambda: seen.append(flush.sum().item()), flush)
    assert seen == [0]


def test_peak_memory_sees_what_a_call_allocates():
    size = 2**26
    peak = timing.peak_memory(lambda: torch.ones(size // 4).sum().item(), CPU)
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert 0.9 * size < peak < 1.5 * size


def arguments(out, *more):
    sizes = ["--device", "cpu", "--seq-len", "96", "--head-dim", "16", "--fast-weight-dims", "16"]
    sizes += ["--window-sizes", "32", "full", "--chunk-sizes", "40", "--repeats", "3"]
    sizes += ["--cache-sizes", "64", "96", "--cache-window", "40", "--queries", "2"]
    sizes += ["--plan", "video", "--pieces", "2", "--piece-len", "9", "--applied-tokens", "1"]
    return [*sizes, "--seconds", "1", "--out", str(out), *more]


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch):
    """What is timed beside the variants takes longer than they do at these sizes."""
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**16)
    monkeypatch.setitem(timing.MATRIX_SIZES, "cpu", 64)


@pytest.fixture
def without_compiled_peers(monkeypatch):
    """Compiling takes seconds a point and has nothing to do with the rows."""
    for key, variants in peers._PEERS.items():
        kept = [v for v in variants if v.name != "FlexAttention"]
        monkeypatch.setitem(peers._PEERS, key, kept)


def test_run_writes_a_complete_row_for_every_variant(
    tmp_path, monkeypatch, capsys, without_compiled_peers
):
    monkeypatch.delenv("LACT_CHECKOUT", raising=False)
    broken = peers.Variant("broken peer", lambda point, mode: 1 / 0)
    missing = peers.Variant("missing peer", _unavailable)
    wrong = peers.Variant("wrong peer", lambda point, mode: lambda q, k, v: q + k + v)
    peers._PEERS["window_attn", "cpu"] += [broken, missing, wrong]
    assert run.main(arguments(tmp_path)) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Modes x points x variants of each operation.
    assert len(rows) == 2 * 2 * 6 + 2 * 3 + 2 * 3 + 2 * 2 + 2
    fields = {field.name for field in dataclasses.fields(report.Row)}
    fields |= {"commit", "date", "versions", "device"}
    assert all(row.keys() == fields for row in rows)
    assert {"torch", "triton", "python", "lact_kernels"} <= rows[0]["versions"].keys()

    status = {row["variant"]: row["status"] for row in rows if row["op"] == "window_attn"}
    assert status["lact_kernels eager"] == status["dense-mask SDPA"] == "ok"
    assert "ZeroDivisionError" in status["broken peer"]
    assert status["missing peer"] == "unavailable: not installed"
    assert "differs" in status["wrong peer"]
    for row in rows:
        if row["status"] != "ok":
            assert row["p50_ms"] is None
            continue
        assert row["first_call_s"] > 0
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        rate = row["needed_tflops"]
        assert row["share_of_matrix_rate"] == pytest.approx(rate / row["matrix_tflops"])
        if row["variant"] == row["baseline"]:
            assert row["ratio_to_baseline"] == 1
        if row["op"] == "window_attn_with_kvcache":
            point = WindowAttnWithKVCache(**row["shape"])
            assert (row["mode"], row["swept"]) == ("fwd", "S")
            assert (point.S in (64, 96), point.window_size, point.Tq) == (True, 40, 2)
            needed = point.needed_bytes(torch.float32)
            assert row["needed_gb_per_s"] == pytest.approx(needed / row["p50_ms"] / 1e6)
        else:
            assert (row["needed_gb_per_s"] is None) is (row["op"] != "ttt_apply")
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".png"}


# What the peers that need a GPU or a package do, as they document it.
def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    assert cu_seq_q is cu_seq_k and max_q == max_k == cu_seq_q.diff().max()
    left, right = window_size
    assert right == 0 and left < max_k - 1  # a window that sees everything is not one
    qkv = (x[None] for x in (q, k, v))
    return reference.window_attn(*qkv, None if left < 0 else left + 1, cu_seqlens=cu_seq_q)[0]


def parallel_attn(q, k, v, *, window_size, cu_seqlens):
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    return reference.window_attn(q, k, v, window_size, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "point",
    [
        WindowAttn(T=150, window_size=20, B=2, Hq=4, Hkv=2, D=16, Dv=16),
        WindowAttn(T=150, window_size=None, D=16, Dv=16),
        WindowAttn(T=150, window_size=20, D=16, Dv=16, sequences=4),
        WindowAttn(T=150, window_size=120, D=16, Dv=16, sequences=4),
    ],
    ids=["rows", "full", "packed", "packed-beyond-the-longest"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_of_window_attn_compute_it(monkeypatch, point):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(peers, "_find", lambda module, name: globals()[name])
    inputs = point.inputs(torch.float32, CPU)
    expected = point.reference(**inputs)
    for variant in [*peers._PEERS[point.op, "cpu"], *peers._PEERS[point.op, "cuda"]]:
        if variant is peers.CAUSAL_SDPA and point.window_size is not None:
            with pytest.raises(peers.Unavailable):
                variant.build(point, "fwd")
            continue
        call = measure.runner(variant.build(point, "fwd"), inputs, None, "fwd")
        for o in (call()["o"], call()["o"]):  # the second call finds its mask or borders made
            torch.testing.assert_close(o, expected, rtol=0, atol=1e-5, msg=variant.name)


@pytest.mark.parametrize("window_size", [1, 20, None])
@pytest.mark.parametrize("Tq", [1, 3])
def test_peers_of_a_cache_compute_it(window_size, Tq):
    point = WindowAttnWithKVCache(S=50, window_size=window_size, B=2, Tq=Tq, D=16)
    inputs = point.inputs(torch.float32, CPU)
    for variant in peers._PEERS[point.op, "cpu"]:
        o = variant.build(point, "fwd")(**inputs)
        torch.testing.assert_close(o, point.reference(**inputs), rtol=0, atol=1e-5)


def test_sdpa_over_the_window_of_one_query_has_no_mask(monkeypatch):
    """A mask would keep PyTorch's faster kernels from it."""
    masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, enable_gqa):
        masks.append((k.shape[2], attn_mask is None))
        return sdpa(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    point = WindowAttnWithKVCache(S=50, window_size=20, D=16)
    for variant in peers.CACHE_SDPA:
        variant.build(point, "fwd")(**point.inputs(torch.float32, CPU))
    assert masks == [(20, True), (50, False)]


@pytest.mark.parametrize("flags", [[], ["--momentum", "--prenorm"]], ids=["plain", "prenorm"])
def test_run_measures_fast_weights_with_their_options(tmp_path, capsys, flags):
    more = ("--op", "block_causal_ttt", "--mode", "fwd_bwd", "--lact-checkout", "nowhere", *flags)
    assert run.main(arguments(tmp_path, *more)) == 0
    (path,) = tmp_path.glob("*.jsonl")
    ours, loop, theirs = (json.loads(line) for line in path.read_text().splitlines())
    assert ours["status"] == loop["status"] == "ok"
    assert ours["shape"]["prenorm"] is ours["shape"]["momentum"] is bool(flags)
    assert "unavailable: nowhere/lact_llm/lact_model has no ttt_operation.py" in theirs["status"]


def test_prenorm_is_another_function():
    """With Muon, whose steps are large, the two are far apart."""
    post = BlockCausalTTT(T=60, chunk_size=20, H=2, Dk=8, Dv=8, Dh=8, muon=True)
    pre = dataclasses.replace(post, prenorm=True)
    inputs = post.inputs(torch.float32, CPU)
    o = pre.run("eager", **inputs)
    torch.testing.assert_close(o, pre.reference(**inputs), rtol=0, atol=1e-3)
    assert (o - post.run("eager", **inputs)).abs().max().item() > 1e-2
    assert pre.flops("fwd_bwd") == post.flops("fwd_bwd")


# What a checkout of the authors' repository looks like to us: their file and signature. This stand-in
# computes with our own function, so that any mistake in the layouts shows as a difference from ours.
STAND_IN = """
from lact_kernels.compat import block_causal_lact_swiglu as post
from lact_kernels.compat import prenorm_block_causal_lact_swiglu as pre

calls = []

def block_causal_lact_swiglu(*args, **kwargs):
    calls.append(("post", {name: tuple(getattr(x, "shape", ())) or x for name, x in kwargs.items()}))
    return post(*args, **kwargs)

def prenorm_block_causal_lact_swiglu(*args, **kwargs):
    calls.append(("pre", kwargs))
    return pre(*args, **kwargs)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The root of the stand-in, forgotten again afterwards."""
    folder = tmp_path / "checkout" / "lact_llm" / "lact_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs a lot')")
    (folder / "ttt_operation.py").write_text(STAND_IN)
    for name in ("", ".ttt_operation", ".ttt_operation_fused_kernel"):
        monkeypatch.delitem(sys.modules, f"lact_authors{name}", raising=False)
    yield folder.parent.parent
    for name in ("", ".ttt_operation", ".ttt_operation_fused_kernel"):
        sys.modules.pop(f"lact_authors{name}", None)


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_authors_functions_are_given_their_layout(checkout, mode, prenorm):
    """Two batch rows and unequal dims; the gradients, summed over the batch, are compared with ours."""
    sizes = {"B": 2, "H": 3, "Dk": 6, "Dv": 10, "Dh": 8}
    point = BlockCausalTTT(T=50, chunk_size=16, **sizes, momentum=True, prenorm=prenorm)
    variants = peers.variants(point.op, CPU, checkout)
    settings = measure.Settings(torch.float32, CPU, rounds=3, seconds=1)
    rows = list(measure.measure_point(point, mode, "chunk_size", variants, settings))
    theirs = rows[-1]
    assert theirs.variant == "LaCT authors' compiled PyTorch"
    assert theirs.status == "ok" and theirs.p50_ms > 0
    assert theirs.difference < 1e-5
    kinds = {kind for kind, _ in sys.modules["lact_authors.ttt_operation"].calls}
    assert kinds == {"pre" if prenorm else "post"}
    if not prenorm:
        _, shapes = sys.modules["lact_authors.ttt_operation"].calls[0]
        assert shapes["q"] == (6, 50, 6) and shapes["v"] == (6, 50, 10)
        assert shapes["w0"] == (6, 8, 6) and shapes["w1"] == (6, 10, 8)
        assert shapes["lr0"] == shapes["momentum"] == (6, 50, 1)
        assert shapes["chunk_size"] == 16


def test_layouts_are_changed_outside_the_timed_call():
    """What is timed gets the tensors of the layout, and gives its own."""
    seen = []
    layout = peers.Layout(lambda point, name, x: x * 2, lambda point, name, x: x / 2)
    variant = peers.Variant("doubled", lambda point, mode: seen.append, layout=layout)
    point = BlockCausalTTT(T=5, chunk_size=5, H=1, Dk=4, Dv=4, Dh=4)
    inputs = point.inputs(torch.float32, CPU)
    do = torch.ones(1, 5, 1, 4)
    doubled, do2 = measure._laid_out(variant, point, inputs, do)
    assert torch.equal(doubled["q"], 2 * inputs["q"]) and torch.equal(do2, 2 * do)
    assert all(x.is_leaf and x.requires_grad for x in doubled.values())
    back = measure._in_our_layout(variant, point, {"o": do2, "dq": doubled["q"]})
    assert torch.equal(back["o"], do) and torch.equal(back["dq"], inputs["q"])


def test_authors_fused_kernels_with_muon_are_another_function(checkout):
    (variant,) = peers.variants("block_causal_ttt", torch.device("cuda"), checkout)[-1:]
    assert variant.name == "LaCT authors' fused kernels"
    with pytest.raises(peers.Unavailable, match="another function"):
        variant.build(BlockCausalTTT(T=64, chunk_size=16, muon=True), "fwd")
    with pytest.raises(peers.Unavailable, match="has no ttt_operation_fused_kernel.py"):
        variant.build(BlockCausalTTT(T=64, chunk_size=16), "fwd")


def test_authors_functions_that_cannot_be_imported_are_unavailable(checkout):
    file = checkout / "lact_llm/lact_model/ttt_operation.py"
    file.write_text("import no_such_module_at_all")
    with pytest.raises(peers.Unavailable, match="no_such_module_at_all"):
        peers.lact_module(checkout, "ttt_operation")


def phase_arguments(out, *more):
    sizes = ["--device", "cpu", "--seq-len", "96", "--chunk-size", "32", "--fast-weight-dim", "16"]
    return [*sizes, "--fast-weight-heads", "2", "--repeats", "3", "--out", str(out), *more]


@pytest.mark.parametrize("flags", [[], ["--muon", "--momentum", "--prenorm"]], ids=["plain", "all"])
def test_phases_are_measured(tmp_path, capsys, flags):
    assert phases.main(phase_arguments(tmp_path, *flags)) == 0
    (path,) = tmp_path.glob("*-phases.jsonl")
    (row,) = (json.loads(line) for line in path.read_text().splitlines())
    fields = {field.name for field in dataclasses.fields(phases.PhaseRow)}
    assert row.keys() == fields | {"commit", "date", "versions", "device"}
    assert row["status"] == "ok" and row["repeats"] == 3 and row["p50_ms"] > 0
    assert row["shape"]["muon"] is row["shape"]["prenorm"] is bool(flags)
    assert list(row["phases_ms"])[-1] == "rest"
    assert {"scan", "apply", "apply backward", "reverse scan"} <= row["phases_ms"].keys()
    assert all(ms > 0 for ms in row["phases_ms"].values())
    kept = 2 * 2 * 3 * 2 * 16 * 16 * 4  # two copies of the weights, two updates
    assert row["saved_bytes"] > kept if flags else row["saved_bytes"] == kept
    for mode in phases.MODES:
        assert row["launches_per_chunk"][mode]["ops"] > 5
        assert row["launches_of_one_chunk"][mode]["ops"] > 0
        assert row["launches_per_chunk"][mode]["syncs"] == 0
        assert "aten::bmm" in row["names_per_chunk"][mode]
    printed = capsys.readouterr().out
    assert "reverse scan" in printed and "each more" in printed and "MiB" in printed


def test_phases_of_a_backend_that_fails(tmp_path, monkeypatch, capsys):
    def fail(self, backend, **inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(BlockCausalTTT, "run", fail)
    assert phases.main(phase_arguments(tmp_path, "--fast-weight-dim", "8", "16")) == 1
    (path,) = tmp_path.glob("*-phases.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["failed: RuntimeError: no such kernel"] * 2
    assert "no such kernel" in capsys.readouterr().out


def test_interrupting_keeps_finished_phases(tmp_path, monkeypatch, capsys):
    measured = phases.measure

    def interrupted(point, *rest):
        if point.Dk == 16:
            raise KeyboardInterrupt
        return measured(point, *rest)

    monkeypatch.setattr(phases, "measure", interrupted)
    assert phases.main(phase_arguments(tmp_path, "--fast-weight-dim", "8", "16")) == 130
    (path,) = tmp_path.glob("*-phases.jsonl")
    assert len(path.read_text().splitlines()) == 1
    assert "stopped" in capsys.readouterr().err


def annotation(name, start, stop, category="user_annotation"):
    return {"cat": category, "name": name, "ts": start, "dur": stop - start}


def launch(correlation, at, duration, kind="kernel", api="cuda_driver"):
    """The host's call at `at`, and what it makes the device do long after."""
    args = {"correlation": correlation}
    return [
        {"cat": api, "name": "cuLaunchKernelEx", "ts": at, "dur": 2, "args": args},
        {"cat": kind, "name": "kernel", "ts": at + 5000, "dur": duration, "args": args},
    ]


RANGES = [
    annotation(phases.CALL, 0, 1000),
    annotation("block_causal_ttt scan", 100, 200),
    annotation("block_causal_ttt scan", 600, 650),
    annotation("block_causal_ttt apply", 250, 400),
    annotation("block_causal_ttt scan", 5000, 9000, "gpu_user_annotation"),
    annotation("something else", 0, 900),
]


def test_breakdown_of_host_time():
    times, launches = phases.breakdown(RANGES)
    assert times == pytest.approx({"scan": 0.15, "apply": 0.15, "rest": 0.7})
    assert launches == 0


def test_breakdown_of_device_time():
    """Work counts where it was launched, not where it ran."""
    events = [
        *RANGES,
        *launch(1, 110, 30),
        *launch(2, 640, 40, api="cuda_runtime"),
        *launch(3, 300, 500),
        *launch(4, 450, 7, kind="gpu_memset", api="cuda_runtime"),
        {"cat": "kernel", "name": "of unknown origin", "ts": 9, "dur": 3, "args": {}},
    ]
    times, launches = phases.breakdown(events)
    assert times == pytest.approx({"scan": 0.07, "apply": 0.5, "rest": 0.01})
    assert launches == 5


def test_medians_of_phases_are_in_order_and_count_what_is_missing():
    calls = [{"rest": 1.0, "new": 3.0, "apply": 2.0}, {"rest": 2.0, "scan": 5.0}, {"rest": 3.0}]
    medians = phases._medians(calls)
    assert list(medians.items()) == [("scan", 0.0), ("apply", 0.0), ("new", 0.0), ("rest", 2.0)]


def test_saved_bytes_are_those_besides_the_inputs():
    x, y = (torch.randn(100, 10, requires_grad=True) for _ in range(2))
    size = x.numel() * 4
    assert phases.saved_bytes(lambda: x * y, {"x": x, "y": y}) == 0
    assert phases.saved_bytes(lambda: (x * y)[:5] * x[:5], {"x": x, "y": y}) == size
    assert phases.saved_bytes(lambda: x * y, {"x": x}) == size
    assert phases.saved_bytes(lambda: (x * 2).exp().exp(), {"x": x}) == 2 * size


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--chunk-size", "0"], "at least 1"),
        (["--backend", "fast"], "invalid choice"),
        (["--dtype", "float64"], "invalid choice"),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_bad_arguments_of_phases(tmp_path, capsys, bad, message):
    out = tmp_path / "out"
    assert_refused_before_any_work(phases.main, phase_arguments(out, *bad), out, message, capsys)


def _unavailable(point, mode):
    raise peers.Unavailable("not installed")


@pytest.mark.parametrize("fault", ["wrong output", "wrong gradient", "nan", "crash"])
def test_nothing_is_timed_when_the_gate_fails(tmp_path, monkeypatch, capsys, fault):
    right = WindowAttn.run

    def faulty(self, backend, q, k, v):
        if fault == "wrong output":
            return right(dataclasses.replace(self, window_size=31), backend, q, k, v)
        if fault == "wrong gradient":
            return right(self, backend, q, k.detach() + 0 * k, v)
        if fault == "nan":
            return right(self, backend, q, k, v) * float("nan")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(WindowAttn, "run", faulty)
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("something was timed"))
    assert run.main(arguments(tmp_path, "--op", "window_attn", "--no-peers")) == 1
    printed = capsys.readouterr()
    assert "nothing was timed" in printed.err
    assert ("CRASHED" if fault == "crash" else "FAILED") in printed.out
    assert all(not path.read_text() for path in tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("op", ["window_attn", "window_attn_with_kvcache"])
def test_gate_sees_packing_and_caches(tmp_path, monkeypatch, capsys, op):
    """A row of sequences that see each other, and a query that sees one slot too many."""
    plain, cached = WindowAttn.run, WindowAttnWithKVCache.run
    monkeypatch.setattr(
        WindowAttn, "run", lambda self, backend, q, k, v, cu_seqlens: plain(self, backend, q, k, v)
    )
    monkeypatch.setattr(
        WindowAttnWithKVCache,
        "run",
        lambda self, *x, **inputs: cached(
            dataclasses.replace(self, window_size=self.window_size + 1), *x, **inputs
        ),
    )
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("something was timed"))
    assert run.main(arguments(tmp_path, "--op", op, "--sequences", "4", "--no-peers")) == 1
    assert capsys.readouterr().out.count("FAILED: o") == 3  # two points and the edge


def test_gate_points_fit_the_reference_and_keep_the_heads_grouped():
    point = WindowAttn(T=2**15, window_size=None, Hq=32, Hkv=8).gate()
    assert point.Hq // point.Hkv == 4 and point.T < 2**12
    small = WindowAttn(T=100, window_size=7)
    assert small.gate() is small
    for plan in ORDERS:
        point = TTT.of(plan, small=False)
        gate_point = point.gate()
        assert gate_point.Tk + gate_point.Tq < 2**14 and gate_point.Dh == point.Dh
        for kind, start, stop in gate_point.steps:
            assert kind == "apply" or (stop - start > point.Dk and (stop - start) % 2)
    assert TTTApply(Tq=2**16, B=4).gate() == TTTApply(Tq=1023)
    cache = WindowAttnWithKVCache(S=2**20, window_size=300, Hq=32, Hkv=8).gate()
    assert cache.Hq // cache.Hkv == 4 and 300 < cache.S < 2**10


def test_the_gate_of_packed_sequences_is_the_same_picture_at_a_smaller_scale():
    point = WindowAttn(T=2**15, window_size=2**12, sequences=16)
    gate_point = point.gate()
    outlasting = [sum(x > p.window_size for x in p.lengths) for p in (point, gate_point)]
    assert gate_point.T < 2**12 and outlasting[0] == outlasting[1] > 1


def test_interrupting_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    rows = measure.measure_point

    def interrupted(point, mode, *rest):
        if mode == "fwd_bwd":
            raise KeyboardInterrupt
        return rows(point, mode, *rest)

    monkeypatch.setattr(run, "measure_point", interrupted)
    assert run.main(arguments(tmp_path, "--op", "window_attn", "--no-peers")) == 130
    (path,) = tmp_path.glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 2
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--window-sizes", "0"], "at least 1"),
        (["--window-sizes", "x"], "whole number"),
        (["--window-sizes", "97"], "beyond --seq-len 96"),
        (["--heads", "4", "--kv-heads", "3"], "does not divide"),
        (["--op", "conv"], "invalid choice"),
        (["--queries", "65"], "more than --cache-sizes 64"),
        (["--op", "window_attn_with_kvcache", "--mode", "fwd_bwd"], "no backward"),
        (["--op", "window_attn_with_kvcache", "--memory"], "no sweep over T"),
        (["--batch", "2", "--sequences", "4"], "are one row"),
        (["--peers", "FlashAttention-9"], "is none of 'dense-mask SDPA'"),
        (["--peers", "reference loop", "--no-peers"], "cannot be combined"),
        (["--op", "ttt", "ttt_apply", "--memory"], "no sweep over T of ttt and ttt_apply"),
        (["--plan", "causal"], "invalid choice"),
        (["--op", "ttt", "--momentum"], "--momentum is of block_causal_ttt alone"),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    out = tmp_path / "out"
    assert_refused_before_any_work(run.main, arguments(out, *bad), out, message, capsys)


def test_a_batch_and_peers_by_name(tmp_path):
    more = ("--op", "window_attn", "block_causal_ttt", "--peers", "reference loop")
    options = run.parse(arguments(tmp_path, *more, "--batch", "3"))
    points = [point for _, points in run._sweeps(options) for point in points]
    assert [(point.op, point.B) for point in points] == 2 * [("window_attn", 3)] + [
        ("block_causal_ttt", 3)
    ]
    names = [[x.name for x in run._variants(point, options) if not x.ours] for point in points]
    assert names == [[], [], ["reference loop"]]


def test_memory_sweep_is_over_lengths(tmp_path, capsys, without_compiled_peers):
    more = ("--memory", "--op", "window_attn", "--mode", "fwd", "--window-sizes", "32")
    assert run.main(arguments(tmp_path, *more)) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["op"] for row in rows} == {"window_attn"}
    assert [row["shape"]["T"] for row in rows] == [6, 12, 24, 48, 96]
    assert {row["swept"] for row in rows} == {"T"}


@pytest.mark.parametrize(
    "point, names",
    [
        (WindowAttn(T=90, window_size=20, D=16, Dv=16, sequences=3), ["o", "dq", "dk", "dv"]),
        (WindowAttnWithKVCache(S=90, window_size=20, Tq=2, D=16), ["o"]),
    ],
    ids=["packed", "cache"],
)
def test_gate_compares_gradients_where_there_are_any(point, names):
    inputs = point.inputs(torch.float32, CPU)
    comparisons = gate.check(point, ["eager"], inputs)["eager"]
    assert list(comparisons) == names
    assert all(comparison.ok for comparison in comparisons.values())
    exact = in_float64(inputs)
    assert [x.requires_grad for x in exact.values()] == [x.requires_grad for x in inputs.values()]
    floats = [name for name, x in inputs.items() if x.is_floating_point()]
    assert [name for name, x in exact.items() if x.dtype == torch.float64] == floats


def test_gate_compares_the_output_and_every_gradient():
    point = BlockCausalTTT(T=200, chunk_size=64, H=2, Dk=16, Dv=16, Dh=16, momentum=True)
    inputs = point.inputs(torch.float32, CPU)
    comparisons = gate.check(point, ["eager"], inputs)["eager"]
    assert list(comparisons) == ["o"] + [f"d{name}" for name in inputs]
    assert all(comparison.ok for comparison in comparisons.values())


def start(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_demo_on_a_short_stereo_recording(tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    demo = pytest.importorskip("examples.demo")
    options = ("--device", "cpu", "--no-sweep")
    samples, rate = soundfile.read(ROOT / "examples/data/speech.flac", stop=2 * 16000 + 800)
    clip = tmp_path / "clip.wav"
    stereo = torch.tensor(samples)[:, None].repeat(1, 2).numpy()
    soundfile.write(clip, stereo, rate)
    assert demo.main([*options, "--audio", str(clip), "--out", str(tmp_path)]) == 0
    assert "all within their bounds" in capsys.readouterr().out
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize("case", ["missing", "short", "not audio"])
def test_demo_refuses_what_it_cannot_use(tmp_path, capsys, case):
    soundfile = pytest.importorskip("soundfile")
    demo = pytest.importorskip("examples.demo")
    path = tmp_path / "clip.wav"
    if case == "short":
        soundfile.write(path, torch.zeros(24000).numpy(), 16000)
    elif case == "not audio":
        path.write_text("not a recording")
    with pytest.raises(SystemExit) as error:
        demo.main(["--audio", str(path), "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    reasons = {"missing": "there is no", "short": "at least 2 s", "not audio": "not a recording"}
    assert reasons[case] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
