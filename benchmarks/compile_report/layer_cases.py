"""The elementwise kernels of a layer, at the sizes of some models."""

from collections.abc import Iterator

import torch

from benchmarks.compile_report.case import FLOAT32_COMPILED_FOR, CompileCase, others
from lact_kernels.triton.configs import ARCHITECTURES, kernel_of, row_config
from lact_kernels.triton.layer import rms_norm_scale_add, silu_l2norm_rope

# D and Df of models: the padded tiles that have most to mask, the widest, and those of float32.
COMPILED = ((torch.bfloat16, 80, 160), (torch.bfloat16, 64, 384), (torch.float32, 64, 192))


def compile_cases(arch: int) -> Iterator[CompileCase]:
    yield from _silu_l2norm_rope(arch)
    yield from _rms_norm_scale_add(arch)


def _silu_l2norm_rope(arch: int) -> Iterator[CompileCase]:
    floats = ("scale_ptr", "offset_ptr", "cos_ptr", "sin_ptr", "dscale_ptr", "doffset_ptr")
    passes = {
        "silu_l2norm_rope_fwd": silu_l2norm_rope.FWD_KERNELS,
        "silu_l2norm_rope_bwd": silu_l2norm_rope.BWD_KERNELS,
    }
    for name, kernels in passes.items():
        for dtype, head_dim, fast_dim in _sizes(arch):
            config = row_config(name, fast_dim // 2, dtype)
            kernel = kernel_of(kernels, config)
            names = [x for x in kernel.arg_names if x.endswith("_ptr")]
            yield CompileCase(
                name=name,
                kernel=kernel,
                arch=arch,
                dtype=dtype,
                shape=f"D{head_dim} Df{fast_dim}",
                config=config,
                pointers={x: torch.float32 if x in floats else dtype for x in names},
                constexprs=silu_l2norm_rope.constexprs(head_dim, fast_dim, True, True, config),
                also=others(arch),
            )


def _rms_norm_scale_add(arch: int) -> Iterator[CompileCase]:
    floats = ("weight_ptr", "dweight_ptr")
    passes = {
        "rms_norm_scale_add_fwd": rms_norm_scale_add.FWD_KERNELS,
        "rms_norm_scale_add_bwd": rms_norm_scale_add.BWD_KERNELS,
    }
    for name, kernels in passes.items():
        for dtype, _, fast_dim in _sizes(arch):
            config = row_config(name, fast_dim, dtype)
            kernel = kernel_of(kernels, config)
            names = [x for x in kernel.arg_names if x.endswith("_ptr")]
            yield CompileCase(
                name=name,
                kernel=kernel,
                arch=arch,
                dtype=dtype,
                shape=f"Df{fast_dim}",
                config=config,
                pointers={x: torch.float32 if x in floats else dtype for x in names},
                constexprs=rms_norm_scale_add.constexprs(fast_dim, 1e-5, config),
                also=others(arch),
            )


def _sizes(arch: int) -> Iterator[tuple[torch.dtype, int, int]]:
    """Those of COMPILED that are compiled for `arch`: float32 once."""
    for dtype, *dims in COMPILED:
        if arch in ARCHITECTURES and (dtype != torch.float32 or arch == FLOAT32_COMPILED_FOR):
            yield dtype, *dims
