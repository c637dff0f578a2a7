"""Each instruction of arithmetic against Python's integers, or NumPy's and PyTorch's floats."""

import itertools
import math
import re
import struct

import numpy as np
import pytest
import torch

from ptx_emulator import UnsupportedInstruction, emulate
from ptx_emulator.program import Program
from tests.emulated.ptx import kernel

# Operands %r2, %r3, %r4 (and %rd2 to %rd4, of which these are the lower halves), results %r9, %rd9 or %p9.
BODY = """
    ld.param.b64 %rd10, [k_param_0];
    ld.param.b64 %rd11, [k_param_1];
    ld.param.b64 %rd12, [k_param_2];
    ld.param.b64 %rd13, [k_param_3];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd14, %r1, 8;
    add.s64 %rd15, %rd10, %rd14;
    ld.global.b64 %rd2, [%rd15];
    add.s64 %rd16, %rd11, %rd14;
    ld.global.b64 %rd3, [%rd16];
    add.s64 %rd17, %rd12, %rd14;
    ld.global.b64 %rd4, [%rd17];
    cvt.u32.u64 %r2, %rd2;
    cvt.u32.u64 %r3, %rd3;
    cvt.u32.u64 %r4, %rd4;
    cvt.u16.u64 %rs2, %rd2;
    cvt.u16.u64 %rs3, %rd3;
    cvt.u16.u64 %rs4, %rd4;
    setp.ne.b32 %p2, %r2, 0;
    {instruction}
    {result}
    add.s64 %rd18, %rd13, %rd14;
    st.global.b64 [%rd18], %rd19;
"""
RESULTS = {
    "%rs9": "cvt.u64.u16 %rd19, %rs9;",
    "%r9": "cvt.u64.u32 %rd19, %r9;",
    "%rd9": "mov.b64 %rd19, %rd9;",
    "%p9": "selp.b64 %rd19, 1, 0, %p9;",
}
EDGES = [0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 63, 64, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF,
         0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip


def target_of(instruction):
    return re.search(r"%(rs|rd|r|p)9\b", instruction)[0]


def evaluate(instruction, x, y, z):
    """The results of `instruction` on lists of 64-bit numbers, as such."""
    body = BODY.format(instruction=instruction, result=RESULTS[target_of(instruction)])
    n = len(x)
    operands = [torch.from_numpy(np.array(v, np.uint64).view(np.int64)) for v in (x, y, z)]
    result = torch.zeros(n, dtype=torch.int64)
    padding = torch.zeros(-n % 32, dtype=torch.int64)
    arguments = [torch.cat([v, padding]) for v in (*operands, result)]
    outputs = []
    with emulate(90) as emulation:
        for first in range(0, len(arguments[0]), 32):
            part = [v[first : first + 32].clone() for v in arguments]
            emulation.run_ptx(kernel(body, 4), part, (1,))
            outputs.append(part[-1])
    return torch.cat(outputs)[:n].numpy().view(np.uint64).tolist()


def signed(x, bits):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def truncated(x, y):
    """The quotient rounded towards zero."""
    return -(abs(x) // abs(y)) if (x < 0) != (y < 0) else abs(x) // abs(y)


def median(x, low, high):
    return max(low, min(x, high))


def u32(f):
    return lambda x, y, z: f(*(v & 0xFFFFFFFF for v in (x, y, z)))


def s32(f):
    return lambda x, y, z: f(*(signed(v, 32) for v in (x, y, z)))


def s64(f):
    return lambda x, y, z: f(*(signed(v, 64) for v in (x, y, z)))


def s16(f):
    return lambda x, y, z: f(*(signed(v, 16) for v in (x, y, z)))


def s16x2(f):
    """Of the lower halves and of the upper ones."""
    return lambda x, y, z: sum(
        (f(signed(x >> place, 16), signed(y >> place, 16)) & 0xFFFF) << place for place in (0, 16)
    )


def u16x2(f):
    return lambda x, y, z: sum(
        (f(x >> place & 0xFFFF, y >> place & 0xFFFF) & 0xFFFF) << place for place in (0, 16)
    )


def lookup(table):
    def f(x, y, z):
        bits = ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1) for i in range(32))
        return sum((table >> row & 1) << i for i, row in enumerate(bits))

    return f


def permuted(selection):
    def f(x, y, z):
        data = x | y << 32
        return sum((data >> 8 * (selection >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))

    return f


INTEGERS = {
    "add.s32 %r9, %r2, %r3;": u32(lambda x, y, z: x + y),
    "sub.s32 %r9, %r2, %r3;": u32(lambda x, y, z: x - y),
    "sub.s16 %rs9, %rs2, %rs3;": s16(lambda x, y, z: x - y),
    "add.s64 %rd9, %rd2, -5;": s64(lambda x, y, z: x - 5),
    "mul.lo.s32 %r9, %r2, %r3;": u32(lambda x, y, z: x * y),
    "mul.lo.s64 %rd9, %rd2, %rd3;": s64(lambda x, y, z: x * y),
    "mul.hi.u32 %r9, %r2, %r3;": u32(lambda x, y, z: x * y >> 32),
    "mul.hi.s32 %r9, %r2, %r3;": s32(lambda x, y, z: x * y >> 32),
    "mul.hi.s16 %rs9, %rs2, %rs3;": s16(lambda x, y, z: x * y >> 16),
    "mul.hi.u64 %rd9, %rd2, %rd3;": lambda x, y, z: x * y >> 64,
    "mul.hi.s64 %rd9, %rd2, %rd3;": s64(lambda x, y, z: x * y >> 64),
    "add.sat.s32 %r9, %r2, %r3;": s32(lambda x, y, z: median(x + y, -(2**31), 2**31 - 1)),
    "sub.sat.s32 %r9, %r2, %r3;": s32(lambda x, y, z: median(x - y, -(2**31), 2**31 - 1)),
    "add.s16x2 %r9, %r2, %r3;": s16x2(lambda x, y: x + y),
    "max.s16x2 %r9, %r2, %r3;": s16x2(max),
    "min.u16x2 %r9, %r2, %r3;": u16x2(min),
    "mul.wide.s32 %rd9, %r2, %r3;": s32(lambda x, y, z: x * y),
    "mul.wide.u32 %rd9, %r2, %r3;": u32(lambda x, y, z: x * y),
    "mul.wide.s16 %r9, %rs2, %rs3;": s16(lambda x, y, z: x * y),
    "mad.lo.s32 %r9, %r2, %r3, %r4;": u32(lambda x, y, z: x * y + z),
    "mad.wide.s32 %rd9, %r2, %r3, %rd4;": lambda x, y, z: signed(x, 32) * signed(y, 32) + z,
    "mad.wide.u32 %rd9, %r2, %r3, %rd4;": lambda x, y, z: (x & 0xFFFFFFFF) * (y & 0xFFFFFFFF) + z,
    "max.s32 %r9, %r2, %r3;": s32(lambda x, y, z: max(x, y)),
    "min.u32 %r9, %r2, %r3;": u32(lambda x, y, z: min(x, y)),
    "max.relu.s32 %r9, %r2, %r3;": s32(lambda x, y, z: max(x, y, 0)),
    "min.relu.s32 %r9, %r2, %r3;": s32(lambda x, y, z: max(min(x, y), 0)),
    "min.s64 %rd9, %rd2, %rd3;": s64(lambda x, y, z: min(x, y)),
    "neg.s32 %r9, %r2;": u32(lambda x, y, z: -x),
    "abs.s32 %r9, %r2;": s32(lambda x, y, z: abs(x)),
    "not.b32 %r9, %r2;": u32(lambda x, y, z: ~x),
    "and.b64 %rd9, %rd2, %rd3;": lambda x, y, z: x & y,
    "or.b16 %rs9, %rs2, %rs3;": lambda x, y, z: (x | y) & 0xFFFF,
    "xor.b32 %r9, %r2, 0xFF00FF00U;": u32(lambda x, y, z: x ^ 0xFF00FF00),
    "lop3.b32 %r9, %r2, %r3, %r4, 0x96;": u32(lookup(0x96)),
    "lop3.b32 %r9, %r2, %r3, %r4, 0xE2;": u32(lookup(0xE2)),
    "prmt.b32 %r9, %r2, %r3, 0x5410U;": u32(permuted(0x5410)),
    "prmt.b32 %r9, %r2, %r3, 0x7632U;": u32(permuted(0x7632)),
    "shl.b32 %r9, %r2, %r3;": u32(lambda x, y, z: x << y if y < 32 else 0),
    "shr.u32 %r9, %r2, %r3;": u32(lambda x, y, z: x >> y if y < 32 else 0),
    "shr.s32 %r9, %r2, %r3;": lambda x, y, z: signed(x, 32) >> min(y & 0xFFFFFFFF, 31),
    "shr.s32 %r9, %r2, 40;": s32(lambda x, y, z: x >> 31),
    "shl.b64 %rd9, %rd2, %r3;": lambda x, y, z: x << (y & 0xFFFFFFFF) if y & 0xFFFFFFFF < 64 else 0,
    "shr.u64 %rd9, %rd2, 9;": lambda x, y, z: x >> 9,
    "bfe.u32 %r9, %r2, 4, 14;": u32(lambda x, y, z: x >> 4 & 0x3FFF),
    "bfe.s32 %r9, %r2, 3, 7;": u32(lambda x, y, z: signed(x >> 3, 7)),
    "bfe.u32 %r9, %r2, 28, 8;": u32(lambda x, y, z: x >> 28),
    "bfe.s32 %r9, %r2, 28, 8;": s32(lambda x, y, z: x >> 28),
    "popc.b32 %r9, %r2;": u32(lambda x, y, z: x.bit_count()),
    "popc.b64 %r9, %rd2;": lambda x, y, z: x.bit_count(),
    "clz.b32 %r9, %r2;": u32(lambda x, y, z: 32 - x.bit_length()),
    "clz.b64 %r9, %rd2;": lambda x, y, z: 64 - x.bit_length(),
    "brev.b32 %r9, %r2;": u32(lambda x, y, z: int(f"{x:032b}"[::-1], 2)),
    "brev.b64 %rd9, %rd2;": lambda x, y, z: int(f"{x:064b}"[::-1], 2),
    "selp.b32 %r9, %r2, %r3, %p2;": u32(lambda x, y, z: x or y),
    "mov.b32 {%rs9, _}, %r2;": lambda x, y, z: x & 0xFFFF,
    "mov.b32 {_, %rs9}, %r2;": lambda x, y, z: x >> 16 & 0xFFFF,
    "mov.b32 %r9, {%rs2, %rs3};": lambda x, y, z: x & 0xFFFF | (y & 0xFFFF) << 16,
    "mov.b64 %rd9, {%r2, %r3};": lambda x, y, z: x & 0xFFFFFFFF | (y & 0xFFFFFFFF) << 32,
    "mov.b64 {_, _, %rs9, _}, %rd2;": lambda x, y, z: x >> 32,
    "mov.b64 %rd9, {%rs2, %rs3, %rs3, %rs2};": lambda x, y, z: (x & 0xFFFF) * (1 | 1 << 48)
    | (y & 0xFFFF) * (1 << 16 | 1 << 32),
    "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;": lambda x, y, z: 0,
    "cvt.s64.s32 %rd9, %r2;": s32(lambda x, y, z: x),
    "cvt.u64.u32 %rd9, %r2;": u32(lambda x, y, z: x),
    "cvt.s16.s8 %rs9, %rs2;": lambda x, y, z: signed(x, 8),
    "cvt.s32.s8 %r9, %r2;": lambda x, y, z: signed(x, 8),
    "cvt.u32.u16 %r9, %rs2;": lambda x, y, z: x & 0xFFFF,
    "setp.lt.s32 %p9, %r2, %r3;": s32(lambda x, y, z: x < y),
    "setp.lt.u32 %p9, %r2, %r3;": u32(lambda x, y, z: x < y),
    "setp.hs.u32 %p9, %r2, %r3;": u32(lambda x, y, z: x >= y),
    "setp.ge.s64 %p9, %rd2, %rd3;": s64(lambda x, y, z: x >= y),
    "setp.eq.b16 %p9, %rs2, %rs3;": lambda x, y, z: x & 0xFFFF == y & 0xFFFF,
}  # fmt: skip


@pytest.mark.parametrize("instruction", INTEGERS, ids=lambda x: x.split()[0] + x.split(",")[-1])
def test_integers(instruction):
    pairs = list(itertools.product(EDGES, repeat=2))
    x, y = zip(*pairs)
    z = [pow(3, 41 + i, 2**64) for i in range(len(x))]
    bits = {"%rs9": 16, "%r9": 32, "%rd9": 64, "%p9": 1}[target_of(instruction)]
    expected = [INTEGERS[instruction](*v) & ((1 << bits) - 1) for v in zip(x, y, z)]
    assert evaluate(instruction, x, y, z) == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
@pytest.mark.parametrize("opcode", ["div", "rem"])
def test_quotients(opcode, kind):
    bits, prefix = int(kind[1:]), "%rd" if kind == "s64" else "%r"
    x, y = zip(*[v for v in itertools.product(EDGES, repeat=2) if v[1] & ((1 << bits) - 1)])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v & ((1 << bits) - 1))
    quotients = [truncated(read(a), read(b)) for a, b in zip(x, y)]
    expected = [q if opcode == "div" else read(a) - q * read(b) for q, a, b in zip(quotients, x, y)]
    result = evaluate(f"{opcode}.{kind} {prefix}9, {prefix}2, {prefix}3;", x, y, x)
    assert result == [v & ((1 << bits) - 1) for v in expected]


FLOATS = [0.0, -0.0, 1.0, -1.0, 0.1, 3.7, -2.5, 0.5, 1.5, 1e-40, 1e-30, 3e38, 65504.0, 65520.0, 1e-7,
          math.inf, -math.inf, math.nan, 2147483648.0, -2147483648.0, 100.25, 88.0, -126.5, 5e9]  # fmt: skip


def bits_of(values):
    return [struct.unpack("<I", struct.pack("<f", v))[0] for v in values]


def same(result, expected):
    """Equal bit for bit, but for which NaN it is."""
    result, expected = (torch.as_tensor(np.asarray(v)) for v in (result, expected))
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(1.0), expected.nan_to_num(1.0))


def f32(bits):
    return np.array(bits, np.uint64).astype(np.uint32).view(np.float32)


BINARY = {
    "add.f32": torch.add,
    "sub.f32": torch.sub,
    "mul.f32": torch.mul,
    "div.rn.f32": torch.div,
    "max.f32": torch.fmax,
    "min.f32": torch.fmin,
    "max.NaN.f32": torch.maximum,
    "min.NaN.f32": torch.minimum,
}


@pytest.mark.parametrize("opcode", BINARY)
def test_floats(opcode):
    x, y = (torch.tensor(v) for v in zip(*itertools.product(FLOATS, repeat=2)))
    result = evaluate(
        f"{opcode} %r9, %r2, %r3;", bits_of(x.tolist()), bits_of(y.tolist()), [0] * len(x)
    )
    same(f32(result), BINARY[opcode](x, y).numpy())


def flushed(x):
    return torch.where(x.abs() < 2.0**-126, 0 * x, x)


def clamped(x):
    return x.nan_to_num(0.0).clamp(0, 1)


SUBNORMAL = [
    0.0,
    -0.0,
    1e-40,
    -1e-40,
    2.0**-126,
    -(2.0**-126),
    3e-38,
    1.0,
    -2.5,
    1e-3,
    math.inf,
    math.nan,
]
MODIFIED = {  # with the operation and what is done to operands and to the result
    "add.ftz.f32": (torch.add, flushed, flushed),
    "sub.ftz.f32": (torch.sub, flushed, flushed),
    "mul.ftz.f32": (torch.mul, flushed, flushed),
    "div.full.ftz.f32": (torch.div, flushed, flushed),
    "max.ftz.f32": (torch.fmax, flushed, flushed),
    "min.ftz.f32": (torch.fmin, flushed, flushed),
    "add.sat.f32": (torch.add, torch.clone, clamped),
    "sub.ftz.sat.f32": (torch.sub, flushed, clamped),
    "mul.rn.sat.f32": (torch.mul, torch.clone, clamped),
    "fma.rn.ftz.f32": (lambda x, y: x * y + x, flushed, flushed),
    "fma.rn.sat.f32": (lambda x, y: x * y + x, torch.clone, clamped),
    "min.xorsign.abs.f32": (
        lambda x, y: torch.fmin(x.abs(), y.abs()) * x.sign() * y.sign(), torch.clone, torch.clone
    ),
}  # fmt: skip


@pytest.mark.parametrize("opcode", MODIFIED)
def test_modified_floats(opcode):
    function, before, after = MODIFIED[opcode]
    x, y = (torch.tensor(v) for v in zip(*itertools.product(SUBNORMAL, repeat=2)))
    if "xorsign" in opcode:
        x, y = x.nan_to_num(1.0), y.nan_to_num(2.0)
    third = ", %r2" if opcode.startswith("fma") else ""
    bits = bits_of(x.tolist()), bits_of(y.tolist())
    result = evaluate(f"{opcode} %r9, %r2, %r3{third};", *bits, bits[0])
    same(f32(result), after(function(before(x), before(y))).numpy())


@pytest.mark.parametrize("opcode, zero", [("max.f32", 0), ("max.NaN.f32", 0), ("min.f32", 1 << 31)])
def test_zeros_have_an_order(opcode, zero):
    x, y = [0, 1 << 31], [1 << 31, 0]
    assert evaluate(f"{opcode} %r9, %r2, %r3;", x, y, x) == [zero, zero]
    assert evaluate(f"{opcode} %r9, %r2, %r2;", x, y, x) == x


@pytest.mark.parametrize("rounding, function", [("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil),
                                                ("rni", np.rint)])  # fmt: skip
def test_roundings_to_whole_floats(rounding, function):
    bits = bits_of(FLOATS)
    result = evaluate(f"cvt.{rounding}.f32.f32 %r9, %r2;", bits, bits, bits)
    same(f32(result), function(f32(bits)))
    tiny = bits_of([1e-40, -1e-40])
    assert evaluate(f"cvt.{rounding}.ftz.f32.f32 %r9, %r2;", tiny, tiny, tiny) == [0, 1 << 31]


def test_comparisons_without_subnormal_numbers():
    x, y = bits_of([1e-40, 1e-40, 1.0]), bits_of([0.0, 1e-30, 0.0])
    assert evaluate("setp.gt.f32 %p9, %r2, %r3;", x, y, x) == [1, 0, 1]
    assert evaluate("setp.gt.ftz.f32 %p9, %r2, %r3;", x, y, x) == [0, 0, 1]


@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "ge", "equ", "neu", "ltu", "nan", "num"])
def test_comparisons_of_floats(comparison):
    """Ordered ones are false of NaN, those that end in u are true of it."""
    pairs = list(itertools.product(FLOATS, repeat=2))
    x, y = zip(*pairs)
    plain = {"eq": float.__eq__, "ne": float.__ne__, "lt": float.__lt__, "ge": float.__ge__}
    expected = []
    for a, b in (f32(bits_of(p)).astype(float).tolist() for p in pairs):
        unordered = math.isnan(a) or math.isnan(b)
        if comparison in ("nan", "num"):
            expected.append(unordered == (comparison == "nan"))
        else:
            ordered = plain[comparison[:2]](a, b)
            expected.append(
                unordered or ordered if comparison.endswith("u") else not unordered and ordered
            )
    result = evaluate(f"setp.{comparison}.f32 %p9, %r2, %r3;", bits_of(x), bits_of(y), [0] * len(x))
    assert result == [int(v) for v in expected]


TO_16_BITS = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("kind", TO_16_BITS)
def test_conversions_to_and_from_16_bits(kind):
    x = torch.cat([torch.tensor(FLOATS), torch.randn(1000) * 10.0 ** torch.randint(-8, 6, (1000,))])
    rounded = x.to(TO_16_BITS[kind])
    bits = bits_of(x.tolist())
    narrow = np.array(evaluate(f"cvt.rn.{kind}.f32 %rs9, %r2;", bits, bits, bits), np.uint64)
    back = torch.from_numpy(narrow.astype(np.uint16).view(np.int16)).view(TO_16_BITS[kind])
    same(back.float().numpy(), rounded.float().numpy())
    pair = np.array(
        evaluate(f"cvt.rn.{kind}x2.f32 %r9, %r2, %r3;", bits, bits[::-1], bits), np.uint64
    )
    assert ((pair >> np.uint64(16)) == narrow).all() and (
        (pair & np.uint64(0xFFFF)) == narrow[::-1]
    ).all()
    wide = evaluate(f"cvt.f32.{kind} %r9, %rs2;", narrow.tolist(), bits, bits)
    same(f32(wide), rounded.float().numpy())


def half_bits(x):
    return x.view(torch.int16).numpy().view(np.uint16).astype(np.uint64)


def half(bits, kind):
    return torch.from_numpy(np.array(bits, np.uint64).astype(np.uint16).view(np.int16)).view(
        TO_16_BITS[kind]
    )


HALF_ARITHMETIC = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "fma.rn": lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype),
    "max": torch.fmax,
    "min": torch.fmin,
    "max.NaN": torch.maximum,
    "min.NaN": torch.minimum,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
}


@pytest.mark.parametrize("kind", TO_16_BITS)
@pytest.mark.parametrize("opcode", HALF_ARITHMETIC)
def test_arithmetic_of_16_bits(opcode, kind):
    edges = torch.tensor(list(itertools.product(FLOATS, repeat=2))).to(TO_16_BITS[kind])
    x, y = torch.cat([edges, torch.randn(500, 2).to(TO_16_BITS[kind])]).unbind(1)
    expected = HALF_ARITHMETIC[opcode](x, y).float().numpy()
    a, b = half_bits(x).tolist(), half_bits(y).tolist()
    operands = {"fma.rn": "2 3 2", "neg": "2", "abs": "2"}.get(opcode, "2 3").split()
    one = ", ".join(f"%rs{n}" for n in ("9", *operands))
    same(half(evaluate(f"{opcode}.{kind} {one};", a, b, a), kind).float().numpy(), expected)
    two = ", ".join(f"%r{n}" for n in ("9", *operands))
    pairs = [[u | v << 16 for u, v in zip(c, c[::-1])] for c in (a, b)]
    result = np.array(evaluate(f"{opcode}.{kind}x2 {two};", *pairs, pairs[0]), np.uint64)
    same(half(result & np.uint64(0xFFFF), kind).float().numpy(), expected)
    same(half(result >> np.uint64(16), kind).float().numpy()[::-1].copy(), expected)


@pytest.mark.parametrize("kind", TO_16_BITS)
def test_comparisons_of_16_bits(kind):
    x, y = torch.tensor(list(itertools.product(FLOATS, repeat=2))).to(TO_16_BITS[kind]).unbind(1)
    a, b = half_bits(x).tolist(), half_bits(y).tolist()
    assert evaluate(f"setp.lt.{kind} %p9, %rs2, %rs3;", a, b, a) == (x < y).int().tolist()
    assert evaluate(f"setp.geu.{kind} %p9, %rs2, %rs3;", a, b, a) == (~(x < y)).int().tolist()
    pairs = [[u | v << 16 for u, v in zip(c, c[::-1])] for c in (a, b)]
    for targets, expected in (("%p9|%p8", x < y), ("%p8|%p9", (x < y).flip(0))):
        result = evaluate(f"setp.lt.{kind}x2 {targets}, %r2, %r3;", *pairs, pairs[0])
        assert result == expected.int().tolist()


@pytest.mark.parametrize("kind", TO_16_BITS)
def test_more_conversions_of_16_bits(kind):
    """Of integers rounded once: 2^24 + 2^16 + 1 becomes 2^24 + 2^17, and by way of float32 would not."""
    x = [*EDGES, 0x1010001]
    expected = torch.tensor([signed(v, 32) for v in x]).double()
    steps = torch.frexp(expected)[1] - (8 if kind == "bf16" else 11)
    if kind == "f16":
        expected = expected.to(torch.float16)
    else:
        expected = torch.ldexp(torch.round(torch.ldexp(expected, -steps)), steps)
    result = half(evaluate(f"cvt.rn.{kind}.s32 %rs9, %r2;", x, x, x), kind)
    same(result.float().numpy(), expected.float().numpy())
    values = torch.tensor(FLOATS).to(TO_16_BITS[kind])
    bits = half_bits(values).tolist()
    result = evaluate(f"cvt.rzi.s64.{kind} %rd9, %rs2;", bits, bits, bits)
    for value, got in zip(values.tolist(), result):
        value = -math.inf if math.isnan(value) else value
        assert got == int(median(value, -(2**63), 2**63 - 1)) & (2**64 - 1)
    other = "f16" if kind == "bf16" else "bf16"
    result = evaluate(f"cvt.rn.{other}.{kind} %rs9, %rs2;", bits, bits, bits)
    same(half(result, other).float().numpy(), values.float().to(TO_16_BITS[other]).float().numpy())
    bits = bits_of(FLOATS)
    result = half(evaluate(f"cvt.rn.relu.{kind}.f32 %rs9, %r2;", bits, bits, bits), kind)
    same(result.float().numpy(), torch.tensor(FLOATS).relu().to(TO_16_BITS[kind]).float().numpy())


def test_conversions_to_tf32():
    x = [0x3F801000, 0x3F803000, 0x3F800FFF, 0x7FFFFFFF, 0xFF800000, 0x7F800001]
    away = [0x3F802000, 0x3F804000, 0x3F800000, 0x7FFFFFFF, 0xFF800000, 0x7FFFFFFF]
    assert evaluate("cvt.rna.tf32.f32 %r9, %r2;", x, x, x) == away
    assert evaluate("cvt.rn.tf32.f32 %r9, %r2;", x, x, x) == [0x3F800000, *away[1:]]


@pytest.mark.parametrize("rounding, function", [("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil),
                                                ("rni", round)])  # fmt: skip
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_conversions_to_integers(rounding, function, kind):
    """Saturating, and 0 for NaN, or 2^63 of 64 bits."""
    bits = int(kind[1:])
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    nan, result = (0, "%r9") if bits == 32 else (2**63, "%rd9")
    expected = []
    for v in f32(bits_of(FLOATS)).astype(float).tolist():
        if not math.isfinite(v):
            expected.append(nan if math.isnan(v) else limits[v > 0])
        else:
            expected.append(median(function(v), *limits))
    x = bits_of(FLOATS)
    result = evaluate(f"cvt.{rounding}.{kind}.f32 {result}, %r2;", x, x, x)
    assert result == [v & ((1 << bits) - 1) for v in expected]


def test_conversions_from_integers():
    x = list(EDGES)
    result = evaluate("cvt.rn.f32.s32 %r9, %r2;", x, x, x)
    same(f32(result), np.array([signed(v, 32) for v in x]).astype(np.float32))


FUNCTIONS = {
    "ex2.approx.f32": torch.exp2,
    "ex2.approx.ftz.f32": torch.exp2,
    "lg2.approx.f32": torch.log2,
    "rsqrt.approx.ftz.f32": torch.rsqrt,
    "sqrt.rn.f32": torch.sqrt,
    "rcp.approx.ftz.f32": torch.reciprocal,
    "tanh.approx.f32": torch.tanh,
    "sin.approx.f32": torch.sin,
    "cos.approx.f32": torch.cos,
}


@pytest.mark.parametrize("opcode", FUNCTIONS)
def test_special_functions(opcode):
    """The hardware's own error is not emulated. `ftz` makes 0 of subnormal numbers."""
    x = torch.tensor(FLOATS)
    x = (
        x[(x.abs() < 4e9) | ~x.isfinite()]
        if opcode[:3] not in ("sin", "cos")
        else torch.linspace(-9, 9, 32)
    )
    bits = bits_of(x.tolist())
    result = torch.from_numpy(f32(evaluate(f"{opcode} %r9, %r2;", bits, bits, bits)).copy())
    if ".ftz." in opcode:
        x = torch.where(x.abs() < 2.0**-126, 0 * x, x)
    torch.testing.assert_close(
        result, FUNCTIONS[opcode](x.double()).float(), rtol=5e-7, atol=1e-38, equal_nan=True
    )


def test_fma_and_packed_pairs():
    x, y, z = (torch.randn(64) for _ in range(3))
    bits = [bits_of(v.tolist()) for v in (x, y, z)]
    expected = (x.double() * y.double() + z.double()).float()
    result = torch.from_numpy(f32(evaluate("fma.rn.f32 %r9, %r2, %r3, %r4;", *bits)).copy())
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    packed = [[v | v << 32 for v in b] for b in bits]
    result = np.array(evaluate("fma.rn.f32x2 %rd9, %rd2, %rd3, %rd4;", *packed), np.uint64).view(
        np.float32
    )
    torch.testing.assert_close(torch.from_numpy(result[::2].copy()), expected, rtol=1e-6, atol=1e-7)
    assert np.array_equal(result[::2], result[1::2])


LANES = np.arange(32)
SHUFFLES = {
    "shfl.sync.bfly.b32 %r9, %r2, 5, 31, -1;": LANES ^ 5,
    "shfl.sync.idx.b32 %r9, %r2, 7, 31, -1;": np.full(32, 7),
    "shfl.sync.idx.b32 %r9, %r2, %r3, 31, -1;": (LANES * 3 + 1) % 32,
    "shfl.sync.up.b32 %r9, %r2, 3, 0, -1;": np.where(LANES >= 3, LANES - 3, LANES),
    "shfl.sync.down.b32 %r9, %r2, 3, 31, -1;": np.where(LANES < 29, LANES + 3, LANES),
}  # fmt: skip


@pytest.mark.parametrize(
    "instruction", SHUFFLES, ids=lambda x: " ".join(x.split()[0:1]) + x.split(",")[-3]
)
def test_shuffles(instruction):
    x = (LANES * 11 + 3).tolist()
    y = ((LANES * 3 + 1) % 32).tolist()
    assert evaluate(instruction, x, y, x) == [x[i] for i in SHUFFLES[instruction]]


@pytest.mark.parametrize("kind, function", [("add.s32", sum), ("max.s32", max), ("min.u32", min)])
def test_reductions_of_a_warp(kind, function):
    x = (LANES * 7919 % 101).tolist()
    assert evaluate(f"redux.sync.{kind} %r9, %r2, -1;", x, x, x) == [function(x)] * 32


def test_votes():
    x = [0, 1, 1, 0] * 8
    assert evaluate("vote.sync.ballot.b32 %r9, %p2, -1;", x, x, x) == [0x66666666] * 32


def test_predicated_instructions_leave_the_others_alone():
    x = [0, 5, 0, 9] * 8
    result = evaluate("mov.b32 %r9, %r3; @%p2 add.s32 %r9, %r2, 1;", x, [77] * 32, x)
    assert result == [77, 6, 77, 10] * 8


UNKNOWN = [
    "add.f64 %rd9, %rd2, %rd3;",
    "setp.lt.and.s32 %p9, %r2, %r3, %p2;",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd9}, {%rd2}, {%rd3}, {%rd4};",
    "no.such.instruction %r9, %r2;",
    "add.rz.f32 %r9, %r2, %r3;",
    "mul.rz.ftz.f32 %r9, %r2, %r3;",
    "fma.rm.f32 %r9, %r2, %r3, %r4;",
    "mad.lo.cc.u32 %r9, %r2, %r3, %r4;",
    "max.f32 %r9, %r2, %r3, %r4;",
    "prmt.b32.f4e %r9, %r2, %r3, 1;",
    "bfe.u32 %r9, %r2, 32, 8;",
    "cvt.s32.f32 %r9, %r2;",
    "cvt.sat.s8.s32 %r9, %r2;",
    "cvt.rz.bf16.f32 %rs9, %r2;",
    "shfl.sync.idx.b32 %r9, %r2, 0, 0x101f, -1;",
    "shfl.sync.idx.b32 %r9, %r2, 0, 31, 0xff;",
    "vote.sync.ballot.b32 %r9, %p2, 0xff;",
    "mov.u32 %r9, %laneid;",
    "ld.local.b32 %r9, [%rd10];",
    "ld.b32 %r9, [%rd10];",
    "ld.global.v8.b32 {%r9, %r20, %r21, %r22, %r23, %r24, %r25, %r26}, [%rd10];",
    "ld.global.v4.b64 {%rd9, %rd20, %rd21, %rd22}, [%rd10];",
    "bra $NOWHERE;",
    "bra;",
    "bar.sync 16;",
    "bar.sync 1, 48;",
    "@%p2 bar.sync 0;",
    "@%p2 ret;",
    "@%p2 cp.async.commit_group;",
    "@%p2 cp.async.wait_group 0;",
    "@%p2 cp.async.wait_all;",
    "@%p2 wgmma.fence.sync.aligned;",
    "@%p2 wgmma.commit_group.sync.aligned;",
    "@%p2 wgmma.wait_group.sync.aligned 0;",
    "cp;",
    "mbarrier;",
]


@pytest.mark.parametrize("instruction", UNKNOWN, ids=lambda x: x.split(";")[0][:45])
def test_what_is_not_known_is_one_clear_error(instruction):
    lines = kernel(BODY.format(instruction=instruction, result=""), 4).splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if instruction in text)
    with pytest.raises(UnsupportedInstruction) as error:
        Program("\n".join(lines))
    assert f"line {line}: {instruction.rstrip(';')}" in str(error.value)


def test_no_part_of_an_opcode_is_passed_over():
    known = [*INTEGERS, *SHUFFLES, *(f"{x} %r9, %r2, %r3;" for x in BINARY | MODIFIED | FUNCTIONS)]
    for instruction in known:
        opcode, operands = instruction.split(" ", 1)
        parts = opcode.split(".")
        for place in range(1, len(parts) + 1):
            changed = ".".join([*parts[:place], "rz", *parts[place:]])
            with pytest.raises(UnsupportedInstruction):
                Program(kernel(f"{changed} {operands}"))


def test_calls_of_functions_are_not_emulated():
    for text in ("st.param.b32 [param0], %r1;", "call.uni (retval0), square, (param0);"):
        with pytest.raises(UnsupportedInstruction, match="calls of functions are not emulated"):
            Program(kernel(f"{{ // callseq 0, 0\n.param .b32 param0;\n{text}\n}} // callseq 0"))


@pytest.mark.parametrize(
    "ptx, message",
    [
        ("hello", "without .entry"),
        (kernel("").replace(".reqntid 32", ""), "number of threads is unknown"),
        (kernel("", num_threads=40), "whole warps"),
        (kernel("", num_threads=2048), "whole warps"),
        (kernel("").replace(".reqntid 32", ".reqntid 32, 2"), "whole warps"),
    ],
    ids=["no kernel", "no threads", "a part of a warp", "64 warps", "two axes"],
)
def test_what_is_no_kernel_of_whole_warps(ptx, message):
    with pytest.raises(UnsupportedInstruction, match=message):
        Program(ptx)


def test_fences_of_global_memory_are_none_of_shared_memory():
    """A fence covers the threads that execute it, and only the one of shared memory is about it."""

    def fence(text):
        source = Program(kernel(f"setp.ne.b32 %p1, 0, 1;\n{text};")).source
        return re.findall(r"proxy_fence\(S, (.*)\)", source)

    assert fence("fence.proxy.async") == fence("fence.proxy.async.shared::cta") == ["None"]
    assert fence("fence.proxy.async.global") == []
    assert len(fence("@%p1 fence.proxy.async.shared::cta")) == 1
    assert fence("@%p1 fence.proxy.async.shared::cta") != ["None"]
