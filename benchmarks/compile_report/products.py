"""Whether warps share a kernel's matrix products, or compute some of them more than once.

A product of tiles, `[M, K]` by `[K, N]`, has 2 M N K floating-point operations. Where a tile has fewer rows
and columns than the program's warps cover, some compute what others compute too. Both sides are counted once
for each place in the code, not as often as it runs: a loop counts once on both.
"""

import math
import re

_DOT = re.compile(r"= (?:tt\.dot|ttng\.warp_group_dot) .* : (.*)$", re.MULTILINE)
_SHAPE = re.compile(r"<(\d+)x(\d+)x[a-z]")
_MATRIX_INSTRUCTION = re.compile(
    r"\b(mma\.sync\.aligned|wgmma\.mma_async\.sync\.aligned)\.m(\d+)n(\d+)k(\d+)\."
)
WARPS = {"mma.sync.aligned": 1, "wgmma.mma_async.sync.aligned": 4}  # that execute one together


def product_repeats(ttgir: str, ptx: str, num_warps: int) -> float | None:
    """Operations of the matrix instructions over those of the tiles.

    None without such instructions, and for sm_100, whose products one thread issues for all.
    """
    executed = sum(
        2 * math.prod(map(int, shape)) * num_warps // WARPS[kind]
        for kind, *shape in _MATRIX_INSTRUCTION.findall(ptx)
    )
    if not executed:
        return None
    needed = 0
    for types in _DOT.findall(ttgir):
        (rows, inner), (_, columns) = _SHAPE.findall(types)[:2]
        needed += 2 * int(rows) * int(inner) * int(columns)
    return executed / needed
