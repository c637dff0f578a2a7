"""Inputs and gradients shared by the tests of one operation's backends."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import reference
from lact_kernels import TTTState
from tests.tolerance import assert_close_to_float64

# The checks of torch.library.opcheck. An op that computes gradients is in the traced graph of its forward.
BACKWARD_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
OPCHECKS = (*BACKWARD_OPCHECKS, "test_aot_dispatch_dynamic")


@contextlib.contextmanager
def filled_with_nan():
    """Memory that a kernel forgets to write shows up as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LAYOUTS = ("contiguous", "one projection", "heads first", "padded channels", "every second token")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides, and NaN wherever a wrong offset would read."""
    if layout == "one projection":
        return _embedded(
            x, (x.shape[0], x.shape[1], 3, *x.shape[2:]), (..., 1, slice(None), slice(None))
        )
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded channels":
        return _embedded(x, (*x.shape[:3], x.shape[3] + 5), (..., slice(3, 3 + x.shape[3])))
    if layout == "every second token":
        return _embedded(
            x, (x.shape[0], 2 * x.shape[1], *x.shape[2:]), (slice(None), slice(1, None, 2))
        )
    return x


def _embedded(x: Tensor, shape: tuple[int, ...], index: tuple) -> Tensor:
    larger = x.new_full(shape, float("nan"))
    larger[index] = x
    return larger[index]


@dataclasses.dataclass(frozen=True)
class WindowCase:
    """One shape of `window_attn`, and why it is there."""

    reason: str
    Tq: int
    window_size: int | tuple[int, int] | None
    B: int = 1
    Tk: int | None = None  # Tq by default
    Hq: int = 2
    Hkv: int = 2
    D: int = 16
    Dv: int = 16
    cu_seqlens: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None  # those of the keys, where they differ
    size: float = 1.0  # of q and k
    softcap: float | None = None
    sinks: float | None = None  # their size

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    @property
    def single_key(self) -> bool:
        """Whether every query sees one key, and so has the output v and no gradient but the lse's."""
        return self.sinks is None and 1 in (self.window_size, self.Tk or self.Tq)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """q, k and v, and sinks if there are any, with gradients."""
        Tk = self.Tq if self.Tk is None else self.Tk
        shapes = [(self.Tq, self.Hq, self.D), (Tk, self.Hkv, self.D), (Tk, self.Hkv, self.Dv)]
        tensors = [torch.randn(self.B, *s, dtype=torch.float64) for s in shapes]
        sizes = (self.size, self.size, 1.0)
        tensors = [(x * size).to(dtype) for x, size in zip(tensors, sizes)]
        if self.sinks is not None:
            tensors.append((torch.randn(self.Hq) * self.sinks).to(dtype))
        return [x.to(device).requires_grad_() for x in tensors]

    def options(self, device: str = "cpu") -> dict:
        borders = {"cu_seqlens": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens_k}
        options = {"window_size": self.window_size} | {
            name: torch.tensor(x, dtype=torch.int32, device=device)
            for name, x in borders.items()
            if x is not None
        }
        return options if self.softcap is None else options | {"softcap": self.softcap}

    def attend(self, fn: Callable, inputs: list[Tensor], **more):
        """The results of `fn` for its `inputs`, with its options."""
        q, k, v, *sinks = inputs
        more |= {"sinks": sinks[0]} if sinks else {}
        return fn(q, k, v, **self.options(q.device.type), **more)


def check_window_attn(
    fn: Callable, case: WindowCase, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Outputs, lse and all gradients of `fn`, through o and lse both, against float64.

    The lse is -inf exactly where a query sees nothing.
    """
    inputs = case.inputs(dtype, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = case.attend(reference.window_attn, exact_inputs, return_lse=True)
    same = case.attend(reference.window_attn, inputs, return_lse=True)
    ours = case.attend(fn, inputs, return_lse=True)
    cotangents = [torch.randn_like(x) for x in exact]
    results = [
        (
            *outputs,
            *torch.autograd.grad(outputs, xs, [c.to(x.dtype) for c, x in zip(cotangents, outputs)]),
        )
        for outputs, xs in ((ours, inputs), (same, inputs), (exact, exact_inputs))
    ]
    for name, a, s, e in zip(("o", "lse", "dq", "dk", "dv", "dsinks"), *results):
        if name == "lse":
            blind = e == -math.inf
            assert torch.equal(a == -math.inf, blind)
            a, s, e = (x.masked_fill(blind, 0.0) for x in (a, s, e))
        if case.single_key and name in ("dq", "dk"):
            assert_cancelled(a, e, exact_inputs, cotangents[0], name)
        else:
            assert_close_to_float64(a, s, e, name)


def assert_cancelled(
    actual: Tensor, exact: Tensor, inputs: list[Tensor], do: Tensor, name: str
) -> None:
    """Hold dq or dk of rows that see one key against the rounding of the two terms that cancel in them.

    The gradient of a score is `p (dP - delta)`, where `dP = do . v` and `delta = do . o` are equal, as o
    is v. A softmax of one element, the plain path's, cancels them without computing either; a
    backward that starts from the lse computes both, each within eps |do| |v|, and the difference
    then multiplies a key or a query.
    """
    q, k, v = (x.detach() for x in inputs)
    norms = [x.norm(dim=-1).max() for x in (do, v, k if name == "dq" else q)]
    bound = 4 * torch.finfo(actual.dtype).eps * torch.stack(norms).prod() * q.shape[-1] ** -0.5
    error = (actual - exact).abs().max()
    assert error <= bound, (
        f"{name}: error {error:.2e} is above the rounding {bound:.2e} of its terms"
    )


@dataclasses.dataclass(frozen=True)
class TTTCase:
    """One shape and set of options of `block_causal_ttt`, and why it is there."""

    reason: str
    T: int = 11
    chunk_size: int = 4
    B: int = 2
    H: int = 2
    Dk: int = 5
    Dv: int = 6
    Dh: int = 7
    momentum: bool = False
    muon: bool = False
    prenorm: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    batched_weights: bool = False

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each packed sequence begins and stops."""
        return list(zip(self.cu_seqlens, self.cu_seqlens[1:]))

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """All tensors with gradients: weights whose steps change them visibly, rates around 0.05."""
        B, T, H, Dk, Dv, Dh = self.B, self.T, self.H, self.Dk, self.Dv, self.Dh
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (
            ()
            if not self.batched_weights
            else (len(self.cu_seqlens) - 1 if self.cu_seqlens else B,)
        )
        shapes = {"q": (B, T, H, Dk), "k": (B, T, H, Dk), "v": (B, T, H, Dv)}
        tensors = {
            name: torch.randn(*s, dtype=torch.float64).to(dtype) for name, s in shapes.items()
        }
        for name, (r, c) in {"w0": (Dh, Dk), "w1": (Dv, Dh), "w2": (Dh, Dk)}.items():
            tensors[name] = torch.randn(*rows, H, r, c, dtype=torch.float64).mul_(c**-0.5).to(wide)
        for name in ("lr0", "lr1", "lr2"):
            tensors[name] = torch.rand(B, T, H, dtype=torch.float64).mul_(0.1).to(wide)
        if self.momentum:
            tensors["momentum"] = torch.rand(B, T, H, dtype=torch.float64).to(wide)
        return {name: x.to(device).requires_grad_() for name, x in tensors.items()}

    def options(self, device: str = "cpu") -> dict:
        options = {"chunk_size": self.chunk_size, "muon": self.muon, "prenorm": self.prenorm}
        if self.cu_seqlens is not None:
            options["cu_seqlens"] = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)
        return options


TTT_OPTIONS = [
    TTTCase(
        " ".join(name for name, on in zip(("momentum", "muon", "prenorm"), flags) if on) or "plain",
        momentum=flags[0],
        muon=flags[1],
        prenorm=flags[2],
    )
    for flags in itertools.product((False, True), repeat=3)
]
PACKED = (0, 0, 3, 7, 7, 16, 24)  # nothing, less than a chunk, one chunk, more than two, two
TTT_SHAPES = [
    TTTCase("one token", T=1),
    TTTCase("one chunk", T=4),
    TTTCase("chunk minus one", T=3),
    TTTCase("chunk plus one", T=5),
    TTTCase("whole chunks", T=12),
    TTTCase("chunks of one token", T=5, chunk_size=1, momentum=True),
    TTTCase("chunk beyond T", T=5, chunk_size=100),
    TTTCase("no tokens", T=0),
    TTTCase("no batch", B=0),
    TTTCase("weights for each row", batched_weights=True, momentum=True, prenorm=True),
    TTTCase("wide hidden layer", Dk=8, Dv=3, Dh=20, T=9, muon=True),
    TTTCase("narrow hidden layer", Dk=9, Dv=12, Dh=2, T=9, muon=True),
    TTTCase("packed", B=1, T=24, cu_seqlens=PACKED, momentum=True, muon=True),
    TTTCase("packed prenorm", B=1, T=24, cu_seqlens=PACKED, prenorm=True, batched_weights=True),
    TTTCase("packed with nothing", B=1, T=0, cu_seqlens=(0, 0)),
    TTTCase("larger", B=2, T=300, chunk_size=96, H=3, Dk=32, Dv=24, Dh=40, momentum=True),
]


def tensors_of(result: Tensor | tuple[Tensor, TTTState]) -> list[Tensor]:
    """All that `block_causal_ttt` returned: the outputs, and where there is one, the state's tensors."""
    if isinstance(result, Tensor):
        return [result]
    o, state = result
    pending = [x for waiting in state.pending for x in waiting.tokens if x is not None]
    return [o, *(x for triple in state[:4] for x in triple), *pending]


def check_block_causal_ttt(
    fn: Callable, case: TTTCase, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Outputs and all gradients of `fn` against float64."""
    inputs = case.inputs(dtype, device)
    options = case.options(device)
    exact_inputs = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = reference.block_causal_ttt(**exact_inputs, **options)
    same = reference.block_causal_ttt(**inputs, **options)
    ours = fn(**inputs, **options)
    do = torch.randn_like(exact)
    results = [
        (o, *torch.autograd.grad(o, list(xs.values()), do.to(o.dtype), materialize_grads=True))
        for o, xs in ((ours, inputs), (same, inputs), (exact, exact_inputs))
    ]
    for name, a, s, e in zip(("o", *(f"d{name}" for name in inputs)), *results):
        assert_close_to_float64(a, s, e, name)


@dataclasses.dataclass(frozen=True)
class ApplyCase:
    """One shape of `ttt_apply`, and why it is there."""

    reason: str
    T: int = 11
    B: int = 2
    H: int = 2
    Dk: int = 5
    Dv: int = 6
    Dh: int = 7
    batched: str = ""  # which of the weights have one set for each row
    float32_weights: bool = False

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """q, w0, w1 and w2 with gradients."""
        B, T, H, Dk, Dv, Dh = self.B, self.T, self.H, self.Dk, self.Dv, self.Dh
        tensors = [torch.randn(B, T, H, Dk, dtype=torch.float64).to(dtype)]
        for number, (rows, columns) in zip("012", ((Dh, Dk), (Dv, Dh), (Dh, Dk))):
            lead = (B,) if number in self.batched else ()
            w = torch.randn(*lead, H, rows, columns, dtype=torch.float64).mul_(columns**-0.5)
            tensors.append(w.to(torch.float32 if self.float32_weights else dtype))
        return [x.to(device).requires_grad_() for x in tensors]


def check_ttt_apply(fn: Callable, case: ApplyCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Outputs and all gradients of `fn` against float64."""
    inputs = case.inputs(dtype, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference.ttt_apply(*exact_inputs)
    same, ours = reference.ttt_apply(*inputs), fn(*inputs)
    do = torch.randn_like(exact).to(dtype)
    results = [
        (o, *torch.autograd.grad(o, xs, do.to(o.dtype)))
        for o, xs in ((ours, inputs), (same, inputs), (exact, exact_inputs))
    ]
    for name, a, s, e in zip(("o", "dq", "dw0", "dw1", "dw2"), *results):
        assert a.shape == e.shape
        assert_close_to_float64(a, s, e, name)


def write_with_numpy(x, place, value):
    x.numpy()[place] = value


def write_to_data(x, place, value):
    x.data[place] = value


def write_in_inference_mode(x, place, value):
    with torch.inference_mode():
        x[place] = value


# Ways to change a tensor. Its version tells of the last two only.
WRITES = [write_with_numpy, write_to_data, write_in_inference_mode, Tensor.__setitem__]


# Few tokens in a chunk: with Muon dG, about dw 490 / |G|, is beyond float16.
FLOAT16_MUON = TTTCase("", B=1, T=18, chunk_size=4, Dk=16, Dv=12, Dh=24, muon=True)


def check_float16_muon(
    fn: Callable, case: TTTCase, loss_scale: float = 1.0, zeros: range = range(0)
) -> None:
    """All gradients of float16 tokens against float64, where the outputs' gradients have any scale.

    `zeros` is a chunk of tokens that are zero, for which dG is dw 490 / 1e-7. Plain PyTorch gets through
    without them, as they change nothing, and with gradients so small that its dG fits float16.
    """
    inputs, options = case.inputs(torch.float16), case.options()
    kept = torch.tensor([t not in zeros for t in range(case.T)])
    with torch.no_grad():
        for x in ("q", "k", "v"):
            inputs[x] *= kept[:, None, None]

    def gradients(fn, inputs, do):
        o = fn(**inputs, **options)
        return torch.autograd.grad(o, list(inputs.values()), do.to(o.dtype))

    do = torch.randn(case.B, case.T, case.H, case.Dv).half()
    exact_inputs = {x: t.detach().double().requires_grad_() for x, t in inputs.items()}
    without_zeros = {
        x: (t if x.startswith("w") else t[:, kept]).detach().requires_grad_()
        for x, t in inputs.items()
    }
    small = 2.0**-10
    actual = gradients(fn, inputs, do * loss_scale)
    same = gradients(reference.block_causal_ttt, without_zeros, do[:, kept] * small)
    exact = gradients(reference.block_causal_ttt, exact_inputs, do)
    for x, a, s, e in zip(inputs, actual, same, exact):
        a, s = a / loss_scale, s / small
        if not x.startswith("w"):
            assert not a[:, ~kept].any(), x
            a, e = a[:, kept], e[:, kept]
        assert_close_to_float64(a, s, e, f"d{x}")
