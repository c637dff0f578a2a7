"""The kernels of attention, as they ship."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks.compile_report.case import CompileCase, others, packing_cases, shipped_cases
from benchmarks.compile_report.compiling import descriptor_type
from lact_kernels.triton import configs
from lact_kernels.triton.configs import (
    ARCHITECTURES,
    HEAD_DIM_CLASSES,
    KernelConfig,
    RowConfig,
    kernel_of,
)
from lact_kernels.triton.primitives import Sizes
from lact_kernels.triton.window_attn import bwd, with_kvcache
from lact_kernels.triton.window_attn.fwd import FWD_KERNELS


def compile_cases(arch: int) -> Iterator[CompileCase]:
    yield from _fwd(arch)
    yield from _bwd(arch)
    yield from _with_kvcache(arch)


def _fwd(arch: int) -> Iterator[CompileCase]:
    """Of every row of the table: plain, and with all options."""
    for softcap in (False, True):
        for dtype, head_dim, config, more in shipped_cases("window_attn_fwd", arch, softcap):
            sizes = Sizes.of(head_dim, head_dim, config)
            pointers, absent = _inputs(dtype, config, sizes)
            case = CompileCase(
                name="window_attn_fwd",
                kernel=kernel_of(FWD_KERNELS, config),
                arch=arch,
                dtype=dtype,
                shape=f"D{head_dim}",
                config=config,
                pointers={**pointers, "o_ptr": dtype, "lse_ptr": torch.float32},
                constexprs={"SIZES": sizes, "PRECISION": config.precision, **absent},
                **more,
            )
            for variant in _option_cases(case, ("sinks_ptr",), softcap):
                yield from packing_cases(variant)


def _inputs(
    dtype: torch.dtype, config: KernelConfig, sizes: Sizes
) -> tuple[dict[str, torch.dtype | str], dict[str, None]]:
    """Types of q, k and v where a row may take them by descriptors, and what then is absent."""
    if not config.descriptors:
        return dict.fromkeys(("q_tensor", "k_tensor", "v_tensor"), dtype), {}
    rows = {"q": config.block_m, "k": config.block_n, "v": config.block_n}
    types = {f"{x}_tensor": descriptor_type(dtype, rows[x], sizes.BLOCK_D) for x in rows}
    return types, {f"{x}_strides": None for x in rows}


def _bwd(arch: int) -> Iterator[CompileCase]:
    """Of every row of the table: plain, and with all options."""
    passes = {
        "window_attn_bwd_dkv": (bwd.DKV_KERNELS, ("do_ptr", "dk_ptr", "dv_ptr")),
        "window_attn_bwd_dq": (bwd.DQ_KERNELS, ("o_ptr", "do_ptr", "dq_ptr")),
    }
    for (name, (kernels, outputs)), softcap in product(passes.items(), (False, True)):
        for dtype, head_dim, config, more in shipped_cases(name, arch, softcap):
            is_dq = name == "window_attn_bwd_dq"
            of = bwd._dq_constexprs if is_dq else bwd._dkv_constexprs
            constexprs = of(head_dim, head_dim, dtype, config)
            if is_dq:
                pointers, absent = _inputs(dtype, config, constexprs["SIZES"])
            else:
                pointers, absent = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), dtype), {}
            pointers |= dict.fromkeys(outputs, dtype)
            pointers |= dict.fromkeys(("lse_ptr", "stats_ptr"), torch.float32)
            for owned in [{"dlse_ptr": None}] if is_dq else bwd._owned(config):
                case = CompileCase(
                    name=name,
                    kernel=kernel_of(kernels, config),
                    arch=arch,
                    dtype=dtype,
                    shape=f"D{head_dim}",
                    config=config,
                    pointers=pointers,
                    constexprs=constexprs | absent | owned,
                    **more,
                )
                sinks = ("sinks_ptr", "sinks_ds_ptr") if is_dq else ()
                for variant in _option_cases(case, sinks, softcap):
                    if config.descriptors:  # dense input alone
                        yield replace(variant, constexprs=variant.constexprs | {"cu_seqlens": None})
                    else:
                        yield from packing_cases(variant)


def _option_cases(
    case: CompileCase, sinks: tuple[str, ...], softcap: bool
) -> Iterator[CompileCase]:
    """A kernel with all options, of which `sinks` are the pointers: or without a soft cap, and with none.

    A plain kernel is part of that with all options. It is looked at by itself on Hopper, where most overlaps,
    and where soft caps have rows of their own.
    """
    own_rows = (f"{case.name}_softcap", case.arch, 8 * case.dtype.itemsize) in configs._TABLE
    by_itself = case.demanding and (own_rows or case.arch == 90)
    pointers = case.pointers | dict.fromkeys(sinks, torch.float32)
    if softcap:
        yield replace(case, shape=f"{case.shape} capped", pointers=pointers)
        return
    uncapped = case.constexprs | {"bend": None}
    plain = uncapped | dict.fromkeys(("right", *sinks))
    yield replace(case, constexprs=plain, demanding=by_itself)
    shape = f"{case.shape} right"
    yield replace(case, shape=shape, pointers=pointers, constexprs=uncapped, demanding=False)


def _with_kvcache(arch: int) -> Iterator[CompileCase]:
    """Of every row of the table, without and with sinks, a soft cap and a right side of the window."""
    options = dict.fromkeys(("sinks_ptr", "sinks_strides", "bend", "right"))
    for name in ("window_attn_with_kvcache", "window_attn_with_kvcache_wide"):
        for dtype, head_dim, config, more in shipped_cases(name, arch):
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), dtype)
            pointers |= {"lse_ptr": torch.float32, "seqlens_ptr": torch.int32}
            sizes = Sizes.of(head_dim, head_dim, config)
            case = CompileCase(
                name=name,
                kernel=kernel_of(with_kvcache.KVCACHE_KERNELS, config),
                arch=arch,
                dtype=dtype,
                shape=f"D{head_dim}",
                config=config,
                pointers={**pointers, "sinks_ptr": torch.float32},
                constexprs={"SIZES": sizes},
                **more,
            )
            none = {**case.constexprs, **options}
            yield replace(case, pointers=pointers, constexprs=none, demanding=False)
            yield replace(case, shape=f"{case.shape} options")
    if arch in ARCHITECTURES:
        head_dim = HEAD_DIM_CLASSES[-1]
        floats = ("parts_ptr", "part_lse_ptr", "lse_ptr")
        yield CompileCase(
            name="window_attn_combine",
            kernel=with_kvcache._window_attn_combine_kernel,
            arch=arch,
            dtype=torch.bfloat16,
            shape=f"D{head_dim}",
            config=RowConfig(with_kvcache.MAX_SPLITS, head_dim, with_kvcache.COMBINE_WARPS),
            pointers={"o_ptr": torch.bfloat16, **dict.fromkeys(floats, torch.float32)},
            constexprs=with_kvcache._combine_constexprs(head_dim),
            also=others(arch),
        )
