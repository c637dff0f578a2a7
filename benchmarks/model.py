"""A whole LaCT model: with this package, and as one writes it without.

```
python -m benchmarks.model                          # 12 layers, T = 16,384; 10 to 20 minutes on a CPU
python -m benchmarks.model --seq-len 4096 --mode fwd_bwd
```

Two variants have the same blocks and the same parameters, and differ in the two functions that their LaCT
layers call: `lact_kernels`, and `dense + chunk loop`, which is `scaled_dot_product_attention` with one
boolean mask of T x T for all layers, and the per-chunk loop of the reference with autograd. PyTorch makes
the mask one of floats in every layer, and keeps that for the backward. Modes:

    fwd      the model on T tokens, without autograd
    fwd_bwd  the same, and the gradients of all parameters
    token    one more token behind a prompt of T / 8 and of T tokens, over a LaCTCache, as the median of 20
             behind each, in turns. A token that ends a chunk trains the fast weights, too; by default none
             of these does.

Correctness first: a short model of the same widths must give the same outputs and gradients, to 1e-8 in
float64, and in the dtype of the run within the rule of `benchmarks/accuracy.py`; and token by token over a
cache the outputs of one call.

Each variant has a process of its own. Its peak memory (see `benchmarks/timing.py`) is what one call takes
beyond the parameters and the input: masks, outputs and gradients are counted. A first call tells it, and is
not timed, as measuring takes time; then the variants take turns. One timed call of each is the default on a
CPU, where the dense variant takes minutes: such a time is a sample of one. One block, run first at the full
length, tells how long everything will take, and how much autograd will keep. What does not fit is not
tried: both variants are then measured at the longest T / 2^n that does, too.

Rows appear on the screen and are appended to `<out>/<device>-model.jsonl` as they are finished. Exit
status: 0, 1 when the variants disagree or ours fails for another reason than memory, 2 for bad arguments,
130 after Ctrl-C.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import phases, report, timing
from benchmarks.measure import status_of
from benchmarks.model_variants import (
    DENSE,
    OURS,
    Block,
    Model,
    Size,
    computed_by,
    gate_passes,
    window_mask,
)
from benchmarks.run import DEFAULTS, DTYPES, positive, settle_device
from lact_kernels.layers import LaCTCache

OP = "model"
NAMES = {"lact_kernels": OURS, "dense": DENSE}  # on the command line
MODES = ("fwd", "fwd_bwd", "token")
DEFAULT_ROUNDS = {"cpu": 1, "cuda": 5}
TOKENS, WARM_UP_TOKENS = 20, 3
LONG_SECONDS = 5  # of a measurement that is announced
USABLE = 0.8  # of the free memory: a call takes more than autograd keeps, and others use it, too
NO_CACHE = "unavailable: it has no cache to go on from"


@dataclasses.dataclass
class ModelRow:
    """One variant in one mode. Times in milliseconds; None where nothing was or could be measured."""

    op: str
    variant: str
    shape: dict  # with T, the length of the prompt in mode "token"
    dtype: str
    mode: str
    status: str = "ok"  # or why there are no times
    rounds: int = 0  # in mode "token", how many tokens
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_memory_bytes: int | None = None  # beyond parameters and input
    kept_bytes: int | None = None  # by autograd: that of one block times layers
    state_bytes: int | None = None  # of the cache, behind the tokens
    load_average: float | None = None  # of the last minute, before the first call

    @property
    def ours(self) -> bool:
        return self.variant == OURS


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rows_file = report.open_rows(options.out, device, options.dtype, kind=OP)
    if rows_file is None:
        return 2

    rows: list[ModelRow] = []
    threads, size = torch.get_num_threads(), _size(options)
    workers = {name: Worker(name, size, dtype, device) for name in options.variants}
    try:
        torch.set_num_threads(1)  # of this process, whose part is small
        if not gate_passes(size, dtype, device):
            print("the variants disagree, so nothing was timed", file=sys.stderr)
            return 1
        for worker in workers.values():  # all at once, as starting takes seconds
            worker.start()
        steps = _plan(options, workers)
        _print_plan(steps, options.rounds)
        print(f"\n{HEADER}", flush=True)
        for row in _measure(steps, options, workers):
            rows_file.append(row)
            rows.append(row)
            print(table_line(row), flush=True)
        status = int(
            any(row.ours and row.status != "ok" and not _does_not_fit(row) for row in rows)
        )
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    finally:
        torch.set_num_threads(threads)
        for worker in workers.values():
            worker.close()
    print(f"\n{len(rows)} rows appended to {rows_file.path}")
    _print_ratios(rows)
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seq-len", type=positive, default=16384, metavar="T")
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--hidden-size", type=positive, default=768, metavar="C")
    parser.add_argument("--heads", type=positive, default=12, help="of the attention")
    parser.add_argument("--fast-weight-heads", type=positive, default=4)
    parser.add_argument("--window-size", type=positive, default=2048, metavar="W")
    parser.add_argument("--chunk-size", type=positive, default=2048, metavar="C")
    parser.add_argument("--muon", action="store_true")
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="turns that the variants take in fwd and fwd_bwd; default: 1 on a CPU, 5 on a GPU",
    )
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    options.dtype = options.dtype or DEFAULTS[options.device].dtype
    options.rounds = options.rounds or DEFAULT_ROUNDS[options.device]
    options.variants = [NAMES[name] for name in NAMES if name in options.variants]
    options.mode = [mode for mode in MODES if mode in options.mode]
    if options.mode == ["token"] and OURS not in options.variants:
        parser.error(f"--mode token needs a cache, which {DENSE} does not have")
    try:
        with torch.device("meta"):
            Block(_size(options), 0)
    except ValueError as error:  # of the layer; heads that do not divide the channels
        parser.error(str(error))
    return options


def _size(options: argparse.Namespace) -> Size:
    return Size(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Size)})


class Bench:
    """What the process of one variant does. Its methods are called by name."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(0)
        self.model = Model(size).to(device, dtype)
        self.dtype, self.device = dtype, device
        self.caches: dict[int, LaCTCache] = {}  # by the length of the prompt

    def _tokens(self, T: int) -> Tensor:
        shape = 1, T, self.model.norm.weight.shape[0]
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _milliseconds(self, run: Callable[[], object]) -> float:
        """Of one call, from an idle device to an idle device."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        run()
        wait()
        return 1e3 * (time.perf_counter() - started)

    def block(self, T: int) -> dict:
        """One block, forward and backward: the times, and what autograd keeps of it in between."""
        x, block = self._tokens(T), self.model.layers[0]
        parameters, kept, outputs = dict(block.named_parameters()), [], []

        def forward() -> Tensor:
            outputs.append(block(x))
            return outputs[0]

        def backward() -> None:
            torch.autograd.grad(outputs.pop(), list(parameters.values()), x)

        block(x[:, : block.attn.lact_chunk_size + 1])  # so that everything is loaded and compiled
        count = functools.partial(phases.saved_bytes, forward, parameters | {"x": x})
        fwd = self._milliseconds(lambda: kept.append(count())) / 1e3
        bwd = self._milliseconds(backward) / 1e3
        self.release()
        return {"fwd": fwd, "fwd_bwd": fwd + bwd, "kept_bytes": kept[0]}

    def call(self, mode: str, T: int) -> dict:
        """The model in mode "fwd" or "fwd_bwd", once: the time."""
        return {"milliseconds": self._milliseconds(self._call(mode, T))}

    def peak(self, mode: str, T: int) -> dict:
        """Once more, with a memory allocator that gives back all it can, which takes time: the peak."""
        return {"peak_memory_bytes": timing.peak_memory(self._call(mode, T), self.device)}

    def _call(self, mode: str, T: int) -> Callable[[], object]:
        x, do, parameters = self._tokens(T), self._tokens(T), list(self.model.parameters())

        def run() -> object:
            window_mask.cache_clear()  # every call makes its own
            with torch.set_grad_enabled(mode == "fwd_bwd"):
                o = self.model(x)
                return torch.autograd.grad(o, parameters, do) if mode == "fwd_bwd" else o

        return run

    @torch.no_grad()
    def token(self, T: int) -> dict:
        """One more token behind a prompt of T, which the first call reads: its time, and the cache's size."""
        if T not in self.caches:
            self.caches[T] = LaCTCache()
            self.model(self._tokens(T), self.caches[T])
        run = functools.partial(self.model, self._tokens(1), self.caches[T])
        return {"milliseconds": self._milliseconds(run), "state_bytes": _size_of(self.caches[T])}

    def release(self) -> None:
        """Give back what the last calls left, so that it is there for the other process."""
        window_mask.cache_clear()
        self.caches.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return
        with contextlib.suppress(OSError, AttributeError):  # not every C library can
            ctypes.CDLL(None).malloc_trim(0)


def _size_of(cache: LaCTCache) -> int:
    """Bytes of all its tensors, each memory counted once."""
    layers = cache.layers.values()
    tensors = [x for layer in layers for x in tree_leaves((layer.kv.k, layer.kv.v, layer.ttt))]
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


class Worker:
    """A process that keeps a `Bench`. If it ends, the call says so, and the next one starts another."""

    def __init__(self, variant: str, *of_bench):
        self.arguments = variant, torch.get_num_threads(), *of_bench
        self.process = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, method: str, *arguments) -> dict | str:
        """What the method returns, or the status of a row if it failed."""
        if self.process is None:
            self.start()
        try:
            self.connection.send((method, arguments))
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code, self.process = self.process.exitcode, None
            if code == -signal.SIGKILL:
                return "out of memory: the system ended its process"
            return f"failed: its process ended with exit status {code}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()


def _serve(connection, variant: str, threads: int, *of_bench) -> None:
    """The process of a `Worker`: until it is ended, run what comes and send back the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent ends it
    with contextlib.suppress(OSError):  # if memory runs out, end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    with computed_by(variant):
        bench = Bench(*of_bench)
        while True:
            method, arguments = connection.recv()
            try:
                result = getattr(bench, method)(*arguments)
            except Exception as error:
                result = status_of(error)
            connection.send(result)


@dataclasses.dataclass
class Planned:
    """A row to be filled, whose status says why if it is not tried, and how long a call will take."""

    row: ModelRow
    seconds: float = 0.0


def _plan(options: argparse.Namespace, workers: dict[str, Worker]) -> list[list[Planned]]:
    """The rows of each step, which take turns. Where a backward does not fit, a shorter step is added."""
    T, size = options.seq_len, dataclasses.asdict(_size(options))

    @functools.cache
    def block(variant: str, T: int) -> dict | str:
        print(f"one block, T={T}, {variant} ...", flush=True)
        return workers[variant].run("block", T)

    def planned(variant: str, mode: str, T: int, prompt: int | None = None) -> Planned:
        shape = size | {"T": prompt or T}
        row = ModelRow(OP, variant, shape, options.dtype, mode)
        result = NO_CACHE if (mode, variant) == ("token", DENSE) else block(variant, T)
        if isinstance(result, str):
            row.status = result
            return Planned(row)
        if mode == "fwd_bwd":
            free = _free_bytes(torch.device(options.device))
            kept = row.kept_bytes = result["kept_bytes"] * options.layers
            if kept > USABLE * free:
                row.status = (
                    f"out of memory, not tried: autograd would keep {kept / 2**30:.1f} GiB"
                    f" of {free / 2**30:.1f} GiB that are free"
                )
        seconds = result["fwd_bwd" if mode == "fwd_bwd" else "fwd"] * options.layers
        return Planned(row, seconds * shape["T"] / T)

    steps = []
    for mode in options.mode:
        if mode == "token":
            prompts = dict.fromkeys((-(-T // 8), T))
            steps.append([planned(name, mode, T, prompt) for prompt in prompts for name in workers])
            continue
        steps.append([planned(name, mode, T) for name in workers])
        step, shorter = steps[-1], T
        while mode == "fwd_bwd" and shorter > 1 and any(_does_not_fit(x.row) for x in step):
            shorter //= 2
            step = [planned(name, mode, shorter) for name in workers]
            if all(x.row.status == "ok" for x in step):
                steps.append(step)
    return steps


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf


def _print_plan(steps: list[list[Planned]], rounds: int) -> None:
    calls = "one call" if rounds == 1 else f"{rounds} calls"
    print(
        f"\nplan, {calls} of each in fwd and fwd_bwd and one for memory, {TOKENS} tokens in token:"
    )
    total = 0.0
    for planned in (planned for step in steps for planned in step):
        row, note = planned.row, planned.row.status
        if note == "ok":
            note = f"about {planned.seconds:.0f} s" + (" for the prompt" * (row.mode == "token"))
            total += planned.seconds * (1 if row.mode == "token" else rounds + 1)
        print(f"  {row.mode:<7} T={row.shape['T']:<6} {row.variant:<20} {note}")
    print(f"  in all about {total / 60:.0f} minutes", flush=True)


def _measure(
    steps: list[list[Planned]], options: argparse.Namespace, workers: dict[str, Worker]
) -> Iterator[ModelRow]:
    """The rows of all steps, each as soon as it is complete."""
    for step in steps:
        yield from (planned.row for planned in step if planned.row.status != "ok")
        yield from _take_turns(step, options, workers)
        for worker in workers.values():
            worker.run("release")


def _take_turns(
    step: list[Planned], options: argparse.Namespace, workers: dict[str, Worker]
) -> Iterator[ModelRow]:
    """Fill the rows that can be, all of them in each round. The first rounds warm up, and tell memory."""
    token = step[0].row.mode == "token"
    rounds = TOKENS if token else options.rounds
    warm_ups = WARM_UP_TOKENS if token else 1
    times: list[list[float]] = [[] for _ in step]
    for turn in range(-warm_ups, rounds):
        for planned, milliseconds in zip(step, times):
            row = planned.row
            if row.status != "ok":
                continue
            mode, T = row.mode, row.shape["T"]
            first = turn == -warm_ups  # which reads the prompt, too
            if planned.seconds > LONG_SECONDS and (first or not token):
                note = f"about {planned.seconds:.0f} s"
                print(f"{mode} T={T}, {row.variant}: {note} ...", flush=True)
            if first:
                row.load_average = os.getloadavg()[0]
            work = ("token", T) if token else ("peak" if first else "call", mode, T)
            result = workers[row.variant].run(*work)
            if isinstance(result, str):
                row.status = result
                yield row
            elif turn < 0:
                row.peak_memory_bytes = result.get("peak_memory_bytes")
            else:
                milliseconds.append(result["milliseconds"])
                row.state_bytes = result.get("state_bytes")
                if turn == rounds - 1:
                    row.rounds = rounds
                    row.p20_ms, row.p50_ms, row.p80_ms = timing.percentiles(milliseconds)
                    yield row


HEADER = (
    f"{'T':>7} {'mode':<7} {'variant':<20} {'p20 ms':>10} {'p50 ms':>10} {'p80 ms':>10}"
    f" {'peak MiB':>9} {'kept MiB':>9} {'cache MiB':>9} {'load':>5}  status"
)


def table_line(row: ModelRow) -> str:
    """Under HEADER."""
    cells = [
        *((x, 10) for x in (row.p20_ms, row.p50_ms, row.p80_ms)),
        *((x and x / 2**20, 9) for x in (row.peak_memory_bytes, row.kept_bytes, row.state_bytes)),
        (row.load_average, 5),
    ]
    numbers = " ".join(f"{'-' if x is None else f'{x:.1f}':>{width}}" for x, width in cells)
    return f"{row.shape['T']:>7} {row.mode:<7} {row.variant:<20} {numbers}  {row.status}"


def _does_not_fit(row: ModelRow) -> bool:
    return row.status.startswith("out of memory")


def _print_ratios(rows: list[ModelRow]) -> None:
    """Of the variants at each point where both ran, and of a token at one position and at the other."""
    done = {(row.variant, row.mode, row.shape["T"]): row for row in rows if row.status == "ok"}
    for (variant, mode, T), dense in done.items():
        ours = done.get((OURS, mode, T))
        if variant == DENSE and ours is not None:
            memory = ""
            if ours.peak_memory_bytes and dense.peak_memory_bytes:
                ratio = dense.peak_memory_bytes / ours.peak_memory_bytes
                memory = f" and {ratio:.2f} x the memory"
            ratio = dense.p50_ms / ours.p50_ms
            print(f"{mode} T={T}: {DENSE} takes {ratio:.2f} x the time{memory} of {OURS}")
    tokens = [row for row in done.values() if row.mode == "token"]
    for first, last in zip(tokens, tokens[1:]):
        print(
            f"a token behind {last.shape['T']} takes {last.p50_ms / first.p50_ms:.2f} x the time of one"
            f" behind {first.shape['T']}"
        )


if __name__ == "__main__":
    sys.exit(main())
