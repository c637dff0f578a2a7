"""Global memory of one launch: what its tensors cover in one arena, with gaps between them.

For each byte `owner` tells whether it is in no tensor, between the elements of a tensor (such as between the
rows of a slice), or in an element. For each unit, the narrowest store of the kernel, `order` keeps who has
written and read it: see program_order.py.
"""

import ctypes

import numpy as np
from torch import Tensor

from ptx_emulator.counts import SECTOR
from ptx_emulator.program_order import Ordered, Unordered, zeros
from ptx_emulator.types import UNSIGNED

BASE = 0x7F00_0000_0000
GAP = (
    1 << 24
)  # so far beyond a tensor an access is seen to be so: zeros that nobody touches cost nothing
ALIGNMENT = 256
NOWHERE, BETWEEN_ELEMENTS, IN_ELEMENT = 0, 1, 2


class GlobalMemory:
    """Of a launch on CPU tensors. `write_back` copies to the tensors what the programs changed."""

    order: Unordered | Ordered
    version: int = 0  # counts writes

    def __init__(self, tensors: list[Tensor], unit: int):
        self.unit = unit
        # Held here, as their memory is written at the end.
        self._tensors = tensors = [x for x in tensors if x.numel()]
        self._spans: list[tuple[int, int, int]] = []  # real address, offset in the arena, bytes
        size = GAP
        # In the order of the arguments, so that an access that goes astray always goes to the same place.
        merged = _merged([(x.data_ptr(), x.data_ptr() + _extent(x)) for x in tensors])
        places = [x.data_ptr() for x in tensors]
        merged.sort(
            key=lambda span: next(i for i, x in enumerate(places) if span[0] <= x < span[1])
        )
        for start, stop in merged:
            # The alignment of the real pointer, which Triton has specialised on, is kept.
            self._spans.append((start, size + start % ALIGNMENT, stop - start))
            size = -(-(size + stop - start + GAP + ALIGNMENT) // ALIGNMENT) * ALIGNMENT
        words = zeros(size // 16, np.complex128)
        self.bytes = words.view(np.uint8)
        self.views = {n: words.view(dtype) for n, dtype in UNSIGNED.items()}
        owner = zeros(size, np.uint8)
        for address, offset, length in self._spans:
            self.bytes[offset : offset + length] = _memory_at(address, length)
            owner[offset : offset + length] = BETWEEN_ELEMENTS
        for x in tensors:
            strides = [*(s * x.element_size() for s in x.stride()), 1]
            elements = np.lib.stride_tricks.as_strided(
                owner[self._offset(x) :], [*x.shape, x.element_size()], strides
            )
            elements[...] = IN_ELEMENT
        self._owners = {1: owner}
        self.touched = {verb: zeros(size // SECTOR + 1, np.bool_) for verb in ("read", "written")}
        self._before = [self.bytes[offset : offset + n].copy() for _, offset, n in self._spans]

    def _offset(self, tensor: Tensor) -> int:
        address = tensor.data_ptr()
        return next(o + address - a for a, o, length in self._spans if a <= address < a + length)

    def address(self, tensor: Tensor) -> int:
        """What the kernel gets as the pointer of a tensor."""
        return BASE + (self._offset(tensor) if tensor.numel() else 0)

    def fill(self, tensor: Tensor, data: np.ndarray) -> None:
        """Give a contiguous tensor other bytes, here alone."""
        start = self._offset(tensor)
        self.bytes[start : start + len(data)] = data

    def owners(self, size: int) -> np.ndarray:
        """For each `size` bytes in a row: the least owner among them."""
        if size not in self._owners:
            owners = self._owners[size] = zeros(len(self.bytes) // size, np.uint8)
            for _, offset, length in self._spans:
                first, stop = offset // 16 * 16, -(-(offset + length) // 16) * 16
                part = self._owners[1][first:stop].reshape(-1, size)
                owners[first // size : stop // size] = part.min(1)
        return self._owners[size]

    def units(self, index: np.ndarray, size: int) -> np.ndarray:
        """The units of elements of `size` bytes: `[..., units of one]`."""
        return (index * size // self.unit)[..., None] + np.arange(max(size // self.unit, 1))

    def write_back(self) -> None:
        for (address, offset, length), before in zip(self._spans, self._before):
            now = self.bytes[offset : offset + length]
            if not np.array_equal(now, before):
                _memory_at(address, length)[:] = now


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start < merged[-1][1]:
            start, stop = merged[-1][0], max(stop, merged[-1][1])
            merged.pop()
        merged.append((start, stop))
    return merged


def _memory_at(address: int, length: int) -> np.ndarray:
    """The bytes of this process at an address, for as long as a tensor that has them is held."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
