"""Calls of the LaCT family's functions and layers, as models make them, for `benchmarks/family.py`.

A call makes its own seeded inputs, in the layout of the published function, and knows who computes it: ours
(`lact_kernels.compat.lact`, or `lact_kernels.ttt` where no function is published), the plain one
(`benchmarks/plain_family.py`) and the authors' own. What is right is the plain one in float64, in which it
iterates Newton-Schulz in float64 as well.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import lact_kernels
from benchmarks import plain_family
from benchmarks.peers import Unavailable, lact_script
from benchmarks.registry import MODES, NEWTON_SCHULZ
from lact_kernels.compat import lact

MUON_STEPS = len(NEWTON_SCHULZ)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model. A CPU takes fewer pieces, and a part of all others but the rows."""

    pieces: int  # views, frames, chunks or windows
    few_pieces: int  # these on a CPU, where compiling takes half a minute for each update
    piece: int  # tokens of each
    D: int  # Dk and Dv
    Dh: int
    rows: int = 1  # batch rows times heads, each with weights of its own


@dataclasses.dataclass(frozen=True)
class Function:
    """A published function with the options and the sizes of a model that calls it."""

    sizes: Sizes
    tokens: Callable[[int, int], int]  # of so many pieces of so many tokens
    options: Callable[[int, int], tuple]  # what follows the tensors, likewise
    name: str  # ours
    plain: Callable[..., Any]
    theirs: tuple[str, str] | str  # folder and module in their repository, or why there is none
    transposed: bool = False  # weights [Dk, Dh] and [Dh, Dv] instead of [Dh, Dk] and [Dv, Dh]
    muon: bool = True
    momentum: bool = False
    modes: tuple[str, ...] = MODES


def _windows(
    w0: Tensor,  # [b*h, Dk, Dh]
    w1: Tensor,  # [b*h, Dh, Dv]
    w2: Tensor,  # [b*h, Dk, Dh]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    momentum: Tensor,  # [b*h, l, 1]
    window: int,
    *,
    backend: str,
) -> tuple[Tensor, lact_kernels.TTTState]:
    """Window by window its queries, then an update whose momentum is added behind Newton-Schulz."""
    plan = lact_kernels.TTTPlan.block_causal(k.shape[1], window)
    tokens = (x[:, :, None] for x in (q, k, v))  # a row is a batch row of one head
    weights = (w.mT[:, None] for w in (w0, w1, w2))
    o, state = lact_kernels.ttt(
        *tokens,
        *weights,
        *(lr0, lr1, lr2),
        plan,
        momentum=momentum,
        muon=lact_kernels.NewtonSchulz(NEWTON_SCHULZ),
        detach_norms=True,
        momentum_after_muon=True,
        return_state=True,
        backend=backend,
    )
    return o[:, :, 0], state


def _end_to_end(pieces: int, piece: int) -> int:
    return pieces * piece


_VIEWS = Function(
    Sizes(pieces=32, few_pieces=16, piece=1024, D=768, Dh=1536),
    lambda n, T: 2 * n * T,  # as many new views as were given
    lambda n, T: ([(0, n * T, True, False), (0, 2 * n * T, False, True)], MUON_STEPS),
    "fast_weight_swish_glu_weight_norm_mini_batch_apply",
    plain_family.mini_batch_apply,
    ("lact_nvs", "lact_ttt"),
    transposed=True,
)
_VIDEO = Function(
    Sizes(pieces=7, few_pieces=3, piece=4680, D=768, Dh=1536, rows=2),
    lambda n, T: (2 * n - 1) * T,  # noisy pieces, with a clean one before each but the first
    lambda n, T: (1.0, 1, T),  # w_scale, num_repeat, mini_batch_size
    "ar_fast_weight_swish_glu_weight_norm_mini_batch",
    plain_family.ar_mini_batch,
    ("lact_ar_video", "minVid.models.blocks.ar_lact_swa_repeat"),
    muon=False,
)
FUNCTIONS = {
    "views": _VIEWS,
    "rendering": dataclasses.replace(
        _VIEWS,
        tokens=_end_to_end,
        options=lambda n, T: ([(0, n * T, False, True)], MUON_STEPS),
        modes=("fwd",),
    ),
    "video": _VIDEO,
    "video-twice": dataclasses.replace(_VIDEO, options=lambda n, T: (1.0, 2, T)),
    "bidirectional": Function(
        Sizes(pieces=32, few_pieces=32, piece=1024, D=512, Dh=512, rows=4),
        _end_to_end,
        lambda n, T: (True,),
        "bidirectional_lact_swiglu",
        plain_family.bidirectional,
        "with Muon it is another function: it forgets the weights that it is given",
    ),
    "frames": dataclasses.replace(  # ZipMap's
        _VIEWS,
        sizes=Sizes(pieces=8, few_pieces=2, piece=1400, D=1024, Dh=2048),
        tokens=_end_to_end,
        options=lambda n, T: ([(i * T, i * T + T, True, True) for i in range(n)], MUON_STEPS),
    ),
    "windows": Function(  # LoGeR's
        Sizes(pieces=8, few_pieces=2, piece=4096, D=512, Dh=2048),
        _end_to_end,
        lambda n, T: (T,),
        "",
        plain_family.windows,
        "it is not in their repository",
        transposed=True,
        momentum=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """One call of a function of FUNCTIONS."""

    swept: ClassVar[str] = "pieces"

    op: str
    pieces: int
    piece: int
    rows: int
    D: int
    Dh: int

    @classmethod
    def of(cls, op: str, part: int, pieces: int | None = None) -> "FunctionCall":
        sizes = FUNCTIONS[op].sizes
        pieces = pieces or (sizes.pieces if part == 1 else sizes.few_pieces)
        widths = (sizes.piece // part, sizes.rows, sizes.D // part, sizes.Dh // part)
        return cls(op, pieces, *widths)

    @property
    def _function(self) -> Function:
        return FUNCTIONS[self.op]

    @property
    def modes(self) -> tuple[str, ...]:
        return self._function.modes

    @property
    def muon(self) -> bool:
        return self._function.muon

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.rows, self._function.tokens(self.pieces, self.piece), self.D

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Leaves in the order of the function: unit q and k, rates that change the weights visibly.

        Tokens are in `dtype`; fast weights, rates and momentum are float32.
        """
        generator = torch.Generator(device).manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        inputs = {}
        for name in ("w0", "w1", "w2"):
            into, out = (self.Dh, self.D) if name == "w1" else (self.D, self.Dh)
            w = normal(self.rows, into, out) / into**0.5
            inputs[name] = w if self._function.transposed else w.mT.contiguous()
        for name in ("q", "k", "v"):
            x = normal(*self.output_shape)
            inputs[name] = (x if name == "v" else F.normalize(x, dim=-1)).to(dtype)
        for name in ("lr0", "lr1", "lr2"):
            inputs[name] = 0.02 * normal(*self.output_shape[:2], 1).sigmoid()
        if self._function.momentum:
            inputs["momentum"] = normal(*self.output_shape[:2], 1).sigmoid()
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def call(self, function: Callable[..., Any], **inputs: Tensor) -> Tensor:
        """The outputs, without the weights that some functions return behind them."""
        result = function(*inputs.values(), *self._function.options(self.pieces, self.piece))
        return result if isinstance(result, Tensor) else result[0]

    def ours(self, backend: str) -> Callable[..., Any]:
        function = getattr(lact, self._function.name) if self._function.name else _windows
        return functools.partial(function, backend=backend)

    def plain(self, muon_dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
        return functools.partial(self._function.plain, muon_dtype=muon_dtype)

    def theirs(self, checkout: str | Path | None) -> Callable[..., Any]:
        if isinstance(self._function.theirs, str):
            raise Unavailable(self._function.theirs)
        return getattr(lact_script(checkout, *self._function.theirs), self._function.name)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of the minimal implementation's causal layer, with the sizes that it is published with."""

    swept: ClassVar[str] = "chunks"
    modes: ClassVar[tuple[str, ...]] = MODES
    muon: ClassVar[bool] = True
    name: ClassVar[str] = "CausalLaCTSwiGLUWithSlidingWindowAttn"

    op: str
    chunks: int
    chunk_size: int
    dim: int
    head_dim: int
    attn_head_dim: int

    @classmethod
    def of(cls, op: str, part: int, chunks: int | None = None) -> "LayerCall":
        attn_head_dim = 128 // part
        head_dim = 4 * attn_head_dim
        chunks = chunks or (3 if part == 1 else 2)
        return cls(op, chunks, 2048 // part, 4 * head_dim, head_dim, attn_head_dim)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return 1, self.chunks * self.chunk_size, self.dim

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Leaves, all float32: the tokens x and, by their names, the parameters of a new layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs = {"x": torch.randn(self.output_shape)}
            inputs |= self._layer(plain_family, "cpu").named_parameters()
        return {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}

    def call(self, function: Callable[..., Any], x: Tensor, **parameters: Tensor) -> Tensor:
        return function(parameters, (x,))

    def ours(self, backend: str) -> Callable[..., Any]:
        return functools.partial(functional_call, self._layer(lact, "meta", backend=backend))

    def plain(self, muon_dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
        return functools.partial(
            functional_call, self._layer(plain_family, "meta", muon_dtype=muon_dtype)
        )

    def theirs(self, checkout: str | Path | None) -> Callable[..., Any]:
        folder, module = "minimal_implementations", "causal_lact_with_sliding_window_attn"
        layer = self._layer(lact_script(checkout, folder, module), "meta")
        return functools.partial(functional_call, layer)

    def _layer(self, module: Any, device: str, **options: Any) -> torch.nn.Module:
        with torch.device(device):
            return getattr(module, self.name)(
                self.dim,
                self.head_dim,
                self.attn_head_dim,
                lact_chunk_size=self.chunk_size,
                window_size=self.chunk_size,
                **options,
            )


Call = FunctionCall | LayerCall
CASES: dict[str, type[FunctionCall] | type[LayerCall]] = {
    **dict.fromkeys(FUNCTIONS, FunctionCall),
    "layer": LayerCall,
}
