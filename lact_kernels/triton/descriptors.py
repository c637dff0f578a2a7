"""Descriptors of tensors in global memory, by which Hopper copies a tile with one instruction.

A tile by pointers takes each thread several copies, and registers for their addresses.
"""

from collections.abc import Iterator

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lact_kernels.triton.primitives import Sizes

ALIGNMENT = 16  # bytes, of addresses and strides


def aligned_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of `[B, T, H, D]` but for the last, as a descriptor takes them; None: it can have none.

    It can have one that is neither empty nor expanded, whose last axis is dense, and whose address and other
    strides are multiples of 16 bytes. The stride of an axis of one element is arbitrary: it gets one.
    """
    (B, T, H, D), (stride_b, stride_t, stride_h, stride_d) = x.shape, x.stride()
    unit = ALIGNMENT // x.itemsize
    if B == 1:
        stride_b = unit
    if T == 1:
        stride_t = unit
    if H == 1:
        stride_h = unit
    if stride_d != 1 or stride_b % unit or stride_t % unit or stride_h % unit:
        return None
    # A product of four numbers, none of them negative, is 0 where one of them is.
    if B * T * H * D == 0 or stride_b * stride_t * stride_h == 0 or x.data_ptr() % ALIGNMENT:
        return None
    return stride_b, stride_t, stride_h


def descriptor(x: Tensor, strides: tuple[int, int, int], rows: int, cols: int) -> TensorDescriptor:
    """Of `[B, T, H, D]`, seen as `[B, H, T, D]`: tiles of so many rows and columns of one head.

    `strides` are its `aligned_strides`. What the class's own constructor would assert, they have found.
    """
    B, T, H, D = x.shape
    stride_b, stride_t, stride_h = strides
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.padding = x, "zero"
    made.shape, made.strides = [B, H, T, D], [stride_b, stride_h, stride_t, 1]
    made.block_shape = [1, 1, rows, cols]
    return made


def attention_descriptors(
    tensors: tuple[Tensor, ...], strides: list[tuple[int, int, int]], sizes: Sizes
) -> Iterator[TensorDescriptor]:
    """Of q, k and v, for the tiles of a kernel."""
    rows = (sizes.BLOCK_M, sizes.BLOCK_N, sizes.BLOCK_N)
    cols = (sizes.BLOCK_D, sizes.BLOCK_D, sizes.BLOCK_DV)
    return map(descriptor, tensors, strides, rows, cols)
