"""Muon's orthogonalisation by Newton-Schulz steps, forward and backward, of all matrices at once.

With X = G / (|G|_F + 1e-7), `[m, n]`, transposed where G has more rows than columns, a step (a, b, c) is

```
    R = X X^T      B = b R + c R R      X <- a X + B X
```

and its gradient, with R and B symmetric, and D = dX X^T + X dX^T, which is all of dB that counts:

```
    dR = b D + c (D R + R D)      dX <- a dX + B dX + dR X
```

*Gram form.* Of large elongated matrices the first steps are taken on R alone, which is smaller: `groups`
of `core/newton_schulz.py` decides. With P = a I + B, X after these steps is Q X with Q the product of
their P, and as all are polynomials of one symmetric matrix, they are symmetric and commute:

```
    T = P R      R <- P T      Q <- P Q      at the end X <- Q X
```

Backward from dQ = D, step by step, where the right hand sides are those of the forward:

```
    dP = (dQ Q + Q dQ) / 2 + T dR + dR T      dQ <- (P dQ + dQ P) / 2
    dR <- P dR P + b dP + c (dP R + R dP)      at the end dX <- Q dX + dR X
```

(All of these are twice the gradients of symmetric matrices.) A single step is the case of one step in a
group. Of P and Q the multiples of I are kept as numbers, so that only B and Q - q I are rounded.

So there are two kinds of products: symmetric ones, of which only the tiles on and below the diagonal are
computed, and those with X. For 16-bit tokens the matrices are float16, for float32 ones float32,
and so are small ones, which cost nothing; products accumulate in float32. The division by the norm brings
all values into the range of float16. Gradients, whose scale is arbitrary, are divided by theirs too,
`dX sqrt(m) / |dX|_F`, and given their scale back at the end. LaCT's five steps amplify small singular
values, and rounding noise with them, about 490 times, which is why bfloat16 would not do. For the same
reason R and T of the Gram form are kept in float32 beside float16, for the terms a R and a T of what comes
next: small singular values are in these alone. `benchmarks/newton_schulz_accuracy.py` shows the errors.

All of it is one launch in each direction: `newton_schulz_schedule` lists the operations, here they become
a table of tiles, and the kernel (`newton_schulz_kernels`) goes through that.
"""

import functools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from lact_kernels.core.newton_schulz import LACT, Coefficients, groups
from lact_kernels.triton.configs import TTTConfig, capability_of, ttt_config
from lact_kernels.triton.fast_weights import newton_schulz_schedule as schedule
from lact_kernels.triton.fast_weights.layout import ALIGNMENT, Dims
from lact_kernels.triton.fast_weights.newton_schulz_kernels import (
    AT,
    INNER_ROWS,
    KERNELS,
    NOWHERE,
    Entry,
)
from lact_kernels.triton.fast_weights.newton_schulz_schedule import Array, Form, Kind, Operation
from lact_kernels.triton.launch import launch

SMALL = 64  # up to this size products take less time than all else, in float32, too
WIDE = 8  # float16 numbers in the widest load
BEYOND = 2**31 - 1  # first tile of an entry that there is not


class Iteration:
    """The iteration for matrices packed `[heads, SIZE]`, of one shape and dtype, one call at a time."""

    def __init__(
        self,
        heads: int,
        dims: Dims,
        tokens_dtype: torch.dtype,
        device: torch.device,
        coefficients: Coefficients = LACT.coefficients,
    ):
        self.heads, self.dims, self.device = heads, dims, device
        self.dtype = iterated_dtype(dims, tokens_dtype)
        runs = groups(coefficients, dims.iterated, self.dtype)
        self.config = _config(dims, runs, self.dtype, device)
        self._plan = functools.partial(_plan, runs, dims, self.config, device)
        self.counters = torch.zeros(1 + 3 * heads, dtype=torch.int32, device=device)

    @functools.cached_property
    def _forward(self) -> "Plan":
        return self._plan(backward=False)

    @functools.cached_property
    def _backward(self) -> "Plan":
        return self._plan(backward=True)

    def forward(self, g: Tensor, squares: Tensor) -> Tensor:
        """The orthogonalised g, float32. `squares` `[heads, ROWS]` are those of the rows' norms."""
        result = torch.empty_like(g)
        self._launch(self._forward, g, squares, *(None,) * 6, result)
        return result

    def backward(
        self,
        dx: Tensor,
        g: Tensor,
        dsquares: Tensor,
        squares: Tensor,
        dbuffers: Tensor | None = None,
        with_sizes: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradient of g / |g|_F in units of `|dx|_F / sqrt(m)`, float32, and the rows of <.., g>.

        Iterates are computed again. `dsquares` and `squares` are those of the norms of rows of dx and g. With
        sizes those of the result and of `dbuffers`, if there are any, are returned, too.
        """
        dbuffers = dbuffers if with_sizes else None
        result, inner = torch.empty_like(dx), torch.empty_like(squares)
        size = torch.empty_like(squares) if with_sizes else None
        dbuffers_size = None if dbuffers is None else torch.empty_like(squares)
        rows = inner, size, dbuffers_size
        self._launch(self._backward, g, squares, dx, dsquares, dbuffers, *rows, result)
        return result, *rows

    def _launch(self, plan: "Plan", *arguments: Tensor | None) -> None:
        heads = self.heads
        arrays = torch.empty(heads, plan.arrays_size, dtype=self.dtype, device=self.device)
        exact = None
        if plan.exact_size:
            exact = torch.empty(heads, plan.exact_size, dtype=torch.float32, device=self.device)
        launch(
            KERNELS, self.config, (heads * plan.num_tiles,), *arguments,
            arrays, exact, plan.table, self.counters, heads, *plan.sizes, **plan.constexprs,
            maxnreg=self.config.registers,
        )  # fmt: skip


def iterated_dtype(dims: Dims, tokens_dtype: torch.dtype) -> torch.dtype:
    """Of the matrices that are multiplied."""
    small = max(dims.sizes) <= SMALL
    return torch.float32 if small or tokens_dtype == torch.float32 else torch.float16


def _config(
    dims: Dims, runs: tuple[Coefficients, ...], dtype: torch.dtype, device: torch.device
) -> TTTConfig:
    is_gram = any(len(triples) > 1 for triples in runs)
    wide = math.gcd(*dims.sizes, ALIGNMENT) >= WIDE or dtype == torch.float32
    name = "newton_schulz" if wide and not is_gram else "newton_schulz_gram"
    return ttt_config(name, dtype, capability_of(device))


class Plan(NamedTuple):
    """A schedule for matrices of certain sizes, as the kernel takes it."""

    table: Tensor
    num_tiles: int  # of one head
    arrays_size: int  # elements of one head
    exact_size: int
    sizes: tuple[int, int, int, int]  # the kernel's arguments of these names
    constexprs: dict[str, int]


@functools.cache
def _plan(
    runs: tuple[Coefficients, ...],
    dims: Dims,
    config: TTTConfig,
    device: torch.device,
    backward: bool,
) -> Plan:
    operations = (schedule.backward if backward else schedule.forward)(runs)
    tables = Tables(operations, dims, config.block_m)
    constexprs = iteration_constexprs(dims, config, len(tables.entries))
    fill = constexprs["ENTRIES"] - len(tables.entries)
    rows = [*tables.entries, *[Entry(BEYOND, *(0,) * (len(Entry._fields) - 1))] * fill]
    sizes = (dims.size, tables.arrays_size, tables.exact_size)
    return Plan(
        torch.tensor(rows, dtype=torch.int32).to(device),
        tables.num_tiles,
        tables.arrays_size,
        tables.exact_size,
        (*(size // ALIGNMENT for size in sizes), dims.rows),
        constexprs,
    )


def iteration_constexprs(dims: Dims, config: TTTConfig, num_entries: int) -> dict[str, int]:
    return {
        "AT": AT,
        "ENTRIES": triton.next_power_of_2(num_entries),
        "DIVISOR": math.gcd(*dims.sizes, ALIGNMENT),
        "BLOCK": config.block_m,
        "BLOCK_K": config.block_k,
        "CHECK": any(size % config.block_m for size in dims.sizes),
        "CHECK_K": any(size % config.block_k for size in dims.sizes),
    }


class Tables:
    """The entries of a schedule, and where its arrays lie."""

    def __init__(self, operations: list[Operation], dims: Dims, block: int):
        self.dims, self.block = dims, block
        self.divisor = math.gcd(*dims.sizes, ALIGNMENT)
        levels = schedule.by_levels(operations)
        self.places = schedule.places(levels)
        forms = Counter()
        for array, place in self.places.items():
            forms[array.form] = max(forms[array.form], place + 1)
        squares = dims.squares[-1]
        self.first_long = forms[Form.SQUARE] * squares
        self.arrays_size = self.first_long + forms[Form.LONG] * dims.size
        self.exact_size = forms[Form.EXACT] * squares
        self.entries, self.num_tiles = self._entries(levels)

    def _entries(self, levels: list[list[Operation]]) -> tuple[list[Entry], int]:
        matrices = [number for number, on in enumerate(self.dims.matrices) if on]
        entries, first, done = [], 0, Counter()
        for level in levels:
            needed = done.copy()
            for operation in level:
                for matrix in matrices:
                    entries.append(self._entry(operation, matrix, first, needed[matrix]))
                    tiles = num_tiles(operation.kind, self.dims.shapes[matrix], self.block)
                    first += tiles
                    done[matrix] += tiles
        return [entry._replace(total=done[entry.matrix]) for entry in entries], first

    def _entry(self, operation: Operation, matrix: int, first: int, needed: int) -> Entry:
        shape = self.dims.shapes[matrix]
        m, n = sorted(shape)
        width = n if operation.kind == Kind.COLUMNS else m
        length = n if any(a.form == Form.LONG for a, _ in operation.terms) else m
        sizes = *shape, m, width, length
        place = functools.partial(self._place, matrix=matrix)
        arrays = [place(array) for pair in operation.terms for array in pair]
        added = [(place(y), _bits(x)) for y, x in operation.add if y.form != Form.EXACT]
        exact = [(place(y), _bits(x)) for y, x in operation.add if y.form == Form.EXACT]
        return Entry(
            first, needed, 0, operation.kind, matrix, self.dims.offsets[matrix] // ALIGNMENT,
            sum(rows for rows, _ in self.dims.shapes[:matrix]),
            *(size // self.divisor for size in sizes),
            num_terms=len(operation.terms),
            factor=_bits(operation.factor),
            out=place(operation.out),
            num_added=len(added),
            exact=place(operation.exact),
            **dict(zip(("a", "b", "a2", "b2"), arrays)),
            **dict(zip(("y", "y_factor", "y2", "y2_factor"), sum(added, ()))),
            **dict(zip(("exact_y", "exact_y_factor"), sum(exact, ()))),
        )  # fmt: skip

    def _place(self, array: Array | None, matrix: int) -> int:
        """Where an array has this matrix, in units of ALIGNMENT."""
        if array is None or array.form == Form.RESULT:
            return NOWHERE
        place = self.places[array]
        if array.form == Form.LONG:
            element = self.first_long + place * self.dims.size + self.dims.offsets[matrix]
        else:
            element = place * self.dims.squares[-1] + self.dims.squares[matrix]
        return element // ALIGNMENT


def num_tiles(kind: Kind, shape: tuple[int, int], block: int) -> int:
    """Of the output of an operation, for a matrix of this shape."""
    side, length = (triton.cdiv(size, block) for size in sorted(shape))
    if kind == Kind.SYMMETRIC:
        return side * (side + 1) // 2
    if kind == Kind.ROWS:
        return side * side
    if kind == Kind.INNER:
        return triton.cdiv(shape[0], INNER_ROWS.value)
    return side * length


def _bits(x: float) -> int:
    """Of x as a float32 number."""
    return int(np.float32(x).view(np.int32))
