"""The benchmark of the elementwise operations times what is right, and says what it did."""

import dataclasses
import json

import pytest
import torch

from benchmarks import branches, timing
from lact_kernels.ops import rms_norm_scale_add as ops
from reference import rms_norm_scale_add as reference
from tests.commands import assert_refused_before_any_work

CPU = torch.device("cpu")
SHAPE = {"B": 1, "T": 40, "C": 24, "Hq": 6, "Hf": 2}
OURS, PLAIN = "lact_kernels eager", "plain PyTorch"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """What is overwritten and copied between calls would take most of the time."""
    monkeypatch.setitem(branches.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**20)


def arguments(out, *more):
    sizes = ["--seq-len", "40", "--hidden-size", "24", "--heads", "6", "--fast-weight-heads", "2"]
    return [*sizes, "--device", "cpu", "--no-compile", "--repeats", "3", "--out", str(out), *more]


def rows_in(folder):
    (path,) = folder.glob("*-branches.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_variant_has_a_complete_row_in_every_mode(tmp_path, capsys):
    assert branches.main(arguments(tmp_path)) == 0
    rows = rows_in(tmp_path)
    fields = {field.name for field in dataclasses.fields(branches.BranchRow)}
    assert all(row.keys() == fields | {"commit", "date", "versions", "device"} for row in rows)
    points = {(row["op"], row["mode"], row["variant"]): row for row in rows}
    assert list(points) == [
        (op, mode, variant)
        for op in ("silu_l2norm_rope", "rms_norm_scale_add")
        for mode in ("fwd", "fwd_bwd")
        for variant in (OURS, PLAIN)
    ]
    for (op, mode, variant), row in points.items():
        assert (row["status"], row["dtype"], row["rounds"]) == ("ok", "float32", 3)
        assert row["shape"] == SHAPE
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["needed_gb_per_s"] == pytest.approx(row["needed_bytes"] / row["p50_ms"] / 1e6)
        ours = points[op, mode, OURS]
        assert row["baseline"] == OURS
        assert row["ratio_to_baseline"] == ours["p50_ms"] / row["p50_ms"]
        assert row["copy_gb_per_s"] == ours["copy_gb_per_s"] > 0
        assert (row["difference"] is None) is (variant == OURS)
        assert variant == OURS or row["difference"] < 1e-5
    printed = capsys.readouterr().out
    assert printed.count("gate") == 2 and printed.count("a copy") == 4
    assert "8 rows appended" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", branches.OPS)
def test_needed_bytes_are_those_of_the_formula(op, dtype):
    _, T, C, Hq, Hf = SHAPE.values()
    size = dtype.itemsize
    n = T * C * size
    if op == "silu_l2norm_rope":
        small, gradients = 4 * T * (C // Hq) + 4 * C * size, 4 * C * size
        forward, backward = 8 * n + small, 12 * n + small + gradients
    else:
        small = (C // Hf + T * Hf) * size
        forward, backward = 3 * n + small, 3 * n + 2 * small
    inputs, douts, _ = branches.make_inputs(op, SHAPE, dtype, CPU)
    assert branches.needed_bytes(inputs, douts, "fwd") == forward
    assert branches.needed_bytes(inputs, douts, "fwd_bwd") == forward + backward


def faulty(op, fault):
    """The operation, wrong in one way."""
    right = branches.function("lact_kernels.ops", op)

    def run(**options):
        if fault == "crash":
            raise RuntimeError("no such kernel")
        if fault == "gradient":
            name = "qk_scale" if op == "silu_l2norm_rope" else "ttt"
            options[name] = options[name].detach() + 0 * options[name]
        elif op == "rms_norm_scale_add":
            options["eps"] = 1e-2
        else:
            options["silu_v"] = False
        return right(**options)

    return run


@pytest.mark.parametrize("fault", ["output", "gradient", "crash"])
@pytest.mark.parametrize("op", branches.OPS)
def test_nothing_is_timed_when_the_gate_fails(tmp_path, monkeypatch, capsys, op, fault):
    monkeypatch.setattr(f"lact_kernels.ops.{op}.{op}", faulty(op, fault))
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("something was timed"))
    assert branches.main(arguments(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out.count("CRASHED" if fault == "crash" else "FAILED") == 1
    assert "nothing was timed" in printed.err
    assert rows_in(tmp_path) == []


def test_what_differs_at_full_length_is_not_timed(tmp_path, monkeypatch, capsys):
    right = reference.rms_norm_scale_add

    def wrong_when_long(attn, *inputs, **options):
        return right(attn, *inputs, **options) * (1 + (attn.shape[1] == 300))

    monkeypatch.setattr(reference, "rms_norm_scale_add", wrong_when_long)
    assert branches.main(arguments(tmp_path, "--op", "rms_norm_scale_add", "--seq-len", "300")) == 0
    status = {row["variant"]: (row["status"], row["p50_ms"]) for row in rows_in(tmp_path)}
    assert status[PLAIN] == ("not timed: differs from ours by 100.0%", None)
    assert status[OURS][0] == "ok"


def test_a_failure_of_ours_at_full_length_is_a_row_and_the_exit_status(
    tmp_path, monkeypatch, capsys
):
    right = ops.rms_norm_scale_add

    def fails_when_long(attn, *inputs, **options):
        if attn.shape[1] == 300:
            raise RuntimeError("no such kernel")
        return right(attn, *inputs, **options)

    monkeypatch.setattr(ops, "rms_norm_scale_add", fails_when_long)
    assert branches.main(arguments(tmp_path, "--op", "rms_norm_scale_add", "--seq-len", "300")) == 1
    rows = {row["variant"]: row for row in rows_in(tmp_path)}
    assert "no such kernel" in rows[OURS]["status"] and rows[PLAIN]["status"] == "ok"
    assert rows[PLAIN]["ratio_to_baseline"] is rows[PLAIN]["difference"] is None


def test_interrupting_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    measure = branches.measure

    def interrupted(op, shape, mode, *rest):
        if mode == "fwd_bwd":
            raise KeyboardInterrupt
        return measure(op, shape, mode, *rest)

    monkeypatch.setattr(branches, "measure", interrupted)
    assert branches.main(arguments(tmp_path)) == 130
    assert [row["variant"] for row in rows_in(tmp_path)] == [OURS, PLAIN]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--seq-len", "0"], "at least 1"),
        (["--hidden-size", "x"], "whole number"),
        (["--op", "window_attn"], "invalid choice"),
        (["--dtype", "float64"], "invalid choice"),
        (["--heads", "5"], "--heads 5 does not divide --hidden-size 24"),
        (["--fast-weight-heads", "5"], "--fast-weight-heads 5 does not divide"),
        (["--heads", "8"], "even number of channels, got 3"),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    out = tmp_path / "out"
    assert_refused_before_any_work(branches.main, arguments(out, *bad), out, message, capsys)
