"""What instructions of control, memory, warps and matrices do, as Python: one emitter for each opcode.

Written as those in `emit_arithmetic.py`. The functions that their lines call are in `accesses.py`,
`copies.py`, `bulk_copies.py`, `tensormap.py`, `barriers.py`, `warps.py`, `matrix.py` and `wgmma.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ptx_emulator.parser import Instruction, number, vector
from ptx_emulator.types import numpy_name, plain, size_of

if TYPE_CHECKING:
    from ptx_emulator.translator import Translator

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
    place, table = i.operands
    return [f"return {t.read(place, 'u32')}, {tuple(t.targets(table))}, {i.line}"]


def _bar(t: Translator, i: Instruction) -> list[str]:
    if "warp" in i.parts:
        return []  # the threads of a warp never part
    operands = [number(x) if not t.is_register(x) else t.read(x, "u32") for x in i.operands]
    barrier, threads = (operands + [None])[:2]
    if isinstance(barrier, int) and not 0 <= barrier < 16:
        raise ValueError("a program has 16 barriers")
    if isinstance(threads, int) and (threads <= 0 or threads % 32):
        raise ValueError("a number of threads that is none of warps")
    if "arrive" in i.parts:
        return [f"barrier_arrive(S, {barrier}, {threads}, {i.line})"]
    if i.predicate:
        raise ValueError("a predicated barrier")
    return [f"return barrier_sync(S, {barrier}, {threads}, {t.next_block}, {i.line})"]


def _trap(t: Translator, i: Instruction) -> list[str]:
    return [f"trap(S, {t.mask(i)}, {i.line})"]


def _nothing(t: Translator, i: Instruction) -> list[str]:
    """Hints, and what only hardware notices: registers per warp, prefetches, dependent launches."""
    return []


def _call(t: Translator, i: Instruction) -> list[str]:
    raise ValueError("calls of functions are not emulated")


def _fence(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1:3] == ("proxy", "async") and "global" not in i.parts:
        return [f"proxy_fence(S, {t.mask(i)})"]
    if i.parts[1:4] == ("proxy", "tensormap::generic", "acquire"):
        address = t.read(i.operands[0].split("+")[0].strip("[] "), "u64")
        return [f"acquire_descriptor(S, {address}, {t.mask(i)})"]
    if i.parts[1] != "proxy" and i.parts[-1] in ("gpu", "gl", "sys"):
        return [f"fence(S, {t.mask(i)})"]
    return []  # within a program, or a cluster: every write is seen at once here


# --- memory ---------------------------------------------------------------------------------------------


def _access(t: Translator, i: Instruction, operand: str) -> tuple[str, str, str, int]:
    """Of a load or store: the space, the address, the type of an element, its bytes."""
    space = next(x.split("::")[0] for x in i.parts if x.split("::")[0] in ("shared", "global"))
    type = i.parts[-1]
    if "v4" in i.parts and size_of(type) == 8:
        raise ValueError("more than 16 bytes")
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
    kind, order = _strength(i, space)
    tail = f"{size}, {len(targets)}, {t.mask(i)}{order}, {i.line}"
    lines = [f"v = load_{kind}(S, {address}, {tail})"]
    for place, register in enumerate(targets):
        value = f"v[{place}]"
        if plain(type) != loaded:
            value = f"{value}.view({numpy_name(type)})"
        lines.append(t.write(register, value, plain(type), i))
    return lines


def _st(t: Translator, i: Instruction) -> list[str]:
    if i.parts[1] == "param":
        return _call(t, i)
    values = vector(i.operands[1])
    space, address, _, size = _access(t, i, i.operands[0])
    values = "".join(f"{t.read(x, f'u{8 * size}')}, " for x in values)
    kind, order = _strength(i, space)
    return [f"store_{kind}(S, {address}, {size}, ({values}), {t.mask(i)}{order}, {i.line})"]


def _strength(i: Instruction, space: str) -> tuple[str, str]:
    """How the function for a load or store is called, and its argument for the order."""
    return ("strong", f", {i.memory_order!r}") if i.memory_order else (space, "")


def _atom(t: Translator, i: Instruction) -> list[str]:
    if "global" not in i.parts:
        raise ValueError("an atomic that is not of global memory")
    what = next(x for x in i.parts if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
    type = i.parts[-1]
    size = 4 if type.endswith("x2") else int(type.lstrip("busf")) // 8
    target, address, *values = i.operands if i.opcode == "atom" else (None, *i.operands)
    values = (
        "(" + "".join(f"{t.read(x, f'u{8 * size}')}, " for x in vector(value)) + ")"
        for value in values
    )
    call = (
        f"v = atomic(S, {what!r}, {type!r}, {t.address(address, 'u64')}, ({', '.join(values)},),"
        f" {t.mask(i)}, {i.memory_order!r}, {i.line})"
    )
    lines = [call]
    for place, register in enumerate(vector(target) if target else ()):
        lines.append(t.write(register, f"v[{place}]", f"u{8 * size}", i))
    return lines


def _ldmatrix(t: Translator, i: Instruction) -> list[str]:
    _by_all_threads(i)
    targets = vector(i.operands[0])
    address = t.address(i.operands[1], "u32")
    lines = [f"v = ldmatrix(S, {address}, {len(targets)}, {'trans' in i.parts}, {i.line})"]
    return lines + [t.write(x, f"v[{place}]", "u32", i) for place, x in enumerate(targets)]


def _stmatrix(t: Translator, i: Instruction) -> list[str]:
    _by_all_threads(i)
    address = t.address(i.operands[0], "u32")
    values = "".join(f"{t.read(x, 'u32')}, " for x in vector(i.operands[1]))
    return [f"stmatrix(S, {address}, ({values}), {'trans' in i.parts}, {i.line})"]


def _by_all_threads(i: Instruction) -> None:
    """Of instructions whose emitters read no predicate, and which no gate is before."""
    if i.predicate:
        raise ValueError("this instruction with a predicate")


def _cp(t: Translator, i: Instruction) -> list[str]:
    if "bulk" in i.parts:
        return _bulk(t, i)
    if "group" in i.parts[2] or i.parts[2] == "wait_all":
        _by_all_threads(i)
    if i.parts[2] == "commit_group":
        return ["commit_copies(S)"]
    if i.parts[2].startswith("wait_"):
        pending = 0 if i.parts[2] == "wait_all" else number(i.operands[0])
        commit = "commit_copies(S); " if i.parts[2] == "wait_all" else ""
        return [f"{commit}wait_for_copies(S, {pending})"]
    target, source, size, *rest = i.operands
    if "L2::cache_hint" in i.parts:
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
    to, source = (x.split("+")[0].strip("[] ") for x in i.operands[:2])
    to, source = t.read(to, "u64"), t.read(source, "u64")
    return [f"publish_descriptor(S, {to}, {source}, {t.mask(i)}, {i.line})"]


def _mbarrier(t: Translator, i: Instruction) -> list[str]:
    kind = i.parts[1]
    operands = i.operands if kind in ("init", "inval", "expect_tx") else i.operands[1:]
    address, *rest = operands
    address = t.address(address, "u32")
    if "wait" in kind:
        _by_all_threads(i)
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
    if i.operands[0] != "_":
        raise ValueError("an arrival that returns a state")
    count = rest[0] if rest and expected == "None" else "None"
    return [f"mbarrier_arrive(S, {address}, {count}, {expected}, {mask}, {i.line})"]


# --- warps and matrix products --------------------------------------------------------------------------


def _by_whole_warps(t: Translator, members: str) -> None:
    """The threads that take part; in a register, as of a reduction, they are those of a whole warp, too."""
    if not t.is_register(members) and number(members) not in (-1, 0xFFFFFFFF):
        raise ValueError("by a part of a warp")


def _shfl(t: Translator, i: Instruction) -> list[str]:
    target, value, lane, bounds, members = i.operands
    whole = 0 if i.parts[2] == "up" else 31
    if number(bounds) != whole:
        raise ValueError("within a part of a warp")
    _by_whole_warps(t, members)
    if "|" in target:
        raise ValueError("with a predicate")
    own = t.type_of(target) if t.type_of(target) == t.type_of(value) else "u32"
    lane = t.read(lane, "u32") if t.is_register(lane) else number(lane)
    return [t.write(target, f"shuffle_{i.parts[2]}(S, {t.read(value, own)}, {lane})", own, i)]


def _redux(t: Translator, i: Instruction) -> list[str]:
    _by_whole_warps(t, i.operands[2])
    type = plain(i.parts[-1])
    expression = f"reduce_warp(S, {t.read(i.operands[1], type)}, {i.parts[2]!r})"
    return [t.write(i.operands[0], expression, type, i)]


def _vote(t: Translator, i: Instruction) -> list[str]:
    _by_whole_warps(t, i.operands[2])
    return [t.write(i.operands[0], f"ballot(S, {t.read(i.operands[1], 'pred')})", "u32", i)]


def _elect(t: Translator, i: Instruction) -> list[str]:
    _by_whole_warps(t, i.operands[1])
    leader, elected = i.operands[0].split("|")
    return [
        t.write(leader, t.constant(0, "u32"), "u32", i),
        t.write(elected, "elected(S)", "pred", i),
    ]


def _mma(t: Translator, i: Instruction) -> list[str]:
    d, a, b, c = map(vector, i.operands)
    a, b = ("".join(f"{t.read(x, 'u32')}, " for x in operand) for operand in (a, b))
    c = "".join(f"{t.read(x, 'f32')}, " for x in c)
    lines = [f"v = mma(S, {i.parts[7]!r}, ({a}), ({b}), ({c}))"]
    return lines + [t.write(x, f"v[{place}]", "f32", i) for place, x in enumerate(d)]


def _wgmma(t: Translator, i: Instruction) -> list[str]:
    _by_all_threads(i)
    if i.parts[1] == "fence":
        return []
    if i.parts[1] == "commit_group":
        return ["commit_products(S)"]
    if i.parts[1] == "wait_group":
        return [f"wait_for_products(S, {number(i.operands[0])}, {i.line})"]
    width, type = re.match(r"m64n(\d+)", i.parts[4])[1], i.parts[6]
    d, a, b, scale, *immediates = i.operands
    if [int(x) for x in immediates[:2]] != [1, 1]:
        raise ValueError("a negated operand")
    transposed = [bool(int(x)) for x in immediates[2:]] if type != "tf32" else [False, False]
    if a.startswith("{"):
        a = "(" + "".join(f"{t.read(x, 'u32')}, " for x in vector(a)) + ")"
        transposed = [False, transposed[-1]]
    else:
        a = t.read(a, "u64")
    c = "".join(f"{t.read(x, 'f32')}, " for x in vector(d))
    call = (
        f"v = wgmma(S, {width}, {type!r}, ({c}), {a}, {t.read(b, 'u64')},"
        f" {t.read(scale, 'pred')}, {transposed[0]}, {transposed[1]}, {i.line})"
    )
    return [call] + [t.write(x, f"v[{place}]", "f32", i) for place, x in enumerate(vector(d))]


EMITTERS = {
    "ret": _ret,
    "exit": _ret,
    "bra": _bra,
    "brx": _brx,
    "bar": _bar,
    "barrier": _bar,
    "trap": _trap,
    "call": _call,
    "setmaxnreg": _nothing,
    "griddepcontrol": _nothing,
    "prefetch": _nothing,
    "fence": _fence,
    "membar": _fence,
    "atom": _atom,
    "red": _atom,
    "ld": _ld,
    "st": _st,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "cp": _cp,
    "tensormap": _tensormap,
    "mbarrier": _mbarrier,
    "shfl": _shfl,
    "redux": _redux,
    "vote": _vote,
    "elect": _elect,
    "mma": _mma,
    "wgmma": _wgmma,
}
