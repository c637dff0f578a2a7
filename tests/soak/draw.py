"""What the cases of all kinds draw."""

import contextlib
import itertools
import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from lact_kernels.core.offsets import cu_seqlens_of
from lact_kernels.triton import configs
from lact_kernels.triton.configs import KernelConfig, TTTConfig
from tests.cases import LAYOUTS, laid_out
from tests.soak.bar import Gradients

# Name: the function, and how often it is drawn. It raises where the case that it draws is wrong.
KINDS: dict[str, tuple[Callable[["Draw"], None], float]] = {}
EAGER = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRITON = (torch.float32, torch.float16)  # products of bfloat16 are wrong in the interpreter


def kind(often: float):
    """Makes a kind of a function, under its name."""

    def register(fn):
        KINDS[fn.__name__] = fn, often
        return fn

    return register


class Draw(random.Random):
    """All that a case draws is drawn from here, or by torch, which `fault_of` seeds as well."""

    def __init__(self, seed: str):
        super().__init__(seed)
        self.noted = {}

    def note(self, **facts) -> None:
        """What a report says of this case."""
        self.noted |= facts

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def length(self, most: int) -> int:
        """Nothing, a few, and most often any number."""
        return self.choice((0, self.randint(0, min(3, most)), *(self.randint(0, most),) * 4))

    def borders(self, most: int, sequences: int = 6) -> list[int]:
        """Those of up to so many sequences of any lengths."""
        lengths = [self.length(most) for _ in range(self.randint(1, sequences))]
        return list(itertools.accumulate(lengths, initial=0))

    def gradients(self, dtype: torch.dtype, inputs: dict, through: Sequence = (None,)) -> Gradients:
        """Of all inputs or some of them, through one of these choices of results."""
        some = tuple(name for name in inputs if self.chance(0.5))
        return Gradients(
            self.getrandbits(31),
            dtype,
            of=some if some and self.chance(0.3) else None,
            through=self.choice(through),
            layout=self.choice(LAYOUTS) if self.chance(0.3) else "contiguous",
            twice=self.chance(0.2),
        )

    def backend(self, triton: float = 0.25) -> tuple[str, torch.dtype]:
        """A backend, and a dtype that it runs with here."""
        if self.chance(triton):
            return "triton", self.choice(TRITON)
        return "eager", self.choice(EAGER)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        """With strides of any kind, most often contiguous."""
        return laid_out(x, self.choice(LAYOUTS)) if self.chance(0.4) else x

    def splits(self, total: int, most: int) -> list[int]:
        """Any number of lengths up to `most`, 0 among them, that add up."""
        parts = []
        while sum(parts) < total:
            parts.append(min(self.length(most), total - sum(parts)))
        return parts

    def tiles(self):
        """Tiles of the kernels so small that few tokens straddle their edges, or those of the table."""
        if self.chance(0.2):
            return contextlib.nullcontext()
        m, n, k = (self.choice((16, 16, 32)) for _ in range(3))
        attention = KernelConfig(m, n, 4, 1)
        table = {key: dict.fromkeys(row, attention) for key, row in configs._TABLE.items()}
        ttt = dict.fromkeys(configs._TTT_TABLE, TTTConfig(m, n, k, 4, 1))
        rows = dict.fromkeys(configs._ROW_TABLE, (32, 4))
        return mock.patch.multiple(configs, _TABLE=table, _TTT_TABLE=ttt, _ROW_TABLE=rows)


def fault_of(name: str, seed: int) -> tuple[str | None, Exception | None]:
    """What is wrong with a case, which is a function of its kind and seed alone, and where it showed."""
    torch.manual_seed(seed)
    draw = Draw(f"{name}:{seed}")
    try:
        KINDS[name][0](draw)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        facts = ", ".join(f"{key}={value}" for key, value in draw.noted.items())
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"{type(error).__name__} at {place}: {error} [{facts}]", error
    return None, None


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def borders_of(lengths: Sequence[int]) -> Tensor:
    return cu_seqlens_of(lengths)
