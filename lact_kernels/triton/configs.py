"""Block sizes, warps and pipeline stages of every kernel: one table, in one place.

A row is found by what decides it: the pass, the architecture, the width of the input dtype and the class of
the head dims D and Dv. Float32 has one row for all architectures: its products know no matrix instructions,
or in the forward up to 64 channels those that all have, as tiles of 32 rows are too small for others. Up to
64 the class of head dims is 64. Beyond, tiles are 128 or 256 channels wide: the classes 128 and 256 are head
dims that fill them, 96 and 192 all those whose tiles are padded and masked, which takes registers. A length,
a batch size, a head count or a window never decides it.

A row also names the implementation that it is for. Every pass has one in plain Triton; another, such as one
for a single architecture, is a second kernel with the same arguments beside it in the pass's `..._KERNELS`,
and the rows that name it.

This module imports neither Triton nor a GPU, so that tests and reports can read the table anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

# Those with a row of every pass for 16-bit inputs, and that of float32's rows, which are everybody's.
ARCHITECTURES = (80, 90, 100)
ALL = 0
# Compute capability 9's rows for tensors that it can copy by descriptors (`triton/descriptors.py`).
DESCRIBED = 91
# Compute capabilities 8.6, 8.9 and 12: sm_80's rows, but for those that do not fit 99 KiB of shared memory.
SMALL = 86
HEAD_DIM_CLASSES = (64, 96, 128, 192, 256)
TRITON = "triton"  # the implementation that every pass has


@dataclass(frozen=True)
class KernelConfig:
    """One row: `block_m` queries by `block_n` keys per tile, warps per program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False  # dk and dv in a launch each: the dk/dv pass only
    descriptors: bool = False  # tiles are copied by descriptors, not by pointers
    precision: str = (
        "ieee"  # of float32 products; also "tf32x3", in the forward: `primitives.product`
    )
    implementation: str = TRITON


@dataclass(frozen=True)
class TTTConfig:
    """A row of the fast-weight kernels: tiles of `block_m` by `block_n`, `block_k` summed at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # blocks are copied by descriptors, not by pointers
    implementation: str = TRITON
    registers: int | None = None  # at most, of a thread, which the compiler would take more of

    @property
    def rows_block(self) -> tuple[int, int]:
        """Of what a tile has rows of, the block that is summed over at a time."""
        return self.block_m, self.block_k

    @property
    def columns_block(self) -> tuple[int, int]:
        """The same of what a tile has columns of, as rows."""
        return self.block_n, self.block_k


@dataclass(frozen=True)
class RowConfig:
    """Of a kernel over rows without matrix products: tiles of `block_m` rows by `block_n` columns."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    implementation: str = TRITON


Config = KernelConfig | TTTConfig | RowConfig


def kernel_of(kernels: Mapping[str, Any], config: Config) -> Any:
    """Of a pass's kernels, by implementation, the one that the row is for. They take the same arguments."""
    return kernels[config.implementation]


def _row(*entries: tuple) -> dict[int, KernelConfig]:
    """The entries of one (pass, architecture, width), in the order of HEAD_DIM_CLASSES."""
    return {size: KernelConfig(*entry) for size, entry in zip(HEAD_DIM_CLASSES, entries)}


def _described(*entries: tuple) -> dict[int, KernelConfig]:
    """The same, for tiles that are copied by descriptors."""
    return {size: replace(config, descriptors=True) for size, config in _row(*entries).items()}


# Each entry is (block_m, block_n, warps, stages), in the order of HEAD_DIM_CLASSES.
# Chosen by the compiler's figures (benchmarks/compile_report), not yet timed on a GPU.
_TABLE: dict[tuple[str, int, int], dict[int, KernelConfig]] = {
    ("window_attn_fwd", 80, 16): _row(
        (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)
    ),
    ("window_attn_fwd", 90, 16): _row(
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)
    ),
    ("window_attn_fwd", 100, 16): _row(
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)
    ),
    ("window_attn_bwd_dkv", 80, 16): _row(
        (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)
    ),
    ("window_attn_bwd_dkv", 90, 16): _row(
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (32, 128, 8, 3, True),
        (32, 128, 8, 3, True),
    ),
    ("window_attn_bwd_dkv", 100, 16): _row(
        (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 3), (32, 64, 8, 3)
    ),
    # With a soft cap, of which the scores are needed twice, in fewer queries at a time.
    ("window_attn_bwd_dkv_softcap", 80, 16): {64: KernelConfig(32, 64, 4, 2)},
    ("window_attn_bwd_dkv_softcap", 90, 16): dict.fromkeys((96, 128), KernelConfig(32, 128, 8, 3)),
    ("window_attn_bwd_dq", 80, 16): _row(
        (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 3), (64, 32, 4, 3)
    ),
    ("window_attn_bwd_dq", 90, 16): _row(
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)
    ),
    ("window_attn_bwd_dq", 100, 16): _row(
        (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)
    ),
    ("window_attn_fwd", DESCRIBED, 16): _described(
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)
    ),
    # A soft cap takes registers: with tiles of as many keys as above packed sequences spill.
    ("window_attn_fwd_softcap", DESCRIBED, 16): {
        head_dim: KernelConfig(128, block_n, 8, 3, descriptors=True)
        for head_dim, block_n in ((96, 64), (128, 64), (192, 32), (256, 32))
    },
    ("window_attn_bwd_dq", DESCRIBED, 16): _described(  # of dense input
        (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)
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
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 16, 4, 4), (64, 16, 4, 4)
    ),
    ("window_attn_with_kvcache_wide", 100, 16): _row(
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3), (64, 32, 8, 3)
    ),
    **{
        (name, ALL, 32): _row(*entries)
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
    },
}
# Up to 64 channels float32 products of the forward are three TF32 products. More take too many registers.
_TABLE["window_attn_fwd", ALL, 32][64] = replace(
    _TABLE["window_attn_fwd", ALL, 32][64], precision="tf32x3"
)
# Tiles of 256 channels that fit 99 KiB. They have fewer queries than keys, or fewer keys than queries: only
# so do eight warps share the columns of a product of few rows, and compute none of it twice.
_TABLE |= {
    (name, SMALL, 16): dict.fromkeys((192, 256), KernelConfig(*entry))
    for name, entry in {
        "window_attn_fwd": (32, 64, 8, 2),
        "window_attn_bwd_dkv": (64, 16, 8, 2),
        "window_attn_bwd_dq": (32, 64, 8, 1),
    }.items()
}


def kernel_config(
    name: str,
    head_dim_qk: int,
    head_dim_v: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    described: bool = False,
    softcap: bool = False,
) -> KernelConfig:
    """The row of pass `name` for these head dims, dtype and compute capability.

    `capability` is `(major, minor)`; None stands for no GPU (the interpreter) and reads as sm_90.
    `described`: whether the tensors can have descriptors. `softcap`: whether the scores have one, for which
    some passes have rows of their own.
    """
    head_dim = _head_dim_class(head_dim_qk, head_dim_v)
    archs = _architectures(capability, dtype)
    if described and archs == (90,):
        archs = (DESCRIBED, 90)
    names = (f"{name}_softcap", name) if softcap else (name,)
    rows = (_TABLE.get((x, arch, 8 * dtype.itemsize), {}) for arch in archs for x in names)
    return next(row[head_dim] for row in rows if head_dim in row)


_TTT_PASSES = (
    "ttt_hidden",
    "ttt_hidden_given",
    "ttt_hidden_grad",
    "ttt_hidden_grad_given",
    "ttt_hidden_bwd",
    "ttt_outer",
    "ttt_project",
    "newton_schulz",
)
# block_m, block_n, block_k, warps, stages, by pass, architecture and width of the input dtype. The fast
# weights' sizes do not decide it: their matrices are cut into tiles like any other.
_TTT_TABLE: dict[tuple[str, int, int], TTTConfig] = {
    ("ttt_hidden", 80, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    # Weights from three pointers take more registers than packed ones: sm_80 would spill with tiles of 64.
    ("ttt_hidden_given", 80, 16): TTTConfig(128, 64, 32, 8, 3),
    ("ttt_hidden_given", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden_given", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden_grad", 80, 16): TTTConfig(128, 64, 32, 8, 3),
    ("ttt_hidden_grad_given", 80, 16): TTTConfig(128, 64, 32, 8, 3),
    ("ttt_hidden_grad", 90, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_grad_given", 90, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_grad", 100, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_grad_given", 100, 16): TTTConfig(128, 64, 64, 8, 3),
    ("ttt_hidden_bwd", 80, 16): TTTConfig(128, 32, 32, 8, 3),
    ("ttt_hidden_bwd", 90, 16): TTTConfig(128, 32, 64, 8, 3),
    ("ttt_hidden_bwd", 100, 16): TTTConfig(128, 32, 64, 8, 3),
    ("ttt_outer", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("ttt_outer", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_outer", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_project", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("ttt_project", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_project", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    # Two programs to a multiprocessor: one computes while the other waits, for programs or for its tiles.
    ("newton_schulz", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("newton_schulz", 90, 16): TTTConfig(128, 128, 64, 8, 3, registers=128),
    ("newton_schulz", 100, 16): TTTConfig(128, 128, 64, 8, 3, registers=128),
    # Float32 sums beside the others, or loads of few bytes each, would spill with so few registers.
    ("newton_schulz_gram", 80, 16): TTTConfig(128, 128, 32, 8, 3),
    ("newton_schulz_gram", 90, 16): TTTConfig(128, 128, 64, 8, 3),
    ("newton_schulz_gram", 100, 16): TTTConfig(128, 128, 64, 8, 3),
    ("ttt_hidden", DESCRIBED, 16): TTTConfig(128, 128, 64, 8, 4, True),
    ("ttt_hidden_given", DESCRIBED, 16): TTTConfig(128, 128, 64, 8, 4, True),
    ("ttt_hidden_grad", DESCRIBED, 16): TTTConfig(128, 128, 64, 8, 2, True),
    ("ttt_hidden_grad_given", DESCRIBED, 16): TTTConfig(128, 64, 64, 8, 3, True),
    ("ttt_hidden_bwd", DESCRIBED, 16): TTTConfig(128, 32, 64, 8, 3, True),
    ("ttt_outer", DESCRIBED, 16): TTTConfig(128, 128, 64, 8, 4, True),
    ("ttt_outer_wide", DESCRIBED, 16): TTTConfig(128, 256, 64, 8, 4, True),
    ("ttt_project", DESCRIBED, 16): TTTConfig(128, 128, 64, 8, 4, True),
    ("ttt_project_wide", DESCRIBED, 16): TTTConfig(128, 256, 64, 8, 4, True),
    **{(name, ALL, 32): TTTConfig(32, 32, 32, 4, 2) for name in _TTT_PASSES},
}


def ttt_config(
    name: str, dtype: torch.dtype, capability: tuple[int, int] | None, described: bool = False
) -> TTTConfig:
    """The row of pass `name` of the fast-weight kernels for this dtype and compute capability.

    `described`: whether the tensors can have descriptors.
    """
    arch = DESCRIBED if described else _architectures(capability, dtype)[-1]
    return _TTT_TABLE[name, arch, 8 * dtype.itemsize]


# Elements of a tile, and warps and what else RowConfig has, by pass and width of the input dtype. Rows are
# read whole, and what they need is the same on every architecture: 16 bytes of each tensor per thread.
_ROW_TABLE: dict[tuple[str, int], tuple] = {
    ("silu_l2norm_rope_fwd", 16): (1024, 4),
    ("silu_l2norm_rope_fwd", 32): (512, 4),
    ("silu_l2norm_rope_bwd", 16): (1024, 4),
    ("silu_l2norm_rope_bwd", 32): (512, 4),
    ("rms_norm_scale_add_fwd", 16): (1024, 4),
    ("rms_norm_scale_add_fwd", 32): (512, 4),
    ("rms_norm_scale_add_bwd", 16): (1024, 4),
    ("rms_norm_scale_add_bwd", 32): (512, 4),
}


def row_config(name: str, columns: int, dtype: torch.dtype) -> RowConfig:
    """The configuration of pass `name` for rows of so many columns in this dtype."""
    elements, *rest = _ROW_TABLE[name, 8 * dtype.itemsize]
    block = 1 << max(columns - 1, 0).bit_length()
    return RowConfig(max(1, elements // block), block, *rest)


# Of the CPU: None where kernels are interpreted, that of the emulated device where they are emulated.
CPU_CAPABILITY: tuple[int, int] | None = None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, CPU_CAPABILITY for the CPU."""
    return _cuda_capability(device.index) if device.type == "cuda" else CPU_CAPABILITY


@functools.cache
def _cuda_capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _architectures(capability: tuple[int, int] | None, dtype: torch.dtype) -> tuple[int, ...]:
    """Whose rows serve a device, in the order in which they are asked for."""
    if dtype == torch.float32:
        return (ALL,)
    if capability is None:
        return (90,)
    if capability[0] in (9, 10):
        return (10 * capability[0],)
    # Compute capability 12 has the matrix instructions of 8, not those of 9 and 10.
    small = capability in ((8, 6), (8, 9)) or capability[0] == 12
    return (SMALL, 80) if small else (80,)


def has_descriptors(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether a device has rows for tensors of this dtype that it copies by descriptors."""
    return _architectures(capability, dtype) == (90,)


@functools.cache
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
