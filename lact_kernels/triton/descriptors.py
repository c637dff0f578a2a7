"""Descriptors of tensors in global memory, by which Hopper copies a tile with one instruction.

A tile by pointers takes each thread several copies, and registers for their addresses.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of addresses and strides


def describable(x: Tensor) -> bool:
    """Whether `[B, T, H, D]` can have one: it is neither empty nor expanded, its last axis is dense,
    and its address and the other strides are multiples of 16 bytes.
    """
    *strides, last = _strides(x)
    dense = x.numel() > 0 and last == 1 and x.data_ptr() % ALIGNMENT == 0
    return dense and all(n > 0 and n * x.itemsize % ALIGNMENT == 0 for n in strides)


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of `[B, T, H, D]`, seen as `[B, H, T, D]`: tiles of so many rows and columns of one head."""
    B, T, H, D = x.shape
    stride_b, stride_t, stride_h, _ = _strides(x)
    return TensorDescriptor(x, [B, H, T, D], [stride_b, stride_h, stride_t, 1], [1, 1, rows, cols])


def _strides(x: Tensor) -> list[int]:
    """Its strides, with one that will do for an outer axis of one element, whose own is arbitrary."""
    outer = [ALIGNMENT if n == 1 else stride for n, stride in zip(x.shape[:-1], x.stride())]
    return [*outer, x.stride(-1)]
