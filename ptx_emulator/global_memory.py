"""Global memory of one launch: the storages of its tensors in one arena, with gaps between them.

For each byte `owner` tells whether it is in no tensor, in a storage but in no argument's elements (such as
between the rows of a slice), or in an argument. For each 4 bytes `writer` tells which program wrote there:
programs of one launch run in any order, so what one writes no other may read.
"""

import numpy as np
import torch
from torch import Tensor

from ptx_emulator.counts import SECTOR
from ptx_emulator.types import UNSIGNED

BASE = 0x7F00_0000_0000
GAP = 1 << 16
ALIGNMENT = 256
NOWHERE, IN_STORAGE, IN_ARGUMENT = 0, 1, 2


class GlobalMemory:
    """Of a launch on CPU tensors. `write_back` copies to the tensors what the programs changed."""

    def __init__(self, tensors: list[Tensor]):
        self._storages: dict[
            int, tuple[int, torch.UntypedStorage]
        ] = {}  # (offset, storage), by address
        size = GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self._storages and storage.nbytes():
                # The alignment of the real pointer, which Triton has specialised on, is kept.
                self._storages[address] = (size + address % ALIGNMENT, storage)
                size += storage.nbytes() + GAP + ALIGNMENT
                size = -(-size // ALIGNMENT) * ALIGNMENT
        words = np.zeros(size // 16, np.complex128)
        self.bytes = words.view(np.uint8)
        self.views = {n: words.view(dtype) for n, dtype in UNSIGNED.items()}
        owner = np.zeros(size, np.uint8)
        for start, storage in self._storages.values():
            self.bytes[start : start + storage.nbytes()] = _bytes_of(storage)
            owner[start : start + storage.nbytes()] = IN_STORAGE
        for tensor in tensors:
            if tensor.numel():
                size = tensor.element_size()
                elements = torch.from_numpy(owner[self._offset(tensor) :])
                strides = [*(s * size for s in tensor.stride()), 1]
                elements.as_strided([*tensor.shape, size], strides).fill_(IN_ARGUMENT)
        self._owners = {1: owner}
        self.writer = np.full(len(owner) // 4, -1, np.int32)
        sectors = len(self.bytes) // SECTOR + 1
        self.touched = {verb: np.zeros(sectors, np.bool_) for verb in ("read", "written")}
        self._before = {
            a: self.bytes[s : s + x.nbytes()].copy() for a, (s, x) in self._storages.items()
        }

    def _offset(self, tensor: Tensor) -> int:
        start, _ = self._storages[tensor.untyped_storage().data_ptr()]
        return start + tensor.storage_offset() * tensor.element_size()

    def address(self, tensor: Tensor) -> int:
        """What the kernel gets as the pointer of a tensor."""
        if not tensor.untyped_storage().nbytes():
            return BASE
        return BASE + self._offset(tensor)

    def fill(self, tensor: Tensor, data: np.ndarray) -> None:
        """Give a contiguous tensor other bytes, here alone."""
        start = self._offset(tensor)
        self.bytes[start : start + len(data)] = data

    def owners(self, size: int) -> np.ndarray:
        """For each `size` bytes in a row: the least owner among them."""
        if size not in self._owners:
            self._owners[size] = self._owners[1].reshape(-1, size).min(1)
        return self._owners[size]

    def write_back(self) -> None:
        for address, (start, storage) in self._storages.items():
            now = self.bytes[start : start + storage.nbytes()]
            if not np.array_equal(now, self._before[address]):
                _bytes_of(storage)[:] = now


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
