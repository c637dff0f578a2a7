"""The loops with matrix products: what a mask takes in them, and what goes on beside the products."""

import dataclasses
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from benchmarks.compile_report.machine_code import Instruction

# Hopper's asynchronous products, those of Ampere, those of Blackwell.
MATRIX_INSTRUCTION = re.compile(r"(HGMMA|HMMA|UTC\w*MMA)\b")


@dataclasses.dataclass(frozen=True)
class MatrixLoop:
    """An innermost loop with matrix instructions. Counts are instructions of a thread in one iteration.

    A mask compares integers and selects floats, once at least per element that a thread owns. Loop
    control, addresses and waits take some compares, and select integers only. Where a branch goes around the
    mask, the least numbers are those of the way through the loop that has the fewest selects.

    Asynchronous copies are committed in groups, one for each tile that is loaded: how many may still be
    on their way when the first product of an iteration begins says how far ahead tiles are asked for. Of
    copies by descriptors, whose waits do not say so, it follows from the number of stages. None: the loop
    copies nothing.

    A product of tiles is several instructions on the same accumulators. Hopper's and Blackwell's are
    asynchronous: each product is waited for once, or together with others, and a special function (`MUFU`: an
    exponential, a reciprocal) between its issue and that wait runs beside it. Ampere's are not.
    """

    compares: int
    selects: int
    copies_in_flight: int | None
    products: int  # 0 where they are not asynchronous, as are the next two
    waits: int
    overlapped: int  # special functions while a product is on its way
    special_functions: int
    least_compares: int
    least_selects: int


def matrix_loops(code: Sequence[Instruction], num_stages: int = 2) -> list[MatrixLoop]:
    """The innermost loops with matrix instructions, in the order in which they end."""
    bodies = [
        x for x in _loop_bodies(code) if any(MATRIX_INSTRUCTION.match(code[i].name) for i in x)
    ]
    return [
        _describe([code[i] for i in sorted(body)], num_stages)
        for body in bodies
        if not any(other < body for other in bodies)
    ]


def _loop_bodies(code: Sequence[Instruction]) -> list[set[int]]:
    """Each loop as the places of its instructions.

    A loop is all that leads to a backward branch without passing its target. Code out of line, where
    kernels for sm_100 wait, branches back too, but what leads there includes the kernel's entry.
    """
    place_of = {instruction.address: place for place, instruction in enumerate(code)}
    sources = defaultdict(list)  # of each instruction, those that lead to it
    backward = []
    for place, instruction in enumerate(code):
        if instruction.target is not None:
            first = place_of[instruction.target]
            sources[first].append(place)
            if first <= place:
                backward.append((first, place))
        if instruction.falls_through:
            sources[place + 1].append(place)
    bodies = defaultdict(set)  # by their first instruction
    for first, last in backward:
        body, leading = {first}, [last]
        while leading:
            place = leading.pop()
            if place not in body:
                body.add(place)
                leading += sources[place]
        if 0 not in body:
            bodies[first] |= body
    return list(bodies.values())


def _describe(body: list[Instruction], num_stages: int) -> MatrixLoop:
    kinds = Counter(instruction.kind for instruction in body)
    products, waits, overlapped = _asynchronous(body)
    least_selects, least_compares = _least(body)
    return MatrixLoop(
        compares=kinds["ISETP"],
        selects=kinds["FSEL"],
        copies_in_flight=_copies_in_flight(body, num_stages),
        products=products,
        waits=waits,
        overlapped=overlapped,
        special_functions=kinds["MUFU"],
        least_compares=least_compares,
        least_selects=least_selects,
    )


def _least(body: list[Instruction]) -> tuple[int, int]:
    """Selects, and compares, on the way from the loop's beginning back to it that has the fewest of them."""
    place_of = {instruction.address: place for place, instruction in enumerate(body)}
    first = min(place_of[x.target] for x in body if x.target in place_of)
    ways, done = [(0, 0, first)], set()
    while ways:
        selects, compares, place = heapq.heappop(ways)
        if place in done:
            continue
        done.add(place)
        x = body[place]
        selects, compares = selects + (x.kind == "FSEL"), compares + (x.kind == "ISETP")
        next_places = [place_of[x.target]] if x.target in place_of else []
        if first in next_places:
            return selects, compares
        if x.falls_through and place + 1 < len(body):
            next_places.append(place + 1)
        for following in next_places:
            heapq.heappush(ways, (selects, compares, following))
    raise ValueError("no way back to the beginning of the loop")


def _once(body: list[Instruction]) -> list[Instruction]:
    """Without the code out of line that repeats a wait until it succeeds, which is the same wait."""
    repeated = {x.target for x in body if x.target is not None}
    return [x for x in body if not (x.name.startswith("SYNCS") and x.address in repeated)]


def _asynchronous(body: list[Instruction]) -> tuple[int, int, int]:
    """Products, waits for them, and special functions while a product is on its way."""
    body = _once(body)
    # On barriers in memory Hopper waits for copies, Blackwell for products.
    ends = "WARPGROUP.DEPBAR" if any(x.kind == "HGMMA" for x in body) else "SYNCS.PHASECHK"
    on_the_way = False
    for _ in range(2):  # what one iteration issues last, the next one waits for
        products = waits = overlapped = 0
        accumulators = None
        for x in body:
            if x.kind == "HGMMA":
                products += x.operands.split(",")[0] != accumulators
                on_the_way, accumulators = True, x.operands.split(",")[0]
            elif x.kind == "UTCBAR":  # the end of a product, signalled to those who wait
                products += 1
                on_the_way = True
            elif x.name.startswith(ends):
                waits += 1  # Hopper's may leave the last few products on their way
                on_the_way = x.kind == "WARPGROUP" and not x.operands.rstrip().endswith(" 0x0")
            elif x.kind == "MUFU":
                overlapped += on_the_way
    return products, waits, overlapped


def _copies_in_flight(body: list[Instruction], num_stages: int) -> int | None:
    kinds = Counter(x.kind for x in body)
    if kinds["LDGSTS"]:
        waits = (x.operands for x in body if x.name == "DEPBAR.LE" and "SB0" in x.operands)
        return int(next(waits).split(",")[1], 16)
    if kinds["UTMALDG"] and kinds["HGMMA"]:
        body = _once(body)
        first_product = next(place for place, x in enumerate(body) if x.kind == "HGMMA")
        copies, waits = (
            [x.name.startswith(y) for x in body] for y in ("UTMALDG", "SYNCS.PHASECHK")
        )
        # An iteration begins with those of the tiles before its own, and a wait is for as many as each other.
        arrived = sum(waits[:first_product]) * sum(copies) // max(sum(waits), 1)
        return (num_stages - 1) * sum(copies) + sum(copies[:first_product]) - arrived
    return None
