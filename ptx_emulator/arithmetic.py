"""Arithmetic of the instructions on arrays, as translated code calls it.

Not bit for bit that of a GPU: a product that is added rounds twice here (`fma`), and the special
functions are exact to half a unit where the hardware approximates within two.
"""

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)


def fma(x, y, z):
    return x * y + z


def packed(opcode, *operands):
    """add, sub, mul or fma of pairs of float32 in 64 bits."""
    pairs = [np.ascontiguousarray(x).view(np.float32).reshape(*x.shape, 2) for x in operands]
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma}[opcode]
    return np.ascontiguousarray(function(*pairs)).view(np.uint64)[..., 0]


def _flushed(x):
    return np.where(np.abs(x) < SMALLEST_NORMAL, x * np.float32(0), x)


def ex2(x, ftz):
    return _flushed(np.exp2(_flushed(x))) if ftz else np.exp2(x)


def lg2(x, ftz):
    return np.log2(_flushed(x) if ftz else x)


def rsqrt(x, ftz):
    return np.float32(1) / np.sqrt(_flushed(x) if ftz else x)


def sqrt(x, ftz):
    return np.sqrt(_flushed(x) if ftz else x)


def rcp(x, ftz):
    return np.float32(1) / (_flushed(x) if ftz else x)


def sin(x, ftz):
    return np.sin(x)


def cos(x, ftz):
    return np.cos(x)


def tanh(x, ftz):
    return np.tanh(x)


def quotient(x, y):
    """Of integers, towards zero; all ones where the divisor is 0."""
    zero = y == 0
    y = np.where(zero, y.dtype.type(1), y)
    floor = x // y
    if x.dtype.kind == "i":
        floor = floor + ((floor < 0) & (floor * y != x))
    return np.where(zero, np.array(-1).astype(y.dtype), floor).astype(x.dtype)


def remainder(x, y):
    return np.where(y == 0, x, x - quotient(x, y) * y).astype(x.dtype)


def high_product(x, y):
    """The upper half of a product."""
    wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
    bits = wide.type(8 * x.dtype.itemsize)
    return ((x.astype(wide) * y.astype(wide)) >> bits).astype(x.dtype)


def shifted_left(x, distance):
    bits = 8 * x.dtype.itemsize
    shifted = x << np.minimum(distance, bits - 1).astype(x.dtype)
    return np.where(distance >= bits, x.dtype.type(0), shifted)


def shifted_right(x, distance):
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(distance, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(distance >= bits, x.dtype.type(0), shifted)


def truth_table(x, y, z, table):
    result = np.uint32(0)
    for row in range(8):
        if table >> row & 1:
            terms = [v if row >> place & 1 else ~v for v, place in ((x, 2), (y, 1), (z, 0))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result + np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), np.uint32)


def chosen_bytes(low, high, selection):
    """Byte i of the result is byte `selection >> 4 i & 7` of the eight, or its sign with bit 3."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for place in range(4):
        choice = selection >> 4 * place & 15
        byte = (both >> np.uint64(8 * (choice & 7))).astype(np.uint8)
        if choice & 8:
            byte = np.where(byte >> np.uint8(7), np.uint8(0xFF), np.uint8(0))
        result = result | byte.astype(np.uint32) << np.uint32(8 * place)
    return result


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(bits):
    return bits.view(np.float16).astype(np.float32)


def to_bf16(x):
    """Rounded to the nearest, ties to even, as bits."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nan = np.isnan(x)
    rounded = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def to_f16(x):
    return x.astype(np.float16).view(np.uint16)


def to_tf32(x):
    """Rounded to 10 bits of mantissa, ties away from zero, as bits of a float32."""
    return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def to_integer(x, dtype):
    """Saturating, and 0 for NaN."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=limits.max, neginf=limits.min)
    # The largest integer of 64 bits is none of float64: what rounds up to it is put back.
    clipped = np.clip(wide, float(limits.min), float(limits.max))
    at_most = np.where(clipped >= float(limits.max), 0, clipped).astype(dtype)
    return np.where(clipped >= float(limits.max), dtype(limits.max), at_most)


def joined(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
