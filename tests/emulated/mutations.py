"""How to break compiled PTX on purpose, in one place at a time, to see whether the emulator notices.

A kind of mutation is a pattern of one statement and what to make of it. Its places are counted from 0 in the
order of the text, so that a mutant is named by its kind and this number: line numbers change with every
comment in a kernel, the number of a barrier with the kernel alone.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

DROPPED = ""
# Descriptors of wgmma with a swizzle of 128 bytes, as constants: 1 in the highest two bits.
_DESCRIPTOR = r"((?:or|add)\.b?s?64 .*, )(46116862\d{11})(;)"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel with one statement changed."""

    kind: str
    place: int  # among those of this kind
    line: int
    before: str
    after: str
    ptx: str

    def __str__(self) -> str:
        after = self.after or "nothing"
        return f"{self.kind} {self.place} (line {self.line}: {self.before[-90:]} -> {after[-60:]})"


def _plus(number: int) -> Callable[[re.Match], str]:
    """The second group as a number, with something added."""
    return lambda match: f"{match[1]}{int(match[2], 0) + number}{match[3]}"


def _renamed(**names: str) -> Callable[[re.Match], str]:
    """The second group exchanged for another word."""
    return lambda match: f"{match[1]}{names[match[2]]}{match[3]}"


def _with(group: int, number: int) -> Callable[[re.Match], str]:
    """The statement with something added to the register of this group, which then gets its value back."""

    def replacement(match: re.Match) -> str:
        register = match[group]
        there, back = (f"add.s32 {register}, {register}, {x};" for x in (number, -number))
        return f"{there}\n{match[0]}\n{back}"

    return replacement


_PREDICATED = r"@!?%p\d+ "
# Where to, coordinates from the innermost on, and at which mbarrier.
_BULK_LOAD = (
    r".*cp\.async\.bulk\.tensor\S*global\.mbarrier\S* \[(%r\d+)\], "
    r"\[%rd\d+, \{%r\d+, (%r\d+).*\[(%r\d+)\];"
)

# Pattern of a whole statement, and its replacement as of re.sub.
KINDS: dict[str, tuple[str, str | Callable[[re.Match], str]]] = {
    # Order: barriers, waits, fences.
    "no bar.sync": (r"bar\.sync .*", DROPPED),
    "no cp.async.wait_group": (r"cp\.async\.wait_group .*", DROPPED),
    "cp.async.wait_group of one more": (r"(cp\.async\.wait_group )(\d+)(;)", _plus(1)),
    "no cp.async.commit_group": (r"cp\.async\.commit_group;", DROPPED),
    "no wgmma.wait_group": (r"wgmma\.wait_group.*", DROPPED),
    "wgmma.wait_group of one more": (r"(wgmma\.wait_group\S* )(\d+)(;)", _plus(1)),
    "no wgmma.commit_group": (r"wgmma\.commit_group.*", DROPPED),
    "no wgmma.fence": (r"wgmma\.fence.*", DROPPED),
    "no fence.proxy.async": (r"fence\.proxy\.async.*", DROPPED),
    # Bounds.
    "load without its mask": (_PREDICATED + r"(ld\.global.*)", r"\1"),
    "store without its mask": (_PREDICATED + r"(st\.global.*)", r"\1"),
    "copy without its mask": (r"(cp\.async\.c.*, )(0x\w+), %r\d+;", r"\1\2, \2;"),
    "comparison with or without equality": (
        r"(setp\.)(lt|le|gt|ge)(\..*)",
        _renamed(lt="le", le="lt", gt="ge", ge="gt"),
    ),
    "branch negated": (r"@(%p\d+) (bra .*)", r"@!\1 \2"),
    # Addresses.
    "number added off by one": (r"(add\.s(?:32|64) .*, )(-?\d{1,9})(;)", _plus(1)),
    "shared address off by 16": (r"((?:ld|st)\.shared.*\[%r\d+\+)(\d+)(\].*)", _plus(16)),
    "ldmatrix off by 16": (r"(ldmatrix.*\[%r\d+\+)(\d+)(\].*)", _plus(16)),
    "ldmatrix off by 16 from 0": (r"(ldmatrix.*\[%r\d+)(\].*)", r"\1+16\2"),
    "stmatrix off by 16 from 0": (r"(stmatrix.*\[%r\d+)(\].*)", r"\1+16\2"),
    "swizzle of an address": (
        r"(xor\.b32 .*, )(\d+)(;)",
        lambda match: f"{match[1]}{int(match[2]) ^ 16}{match[3]}",
    ),
    "shift by one more": (r"(shl\.b(?:32|64) .*, )(\d+)(;)", _plus(1)),
    "bit lost from a mask": (
        r"(and\.b32 .*, )(\d+)(;)",
        lambda match: f"{match[1]}{int(match[2]) & (int(match[2]) - 1)}{match[3]}",
    ),
    # Matrix instructions.
    "descriptor with 64 bytes of swizzle": (_DESCRIPTOR, _plus((2 << 62) - (1 << 62) - (1 << 64))),
    "descriptor stride off by 128": (_DESCRIPTOR, _plus(8 << 32)),
    "descriptor leading offset off by 128": (_DESCRIPTOR, _plus(8 << 16)),
    "descriptor start off by 16": (_DESCRIPTOR, _plus(1)),
    "wgmma transposes the other way": (
        r"(wgmma\.mma_async.*, )([01])(;)",
        lambda match: f"{match[1]}{1 - int(match[2])}{match[3]}",
    ),
    "wgmma registers exchanged": (
        r"(wgmma\.mma_async.*\}, ?\{ ?)(%r\d+)(, ?)(%r\d+)(,.*)",
        r"\1\4\3\2\5",
    ),
    "wgmma descriptors exchanged": (
        r"(wgmma\.mma_async.*, ?)(%rd\d+)(, ?)(%rd\d+)(,.*)",
        r"\1\4\3\2\5",
    ),
    "wgmma scale-d": (
        r"(wgmma\.mma_async.*%rd\d+, )(%p\d+|0)(, 1, 1.*)",
        lambda match: f"{match[1]}{int(match[2] == '0')}{match[3]}",
    ),
    "mma rows and columns of a exchanged": (
        r"(mma\.sync.*?\}, \{ %r\d+, )(%r\d+)(, )(%r\d+)(, %r\d+ \}.*)",
        r"\1\4\3\2\5",
    ),
    "mma halves of b exchanged": (
        r"(mma\.sync.*\}, \{ )(%r\d+)(, )(%r\d+)( \}, .*)",
        r"\1\4\3\2\5",
    ),
    "ldmatrix transposes the other way": (
        r"(ldmatrix\S*\.x4)(\.trans)?(\.shared.*)",
        lambda match: f"{match[1]}{'' if match[2] else '.trans'}{match[3]}",
    ),
    "stmatrix transposes": (r"(stmatrix\S*\.x4)(\.shared.*)", r"\1.trans\2"),
    "stmatrix registers exchanged": (r"(stmatrix.*\{)(%r\d+)(, )(%r\d+)(.*)", r"\1\4\3\2\5"),
    # Values.
    "shuffle distance": (
        r"(shfl\.sync\.bfly\S* .*, )(\d+)(, 31, -1;)",
        lambda match: f"{match[1]}{int(match[2]) ^ 3}{match[3]}",
    ),
    "shuffle from the next lane": (r"(shfl\.sync\.idx\S* .*, )(0)(, 31, -1;)", _plus(1)),
    "no ex2": (r"ex2\.\S* (.*)", r"mov.b32 \1"),
    "min for max": (r"max\.f32 (.*)", r"min.f32 \1"),
    "conversion truncates": (
        r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%r\d+), (%r\d+);",
        r"prmt.b32 \1, \3, \2, 0x7632;",
    ),
    "conversion exchanges halves": (
        r"(cvt\.rn\.\w+x2\.f32 %r\d+, )(%r\d+)(, )(%r\d+)(;)",
        r"\1\4\3\2\5",
    ),
    "selection exchanged": (
        r"(selp\.\w+ %\w+, )([^,]+)(, )([^,]+)(, .*)",
        r"\1\4\3\2\5",
    ),
    # The tensor memory accelerator.
    "no wait for an mbarrier": (
        r"mbarrier\.try_wait\S* (\w+), .*",
        r"mov.pred \1, -1;",
    ),
    "parity always 0": (r"(mbarrier\.try_wait.*, )(%r\d+)(;)", r"\g<1>0\3"),
    "parity always 1": (r"(mbarrier\.try_wait.*, )(%r\d+)(;)", r"\g<1>1\3"),
    "no mbarrier.init": (_PREDICATED + r"mbarrier\.init.*", DROPPED),
    "mbarrier of two arrivals": (r"(.*mbarrier\.init.*, )(1)(;)", _plus(1)),
    "no expect_tx": (_PREDICATED + r"mbarrier\.arrive\.expect_tx.*", DROPPED),
    "half the bytes expected": (
        r"(.*expect_tx.*, )(\d+)(;)",
        lambda match: f"{match[1]}{int(match[2]) // 2}{match[3]}",
    ),
    "more bytes expected": (r"(.*expect_tx.*, )(\d+)(;)", _plus(16)),
    "no bulk load": (_PREDICATED + r"cp\.async\.bulk\.tensor\S*global\.mbarrier.*", DROPPED),
    "no bulk store": (_PREDICATED + r"cp\.async\.bulk\.tensor\S*bulk_group.*", DROPPED),
    "no cp.async.bulk.commit_group": (
        r"(?:@%p\d+ )?cp\.async\.bulk\.commit_group ?;",
        DROPPED,
    ),
    "no cp.async.bulk.wait_group": (r"(?:@%p\d+ )?cp\.async\.bulk\.wait_group.*", DROPPED),
    "coordinates exchanged": (  # of a tensor of two axes
        r"(.*cp\.async\.bulk\.tensor.*\{)(%r\d+)(, )(%r\d+)(\}.*)",
        r"\1\4\3\2\5",
    ),
    "outer coordinates exchanged": (  # of one of four
        r"(.*cp\.async\.bulk\.tensor\.4d.*\{%r\d+, %r\d+, )(%r\d+)(, )(%r\d+)(\}.*)",
        r"\1\4\3\2\5",
    ),
    "bulk load from the next row": (_BULK_LOAD, _with(2, 1)),
    "bulk load to the next row": (_BULK_LOAD, _with(1, 128)),
    "bulk load announced at the next mbarrier": (_BULK_LOAD, _with(3, 8)),
    "wait for the next mbarrier": (r"mbarrier\.try_wait.*\[(%r\d+)\].*", _with(1, 8)),
    "no mbarrier.inval": (_PREDICATED + r"mbarrier\.inval.*", DROPPED),
    "box of half the size": (r"(.*tensormap\.replace\.tile\.box_dim.*, )(%r\d+)(;)", r"\g<1>32\3"),
    "swizzle of the tensor map": (r"(.*tensormap\.replace\.tile\.swizzle_mode.*, )0x3(;)", r"\g<1>0x2\2"),
    "elements of four bytes": (r"(.*tensormap\.replace\.tile\.elemtype.*, )0xa(;)", r"\g<1>0x7\2"),
    "no extent of the tensor": (r".*tensormap\.replace\.tile\.global_dim.*", DROPPED),
    "no stride of the tensor": (r".*tensormap\.replace\.tile\.global_stride.*", DROPPED),
    "no address of the tensor": (r".*tensormap\.replace\.tile\.global_address.*", DROPPED),
    "tensor map not published": (r".*tensormap\.cp_fenceproxy.*", DROPPED),
    "no fence.proxy.tensormap": (r".*fence\.proxy\.tensormap.*", DROPPED),
}  # fmt: skip


def mutants(ptx: str, kind: str, step: int = 1) -> Iterator[Mutant]:
    """Every `step`-th mutant of one kind, from the first."""
    pattern, replacement = KINDS[kind]
    lines = ptx.split("\n")
    place = 0
    for index, line in enumerate(lines):
        before = re.sub(r"\s+", " ", line.split("//")[0]).strip()
        match = re.fullmatch(pattern, before)
        if not match:
            continue
        if place % step == 0:
            after = (
                match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            )
            text = "\n".join([*lines[:index], after, *lines[index + 1 :]])
            yield Mutant(kind, place, index + 1, before, after, text)
        place += 1


def without(ptx: str, kind: str, places: tuple[int, ...]) -> str:
    """All of these places broken at once."""
    lines = ptx.split("\n")
    for mutant in mutants(ptx, kind):
        if mutant.place in places:
            lines[mutant.line - 1] = mutant.after
    return "\n".join(lines)
