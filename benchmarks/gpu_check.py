"""Is it right and is it fast on this GPU? In four minutes, or all of it in ten.

```
PYTHONPATH=. python3 -m benchmarks.gpu_check [--all] [--out DIR]
```

The short check runs every kernel in both 16-bit dtypes against float64, then five timings beside their
peers. `--all` runs every GPU test, then all GPU benchmarks. Both end with a summary of one screen.

DIR is $GPU_CHECK_OUT, or gpu-check-results/, unless given. Each stage stops cleanly at its time budget,
and all of them on Ctrl-C or SIGTERM. What is finished is kept: the tests' log and JUnit report, the
benchmarks' log, JSON lines and plots, and summary.json, written anew after each stage. Needs PyTorch,
Triton and pytest; matplotlib only for the plots.

Exit status: 0 when all tests passed and the benchmarks' correctness gates too, or when there is no GPU
(then nothing is checked); 1 otherwise; 2 for bad arguments; 130 after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import contextlib
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
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu_stages import Stage, Tier, complete, junit_report, short
from benchmarks.gpu_summary import stage_line, yardsticks


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    seconds: float
    stopped: bool  # at its time budget, or by a signal


class Interruption:
    """The signal that asks this program to stop, once there is one. Nothing is cut in the middle by it.

    A signal that the parent process has set to be ignored stays ignored. A handler is set for it all the
    same: stages would inherit that they ignore it, and not stop when they are asked to by SIGINT.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self._before = {x: signal.getsignal(x) for x in self.SIGNALS}
        for number, handler in self._before.items():
            ignored = handler == signal.SIG_IGN
            signal.signal(number, (lambda *_: None) if ignored else self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame) -> None:
        self.signal = number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(os.environ.get("GPU_CHECK_OUT") or "gpu-check-results")
    parser.add_argument("--all", action="store_true", help="every GPU test and benchmark")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR")
    options = parser.parse_args(arguments)

    if not torch.cuda.is_available():
        print("no GPU here (PyTorch finds no CUDA device): nothing was checked")
        return 0
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed, so the GPU tests cannot run", file=sys.stderr)
        return 1
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out, {"stopped": True, "ok": False})  # fails now rather than after the first stage
    except OSError as error:
        print(f"cannot write results to {options.out}: {error}", file=sys.stderr)
        return 2
    with Interruption() as interruption:
        environment = report.environment(torch.device("cuda"))
        report.announce(environment)
        tier = complete(out) if options.all else short(out)
        return check(tier, out, environment, interruption)


def check(tier: Tier, out: Path, environment: dict, interruption: Interruption) -> int:
    """Run the stages, write the summary after each, and print it at the end; the exit status."""
    results: dict[str, dict] = {}
    rows: list[dict] = []
    summary = environment | {"tier": tier.name, "stopped": True, "ok": False, "stages": results}
    _write(out, summary)  # of a check that was stopped, which it is until its last stage has ended
    junit_report(out).unlink(missing_ok=True)  # an earlier check's
    sound = True
    for stage in tier.stages:
        if interruption.signal or not sound:
            break
        seen = _line_counts(out)
        outcome = run_stage(stage, out, tier.grace, interruption)
        new = list(_rows_after(out, seen))
        rows += new
        if stage is tier.tests:
            counts = count_tests(junit_report(out))
            results[stage.name] = _tests_result(outcome, counts)
            # Tests that only ran out of time do not keep the benchmarks back: these check what they time.
            sound = counts.get("passed", 0) > 0 and not counts["failures"] + counts["errors"]
        else:
            results[stage.name] = _benchmark_result(stage, outcome, len(new))
        _write(out, summary)

    summary["stopped"] = interruption.signal is not None
    complete_and_ok = len(results) == len(tier.stages) and all(x["ok"] for x in results.values())
    summary["ok"] = complete_and_ok and not summary["stopped"]
    _write(out, summary)
    print("\n" + "\n".join(_screen(tier, summary, rows)) + f"\nresults in {out}")
    if interruption.signal:
        return 128 + interruption.signal
    return int(not summary["ok"])


def _tests_result(outcome: Outcome, counts: dict[str, int]) -> dict:
    ok = outcome.status == 0 and not outcome.stopped and counts.get("passed", 0) > 0
    return {"ok": ok, **dataclasses.asdict(outcome), **counts}


def _benchmark_result(stage: Stage, outcome: Outcome, num_rows: int) -> dict:
    ended_well = outcome.stopped or outcome.status == 0
    ok = ended_well and (num_rows > 0 or not stage.needs_rows)
    return {"ok": ok, **dataclasses.asdict(outcome), "rows": num_rows}


def _screen(tier: Tier, summary: dict, rows: list[dict]) -> Iterator[str]:
    """What is printed at the end."""
    results = summary["stages"]
    for stage in tier.stages:
        if stage.name in results:
            yield stage_line(stage.name, results[stage.name], stage.seconds)
    if summary["stopped"]:
        yield "GPU check stopped"
    elif len(results) < len(tier.stages):
        yield "the benchmarks were not run, because tests failed or none passed"
    yield from yardsticks(rows)
    if not summary["stopped"]:
        yield "GPU check passed" if summary["ok"] else "GPU check FAILED"


def run_stage(stage: Stage, out: Path, grace: float, interruption: Interruption) -> Outcome:
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
    stopped = True
    try:
        stopped = not _ends_by_itself(process, started + stage.seconds, interruption)
        if stopped:
            reason = "interrupted" if interruption.signal else f"its {stage.seconds:.0f} s are over"
            print(f"== {stage.name}: {reason}, stopping it", flush=True)
    finally:
        _end(process, grace)
        copier.join()
    return Outcome(process.returncode, round(time.monotonic() - started, 1), stopped)


def _copy(stream, path: Path) -> None:
    with path.open("w") as log:
        for line in stream:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()


def _ends_by_itself(process: subprocess.Popen, deadline: float, interruption: Interruption) -> bool:
    """Wait for its end; False once its time is over or a signal has come."""
    while interruption.signal is None and (left := deadline - time.monotonic()) > 0:
        try:
            process.wait(min(left, 0.2))
            return True
        except subprocess.TimeoutExpired:
            pass
    return process.poll() is not None


def _end(process: subprocess.Popen, grace: float) -> None:
    """Ask the process to finish as Ctrl-C does, then end whatever is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(grace)
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


def _line_counts(out: Path) -> dict[Path, int]:
    return {path: len(path.read_text().splitlines()) for path in out.glob("*.jsonl")}


def _rows_after(out: Path, seen: dict[Path, int]) -> Iterator[dict]:
    """What was appended to the JSON lines since they had `seen` lines."""
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines()[seen.get(path, 0) :]:
            with contextlib.suppress(json.JSONDecodeError):  # of a process that was killed in it
                yield json.loads(line)


def _write(out: Path, summary: dict) -> None:
    """Whole or not at all: a reader never finds half of it."""
    part = out / "summary.json.part"
    part.write_text(json.dumps(summary, indent=2) + "\n")
    part.replace(out / "summary.json")


if __name__ == "__main__":
    sys.exit(main())
