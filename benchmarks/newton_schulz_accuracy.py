"""What float16 costs Newton-Schulz on elongated matrices, in its standard form and in the Gram form.

```
python -m benchmarks.newton_schulz_accuracy                          # about a minute on two cores
python -m benchmarks.newton_schulz_accuracy --shape 768 3072 --kind well low
```

The schedule of the Triton kernel is run in PyTorch with each of its operations replaced by products in
float32 of the same float16 matrices, and each result rounded as the kernel rounds it
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
from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor

from benchmarks.registry import NEWTON_SCHULZ
from lact_kernels.core.newton_schulz import EPS, LACT, Coefficients, groups
from lact_kernels.eager.newton_schulz import newton_schulz, newton_schulz_bwd
from lact_kernels.triton.configs import ttt_config
from lact_kernels.triton.fast_weights import newton_schulz_schedule as schedule
from lact_kernels.triton.fast_weights.layout import Dims
from lact_kernels.triton.fast_weights.newton_schulz import num_tiles
from lact_kernels.triton.fast_weights.newton_schulz_schedule import Array, Form, Kind, Operation

SHAPES = ((768, 1536), (1024, 2048), (1024, 4096))
TRIPLES = {"LaCT": LACT.coefficients, "published": NEWTON_SCHULZ}
KINDS = ("well", "ill", "low", "silu", "dominated")

Matrices = tuple[Tensor, ...]


class Rounded:
    """The schedules in PyTorch, for a tuple of matrices of any shapes in place of packed ones."""

    def __init__(self, coefficients: Coefficients, dims: Dims, gram: bool = True):
        runs = _runs(coefficients, dims, gram)
        self.schedules = {"forward": schedule.forward(runs), "backward": schedule.backward(runs)}

    def forward(self, g: Matrices) -> Matrices:
        """The orthogonalised g."""
        return self._run("forward", g, None)

    def backward(self, dx: Matrices, g: Matrices) -> Matrices:
        """The gradient of g over its norm, in the units of dx over its own."""
        return self._run("backward", g, dx)

    def gradient(self, dx: Matrices, g: Matrices) -> Matrices:
        """Of the orthogonalised g, with the part along g taken out, as the kernel after it does."""
        gradients = []
        for d, x, dx_ in zip(self.backward(dx, g), g, dx):
            norm = torch.linalg.matrix_norm(x)
            unit = torch.linalg.matrix_norm(dx_) / min(x.shape) ** 0.5
            along = (d * x).sum()
            gradients.append(unit * (d - x * (along / norm / (norm + EPS))) / (norm + EPS))
        return tuple(gradients)

    def _run(self, direction: str, g: Matrices, dx: Matrices | None) -> Matrices:
        values = self._memory()
        for operation in self.schedules[direction]:
            if operation.kind in (Kind.NORMALIZE, Kind.NORMALIZE_GRADIENT):
                is_gradient = operation.kind == Kind.NORMALIZE_GRADIENT
                result = self._normalized(dx if is_gradient else g, is_gradient)
            elif operation.kind != Kind.INNER:
                result = _products(operation, values)
            if operation.exact is not None:
                values[operation.exact] = result
            if operation.out is not None and operation.out.form != Form.RESULT:
                values[operation.out] = tuple(x.half() for x in result)
        return tuple(_wide(x, like) for x, like in zip(result, g))

    def _memory(self) -> MutableMapping[Array, Matrices]:
        """For what the operations write."""
        return {}

    def _normalized(self, matrices: Matrices, is_gradient: bool) -> Matrices:
        result = []
        for x in matrices:
            norm = torch.linalg.matrix_norm(x)
            x = x * (min(x.shape) ** 0.5 / norm if is_gradient else 1 / (norm + EPS))
            result.append(_wide(x, x))
        return tuple(result)


def _products(operation: Operation, values: MutableMapping[Array, Matrices]) -> Matrices:
    """What a product and all that is added to it come to, in float32."""
    result = []
    for number in range(len(values[operation.terms[0][0]])):
        acc = 0
        for pair in operation.terms:
            a, b = (values[array][number].float() for array in pair)
            acc = acc + a @ (b if operation.kind == Kind.COLUMNS else b.mT)
        acc = operation.factor * acc
        for array, factor in operation.add:
            acc += factor * values[array][number].float()
        if operation.kind == Kind.SYMMETRIC:
            acc = acc.tril() + acc.tril(-1).mT
        result.append(acc)
    return tuple(result)


def operations(m: int, n: int, gram: bool) -> tuple[int, int]:
    """Forward and backward, of one head's three matrices `[n, m]`, `[m, n]` and `[n, m]`."""
    runs = _runs(LACT.coefficients, Dims(m, m, n), gram)
    block = ttt_config("newton_schulz", torch.float16, None).block_m
    counts = []
    for recorded in (schedule.forward(runs), schedule.backward(runs)):
        total = 0
        for operation in recorded:
            is_long = any(a.form == b.form == Form.LONG for a, b in operation.terms)
            tiles = 3 * num_tiles(operation.kind, (m, n), block)
            total += tiles * block**2 * 2 * (n if is_long else m) * len(operation.terms)
        counts.append(total)
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
            found = rounded.forward((g,)), rounded.gradient((dx,), (g,))
            row += [((x.double() - y).norm() / y.norm()).item() for (x,), y in zip(found, exact)]
        yield row


def _runs(coefficients: Coefficients, dims: Dims, gram: bool) -> tuple[Coefficients, ...]:
    dtype = torch.float16 if gram else torch.float32
    return groups(coefficients, dims.shapes, dtype)


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
