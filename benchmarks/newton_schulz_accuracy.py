"""What float16 costs Newton-Schulz on elongated matrices, in its standard form and in the Gram form.

```
python -m benchmarks.newton_schulz_accuracy                          # about a minute on two cores
python -m benchmarks.newton_schulz_accuracy --shape 768 3072 --kind well low
```

The iteration of the Triton kernels is run in PyTorch with each of its launches replaced by products in
float32 of the same float16 matrices, and each result rounded as the kernels round it
(`tests/emulated/test_newton_schulz.py` holds the two against each other). Errors are relative to float64 in
the Frobenius norm, of the result and of its gradient with respect to the matrix. The matrices are

    well        standard normal
    ill         singular values from 1 down to 1e-4, evenly spaced in their logarithms
    low         of rank m / 3: fewer tokens than rows
    silu        gradients of 2 m tokens whose keys are normalised SiLU outputs
    dominated   2 m tokens with large means: one singular value far above the others

and the triples LaCT's and those published for Muon, five times (3.4445, -4.7750, 2.0315). Below each shape
are the operations that the kernels execute for three matrices of it, in whole tiles, forward and backward.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.registry import NEWTON_SCHULZ
from lact_kernels.core.newton_schulz import EPS, LACT, Coefficients, groups
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.triton.fast_weights.layout import Dims, num_tiles
from lact_kernels.triton.fast_weights.newton_schulz import Iteration
from lact_kernels.triton.fast_weights.newton_schulz_kernels import (
    multiply_constexprs,
    symmetric_constexprs,
)

SHAPES = ((768, 1536), (1024, 2048), (1024, 4096))
TRIPLES = {"LaCT": LACT.coefficients, "published": NEWTON_SCHULZ}
KINDS = ("well", "ill", "low", "silu", "dominated")
CPU = torch.device("cpu")

Matrices = tuple[Tensor, ...]


class Rounded(Iteration):
    """The iteration in PyTorch, for a tuple of matrices of any shapes in place of packed ones."""

    def __init__(self, coefficients: Coefficients, dims: Dims, gram: bool = True):
        super().__init__(1, dims, torch.float16, CPU, coefficients)
        self.dtype = torch.float16  # of small matrices, too
        self.runs = _runs(coefficients, dims, gram)

    def _normalize(
        self, g: Matrices, squares: None, gradient: bool, in_place: bool = False
    ) -> Matrices:
        result = []
        for x in g:
            norm = torch.linalg.matrix_norm(x)
            x = x * (min(x.shape) ** 0.5 / norm if gradient else 1 / (norm + EPS))
            result.append(x if in_place else _wide(x, x).half())
        self.shapes = g
        return tuple(result)

    def _symmetric_exact(
        self, a: Matrices, b: Matrices | None = None, add: tuple = ()
    ) -> list[Matrices]:
        exact = self._float32(a, b, add, 1.0, one_sided=True)
        return [_half(exact), exact]

    def _symmetric(self, a, b=None, *, add=(), factor=1.0, one_sided=False, exact=None) -> Matrices:
        return _half(self._float32(a, b, add, factor, one_sided))

    def _float32(self, a, b, add, factor, one_sided) -> Matrices:
        result = []
        for number, x in enumerate(a):
            y = x if b is None else b[number]
            acc = x.float() @ y.float().mT
            if b is not None and not one_sided:
                acc = acc + y.float() @ x.float().mT
            acc = factor * acc
            for squares, scale in add:
                acc += scale * squares[number].float()
            result.append(acc.tril() + acc.tril(-1).mT)
        return tuple(result)

    def _multiply(
        self, square, x, factor, second=None, *, in_place=False, of_square=False
    ) -> Matrices:
        result = []
        for number, (s, x_) in enumerate(zip(square, x)):
            acc = s.float() @ x_.float()
            if second is not None:
                acc += second[0][number].float() @ second[1][number].float()
            acc += factor * x_.float()
            result.append(_wide(acc, self.shapes[number]) if in_place else acc.half())
        return tuple(result)

    def _inner(self, dx: Matrices, g: Matrices, *rest) -> tuple[Tensor, None, None]:
        return torch.stack([(d * x).sum() for d, x in zip(dx, g)]), None, None

    def gradient(self, dx: Matrices, g: Matrices) -> Matrices:
        """Of the orthogonalised g, with the part along g taken out, as the kernel after it does."""
        result, inner, *_ = self.backward(dx, g, None, None)
        gradients = []
        for d, along, x, dx_ in zip(result, inner, g, dx):
            norm = torch.linalg.matrix_norm(x)
            unit = torch.linalg.matrix_norm(dx_) / min(x.shape) ** 0.5
            gradients.append(unit * (d - x * (along / norm / (norm + EPS))) / (norm + EPS))
        return tuple(gradients)


class Counted(Iteration):
    """The iteration without any computation: `operations` of its products, in whole tiles."""

    def __init__(self, coefficients: Coefficients, dims: Dims, gram: bool = True):
        super().__init__(1, dims, torch.float16, CPU, coefficients)
        self.operations = 0
        self.runs = _runs(coefficients, dims, gram)

    def _normalize(self, *arguments, **options) -> Tensor:
        return torch.empty(0)

    def _symmetric_exact(self, a, b=None, add=()) -> list[Tensor]:
        return [self._symmetric(a, b, add=add, one_sided=True)] * 2

    def _symmetric(self, a, b=None, *, add=(), factor=1.0, one_sided=False, exact=None) -> Tensor:
        tiles = num_tiles(symmetric_constexprs(self.dims, self.symmetric_config, bool(add)))
        products = 1 if b is None or one_sided else 2
        length = (min if add else max)(self.dims.sizes)
        self.operations += tiles * self.symmetric_config.block_m**2 * 2 * length * products
        return torch.empty(0)

    def _multiply(
        self, square, x, factor, second=None, *, in_place=False, of_square=False
    ) -> Tensor:
        config = self.multiply_config
        tiles = num_tiles(multiply_constexprs(self.dims, config, in_place, of_square))
        products = 1 if second is None else 2
        self.operations += (
            tiles * config.block_m * config.block_n * 2 * min(self.dims.sizes) * products
        )
        return torch.empty(0)

    def _inner(self, *arguments) -> tuple[None, None, None]:
        return None, None, None


def operations(m: int, n: int, gram: bool) -> tuple[int, int]:
    """Forward and backward, of one head's three matrices `[n, m]`, `[m, n]` and `[n, m]`."""
    counts = []
    for run in (lambda x: x.forward(None, None), lambda x: x.backward(None, None, None, None)):
        counted = Counted(LACT.coefficients, Dims(m, m, n), gram)
        run(counted)
        counts.append(counted.operations)
    return tuple(counts)


def matrix(kind: str, m: int, n: int) -> Tensor:
    """`[m, n]`, float64: see the module's docstring."""
    normal = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=normal, dtype=torch.float64)

    if kind == "well":
        return draw(m, n)
    if kind == "ill":
        u, v = torch.linalg.qr(draw(m, m)).Q, torch.linalg.qr(draw(n, m)).Q
        return u * torch.logspace(0, -4, m, dtype=torch.float64) @ v.mT
    if kind == "low":
        return draw(m, m // 3) @ draw(m // 3, n)
    if kind == "silu":
        keys = torch.nn.functional.normalize(torch.nn.functional.silu(draw(2 * m, m)), dim=-1)
        return keys.mT @ (draw(2 * m, n) * draw(2 * m, 1).abs() + 0.3 * keys @ draw(m, n))
    return (draw(m, 2 * m) + 2 * draw(m, 1)) @ (draw(2 * m, n) + draw(1, n))


def measure(m: int, n: int, kinds: tuple[str, ...], triples: Coefficients) -> Iterator[list[float]]:
    """For each kind the errors of result and gradient, in the standard form and in the Gram form."""
    for kind in kinds:
        g = matrix(kind, m, n).float()
        dx = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
        exact = (
            newton_schulz(g.double(), triples),
            newton_schulz_bwd(dx.double(), g.double(), triples),
        )
        row = []
        for gram in (False, True):
            rounded = Rounded(triples, Dims(m, m, n), gram)
            found = rounded.forward((g,), None), rounded.gradient((dx,), (g,))
            row += [((x.double() - y).norm() / y.norm()).item() for (x,), y in zip(found, exact)]
        yield row


def _runs(coefficients: Coefficients, dims: Dims, gram: bool) -> tuple[Coefficients, ...]:
    dtype = torch.float16 if gram else torch.float32
    return groups(coefficients, dims.shapes, dtype)


def _half(x: Matrices) -> Matrices:
    return tuple(matrix.half() for matrix in x)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.mT if like.shape[-2] > like.shape[-1] else x


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.newton_schulz_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("M", "N"))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    print(f"{'':<31}{'standard':^18}  {'Gram':^18}  {'ratio':^12}")
    print(f"{'':<31}" + "  ".join([f"{'result':>8}{'gradient':>10}"] * 2))
    for m, n in options.shape or SHAPES:
        m, n = sorted((m, n))
        if len(groups(LACT.coefficients, [(m, n)], torch.float16)) == len(LACT.coefficients):
            parser.error(f"{m} x {n} is not elongated: there is no Gram form")
        for name, triples in TRIPLES.items():
            for kind, row in zip(options.kind, measure(m, n, options.kind, triples)):
                x, dx, gram_x, gram_dx = row
                print(
                    f"{f'{m} x {n}':<12}{name:<10}{kind:<9}{x:>8.1e}{dx:>10.1e}  {gram_x:>8.1e}"
                    f"{gram_dx:>10.1e}  {gram_x / x:>6.2f}{gram_dx / dx:>6.2f}",
                    flush=True,
                )
        forms = [operations(m, n, gram) for gram in (False, True)]
        for direction, standard, gram in zip(("forward", "backward"), *forms):
            print(
                f"{f'{m} x {n}':<12}{direction:<10}{standard / 1e9:>10.1f} GFLOP  {gram / 1e9:.1f}"
                f"  ({1 - gram / standard:.0%} fewer)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
