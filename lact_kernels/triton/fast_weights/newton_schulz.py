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
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.newton_schulz import LACT, Coefficients, groups
from lact_kernels.triton.configs import capability_of, ttt_config
from lact_kernels.triton.fast_weights.layout import Dims, num_tiles
from lact_kernels.triton.fast_weights.newton_schulz_kernels import (
    MULTIPLY_KERNELS,
    SYMMETRIC_KERNELS,
    _inner_kernel,
    _normalize_kernel,
    multiply_constexprs,
    normalize_constexprs,
    symmetric_constexprs,
)
from lact_kernels.triton.fast_weights.update import NUM_WARPS, row_programs, row_warps
from lact_kernels.triton.launch import launch

SMALL = 64  # up to this size products take less time than their launches, in float32, too
# Of the gradients of squares in the Gram form: those of a gradient in few places can be larger than X's.
GRAM_SCALE = 2.0**-4


class Step(NamedTuple):
    """A step of a group, and what its gradient reads."""

    triple: tuple[float, float, float]
    r: Tensor
    b: Tensor
    t: Tensor | None  # None in the last step of a group
    q: float  # Q before the step is q I + rest
    rest: Tensor | None


class Group(NamedTuple):
    """Some steps at once: X <- q X + rest X."""

    x: Tensor
    steps: list[Step]
    q: float
    rest: Tensor


class Iteration:
    """The iteration for matrices packed `[heads, SIZE]`, of one shape and dtype."""

    def __init__(
        self,
        heads: int,
        dims: Dims,
        tokens_dtype: torch.dtype,
        device: torch.device,
        coefficients: Coefficients = LACT.coefficients,
    ):
        self.heads, self.dims = heads, dims
        small = max(dims.sizes) <= SMALL
        self.dtype = torch.float32 if small or tokens_dtype == torch.float32 else torch.float16
        self.runs = groups(coefficients, dims.iterated, self.dtype)
        capability = capability_of(device)
        self.symmetric_config = ttt_config("newton_schulz_symmetric", self.dtype, capability)
        self.multiply_config = ttt_config("newton_schulz_multiply", self.dtype, capability)

    def forward(self, g: Tensor, squares: Tensor) -> Tensor:
        """The orthogonalised g, float32. `squares` `[heads, ROWS]` are those of the rows' norms."""
        if not self.runs:
            return self._normalize(g, squares, gradient=False, in_place=True)
        for group in self._groups(g, squares):
            last = group
        return self._multiply(last.rest, last.x, last.q, in_place=True)

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
        iterates = list(self._groups(g, squares))
        dx = self._normalize(dx, dsquares, gradient=True, in_place=not iterates)
        for group in reversed(iterates):
            dr = self._gram_gradient(group, dx)
            first = group is iterates[0]
            dx = self._multiply(group.rest, dx, group.q, (dr, group.x), in_place=first)
        return dx, *self._inner(dx, g, dbuffers, squares, with_sizes)

    def _groups(self, g: Tensor, squares: Tensor) -> Iterator[Group]:
        """All groups of steps, each with the X that it begins with."""
        group = None
        for triples in self.runs:
            if group is None:
                x = self._normalize(g, squares, gradient=False)
            else:
                x = self._multiply(group.rest, group.x, group.q)
            group = self._group(x, triples)
            yield group

    def _group(self, x: Tensor, triples: Coefficients) -> Group:
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

    def _gram_gradient(self, group: Group, dx: Tensor) -> Tensor:
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
                half = self._multiply(step.b, dr, a, of_square=True)  # P dR, which is not symmetric
                back = 1.0 / scale if step is group.steps[0] else 1.0
                add = ((half, back * a), (own, back))
                dr = self._symmetric(half, step.b, add=add, factor=back, one_sided=True)
        return dr

    def _inner(
        self, dx: Tensor, g: Tensor, dbuffers: Tensor | None, squares: Tensor, with_sizes: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dbuffers = dbuffers if with_sizes else None
        size = torch.empty_like(squares) if with_sizes else None
        dbuffers_size = None if dbuffers is None else torch.empty_like(squares)
        inner = torch.empty_like(squares)
        programs, constexprs = row_programs(self.dims)
        _inner_kernel[(self.heads * programs,)](
            dx,
            g,
            dbuffers,
            inner,
            size,
            dbuffers_size,
            **constexprs,
            num_warps=row_warps(self.dims),
        )
        return inner, size, dbuffers_size

    def _normalize(
        self, g: Tensor, squares: Tensor, gradient: bool, in_place: bool = False
    ) -> Tensor:
        """`in_place`: float32, in the shape of the matrix."""
        x = torch.empty_like(g, dtype=torch.float32 if in_place else self.dtype)
        constexprs = normalize_constexprs(self.dims, gradient, in_place)
        _normalize_kernel[(self.heads * num_tiles(constexprs),)](
            g, squares, x, **constexprs, num_warps=NUM_WARPS
        )
        return x

    def _symmetric_exact(self, a: Tensor, b: Tensor | None = None, add: tuple = ()) -> list[Tensor]:
        """`a b^T`, or `a a^T`, plus what is to be added; and the same in float32."""
        exact = a.new_empty(self.heads, self.dims.squares[-1], dtype=torch.float32)
        return [self._symmetric(a, b, add=add, one_sided=True, exact=exact), exact]

    def _symmetric(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        add: tuple[tuple[Tensor, float], ...] = (),
        factor: float = 1.0,
        one_sided: bool = False,
        exact: Tensor | None = None,
    ) -> Tensor:
        """`factor (a b^T + b a^T)` plus up to two squares y, given with their factors.

        Without b the product is `a a^T`; `one_sided`: it is `a b^T`. Without y a and b are like X, with
        one they are squares. `exact` receives the result in float32.
        """
        one_sided = one_sided and b is not None
        constexprs = symmetric_constexprs(self.dims, self.symmetric_config, bool(add), one_sided)
        out = a.new_empty(self.heads, self.dims.squares[-1])
        (y, y_factor), (y2, y2_factor) = (*add, (None, 0.0), (None, 0.0))[:2]
        launch(
            SYMMETRIC_KERNELS, self.symmetric_config, (self.heads * num_tiles(constexprs),),
            a, b, y, y2, out, exact, factor, y_factor, y2_factor, *self.dims.sizes,
            **constexprs,
        )  # fmt: skip
        return out

    def _multiply(
        self,
        square: Tensor,
        x: Tensor,
        factor: float,
        second: tuple[Tensor, Tensor] | None = None,
        *,
        in_place: bool = False,
        of_square: bool = False,
    ) -> Tensor:
        """`factor x + square x`, plus the second product; `in_place`: float32, in the shape of the matrix.

        `of_square`: x is a square, too.
        """
        constexprs = multiply_constexprs(self.dims, self.multiply_config, in_place, of_square)
        out = torch.empty_like(x, dtype=torch.float32 if in_place else self.dtype)
        launch(
            MULTIPLY_KERNELS, self.multiply_config, (self.heads * num_tiles(constexprs),),
            square, x, *(second or (None, None)), out, factor, *self.dims.sizes,
            **constexprs,
        )  # fmt: skip
        return out
