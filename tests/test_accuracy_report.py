"""The accuracy report: its oracle, its rows, and what its exit status says."""

import dataclasses
import functools
import json

import pytest
import torch

import lact_kernels
import reference
from benchmarks import accuracy_report, peers
from benchmarks.registry import WindowAttn, in_float64
from lact_kernels.ops import checks

CPU = torch.device("cpu")
EXTREME_ROWS = 2 + 3 + 3  # float16 cannot hold what makes all scores -inf


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_triton(monkeypatch):
    """The interpreter takes long, and has a test of its own. (Triton reads TRITON_INTERPRET only once.)"""
    monkeypatch.setattr(checks, "triton_runs_on", lambda x: False)


def run(out, *more):
    """The exit status, and the rows that were written."""
    sizes = ["--device", "cpu", "--seq-len", "96", "--window-size", "32", "--head-dim", "16"]
    status = accuracy_report.main([*sizes, "--out", str(out), *more])
    (path,) = out.glob("*-accuracy.jsonl")
    return status, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rows", [16, 67, 100], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("window_size", [1, 2, 16, 33, 66, 67, 1000, None])
def test_blocks_of_the_reference_are_the_dense_reference(window_size, rows):
    """Blocks that leave a rest, one block of all, one block beyond it."""
    point = WindowAttn(T=67, window_size=window_size, B=2, Hq=4, Hkv=2, D=8, Dv=6)
    inputs = point.inputs(torch.float64, CPU)
    do = torch.randn(2, 67, 4, 6, dtype=torch.float64)
    dense = functools.partial(reference.window_attn, window_size=window_size, return_lse=True)
    expected = accuracy_report.evaluate(dense, inputs, do)
    actual = accuracy_report.blockwise(point, inputs, do, rows)
    assert actual.keys() == expected.keys() == set(accuracy_report.TENSORS)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_blocks_in_half_precision_are_as_exact_as_one(dtype):
    """A key in 32 blocks, whose parts of its gradient are added up in float32."""
    point = WindowAttn(T=256, window_size=128, Hq=2, Hkv=2, D=16, Dv=16)
    inputs = point.inputs(dtype, CPU)
    do = torch.randn(1, 256, 2, 16).to(dtype)
    exact = accuracy_report.blockwise(point, in_float64(inputs), do.double())
    one, many = (accuracy_report.blockwise(point, inputs, do, rows) for rows in (256, 4))
    for name in ("dk", "dv"):
        assert many[name].dtype == dtype
        errors = [(x[name].double() - exact[name]).norm() for x in (one, many)]
        assert errors[1] < 1.1 * errors[0]


def test_inputs_are_what_the_report_says():
    point = WindowAttn(T=1000, window_size=32, D=64, Dv=64)
    unit, scaled, outliers = (
        accuracy_report.make_inputs(point, torch.float32, kind, CPU)
        for kind in ("unit", "scale10", "outliers")
    )
    for name, x in point.inputs(torch.float32, CPU).items():
        assert torch.equal(unit[name], x) and torch.equal(scaled[name], 10 * x)
        rare = outliers[name] != x
        assert torch.equal(outliers[name][rare], 30 * x[rare])
        assert rare.float().mean().item() == pytest.approx(1e-3, rel=0.2)
        assert all(y[name].is_leaf and y[name].requires_grad for y in (unit, scaled, outliers))


def test_rows_of_a_run(tmp_path, capsys, without_triton):
    status, rows = run(tmp_path, "--window-size", "32", "full", "--heads", "2")
    assert status == 0
    fields = {field.name for field in dataclasses.fields(accuracy_report.AccuracyRow)}
    assert all(row.keys() == fields | {"commit", "date", "versions", "device"} for row in rows)
    assert all(row["op"] == "window_attn" and row["status"] == "ok" for row in rows)

    errors = {
        (row["variant"], row["shape"]["window_size"], row["dtype"], row["inputs"]): row["errors"]
        for row in rows[:-EXTREME_ROWS]
    }
    names = {"plain PyTorch", "lact_kernels eager", "dense-mask SDPA"}
    assert len(errors) == len(rows) - EXTREME_ROWS == len(names) * 2 * 2 * 3
    assert {key[0] for key in errors} == names
    for (variant, _, dtype, kind), by_tensor in errors.items():
        missing = {"lse"} if variant == "dense-mask SDPA" else set()
        assert by_tensor.keys() == set(accuracy_report.TENSORS) - missing
        for x in by_tensor.values():
            assert x["ok"] and 0 < x["rms"] <= x["rms_bound"] and 0 < x["max"] <= x["max_bound"]
        if variant == "plain PyTorch":
            assert all(x["plain_rms"] == x["rms"] for x in by_tensor.values())
        if kind == "unit":  # relative: some roundings, whatever the size of a tensor
            eps = torch.finfo(getattr(torch, dtype)).eps
            assert all(eps / 10 < x["plain_rms"] < 10 * eps for x in by_tensor.values())

    assert all(row["errors"] is None for row in rows[-EXTREME_ROWS:])
    assert {row["inputs"] for row in rows[-EXTREME_ROWS:]} == set(accuracy_report.EXTREMES)
    assert "scale10, bfloat16, T=96 W=full D=16 heads=2" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter only")
def test_interpreted_kernels_are_reported_but_for_bfloat16():
    assert accuracy_report.backends(torch.float16, CPU) == ("eager", "triton")
    assert accuracy_report.backends(torch.bfloat16, CPU) == ("eager",)
    point = WindowAttn(T=40, window_size=9, Hq=1, Hkv=1, D=16, Dv=16)
    rows = list(accuracy_report.compare_variants(point, torch.float16, "unit", CPU))
    status = {row.variant: row.status for row in rows}
    assert status["lact_kernels triton"] == "ok"


@pytest.mark.parametrize("fault", ["wrong output", "wrong gradient", "nan", "crash"])
def test_a_backend_that_is_wrong_is_told_by_its_row_and_the_exit_status(
    tmp_path, monkeypatch, capsys, without_triton, fault
):
    right = lact_kernels.window_attn

    def faulty(q, k, v, window_size, **options):
        if fault == "wrong output":
            return right(q, k, v, max(window_size - 1, 1), **options)
        if fault == "wrong gradient":
            return right(q, k.detach() + 0 * k, v, window_size, **options)
        if fault == "nan":
            return right(q, k, v * float("nan"), window_size, **options)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(lact_kernels, "window_attn", faulty)
    status, rows = run(tmp_path, "--dtype", "float16", "--inputs", "unit")
    assert status == 1
    found = {row["variant"]: row for row in rows if row["inputs"] == "unit"}
    assert found["plain PyTorch"]["status"] == found["dense-mask SDPA"]["status"] == "ok"
    expected = {
        "wrong output": "too far off: o, lse, dq, dk, dv",
        "wrong gradient": "too far off: dk",
        "nan": "too far off: o, dq, dk, dv",
        "crash": "failed: RuntimeError: no such kernel",
    }[fault]
    assert found["lact_kernels eager"]["status"] == expected
    assert expected in capsys.readouterr().out
    extreme = {row["status"] for row in rows if row["inputs"] in accuracy_report.EXTREMES}
    finite = {"nan": "not finite: o, dq, dk, dv", "crash": expected}.get(fault, "ok")
    assert extreme == {finite}


@pytest.mark.parametrize("case", ["wrong", "too long"])
def test_a_peer_decides_no_exit_status(tmp_path, monkeypatch, capsys, without_triton, case):
    if case == "wrong":
        wrong = peers.Variant("dense-mask SDPA", lambda point, mode: lambda q, k, v: q + k + v)
        monkeypatch.setattr(peers, "DENSE_SDPA", wrong)
    else:
        monkeypatch.setitem(accuracy_report.DENSE_SEQ_LENS, "cpu", 95)
    status, rows = run(tmp_path, "--dtype", "bfloat16", "--inputs", "unit")
    assert status == 0
    (peer,) = (row for row in rows if row["variant"] == "dense-mask SDPA")
    reasons = {"wrong": "too far off: o, dq, dk, dv", "too long": "unavailable: its mask of T x T"}
    assert peer["status"].startswith(reasons[case])


def test_interrupting_keeps_finished_rows(tmp_path, monkeypatch, capsys, without_triton):
    right = lact_kernels.window_attn

    def interrupted(q, *args, **options):
        if q.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return right(q, *args, **options)

    monkeypatch.setattr(lact_kernels, "window_attn", interrupted)
    status, rows = run(tmp_path, "--inputs", "unit")
    assert status == 130
    assert [(row["variant"], row["dtype"]) for row in rows] == [
        ("plain PyTorch", "float16"),
        ("lact_kernels eager", "float16"),
        ("dense-mask SDPA", "float16"),
        ("plain PyTorch", "bfloat16"),
    ]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--window-size", "0"], "at least 1"),
        (["--window-size", "1"], "at least 2"),
        (["--window-size", "97"], "beyond --seq-len 96"),
        (["--seq-len", "64", "16"], "beyond --seq-len 16"),
        (["--seq-len", "x"], "whole number"),
        (["--seq-len", "1", "--window-size", "full"], "at least 2"),
        (["--dtype", "float64"], "invalid choice"),
        (["--inputs", "tiny"], "invalid choice"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "out", *bad)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert accuracy_report.main(["--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write results" in capsys.readouterr().err
