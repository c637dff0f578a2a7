"""Run Triton kernels on CPU tensors as they would be compiled for a GPU.

```
with emulate(90) as emulation:
    kernel[grid](x, y, n, BLOCK=128)      # any launch, also those inside of operations
print(emulation.launches[0].counts)
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx_emulator import tensormap
from ptx_emulator.compiler import Compiled, compiler_for
from ptx_emulator.errors import EmulatorError
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.machine import Launch, Options
from ptx_emulator.program import Program
from ptx_emulator.reports import Report

NUM_SCRATCH_POINTERS = 2  # Triton's last parameters: memory of its own, and of its profiler


class Reported(EmulatorError):
    """Kernels came to their ends, but did what they may not: `reports` has what."""

    def __init__(self, reports: list[Report]):
        self.reports = reports
        super().__init__("\n".join(map(str, reports)))


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """One launch: what was run, what it executed, what it did wrong, and how long that took here."""

    kernel: str
    arch: int
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    counts: Counter[str]  # see counts.py
    reports: list[Report]
    seconds: float  # of the emulation, which says nothing of a GPU
    compile_seconds: float


@dataclasses.dataclass
class Emulation:
    """All launches since `emulate` began."""

    arch: int
    options: Options
    edit: Callable[[str, str], str] | None
    launches: list[LaunchRecord] = dataclasses.field(default_factory=list)

    @property
    def reports(self) -> list[Report]:
        return [report for launch in self.launches for report in launch.reports]

    def run(self, kernel, *args, grid, warmup, **kwargs) -> None:
        """In place of JITFunction.run."""
        started = time.perf_counter()
        for hook in kernel.pre_run_hooks:
            hook(*args, **kwargs)
        compiled, bound = compiler_for(self.arch)(kernel, args, kwargs)
        if warmup:
            return
        grid = grid(bound) if callable(grid) else grid
        grid = (*map(int, grid), 1, 1)[:3]
        ptx = compiled.ptx
        if self.edit:
            ptx = self.edit(compiled.metadata["name"], ptx)
        program = _program(ptx)
        compile_seconds = time.perf_counter() - started
        launch = _prepare(program, compiled, bound, grid, self.options)
        started = time.perf_counter()
        try:
            launch.run()
        finally:
            launch.memory.write_back()
            record = LaunchRecord(
                compiled.metadata["name"],
                self.arch,
                grid,
                program.kernel.num_threads // 32,
                compiled.metadata["shared"],
                launch.counts,
                list(launch.reports.values()),
                time.perf_counter() - started,
                compile_seconds,
            )
            self.launches.append(record)


@contextlib.contextmanager
def emulate(
    arch: int,
    *,
    check: bool = True,
    options: Options | None = None,
    edit: Callable[[str, str], str] | None = None,
) -> Iterator[Emulation]:
    """Inside, every launch of a Triton kernel is compiled for `sm_<arch>` and emulated.

    At the end `Reported` is raised if a launch did what it may not, unless `check` is False; other
    errors are raised at once, as subclasses of `EmulatorError`. `edit(name, ptx)` may return other PTX to
    run. Needs a process in which the interpreter has not replaced the compiler.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so there is no compiled code to emulate: start the process without"
            " it (Triton reads it when a kernel is defined)"
        )
    emulation = Emulation(arch, options or Options(), edit)

    def run(kernel, *args, grid, warmup, **kwargs):
        return emulation.run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        yield emulation
    if check and emulation.reports:
        raise Reported(emulation.reports)


@functools.lru_cache(maxsize=256)
def _program(ptx: str) -> Program:
    return Program(ptx)


def _prepare(
    program: Program, compiled: Compiled, bound: dict, grid: tuple, options: Options
) -> Launch:
    """Global memory with the tensors among the arguments, and the values of the parameters."""
    values, tensor_maps = [], []
    descriptors = iter(compiled.metadata.get("tensordesc_meta") or ())
    for name, value in bound.items():
        if isinstance(value, TensorDescriptor):
            tensor_map = torch.empty(tensormap.NUM_BYTES, dtype=torch.uint8)
            tensor_maps.append((tensor_map, value, next(descriptors)))
            values += [tensor_map, *value.shape, *value.strides]
        elif compiled.signature[name] != "constexpr":
            values.append(value)
    size = compiled.metadata.get("global_scratch_size") or 0
    values.append(torch.empty(size * math.prod(grid), dtype=torch.uint8))
    values += [0] * (NUM_SCRATCH_POINTERS - 1)
    names = [parameter.name for parameter in program.kernel.parameters]
    if len(names) != len(values):
        raise EmulatorError(
            f"{program.kernel.name} has {len(names)} parameters for {len(values)} arguments: this"
            " version of Triton passes them in another way"
        )
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    tensors += [descriptor.base for _, descriptor, _ in tensor_maps]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise EmulatorError(f"the emulator runs on CPU tensors, and got one on {tensor.device}")
    memory = GlobalMemory(tensors)
    for tensor_map, descriptor, meta in tensor_maps:
        memory.fill(tensor_map, _encode(descriptor, meta, memory))
    parameters = {
        name: memory.address(v) if isinstance(v, torch.Tensor) else v
        for name, v in zip(names, values)
    }
    return Launch(program, memory, parameters, grid, compiled.metadata["shared"], options)


def _encode(descriptor: TensorDescriptor, meta: dict, memory: GlobalMemory):
    if descriptor.padding != "zero" or meta["fp4_padded"]:
        raise EmulatorError("tensor descriptors with a padding other than zeros are not emulated")
    base = descriptor.base
    return tensormap.encode(
        memory.address(base),
        [*reversed(descriptor.shape)],
        [stride * base.element_size() for stride in reversed(descriptor.strides[:-1])],
        [*reversed(meta["block_size"])],
        meta["elem_type"],
        meta["swizzle"],
    )
