"""What the tests of Newton-Schulz share: triples, the iteration of packed matrices, and errors."""

import pytest
import torch
from torch import Tensor

from benchmarks.newton_schulz_accuracy import Rounded
from lact_kernels.core import newton_schulz as core
from lact_kernels.core.newton_schulz import LACT, Coefficients
from lact_kernels.triton.fast_weights.layout import Dims
from lact_kernels.triton.fast_weights.newton_schulz import Iteration
from reference.ttt import newton_schulz

PUBLISHED = ((3.4445, -4.7750, 2.0315),) * 5
MILD = ((1.5, -0.6, 0.1), (1.4, -0.5, 0.2), (1.3, -0.7, 0.3))  # rounding does not grow in these
TRIPLES = {  # by their number
    0: (),
    1: LACT.coefficients[-1:],
    2: LACT.coefficients[3:],
    4: LACT.coefficients[1:],
    5: LACT.coefficients,
    7: LACT.coefficients[:2] + LACT.coefficients,
}


@pytest.fixture
def gram_form_of_small_matrices(monkeypatch):
    monkeypatch.setattr(core, "GRAM_SIDE", 1)


def rounded(
    g: Tensor, dx: Tensor, dims: Dims, coefficients: Coefficients, gram: bool = True
) -> tuple[Tensor, Tensor]:
    """What PyTorch makes of the iteration's float16 products, of one head."""
    iteration = Rounded(coefficients, dims, gram)
    g, dx = (tuple(matrix[0] for matrix in dims.unpack(x)) for x in (g, dx))
    results = torch.zeros(1, dims.size), torch.zeros(1, dims.size)
    for packed, values in zip(results, (iteration.forward(g), iteration.gradient(dx, g))):
        for place, value in zip(dims.unpack(packed), values):
            place.copy_(value)
    return results


def matrices(dims: Dims, heads: int, rank: int | None = None) -> Tensor:
    """`[heads, SIZE]` of three random matrices each, with more columns and rows than their rank."""
    packed = torch.zeros(heads, dims.size)
    for matrix in dims.unpack(packed):
        rows, columns = matrix.shape[-2:]
        inner = rank or max(rows, columns)
        matrix.copy_(torch.randn(heads, rows, inner) @ torch.randn(heads, inner, columns))
    return packed


def iterate(
    g: Tensor,
    dx: Tensor,
    dims: Dims,
    dtype: torch.dtype,
    coefficients: Coefficients,
    kind=Iteration,
) -> tuple[Tensor, Tensor]:
    """The orthogonalised g, and dx times the gradient of that without the part along g; float32, packed."""
    iteration = Iteration(len(g), dims, dtype, g.device, coefficients)
    result = iteration.forward(g, squares_of(g, dims))
    dresult, inner, *_ = iteration.backward(dx, g, squares_of(dx, dims), squares_of(g, dims))
    gradient, g, dx, dresult = (x.double() for x in (torch.zeros_like(g), g, dx, dresult))
    for out, d, g_, dx_, rows in zip(
        *(dims.unpack(x) for x in (gradient, dresult, g, dx)), dims.unpack_rows(inner)
    ):
        length = torch.linalg.matrix_norm(g_, keepdim=True)
        unit = torch.linalg.matrix_norm(dx_, keepdim=True) / min(g_.shape[-2:]) ** 0.5
        along = rows.double().sum(dim=-1)[:, None, None] / length / (length + 1e-7)
        out.copy_(unit * (d - g_ * along) / (length + 1e-7))
    return result, gradient.float()


def exact(g: Tensor, dx: Tensor, dims: Dims, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """The same by autograd through the reference, in float64."""
    results = torch.zeros_like(g, dtype=torch.float64), torch.zeros_like(g, dtype=torch.float64)
    for g_, dx_, *outs in zip(*map(dims.unpack, (g, dx, *results))):
        leaf = g_.double().requires_grad_()
        x = newton_schulz(leaf, coefficients)
        for out, value in zip(outs, (x, *torch.autograd.grad(x, leaf, dx_.double()))):
            out.copy_(value.detach())
    return results


def errors(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dims: Dims) -> list[float]:
    """The largest relative error of the three matrices, of each of the results."""
    return [
        max(
            ((a - e).norm() / e.norm()).item()
            for a, e in zip(dims.unpack(x.double()), dims.unpack(y))
        )
        for x, y in zip(actual, expected)
    ]


def squares_of(x: Tensor, dims: Dims) -> Tensor:
    """`[heads, ROWS]`: of the norms of the rows."""
    return torch.cat([matrix.square().sum(dim=-1) for matrix in dims.unpack(x)], dim=-1)


def matrices_of(packed: Tensor, dims: Dims) -> Tensor:
    """Of `[heads, SIZE]` all but what is between the matrices; `[heads, ROWS]` as it is."""
    if packed.shape[-1] == dims.rows:
        return packed
    return torch.cat([matrix.flatten(1) for matrix in dims.unpack(packed)], dim=-1)
