"""Every GPU test, then the GPU benchmarks with their peers, within ten minutes.

```
PYTHONPATH=. python3 -m benchmarks.gpu_check [--out DIR]
```

DIR is $GPU_CHECK_OUT, or gpu-check-results/, unless given. Each stage stops cleanly at its time budget
and what it has finished is kept: the tests' log and JUnit report, the benchmarks' log, JSON lines and
plots, and summary.json. Needs PyTorch, Triton and pytest; matplotlib only for the plots.

Exit status: 0 when all tests passed and the benchmarks' correctness gates too, or when there is no GPU
(then nothing is checked); 1 otherwise; 130 after Ctrl-C.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import report

TEST_PROCESSES = 8
GRACE_SECONDS = 15  # from asking a stage to stop to killing it


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    module: tuple[str, ...]  # what follows `python -m`
    seconds: float
    needs_rows: bool = True  # a benchmark that finishes nothing within its time has failed


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    seconds: float
    stopped: bool  # at its time budget


def stages(out: Path) -> tuple[Stage, list[Stage]]:
    """The tests, and the benchmarks that follow when they pass."""
    junit = str(out / "tests.xml")
    tests = ("pytest", "tests", "-m", "gpu", "-ra", "--durations=10", "--junitxml", junit)
    # A test file that lacks a module must not keep the others from running.
    tests += ("--continue-on-collection-errors",)
    if importlib.util.find_spec("xdist"):  # most of their time is compilation, on the host
        tests += ("-n", str(TEST_PROCESSES), "--dist", "loadgroup")
    common = ("--device", "cuda", "--repeats", "15", "--seconds", "3", "--out", str(out))
    run = ("benchmarks.run", *common, "--op")
    attention = (*run, "window_attn", "--window-sizes")
    packed = (*attention, "4096", "--sequences", "16")
    cache = (*run, "window_attn_with_kvcache", "--cache-sizes", "4096", "16384", "65536")
    cache += ("--heads", "32", "--kv-heads", "8")
    ttt = (*run, "block_causal_ttt", "--chunk-sizes", "2048", "--fast-weight-dims", "384", "768")
    sizes = "--dtype bfloat16 --seq-len 32768 --chunk-size 2048 --fast-weight-heads 4"
    phases = ("benchmarks.phases", "--device", "cuda", *sizes.split())
    phases += ("--fast-weight-dim", "384", "768", "--repeats", "3", "--out", str(out))
    model = ("benchmarks.model", "--device", "cuda", "--rounds", "3", "--out", str(out))
    branches = ("benchmarks.branches", *common)
    accuracy = ("benchmarks.accuracy_report", "--device", "cuda", "--out", str(out))
    accuracy += ("--seq-len", "4096", "65536", "--heads", "2")
    return Stage("tests", tests, 315), [
        Stage("window_attn", (*attention, "1024", "4096", "16384"), 45),
        Stage("window_attn-packed", packed, 20),
        Stage("window_attn_with_kvcache", cache, 20),
        Stage("accuracy", accuracy, 25),
        Stage("block_causal_ttt", (*ttt, "--no-peers"), 25),
        Stage("phases", phases, 25),
        Stage("phases-muon", (*phases, "--muon"), 20),
        Stage("branches", branches, 30),
        # Its two processes start and compile first, and may take most of it.
        Stage("model", model, 30, needs_rows=False),
        # Compiling the reference takes long, and may take all of it.
        Stage("block_causal_ttt-peers", (*ttt, "--mode", "fwd_bwd"), 15, needs_rows=False),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(os.environ.get("GPU_CHECK_OUT") or "gpu-check-results")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR")
    options = parser.parse_args(arguments)

    if not torch.cuda.is_available():
        print("no GPU here (PyTorch finds no CUDA device): nothing was checked")
        return 0
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed, so the GPU tests cannot run", file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"cannot write results to {options.out}: {error}", file=sys.stderr)
        return 1
    environment = report.environment(torch.device("cuda"))
    report.announce(environment)
    try:
        return check(options.out.resolve(), environment)
    except KeyboardInterrupt:
        print(f"\nstopped; what was finished is in {options.out}", file=sys.stderr)
        return 130


def check(out: Path, environment: dict) -> int:
    """Run the stages, print and write the summary; the exit status."""
    tests, benchmarks = stages(out)
    summary = {**environment, "stages": {}}
    lines, ok = [], True

    outcome = run_stage(tests, out)
    counts = count_tests(out / "tests.xml")
    passed = outcome.status == 0 and not outcome.stopped and counts.get("passed", 0) > 0
    summary["stages"]["tests"] = dataclasses.asdict(outcome) | counts
    lines.append(_summary_line(tests, outcome, passed, f"{counts or 'no report'}"))
    ok &= passed
    # Tests that only ran out of time do not keep the benchmarks back: these check what they time.
    sound = counts.get("passed", 0) > 0 and not counts["failures"] + counts["errors"]
    if not sound:
        lines.append("the benchmarks were not run, because tests failed or none passed")

    for stage in benchmarks if sound else []:
        before = _count_rows(out)
        outcome = run_stage(stage, out)
        rows = _count_rows(out) - before
        passed = (outcome.stopped or outcome.status == 0) and (rows > 0 or not stage.needs_rows)
        summary["stages"][stage.name] = dataclasses.asdict(outcome) | {"rows": rows}
        lines.append(_summary_line(stage, outcome, passed, f"{rows} rows"))
        ok &= passed

    summary["ok"] = ok
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\n" + "\n".join(lines) + f"\nresults in {out}")
    print("GPU check passed" if ok else "GPU check FAILED")
    return 0 if ok else 1


def run_stage(stage: Stage, out: Path) -> Outcome:
    """Run a stage in a process of its own, its output on the screen and in `<out>/<stage>.log`."""
    print(f"\n== {stage.name}: up to {stage.seconds:.0f} s", flush=True)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(report.ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *stage.module],
        cwd=report.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it can be ended with all its compile workers
    )
    copier = threading.Thread(target=_copy, args=(process.stdout, out / f"{stage.name}.log"))
    copier.start()
    stopped = False
    try:
        process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        stopped = True
        print(f"== {stage.name}: its {stage.seconds:.0f} s are over, stopping it", flush=True)
    finally:
        _end(process)
        copier.join()
    return Outcome(process.returncode, round(time.monotonic() - started, 1), stopped)


def _copy(stream, path: Path) -> None:
    with path.open("w") as log:
        for line in stream:
            print(line, end="", flush=True)
            log.write(line)


def _end(process: subprocess.Popen) -> None:
    """Ask the process to finish as Ctrl-C does, then end whatever is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def count_tests(path: Path) -> dict[str, int]:
    """Passed, failed, errors and skipped in a JUnit report; empty where there is none."""
    try:
        suites = ElementTree.parse(path).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    rest = {name: total[name] for name in ("failures", "errors", "skipped")}
    return {"passed": total["tests"] - sum(rest.values()), **rest}


def _count_rows(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob("*.jsonl"))


def _summary_line(stage: Stage, outcome: Outcome, passed: bool, details: str) -> str:
    verdict = "ok" if passed else f"FAILED (exit status {outcome.status})"
    if outcome.stopped:
        verdict += ", stopped at its time budget"
    return f"{stage.name:<24} {outcome.seconds:>6.1f} s  {verdict}; {details}"


if __name__ == "__main__":
    sys.exit(main())
