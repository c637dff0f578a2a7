"""The operations of Muon's Newton-Schulz iteration, forward and backward, in order: see `newton_schulz`.

What is computed, and from what, depends on the coefficients alone, not on the matrices' sizes or number.
Here it is written down once, as a list; the kernel goes through it, and so may others. An operation has a
*level*: it needs nothing but what those of lower levels have computed, so all of one level can run at once.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from lact_kernels.core.newton_schulz import Coefficients

# Of the gradients of squares in the Gram form: those of a gradient in few places can be larger than X's.
GRAM_SCALE = 2.0**-4


class Kind(IntEnum):
    """What an operation does, beside factors and terms to add."""

    NORMALIZE = 0  # G over its norm
    NORMALIZE_GRADIENT = 1  # dX over its norm, times sqrt(m)
    SYMMETRIC = (
        2  # a b^T, which is symmetric: tiles on and below the diagonal, and the others from these
    )
    ROWS = 3  # a b^T
    COLUMNS = 4  # a b
    INNER = 5  # rows of <dX, G>, and of other inner products


class Form(IntEnum):
    """What an array has for each matrix."""

    SQUARE = 0  # [m, m]
    LONG = 1  # [m, n]
    EXACT = 2  # [m, m], float32 always
    RESULT = 3  # the matrix's own shape, float32: what the iteration ends with


@dataclass(frozen=True, eq=False)
class Array:
    """What one operation writes, and others read."""

    form: Form


class Operation(NamedTuple):
    """`out = factor (a b + a2 b2) + y_factor y + ..`, with b transposed as its kind says."""

    kind: Kind
    out: Array | None = None
    terms: tuple[tuple[Array, Array], ...] = ()  # one or two products
    factor: float = 1.0
    add: tuple[
        tuple[Array, float], ...
    ] = ()  # up to two in the iteration's dtype, and an exact one
    exact: Array | None = None  # receives the same in float32

    @property
    def reads(self) -> list[Array]:
        return [*itertools.chain(*self.terms), *(array for array, _ in self.add)]

    @property
    def writes(self) -> list[Array]:
        return [array for array in (self.out, self.exact) if array is not None]


def forward(runs: tuple[Coefficients, ...]) -> list[Operation]:
    """From G to its orthogonalisation, with the steps in these runs (`core.newton_schulz.groups`)."""
    recorder = Recorder()
    if runs:
        *_, last = recorder.groups(runs)
        recorder.multiply(last.rest, last.x, last.q, ends=True)
    else:
        recorder.normalize(ends=True)
    return recorder.operations


def backward(runs: tuple[Coefficients, ...]) -> list[Operation]:
    """From dX and G to the gradient of G / |G|_F; the iterates are computed again."""
    recorder = Recorder()
    iterates = list(recorder.groups(runs))
    dx = recorder.normalize(gradient=True, ends=not iterates)
    for group in reversed(iterates):
        dr = recorder.gram_gradient(group, dx)
        ends = group is iterates[0]
        dx = recorder.multiply(group.rest, dx, group.q, (dr, group.x), ends=ends)
    recorder.operations.append(Operation(Kind.INNER, add=((dx, 1.0),)))
    return recorder.operations


class Step(NamedTuple):
    """A step of a group, and what its gradient reads."""

    triple: tuple[float, float, float]
    r: Array
    b: Array
    t: Array | None  # None in the last step of a group
    q: float  # Q before the step is q I + rest
    rest: Array | None


class Group(NamedTuple):
    """Some steps at once: X <- q X + rest X."""

    x: Array
    steps: list[Step]
    q: float
    rest: Array


class Recorder:
    """Writes down operations. Its methods return the arrays that these would write."""

    def __init__(self):
        self.operations: list[Operation] = []

    def groups(self, runs: tuple[Coefficients, ...]) -> Iterator[Group]:
        """All groups of steps, each with the X that it begins with."""
        group = None
        for triples in runs:
            if group is None:
                x = self.normalize()
            else:
                x = self.multiply(group.rest, group.x, group.q)
            group = self._group(x, triples)
            yield group

    def _group(self, x: Array, triples: Coefficients) -> Group:
        several = len(triples) > 1
        r, exact = self._symmetric_exact(x) if several else [self._symmetric(x)] * 2
        q, rest, steps = 1.0, None, []
        for number, triple in enumerate(triples, start=1):
            a, b, c = triple
            polynomial = self._symmetric(r, add=((exact, b),), factor=c)
            now = (triple, r, polynomial)
            t = None
            if number < len(triples):
                t, exact = self._symmetric_exact(polynomial, r, ((exact, a),))
                r, exact = self._symmetric_exact(polynomial, t, ((exact, a),))
            steps.append(Step(*now, t, q, rest))
            if rest is None:
                rest = polynomial
            else:
                add = ((rest, a), (polynomial, q))
                rest = self._symmetric(polynomial, rest, add=add, one_sided=True)
            q *= a
        return Group(x, steps, q, rest)

    def gram_gradient(self, group: Group, dx: Array) -> Array:
        """dR of the group's X X^T, twice."""
        scale = GRAM_SCALE if len(group.steps) > 1 else 1.0
        dq, dr = self._symmetric(group.x, dx, factor=scale), None
        for step in reversed(group.steps):
            a, b, c = step.triple
            dp = dq
            if step.rest is not None:
                dp = self._symmetric(step.rest, dq, add=((dq, step.q),), factor=0.5)
                dq = self._symmetric(step.b, dq, add=((dq, a),), factor=0.5)
            if dr is not None:
                dp = self._symmetric(step.t, dr, add=((dp, 1.0),))
            own = self._symmetric(step.r, dp, add=((dp, b),), factor=c)
            if dr is None:
                dr = own
            else:
                half = self._record(Kind.ROWS, Form.SQUARE, ((step.b, dr),), add=((dr, a),))  # P dR
                back = 1.0 / scale if step is group.steps[0] else 1.0
                add = ((half, back * a), (own, back))
                dr = self._symmetric(half, step.b, add=add, factor=back, one_sided=True)
        return dr

    def normalize(self, gradient: bool = False, ends: bool = False) -> Array:
        kind = Kind.NORMALIZE_GRADIENT if gradient else Kind.NORMALIZE
        return self._record(kind, Form.RESULT if ends else Form.LONG)

    def multiply(
        self,
        square: Array,
        x: Array,
        factor: float,
        second: tuple[Array, Array] | None = None,
        ends: bool = False,
    ) -> Array:
        """`factor x + square x`, plus the second product."""
        terms = ((square, x), second) if second else ((square, x),)
        form = Form.RESULT if ends else Form.LONG
        return self._record(Kind.COLUMNS, form, terms, add=((x, factor),))

    def _symmetric(
        self, a: Array, b: Array | None = None, *, one_sided: bool = False, **more
    ) -> Array:
        """`a a^T`, or `a b^T + b a^T`, or if that is one-sided `a b^T`, which is symmetric by itself."""
        terms = ((a, a),) if b is None else ((a, b),) if one_sided else ((a, b), (b, a))
        return self._record(Kind.SYMMETRIC, Form.SQUARE, terms, **more)

    def _symmetric_exact(
        self, a: Array, b: Array | None = None, add: tuple = ()
    ) -> tuple[Array, Array]:
        """A one-sided product, and the same in float32."""
        exact = Array(Form.EXACT)
        return self._symmetric(a, b, add=add, one_sided=True, exact=exact), exact

    def _record(self, kind: Kind, form: Form, terms: tuple = (), **more) -> Array:
        out = Array(form)
        self.operations.append(Operation(kind, out, terms, **more))
        return out


def by_levels(operations: list[Operation]) -> list[list[Operation]]:
    """The operations of each level, as early as what they read allows."""
    written: dict[Array, int] = {}
    levels: dict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        level = 1 + max((written[array] for array in operation.reads), default=-1)
        written |= dict.fromkeys(operation.writes, level)
        levels[level].append(operation)
    return [levels[level] for level in range(len(levels))]


def places(levels: list[list[Operation]]) -> dict[Array, int]:
    """Which of the places for arrays of its form each array takes.

    A place is free again in the level after those whose operations read it.
    """
    last_reads = {
        array: number
        for number, level in enumerate(levels)
        for operation in level
        for array in operation.reads
    }
    result: dict[Array, int] = {}
    held: list[Array] = []
    for number, level in enumerate(levels):
        held = [array for array in held if last_reads.get(array, number) >= number]
        for array in itertools.chain(*(operation.writes for operation in level)):
            taken = {result[other] for other in held if other.form == array.form}
            result[array] = next(place for place in itertools.count() if place not in taken)
            held.append(array)
    return result
