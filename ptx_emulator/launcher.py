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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx_emulator.compiler import Compiled, compiler_for
from ptx_emulator.errors import EmulatorError, UnsupportedInstruction
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.launch import Launch, Options
from ptx_emulator.program import Program
from ptx_emulator.reports import Report
from ptx_emulator.tensormap import NUM_BYTES, TensorMapArgument

NUM_SCRATCH_POINTERS = 2  # Triton's last parameters: memory of its own, and of its profiler
# What a launch may ask for (CUDA programming guide, "Compute Capabilities"): KiB of shared memory by
# architecture, which are also those that can be emulated; programs along each axis.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
MAX_GRID = (2**31 - 1, 65535, 65535)
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_emulating: list[int] = []  # the thread of each `emulate` in progress


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

    def run(self, kernel, *args, grid, warmup, **kwargs) -> Compiled:
        """In place of JITFunction.run."""
        started = time.perf_counter()
        for hook in kernel.pre_run_hooks:
            hook(*args, **kwargs)
        compiled, bound = compiler_for(self.arch)(kernel, args, kwargs)
        if warmup:
            return compiled
        grid = grid(bound) if callable(grid) else grid
        edited = self.edit(compiled.metadata["name"], compiled.ptx) if self.edit else compiled.ptx
        if not isinstance(edited, str):
            raise TypeError(f"edit must return the PTX to run, got {edited!r}")
        program = (_program if edited == compiled.ptx else _edited_program)(edited)
        compile_seconds = time.perf_counter() - started
        grid = _checked_grid(kernel.__name__, grid)
        arguments = _arguments(compiled, bound, math.prod(grid))
        launch = self._launch(program, arguments, grid, compiled.metadata["shared"])
        self._execute(launch, compile_seconds)
        return compiled

    def run_ptx(self, ptx: str, arguments: list, grid: tuple, shared_bytes: int = 0) -> None:
        """Run a kernel that need not be Triton's on tensors, numbers and `TensorMapArgument`s."""
        program = _program(ptx)
        grid = _checked_grid(program.kernel.name, grid)
        self._execute(self._launch(program, arguments, grid, shared_bytes), 0.0)

    def _launch(
        self, program: Program, arguments: list, grid: tuple[int, int, int], shared_bytes: int
    ) -> Launch:
        kernel, limit = program.kernel, SHARED_KIB[self.arch] * 1024
        if shared_bytes > limit:
            raise EmulatorError(
                f"{kernel.name} needs {shared_bytes} bytes of shared memory, and sm_{self.arch} has {limit}"
            )
        return _launch(program, arguments, grid, shared_bytes, self.options)

    def _execute(self, launch: Launch, compile_seconds: float) -> None:
        started = time.perf_counter()
        try:
            launch.run()
        finally:
            launch.memory.write_back()
            record = LaunchRecord(
                launch.program.kernel.name,
                self.arch,
                launch.grid,
                launch.program.kernel.num_threads // 32,
                launch.shared_bytes,
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
    run. Blocks may be nested, and of several threads one at a time may be in them. Needs a process in which
    the interpreter has not replaced the compiler.
    """
    if arch not in SHARED_KIB:
        raise ValueError(f"arch must be one of {', '.join(map(str, SHARED_KIB))}, got {arch}")
    if _emulating and _emulating[-1] != threading.get_ident():
        raise RuntimeError("another thread emulates: one at a time may")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so there is no compiled code to emulate: start the process without"
            " it (Triton reads it when a kernel is defined)"
        )
    emulation = Emulation(arch, options or Options(), edit)

    def run(kernel, *args, grid, warmup, **kwargs):
        return emulation.run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    _emulating.append(threading.get_ident())
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        try:
            yield emulation
        except BaseException as error:
            if emulation.reports and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"The emulator reports:\n{Reported(emulation.reports)}")
            raise
        finally:
            _emulating.pop()
    if check and emulation.reports:
        raise Reported(emulation.reports)


_program = functools.lru_cache(maxsize=256)(Program)
# Of hundreds of broken kernels each is likely run by the next launches only, or never again.
_edited_program = functools.lru_cache(maxsize=1)(Program)


def _arguments(compiled: Compiled, bound: dict, num_programs: int) -> list:
    """What Triton's launcher passes for these arguments by name."""
    arguments = []
    descriptors = iter(compiled.metadata.get("tensordesc_meta") or ())
    for name, value in bound.items():
        if isinstance(value, (TensorDescriptor, GluonTensorDescriptor)):
            meta = next(descriptors)
            if value.padding != "zero" or meta["fp4_padded"]:
                raise UnsupportedInstruction("tensor descriptors padded with anything but zeros")
            arguments += [
                TensorMapArgument(
                    value.base,
                    tuple(value.shape),
                    tuple(value.strides),
                    tuple(meta["block_size"]),
                    meta["elem_type"],
                    meta["swizzle"],
                ),
                *value.shape,
                *value.strides,
            ]
        else:
            arguments += _converted(value, compiled.signature[name])
    size = compiled.metadata.get("global_scratch_size") or 0
    arguments.append(torch.empty(size * num_programs, dtype=torch.uint8))
    return arguments + [0] * (NUM_SCRATCH_POINTERS - 1)


def _converted(value, type: str | tuple) -> list:
    """The parameters of an argument, as they are declared: a number for a float is none of its bits.

    A tuple has a parameter for each element, and what is known to the compiler has none.
    """
    if isinstance(type, tuple):
        return [x for element in zip(value, type, strict=True) for x in _converted(*element)]
    if type == "constexpr":
        return []
    if isinstance(value, TensorWrapper):  # of triton.reinterpret
        return [value.base]
    if isinstance(value, torch.Tensor) or value is None:
        return [value]
    if type in _FLOATS:
        return [int(torch.tensor(float(value), dtype=_FLOATS[type]).view(torch.int16)) & 0xFFFF]
    if type == "fp64":
        return [int(torch.tensor(float(value), dtype=torch.float64).view(torch.int64))]
    return [float(value) if type == "fp32" else int(value)]


def _checked_grid(name: str, grid) -> tuple[int, int, int]:
    if not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
        raise EmulatorError(f"{name}: a grid has one to three numbers, got {grid!r}")
    grid = (*map(int, grid), 1, 1)[:3]
    if any(not 0 <= n <= most for n, most in zip(grid, MAX_GRID)):
        raise EmulatorError(f"{name}: a grid is at most {MAX_GRID}, got {grid}")
    return grid


def _launch(
    program: Program, arguments: list, grid: tuple, shared_bytes: int, options: Options
) -> Launch:
    """Global memory with the tensors among the arguments, and the values of the parameters."""
    kernel = program.kernel
    if len(kernel.parameters) != len(arguments):
        raise EmulatorError(
            f"{kernel.name} has {len(kernel.parameters)} parameters and got {len(arguments)} arguments"
        )
    maps = {i: x for i, x in enumerate(arguments) if isinstance(x, TensorMapArgument)}
    values = [
        torch.empty(NUM_BYTES, dtype=torch.uint8) if i in maps else x
        for i, x in enumerate(arguments)
    ]
    tensors = [x for x in values if isinstance(x, torch.Tensor)] + [x.base for x in maps.values()]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise EmulatorError(f"{kernel.name}: needs CPU tensors, got one on {tensor.device}")
    memory = GlobalMemory(tensors, program.global_unit)
    for place, tensor_map in maps.items():
        memory.fill(values[place], tensor_map.encode(memory.address(tensor_map.base)))
    parameters = {
        parameter.name: memory.address(x) if isinstance(x, torch.Tensor) else x
        for parameter, x in zip(kernel.parameters, values)
    }
    return Launch(program, memory, parameters, grid, shared_bytes, options)
