"""When the results of a small case are wrong.

The bar of `benchmarks/accuracy.py` compares an error with the one that plain PyTorch happens to make in the
same dtype. Of many elements that is a fair sample of what rounding does, of few it is none: one gradient
that plain PyTorch has right by luck makes any other error too large, and of 10,000 cases hundreds
are lucky. So this bar decides in two steps:

1. What passes that of `benchmarks/accuracy.py` is right. (float64, which is its own exact result, is right
   within 1e-10 of the largest element.)
2. For what does not, the plain computation is repeated 32 times in float64, and every operation's inputs are
   changed at random by as much as the dtype rounds: `x (1 + eps u) + tiny u`, u from [-1, 1], tiny the
   smallest number of the dtype. (This is known as Monte Carlo arithmetic.) The largest errors of these draws
   take the place of the one of plain PyTorch: a result is right within four times of them plus four
   roundings. An error that behaves like those of the draws exceeds that once in many millions of cases.

The draws know what the conditioning of a case is: large scores, steps of few tokens that Muon amplifies
490 times, terms that cancel. A wrong index, a lost token or a stale weight is not among them: it changes
results by far more than rounding does.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.accuracy import compare, rms_and_max
from tests.cases import laid_out

DRAWS, FACTOR = 32, 4
FLOAT64_BOUND = 1e-10

Results = dict[str, Tensor]


class Rounding(TorchDispatchMode):
    """Every operation gets floating inputs that are off by up to one rounding of `dtype`, at random."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        info = torch.finfo(dtype)
        self.eps, self.tiny = info.eps, info.tiny * info.eps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func._schema.is_mutable):
            args = tree_map_only(Tensor, self._rounded, args)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        u = torch.rand_like(x).mul_(2).sub_(1)
        return x + u * (self.eps * x.abs() + self.tiny * (x != 0)).nan_to_num(posinf=0.0)


def hold(
    ours: Callable[[Results], Results],
    plain: Callable[[Results], Results],
    inputs: Results,
    dtype: torch.dtype,
) -> None:
    """Both functions compute the same of the inputs, and ours leaves them as they are.

    `dtype` is that of the computation: inputs and results that stay wide may be of another.
    """
    before = {name: x.clone() for name, x in inputs.items()}
    actual = ours(inputs)
    for name, x in before.items():
        assert same_bits(inputs[name], x), f"{name} was changed"
    hold_results(actual, plain, inputs, dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN for NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def hold_results(
    actual: Results,
    plain: Callable[[Results], Results],
    inputs: Results,
    dtype: torch.dtype,
) -> None:
    """These are the results of `plain`."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = plain(wide)
    same = exact if dtype == torch.float64 else plain(inputs)
    assert actual.keys() == exact.keys(), f"{list(actual)} instead of {list(exact)}"
    doubtful = {}
    for name, e in exact.items():
        a = actual[name]
        assert a.shape == e.shape, f"{name} is {list(a.shape)} instead of {list(e.shape)}"
        assert a.dtype == same[name].dtype or name == "lse", f"{name} is {a.dtype}"
        if not _passes(a, same[name], e, dtype):
            doubtful[name] = _Doubt(name, a, same[name], e, dtype)
    for _ in range(DRAWS):  # fewer where a few are enough
        if not doubtful or any(x.is_beyond_doubt for x in doubtful.values()):
            break
        with Rounding(dtype):
            draw = plain(wide)
        doubtful = {name: x for name, x in doubtful.items() if not x.is_removed_by(draw[name])}
    assert not doubtful, "; ".join(map(str, doubtful.values()))


def _finite(x: Tensor, exact: Tensor) -> Tensor:
    """x in float64, with 0 where the exact result is infinite."""
    return x.detach().double().masked_fill(exact.isinf(), 0.0)


def _passes(actual: Tensor, same: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    infinite = exact.isinf()
    if not torch.equal(actual[infinite].double(), exact[infinite].double()):
        return False
    a, s, e = (x.detach().masked_fill(infinite, 0.0) for x in (actual, same, exact))
    if dtype == torch.float64:
        size = rms_and_max(e)[1]
        return rms_and_max(a - e)[1] <= FLOAT64_BOUND * size  # False for NaN
    return compare(a, s, e).ok


class _Doubt:
    """A result that may be wrong, and the largest errors of the draws so far: rms and largest element."""

    def __init__(self, name: str, actual: Tensor, same: Tensor, exact: Tensor, dtype: torch.dtype):
        infinite = exact.isinf()
        assert torch.equal(actual[infinite].double(), exact[infinite].double()), (
            f"{name} is not infinite where it should be: {actual[infinite]}"
        )
        self.name, self.exact, self.eps = name, exact, torch.finfo(dtype).eps
        self.errors, self.plain = self._errors(actual), self._errors(same)
        self.noise, self.draws = [0.0, 0.0], 0
        self._add(self.plain)
        self.sizes = rms_and_max(_finite(exact, exact))
        self.is_representable = self.sizes[1] < torch.finfo(dtype).max / 8
        if name == "lse":  # the logarithm of a sum: one rounding of the sum is one of 1 in it
            self.sizes = tuple(max(size, 1.0) for size in self.sizes)

    def _errors(self, x: Tensor) -> tuple[float, float]:
        return rms_and_max(_finite(x, self.exact) - _finite(self.exact, self.exact))

    def _add(self, errors) -> None:
        if all(map(math.isfinite, errors)):
            self.noise = list(map(max, self.noise, errors))

    @property
    def bounds(self) -> list[float]:
        return [FACTOR * (noise + self.eps * size) for noise, size in zip(self.noise, self.sizes)]

    def is_removed_by(self, draw: Tensor) -> bool:
        self._add(self._errors(draw))
        self.draws += 1
        is_right = all(error <= bound for error, bound in zip(self.errors, self.bounds))
        return is_right or not self.is_representable

    @property
    def is_beyond_doubt(self) -> bool:
        """No further draws will make it right: the largest of n hardly grows with n."""
        if not self.is_representable:
            return False
        if not all(map(math.isfinite, self.errors)):
            return True
        most = DRAWS / max(self.draws, 1) if self.draws >= 4 else math.inf
        return any(error > most * bound for error, bound in zip(self.errors, self.bounds))

    def __str__(self) -> str:
        columns = zip(("rms", "largest"), self.errors, self.bounds, self.plain, self.sizes)
        return f"{self.name} is wrong: " + ", ".join(
            f"{kind} error {error:.2e} (bound {bound:.2e}, plain PyTorch {plain:.2e}, size {size:.2e})"
            for kind, error, bound, plain, size in columns
        )


def with_gradients(fn: Callable[[Results], Results], how: "Gradients") -> Callable:
    """`fn`, and gradients of its inputs through its results."""

    def run(inputs: Results) -> Results:
        wanted = [name for name in inputs if how.of is None or name in how.of]
        leaves = {
            name: x.detach().requires_grad_(name in wanted) if x.is_floating_point() else x
            for name, x in inputs.items()
        }
        results = fn(leaves)
        outputs = [results[name] for name in how.through or results]
        generator = torch.Generator().manual_seed(how.seed)
        cotangents = [
            how.of_result(torch.randn(x.shape, dtype=torch.float64, generator=generator), x.dtype)
            for x in outputs
        ]
        pairs = [(x, g) for x, g in zip(outputs, cotangents) if x.requires_grad]

        def backward(**options):
            if not pairs:
                return [torch.zeros_like(leaves[name]) for name in wanted]
            of = [leaves[name] for name in wanted]
            xs, gs = zip(*pairs)
            return torch.autograd.grad(xs, of, gs, materialize_grads=True, **options)

        grads = backward(retain_graph=how.twice)
        if how.twice:
            for name, a, b in zip(wanted, grads, backward()):
                assert same_bits(a, b), f"a second backward gives another d{name}"
        found = {name: x.detach() for name, x in results.items()}
        return found | {f"d{name}": g for name, g in zip(wanted, grads)}

    return run


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Which gradients, and of what: those of the results are drawn from `seed` in `dtype`."""

    seed: int
    dtype: torch.dtype
    of: tuple[str, ...] | None = None  # these inputs; all
    through: tuple[str, ...] | None = None  # these results; all
    layout: str = "contiguous"  # of the gradients of results that have heads
    twice: bool = False  # a second backward gives the same

    def of_result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(self.dtype).to(dtype)
        return laid_out(x, self.layout) if x.ndim == 4 else x


def hold_gradients(ours: Callable, plain: Callable, how: Gradients, inputs: Results) -> None:
    """`hold` of the functions and of their gradients."""
    once = dataclasses.replace(how, twice=False)
    hold(with_gradients(ours, how), with_gradients(plain, once), inputs, how.dtype)
