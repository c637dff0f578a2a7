"""Draw small cases of every kind for as long as you like, and say which are wrong.

    python -m tests.soak                       # for one minute, on two processes
    python -m tests.soak --minutes 10 --seed 3
    python -m tests.soak --only ttt_state:3000017

A run draws the same cases for the same seed, and a case is the same alone. Kernels run in Triton's
interpreter. The exit status is 1 if any case was wrong; Ctrl-C ends a run early, with its summary.
"""

import argparse
import collections
import itertools
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait

import torch

from tests.interpreter import faster_interpreter
from tests.soak.draw import KINDS, fault_of
from tests.soak.workers import Case, Worker


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel, here and in processes to come
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.only:
        return run_one(*options.only)
    tally = Tally()
    try:
        run(options, tally)
    except KeyboardInterrupt:
        print("\ninterrupted")
    print(tally.summary())
    return 1 if tally.wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.splitlines()[0])
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--minutes", type=float, default=1.0, metavar="M", help="1 by default")
    until.add_argument("--cases", type=int, metavar="N", help="as many, however long it takes")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="P")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--only", type=case_of, metavar="KIND:SEED", help="this case, in full")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


def case_of(text: str) -> Case:
    name, _, seed = text.partition(":")
    if name not in KINDS or not seed.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no KIND:SEED; kinds are {', '.join(KINDS)}")
    return name, int(seed)


def cases(seed: int, kinds: list[str]) -> Iterator[Case]:
    """Without end."""
    draw = random.Random(seed)
    often = [KINDS[name][1] for name in kinds]
    for n in itertools.count(1_000_000 * seed):
        yield draw.choices(kinds, often)[0], n


def run_one(name: str, seed: int) -> int:
    """The case in this process, so that a debugger gets to it."""
    torch.set_num_threads(1)
    with faster_interpreter():
        fault, error = fault_of(name, seed)
    if error is not None:
        traceback.print_exception(error)
    print(f"{name}:{seed} is {'right' if fault is None else 'wrong: ' + fault}")
    return 0 if fault is None else 1


def run(options: argparse.Namespace, tally: "Tally") -> None:
    """Until the time is over, or the number of cases reached."""
    queue = cases(options.seed, options.kinds)
    if options.cases is not None:
        queue = itertools.islice(queue, options.cases)
    workers = [Worker.start() for _ in range(options.processes)]
    deadline = time.monotonic() + 60 * options.minutes if options.cases is None else None

    def next_case() -> Case | None:
        over = deadline is not None and time.monotonic() > deadline
        return None if over else next(queue, None)

    def occupy(worker: Worker) -> None:
        case = next_case()
        worker.case = None
        if case is not None:
            worker.give(case)

    try:
        for worker in workers:
            occupy(worker)
        while busy := {w.connection: n for n, w in enumerate(workers) if w.case is not None}:
            for connection in wait(list(busy), timeout=1.0):
                n = busy[connection]
                worker, result = workers[n], workers[n].result()
                if result is None:
                    result = 0.0, f"the process ended with exit code {worker.process.exitcode}"
                    workers[n] = Worker.start()
                tally.add(worker.case, *result)
                occupy(workers[n])
            tally.show_progress()
    finally:
        for worker in workers:
            worker.process.terminate()


class Tally:
    """What has been run, and what was wrong with it."""

    def __init__(self):
        self.start = self.shown = time.monotonic()
        self.cases: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.wrong: list[Case] = []

    def add(self, case: Case, seconds: float, fault: str | None) -> None:
        name, seed = case
        self.cases[name] += 1
        self.seconds[name] += seconds
        if fault is not None:
            self.wrong.append(case)
            print(
                f"\rWRONG  {name}:{seed}  {fault}\n       python -m tests.soak --only {name}:{seed}"
            )

    def show_progress(self) -> None:
        """On one line of a terminal, which the next one replaces; elsewhere every half a minute."""
        now, live = time.monotonic(), sys.stdout.isatty()
        if now - self.shown < (0.5 if live else 30):
            return
        self.shown = now
        total, wrong = sum(self.cases.values()), collections.Counter(name for name, _ in self.wrong)
        line = f"{now - self.start:.0f} s, {total} cases, {len(self.wrong)} wrong: " + ", ".join(
            f"{name} {n}" + (f" ({wrong[name]} wrong)" if wrong[name] else "")
            for name, n in self.cases.most_common()
        )
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}" if live else line, end="" if live else "\n", flush=True)

    def summary(self) -> str:
        wrong = collections.Counter(name for name, _ in self.wrong)
        rows = [
            f"{name:<30} {n:>6} {wrong[name] or '-':>6} {1e3 * self.seconds[name] / n:>8.0f}"
            for name, n in sorted(self.cases.items())
        ]
        total = sum(self.cases.values())
        again = [f"    python -m tests.soak --only {name}:{seed}" for name, seed in self.wrong]
        return "\n".join(
            (
                f"\n{'kind':<30} {'cases':>6} {'wrong':>6} {'ms each':>8}",
                *rows,
                f"{'all':<30} {total:>6} {len(self.wrong) or '-':>6}",
                f"in {time.monotonic() - self.start:.0f} s",
                *(["", "wrong:", *again] if again else []),
            )
        )


if __name__ == "__main__":
    sys.exit(main())
