"""What each instruction on registers alone does, as Python: one emitter for each opcode.

An emitter gets the translator, to read operands and write registers with, and the instruction; it
returns lines of Python. Only the forms that `forms.py` lists get here. An operand that the emitter does not
know makes it raise a ValueError or KeyError, which the translator turns into an error with the line. The
functions that these lines call are in `arithmetic.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptx_emulator.parser import Instruction, number, vector
from ptx_emulator.types import numpy_name, plain, size_of, unsigned

if TYPE_CHECKING:
    from ptx_emulator.translator import Translator

COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


FUNCTIONS = {
    "add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "fma": "fma",
    "neg": "np.negative", "abs": "np.abs",
}  # fmt: skip
ROUNDINGS = {"rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil", "rni": "np.rint"}


# --- registers ------------------------------------------------------------------------------------------


def _mov(t: Translator, i: Instruction) -> list[str]:
    target, source = i.operands
    parts = vector(target if target.startswith("{") else source)
    if "{" in target + source:
        bits = 8 * size_of(i.parts[-1]) // len(parts)
        wide, narrow = plain(i.parts[-1]), f"u{bits}"
        distances = [t.constant(bits * place, wide) for place in range(len(parts))]
    if target.startswith("{"):
        value = t.read(source, wide)
        values = [f"({value} >> {x}).astype({numpy_name(narrow)})" for x in distances]
        return [t.write(x, v, narrow, i) for x, v in zip(parts, values) if x != "_"]
    if source.startswith("{"):
        lowest, *others = (f"{t.read(x, narrow)}.astype({numpy_name(wide)})" for x in parts)
        shifted = [f"({value} << {x})" for value, x in zip(others, distances[1:])]
        return [t.write(target, " | ".join([lowest, *shifted]), wide, i)]
    if source == "%clock64" or source.startswith("%globaltimer"):
        raise ValueError("there is no time in the emulator")
    own = t.type_of(target)
    return [t.write(target, t.read(source, own), own, i)]


def _cvta(t: Translator, i: Instruction) -> list[str]:
    return [t.write(i.operands[0], t.read(i.operands[1], "u64"), "u64", i)]


def _selp(t: Translator, i: Instruction) -> list[str]:
    target, yes, no, condition = i.operands
    own = t.type_of(target)
    expression = f"where({t.read(condition, 'pred')}, {t.read(yes, own)}, {t.read(no, own)})"
    return [t.write(target, expression, own, i)]


def _setp(t: Translator, i: Instruction) -> list[str]:
    type, (targets, *operands) = i.parts[-1], i.operands
    targets = targets.split("|")
    if len(operands) != 2 or len(targets) != (2 if type.endswith("x2") else 1):
        raise ValueError("a comparison combined with a predicate, or with two results")
    if "f16" not in type:
        x, y = (_read(t, i, operand, plain(type)) for operand in operands)
        return [t.write(targets[0], _compared(i, x, y), "pred", i)]
    lines, own = [], "u32" if type.endswith("x2") else "u16"
    for place, target in enumerate(targets):
        halves = (f"half_of({t.read(operand, own)}, {place})" for operand in operands)
        x, y = (f"from_{type.removesuffix('x2')}({half})" for half in halves)
        lines.append(t.write(target, _compared(i, x, y), "pred", i))
    return lines


def _compared(i: Instruction, x: str, y: str) -> str:
    comparison = i.parts[1]
    if "f" not in i.parts[-1]:
        return f"{x} {COMPARISONS[comparison]} {y}"
    if comparison == "ne":  # false, too, where one is NaN
        return f"({x} < {y}) | ({x} > {y})"
    if comparison in COMPARISONS:
        return f"{x} {COMPARISONS[comparison]} {y}"
    unordered = f"np.isnan({x}) | np.isnan({y})"
    if comparison in ("num", "nan"):
        return unordered if comparison == "nan" else f"~({unordered})"
    # True also where one is NaN: equ, ltu, ...
    return f"({x} {COMPARISONS[comparison.removesuffix('u')]} {y}) | {unordered}"


# --- arithmetic -----------------------------------------------------------------------------------------


def _read(t: Translator, i: Instruction, operand: str, type: str) -> str:
    """An operand, without subnormal numbers where the instruction says `ftz`."""
    value = t.read(operand, type)
    return f"flushed({value})" if "ftz" in i.parts else value


def _write_f32(t: Translator, i: Instruction, expression: str) -> list[str]:
    """The result of an instruction on float32, as its `ftz` and `sat` have it."""
    for part, function in (("ftz", "flushed"), ("sat", "clamped")):
        if part in i.parts:
            expression = f"{function}({expression})"
    return [t.write(i.operands[0], expression, "f32", i)]


def _sum_or_product(t: Translator, i: Instruction) -> list[str]:
    target, x, y = i.operands
    type = i.parts[-1]
    if _is_packed(type):
        return _packed(t, i)
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.opcode]
    if type == "f32":
        return _write_f32(t, i, f"{_read(t, i, x, type)} {sign} {_read(t, i, y, type)}")
    if "hi" in i.parts:
        return [t.write(target, f"high_product({t.read(x, type)}, {t.read(y, type)})", type, i)]
    if "wide" in i.parts:
        return [t.write(target, *_wide_product(t, x, y, type), i)]
    if "sat" in i.parts:
        x, y = (f"{t.read(operand, type)}.astype(np.int64)" for operand in (x, y))
        return [t.write(target, f"saturated({x} {sign} {y})", type, i)]
    type = unsigned(type)
    return [t.write(target, f"{t.read(x, type)} {sign} {t.read(y, type)}", type, i)]


def _wide_product(t: Translator, x: str, y: str, type: str) -> tuple[str, str]:
    wide = f"{type[0]}{16 * size_of(type)}"
    x, y = (f"{t.read(operand, type)}.astype({numpy_name(wide)})" for operand in (x, y))
    return f"{x} * {y}", wide


def _mad(t: Translator, i: Instruction) -> list[str]:
    target, x, y, z = i.operands
    type = unsigned(i.parts[-1])
    if i.parts[1] == "wide":
        product, wide = _wide_product(t, x, y, i.parts[-1])
        return [t.write(target, f"{product} + {t.read(z, wide)}", wide, i)]
    expression = f"{t.read(x, type)} * {t.read(y, type)} + {t.read(z, type)}"
    return [t.write(target, expression, type, i)]


def _fma(t: Translator, i: Instruction) -> list[str]:
    if _is_packed(i.parts[-1]):
        return _packed(t, i)
    operands = ", ".join(_read(t, i, x, "f32") for x in i.operands[1:])
    return _write_f32(t, i, f"fma({operands})")


def _is_packed(type: str) -> bool:
    """Whether a register holds elements that NumPy must be shown: two of them, or one of 16 bits."""
    return type.endswith("x2") or "f16" in type


def _packed(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    own = {"f32x2": "u64", "f16": "u16", "bf16": "u16"}.get(type, "u32")
    operands = ", ".join(t.read(x, own) for x in i.operands[1:])
    function = FUNCTIONS.get(i.opcode) or _extreme_function(i)
    return [t.write(i.operands[0], f"packed({function}, {type!r}, {operands})", own, i)]


def _div_or_rem(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    x, y = (_read(t, i, operand, type) for operand in i.operands[1:])
    if type == "f32":
        return _write_f32(t, i, f"{x} / {y}")
    name = {"div": "quotient", "rem": "remainder"}[i.opcode]
    return [t.write(i.operands[0], f"{name}({x}, {y})", type, i)]


def _extreme(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    if len(i.operands) != 3:
        raise ValueError("of three operands")
    if _is_packed(type):
        return _packed(t, i)
    x, y = (_read(t, i, operand, type) for operand in i.operands[1:])
    if "xorsign" in i.parts:
        magnitude = f"{_extreme_function(i)}(np.abs({x}), np.abs({y}))"
        expression = f"with_signs_of({magnitude}, {x}, {y})"
    else:
        expression = f"{_extreme_function(i)}({x}, {y})"
    if "relu" in i.parts:
        expression = f"np.maximum({expression}, {t.constant(0, type)})"
    return [t.write(i.operands[0], expression, type, i)]


def _extreme_function(i: Instruction) -> str:
    name = {"max": "maximum", "min": "minimum"}[i.opcode]
    if "f" not in i.parts[-1]:
        return f"np.{name}"
    return f"{name}_or_nan" if "NaN" in i.parts else name


def _unary(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    if _is_packed(type):
        return _packed(t, i)
    expression = f"{FUNCTIONS[i.opcode]}({_read(t, i, i.operands[1], type)})"
    return [t.write(i.operands[0], expression, type, i)]


def _bitwise(t: Translator, i: Instruction) -> list[str]:
    type = plain(i.parts[-1])
    operands = [t.read(x, type) for x in i.operands[1:]]
    if i.opcode == "not":
        return [t.write(i.operands[0], f"~{operands[0]}", type, i)]
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    return [t.write(i.operands[0], f"{operands[0]} {sign} {operands[1]}", type, i)]


def _lop3(t: Translator, i: Instruction) -> list[str]:
    """Any function of three bits, by its truth table."""
    target, *operands, table = i.operands
    x, y, z = (t.read(operand, "u32") for operand in operands)
    return [t.write(target, f"truth_table({x}, {y}, {z}, {number(table)})", "u32", i)]


def _shift(t: Translator, i: Instruction) -> list[str]:
    type = plain(i.parts[-1])
    target, value, distance = i.operands
    name = {"shl": "shifted_left", "shr": "shifted_right"}[i.opcode]
    bits = 8 * size_of(type)
    if t.is_register(distance):
        expression = f"{name}({t.read(value, type)}, {t.read(distance, 'u32')})"
    elif number(distance) < bits:
        sign = "<<" if i.opcode == "shl" else ">>"
        expression = f"{t.read(value, type)} {sign} {t.constant(number(distance), type)}"
    else:
        expression = f"{name}({t.read(value, type)}, {t.constant(bits, 'u32')})"
    return [t.write(target, expression, type, i)]


def _bfe(t: Translator, i: Instruction) -> list[str]:
    """A field of bits, extended by its highest one where the type has a sign."""
    target, value, start, length = i.operands
    type = i.parts[-1]
    start, length, bits = number(start) & 0xFF, number(length) & 0xFF, 8 * size_of(type)
    length = min(length, bits - start)
    if length <= 0:
        raise ValueError("a field without bits")
    up, down = (t.constant(x, type) for x in (bits - start - length, bits - length))
    return [t.write(target, f"({t.read(value, type)} << {up}) >> {down}", type, i)]


def _prmt(t: Translator, i: Instruction) -> list[str]:
    """Four of the eight bytes of two registers."""
    target, low, high, selection = i.operands
    low, high = t.read(low, "u32"), t.read(high, "u32")
    return [t.write(target, f"chosen_bytes({low}, {high}, {number(selection)})", "u32", i)]


def _special(t: Translator, i: Instruction) -> list[str]:
    return _write_f32(t, i, f"{i.opcode}({_read(t, i, i.operands[1], 'f32')})")


def _count_or_reverse(t: Translator, i: Instruction) -> list[str]:
    type = plain(i.parts[-1])
    expression = f"{i.opcode}({t.read(i.operands[1], type)})"
    return [t.write(i.operands[0], expression, type if i.opcode == "brev" else "u32", i)]


def _cvt(t: Translator, i: Instruction) -> list[str]:
    to, source = i.parts[-2:]
    target, *operands = i.operands
    if to.endswith("x2"):
        high, low = (_to_half(i, to[:-2], t.read(x, source)) for x in operands)
        return [t.write(target, f"joined({low}, {high})", "u32", i)]
    (x,) = operands
    if "f" not in to + source:
        # Cut to the target's width, or extended by the source's sign.
        return [t.write(target, f"{t.read(x, source)}.astype({numpy_name(to)})", to, i)]
    if source in ("bf16", "f16"):
        value = f"from_{source}({t.read(x, 'u16')})"
    else:
        value = _read(t, i, x, source)
    if to in ("bf16", "f16"):
        exact = f"{value}.astype(np.float64)" if source[0] in "su" else value
        return [t.write(target, _to_half(i, to, exact), "u16", i)]
    if to == "tf32":
        return [t.write(target, f"to_tf32({value}, {i.parts[1]!r})", "u32", i)]
    if i.parts[1] in ROUNDINGS:
        value = f"{ROUNDINGS[i.parts[1]]}({value})"
    elif source[0] in "su":
        value = f"{value}.astype(np.float32)"
    if to == "f32":
        return _write_f32(t, i, value)
    return [t.write(target, f"to_integer({value}, {numpy_name(to)})", to, i)]


def _to_half(i: Instruction, to: str, value: str) -> str:
    if "relu" in i.parts:
        value = f"maximum_or_nan({value}, np.float32(0))"
    return f"to_{to}({value})"


def _policy(t: Translator, i: Instruction) -> list[str]:
    """How a cache is to keep what is loaded: no load here asks."""
    return [t.write(i.operands[0], t.constant(0, "u64"), "u64", i)]


EMITTERS = {
    "createpolicy": _policy,
    "mov": _mov,
    "cvta": _cvta,
    "selp": _selp,
    "setp": _setp,
    "add": _sum_or_product,
    "sub": _sum_or_product,
    "mul": _sum_or_product,
    "mad": _mad,
    "fma": _fma,
    "div": _div_or_rem,
    "rem": _div_or_rem,
    "max": _extreme,
    "min": _extreme,
    "neg": _unary,
    "abs": _unary,
    "and": _bitwise,
    "or": _bitwise,
    "xor": _bitwise,
    "not": _bitwise,
    "lop3": _lop3,
    "shl": _shift,
    "shr": _shift,
    "bfe": _bfe,
    "prmt": _prmt,
    "cvt": _cvt,
    "ex2": _special,
    "lg2": _special,
    "rsqrt": _special,
    "sqrt": _special,
    "rcp": _special,
    "sin": _special,
    "cos": _special,
    "tanh": _special,
    "popc": _count_or_reverse,
    "clz": _count_or_reverse,
    "brev": _count_or_reverse,
}
