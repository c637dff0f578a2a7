"""From a kernel and its compile-time arguments to machine code, by Triton's own stages, without a GPU."""

import contextlib
import dataclasses
import io
import re

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from benchmarks.compile_report.case import CompileCase
from ptx_emulator.compiler import WARP_SIZE, run_stages

_POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
# Tuples of strides, by the end of the name: of batch row and token, of the head as well, and of batch row and
# head of three weights.
_STRIDES = {"_token_strides": 2, "weight_strides": 6, "given_strides": 6, "_strides": 3}
# Of ptxas, which has a number for each thing that it does not like: (C7515) Potential Performance Loss: ...
_WARNING = re.compile(r"^.*(?:warning|Potential Performance Loss).*$", re.IGNORECASE | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Source:
    """A case as Triton takes it."""

    ast: ASTSource
    target: GPUTarget
    options: dict[str, int | None]

    @classmethod
    def of(cls, case: CompileCase) -> "Source":
        signature, attributes = _signature(case)
        return cls(
            ASTSource(case.kernel, signature, case.constexprs, attributes),
            GPUTarget("cuda", case.arch, WARP_SIZE),
            {
                "num_warps": case.config.num_warps,
                "num_stages": case.config.num_stages,
                "maxnreg": getattr(case.config, "registers", None),
            },
        )

    def key(self) -> str:
        """All that decides what comes out, but for Triton itself."""
        return f"{self.ast.hash()} {self.target} {sorted(self.options.items())}"


@dataclasses.dataclass(frozen=True)
class Binary:
    """What a kernel became on its way: layouts and tiles (ttgir), PTX, machine code."""

    ttgir: str
    ptx: str
    cubin: bytes
    log: str  # of ptxas
    shared: int
    tensor_columns: int

    @property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.log)[1])

    @property
    def warnings(self) -> list[str]:
        """What ptxas warns of."""
        return [line.split(":", 1)[-1].strip() for line in _WARNING.findall(self.log)]


def compile_source(source: Source) -> Binary:
    """Compile as a launch would, and keep what ptxas says."""
    backend = make_backend(source.target)
    options = backend.parse_options(source.options)
    made, log = {}, io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        for name, module, metadata in run_stages(backend, source.ast, options):
            if name in ("ttgir", "ptx"):
                made[name] = str(module)
            elif name == "cubin":
                made["cubin"], made["shared"] = module, metadata["shared"]
                made["tensor_columns"] = metadata.get("tmem_size") or 0
    return Binary(**made, log=log.getvalue())


def descriptor_type(dtype: torch.dtype, rows: int, cols: int, pair: bool = False) -> str:
    """Triton's name for what `lact_kernels.triton.descriptors.descriptor` makes, or of the weights a pair."""
    block = [1, 1, 2, rows, cols] if pair else [1, 1, rows, cols]
    return f"tensordesc<{_POINTER_TYPES[dtype].removeprefix('*')}{block}>"


def _signature(case: CompileCase) -> tuple[dict[str, str], dict]:
    """Argument types, and which arguments are multiples of 16, as a launch would find them."""
    signature, attributes = {}, {}
    for index, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in case.constexprs:
            signature[name] = "constexpr"
            continue
        signature[name] = types = _types(name, case.pointers.get(name))
        aligned = types != "fp32" and not str(types).startswith("tensordesc")
        if aligned and not parameter.do_not_specialize:
            places = (
                [(index, i) for i in range(len(types))] if isinstance(types, tuple) else [(index,)]
            )
            attributes |= dict.fromkeys(places, [["tt.divisibility", 16]])
    return signature, attributes


def _types(
    name: str, pointers: torch.dtype | tuple[torch.dtype, ...] | str | None
) -> str | tuple[str, ...]:
    """Triton's name for the type of an argument, or those of the elements of a tuple."""
    if isinstance(pointers, str):
        return pointers
    if isinstance(pointers, tuple):
        return tuple(_POINTER_TYPES[dtype] for dtype in pointers)
    if pointers is not None:
        return _POINTER_TYPES[pointers]
    for ending, number in _STRIDES.items():
        if name.endswith(ending):
            return ("i32",) * number
    return "fp32" if name.endswith(("scale", "factor", "bend")) else "i32"
