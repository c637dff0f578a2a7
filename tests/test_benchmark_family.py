"""The benchmark of the LaCT family's functions times what is right, and says what it did."""

import dataclasses
import json
import os
import sys

import pytest
import torch

from benchmarks import family, report, timing
from benchmarks.family_cases import CASES, FUNCTIONS
from benchmarks.registry import MODES
from lact_kernels.compat import lact
from tests.commands import assert_refused_before_any_work

OURS, PLAIN, THEIRS = "lact_kernels eager", "plain function", "LaCT authors' function"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch):
    """What is overwritten and multiplied between calls would take most of the time."""
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**16)
    monkeypatch.setitem(timing.MATRIX_SIZES, "cpu", 64)
    monkeypatch.delenv("LACT_CHECKOUT", raising=False)


def arguments(out, *more):
    sizes = ["--device", "cpu", "--part", "32", "--pieces", "3", "--no-compile"]
    return [*sizes, "--repeats", "3", "--seconds", "1", "--out", str(out), *more]


def rows_in(folder):
    (path,) = folder.glob("*-family.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cases, modes", [(list(CASES), ["fwd"]), (["views", "video"], MODES)])
def test_every_variant_of_every_case_has_a_complete_row(tmp_path, capsys, cases, modes):
    """Gradients of few cases: through Newton-Schulz, those of so few tokens are a matter of luck."""
    assert family.main(arguments(tmp_path, "--case", *cases, "--mode", *modes)) == 0
    rows = rows_in(tmp_path)
    fields = {field.name for field in dataclasses.fields(report.Row)}
    assert all(row.keys() == fields | {"commit", "date", "versions", "device"} for row in rows)
    assert [(row["op"], row["mode"], row["variant"]) for row in rows] == [
        (case, mode, variant)
        for case in cases
        for mode in modes
        for variant in (OURS, PLAIN, THEIRS)
    ]
    for row in rows:
        if row["variant"] == THEIRS:
            assert row["status"].startswith("unavailable") and row["p50_ms"] is None
            continue
        assert (row["status"], row["dtype"], row["rounds"]) == ("ok", "float32", 3)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["first_call_s"] > 0
        assert row["baseline"] == PLAIN
        assert row["variant"] == OURS or row["ratio_to_baseline"] == 1
        assert 0 < row["error"] < (1e-5 if row["variant"] == OURS else family.MUON_ERROR_LIMIT)
    printed = capsys.readouterr().out
    assert printed.count("first call") == len(rows) * 2 // 3
    assert printed.count(f"{rows[0]['op']:<14} {modes[-1]:<8} {OURS}") == 1  # in the summary


def faulty(fault):
    """Our function, wrong in one way."""
    right = lact.fast_weight_swish_glu_weight_norm_mini_batch_apply

    def run(w0, w1, w2, q, k, *others, **options):
        if fault == "crash":
            raise RuntimeError("no such kernel")
        k = k.detach() + 0 * k if fault == "gradient" else k
        q = q * 1.001 if fault == "output" else q
        return right(w0, w1, w2, q, k, *others, **options)

    return run


@pytest.mark.parametrize(
    "fault, status",
    [
        ("output", "not timed: less accurate than plain PyTorch in o, "),
        ("gradient", "not timed: less accurate than plain PyTorch in dk"),
        ("crash", "failed: RuntimeError: no such kernel"),
    ],
)
def test_ours_is_not_timed_when_it_is_wrong(tmp_path, monkeypatch, fault, status):
    name = FUNCTIONS["views"].name
    monkeypatch.setattr(lact, name, faulty(fault))
    assert family.main(arguments(tmp_path, "--case", "views", "--mode", "fwd_bwd")) == 1
    rows = {row["variant"]: row for row in rows_in(tmp_path)}
    assert rows[OURS]["status"].startswith(status) and rows[OURS]["p50_ms"] is None
    assert rows[PLAIN]["status"] == "ok" and rows[PLAIN]["p50_ms"] > 0


STAND_IN = """
from benchmarks.registry import MODES
from lact_kernels.compat import lact

def {name}(*args):
    order, steps = args[9:]
    return lact.{name}(*args[:9], order{reverse}, steps)
"""


@pytest.mark.parametrize("right", [True, False])
def test_the_authors_function_is_that_of_a_checkout(tmp_path, monkeypatch, right):
    """Nor is theirs timed when it is wrong: a stand-in that takes the steps in the opposite order."""
    file = tmp_path / "checkout" / "lact_nvs" / "lact_ttt.py"
    file.parent.mkdir(parents=True)
    name = FUNCTIONS["views"].name
    file.write_text(STAND_IN.format(name=name, reverse="" if right else "[::-1]"))
    monkeypatch.delitem(sys.modules, "lact_ttt", raising=False)
    more = ("--case", "views", "--mode", "fwd", "--lact-checkout", str(tmp_path / "checkout"))
    assert family.main(arguments(tmp_path / "out", *more)) == 0
    monkeypatch.delitem(sys.modules, "lact_ttt")
    rows = {row["variant"]: row for row in rows_in(tmp_path / "out")}
    assert rows[THEIRS]["status"].startswith("ok" if right else "not timed: its error is ")
    assert rows[OURS]["status"] == rows[PLAIN]["status"] == "ok"
    assert str(tmp_path) not in " ".join(sys.path)


def test_compiled_functions_start_from_an_empty_cache(monkeypatch):
    """What is compiled here for nothing else than its headers is replaced: that takes seconds."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    with family.empty_compile_cache(torch.device("cpu")):
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert os.listdir(folder) == [] and len(compiled) == 1
    assert not os.path.exists(folder) and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_interrupting_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    measure_point = family.measure_point

    def interrupted(call, mode, *others):
        if mode == "fwd_bwd":
            raise KeyboardInterrupt
        return measure_point(call, mode, *others)

    monkeypatch.setattr(family, "measure_point", interrupted)
    assert family.main(arguments(tmp_path, "--case", "video")) == 130
    assert [row["variant"] for row in rows_in(tmp_path)] == [OURS, PLAIN, THEIRS]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--case", "sounds"], "invalid choice"),
        (["--pieces", "0"], "at least 1"),
        (["--dtype", "float64"], "invalid choice"),
        (["--part", "1000"], "--part 1000 leaves nothing of views"),
        (["--case", "rendering", "--mode", "fwd_bwd"], "no backward of rendering"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    out = tmp_path / "out"
    assert_refused_before_any_work(family.main, arguments(out, *bad), out, message, capsys)
