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

from benchmarks import gate, gpu_check, measure, peers, report, run, timing
from benchmarks.registry import (
    BlockCausalTTT,
    WindowAttn,
    empty_output,
    forward_backward,
    output_gradient,
)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# Sizes straddle the window's and the chunk's edges; no two dims are alike.
TTT_POINTS = [
    BlockCausalTTT(T=T, chunk_size=16, H=2, Dk=6, Dv=10, Dh=8, muon=muon)
    for T in (16, 17, 70)
    for muon in (False, True)
]


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


def test_peak_memory_sees_what_a_call_allocates():
    size = 2**26
    peak = timing.peak_memory(lambda: torch.ones(size // 4).sum().item(), CPU)
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert 0.9 * size < peak < 1.5 * size


def arguments(out, *more):
    sizes = ["--device", "cpu", "--seq-len", "96", "--head-dim", "16", "--fast-weight-dims", "16"]
    sizes += ["--window-sizes", "32", "full", "--chunk-sizes", "40", "--repeats", "3"]
    return [*sizes, "--seconds", "1", "--out", str(out), *more]


@pytest.fixture
def without_compiled_peers(monkeypatch):
    """Compiling takes seconds a point and has nothing to do with the rows."""
    for key, variants in peers._PEERS.items():
        kept = [v for v in variants if v.name != "FlexAttention"]
        monkeypatch.setitem(peers._PEERS, key, kept)


def test_run_writes_a_complete_row_for_every_variant(tmp_path, capsys, without_compiled_peers):
    broken = peers.Variant("broken peer", lambda point, mode: 1 / 0)
    missing = peers.Variant("missing peer", _unavailable)
    wrong = peers.Variant("wrong peer", lambda point, mode: lambda q, k, v: q + k + v)
    peers._PEERS["window_attn", "cpu"] += [broken, missing, wrong]
    assert run.main(arguments(tmp_path)) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 5 + 2 * 2  # modes x points x variants of each operation
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
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        rate = row["needed_tflops"]
        assert row["share_of_matrix_rate"] == pytest.approx(rate / row["matrix_tflops"])
        if row["variant"] == row["baseline"]:
            assert row["ratio_to_baseline"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".png"}


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


def test_gate_points_fit_the_reference_and_keep_the_heads_grouped():
    point = WindowAttn(T=2**15, window_size=None, Hq=32, Hkv=8).gate()
    assert point.Hq // point.Hkv == 4 and point.T < 2**12
    small = WindowAttn(T=100, window_size=7)
    assert small.gate() is small


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
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    with pytest.raises(SystemExit) as error:
        run.main(arguments(tmp_path / "out", *bad))
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_sweep_is_over_lengths(tmp_path, capsys):
    more = ("--memory", "--op", "window_attn", "--mode", "fwd", "--window-sizes", "32")
    assert run.main(arguments(tmp_path, *more)) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["shape"]["T"] for row in rows] == [6, 12, 24, 48, 96]
    assert {row["swept"] for row in rows} == {"T"}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the GPU check itself")
def test_gpu_check_without_a_gpu_says_so_and_exits_cleanly(tmp_path):
    process = start("benchmarks.gpu_check", "--out", str(tmp_path / "out"))
    assert process.returncode == 0
    assert "no GPU" in process.stdout and "nothing was checked" in process.stdout
    assert not (tmp_path / "out").exists()


def test_demo_on_a_short_stereo_recording(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    options = ("--device", "cpu", "--no-sweep")
    samples, rate = soundfile.read(ROOT / "examples/data/speech.flac", stop=2 * 16000 + 800)
    clip = tmp_path / "clip.wav"
    stereo = torch.tensor(samples)[:, None].repeat(1, 2).numpy()
    soundfile.write(clip, stereo, rate)
    process = start("examples.demo", *options, "--audio", str(clip), "--out", str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    assert "all within their bounds" in process.stdout
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


def test_gpu_check_stops_a_stage_at_its_budget_and_keeps_its_output(tmp_path, capsys):
    code = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = gpu_check.run_stage(
        gpu_check.Stage("slow", ("timeit", "-n1", "-r1", code), 2), tmp_path
    )
    assert outcome.stopped and outcome.seconds < 2 + gpu_check.GRACE_SECONDS
    assert "begun" in (tmp_path / "slow.log").read_text()


@pytest.mark.parametrize("passing", [True, False])
def test_gpu_check_benchmarks_only_what_passes(tmp_path, monkeypatch, capsys, passing):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_it(): assert {passing}")
    tests = ("pytest", str(file), "--rootdir", str(tmp_path))
    write = f"open({str(tmp_path / 'device.jsonl')!r}, 'a').write('{{}}\\n')"
    stages = [
        gpu_check.Stage("tests", (*tests, "--junitxml", str(tmp_path / "tests.xml")), 60),
        gpu_check.Stage("benchmark", ("timeit", "-n1", "-r1", write), 60),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda out: (stages[0], stages[1:]))
    assert gpu_check.check(tmp_path, {"device": "none"}) == int(not passing)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] is passing
    assert summary["stages"]["tests"]["passed"] == int(passing)
    assert summary["stages"].get("benchmark", {}).get("rows", 0) == int(passing)
    assert ("FAILED" in capsys.readouterr().out) is not passing
