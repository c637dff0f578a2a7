"""From `TTTPlan`s to what a backend computes: a `Plan`, whose versions have one range of tokens each."""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.plan import Plan
from lact_kernels.core.ttt_plan import Apply, TTTPlan

Range = tuple[int, int]


class Lowered(NamedTuple):
    """The plan of N sequences that lie end to end in a row of queries, and in one of keys.

    Its ranges are those of other rows, where `queries` or `keys` say that they are to be gathered: what these
    ranges hold, end to end. An update that is one range of keys which no other reads is read in place, and so
    are queries whose outputs are in their own order.
    """

    plan: Plan
    queries: list[Range]  # one: read in place
    keys: list[Range] | None  # None: read in place


def lower(
    plans: Sequence[TTTPlan],
    queries: Sequence[int],
    keys: Sequence[int],
    return_end: bool,
    distributed: bool = False,
) -> Lowered:
    """`plans` of N sequences, the borders of whose queries and keys these are `[N + 1]`.

    Updates that no query sees are left out, unless `return_end` needs them. Where a plan is `distributed`,
    all of them stay, as another rank may need them, and they may have no keys here, as other ranks have some.

    Raises:
        ValueError: a range goes beyond its sequence, or holds no token.
    """
    updates, borders, applied, place = [], [], [], 0
    queries, keys = _constants(queries), _constants(keys)
    for n, plan in enumerate(plans):
        steps, seen = _versions(plan, queries[n : n + 2], keys[n : n + 2], distributed)
        while steps and not seen[-1] and not (return_end or distributed):
            steps.pop()
            seen.pop()
        updates.append(steps)
        borders.append([place])
        for version in seen:
            place += sum(b - a for a, b in version)
            borders[-1].append(place)
            applied += version
    key_ranges, gathered = _key_ranges(updates)
    return Lowered(Plan(key_ranges, borders), _joined(applied) or [(0, 0)], gathered)


def gather(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """These ranges of the tokens `[B, T, ...]`, end to end: a view of one, else a copy.

    A token may be in many: then its gradients are summed, in order.
    """
    if len(ranges) == 1:
        return x[:, slice(*ranges[0])]
    length = operator.index(x.shape[1])
    places = sorted({0, length, *(place for r in ranges for place in r)})
    pieces = x.split([b - a for a, b in itertools.pairwise(places)], dim=1)
    index = {place: i for i, place in enumerate(places)}
    return torch.cat([p for a, b in ranges for p in pieces[index[a] : index[b]]], dim=1)


def divided(momentum: Tensor, updates: Iterable[Range], numbers: Sequence[Tensor | int]) -> Tensor:
    """Momentum `[B, T, H]`, that of each update's keys by the number that belongs to it."""
    parts, place = [], 0
    for (a, b), number in sorted(zip(updates, numbers), key=lambda x: x[0]):
        parts += [(a - place, None), (b - a, number)]
        place = b
    parts.append((momentum.shape[1] - place, None))
    pieces = momentum.split([length for length, _ in parts], dim=1)
    return torch.cat([x if n is None else x / n for x, (_, n) in zip(pieces, parts)], dim=1)


def _versions(plan: TTTPlan, queries: Sequence[int], keys: Sequence[int], distributed: bool):
    """The ranges of each update's keys and of each version's queries, as places in the rows."""
    updates, applied = [], [[]]
    for i, step in enumerate(plan.steps):
        name = f"step {i} of plan, {step},"
        if isinstance(step, Apply):
            found = _joined([_placed(name, (step.start, step.stop), queries, "queries")])
            if not found and step.stop is not None:
                raise ValueError(f"{name} has no query")
            applied[-1] += found
            continue
        found = _joined(sorted(_placed(name, r, keys, "keys") for r in step.ranges))
        if found or distributed:
            updates.append(found)
            applied.append([])
        elif all(stop is not None for _, stop in step.ranges):
            raise ValueError(f"{name} has no key")
    return updates, applied


def _placed(name: str, given: tuple[int, int | None], borders: Sequence[int], of: str) -> Range:
    start, stop = given
    first, last = borders
    length = last - first
    start, stop = _constants((start, length if stop is None else stop))
    if stop > length or start > stop:
        raise ValueError(f"{name} goes beyond its sequence, which has {length} {of}")
    return first + start, first + stop


def _constants(numbers: Sequence[int]) -> list[int]:
    """The numbers, which compiled code may take for variables, as constants of its program."""
    return [operator.index(x) for x in numbers]


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The ranges with those joined that follow one another, without empty ones."""
    joined = []
    for start, stop in ranges:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _key_ranges(updates: list[list[list[Range]]]) -> tuple[list[list[Range]], list[Range] | None]:
    """One range of keys for each update of each sequence, and where these are to be gathered from."""
    all_ranges = [r for ups in updates for update in ups for r in update]
    in_order = sorted(all_ranges)
    disjoint = all(a[1] <= b[0] for a, b in itertools.pairwise(in_order))
    if disjoint and all(len(update) <= 1 for ups in updates for update in ups):
        return [[update[0] if update else (0, 0) for update in ups] for ups in updates], None
    placed, place = [], 0
    for ups in updates:
        placed.append([])
        for update in ups:
            length = sum(b - a for a, b in update)
            placed[-1].append((place, place + length))
            place += length
    return placed, all_ranges
