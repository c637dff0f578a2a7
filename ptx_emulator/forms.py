"""Which forms of an instruction are known: all modifiers and types that its emitter reads or may leave aside.

Whatever else stands in an opcode would be dropped without a word, and may change the result (`add.rz.f32`),
so that it is refused. Left aside is what an emulator cannot notice: cache hints, `uni`, `aligned`, and how
near `approx` or `full` comes to the quotient.
"""

import functools
import re

from ptx_emulator.parser import Instruction

_INTEGER = r"[us](16|32|64)"
_BITS = r"b(16|32|64)"
_ANY = r"([bus](16|32|64)|f32)"
_HALF = r"b?f16(x2)?"
_SUM = rf"(rn\.)?((ftz\.)?(sat\.)?f32|f32x2|{_HALF})"
_EXTREME = rf"{_INTEGER}|relu\.s32|[us]16x2|(ftz\.)?(NaN\.)?(xorsign\.abs\.)?f32|(NaN\.)?{_HALF}"
_ORDERED = r"(eq|ne|lt|le|gt|ge)"
_SCOPE = r"(cta|cluster|gpu|sys)"
_STRONG = r"(relaxed|acquire|release|acq_rel|gpu|sys)"
_HINTS = rf"((volatile|weak|nc|relaxed|acquire|release|{_SCOPE}|c[agsv]|lu|wb|wt|L[12]::\w+)\.)*"
_SHARED = r"shared(::cta)?"
_ACCESS = rf"{_HINTS}({_SHARED}|global)\.{_HINTS}(v[24]\.)?([bus](8|16|32|64)|f32)"
_MATRICES = rf"sync\.aligned\.m8n8\.x[124]\.(trans\.)?{_SHARED}\.b16"
_APPROXIMATION = r"approx\.(ftz\.)?f32"
_ROUNDED_OR_NOT = r"(rn|approx)\.(ftz\.)?f32"
_TO_INTEGER = r"r[nzmp]i"

_CONVERSIONS = [
    r"[us](8|16|32|64)\.[us](8|16|32|64)",
    rf"{_TO_INTEGER}\.(ftz\.)?([us](8|16|32|64)|f32)\.f32",
    rf"{_TO_INTEGER}\.[us](8|16|32|64)\.b?f16",
    r"rn\.(f32|f16)\.[us](8|16|32|64)",
    r"rn\.bf16\.[us](8|16|32)",
    r"rn\.(relu\.)?b?f16(x2)?\.f32",
    r"rn\.(bf16\.f16|f16\.bf16)",
    r"(ftz\.)?f32\.b?f16",
    r"rna?\.tf32\.f32",
]
_COPIES = [
    rf"async\.c[ag]\.{_SHARED}\.global(\.L2::\w+)*",
    r"async\.(commit_group|wait_group|wait_all)",
    r"async\.bulk\.(commit_group|wait_group(\.read)?)",
    r"async\.bulk\.tensor\.[1-5]d\.global\.shared::cta(\.tile)?\.bulk_group(\.L2::cache_hint)?",
    r"async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global(\.tile)?"
    r"\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?",
]
_FENCES = [
    r"proxy\.async(\.shared::cta|\.global)?",
    rf"proxy\.tensormap::generic\.(acquire|release)\.{_SCOPE}",
    rf"((sc|acq_rel|acquire|release)\.)?{_SCOPE}",
    r"mbarrier_init\.release\.cluster",
]
_MBARRIERS = [
    rf"(init|inval)\.{_SHARED}\.b64",
    rf"(expect_tx|arrive(\.expect_tx)?)(\.release)?(\.{_SCOPE})?\.{_SHARED}\.b64",
    rf"(try|test)_wait\.parity(\.acquire)?(\.{_SCOPE})?\.{_SHARED}\.b64",
]
_ATOMICS = rf"(({_STRONG}|global)\.)*"
_ADDED = r"([us]|f)32|u64|noftz\.b?f16(x2)?|v[24]\.f32|noftz\.v[248]\.b?f16|noftz\.v[24]\.b?f16x2"
_REDUCTIONS = rf"{_ATOMICS}(add\.({_ADDED})|(min|max)\.[us](32|64)|(and|or|xor)\.b(32|64))"
_MAPS = [
    r"replace\.tile\.\w+\.shared::cta\.b1024\.b(32|64)",
    rf"cp_fenceproxy\.global\.shared::cta\.tensormap::generic\.release\.{_SCOPE}\.sync\.aligned",
]
_WARPGROUPS = [
    r"(fence|commit_group|wait_group)\.sync\.aligned",
    r"mma_async\.sync\.aligned\.m64n\d+k(16\.f32\.(bf16\.bf16|f16\.f16)|8\.f32\.tf32\.tf32)",
]

# Of each opcode, what may follow it.
_FORMS = {
    "ret": r"(uni)?", "exit": r"", "bra": r"(uni)?", "brx": r"idx(\.uni)?", "trap": r"", "call": r".*",
    "bar": r"(cta\.)?(sync|arrive)|warp\.sync", "barrier": r"(cta\.)?(sync|arrive)(\.aligned)?",
    "setmaxnreg": r"(inc|dec)\.sync\.aligned\.u32", "griddepcontrol": r"launch_dependents|wait",
    "prefetch": r".*", "createpolicy": r"fractional\.(L2::\w+\.)+b64",
    "fence": "|".join(_FENCES), "membar": r"cta|gl|sys",
    "mov": rf"{_ANY}|pred", "cvta": r"(to\.)?(global|param)\.u64", "selp": _ANY,
    "setp": rf"{_ORDERED}\.[bus](16|32|64)|(lo|ls|hi|hs)\.u(16|32|64)"
            rf"|({_ORDERED}u?|equ|neu|num|nan)\.((ftz\.)?f32|{_HALF})",
    "add": rf"{_INTEGER}|[us]16x2|sat\.s32|{_SUM}", "sub": rf"{_INTEGER}|sat\.s32|{_SUM}",
    "mul": rf"(lo|hi)\.{_INTEGER}|wide\.[us](16|32)|{_SUM}",
    "mad": rf"lo\.{_INTEGER}|wide\.[us](16|32)", "fma": rf"rn\.((ftz\.)?(sat\.)?f32|f32x2|{_HALF})",
    "div": rf"{_INTEGER}|(rn|approx|full)\.(ftz\.)?f32", "rem": _INTEGER,
    "max": _EXTREME, "min": _EXTREME,
    "neg": rf"s(16|32|64)|(ftz\.)?f32|{_HALF}", "abs": rf"s(16|32|64)|(ftz\.)?f32|{_HALF}",
    **dict.fromkeys(("and", "or", "xor", "not"), rf"{_BITS}|pred"), "lop3": r"b32",
    "shl": _BITS, "shr": r"[bus](16|32|64)", "bfe": r"[us](32|64)", "prmt": r"b32",
    **dict.fromkeys(("popc", "clz", "brev"), r"b(32|64)"),
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "sin", "cos"), _APPROXIMATION),
    "sqrt": _ROUNDED_OR_NOT, "rcp": _ROUNDED_OR_NOT, "tanh": r"approx\.f32",
    "cvt": "|".join(_CONVERSIONS),
    "ld": rf"{_ACCESS}|param\.([bus](8|16|32|64)|f32)", "st": rf"{_ACCESS}|param\..*",
    "ldmatrix": _MATRICES, "stmatrix": _MATRICES, "cp": "|".join(_COPIES),
    "atom": rf"{_REDUCTIONS}|{_ATOMICS}(exch\.b(32|64)|cas\.b(16|32|64))", "red": _REDUCTIONS,
    "tensormap": "|".join(_MAPS), "mbarrier": "|".join(_MBARRIERS),
    "shfl": r"sync\.(up|down|bfly|idx)\.b32", "vote": r"sync\.ballot\.b32", "elect": r"sync",
    "redux": r"sync\.((add|min|max)\.[us]32|(and|or|xor)\.b32)",
    "mma": r"sync\.aligned\.(m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)"
           r"|m16n8k8\.row\.col\.f32\.tf32\.tf32)\.f32",
    "wgmma": "|".join(_WARPGROUPS),
}  # fmt: skip


def check_form(instruction: Instruction) -> None:
    """Raises a ValueError where the opcode or a part of it is unknown."""
    _check_parts(instruction.parts)


@functools.cache  # of the forms that are known: errors are not kept
def _check_parts(parts: tuple[str, ...]) -> None:
    opcode, *rest = parts
    if opcode not in _FORMS:
        raise ValueError(f"there is no {opcode} here")
    if not re.fullmatch(_FORMS[opcode], ".".join(rest)):
        raise ValueError(f"{'.'.join(parts)} is no known form of {opcode}")
