"""Fragments of matrices in the registers of a warp: `ldmatrix`, `stmatrix` and `mma`.

Thread t of a warp is written as group g = t // 4 and place p = t % 4. A register of 16-bit elements has two
of them, e = 0 and 1. In an 8 x 8 matrix row g, columns 2 p + e, belong to it (PTX ISA, "Matrix Fragments").
"""

import numpy as np
import torch

from ptx_emulator import counts
from ptx_emulator.accesses import scatter, shared_offsets
from ptx_emulator.arithmetic import from_bf16, from_f16

LANES = np.arange(32)


def ldmatrix(S, address, count, transposed, line):
    """`count` 8 x 8 matrices of 16 bits; lane 8 i + r has the address of row r of matrix i."""
    rows = _rows(S, address, count, line)  # [programs or 1, warps, count, 8]
    counts.count_bank_groups(S, "ld_shared", rows[..., None] + 4 * np.arange(4))
    words = rows[..., LANES // 4] + 4 * (LANES % 4)  # [..., count, 32]: all that is read
    _note(S, "read", words, line)
    if not transposed:
        data = S.shared.gather(words, 4)
    else:
        halves = [rows[..., 2 * (LANES % 4) + e] + 2 * (LANES // 4) for e in (0, 1)]
        low, high = (S.shared.gather(half, 2).astype(np.uint32) for half in halves)
        data = low | high << np.uint32(16)
    return [np.ascontiguousarray(data[:, :, i]).reshape(len(data), -1) for i in range(count)]


def stmatrix(S, address, values, transposed, line):
    rows = _rows(S, address, len(values), line)
    counts.count_bank_groups(S, "st_shared", rows[..., None] + 4 * np.arange(4))
    _note(S, "write", rows[..., LANES // 4] + 4 * (LANES % 4), line)
    S.batch.time += 1
    for i, value in enumerate(values):
        if not transposed:
            words = rows[:, :, i, LANES // 4] + 4 * (LANES % 4)
            scatter(S, words.reshape(len(rows), -1), 4, value, None, line)
        else:
            for e in (0, 1):
                halves = rows[:, :, i, 2 * (LANES % 4) + e] + 2 * (LANES // 4)
                bits = (value >> np.uint32(16 * e)).astype(np.uint16)
                scatter(S, halves.reshape(len(rows), -1), 2, bits, None, line)


def _rows(S, address, count, line):
    """Byte offsets of the rows of 16 bytes: [programs or 1, warps, matrices, 8]."""
    offsets = shared_offsets(S, address, 16, None, line)
    offsets = np.broadcast_to(offsets, (len(offsets), S.num_threads)).reshape(len(offsets), -1, 32)
    return offsets[..., : 8 * count].reshape(len(offsets), -1, count, 8)


def _note(S, what, words, line):
    flat = S.shared.flat(words)
    units = S.shared.units(np.broadcast_to(flat, (S.num_programs, *flat.shape[1:])), 4)
    warps = S.warps[:, None, None, None]
    if what == "read":
        S.shared.note_read(S, units, warps, line)
    else:
        S.shared.note_write(S, units, warps, line)


def widened(bits, kind):
    """Bits of a 16-bit or tf32 number as float32."""
    if kind == "tf32":  # the hardware ignores the lowest 13 bits
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return {"bf16": from_bf16, "f16": from_f16}[kind](bits)


def _registers(S, values):
    stacked = np.empty((len(values), *S.shape), np.uint32)
    for place, value in enumerate(values):
        stacked[place] = value
    return stacked


def a_fragment(S, values, kind):
    """The 16 x k operand A of each warp: [programs * warps, 16, k] in float32."""
    stacked = _registers(S, values)
    if kind == "tf32":  # registers: row half, then column half; k = 8
        parts = stacked.reshape(2, 2, -1, 8, 4)  # column half, row half, warp, g, p
        return widened(np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4)), kind).reshape(
            -1, 16, 8
        )
    parts = stacked.view(np.uint16).reshape(
        2, 2, -1, 8, 4, 2
    )  # column half, row half, warp, g, p, e
    return widened(np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4, 5)), kind).reshape(
        -1, 16, 16
    )


def _b_fragment(S, values, kind):
    """The k x 8 operand B of each warp: [programs * warps, k, 8] in float32."""
    stacked = _registers(S, values)
    if kind == "tf32":
        parts = stacked.reshape(2, -1, 8, 4)  # row half, warp, column, p
        return widened(np.ascontiguousarray(parts.transpose(1, 0, 3, 2)), kind).reshape(-1, 8, 8)
    parts = stacked.view(np.uint16).reshape(2, -1, 8, 4, 2)  # row half, warp, column, p, e
    return widened(np.ascontiguousarray(parts.transpose(1, 0, 3, 4, 2)), kind).reshape(-1, 16, 8)


def mma(S, kind, a, b, c):
    """`D = A B + C` of each warp; the products are summed in float32, in no particular order."""
    a, b = (torch.from_numpy(x) for x in (a_fragment(S, a, kind), _b_fragment(S, b, kind)))
    counts.count_matrix(S, kind, 16, 8, a.shape[-1], len(S.warps))
    d = (
        torch.bmm(a, b).numpy().reshape(S.num_programs, -1, 2, 8, 4, 2)
    )  # programs, warps, half, g, p, e
    d = np.ascontiguousarray(d.transpose(2, 5, 0, 1, 3, 4)).reshape(4, *S.shape)
    return [product + x for product, x in zip(d, c)]
