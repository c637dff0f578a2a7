"""Products of a warp group, Hopper's `wgmma`: asynchronous, with operands in shared memory.

A descriptor of 64 bits says how a 64 x k or n x k operand lies in shared memory (PTX ISA, "Matrix Descriptor
Format"): its start in bits 0 to 13, the leading offset from 16, the stride offset from 32, all in units of 16
bytes, and the swizzle in bits 62 and 63. Rows of `pitch` bytes come in groups of eight. Where k runs
along the rows (K-major) a group of eight rows is `stride` bytes behind the last one; where it runs across
(MN-major) eight k are, and `leading` bytes lie between blocks of a whole pitch. Swizzling then exchanges
16-byte parts: bits 4 to 6 of an address are combined with bits 7 to 9.

The operands are read at issue and again at the wait, and must be the same. The result is NaN until the wait,
which fills the arrays that the registers have held since the issue.
"""

import dataclasses
import functools

import numpy as np
import torch

from ptx_emulator import counts, reports
from ptx_emulator.errors import InvalidAccess, UnsupportedInstruction
from ptx_emulator.matrix import a_fragment, widened
from ptx_emulator.shared_memory import SHARED_BASE

GROUP = 128  # threads: four warps
PITCH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes, by swizzle
SWIZZLED_BITS = {0: 0, 1: 7, 2: 3, 3: 1}


@dataclasses.dataclass(eq=False)
class Operand:
    """One in shared memory: byte offsets `[programs or 1, groups or 1, rows, k]`, and bits at issue.

    `words` are the byte offsets of the units that it covers: `[programs or 1, groups or 1, units]`.
    """

    offsets: np.ndarray
    words: np.ndarray
    bits: np.ndarray


@dataclasses.dataclass(eq=False)
class Product:
    """One in flight: `d` is filled with `a b^T`, plus `c` where `accumulates`."""

    kind: str
    n: int
    a: Operand | tuple[np.ndarray, ...]
    b: Operand
    c: tuple[np.ndarray, ...]
    d: tuple[np.ndarray, ...]
    accumulates: np.ndarray
    line: int
    time: int


def wgmma(S, n, kind, c, a, b, accumulates, a_transposed, b_transposed, line):
    """Issue a product; `a` is a descriptor or a tuple of registers. Returns the future result."""
    if S.num_threads % GROUP or S.warps[0] % 4:
        S.fail(UnsupportedInstruction, line, "by less than the four warps of a group")
    if not isinstance(a, tuple):
        a = _operand(S, a, 64, kind, a_transposed, line)
    b = _operand(S, b, n, kind, b_transposed, line)
    counts.count_matrix(S, kind, 64, n, _depth(kind), len(S.warps) // 4)
    d = tuple(np.full(S.shape, np.nan, np.float32) for _ in c)
    S.open_products.append(Product(kind, n, a, b, c, d, accumulates, line, S.batch.time))
    return d


def commit_products(S):
    S.product_groups.append(S.open_products)
    S.open_products = []


def wait_for_products(S, pending, line):
    """Complete all groups but the last `pending`."""
    while len(S.product_groups) > pending:
        for product in S.product_groups.popleft():
            _complete(S, product)


def _depth(kind):
    return 8 if kind == "tf32" else 16


def _operand(S, descriptor, rows, kind, transposed, line) -> Operand:
    size = 4 if kind == "tf32" else 2
    per_thread = np.broadcast_to(descriptor, (len(descriptor), S.num_threads))
    per_thread = per_thread.reshape(len(descriptor), -1, GROUP)
    descriptors = per_thread[..., 0]  # [programs or 1, groups]
    if (per_thread != descriptors[..., None]).any():
        S.fail(UnsupportedInstruction, line, "a descriptor that is not uniform in its warp group")
    if (descriptors == descriptors[:, :1]).all():
        descriptors = descriptors[:, :1]
    tiles = [
        [_tile(x, rows, _depth(kind), size, transposed, S.shared.unit) for x in row]
        for row in descriptors.tolist()
    ]
    if None in sum(tiles, []):
        S.fail(UnsupportedInstruction, line, "a matrix descriptor with a base offset")
    offsets, words = (np.array([[tile[i] for tile in row] for row in tiles]) for i in (0, 1))
    if offsets.min() < 0 or offsets.max() + size > S.shared.num_bytes:
        S.fail(InvalidAccess, line, f"bytes {offsets.min()} to {offsets.max()} of shared memory")
    operand = Operand(offsets, words, S.shared.gather(offsets, size))
    units, warps = _units(S, operand)
    S.shared.note_async_access(S, units, S.warps, line)
    S.shared.note_read(S, units, warps, line)
    counts.count(S, "wgmma_shared_bytes", offsets[0].size * size * S.num_programs)
    return operand


@functools.lru_cache(maxsize=4096)
def _tile(descriptor, rows, depth, size, transposed, unit):
    """Byte offsets of a rows x depth operand, and those of the units that it covers; None if unknown."""

    def field(start, bits):
        return descriptor >> start & ((1 << bits) - 1)

    start, leading, stride = (field(bit, 14) << 4 for bit in (0, 16, 32))
    swizzle = field(62, 2)
    if field(49, 3):
        return None
    pitch = PITCH[swizzle]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None]
    if not transposed and swizzle == 0:
        per_part = 16 // size
        linear = row // 8 * stride + row % 8 * 16 + k // per_part * leading + k % per_part * size
    elif not transposed:
        linear = row // 8 * stride + row % 8 * pitch + k * size
    elif swizzle == 0:
        linear = row // 8 * stride + row % 8 * size + k // 8 * leading + k % 8 * 16
    else:
        across = pitch // size
        linear = row // across * leading + row % across * size + k // 8 * stride + k % 8 * pitch
    offsets = swizzled(start + linear, SWIZZLED_BITS[swizzle]) - SHARED_BASE
    return offsets, np.unique(offsets // unit) * unit


def swizzled(address, bits):
    """Bits 4 and up of an address combined with as many from bit 7 on."""
    return address ^ ((address >> 7 & bits) << 4)


def _units(S, operand: Operand):
    """Units that an operand covers, and the warps that read them: to broadcast against each other."""
    units = S.shared.flat(operand.words) // S.shared.unit  # [programs, groups or 1, ...]
    return units[..., None], S.warps.reshape(-1, 4)[:, None, :]


def _complete(S, product):
    size = 4 if product.kind == "tf32" else 2
    for operand in (product.a, product.b):
        if isinstance(operand, Operand):
            units, warps = _units(S, operand)
            now = S.shared.gather(operand.offsets, size)
            written = S.shared.write_time[units] >= product.time
            if written.any() or not np.array_equal(now, operand.bits):
                S.report(reports.OPERAND_CHANGED, product.line)
            S.shared.mark_read(units, warps, S.batch.clocks)
    groups = len(S.warps) // 4
    if isinstance(product.a, Operand):
        a = widened(product.a.bits, product.kind)
    else:
        a = a_fragment(S, product.a, product.kind).reshape(S.num_programs, groups, 64, -1)
    a, b = (torch.from_numpy(x) for x in (a, widened(product.b.bits, product.kind)))
    d = torch.matmul(a, b.transpose(-1, -2)).numpy()
    # Warp w of a group has rows 16 w + g and 16 w + g + 8; registers 4 j to 4 j + 3 columns 8 j + 2 p, + 1.
    d = np.broadcast_to(d, (S.num_programs, groups, 64, product.n))
    d = d.reshape(S.num_programs, groups, 4, 2, 8, product.n // 8, 4, 2)  # warp, half, g, j, p, e
    d = np.ascontiguousarray(d.transpose(5, 3, 7, 0, 1, 2, 4, 6)).reshape(-1, *S.shape)
    for future, value, c in zip(product.d, d, product.c):
        future[...] = np.where(product.accumulates, value + c, value)
