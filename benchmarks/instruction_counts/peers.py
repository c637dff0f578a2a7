"""What others make of the same inputs, as far as it is Triton's and can be compiled without a GPU.

Autotuning needs a GPU, so none is done. flash-linear-attention chooses the blocks of its attention by the
size of shared memory, and Inductor those of FlexAttention by head dim, dtype and compute capability; of the
configurations that the LaCT authors' kernels are tuned among, each takes the largest tile that fits into
shared memory and spills no registers, as one that spills would not be the fastest.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from benchmarks.compile_report.architectures import ARCHITECTURES
from benchmarks.instruction_counts.points import Work
from benchmarks.peers import Unavailable, variants
from benchmarks.registry import BlockCausalTTT, WindowAttn
from ptx_emulator.compiler import compiler_for

OURS = "lact_kernels"
HOW_TO_GET_FLA = "pip install --no-deps fla-core==0.6.0 einops"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`build(work, arch)` returns a function of the work's inputs, which runs inside of `setting(arch)`."""

    name: str
    build: Callable[[Work, int], Callable[..., Tensor]]
    setting: Callable[[int], AbstractContextManager] = lambda arch: contextlib.nullcontext()
    note: str = ""  # how it was set up


def implementations(work: Work, lact_checkout: Path | None = None) -> list[Implementation]:
    """Ours first. The LaCT authors' kernels only from a checkout of their repository."""
    ours = Implementation(OURS, lambda work, arch: work.ours)
    fla = Implementation(
        "FLA parallel_attn",
        _fla,
        _fla_setting,
        "blocks and warps as it chooses them itself, by the architecture's shared memory",
    )
    flex = Implementation(
        "FlexAttention",
        _flex,
        _flex_setting,
        f"templates of torch {torch.__version__}, configured as Inductor does without autotuning",
    )
    lact = Implementation(
        "LaCT authors' fused kernels",
        functools.partial(_lact, lact_checkout),
        _lact_setting,
        "without torch.compile; of the configurations to tune among the largest that fits and does not spill",
    )
    if work.op == BlockCausalTTT.op and lact_checkout:
        return [ours, lact]
    return [ours, fla, flex] if work.op == WindowAttn.op else [ours]


def _fla_module():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no GPU
            return importlib.import_module("fla.ops.attn.parallel")
    except ImportError as error:
        raise Unavailable(f"{error}; {HOW_TO_GET_FLA}") from None


def _fla(work: Work, arch: int) -> Callable[..., Tensor]:
    parallel_attn, window_size = _fla_module().parallel_attn, work.point.window_size

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_attn(q, k, v, window_size=window_size)

    return run


@contextlib.contextmanager
def _fla_setting(arch: int) -> Iterator[None]:
    """It asks a device whether it has as much shared memory as an architecture of some name."""
    least = {"ampere": 80, "hopper": 90}
    with mock.patch.object(
        _fla_module(), "check_shared_mem", lambda name="none", index=0: arch >= least.get(name, 0)
    ):
        yield


def _flex_module():
    with _inductor_may_differ():
        return importlib.import_module("benchmarks.instruction_counts.flex_attention")


@contextlib.contextmanager
def _inductor_may_differ() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        version = torch.__version__
        raise Unavailable(f"written for torch 2.11 to 2.14, not {version}: {error}") from None


def _flex(work: Work, arch: int) -> Callable[..., Tensor]:
    return _flex_module().windowed_flex_attention(work.point.T, work.point.window_size)


@contextlib.contextmanager
def _flex_setting(arch: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with _inductor_may_differ():
            stack.enter_context(_flex_module().device(arch))
        yield


def _lact(checkout: Path, work: Work, arch: int) -> Callable[..., Tensor]:
    point = work.point
    authors = variants(point.op, torch.device("cuda"), checkout)[-1]
    function, layout = authors.build(point, "fwd_bwd"), authors.layout

    def run(**inputs: Tensor) -> Tensor:
        inputs = {name: layout.theirs(point, name, x) for name, x in inputs.items()}
        return layout.ours(point, "o", function(**inputs))

    return run


@contextlib.contextmanager
def _lact_setting(arch: int) -> Iterator[dict[str, list[str]]]:
    """Gives the configurations that have been chosen for each kernel so far."""
    from triton.runtime.autotuner import Autotuner

    chosen: dict[str, list[str]] = {}

    def run(self, *args, **kwargs):
        config, spilled = _largest(self, arch, args, kwargs)
        sizes = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        text = ", ".join(f"{name}={x}" for name, x in sizes.items())
        text += f" (spills {spilled} bytes)" if spilled else ""
        texts = chosen.setdefault(self.base_fn.__name__, [])
        if text not in texts:
            texts.append(text)
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    with mock.patch.object(Autotuner, "run", run), torch.compiler.set_stance("force_eager"):
        yield chosen


def _largest(autotuner, arch: int, args, kwargs) -> tuple[Any, int]:
    """The configuration with the largest tile that fits and spills nothing, or the least; and how much."""

    def size(config) -> tuple[int, int, int]:
        return math.prod(config.kwargs.values()), config.num_warps, config.num_stages

    least = None
    for config in sorted(autotuner.configs, key=size, reverse=True):
        options = {**kwargs, **config.all_kwargs()}
        given = {name: x for name, x in options.items() if name not in ("grid", "warmup")}
        compiled, _ = compiler_for(arch)(autotuner.fn, args, given)
        if compiled.metadata["shared"] > ARCHITECTURES[arch].shared_per_block:
            continue
        spilled = spilled_bytes(compiled.ptx, arch)
        if least is None or spilled < least[1]:
            least = config, spilled
        if not spilled:
            break
    if least is None:
        raise Unavailable("no configuration fits into shared memory")
    return least


@functools.lru_cache(maxsize=256)
def spilled_bytes(ptx: str, arch: int) -> int:
    """What a thread stores to and loads from local memory for want of registers, as ptxas says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", result.stderr)))
