"""Processes that run functions of the tests as the ranks of a gloo group.

The processes are started once for many tests, as forks of one that has imported torch: that takes seconds. A
function must be at the top of its module; it is called on every rank with the same arguments, and checks its
own results:

    def equals_one_process(size):
        mesh = mesh_of(size)
        ...
        assert ...

    def test_it(ranks):
        ranks.run(equals_one_process, 2)
"""

import collections
import contextlib
import datetime
import faulthandler
import functools
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.launcher import LaunchConfig, elastic_launch

from tests.interpreter import faster_interpreter

# Seconds. They end what hangs, and decide nothing else: a machine that is busy must not fail a test.
TIMEOUT = 300  # that a rank waits for another, in the group itself
PATIENCE = 600  # that a test waits for its ranks
GRACE = 30  # that it waits for the others behind the first error: they may wait for that rank


def warm_processes() -> Any:
    """The `multiprocessing` whose processes begin with the imports done.

    They are forks of one that has done nothing else: it has no threads, and no autograd has run in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.ranks",
            "torch._decomp",
            "torch._inductor.compile_fx",
            "lact_kernels.distributed",
            "lact_kernels.compat.transformers",
            "lact_kernels.asr.training",
        ]
    )
    return context


class RankError(AssertionError):
    """What the ranks raised: `errors` has the text of each, None where there was none."""

    def __init__(self, errors: list[str | None]):
        self.errors = errors
        super().__init__("\n".join(f"rank {r}: {e}" for r, e in enumerate(errors) if e))


class Ranks:
    """`size` processes in one gloo group, which the first function starts, and which then wait for more."""

    def __init__(self, size: int):
        self.size, self._processes = size, {}  # by the pipes to them, in the order of ranks

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = warm_processes()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, rank, self.size, f"{self._folder.name}/store"),
                daemon=True,
            )
            process.start()
            there.close()
            self._processes[here] = process

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What `function(*args)` returns on each rank; `RankError` if it raises on one, or if one dies."""
        if not self._processes:
            self._start()
        for pipe in self._processes:
            pipe.send((function, args))
        answers, end = {}, time.monotonic() + PATIENCE
        while waiting := [pipe for pipe in self._processes if pipe not in answers]:
            ready = connection.wait(waiting, max(0, end - time.monotonic()))
            for pipe in ready:
                answers[pipe] = _received(pipe, self._processes[pipe])
                if answers[pipe][1]:
                    end = min(end, time.monotonic() + GRACE)
            if not ready:
                answers |= dict.fromkeys(waiting, (None, "no answer in time"))
        results, errors = zip(*(answers[pipe] for pipe in self._processes), strict=True)
        if any(errors):
            self.close()  # a group in which a rank has failed is of no use any more
            raise RankError(list(errors))
        return list(results)

    def close(self) -> None:
        """End the processes. Another function starts new ones."""
        if self._processes:
            for process in self._processes.values():
                process.kill()
            for pipe, process in self._processes.items():
                process.join()
                pipe.close()
            self._processes = {}
            self._folder.cleanup()


def _received(pipe, process) -> tuple[Any, str | None]:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join(GRACE)
        return None, f"died: exit code {process.exitcode}"


def _serve(pipe, rank: int, size: int, store: str) -> None:
    faulthandler.enable()  # a crash says on stderr where it was
    torch.set_num_threads(1)
    # A group has threads that poll for ever: hundreds of tests must not make one each for the same mesh.
    device_mesh.init_device_mesh = functools.cache(device_mesh.init_device_mesh)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    with faster_interpreter():
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:
                return
            torch.manual_seed(0)
            try:
                pipe.send((function(*args), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


def mesh_of(size: int) -> DeviceMesh:
    """The mesh of `size` ranks that this rank is in; all ranks make theirs at once."""
    shape = (dist.get_world_size() // size, size)
    names = ("data", "sequence")
    return device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)["sequence"]


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter]:
    """Elements that this rank gives to each kind of communication, their bytes, and calls.

    Those for the rank itself do not count. Objects count once each, as their size is not fixed.
    """
    counts = collections.Counter()

    def count(name: str, x: torch.Tensor, elements: int) -> None:
        if elements:
            counts[name] += elements
            counts[f"{name} bytes"] += elements * x.element_size()

    def all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op):
        mine = input_split_sizes[dist.get_rank(group)]
        count("all_to_all_single", input, sum(input_split_sizes) - mine)
        return before["all_to_all_single"](
            output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op
        )

    def all_gather_object(*args, **kwargs):
        counts["all_gather_object"] += 1
        return before["all_gather_object"](*args, **kwargs)

    def of_tensor(name):
        def call(x, *args, **kwargs):
            counts[f"{name} calls"] += 1
            count(name, x, x.numel())
            return before[name](x, *args, **kwargs)

        return call

    fakes = {"all_to_all_single": all_to_all_single, "all_gather_object": all_gather_object}
    fakes |= {name: of_tensor(name) for name in ("all_reduce", "isend", "broadcast", "reduce")}
    before = {name: getattr(dist, name) for name in fakes}
    for name, fake in fakes.items():
        setattr(dist, name, fake)
    try:
        yield counts
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


@pytest.fixture(scope="session")
def ranks():
    """Four ranks, for all tests of one worker: mark their modules `xdist_group("ranks")`."""
    four = Ranks(4)
    yield four
    four.close()


@pytest.fixture(scope="session")
def two_ranks():
    """Two ranks, for what is slow: of four, the two others would do the same."""
    two = Ranks(2)
    yield two
    two.close()


def torchrun(size: int, function: Callable, *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of the processes that torchrun starts.

    They are found by torchrun's environment variables, but begin with the imports done. Raises
    `torch.distributed.elastic.multiprocessing.errors.ChildFailedError` if one fails.
    """
    warm_processes()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        signals_to_handle="",  # this process keeps its own
    )
    answers = elastic_launch(config, function)(*args)
    return [answers[rank] for rank in range(size)]
