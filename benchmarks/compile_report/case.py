"""`CompileCase`: one kernel, as it ships in a row of the table, and how to compile it without a GPU."""

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lact_kernels.triton import configs
from lact_kernels.triton.configs import ALL, DESCRIBED, SMALL, Config, KernelConfig, TTTConfig

FLOAT32_COMPILED_FOR = 80  # whose rows for float32 are everybody's


@dataclass(frozen=True)
class CompileCase:
    """One shipped specialisation of one kernel, as a report needs it to compile it without a GPU.

    `pointers` gives the element dtype of each pointer argument, a tuple of them for a tuple of pointers,
    or the type of a descriptor, and `constexprs` the compile-time arguments. Arguments in neither are
    float32 where the name ends in `scale`, `factor` or `bend`, tuples of integers where it ends in
    `strides`, and else integers, of 32 bits.
    """

    name: str
    kernel: Any
    arch: int
    dtype: torch.dtype
    shape: str
    config: Config
    pointers: dict[str, torch.dtype | tuple[torch.dtype, ...] | str] = field(repr=False)
    constexprs: dict[str, Any] = field(repr=False)
    also: tuple[int, ...] = ()  # architectures that take the same row
    demanding: bool = True  # False: another case has the same tiles, the same code and more


def packing_cases(case: CompileCase) -> Iterator[CompileCase]:
    """An attention kernel without and with packed sequences."""
    yield replace(case, constexprs={**case.constexprs, "cu_seqlens": None}, demanding=False)
    packed = {**case.pointers, "cu_seqlens": (torch.int32, torch.int32)}
    yield replace(case, shape=f"{case.shape} packed", pointers=packed)


def shipped_cases(
    name: str, arch: int, softcap: bool = False
) -> Iterator[tuple[torch.dtype, int, KernelConfig, dict]]:
    """The rows of pass `name` that are compiled for `arch`: dtype, head dim, row, more fields of the case."""

    def rows(dtype: torch.dtype, key: int) -> dict[int, KernelConfig]:
        names = (name, f"{name}_softcap") if softcap else (name,)
        found = (configs._TABLE.get((x, key, 8 * dtype.itemsize), {}) for x in names)
        return functools.reduce(operator.or_, found)

    for dtype, key in _compiled_for(arch):
        row, own = rows(dtype, key), rows(dtype, SMALL)
        for head_dim, config in row.items():
            padded = row.get({128: 96, 256: 192}.get(head_dim))
            also = () if head_dim in own else others(arch)
            yield dtype, head_dim, config, {"also": also, "demanding": padded != config}


def shipped_ttt_configs(name: str, arch: int) -> Iterator[tuple[torch.dtype, TTTConfig]]:
    """The rows of pass `name` of the fast-weight kernels that are compiled for `arch`, each with a dtype."""
    for dtype, key in _compiled_for(arch):
        if name.startswith("newton_schulz") and dtype == torch.bfloat16:
            dtype = torch.float16
        if (name, key, 8 * dtype.itemsize) in configs._TTT_TABLE:
            yield dtype, configs._TTT_TABLE[name, key, 8 * dtype.itemsize]


def _compiled_for(arch: int) -> list[tuple[torch.dtype, int]]:
    """Dtypes and the table's architecture of what the compile report compiles for `arch`: float32 once."""
    sixteen = SMALL if arch in (86, 89, 120) else arch
    return [
        (torch.bfloat16, sixteen),
        *([(torch.bfloat16, DESCRIBED)] if arch == 90 else []),
        *([(torch.float32, ALL)] if arch == FLOAT32_COMPILED_FOR else []),
    ]


def others(arch: int) -> tuple[int, ...]:
    """Architectures that take what is compiled for `arch`, unless they have rows of their own."""
    return (SMALL,) if arch == 80 else ()
