"""Arithmetic of the instructions on arrays, as translated code calls it.

Not bit for bit that of a GPU: a product that is added rounds twice here (`fma`), and the special
functions are exact to half a unit. The hardware approximates them within about two, but for tanh.approx,
whose relative error reaches 2^-11, and for sin.approx and cos.approx, whose absolute error of 2^-20 or so
is many units where the result is small, and grows outside of [-pi, pi].
"""

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)


def fma(x, y, z):
    return x * y + z


def flushed(x):
    """With `.ftz` subnormal numbers are zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, x * np.float32(0), x)


def clamped(x):
    """To [0, 1], and 0 for NaN."""
    return np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))


def saturated(x):
    """A sum in 64 bits as one of 32."""
    limits = np.iinfo(np.int32)
    return np.clip(x, limits.min, limits.max).astype(np.int32)


def maximum(x, y):
    """Of floats: a NaN loses, and -0 is less than 0."""
    return _of_signed_zeros(x, y, np.fmax(x, y), np.bitwise_and)


def minimum(x, y):
    return _of_signed_zeros(x, y, np.fmin(x, y), np.bitwise_or)


def maximum_or_nan(x, y):
    return _of_signed_zeros(x, y, np.maximum(x, y), np.bitwise_and)


def minimum_or_nan(x, y):
    return _of_signed_zeros(x, y, np.minimum(x, y), np.bitwise_or)


def _of_signed_zeros(x, y, result, combine):
    """Equal numbers have the same bits, but for the sign of zeros."""
    bits = f"u{x.dtype.itemsize}"
    return np.where(x == y, combine(x.view(bits), y.view(bits)).view(x.dtype), result)


def with_signs_of(magnitude, x, y):
    """Negative where one of x and y is."""
    return np.where(np.signbit(x) ^ np.signbit(y), -magnitude, magnitude)


LANES = {"f32": np.float32, "s16": np.int16, "u16": np.uint16, "f16": np.float16, "bf16": np.uint16}


def packed(function, kind, *operands):
    """A function of the elements of registers, two of bf16x2 and one of bf16, say.

    Floats of 16 bits are computed with in float64, and rounded once.
    """
    element = kind.removesuffix("x2")
    lanes = [np.ascontiguousarray(x).view(LANES[element]).reshape(*x.shape, -1) for x in operands]
    if element == "bf16":
        lanes = [from_bf16(x) for x in lanes]
    if element in ("bf16", "f16"):
        to_bits = to_bf16 if element == "bf16" else to_f16
        result = to_bits(function(*(x.astype(np.float64) for x in lanes)))
    else:
        result = function(*lanes)
    return np.ascontiguousarray(result).view(operands[0].dtype)[..., 0]


def half_of(x, place):
    """The lower or the upper 16 bits of 32."""
    return (x >> np.uint32(16 * place)).astype(np.uint16)


def ex2(x):
    return np.exp2(x)


def lg2(x):
    return np.log2(x)


def rsqrt(x):
    return np.float32(1) / np.sqrt(x)


def sqrt(x):
    return np.sqrt(x)


def rcp(x):
    return np.float32(1) / x


def sin(x):
    return np.sin(x)


def cos(x):
    return np.cos(x)


def tanh(x):
    return np.tanh(x)


def popc(x):
    return np.bitwise_count(x).astype(np.uint32)


def clz(x):
    """How many zeros stand before the first one."""
    bits = 8 * x.dtype.itemsize
    for distance in (1, 2, 4, 8, 16, bits // 2):  # all ones from the first one on
        x = x | x >> x.dtype.type(distance)
    return np.uint32(bits) - popc(x)


def brev(x):
    """The bits in reverse."""
    data = np.ascontiguousarray(x)[..., None].view(np.uint8)
    bits = np.unpackbits(data, axis=-1, bitorder="little")[..., ::-1]
    return np.packbits(bits, axis=-1, bitorder="little").view(x.dtype)[..., 0]


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
    if x.dtype.itemsize == 8:
        return _high_product_of_64(x, y)
    wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
    bits = wide.type(8 * x.dtype.itemsize)
    return ((x.astype(wide) * y.astype(wide)) >> bits).astype(x.dtype)


def _high_product_of_64(x, y):
    """By halves: (a 2^32 + b) (c 2^32 + d)."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    ux, uy = x.view(np.uint64), y.view(np.uint64)
    (a, b), (c, d) = ((v >> half, v & low) for v in (ux, uy))
    inner = a * d + (b * d >> half)
    outer = b * c + (inner & low)
    high = a * c + (inner >> half) + (outer >> half)
    if x.dtype.kind == "i":  # a negative number was read as one that is greater by 2^64
        high = high - np.where(x < 0, uy, np.uint64(0)) - np.where(y < 0, ux, np.uint64(0))
    return high.view(x.dtype)


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
    """Rounded to the nearest, ties to even, as bits; from float32 or float64."""
    bits = (_rounded_to_odd(x) if x.dtype == np.float64 else x).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nan = np.isnan(x)
    rounded = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def _rounded_to_odd(x):
    """Float64 to float32, inexact results with a last bit of 1: a second rounding errs no more than one."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32) - (np.abs(near) > np.abs(x))
    return np.where(near == x, near, (bits | np.uint32(1)).view(np.float32))


def to_f16(x):
    bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def to_tf32(x, ties):
    """Rounded to 10 bits of mantissa, as bits of a float32: `ties` "rn" to even, "rna" away from zero."""
    bits = x.view(np.uint32)
    half = np.uint32(0x1000)
    if ties == "rn":
        half = np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), (bits + half) & np.uint32(0xFFFFE000))


def to_integer(x, dtype):
    """Saturating; NaN becomes 0, but the highest bit alone of 64."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=limits.max, neginf=limits.min)
    # The largest integer of 64 bits is none of float64: what rounds up to it is put back.
    clipped = np.clip(wide, float(limits.min), float(limits.max))
    at_most = np.where(clipped >= float(limits.max), 0, clipped).astype(dtype)
    result = np.where(clipped >= float(limits.max), dtype(limits.max), at_most)
    if limits.bits < 64:
        return result
    return np.where(np.isnan(x), np.uint64(1 << 63).astype(dtype), result)


def joined(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
