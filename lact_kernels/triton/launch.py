"""What every launcher does to its arguments first, and the launch itself. Needs torch alone."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lact_kernels.core.attention import AttentionOptions
from lact_kernels.triton.configs import Config, kernel_of


def readable_in_place(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves, or a contiguous copy where the kernels cannot address them.

    The last axis must be dense, and offsets inside a tile of up to 256 rows must fit 32 bits.
    """
    return tuple(
        [x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous() for x in tensors]
    )


def outer_strides(*tensors: Tensor | None) -> list[tuple[int, ...] | None]:
    """Of each tensor the strides of all axes but the last, in which elements lie side by side."""
    return [None if x is None else strides(x)[:-1] for x in tensors]


def strides(x: Tensor) -> tuple[int, ...]:
    """Its strides, as a kernel takes them.

    An axis of one element gets 0: its stride is arbitrary, and an odd one would make Triton compile
    a kernel without wide loads.
    """
    if 1 not in x.shape:
        return x.stride()
    return tuple([0 if n == 1 else stride for n, stride in zip(x.shape, x.stride())])


def positive_scale(q: Tensor, options: AttentionOptions) -> tuple[Tensor, int, float, float | None]:
    """The same scores with a positive scale: `(sign * q, sign, scale, bend)`, at no cost where it is.

    The kernels take the maximum before scaling, which is right for a positive scale only. `scale` is the
    factor of the exponents: softmax_scale, or with a soft cap that. Then the scores are tanh(Q K^T * bend).
    """
    factor, softcap = options.softmax_scale, options.softcap
    sign = 1
    if factor <= 0:
        sign = -1 if factor < 0 else 0
        q, factor = q * sign, abs(factor) or 1.0
    return (q, sign, factor, None) if softcap is None else (q, sign, softcap, factor / softcap)


def packing_arguments(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device
) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """The borders of packed sequences in q and in k, and how many sequences: None and 0 if dense."""
    if cu_seqlens_q is None:
        return None, 0
    own = cu_seqlens_q.to(device, non_blocking=True).contiguous()
    if cu_seqlens_k is cu_seqlens_q:
        return (own, own), len(own) - 1
    return (own, cu_seqlens_k.to(device, non_blocking=True).contiguous()), len(own) - 1


CPU_MULTIPROCESSORS = 1  # another number where a device is emulated


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU, so that few programs can be cut up to fill it; CPU_MULTIPROCESSORS for the CPU."""
    return _num_multiprocessors(device.index) if device.type == "cuda" else CPU_MULTIPROCESSORS


@functools.cache
def _num_multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the device of `x`, which need not be the current one."""
    return torch.cuda.device(x.device.index) if x.is_cuda else contextlib.nullcontext()


def launch(
    kernels: Mapping[str, Any], config: Config, grid: tuple[int, ...], *arguments, **constexprs
) -> None:
    """Launch the kernel of a pass that its row of the table names, with the row's warps and stages."""
    kernel_of(kernels, config)[grid](
        *arguments, **constexprs, num_warps=config.num_warps, num_stages=config.num_stages
    )
