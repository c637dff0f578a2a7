"""`TTTPlan`: the order of updates and applies that `ttt` computes."""

import numbers
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class TTTOperator(Protocol):
    """A step as LaCT's code for views and video has it: an update, an apply, or first one and then the
    other."""

    start: int
    end: int  # -1: that of the sequence
    update: bool
    apply: bool


@dataclass(frozen=True, init=False)
class Update:
    """One step of the fast weights on some keys.

    `Update(start, stop)` takes the keys `start:stop`, `Update([(a, b), (c, d)])` those of several ranges,
    whose gradients are summed. A stop of None is the end of the sequence; if no key lies before it, nothing
    is updated.

    Raises:
        TypeError: a border is no int.
        ValueError: a range begins before 0 or ends before it begins, or there is none.
    """

    ranges: tuple[tuple[int, int | None], ...]

    def __init__(self, start: int | Sequence[tuple[int, int | None]], stop: int | None = None):
        ranges = tuple(start) if isinstance(start, Sequence) else ((start, stop),)
        if isinstance(start, Sequence) and stop is not None:
            raise TypeError(f"Update takes (start, stop) or ranges, got {start!r} and {stop!r}")
        if not ranges:
            raise ValueError("Update must have at least one range, got none")
        object.__setattr__(self, "ranges", tuple(_range("Update", r) for r in ranges))

    def __repr__(self) -> str:
        if len(self.ranges) == 1:
            return "Update({}, {})".format(*self.ranges[0])
        return f"Update({list(self.ranges)})"


@dataclass(frozen=True)
class Apply:
    """The fast weights as they now are, applied to the queries `start:stop` (None: to the last, if any).

    Raises:
        TypeError: a border is no int.
        ValueError: the range begins before 0, or has no query.
    """

    start: int
    stop: int | None = None

    def __post_init__(self):
        start, stop = _range("Apply", (self.start, self.stop))
        if start == stop:
            raise ValueError(f"Apply must have at least one query, got the range ({start}, {stop})")
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)

    def __repr__(self) -> str:
        return f"Apply({self.start}, {self.stop})"


Step = Update | Apply


@dataclass(frozen=True, init=False)
class TTTPlan:
    """Updates and applies of one sequence, in the order in which they happen.

    `TTTPlan([Update(0, 64), Apply(0, 96)])` makes one step on the keys 0 to 63, and gives the outputs of 96
    queries. Ranges may come more than once, overlap, and leave out what they like.

    Raises:
        TypeError: a step is neither an `Update` nor an `Apply`.
    """

    steps: tuple[Step, ...]

    def __init__(self, steps: Iterable[Step]):
        if not isinstance(steps, Iterable):
            raise TypeError(f"steps must be a sequence of Update and Apply, got {steps!r}")
        steps = tuple(steps)
        for i, step in enumerate(steps):
            if not isinstance(step, (Update, Apply)):
                raise TypeError(f"step {i} of a plan must be an Update or an Apply, got {step!r}")
        object.__setattr__(self, "steps", steps)

    def __repr__(self) -> str:
        return f"TTTPlan({list(self.steps)})"

    @classmethod
    def block_causal(cls, T: int, chunk_size: int) -> "TTTPlan":
        """The order of language models: each chunk is read with the weights that those before it have made.

        The last update changes no output: without `return_state` it is not computed.
        """
        chunks = _chunks(T, chunk_size)
        return cls([step for chunk in chunks for step in (Apply(*chunk), Update(*chunk))])

    @classmethod
    def bidirectional(cls, T: int | None = None) -> "TTTPlan":
        """One step on all keys, then all queries: every token sees every other."""
        T = None if T is None else _int("T", T)
        return cls([] if T == 0 else [Update(0, T), Apply(0, T)])

    @classmethod
    def update_first(cls, T: int, chunk_size: int) -> "TTTPlan":
        """Chunk by chunk, each of which sees itself, too."""
        chunks = _chunks(T, chunk_size)
        return cls([step for chunk in chunks for step in (Update(*chunk), Apply(*chunk))])

    @classmethod
    def of_ttt_operators(cls, order: Iterable[TTTOperator | Sequence]) -> "TTTPlan":
        """The `ttt_ua_order` of LaCT's code: objects with the fields start, end, update and apply, or
        sequences of these four.

        An end of -1 or None is that of the sequence. Others that go beyond it are errors, where slices would
        be cut; `shard` cuts them. An apply to no queries is left out.

        Raises:
            TypeError: the order is no sequence, or an entry is neither of these.
            ValueError: a range begins before 0 or ends before it begins; or an entry has a gradient that it
                does not update with (`compute_grad` or `fast_weight`, which some models have beside update).
        """
        if not isinstance(order, Iterable):
            raise TypeError(f"the order must be a sequence of TTTOperator, got {order!r}")
        steps = []
        for i, entry in enumerate(order):
            start, stop, update, apply = _operator_fields(i, entry)
            stop = None if stop == -1 else stop
            if update:
                steps.append(Update(start, stop))
            if apply and start != stop:
                steps.append(Apply(start, stop))
        return cls(steps)

    def shard(self, *, queries: tuple[int, int], keys: tuple[int, int]) -> "TTTPlan":
        """The part of this plan in the queries `range(*queries)` and the keys `range(*keys)`.

        Each range becomes what it has in common with these, counted from their first. Every update stays,
        also without keys, so that the shards of all ranks fit together in `lact_kernels.distributed.ttt`.
        Applies without queries vanish.

        Raises:
            TypeError: a border is no int.
            ValueError: `queries` or `keys` begins before 0 or ends before it begins.
        """
        for name, piece in (("queries", queries), ("keys", keys)):
            if _range(name, piece)[1] is None:
                raise TypeError(f"stop of {name} must be an int, got None")
        steps = []
        for step in self.steps:
            if isinstance(step, Update):
                ranges = [_common(r, keys) for r in step.ranges]
                ranges = [r for r in ranges if r != (0, 0)]
                steps.append(Update(ranges or [(0, 0)]))
            else:
                common = _common((step.start, step.stop), queries)
                if common != (0, 0):
                    steps.append(Apply(*common))
        return TTTPlan(steps)


def _operator_fields(i: int, entry: TTTOperator | Sequence) -> tuple[int, int, bool, bool]:
    if isinstance(entry, Sequence) and not hasattr(entry, "_fields") and len(entry) == 4:
        return tuple(entry)
    fields = ("start", "end", "update", "apply")
    missing = [x for x in fields if not hasattr(entry, x)]
    if missing:
        raise TypeError(f"entry {i} of the order has no {', '.join(missing)}: {entry!r}")
    for name in ("compute_grad", "fast_weight"):
        if bool(getattr(entry, name, entry.update)) != bool(entry.update):
            raise ValueError(
                f"entry {i} of the order must have the same {name} and update, got {entry!r}: for one update"
                " with the gradients of several ranges, give a TTTPlan with Update([(start, stop), ...])"
            )
    return tuple(getattr(entry, x) for x in fields)


def _common(given: tuple[int, int | None], piece: tuple[int, int]) -> tuple[int, int]:
    """What a range has in common with a piece of the tokens, counted from the first of these."""
    (start, stop), (first, last) = given, piece
    start, stop = max(start, first), last if stop is None else min(stop, last)
    return (start - first, stop - first) if start < stop else (0, 0)


def _range(step: str, given: tuple[int, int | None]) -> tuple[int, int | None]:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"{step} must have ranges (start, stop), got {given!r}")
    start, stop = given
    start = _int(f"start of {step}", start)
    stop = None if stop is None else _int(f"stop of {step}", stop)
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"{step} must have a range 0 <= start <= stop, got ({start}, {stop})")
    return start, stop


def _int(name: str, value: int) -> int:
    """A border as a plain int: NumPy's are taken, too, and a length that is symbolic becomes a constant."""
    if type(value) is int:
        return value
    is_int = isinstance(value, (numbers.Integral, torch.SymInt))
    if not is_int or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(value)


def _chunks(T: int, chunk_size: int) -> list[tuple[int, int]]:
    T, chunk_size = _int("T", T), _int("chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if T < 0:
        raise ValueError(f"T must not be negative, got {T}")
    return [(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]
