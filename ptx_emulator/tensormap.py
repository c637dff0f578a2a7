"""Descriptors of tensors in global memory, by which the tensor memory accelerator copies tiles.

The 128 bytes of a real one are opaque. Here each field has a place of its own in them, in the order of
FIELDS. Kernels make them in shared memory with `tensormap.replace` and publish them to global memory; those
of the host come as parameters of a kernel.
"""

import dataclasses

import numpy as np
from torch import Tensor

from ptx_emulator import reports
from ptx_emulator.accesses import (
    global_index,
    note_access,
    shared_offsets,
    store_shared,
    write_global,
)
from ptx_emulator.errors import InvalidAccess, UnsupportedInstruction

NUM_BYTES = 128
# Name of tensormap.replace: first byte, bytes of an entry. Up to five axes, the innermost first.
FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 4),  # less one
    "elemtype": (12, 4),
    "interleave_layout": (16, 4),
    "swizzle_mode": (20, 4),
    "fill_mode": (24, 4),
    "global_dim": (28, 4),
    "global_stride": (48, 8),  # bytes, from the second axis on
    "box_dim": (80, 4),
    "element_stride": (100, 4),
}
# Bytes of an element, by the code of its type: u8, u16, u32, s32, u64, s64, f16, f32, f32.ftz, f64, bf16.
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2)
WIDEST = {0: 4096, 1: 32, 2: 64, 3: 128}  # bytes of a box along the innermost axis, by swizzle


@dataclasses.dataclass
class TensorMap:
    """One descriptor per program: `address`, `dims` and `strides` have the axis `[programs or 1]`."""

    address: np.ndarray
    dims: np.ndarray  # [programs or 1, rank]
    strides: np.ndarray  # bytes, [programs or 1, rank]
    box: tuple[int, ...]
    element_bytes: int
    swizzle: int  # 0 none, 1 of 32 bytes, 2 of 64, 3 of 128


@dataclasses.dataclass(frozen=True)
class TensorMapArgument:
    """A descriptor made on the host, which a kernel gets as a parameter: axes outermost first."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    box: tuple[int, ...]
    element_type: int  # see ELEMENT_BYTES
    swizzle: int

    def encode(self, address: int) -> np.ndarray:
        """The 128 bytes, with the tensor at this address."""
        values = {
            "global_address": [address],
            "rank": [len(self.shape) - 1],
            "elemtype": [self.element_type],
            "swizzle_mode": [self.swizzle],
            "global_dim": self.shape[::-1],
            "global_stride": [x * ELEMENT_BYTES[self.element_type] for x in self.strides[-2::-1]],
            "box_dim": self.box[::-1],
            "element_stride": [1] * len(self.shape),
        }
        data = np.zeros(NUM_BYTES, np.uint8)
        for name, entries in values.items():
            first, size = FIELDS[name]
            array = np.array(list(entries), f"u{size}")
            data[first : first + array.nbytes] = array.view(np.uint8)
        return data


def decode(S, address, line) -> TensorMap:
    """The descriptors at the global addresses `[programs or 1, 1]`."""
    if not S.batch.unacquired_descriptors.isdisjoint(address.ravel().tolist()):
        S.report(reports.NO_TENSORMAP_FENCE, line)
    index = global_index(S, address + np.arange(0, NUM_BYTES, 4, dtype=np.uint64), 4, None, line)
    data = np.ascontiguousarray(S.memory.views[4][index]).view(np.uint8)

    def field(name, count=1):
        first, size = FIELDS[name]
        return np.ascontiguousarray(data[:, first : first + count * size]).view(f"u{size}")

    def same(name, count=1):
        values = field(name, count)
        if (values != values[:1]).any():
            S.fail(UnsupportedInstruction, line, f"tensor maps that differ in {name}")
        return [int(x) for x in values[0]]

    rank = same("rank")[0] + 1
    (element_type,), (swizzle,) = same("elemtype"), same("swizzle_mode")
    if rank > 5 or element_type >= len(ELEMENT_BYTES) or swizzle > 3:
        S.fail(UnsupportedInstruction, line, "what it reads is no tensor map")
    box = same("box_dim", rank)
    inner_bytes = box[0] * ELEMENT_BYTES[element_type]
    inner = np.full((len(data), 1), ELEMENT_BYTES[element_type], np.int64)
    outer = field("global_stride", rank - 1).astype(np.int64) if rank > 1 else inner[:, :0]
    if (field("global_address") % 16).any() or (outer % 16).any():
        S.fail(InvalidAccess, line, "a tensor map whose address or strides 16 bytes do not divide")
    if not all(1 <= x <= 256 for x in box) or inner_bytes % 16 or inner_bytes > WIDEST[swizzle]:
        S.fail(InvalidAccess, line, f"a tensor map with the box {box[::-1]}, swizzle {swizzle}")
    if any(x != 1 for x in same("element_stride", rank)) or same("interleave_layout") != [0]:
        S.fail(UnsupportedInstruction, line, "an element stride or an interleaved layout")
    return TensorMap(
        field("global_address")[:, 0],
        field("global_dim", rank).astype(np.int64),
        np.concatenate([inner, outer], axis=1),
        tuple(box),
        ELEMENT_BYTES[element_type],
        swizzle,
    )


def replace_field(S, address, name, place, value, mask, line):
    """`tensormap.replace`: one entry of a field of the descriptor at a shared address."""
    first, size = FIELDS[name]
    address = address.astype(np.uint32) + np.uint32(first + place * size)
    store_shared(S, address, size, (value.astype(f"u{size}"),), mask, line)


def publish_descriptor(S, to, source, mask, line):
    """`tensormap.cp_fenceproxy`: a descriptor from shared to global memory, by one warp."""
    words = np.arange(0, NUM_BYTES, 4)
    source = S.of_first_active(source, mask).astype(np.uint32)
    offsets = shared_offsets(S, source, NUM_BYTES, None, line) + words
    note_access(S, "read", offsets[:, :1], NUM_BYTES, mask, line)
    data = S.all_programs(S.shared.gather(offsets, 4))
    to = S.of_first_active(to, mask)
    S.batch.unacquired_descriptors.update(to.ravel().tolist())
    to = to + words.astype(np.uint64)
    index = S.all_programs(global_index(S, to, 4, None, line))
    program = np.broadcast_to(S.batch.names, index.shape)
    stamps = np.full(data.size, S.batch.clocks.stamps(S.warps[:1])[0])
    write_global(S, index.ravel(), 4, data.ravel(), program.ravel(), stamps, line)


def acquire_descriptor(S, address, mask):
    """`fence.proxy.tensormap`: what has been published there may be used from here on."""
    S.batch.unacquired_descriptors.difference_update(
        S.of_first_active(address, mask).ravel().tolist()
    )
