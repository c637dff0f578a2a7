"""Processes that run cases, all kinds of which this module imports."""

import dataclasses
import multiprocessing
import signal
import time
import warnings
from multiprocessing.connection import Connection

import torch

from tests.interpreter import faster_interpreter
from tests.soak import (  # noqa: F401
    arguments,
    attention,
    buffers,
    drop_ins,
    fast_weights,
    layers,
    plans,
)
from tests.soak.draw import fault_of

Case = tuple[str, int]  # kind and seed


@dataclasses.dataclass
class Worker:
    """A process that runs one case after the other."""

    process: multiprocessing.Process
    connection: Connection
    case: Case | None = None

    @classmethod
    def start(cls) -> "Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, case: Case) -> None:
        self.case = case
        self.connection.send(case)

    def result(self) -> tuple[float, str | None] | None:
        """Seconds and fault of its case, None if it has ended instead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return None


def work(connection: Connection) -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who counts
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with faster_interpreter():
        while True:
            name, seed = connection.recv()
            start = time.perf_counter()
            fault, _ = fault_of(name, seed)
            connection.send((time.perf_counter() - start, fault))
