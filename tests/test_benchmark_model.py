"""The benchmark of a whole model times what is right, and says what it did."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from benchmarks import model, model_variants
from tests.commands import assert_refused_before_any_work

CPU = torch.device("cpu")
SIZE = model.Size(
    layers=2,
    hidden_size=32,
    heads=2,
    fast_weight_heads=2,
    window_size=24,
    chunk_size=40,
    muon=False,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine cost more than these sizes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(out, *more):
    sizes = ["--layers", "2", "--hidden-size", "32", "--heads", "2", "--fast-weight-heads", "2"]
    sizes += ["--seq-len", "256", "--window-size", "24", "--chunk-size", "40"]
    return [*sizes, "--device", "cpu", "--out", str(out), *more]


def rows_in(folder):
    (path,) = folder.glob("*-model.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_variant_has_a_complete_row_in_every_mode(tmp_path, capsys):
    assert model.main(arguments(tmp_path, "--rounds", "2")) == 0
    rows = rows_in(tmp_path)
    fields = {field.name for field in dataclasses.fields(model.ModelRow)}
    assert all(row.keys() == fields | {"commit", "date", "versions", "device"} for row in rows)
    points = {(row["variant"], row["mode"], row["shape"]["T"]): row for row in rows}
    assert points.keys() == {
        (variant, mode, T)
        for variant in (model.OURS, model.DENSE)
        for mode, T in (("fwd", 256), ("fwd_bwd", 256), ("token", 32), ("token", 256))
    }
    for (variant, mode, T), row in points.items():
        assert row["shape"] == dataclasses.asdict(SIZE) | {"T": T}
        if (variant, mode) == (model.DENSE, "token"):
            assert row["status"] == model.NO_CACHE and row["p50_ms"] is None
            continue
        assert row["status"] == "ok" and row["dtype"] == "float32"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["rounds"] == (model.TOKENS if mode == "token" else 2)
        assert (row["state_bytes"] is None) is (mode != "token")
        assert (row["kept_bytes"] is None) is (mode != "fwd_bwd")
    # Each layer's mask of floats is kept, which ours does not have.
    kept = [points[variant, "fwd_bwd", 256]["kept_bytes"] for variant in (model.DENSE, model.OURS)]
    assert kept[0] > kept[1] > 0
    if os.path.exists("/proc/self/clear_refs"):
        peaks = [
            points[name, "fwd_bwd", 256]["peak_memory_bytes"] for name in model_variants.VARIANTS
        ]
        assert min(peaks) > 0
    printed = capsys.readouterr().out
    assert printed.count("gate") == printed.count("ok, worst") + 1 == 3
    for line in ("plan, 2 calls", "fwd_bwd T=256: dense", "a token behind 256 takes", "8 rows"):
        assert line in printed


def wrong(name, change):
    """The package's function with other options."""
    right = model_variants.VARIANTS[model.OURS][name]
    return {name: lambda *inputs, **options: right(*inputs, **change(options))}


@pytest.mark.parametrize(
    "fault",
    [
        wrong("block_causal_ttt", lambda options: options | {"chunk_size": 41}),
        wrong("block_causal_ttt", lambda options: options | {"momentum": None}),
        {
            "window_attn": lambda q, k, v, window_size, **_: model_variants.dense_window_attn(
                q, k, v, 31
            )
        },
        {"window_attn": lambda q, k, v, *_, **__: v.detach()},
        {"window_attn": lambda q, k, v, *_, **__: v * float("nan")},
        {"window_attn": lambda *_, **__: 1 / 0},
    ],
    ids=["chunk", "momentum", "window", "gradient", "nan", "crash"],
)
def test_nothing_is_timed_when_the_variants_disagree(tmp_path, monkeypatch, capsys, fault):
    ours = model_variants.VARIANTS[model.OURS] | fault
    monkeypatch.setitem(model_variants.VARIANTS, model.OURS, ours)
    monkeypatch.setattr(model.Worker, "start", lambda _: pytest.fail("something was timed"))
    assert model.main(arguments(tmp_path)) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out or "CRASHED" in printed.out
    assert "nothing was timed" in printed.err
    assert rows_in(tmp_path) == []


def test_gate_sees_a_cache_that_forgets(monkeypatch, capsys):
    """Both variants are right here, and only what is carried from token to token is not."""
    forget = model.LaCTCache.layer

    def layer(self, *arguments):
        layer = forget(self, *arguments)
        if layer.kv is not None:
            layer.kv.v.zero_()
        return layer

    monkeypatch.setattr(model.LaCTCache, "layer", layer)
    assert model.gate_passes(SIZE, torch.float32, CPU) is False
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize("muon", [False, True], ids=["plain", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_passes_in_the_dtype_of_the_run(capsys, dtype, muon):
    assert model.gate_passes(dataclasses.replace(SIZE, muon=muon), dtype, CPU) is True


def test_model_is_that_of_transformers():
    causal_lm = pytest.importorskip("lact_kernels.compat.transformers.causal_lm")
    ours = model.Model(SIZE)
    config = causal_lm.LaCTSWIGLUConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attn_heads=2,
        num_lact_heads=2,
        window_size=24,
        lact_chunk_size=40,
        attn_qk_norm=True,
        w0_w2_low_rank=model_variants.LOW_RANK,
        rope_theta=500000.0,
        vocab_size=2,
    )
    theirs = causal_lm.LaCTModel(config)
    theirs.load_state_dict(ours.state_dict() | {"embeddings.weight": theirs.embeddings.weight})
    x = torch.randn(1, 100, 32)
    expected = theirs(inputs_embeds=x, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)


GIB = 2**30


def pretend(monkeypatch, failing=()):
    """Instead of processes: blocks that keep so many GiB, T^2 ones in the dense variant; 20 GiB are free."""
    calls = []

    def run(self, method, *arguments):
        variant = self.arguments[0]
        calls.append((variant, method, *arguments))
        if (variant, method) in failing:
            return "out of memory: the system ended its process"
        if method == "block":
            share = arguments[0] / 256
            kept = 20 * share**2 if variant == model.DENSE else 5 * share
            return {
                "fwd": 1.0,
                "fwd_bwd": 3.0,
                "kept_bytes": int(kept * GIB),
            }  # of one of two layers
        if method == "token":
            return {"milliseconds": 2.0, "state_bytes": 5}
        slower = 3 if variant == model.DENSE else 1
        return {"milliseconds": 2.0 * slower, "peak_memory_bytes": slower * GIB}

    monkeypatch.setattr(model.Worker, "start", lambda self: None)
    monkeypatch.setattr(model.Worker, "run", run)
    monkeypatch.setattr(model, "_free_bytes", lambda device: 20 * GIB)
    monkeypatch.setattr(model, "gate_passes", lambda *_: True)
    return calls


def test_what_does_not_fit_is_measured_at_a_shorter_length(tmp_path, monkeypatch, capsys):
    calls = pretend(monkeypatch)
    assert model.main(arguments(tmp_path, "--mode", "fwd_bwd")) == 0
    status = {(row["variant"], row["shape"]["T"]): row["status"] for row in rows_in(tmp_path)}
    refusal = "out of memory, not tried: autograd would keep 40.0 GiB of 20.0 GiB that are free"
    assert status == {
        (model.OURS, 256): "ok",
        (model.DENSE, 256): refusal,
        (model.OURS, 128): "ok",
        (model.DENSE, 128): "ok",
    }
    assert (model.DENSE, "call", "fwd_bwd", 256) not in calls
    printed = capsys.readouterr().out
    assert f"fwd_bwd T=128: {model.DENSE} takes 3.00 x the time and 3.00 x the memory" in printed
    assert "about 6 s" in printed  # two layers of three seconds


def test_a_call_that_runs_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, failing=[(model.DENSE, "call")])
    assert model.main(arguments(tmp_path, "--mode", "fwd")) == 0
    status = {row["variant"]: row["status"] for row in rows_in(tmp_path)}
    assert status[model.OURS] == "ok" and "ended its process" in status[model.DENSE]


def test_a_process_that_was_ended_is_told_apart(monkeypatch):
    start = model.Worker.start

    def start_and_end(self):
        start(self)
        os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(model.Worker, "start", start_and_end)
    worker = model.Worker(model.OURS, SIZE, torch.float32, CPU)
    assert worker.run("block", 64) == "out of memory: the system ended its process"
    assert worker.process is None  # and the next call starts another


def test_interrupting_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch)
    run = model.Worker.run

    def interrupted(self, method, *arguments):
        if method == "call" and self.arguments[0] == model.DENSE:
            raise KeyboardInterrupt
        return run(self, method, *arguments)

    monkeypatch.setattr(model.Worker, "run", interrupted)
    assert model.main(arguments(tmp_path)) == 130
    assert [row["variant"] for row in rows_in(tmp_path)] == [model.OURS]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--layers", "0"], "at least 1"),
        (["--seq-len", "x"], "whole number"),
        (["--mode", "bwd"], "invalid choice"),
        (["--variants", "fast"], "invalid choice"),
        (["--heads", "3"], "num_attn_heads must divide hidden_size = 32, got 3"),
        (["--mode", "token", "--variants", "dense"], "needs a cache"),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, bad, message):
    out = tmp_path / "out"
    assert_refused_before_any_work(model.main, arguments(out, *bad), out, message, capsys)
