"""From a Triton kernel and its arguments to PTX, by Triton's own passes: its compiler but for ptxas."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import jit

WARP_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`signature` gives the type of each argument by name; metadata is Triton's, such as `shared`."""

    ptx: str
    signature: dict[str, str]
    metadata: dict[str, Any]

    @property
    def asm(self) -> dict[str, str]:
        """As of Triton's own compiled kernels."""
        return {"ptx": self.ptx}


class Compiler:
    """Compiles for one architecture, such as 90, as a launch would; every specialisation once."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, WARP_SIZE)
        self.backend: BaseBackend = make_backend(self.target)
        self._binders: dict[jit.JITFunction, Callable] = {}
        self._compiled: dict[tuple, Compiled] = {}

    def __call__(self, kernel: jit.JITFunction, args, kwargs) -> tuple[Compiled, dict[str, Any]]:
        """The kernel compiled for these arguments, and the arguments by name."""
        kwargs = {**kwargs, "debug": kwargs.get("debug", kernel.debug) or False}
        if kernel not in self._binders:
            self._binders[kernel] = jit.create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        bound, specialization, options = self._binders[kernel](*args, **kwargs)
        key = kernel, str(specialization), str(options)
        if key not in self._compiled:
            options, signature, constants, attributes = kernel._pack_args(
                self.backend, kwargs, bound, specialization, options
            )
            kind = GluonASTSource if kernel.is_gluon() else ASTSource
            source = kind(kernel, signature, constants, attributes)
            self._compiled[key] = self.compile(source, options)
        return self._compiled[key], bound

    def compile(self, source: ASTSource, options) -> Compiled:
        """`options` are those of `backend.parse_options`."""
        for name, made, metadata in run_stages(self.backend, source, options):
            if name == "ptx":
                return Compiled(made, source.signature, metadata)
        raise RuntimeError(f"Triton's backend for {self.target} has no stage ptx")


def run_stages(
    backend: BaseBackend, source: ASTSource, options
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The name of each of Triton's stages, what it makes, and the metadata so far.

    A stage runs when it is asked for, and may change what the one before has made.
    """
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        backend.target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    stages, metadata = {}, {}
    backend.add_stages(stages, options, source.language)
    for name, stage in stages.items():
        module = stage(module, metadata)
        yield name, module, metadata


@functools.cache
def compiler_for(arch: int) -> Compiler:
    return Compiler(arch)
