"""What each instruction does, as Python: one emitter for each opcode, found by its name in EMITTERS.

An emitter gets the translator, to read operands and write registers with, and the instruction; it
returns lines of Python. A form that it does not know makes it raise a ValueError or KeyError, which the
translator turns into an error with the line. The functions that these lines call are in
`arithmetic.py`, `accesses.py`, `copies.py`, `bulk_copies.py`, `barriers.py`, `warps.py`, `matrix.py` and
`wgmma.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ptx_emulator.parser import Instruction, number, vector
from ptx_emulator.types import numpy_name, plain, size_of, unsigned

if TYPE_CHECKING:
    from ptx_emulator.translator import Translator

WITHOUT_RESULT = {
    "st", "bra", "brx", "bar", "barrier", "ret", "exit", "trap", "stmatrix", "fence", "membar", "cp",
    "tensormap", "setmaxnreg", "griddepcontrol", "prefetch",
}  # fmt: skip
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


def has_result(instruction: Instruction) -> bool:
    kind = instruction.parts[1:2]
    if instruction.opcode == "wgmma":
        return kind == ("mma_async",)
    if instruction.opcode == "mbarrier":
        return kind != ("init",) and kind != ("inval",) and kind != ("expect_tx",)
    return instruction.opcode not in WITHOUT_RESULT and bool(instruction.operands)


def result_kind(instruction: Instruction) -> str:
    """What a 32-bit result is: f32, u32, a "copy" of its operands, or "any", if both are the same."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode == "mov" and "{" not in instruction.text:
        source = instruction.operands[1]
        if source.startswith("0f"):
            return "f32"
        return "any" if source == "0" else "copy" if source.startswith("%r") else "u32"
    if opcode == "shfl" or opcode == "selp" and parts[1] == "b32":
        return "copy"
    if opcode in ("mma", "wgmma"):
        return "f32"
    return "f32" if parts[-2 if opcode == "cvt" else -1] == "f32" else "u32"


def ends_block(instruction: Instruction) -> bool:
    """Whether what comes next depends on more than the instruction's place: jumps and waits."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode in ("bar", "barrier"):
        return "sync" in parts and "warp" not in parts
    return opcode in ("bra", "brx", "ret", "exit") or opcode == "mbarrier" and "wait" in parts[1]


def is_retried(instruction: Instruction) -> bool:
    """Whether a strand that had to wait executes the instruction anew, and so its block has only that."""
    return instruction.opcode == "mbarrier" and "wait" in instruction.parts[1]


def needs_gate(instruction: Instruction) -> bool:
    """Whether all programs that run in lockstep must agree on executing a predicated instruction.

    Those for which one thread speaks keep their state for all programs of a batch together.
    """
    opcode, parts = instruction.opcode, instruction.parts
    if not instruction.predicate:
        return False
    if opcode == "cp":
        return parts[1] == "reduce" or "bulk" in parts
    return (
        opcode in ("tensormap", "bar", "barrier") or opcode == "mbarrier" and "wait" not in parts[1]
    )


# --- control --------------------------------------------------------------------------------------------


def _ret(t: Translator, i: Instruction) -> list[str]:
    if i.predicate:
        raise ValueError("predicated return")
    return ["return ENDED"]


def _bra(t: Translator, i: Instruction) -> list[str]:
    target = t.target(i.operands[0])
    if not i.predicate:
        return [f"return {target}"]
    return [f"return {t.mask(i)}, ({t.next_block}, {target}), {i.line}"]


def _brx(t: Translator, i: Instruction) -> list[str]:
    if i.predicate:
        raise ValueError("predicated jump table")
    number, table = i.operands
    return [f"return {t.read(number, 'u32')}, {tuple(t.targets(table))}, {i.line}"]


def _bar(t: Translator, i: Instruction) -> list[str]:
    if "warp" in i.parts:
        return []  # the threads of a warp never part
    operands = [number(x) if not t.is_register(x) else t.read(x, "u32") for x in i.operands]
    barrier, threads = (operands + [None])[:2]
    if "arrive" in i.parts:
        return [f"barrier_arrive(S, {barrier}, {threads}, {i.line})"]
    if "sync" not in i.parts or i.predicate:
        raise ValueError("this kind of barrier")
    return [f"return barrier_sync(S, {barrier}, {threads}, {t.next_block}, {i.line})"]


def _trap(t: Translator, i: Instruction) -> list[str]:
    return [f"trap(S, {t.mask(i)}, {i.line})"]


def _nothing(t: Translator, i: Instruction) -> list[str]:
    """Hints, and what only hardware notices: registers per warp, prefetches, dependent launches."""
    return []


def _fence(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1] == "proxy" and i.parts[2].startswith("async"):
        return ["proxy_fence(S)"]
    if i.parts[1] == "proxy" and i.parts[2] == "tensormap::generic" and "acquire" in i.parts:
        address = t.read(i.operands[0].split("+")[0].strip("[] "), "u64")
        return [f"acquire_descriptor(S, {address}, {t.mask(i)})"]
    return []  # of the generic proxy: every write is seen at once here


# --- registers ------------------------------------------------------------------------------------------


def _mov(t: Translator, i: Instruction) -> list[str]:
    target, source = i.operands
    type = i.parts[-1]
    wide, narrow, bits = ("u32", "u16", 16) if type == "b32" else ("u64", "u32", 32)
    if target.startswith("{"):
        return [
            t.write(
                register,
                f"({t.read(source, wide)} >> {t.constant(bits * place, wide)})"
                f".astype({numpy_name(narrow)})",
                narrow,
                i,
            )
            for place, register in enumerate(vector(target))
            if register != "_"
        ]
    if source.startswith("{"):
        low, high = (f"{t.read(x, narrow)}.astype({numpy_name(wide)})" for x in vector(source))
        return [t.write(target, f"{low} | ({high} << {t.constant(bits, wide)})", wide, i)]
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
    type = plain(i.parts[-1])
    comparison, (target, *operands) = i.parts[1], i.operands
    if len(operands) != 2 or "|" in target:
        raise ValueError("a comparison combined with a predicate")
    x, y = (t.read(operand, type) for operand in operands)
    if type == "f32" and comparison == "ne":  # false, too, where one is NaN
        expression = f"({x} < {y}) | ({x} > {y})"
    elif type == "f32" and comparison not in COMPARISONS:
        unordered = f"np.isnan({x}) | np.isnan({y})"
        expression = {"nan": unordered, "num": f"~({unordered})"}.get(comparison)
        if expression is None:  # true also where one is NaN: equ, ltu, ...
            expression = f"({x} {COMPARISONS[comparison.removesuffix('u')]} {y}) | {unordered}"
    else:
        expression = f"{x} {COMPARISONS[comparison]} {y}"
    return [t.write(target, expression, "pred", i)]


# --- arithmetic -----------------------------------------------------------------------------------------


def _sum_or_product(t: Translator, i: Instruction) -> list[str]:
    target, x, y = i.operands[:3]
    type = i.parts[-1]
    if type == "f32x2":
        return _packed(t, i)
    if i.opcode == "mul" and i.parts[1] == "hi":
        return [t.write(target, f"high_product({t.read(x, type)}, {t.read(y, type)})", type, i)]
    if i.opcode == "mul" and i.parts[1] == "wide":
        return [t.write(target, *_wide_product(t, x, y, type), i)]
    if type not in ("f32", "s16", "u16", "s32", "u32", "s64", "u64"):
        raise ValueError(type)
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.opcode]
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
    if i.parts[1] != "lo":
        raise ValueError(i.parts[1])
    expression = f"{t.read(x, type)} * {t.read(y, type)} + {t.read(z, type)}"
    return [t.write(target, expression, type, i)]


def _fma(t: Translator, i: Instruction) -> list[str]:
    if i.parts[-1] == "f32x2":
        return _packed(t, i)
    if i.parts[-1] != "f32":
        raise ValueError(i.parts[-1])
    operands = ", ".join(t.read(x, "f32") for x in i.operands[1:])
    return [t.write(i.operands[0], f"fma({operands})", "f32", i)]


def _packed(t: Translator, i: Instruction) -> list[str]:
    operands = ", ".join(t.read(x, "u64") for x in i.operands[1:])
    return [t.write(i.operands[0], f"packed({i.opcode!r}, {operands})", "u64", i)]


def _div_or_rem(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    x, y = (t.read(operand, type) for operand in i.operands[1:])
    name = "" if type == "f32" else {"div": "quotient", "rem": "remainder"}[i.opcode]
    return [t.write(i.operands[0], f"{name}({x}, {y})" if name else f"{x} / {y}", type, i)]


def _extreme(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    if len(i.operands) != 3:
        raise ValueError("of three operands")
    x, y = (t.read(operand, type) for operand in i.operands[1:])
    name = {"max": "maximum", "min": "minimum"}[i.opcode]
    if type == "f32" and "NaN" not in i.parts:  # a NaN loses
        name = "f" + name[:3]
    expression = f"np.{name}({x}, {y})"
    if "relu" in i.parts:
        expression = f"np.maximum({expression}, {t.constant(0, type)})"
    return [t.write(i.operands[0], expression, type, i)]


def _unary(t: Translator, i: Instruction) -> list[str]:
    type = i.parts[-1]
    if type not in ("f32", "s16", "s32", "s64"):
        raise ValueError(type)
    form = {"neg": "-{}", "abs": "np.abs({})"}[i.opcode]
    return [t.write(i.operands[0], form.format(t.read(i.operands[1], type)), type, i)]


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
    start, length, bits = number(start), number(length), 8 * size_of(type)
    up, down = (t.constant(x, type) for x in (bits - start - length, bits - length))
    return [t.write(target, f"({t.read(value, type)} << {up}) >> {down}", type, i)]


def _prmt(t: Translator, i: Instruction) -> list[str]:
    """Four of the eight bytes of two registers."""
    target, low, high, selection = i.operands
    low, high = t.read(low, "u32"), t.read(high, "u32")
    return [t.write(target, f"chosen_bytes({low}, {high}, {number(selection)})", "u32", i)]


def _special(t: Translator, i: Instruction) -> list[str]:
    if i.parts[-1] != "f32":
        raise ValueError(i.parts[-1])
    operand = t.read(i.operands[1], "f32")
    expression = f"{i.opcode}({operand}, {'ftz' in i.parts})"
    return [t.write(i.operands[0], expression, "f32", i)]


def _cvt(t: Translator, i: Instruction) -> list[str]:
    to, source = i.parts[-2:]
    target, *operands = i.operands
    if to in ("bf16x2", "f16x2") and source == "f32" and "rn" in i.parts:
        high, low = (f"to_{to[:-2]}({t.read(x, 'f32')})" for x in operands)
        return [t.write(target, f"joined({low}, {high})", "u32", i)]
    (x,) = operands
    if source in ("bf16", "f16") and to == "f32":
        return [t.write(target, f"from_{source}({t.read(x, 'u16')})", "f32", i)]
    if to in ("bf16", "f16") and source == "f32" and "rn" in i.parts:
        return [t.write(target, f"to_{to}({t.read(x, 'f32')})", "u16", i)]
    if to == "tf32" and source == "f32":
        return [t.write(target, f"to_tf32({t.read(x, 'f32')})", "u32", i)]
    if to == "f32" and source[0] in "su" and "rn" in i.parts:
        return [t.write(target, f"{t.read(x, source)}.astype(np.float32)", "f32", i)]
    if source == "f32" and to[0] in "su":
        rounding = {"rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil", "rni": "np.rint"}
        name = next(rounding[part] for part in i.parts if part in rounding)
        expression = f"to_integer({name}({t.read(x, 'f32')}), {numpy_name(to)})"
        return [t.write(target, expression, to, i)]
    if source[0] in "su" and to[0] in "su" and "sat" not in i.parts:
        # Cut to the target's width, or extended by the source's sign.
        return [t.write(target, f"{t.read(x, source)}.astype({numpy_name(to)})", to, i)]
    raise ValueError(f"from {source} to {to}")


# --- memory ---------------------------------------------------------------------------------------------


def _access(t: Translator, i: Instruction, operand: str) -> tuple[str, str, str, int]:
    """Of a load or store: the space, the address, the type of an element, its bytes."""
    space = next(x.split("::")[0] for x in i.parts if x.split("::")[0] in ("shared", "global"))
    type = i.parts[-1]
    if type == "b128" or size_of(type) not in (1, 2, 4, 8):
        raise ValueError(type)
    return space, t.address(operand, "u32" if space == "shared" else "u64"), type, size_of(type)


def _ld(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1] == "param":
        name, _, offset = i.operands[1].strip("[] ").replace(" ", "").partition("+")
        type = plain(i.parts[-1])
        value = f"S.parameter({name!r}, {int(offset or 0)}, {numpy_name(type)})"
        return [t.write(i.operands[0], value, type, i)]
    targets = vector(i.operands[0])
    space, address, type, size = _access(t, i, i.operands[1])
    loaded = f"u{8 * size}"
    call = f"v = load_{space}(S, {address}, {size}, {len(targets)}, {t.mask(i)}, {i.line})"
    lines = [call]
    for place, register in enumerate(targets):
        value = f"v[{place}]"
        if plain(type) != loaded:
            value = f"{value}.view({numpy_name(type)})"
        lines.append(t.write(register, value, plain(type), i))
    return lines


def _st(t: Translator, i: Instruction) -> list[str]:
    values = vector(i.operands[1])
    space, address, _, size = _access(t, i, i.operands[0])
    values = "".join(f"{t.read(x, f'u{8 * size}')}, " for x in values)
    return [f"store_{space}(S, {address}, {size}, ({values}), {t.mask(i)}, {i.line})"]


def _ldmatrix(t: Translator, i: Instruction) -> list[str]:
    _only_b16(i)
    targets = vector(i.operands[0])
    address = t.address(i.operands[1], "u32")
    lines = [f"v = ldmatrix(S, {address}, {len(targets)}, {'trans' in i.parts}, {i.line})"]
    return lines + [t.write(x, f"v[{place}]", "u32", i) for place, x in enumerate(targets)]


def _stmatrix(t: Translator, i: Instruction) -> list[str]:
    _only_b16(i)
    address = t.address(i.operands[0], "u32")
    values = "".join(f"{t.read(x, 'u32')}, " for x in vector(i.operands[1]))
    return [f"stmatrix(S, {address}, ({values}), {'trans' in i.parts}, {i.line})"]


def _only_b16(i: Instruction) -> None:
    if i.predicate or "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise ValueError("only m8n8 of b16, by all threads")


def _cp(t: Translator, i: Instruction) -> list[str]:
    if "bulk" in i.parts:
        return _bulk(t, i)
    if i.parts[1] != "async" or "mbarrier" in i.parts:
        raise ValueError("this kind of copy")
    if i.parts[2] == "commit_group":
        return ["commit_copies(S)"]
    if i.parts[2].startswith("wait_"):
        pending = 0 if i.parts[2] == "wait_all" else number(i.operands[0])
        commit = "commit_copies(S); " if i.parts[2] == "wait_all" else ""
        return [f"{commit}wait_for_copies(S, {pending})"]
    target, source, size, *rest = i.operands
    if "cache_hint" in i.parts[-1]:
        rest = rest[:-1]
    num_read = t.read(rest[0], "u32") if rest else "None"
    target, source = t.address(target, "u32"), t.address(source, "u64")
    return [f"copy_async(S, {target}, {source}, {number(size)}, {num_read}, {t.mask(i)}, {i.line})"]


def _bulk(t: Translator, i: Instruction) -> list[str]:
    """Copies of whole tiles by the tensor memory accelerator."""
    if "commit_group" in i.parts:
        return ["commit_bulk(S)"]
    if "wait_group" in i.parts:
        return [f"wait_for_bulk(S, {number(i.operands[0])})"]
    if i.parts[1] == "reduce" or "tensor" not in i.parts or "im2col" in i.text:
        raise ValueError("this kind of bulk copy")
    to_shared = i.parts[5].startswith("shared")
    tile = i.operands[1 if to_shared else 0].strip("[] ")
    descriptor, _, coordinates = tile.partition(",")
    descriptor = t.read(descriptor.strip(), "u64")
    coordinates = "".join(f"{t.read(x, 'u32')}, " for x in vector(coordinates))
    shared = t.address(i.operands[0 if to_shared else 1], "u32")
    tail = f"{descriptor}, ({coordinates}), {t.mask(i)}, {i.line})"
    if not to_shared:
        return [f"bulk_store(S, {shared}, {tail}"]
    return [f"bulk_load(S, {shared}, {t.address(i.operands[2], 'u32')}, {tail}"]


def _tensormap(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1] == "replace":
        field, address = i.parts[3], t.read(i.operands[0].split("+")[0].strip("[] "), "u64")
        *place, value = i.operands[1:]
        value = t.read(value, i.parts[-1])
        place = number(place[0]) if place else 0
        return [f"replace_field(S, {address}, {field!r}, {place}, {value}, {t.mask(i)}, {i.line})"]
    if i.parts[1] == "cp_fenceproxy" and i.parts[2] == "global":
        to, source = (x.split("+")[0].strip("[] ") for x in i.operands[:2])
        to, source = t.read(to, "u64"), t.read(source, "u64")
        return [f"publish_descriptor(S, {to}, {source}, {t.mask(i)}, {i.line})"]
    raise ValueError(i.parts[1])


def _mbarrier(t: Translator, i: Instruction) -> list[str]:
    kind = i.parts[1]
    operands = i.operands if kind in ("init", "inval", "expect_tx") else i.operands[1:]
    address, *rest = operands
    address = t.address(address, "u32")
    if "wait" in kind:
        if "parity" not in i.parts or i.predicate:
            raise ValueError("a wait for a state, or a predicated one")
        place = t.registers[i.operands[0]]
        parity = t.read(rest[0], "u32")
        wait = f"mbarrier_wait(S, {address}, {parity}, {place}, {t.next_block}, {i.line})"
        return [f"return {wait}"]
    rest = [t.read(x, "u32") for x in rest]
    mask = t.mask(i)
    if kind == "init":
        return [f"mbarrier_init(S, {address}, {rest[0]}, {mask}, {i.line})"]
    if kind == "inval":
        return [f"mbarrier_inval(S, {address}, {mask}, {i.line})"]
    expected = rest[0] if "expect_tx" in i.parts else "None"
    if kind == "expect_tx":
        return [f"mbarrier_expect(S, {address}, {expected}, {mask}, {i.line})"]
    if kind != "arrive" or (i.operands[0] != "_"):
        raise ValueError(kind)
    count = rest[0] if rest and expected == "None" else "None"
    return [f"mbarrier_arrive(S, {address}, {count}, {expected}, {mask}, {i.line})"]


# --- warps and matrix products --------------------------------------------------------------------------


def _shfl(t: Translator, i: Instruction) -> list[str]:
    target, value, lane, bounds, members = i.operands
    if number(bounds) & 0xFF != (0 if i.parts[2] == "up" else 31) or number(members) not in (
        -1,
        0xFFFFFFFF,
    ):
        raise ValueError("within a part of a warp")
    if "|" in target:
        raise ValueError("with a predicate")
    own = t.type_of(target) if t.type_of(target) == t.type_of(value) else "u32"
    lane = t.read(lane, "u32") if t.is_register(lane) else number(lane)
    return [t.write(target, f"shuffle_{i.parts[2]}(S, {t.read(value, own)}, {lane})", own, i)]


def _redux(t: Translator, i: Instruction) -> list[str]:
    type = plain(i.parts[-1])
    if type not in ("u32", "s32"):
        raise ValueError(type)
    expression = f"reduce_warp(S, {t.read(i.operands[1], type)}, {i.parts[2]!r})"
    return [t.write(i.operands[0], expression, type, i)]


def _vote(t: Translator, i: Instruction) -> list[str]:
    if i.parts[2] != "ballot":
        raise ValueError(i.parts[2])
    return [t.write(i.operands[0], f"ballot(S, {t.read(i.operands[1], 'pred')})", "u32", i)]


def _elect(t: Translator, i: Instruction) -> list[str]:
    leader, elected = i.operands[0].split("|")
    return [
        t.write(leader, t.constant(0, "u32"), "u32", i),
        t.write(elected, "elected(S)", "pred", i),
    ]


def _mma(t: Translator, i: Instruction) -> list[str]:
    shape, layouts, (to, a_type, b_type, c_type) = i.parts[3], i.parts[4:6], i.parts[6:10]
    known = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}
    if (shape, a_type) not in known or a_type != b_type or (to, c_type) != ("f32", "f32"):
        raise ValueError(f"{shape} of {a_type} and {b_type}")
    if layouts != ("row", "col"):
        raise ValueError(str(layouts))
    d, a, b, c = map(vector, i.operands)
    a, b = ("".join(f"{t.read(x, 'u32')}, " for x in operand) for operand in (a, b))
    c = "".join(f"{t.read(x, 'f32')}, " for x in c)
    lines = [f"v = mma(S, {a_type!r}, ({a}), ({b}), ({c}))"]
    return lines + [t.write(x, f"v[{place}]", "f32", i) for place, x in enumerate(d)]


def _wgmma(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1] == "fence":
        return []
    if i.parts[1] == "commit_group":
        return ["commit_products(S)"]
    if i.parts[1] == "wait_group":
        return [f"wait_for_products(S, {number(i.operands[0])}, {i.line})"]
    shape, (to, a_type, b_type) = i.parts[4], i.parts[5:8]
    match = re.fullmatch(r"m64n(\d+)k(\d+)", shape)
    if to != "f32" or a_type != b_type or (a_type, match[2]) not in (
        ("bf16", "16"), ("f16", "16"), ("tf32", "8"),
    ):  # fmt: skip
        raise ValueError(f"{shape} of {a_type} and {b_type} to {to}")
    d, a, b, scale, *immediates = i.operands
    if [int(x) for x in immediates[:2]] != [1, 1]:
        raise ValueError("a negated operand")
    transposed = [bool(int(x)) for x in immediates[2:]] if a_type != "tf32" else [False, False]
    if a.startswith("{"):
        a = "(" + "".join(f"{t.read(x, 'u32')}, " for x in vector(a)) + ")"
        transposed = [False, transposed[-1]]
    else:
        a = t.read(a, "u64")
    c = "".join(f"{t.read(x, 'f32')}, " for x in vector(d))
    call = (
        f"v = wgmma(S, {int(match[1])}, {a_type!r}, ({c}), {a}, {t.read(b, 'u64')},"
        f" {t.read(scale, 'pred')}, {transposed[0]}, {transposed[1]}, {i.line})"
    )
    return [call] + [t.write(x, f"v[{place}]", "f32", i) for place, x in enumerate(vector(d))]


EMITTERS = {
    "ret": _ret, "exit": _ret, "bra": _bra, "brx": _brx, "bar": _bar, "barrier": _bar, "trap": _trap,
    "setmaxnreg": _nothing, "griddepcontrol": _nothing, "prefetch": _nothing,
    "fence": _fence, "membar": _fence,
    "mov": _mov, "cvta": _cvta, "selp": _selp, "setp": _setp,
    "add": _sum_or_product, "sub": _sum_or_product, "mul": _sum_or_product,
    "mad": _mad, "fma": _fma, "div": _div_or_rem, "rem": _div_or_rem,
    "max": _extreme, "min": _extreme, "neg": _unary, "abs": _unary,
    "and": _bitwise, "or": _bitwise, "xor": _bitwise, "not": _bitwise, "lop3": _lop3,
    "shl": _shift, "shr": _shift, "bfe": _bfe, "prmt": _prmt,
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "sqrt", "rcp", "sin", "cos", "tanh"), _special),
    "cvt": _cvt,
    "ld": _ld, "st": _st, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "cp": _cp,
    "tensormap": _tensormap, "mbarrier": _mbarrier,
    "shfl": _shfl, "redux": _redux, "vote": _vote, "elect": _elect,
    "mma": _mma, "wgmma": _wgmma,
}  # fmt: skip
