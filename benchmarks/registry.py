"""What is measured: each operation once, with its inputs, its needed FLOPs and its reference.

A *point* is one operation at one size, a frozen dataclass: `WindowAttn`, `WindowAttnWithKVCache`,
`BlockCausalTTT`, `TTT` or `TTTApply`. It makes its own seeded inputs, runs the operation on a backend, runs
the reference, and counts the FLOPs that the mathematics needs: masked work and padding earn nothing, nor does
recomputation (but for the scores in the backward of attention, which everybody recomputes and everybody
counts). `benchmarks/peers.py` holds what others make of the same inputs.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

import lact_kernels
import reference

MODES = ("fwd", "fwd_bwd")

# The dense reference needs scores of T x T per head, so beyond this size a smaller point is checked.
GATE_SCORES = 2**23
GATE_WINDOW = 1024
GATE_TOKENS = 2**12
GATE_CHUNK = 1024
# Odd. With fewer keys than Dk a step has not full rank, and Newton-Schulz amplifies what rounding adds to it.
GATE_PIECE = 1023


@dataclasses.dataclass(frozen=True)
class WindowAttn:
    """One size of `window_attn`. `window_size` None is full causal attention.

    With more than one of `sequences` the T tokens are so many packed sequences, and B is 1.
    """

    op: ClassVar[str] = "window_attn"
    swept: ClassVar[str] = "window_size"
    modes: ClassVar[tuple[str, ...]] = MODES

    T: int
    window_size: int | None
    B: int = 1
    Hq: int = 4
    Hkv: int = 4
    D: int = 64
    Dv: int = 64
    sequences: int = 1

    @property
    def swept_value(self) -> int:
        """The place on the horizontal axis: full attention is a window of T."""
        return self.T if self.window_size is None else self.window_size

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.B, self.T, self.Hq, self.Dv

    @property
    def lengths(self) -> list[int]:
        """Of the packed sequences: seeded shares of T, log-uniform over a factor of 256."""
        draw = random.Random(0)
        shares = [256 ** draw.random() for _ in range(self.sequences)]
        ends = itertools.accumulate(shares, initial=0)
        borders = [round(self.T * end / sum(shares)) for end in ends]
        return [stop - start for start, stop in itertools.pairwise(borders)]

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Leaves q `[B, T, Hq, D]`, k `[B, T, Hkv, D]`, v `[B, T, Hkv, Dv]`, standard normal.

        Packed sequences come with their borders, cu_seqlens `[sequences + 1]`, on the host: nothing waits
        for them there. Peers that want them on the device take them there once.
        """
        normal = _normal(device, seed)
        shapes = {
            "q": (self.B, self.T, self.Hq, self.D),
            "k": (self.B, self.T, self.Hkv, self.D),
            "v": (self.B, self.T, self.Hkv, self.Dv),
        }
        inputs = {name: normal(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
        if self.sequences > 1:
            borders = [0, *itertools.accumulate(self.lengths)]
            inputs["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
        return inputs

    def run(self, backend: str, q: Tensor, k: Tensor, v: Tensor, **packing: Tensor) -> Tensor:
        return lact_kernels.window_attn(q, k, v, self.window_size, **packing, backend=backend)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **packing: Tensor) -> Tensor:
        packing = {name: x.to(q.device) for name, x in packing.items()}
        return reference.window_attn(q, k, v, self.window_size, **packing)

    def flops(self, mode: str) -> int:
        """Two products of P pairs per head forward; backward four, and the scores once more.

        P counts the pairs of a query and a key that it sees, in each sequence.
        """
        pairs = sum(_pairs(length, self.swept_value) for length in self.lengths)
        forward = 2 * pairs * (self.D + self.Dv)
        backward = 2 * pairs * (3 * self.D + 2 * self.Dv)
        return self.B * self.Hq * (forward + (backward if mode == "fwd_bwd" else 0))

    def gate(self) -> "WindowAttn":
        """The point itself where the dense reference fits, else the same windows over fewer tokens.

        Packed sequences shrink, and the window with them, so that as many as before outlast it.
        """
        if self.B * self.Hq * self.T**2 <= GATE_SCORES:
            return self
        group = self.Hq // self.Hkv
        Hkv = min(self.Hkv, 2)
        window_size = self.window_size and min(self.window_size, GATE_WINDOW)
        T = min(self.T, (window_size or GATE_WINDOW) + 129)  # the window's edge in odd places
        if self.sequences > 1:
            T = min(self.T, 2 * GATE_WINDOW)
            window_size = self.window_size and max(1, self.window_size * T // self.T)
        return dataclasses.replace(self, B=1, T=T, Hq=group * Hkv, Hkv=Hkv, window_size=window_size)


@dataclasses.dataclass(frozen=True)
class WindowAttnWithKVCache:
    """One size of `window_attn_with_kvcache`: the last Tq of S tokens in each row of a full cache.

    Forward only, so its inputs need no gradients.
    """

    op: ClassVar[str] = "window_attn_with_kvcache"
    swept: ClassVar[str] = "S"
    modes: ClassVar[tuple[str, ...]] = ("fwd",)

    S: int
    window_size: int | None
    B: int = 4
    Tq: int = 1
    Hq: int = 8
    Hkv: int = 2
    D: int = 64

    @property
    def span(self) -> int:
        """The slots that the queries of a row see between them, the last ones."""
        return self.S if self.window_size is None else min(self.S, self.window_size + self.Tq - 1)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.B, self.Tq, self.Hq, self.D

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """q `[B, Tq, Hq, D]`, k_cache and v_cache `[B, S, Hkv, D]`, standard normal."""
        normal = _normal(device, seed)
        cache = (self.B, self.S, self.Hkv, self.D)
        shapes = {"q": self.output_shape, "k_cache": cache, "v_cache": cache}
        return {name: normal(shape).to(dtype) for name, shape in shapes.items()}

    def run(self, backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return lact_kernels.window_attn_with_kvcache(
            q, k_cache, v_cache, self.window_size, backend=backend
        )

    def reference(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return reference.window_attn_with_kvcache(q, k_cache, v_cache, self.window_size)

    def flops(self, mode: str) -> int:
        """Two products of the pairs that the last Tq of S queries see, per query head."""
        W = self.S if self.window_size is None else self.window_size
        pairs = _pairs(self.S, W) - _pairs(self.S - self.Tq, W)
        return self.B * self.Hq * pairs * 4 * self.D

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Queries, outputs, and the slots that are seen, each once: what bounds a single query."""
        channels = self.D * (self.Tq * self.Hq + self.span * self.Hkv)
        return 2 * self.B * channels * dtype.itemsize

    def gate(self) -> "WindowAttnWithKVCache":
        """The same window over a cache a little larger than it."""
        S = min(self.S, (self.window_size or GATE_WINDOW) + 129)
        return dataclasses.replace(self, S=S)


@dataclasses.dataclass(frozen=True)
class BlockCausalTTT:
    """One size of `block_causal_ttt`: fast weights `w0, w2 [H, Dh, Dk]` and `w1 [H, Dv, Dh]`."""

    op: ClassVar[str] = "block_causal_ttt"
    swept: ClassVar[str] = "chunk_size"
    modes: ClassVar[tuple[str, ...]] = MODES

    T: int
    chunk_size: int
    B: int = 1
    H: int = 4
    Dk: int = 192
    Dv: int = 192
    Dh: int = 192
    muon: bool = False
    momentum: bool = False
    prenorm: bool = False

    @property
    def swept_value(self) -> int:
        return self.chunk_size

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.B, self.T, self.H, self.Dv

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Leaves as `block_causal_ttt` takes them: unit q and k, rates that change the weights visibly.

        Tokens are in `dtype`; fast weights, rates and momentum are float32.
        """
        normal = _normal(device, seed)
        B, T, H = self.B, self.T, self.H
        inputs = {
            "q": _unit(normal((B, T, H, self.Dk))).to(dtype),
            "k": _unit(normal((B, T, H, self.Dk))).to(dtype),
            "v": normal((B, T, H, self.Dv)).to(dtype),
            **_network(normal, H, self.Dk, self.Dv, self.Dh),
        }
        for name in ("lr0", "lr1", "lr2"):
            inputs[name] = 0.02 * normal((B, T, H)).sigmoid()
        if self.momentum:
            inputs["momentum"] = normal((B, T, H)).sigmoid()
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def run(self, backend: str, **inputs: Tensor) -> Tensor:
        return lact_kernels.block_causal_ttt(**inputs, **self._options(), backend=backend)

    def reference(self, **inputs: Tensor) -> Tensor:
        return reference.block_causal_ttt(**inputs, **self._options())

    def flops(self, mode: str) -> int:
        """Matrix products only, in units of `Dk Dh` or `Dv Dh` multiply-adds per token and head.

        Apply: w0 q, w2 q, w1 h. Update: w0 k, w2 k, w1^T v and three outer products. The last chunk
        is applied but never updated. Backward is twice forward: two gradients for each product.
        """
        Dk, Dv, Dh = self.Dk, self.Dv, self.Dh
        updates = max(-(-self.T // self.chunk_size) - 1, 0)
        updated = updates * self.chunk_size
        apply = self.T * (4 * Dk * Dh + 2 * Dv * Dh)
        update = updated * (8 * Dk * Dh + 4 * Dv * Dh)
        total = (apply + update) * (3 if mode == "fwd_bwd" else 1)
        if self.muon:
            shapes = ((Dh, Dk), (Dv, Dh), (Dh, Dk))
            total += updates * sum(_newton_schulz_flops(*shape, mode) for shape in shapes)
        return self.B * self.H * total

    def gate(self) -> "BlockCausalTTT":
        """The point itself where it is small, else two updates and an odd rest, with fewer heads."""
        if self.B * self.T * self.H <= GATE_TOKENS:
            return self
        chunk_size = min(self.chunk_size, GATE_CHUNK)
        T = min(self.T, 2 * chunk_size + 33)
        return dataclasses.replace(self, B=1, T=T, H=min(self.H, 2), chunk_size=chunk_size)

    def _options(self) -> dict:
        return {"chunk_size": self.chunk_size, "muon": self.muon, "prenorm": self.prenorm}


# The steps of a plan as data: "update" on these keys, or "apply" to these queries.
Steps = list[tuple[str, int, int]]


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of updates and applies that models use: its steps, and the sizes that they have there."""

    steps: Callable[[int, int], Steps]  # of so many pieces of so many tokens
    pieces: int
    piece: int
    H: int
    D: int  # Dk and Dv
    Dh: int
    muon: bool  # with the Newton-Schulz steps NEWTON_SCHULZ
    detach_norms: bool


def _views(pieces: int, piece: int) -> Steps:
    """One update on the input views, then these and as many new views read the weights."""
    return [("update", 0, pieces * piece), ("apply", 0, 2 * pieces * piece)]


def _bidirectional(pieces: int, piece: int) -> Steps:
    return [("update", 0, pieces * piece), ("apply", 0, pieces * piece)]


def _update_first(pieces: int, piece: int) -> Steps:
    borders = range(0, pieces * piece, piece)
    return [(kind, i, i + piece) for i in borders for kind in ("update", "apply")]


def _video(pieces: int, piece: int) -> Steps:
    """Noisy pieces, with the clean piece before each but the first: update on that, apply to both."""
    steps = [("apply", 0, piece)]
    for i in range(piece, (2 * pieces - 1) * piece, 2 * piece):
        steps += [("update", i, i + piece), ("apply", i, i + 2 * piece)]
    return steps


# LaCT's novel views at 256 x 256 pixels, ZipMap's frames, fast-spatial-mem, LaCT's video.
ORDERS = {
    "views": Order(_views, 32, 1024, 1, 768, 1536, muon=True, detach_norms=True),
    "bidirectional": Order(_bidirectional, 24, 1400, 1, 1024, 2048, muon=True, detach_norms=True),
    "update-first": Order(_update_first, 8, 4096, 1, 768, 1536, muon=True, detach_norms=True),
    "video": Order(_video, 7, 4680, 2, 768, 1536, muon=False, detach_norms=False),
}
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # of all these but LaCT's language model


@dataclasses.dataclass(frozen=True)
class TTT:
    """One size of `ttt`: the plan of ORDERS with so many pieces, each of so many tokens."""

    op: ClassVar[str] = "ttt"
    swept: ClassVar[str] = "pieces"
    modes: ClassVar[tuple[str, ...]] = MODES

    plan: str
    pieces: int
    piece: int
    B: int = 1
    H: int = 1
    Dk: int = 96
    Dv: int = 96
    Dh: int = 192
    only_w1: bool = False  # w0 and w2 are not trained

    @classmethod
    def of(cls, plan: str, small: bool, **changes) -> "TTT":
        """With the sizes of ORDERS, or small: an eighth of each, and at most four pieces."""
        order, part = ORDERS[plan], 8 if small else 1
        D, Dh = order.D // part, order.Dh // part
        pieces = min(order.pieces, 4) if small else order.pieces
        sizes = {"pieces": pieces, "piece": order.piece // part, "H": order.H}
        return cls(plan, **(sizes | {"Dk": D, "Dv": D, "Dh": Dh} | changes))

    @property
    def swept_value(self) -> int:
        return self.pieces

    @property
    def steps(self) -> Steps:
        return ORDERS[self.plan].steps(self.pieces, self.piece)

    @property
    def Tq(self) -> int:
        return max(stop for kind, _, stop in self.steps if kind == "apply")

    @property
    def Tk(self) -> int:
        """Up to the last key that is read."""
        return max(stop for kind, _, stop in self.steps if kind == "update")

    @property
    def muon(self) -> bool:
        return ORDERS[self.plan].muon

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.B, self._tokens("apply"), self.H, self.Dv

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Leaves as those of `BlockCausalTTT`, with rates for what is trained only."""
        normal = _normal(device, seed)
        B, H, Tk = self.B, self.H, self.Tk
        inputs = {
            "q": _unit(normal((B, self.Tq, H, self.Dk))).to(dtype),
            "k": _unit(normal((B, Tk, H, self.Dk))).to(dtype),
            "v": normal((B, Tk, H, self.Dv)).to(dtype),
            **_network(normal, H, self.Dk, self.Dv, self.Dh),
        }
        for name in ("lr1",) if self.only_w1 else ("lr0", "lr1", "lr2"):
            inputs[name] = 0.02 * normal((B, Tk, H)).sigmoid()
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def run(self, backend: str, **inputs: Tensor) -> Tensor:
        kinds = {"update": lact_kernels.Update, "apply": lact_kernels.Apply}
        plan = lact_kernels.TTTPlan([kinds[kind](*tokens) for kind, *tokens in self.steps])
        muon = lact_kernels.NewtonSchulz(NEWTON_SCHULZ) if self.muon else False
        norms = {"detach_norms": ORDERS[self.plan].detach_norms}
        return lact_kernels.ttt(
            **_all_rates(inputs), plan=plan, muon=muon, **norms, backend=backend
        )

    def reference(self, **inputs: Tensor) -> Tensor:
        steps = [(kind, [(start, stop)]) for kind, start, stop in self.steps]
        return reference.ttt(
            **_all_rates(inputs),
            steps=steps,
            coefficients=NEWTON_SCHULZ if self.muon else None,
            detach_norms=ORDERS[self.plan].detach_norms,
        )[0]

    def flops(self, mode: str) -> int:
        """As those of `BlockCausalTTT`, with the Newton-Schulz steps of the standard form.

        If w1 alone is trained, an update needs w0 k, w2 k and one outer product. Backward is twice forward.
        """
        Dk, Dv, Dh = self.Dk, self.Dv, self.Dh
        apply = 4 * Dk * Dh + 2 * Dv * Dh
        update = apply if self.only_w1 else 2 * apply
        total = self._tokens("apply") * apply + self._tokens("update") * update
        total *= 3 if mode == "fwd_bwd" else 1
        if self.muon:
            updates = sum(kind == "update" for kind, *_ in self.steps)
            shapes = [(Dv, Dh)] if self.only_w1 else [(Dh, Dk), (Dv, Dh), (Dh, Dk)]
            total += updates * sum(_newton_schulz_flops(*shape, mode) for shape in shapes)
        return self.B * self.H * total

    def gate(self) -> "TTT":
        """The point itself where it is small, else at most three odd pieces, with fewer heads."""
        if self.B * self.H * (self.Tq + self.Tk) <= GATE_TOKENS:
            return self
        pieces, piece = min(self.pieces, 3), min(self.piece, GATE_PIECE)
        return dataclasses.replace(self, B=1, H=min(self.H, 2), pieces=pieces, piece=piece)

    def _tokens(self, which: str) -> int:
        return sum(stop - start for kind, start, stop in self.steps if kind == which)


@dataclasses.dataclass(frozen=True)
class TTTApply:
    """One size of `ttt_apply`: Tq tokens through stored weights, which have the dtype of the tokens.

    Many tokens are a rendering, one is a control step. Forward only, so its inputs need no gradients.
    """

    op: ClassVar[str] = "ttt_apply"
    swept: ClassVar[str] = "Tq"
    modes: ClassVar[tuple[str, ...]] = ("fwd",)

    Tq: int
    B: int = 1
    H: int = 1
    Dk: int = 96
    Dv: int = 96
    Dh: int = 192

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.B, self.Tq, self.H, self.Dv

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Unit q and the weights, all in `dtype`."""
        normal = _normal(device, seed)
        q = _unit(normal((self.B, self.Tq, self.H, self.Dk)))
        network = _network(normal, self.H, self.Dk, self.Dv, self.Dh)
        return {name: x.to(dtype) for name, x in {"q": q, **network}.items()}

    def run(self, backend: str, **inputs: Tensor) -> Tensor:
        return lact_kernels.ttt_apply(**inputs, backend=backend)

    def reference(self, **inputs: Tensor) -> Tensor:
        return reference.ttt_apply(**inputs)

    def flops(self, mode: str) -> int:
        """w0 q, w2 q and w1 h."""
        return self.B * self.Tq * self.H * (4 * self.Dk * self.Dh + 2 * self.Dv * self.Dh)

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Weights, queries and outputs, each once: what bounds a control step."""
        weights = 2 * self.Dk * self.Dh + self.Dv * self.Dh
        tokens = self.B * self.Tq * (self.Dk + self.Dv)
        return self.H * (weights + tokens) * dtype.itemsize

    def gate(self) -> "TTTApply":
        """The point itself where it is small, else an odd number of tokens of fewer heads."""
        if self.B * self.Tq * self.H <= GATE_TOKENS:
            return self
        return dataclasses.replace(self, B=1, Tq=min(self.Tq, GATE_PIECE), H=min(self.H, 2))


Point = WindowAttn | WindowAttnWithKVCache | BlockCausalTTT | TTT | TTTApply
OPERATIONS: dict[str, type[Point]] = {
    x.op: x for x in (WindowAttn, WindowAttnWithKVCache, BlockCausalTTT, TTT, TTTApply)
}


def _pairs(T: int, window_size: int) -> int:
    """Of a query and a key that it sees, in T tokens: `sum_i min(i + 1, window_size)`."""
    W = min(window_size, T)
    return W * (W + 1) // 2 + (T - W) * W


def _newton_schulz_flops(rows: int, columns: int, mode: str) -> int:
    """Five steps of `A = X X^T; X = a X + (b A + c A A) X` with X `[m, n]`, m <= n.

    Backward: gradients of B and X from `B X`, two of `A A`, one of `X X^T`, which is symmetric.
    """
    m, n = sorted((rows, columns))
    forward = 4 * m * m * n + 2 * m**3
    backward = 6 * m * m * n + 4 * m**3
    return 5 * (forward + (backward if mode == "fwd_bwd" else 0))


def _all_rates(inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Inputs of `ttt`, in which a rate that is not there is None."""
    return {"lr0": None, "lr2": None} | inputs


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _network(normal: Callable, H: int, Dk: int, Dv: int, Dh: int) -> dict[str, Tensor]:
    """Fast weights that keep the size of what goes through them."""
    return {
        "w0": normal((H, Dh, Dk)) / Dk**0.5,
        "w1": normal((H, Dv, Dh)) / Dh**0.5,
        "w2": normal((H, Dh, Dk)) / Dk**0.5,
    }


def _normal(device: torch.device, seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Standard normal float32 tensors, drawn on the device from one generator."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, device=device)


def empty_output(point: Point, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, with the shape of the point's output, `[B, T, H, Dv]`."""
    return torch.empty(point.output_shape, dtype=dtype, device=device)


def output_gradient(o: Tensor, seed: int = 1) -> Tensor:
    """Something for a backward to start from: standard normal, in the shape and dtype of `o`."""
    return _normal(o.device, seed)(o.shape).to(o.dtype)


def forward_backward(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], do: Tensor
) -> dict[str, Tensor]:
    """Output "o" and the gradient "dx" of every leaf x, as new tensors; backward starts from `do`.

    Leaves are the inputs that need a gradient; without any there is no backward. A leaf that `o` does
    not depend on, such as the keys of a single chunk, has a gradient of zeros.
    """
    o = function(**inputs)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    if not leaves:
        return {"o": o}
    gradients = torch.autograd.grad(
        o, list(leaves.values()), do.to(o.dtype), allow_unused=True, materialize_grads=True
    )
    return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients)}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves again where they were; borders stay the integers that they are."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
