"""Calls of a backend with any plan and every option, and a check against float64.

They begin as a state does that has come some way: masters that are not the weights, buffers that are not 0,
and target norms of their own. All of it has gradients, and so have the outputs and the end. Float64 is that
of the eager backend, which `test_ttt` holds against `reference`.
"""

import dataclasses

import torch
from torch import Tensor

from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.plan import Plan
from lact_kernels.core.tokens import Tokens
from lact_kernels.ops.fast_weights import run
from tests.tolerance import assert_close_to_float64

# Keys with gaps and out of order, an update without any, and versions that nobody sees: the first, the last
# and one between two that are seen. An update is short where others are long.
SPARSE = Plan([[(7, 12), (5, 5), (0, 4), (12, 13)]], [[0, 0, 5, 5, 8, 8]])
# The same for some of four sequences; others have no update, and one has no token at all.
PACKED = Plan(
    [[], [(3, 7), (0, 2), (2, 3)], [], [(9, 13)]],
    [[0, 0], [0, 0, 0, 3, 3], [3, 6], [6, 6, 9]],
)


@dataclasses.dataclass(frozen=True)
class ScanCase:
    """A plan, sizes and options, and why it is there."""

    reason: str
    plan: Plan = SPARSE
    B: int = 1
    H: int = 2
    Dk: int = 8
    Dv: int = 9
    Dh: int = 12
    Tk: int = 13
    scale: int = 1  # of all the plan's places, and of Tk
    momentum: bool = False
    muon: bool | NewtonSchulz = False
    prenorm: bool = False
    weight_norm: bool = True
    momentum_after_muon: bool = False
    trained: tuple[int, ...] = (0, 1, 2)
    checkpoint_interval: int = 1

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    @property
    def options(self) -> Options:
        given = 4 * self.scale, self.muon, self.prenorm, self.momentum
        return Options(
            *given, self.weight_norm, self.momentum_after_muon,
            return_end=True, checkpoint_interval=self.checkpoint_interval,
        )  # fmt: skip

    @property
    def scaled(self) -> Plan:
        n = self.scale
        keys = [[(a * n, b * n) for a, b in row] for row in self.plan.keys]
        return Plan(keys, [[border * n for border in row] for row in self.plan.queries])

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The tokens by their names, and the start as `weights0` to `buffers2`, all with gradients."""
        B, H, Dk, Dv, Dh = self.B, self.H, self.Dk, self.Dv, self.Dh
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        Tq, Tk = self.scaled.queries[-1][-1], self.Tk * self.scale
        N = len(self.plan.keys) if B == 1 else B
        shapes = {"q": (B, Tq, H, Dk), "k": (B, Tk, H, Dk), "v": (B, Tk, H, Dv)}
        x = {name: torch.randn(s, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
        for name in [f"lr{i}" for i in self.trained] + ["momentum"] * self.momentum:
            size = 1.0 if name == "momentum" else 0.1
            x[name] = torch.rand(B, Tk, H, dtype=torch.float64).mul_(size).to(wide)
        for i, (r, c) in enumerate([(Dh, Dk), (Dv, Dh), (Dh, Dk)]):
            w = torch.randn(N, H, r, c, dtype=torch.float64).mul_(c**-0.5)
            start = {"weights": w, "norms": w.norm(dim=-1) * (0.9 + 0.2 * torch.rand(N, H, r))}
            if self.prenorm:
                start["masters"] = w + 0.1 * torch.randn_like(w)
            if self.momentum:
                start["buffers"] = 0.1 * torch.randn_like(w)
            x |= {f"{field}{i}": tensor.to(wide) for field, tensor in start.items()}
        return {name: tensor.to(device).requires_grad_() for name, tensor in x.items()}

    def call(self, x: dict[str, Tensor]) -> Call:
        start = [
            tuple(tensor for name, tensor in x.items() if name[:-1] == field)
            for field in FastWeights._fields
        ]
        tokens = Tokens(*(x.get(name) for name in Tokens._fields))
        plan = self.scaled.to_tensor()
        return Call(x["q"], tokens, FastWeights(*start), plan, self.options)


def results(case: ScanCase, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs, end and all gradients, of cotangents that are the same for all backends and dtypes."""
    o, end = run(case.call(x), backend)
    outputs = {"o": o} | {f"end {i}": tensor for i, tensor in enumerate(end.to_list())}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(y)
        for y in outputs.values()
    ]
    grads = torch.autograd.grad(
        list(outputs.values()), list(x.values()), cotangents, materialize_grads=True
    )
    return outputs | {f"d{name}": grad for name, grad in zip(x, grads)}


def check_scan(
    backend: str, case: ScanCase, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Outputs, end and all gradients of a backend against float64."""
    x = case.inputs(dtype, device)
    exact_x = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    actual, same = results(case, x, backend), results(case, x, "eager")
    for name, exact in results(case, exact_x, "eager").items():
        assert_close_to_float64(actual[name], same[name], exact, name)
