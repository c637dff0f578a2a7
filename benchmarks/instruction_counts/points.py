"""What is run, at which size, and what the mathematics of each pass needs.

Least bytes are those of each input read once and each output written once; for a backward the inputs are
those of the forward and the output's gradient, and what `window_attn` keeps: its output and row statistics.
Needed FLOPs are those of `benchmarks/registry.py`: products of unmasked pairs, nothing recomputed. The
elementwise work of the branches has none.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks import branches
from benchmarks.registry import (
    BlockCausalTTT,
    Point,
    WindowAttn,
    WindowAttnWithKVCache,
    empty_output,
    output_gradient,
)

DTYPE, CPU = torch.bfloat16, torch.device("cpu")
FLOAT32_BYTES = 4
FORWARD, BACKWARD = "forward", "backward"


@dataclasses.dataclass(frozen=True)
class Pass:
    """A forward or a backward. `run` is called once, after those before it, and returns its results."""

    name: str
    run: Callable[[], dict[str, Tensor]]
    needed_flops: int
    least_bytes: int
    inputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class PointWork:
    """A point of `benchmarks/registry.py`."""

    point: Point

    @property
    def op(self) -> str:
        return self.point.op

    @property
    def shape(self) -> dict:
        return dataclasses.asdict(self.point)

    def ours(self, **inputs: Tensor) -> Tensor:
        return self.point.run("triton", **inputs)

    def passes(self, function: Callable[..., Tensor]) -> list[Pass]:
        """Of one that takes the point's inputs by name and returns its output."""
        point, outputs = self.point, []
        inputs = point.inputs(DTYPE, CPU)
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}

        def forward() -> dict[str, Tensor]:
            outputs.append(function(**inputs))
            return {"o": outputs[0].detach()}

        def backward() -> dict[str, Tensor]:
            do = output_gradient(outputs[0])
            gradients = torch.autograd.grad(outputs[0], list(leaves.values()), do)
            return {f"d{name}": x for name, x in zip(leaves, gradients)}

        size, flops = num_bytes(inputs.values()), point.flops("fwd")
        out = num_bytes([empty_output(point, DTYPE, CPU)])
        kept = point.B * point.T * point.Hq * FLOAT32_BYTES if point.op == WindowAttn.op else 0
        given = tuple(inputs.values())
        if not leaves:
            return [Pass(FORWARD, forward, flops, point.needed_bytes(DTYPE), given)]
        back = 2 * size + out + (out + kept if kept else 0)
        return [
            Pass(FORWARD, forward, flops, size + out + kept, given),
            Pass(BACKWARD, backward, point.flops("fwd_bwd") - flops, back, given),
        ]


@dataclasses.dataclass(frozen=True)
class BranchWork:
    """An operation of `benchmarks/branches.py` with all its options."""

    op: str
    shape: dict[str, int]

    def ours(self, **inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        _, _, options = branches.make_inputs(self.op, self.shape, DTYPE, CPU)
        run = branches.function("lact_kernels.ops", self.op)
        return run(**inputs, **options, backend="triton")

    def passes(self, function: Callable) -> list[Pass]:
        inputs, douts, _ = branches.make_inputs(self.op, self.shape, DTYPE, CPU)
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        outputs: list[Tensor] = []

        def forward() -> dict[str, Tensor]:
            result = function(**inputs)
            outputs.extend(result if isinstance(result, tuple) else [result])
            return {f"output {i}": x.detach() for i, x in enumerate(outputs)}

        def backward() -> dict[str, Tensor]:
            gradients = [dout.to(x.dtype) for dout, x in zip(douts, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), gradients)
            return {f"d{name}": x for name, x in zip(leaves, gradients)}

        size, both = (branches.needed_bytes(inputs, douts, mode) for mode in ("fwd", "fwd_bwd"))
        given = tuple(inputs.values())
        return [
            Pass(FORWARD, forward, 0, size, given),
            Pass(BACKWARD, backward, 0, both - size, given),
        ]


Work = PointWork | BranchWork


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def attention(D: int, T: int, W: int) -> Work:
    return PointWork(WindowAttn(T=T, window_size=W, Hq=1, Hkv=1, D=D, Dv=D))


def fast_weights(D: int, T: int, chunk_size: int, **options: bool) -> Work:
    sizes = {"T": T, "chunk_size": chunk_size, "H": 1, "Dk": D, "Dv": D, "Dh": D}
    return PointWork(BlockCausalTTT(**sizes, **options))


def _cache(S: int, B: int) -> Work:
    return PointWork(WindowAttnWithKVCache(S=S, window_size=None, B=B))


# One head and one row are enough: what more of them execute is that many times as much.
WORKS: tuple[Work, ...] = (
    attention(64, 2048, 512),
    attention(128, 2048, 512),
    _cache(1024, 8),
    fast_weights(256, 1536, 512, momentum=True),
    fast_weights(256, 1536, 512, momentum=True, muon=True),
    *(BranchWork(op, {"B": 1, "T": 2048, "C": 1024, "Hq": 16, "Hf": 4}) for op in branches.OPS),
)
# For tests: whole launches of every kernel, in seconds.
QUICK_WORKS: tuple[Work, ...] = (
    attention(64, 160, 48),
    _cache(96, 2),
    fast_weights(32, 96, 32, momentum=True, muon=True),
    *(BranchWork(op, {"B": 1, "T": 16, "C": 64, "Hq": 2, "Hf": 1}) for op in branches.OPS),
)
OPS = tuple(dict.fromkeys(work.op for work in WORKS))
