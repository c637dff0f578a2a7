"""The check on a GPU without one: what its stages ask for, what is kept, and what it says in the end."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from benchmarks import (
    accuracy_report,
    branches,
    family,
    gpu_check,
    gpu_stages,
    model,
    phases,
    report,
    run,
)
from benchmarks.gpu_stages import Stage, Tier
from benchmarks.gpu_summary import NOTE, yardsticks
from benchmarks.registry import TTT, BlockCausalTTT, TTTApply, WindowAttn, WindowAttnWithKVCache
from tests.commands import assert_refused_before_any_work

PARSERS = {x.__name__: x.parse for x in (run, accuracy_report, phases, branches, family, model)}
TIERS = (gpu_stages.short, gpu_stages.complete)


@pytest.fixture
def gpu(monkeypatch):
    """What looks for a device finds one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def parsed(tier):
    return {x.name: PARSERS[x.module[0]](list(x.module[1:])) for x in tier.benchmarks}


def points_of(options):
    return [point for _, points in run._sweeps(options) for point in points]


def test_short_check_times_five_yardsticks(tmp_path, gpu):
    options = parsed(gpu_stages.short(tmp_path))
    points = [point for x in options.values() for point in points_of(x)]
    heads = {"Hq": 16, "Hkv": 16}
    assert points == [
        WindowAttn(B=4, T=16384, window_size=1024, **heads, D=64, Dv=64),
        WindowAttn(B=1, T=32768, window_size=4096, **heads, D=128, Dv=128),
        WindowAttnWithKVCache(S=8192, window_size=4096, B=64, Tq=1, Hq=32, Hkv=8, D=128),
        BlockCausalTTT(T=32768, chunk_size=2048, H=4, Dk=384, Dv=384, Dh=384),
        BlockCausalTTT(T=32768, chunk_size=2048, H=4, Dk=768, Dv=768, Dh=768),
    ]
    for x in options.values():
        assert (x.device, x.dtype, x.mode, x.out) == (
            "cuda",
            "bfloat16",
            ["fwd", "fwd_bwd"],
            tmp_path,
        )
    assert options["window_attn-D64"].peers == ["FlexAttention", "FlashAttention-2 varlen_attn"]


def test_complete_check_asks_for_what_the_benchmarks_take(tmp_path, gpu):
    options = parsed(gpu_stages.complete(tmp_path))
    assert options["accuracy"].seq_len[-1] == accuracy_report.SEQ_LENS[-1]
    for name, muon in (("phases", False), ("phases-muon", True)):
        assert options[name].muon is muon
        assert options[name].fast_weight_dim == [384, 768]
        assert (options[name].seq_len, options[name].chunk_size) == (32768, 2048)
        assert (options[name].dtype, options[name].fast_weight_heads) == ("bfloat16", 4)
        assert options[name].backend == ["triton", "eager"]
    assert options["branches"].op == list(branches.OPS)
    assert options["branches"].shape == branches.SIZES["cuda"]
    whole = options["model"]
    assert (whole.dtype, whole.seq_len, whole.layers) == ("bfloat16", 16384, 12)
    assert options["window_attn-packed"].sequences > 1
    small, large = {"Dk": 384, "Dv": 384, "Dh": 384}, {"Dk": 768, "Dv": 768, "Dh": 768}
    network = large | {"Dh": 1536}
    assert points_of(options["fast_weights"]) == [
        BlockCausalTTT(T=32768, chunk_size=2048, H=4, **small),
        BlockCausalTTT(T=32768, chunk_size=2048, H=4, **large),
        TTT("views", pieces=32, piece=1024, **network),
        TTTApply(Tq=1, **network),
    ]
    video, frames, layer = options["family"].calls
    assert (video.op, frames.op, layer.op) == ("video", "frames", "layer")
    assert not options["family"].compile and options["family"].dtype == "bfloat16"
    cache = options["window_attn_with_kvcache"]
    assert cache.op == ["window_attn_with_kvcache"] and cache.heads > cache.kv_heads


def test_checks_end_in_time(tmp_path):
    assert gpu_stages.short(tmp_path).longest <= 4 * 60
    assert sum(stage.seconds for stage in gpu_stages.complete(tmp_path).stages) <= 9.5 * 60


@pytest.mark.parametrize("tier", TIERS)
def test_tests_of_a_check_are_there(tmp_path, tier):
    command = tier(tmp_path).tests.module
    assert (report.ROOT / command[1]).exists() and command[2:4] == ("-m", "gpu")
    assert str(gpu_stages.junit_report(tmp_path)) in command


# Stages as they end: exit status, whether they were stopped, and what they leave behind.
GOOD_TESTS = (0, False, {"tests": 5, "skipped": 1})
GOOD_BENCHMARK = (0, False, 2)
ENDINGS = {
    "all well": ([GOOD_TESTS, GOOD_BENCHMARK, GOOD_BENCHMARK], [True, True, True], 0),
    "a test fails": ([(1, False, {"tests": 5, "failures": 1})], [False], 1),
    "no test ran": ([(5, False, {"tests": 0})], [False], 1),
    "no report of tests": ([(-9, True, None)], [False], 1),
    "tests run out of time": (
        [(2, True, {"tests": 3}), GOOD_BENCHMARK, GOOD_BENCHMARK], [False, True, True], 1,
    ),
    "a benchmark runs out of time after a row": (
        [GOOD_TESTS, (130, True, 1), GOOD_BENCHMARK], [True, True, True], 0,
    ),
    "a benchmark runs out of time before it": (
        [GOOD_TESTS, (130, True, 0), GOOD_BENCHMARK], [True, False, True], 1,
    ),
    "one that may run out of time": ([GOOD_TESTS, GOOD_BENCHMARK, (130, True, 0)], 3 * [True], 0),
    "a benchmark fails": ([GOOD_TESTS, (1, False, 2), GOOD_BENCHMARK], [True, False, True], 1),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_check_judges_its_stages(tmp_path, monkeypatch, capsys, ending):
    endings, expected, status = ENDINGS[ending]
    (tmp_path / "old.jsonl").write_text('{"op": "of an earlier check"}\n')
    gpu_stages.junit_report(tmp_path).write_text('<testsuite tests="9"/>')  # likewise
    tier = Tier(
        "short",
        Stage("tests", (), 9),
        (Stage("first", (), 9), Stage("second", (), 9, needs_rows=False)),
        grace=1,
    )
    ended = []

    def run_stage(stage, out, grace, interruption):
        summary = json.loads((out / "summary.json").read_text())
        assert list(summary["stages"]) == ended  # written anew after each
        assert summary["stopped"] and not summary["ok"]
        status, stopped, left = endings[len(ended)]
        if stage.name == "tests" and left is not None:
            counts = " ".join(f'{name}="{count}"' for name, count in left.items())
            gpu_stages.junit_report(out).write_text(f"<testsuite {counts}/>")
        elif stage.name != "tests":
            with (out / "old.jsonl").open("a") as file:
                file.write(left * "{}\n" + '{"op": "cut in the mid\n')
        ended.append(stage.name)
        return gpu_check.Outcome(status, 1.0, stopped)

    monkeypatch.setattr(gpu_check, "run_stage", run_stage)
    assert gpu_check.check(tier, tmp_path, {"device": "none"}, gpu_check.Interruption()) == status
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = summary["stages"]
    assert [result["ok"] for result in results.values()] == expected
    assert (summary["ok"], summary["stopped"], summary["device"]) == (status == 0, False, "none")
    assert len(ended) == len(endings)
    printed = capsys.readouterr().out
    assert ("GPU check passed" in printed) is (status == 0)
    assert ("GPU check FAILED" in printed) is (status == 1)
    assert ("benchmarks were not run" in printed) is (len(endings) == 1)


@pytest.fixture
def dispositions():
    """Set those of the signals, whatever started the tests; afterwards they are as before."""
    numbers = gpu_check.Interruption.SIGNALS
    before = {number: signal.getsignal(number) for number in numbers}
    yield lambda handler: [signal.signal(number, handler) for number in numbers]
    for number, handler in before.items():
        signal.signal(number, handler)


# A stage that ends when it is asked to; `{}` is done first.
STOPS_WHEN_ASKED = """
import os, signal, time
try:
    print("begun", flush=True)
    {}
    time.sleep(600)
except KeyboardInterrupt:
    print("asked to stop", flush=True)
    raise SystemExit(7)
"""


@pytest.fixture
def in_a_process(tmp_path, monkeypatch):
    """Makes code a module, and so a stage."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name, code):
        (tmp_path / f"stage_{name}.py").write_text(code)
        return (f"stage_{name}",)

    return write


@pytest.mark.parametrize("number", gpu_check.Interruption.SIGNALS)
def test_a_signal_stops_the_check_and_what_is_finished_is_kept(
    tmp_path, gpu, monkeypatch, capsys, dispositions, in_a_process, number
):
    dispositions(signal.SIG_DFL)
    passed = (
        f"""open({str(gpu_stages.junit_report(tmp_path))!r}, "w").write('<testsuite tests="1"/>')"""
    )
    interrupt = STOPS_WHEN_ASKED.format(f"os.kill(os.getppid(), {int(number)})")
    tier = Tier(
        "short",
        Stage("tests", in_a_process("tests", passed), 600),
        (Stage("first", in_a_process("first", interrupt), 600), Stage("second", ("none",), 600)),
        grace=600,
    )
    monkeypatch.setattr(gpu_check, "short", lambda out: tier)
    monkeypatch.setattr(report, "environment", lambda device: {"device": "none"})
    monkeypatch.setattr(report, "announce", lambda environment: None)
    assert gpu_check.main(["--out", str(tmp_path)]) == 128 + number
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["stopped"] and not summary["ok"] and list(summary["stages"]) == ["tests", "first"]
    )
    assert summary["stages"]["tests"]["ok"]
    first = summary["stages"]["first"]
    assert (first["status"], first["stopped"], first["ok"]) == (7, True, False)
    assert (tmp_path / "first.log").read_text() == "begun\nasked to stop\n"
    assert "GPU check stopped" in capsys.readouterr().out
    assert all(signal.getsignal(x) == signal.SIG_DFL for x in gpu_check.Interruption.SIGNALS)


def test_ignored_signals_stay_ignored_but_not_by_stages(
    tmp_path, capsys, dispositions, in_a_process
):
    """As in the background of a script."""
    dispositions(signal.SIG_IGN)
    code = STOPS_WHEN_ASKED.format("os.kill(os.getpid(), signal.SIGINT)")
    with gpu_check.Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        stage = Stage("first", in_a_process("first", code), 600)
        outcome = gpu_check.run_stage(stage, tmp_path, 600, interruption)
    assert interruption.signal is None
    assert (outcome.status, outcome.stopped) == (7, False)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_stage_ends_with_its_budget(tmp_path, capsys, in_a_process):
    stage = Stage("slow", in_a_process("slow", "import time; time.sleep(600)"), 0)
    outcome = gpu_check.run_stage(stage, tmp_path, 0, gpu_check.Interruption())
    assert outcome.stopped and outcome.status < 0


def test_without_a_gpu_nothing_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--all"]):
        assert gpu_check.main([*arguments, "--out", str(tmp_path / "out")]) == 0
        assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused_before_any_work(tmp_path, gpu, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--fast", "--out", str(out)]
    assert_refused_before_any_work(gpu_check.main, arguments, out, "--fast", capsys)
    monkeypatch.setattr(gpu_check, "check", lambda *_: pytest.fail("something was run"))
    out.write_text("a file")
    assert gpu_check.main(["--out", str(out)]) == 2
    assert f"cannot write results to {out}" in capsys.readouterr().err


def row(point, variant, mode, milliseconds, status="ok", dtype="bfloat16"):
    """As `benchmarks.run` writes it, of a device whose matrix products make 800 TFLOP/s."""
    timed = report.Row(
        point.op, variant, point.swept, dataclasses.asdict(point), dtype, mode, status
    )
    if status == "ok":
        timed.p50_ms = milliseconds
        timed.needed_tflops = point.flops(mode) / milliseconds / 1e9
        timed.share_of_matrix_rate = timed.needed_tflops / 800
        timed.matrix_tflops = 800.0
        if hasattr(point, "needed_bytes"):
            timed.needed_gb_per_s = point.needed_bytes(torch.bfloat16) / milliseconds / 1e6
    return {"device": "none"} | dataclasses.asdict(timed)


ATTENTION = WindowAttn(B=4, T=16384, window_size=1024, Hq=16, Hkv=16)  # 0.266 TFLOP a forward
CACHE = WindowAttnWithKVCache(S=8192, window_size=4096, B=64, Hq=32, Hkv=8, D=128)
CHUNKS = BlockCausalTTT(T=32768, chunk_size=2048, Dk=384, Dv=384, Dh=384, muon=True)
VIEWS = TTT("views", pieces=32, piece=1024, Dk=768, Dv=768, Dh=1536, only_w1=True)
RENDERING = TTTApply(Tq=4096, Dk=768, Dv=768, Dh=1536)


def test_yardsticks_are_a_table():
    """Forward and what the backward adds, of ours and of every peer that has a time; the rest in a word."""
    flex, triton, eager = "FlexAttention", "lact_kernels triton", "lact_kernels eager"
    rows = [
        row(ATTENTION, triton, "fwd", 1.0),
        row(ATTENTION, eager, "fwd", 9.0),
        row(ATTENTION, flex, "fwd", 1.25),
        row(ATTENTION, "FLA parallel_attn", "fwd", None, "unavailable: not installed"),
        row(ATTENTION, triton, "fwd_bwd", 3.0),
        row(ATTENTION, flex, "fwd_bwd", None, "failed: RuntimeError: no"),
        row(CACHE, triton, "fwd", 0.5),
        row(CACHE, "SDPA over the window", "fwd", 0.6),
        row(CHUNKS, triton, "fwd_bwd", 70.0),
        row(CHUNKS, "compiled reference loop", "fwd_bwd", 80.0),
        row(CHUNKS, triton, "fwd_bwd", 50.0),  # in another run, with another peer
        row(CHUNKS, "reference loop", "fwd_bwd", 100.0),
        row(VIEWS, triton, "fwd_bwd", 5.0),
        row(RENDERING, triton, "fwd", 0.1),
        {"op": "silu_l2norm_rope", "variant": triton},
    ]
    assert [line.rstrip() for line in yardsticks(rows)] == EXPECTED


EXPECTED = """
window_attn                            ms  TFLOP/s matrix   FlexAttention
T16384 W1024 B4 H16 D64  fwd        1.000    266.3    33%    1.250  1.25x
T16384 W1024 B4 H16 D64  bwd        2.000    332.9    42%          failed
window_attn_with_kvcache                         ms     GB/s matrix  SDPA over the window
S8192 W4096 B64 Tq1 H32 Hkv8 D128  fwd       0.5000   2149.6     1%         0.6000  1.20x
block_causal_ttt                            ms  TFLOP/s matrix  reference loop
T32768 C2048 B1 H4 D384 muon  fwd_bwd    50.00     36.3     5%    100.0  2.00x
ttt                                                      ms  TFLOP/s matrix
views N32 C1024 B1 H1 D768 Dh1536 only_w1  fwd_bwd    5.000    429.2    54%
ttt_apply                               ms  TFLOP/s matrix
Tq4096 B1 H1 D768 Dh1536  fwd       0.1000    289.9    36%
bwd: forward and backward together, less forward. x: as many times our time.
""".strip("\n").splitlines()


@pytest.mark.parametrize("tier", TIERS)
def test_summary_is_one_screen(tmp_path, gpu, tier):
    """Even where every peer that torch has has a time, and every stage has failed."""
    tier, rows = tier(tmp_path), []
    failed = {"ok": False, "status": 130, "seconds": 315.0, "stopped": True}
    counts = {"passed": 999, "failures": 99, "errors": 99, "skipped": 99}
    results = {x.name: failed | (counts if x is tier.tests else {"rows": 99}) for x in tier.stages}
    for stage in tier.benchmarks:
        if stage.module[0] == "benchmarks.run":
            options = run.parse(list(stage.module[1:]))
            for point in points_of(options):
                rows += [
                    row(point, variant.name, mode, 100.0 * (1 + options.mode.index(mode)))
                    for mode in options.mode
                    if mode in point.modes
                    for variant in run._variants(point, options)
                    if not variant.name.startswith(("LaCT", "FLA"))  # not in torch
                ]
    summary = {"stages": results, "stopped": False, "ok": False}
    lines = list(gpu_check._screen(tier, summary, rows))
    assert len(lines) <= 38 and max(map(len, lines)) <= 118
    assert len([line for line in lines if " fwd " in line]) == len({str(x["shape"]) for x in rows})
    assert NOTE in lines
