"""Block sizes, warps and pipeline stages of every kernel: one table, in one place.

A row is found by what decides it: the pass, the architecture, the width of the input dtype and the
class of the head dims D and Dv. Up to 64 this is 64. Beyond, tiles are 128 or 256 channels wide: the
classes 128 and 256 are head dims that fill them, 96 and 192 all those whose tiles are padded and
masked, which takes registers. A length, a batch size, a head count or a window never decides it.

This module imports neither Triton nor a GPU, so that tests and reports can read the table anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
HEAD_DIM_CLASSES = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class KernelConfig:
    """One row: `block_m` queries by `block_n` keys per tile, warps per program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False  # dk and dv in a launch each: the dk/dv pass only


@dataclass(frozen=True)
class TTTConfig:
    """A row of the fast-weight kernels: tiles of `block_m` by `block_n`, `block_k` summed at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowConfig:
    """Of a kernel over rows without matrix products: tiles of `block_m` rows by `block_n` columns."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class CompileCase:
    """One shipped specialisation of one kernel, as a report needs it to compile it without a GPU.

    `pointers` gives the element dtype of each pointer argument, `constexprs` the compile-time
    arguments. Arguments in neither are 32-bit integers, or float32 where the name ends in `scale` or
    `factor`.
    """

    name: str
    kernel: Any
    arch: int
    dtype: torch.dtype
    shape: str
    config: KernelConfig | TTTConfig | RowConfig
    pointers: dict[str, torch.dtype] = field(repr=False)
    constexprs: dict[str, Any] = field(repr=False)


def packing_cases(case: CompileCase) -> Iterator[CompileCase]:
    """An attention kernel without and with packed sequences."""
    names = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr")
    yield replace(case, constexprs=case.constexprs | dict.fromkeys(names))
    packed = case.pointers | dict.fromkeys(names, torch.int32)
    yield replace(case, shape=f"{case.shape} packed", pointers=packed)


def _row(*entries: tuple) -> dict[int, KernelConfig]:
    """The entries of one (pass, architecture, width), in the order of HEAD_DIM_CLASSES."""
    return {size: KernelConfig(*entry) for size, entry in zip(HEAD_DIM_CLASSES, entries)}


# Each entry is (block_m, block_n, warps, stages), in the order of HEAD_DIM_CLASSES.
# Chosen by the compiler's figures (benchmarks/compile_report.py), not yet timed on a GPU.
_TABLE: dict[tuple[str, int, int], dict[int, KernelConfig]] = {
    ("window_attn_fwd", 80, 16): _row(
        (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)
    ),
    ("window_attn_fwd", 90, 16): _row(
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)
    ),
    ("window_attn_fwd", 100, 16): _row(
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)
    ),
    ("window_attn_bwd_dkv", 80, 16): _row(
        (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)
    ),
    ("window_attn_bwd_dkv", 90, 16): _row(
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (32, 128, 8, 2, True),
        (32, 128, 8, 2, True),
    ),
    ("window_attn_bwd_dkv", 100, 16): _row(
        (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 3), (32, 64, 8, 3)
    ),
    ("window_attn_bwd_dq", 80, 16): _row(
        (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)
    ),
    ("window_attn_bwd_dq", 90, 16): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)
    ),
    ("window_attn_bwd_dq", 100, 16): _row(
        (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)
    ),
    **{
        ("window_attn_with_kvcache", arch, 16): _row(
            (16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 3)
        )
        for arch in ARCHITECTURES
    },
    ("window_attn_with_kvcache_wide", 80, 16): _row(
        (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)
    ),
    ("window_attn_with_kvcache_wide", 90, 16): _row(
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3), (64, 32, 8, 3)
    ),
    ("window_attn_with_kvcache_wide", 100, 16): _row(
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3), (64, 32, 8, 3)
    ),
    # Full float32 products know no matrix instructions, and no difference between architectures.
    **{
        (name, arch, 32): _row(*entries)
        for name, entries in {
            "window_attn_fwd": (
                (32, 32, 4, 2),
                (32, 32, 8, 1),
                (32, 32, 8, 1),
                (32, 16, 8, 2),
                (32, 16, 8, 2),
            ),
            "window_attn_bwd_dkv": (
                (32, 32, 8, 1),
                (16, 32, 8, 1),
                (16, 32, 8, 1),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
            ),
            "window_attn_bwd_dq": (
                (32, 32, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
            ),
            "window_attn_with_kvcache": (
                (16, 64, 8, 2),
                (16, 32, 8, 3),
                (16, 32, 8, 3),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
            ),
            "window_attn_with_kvcache_wide": (
                (32, 32, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
                (16, 16, 8, 2),
            ),
        }.items()
        for arch in ARCHITECTURES
    },
}


def kernel_config(
    name: str,
    head_dim_qk: int,
    head_dim_v: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
) -> KernelConfig:
    """The row of pass `name` for these head dims, dtype and compute capability.

    `capability` is `(major, minor)`; None stands for no GPU (the interpreter) and reads as sm_90.
    """
    return _TABLE[name, _architecture(capability), 8 * dtype.itemsize][
        _head_dim_class(head_dim_qk, head_dim_v)
    ]


_TTT_PASSES = (
    "ttt_hidden",
    "ttt_hidden_grad",
    "ttt_hidden_bwd",
    "ttt_outer",
    "ttt_project",
    "newton_schulz_symmetric",
    "newton_schulz_multiply",
)
# block_m, block_n, block_k, warps, stages, by pass, architecture and width of the input dtype. The fast
# weights' sizes do not decide it: their matrices are cut into tiles like any other.
_TTT_TABLE: dict[tuple[str, int, int], TTTConfig] = {
    ("ttt_hidden", 80, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden_grad", 80, 16): TTTConfig(128, 64, 32, 8, 3),
    ("ttt_hidden_grad", 90, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_grad", 100, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_bwd", 80, 16): TTTConfig(64, 32, 32, 8, 3),
    ("ttt_hidden_bwd", 90, 16): TTTConfig(128, 32, 64, 8, 3),
    ("ttt_hidden_bwd", 100, 16): TTTConfig(128, 32, 64, 8, 3),
    ("ttt_outer", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("ttt_outer", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_outer", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_project", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("ttt_project", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_project", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("newton_schulz_symmetric", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("newton_schulz_symmetric", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("newton_schulz_symmetric", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("newton_schulz_multiply", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("newton_schulz_multiply", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("newton_schulz_multiply", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    **{
        (name, arch, 32): TTTConfig(32, 32, 32, 4, 2)
        for name in _TTT_PASSES
        for arch in ARCHITECTURES
    },
}


def ttt_config(name: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> TTTConfig:
    """The row of pass `name` of the fast-weight kernels for this dtype and compute capability."""
    return _TTT_TABLE[name, _architecture(capability), 8 * dtype.itemsize]


# Elements of a tile and warps, by pass and width of the input dtype. Rows are read whole, and what they
# need is the same on every architecture: 16 bytes of each tensor per thread.
_ROW_TABLE: dict[tuple[str, int], tuple[int, int]] = {
    ("branch_qkv_fwd", 16): (1024, 4),
    ("branch_qkv_fwd", 32): (512, 4),
    ("branch_qkv_bwd", 16): (1024, 4),
    ("branch_qkv_bwd", 32): (512, 4),
    ("branch_sum_fwd", 16): (1024, 4),
    ("branch_sum_fwd", 32): (512, 4),
    ("branch_sum_bwd", 16): (1024, 4),
    ("branch_sum_bwd", 32): (512, 4),
}


def row_config(name: str, columns: int, dtype: torch.dtype) -> RowConfig:
    """The configuration of pass `name` for rows of so many columns in this dtype."""
    elements, num_warps = _ROW_TABLE[name, 8 * dtype.itemsize]
    block = 1 << max(columns - 1, 0).bit_length()
    return RowConfig(max(1, elements // block), block, num_warps)


def shipped_configs(name: str, arch: int) -> Iterator[tuple[int, int, KernelConfig]]:
    """Every row of pass `name` on one architecture: (dtype width in bits, head dim, config)."""
    for (row_name, row_arch, width), row in _TABLE.items():
        if (row_name, row_arch) == (name, arch):
            for head_dim, config in row.items():
                yield width, head_dim, config


def shipped_ttt_configs(name: str, arch: int) -> Iterator[tuple[torch.dtype, TTTConfig]]:
    """Every row of pass `name` of the fast-weight kernels on one architecture, with a dtype of its width."""
    half = torch.float16 if name.startswith("newton_schulz") else torch.bfloat16
    for (row_name, row_arch, width), config in _TTT_TABLE.items():
        if (row_name, row_arch) == (name, arch):
            yield half if width == 16 else torch.float32, config


# Of the CPU: None where kernels are interpreted, that of the emulated device where they are emulated.
CPU_CAPABILITY: tuple[int, int] | None = None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, CPU_CAPABILITY for the CPU."""
    return _cuda_capability(device.index) if device.type == "cuda" else CPU_CAPABILITY


@functools.cache
def _cuda_capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _architecture(capability: tuple[int, int] | None) -> int:
    if capability is None:
        return 90
    major = capability[0]
    if major < 8:
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} is not supported by the Triton"
            " kernels: expected 8.0 or above"
        )
    # Compute capability 12 has the matrix instructions of 8, not those of 9 and 10.
    return {9: 90, 10: 100}.get(major, 80)


def _head_dim_class(head_dim_qk: int, head_dim_v: int) -> int:
    if max(head_dim_qk, head_dim_v) > HEAD_DIM_CLASSES[-1]:
        raise ValueError(
            f"head dims {head_dim_qk} (q, k) and {head_dim_v} (v) are not supported by the Triton"
            f" kernels: expected at most {HEAD_DIM_CLASSES[-1]}"
        )
    if max(head_dim_qk, head_dim_v) <= 64:
        return 64
    wide = max(head_dim_qk, head_dim_v) > 128
    padded = any(x & (x - 1) for x in (head_dim_qk, head_dim_v))  # not a power of two
    return (192 if padded else 256) if wide else (96 if padded else 128)
