"""A LaCT model with this package, the same as one writes it without, and whether they compute the same."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from benchmarks.accuracy import COMPARISON_HEADER, compare_all, comparison_line
from lact_kernels.layers import LaCTCache, LaCTLayer, contexts
from lact_kernels.layers.mlp import SwiGLUMLP

OURS, DENSE = "lact_kernels", "dense + chunk loop"
LOW_RANK = 32
NORM_EPS = 1e-6
# Two updates: at each more of them, Muon amplifies rounding further.
GATE_LENGTH, GATE_WINDOW, GATE_CHUNK, GATE_PROMPT = 96, 32, 40, 70
GATE_LIMIT = 1e-8  # in float64, of each tensor's largest magnitude


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, without its length."""

    layers: int
    hidden_size: int
    heads: int
    fast_weight_heads: int
    window_size: int
    chunk_size: int
    muon: bool


class Block(nn.Module):
    """A LaCT layer and a SwiGLU MLP, each behind a norm and beside a residual.

    As in the package's model for transformers, names of parameters included, but without transformers.
    """

    def __init__(self, size: Size, layer_idx: int):
        super().__init__()
        C = size.hidden_size
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(C, NORM_EPS) for _ in range(2))
        self.attn = LaCTLayer(
            C,
            size.heads,
            size.fast_weight_heads,
            window_size=size.window_size,
            lact_chunk_size=size.chunk_size,
            use_muon=size.muon,
            use_momentum=True,
            learnable_ttt_scale=True,
            w0_w2_low_rank=LOW_RANK,
            layer_idx=layer_idx,
        )
        self.mlp = SwiGLUMLP(C)

    def forward(self, x: Tensor, cache: LaCTCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """From embeddings `[B, T, C]` to final hidden states, of the same shape."""

    def __init__(self, size: Size):
        super().__init__()
        self.layers = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden_size, NORM_EPS)

    def forward(self, x: Tensor, cache: LaCTCache | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return self.norm(x)


def dense_window_attn(q, k, v, window_size, *, cu_seqlens=None, backend="auto") -> Tensor:
    """PyTorch's attention under a mask of T x T, whatever the window."""
    mask = window_mask(q.shape[1], window_size, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def window_mask(T: int, window_size: int, device: torch.device) -> Tensor:
    mask = torch.ones(T, T, dtype=torch.bool, device=device)
    return mask.tril_().triu_(1 - window_size)


def chunk_loop(
    *inputs: Tensor, initial_state=None, return_state=False, backend="auto", **options
) -> Tensor:
    return reference.block_causal_ttt(*inputs, **options)


# What the LaCT layers of each variant call.
VARIANTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    OURS: {"window_attn": contexts.window_attn, "block_causal_ttt": contexts.block_causal_ttt},
    DENSE: {"window_attn": dense_window_attn, "block_causal_ttt": chunk_loop},
}


def computed_by(variant: str):
    """A context in which all LaCT layers are of this variant."""
    return mock.patch.multiple(contexts, **VARIANTS[variant])


def gate_passes(size: Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the variants, and a cache, compute the same with a short model of the same widths."""
    small = dataclasses.replace(
        size, layers=min(size.layers, 2), window_size=GATE_WINDOW, chunk_size=GATE_CHUNK
    )
    torch.manual_seed(0)
    model = Model(small).to(device, dtype)
    x, do = (torch.randn(1, GATE_LENGTH, size.hidden_size).to(device, dtype) for _ in range(2))
    wide = copy.deepcopy(model).double(), x.double(), do.double()
    try:
        exact, ours = (_results(name, *wide) for name in (DENSE, OURS))
        by_token = {"o": _token_by_token(*wide[:2])}
        actual, plain = (_results(name, model, x, do) for name in (OURS, DENSE))
    except Exception as error:  # whatever it raises, it is a failure to report, not to hide
        print(f"gate  CRASHED: {type(error).__name__}: {error}", flush=True)
        return False
    passed = [
        _same("outputs and gradients", ours, exact),
        _same("outputs token by token", by_token, exact),
        _as_accurate(*(_joined(results, exact) for results in (actual, plain, exact))),
    ]
    return all(passed)


def _results(variant: str, model: Model, x: Tensor, do: Tensor) -> dict[str, Tensor]:
    """The output "o", and the gradients of the parameters by their names."""
    names, parameters = zip(*model.named_parameters())
    with computed_by(variant):
        o = model(x)
        return {"o": o.detach()} | dict(zip(names, torch.autograd.grad(o, parameters, do)))


@torch.no_grad()
def _token_by_token(model: Model, x: Tensor) -> Tensor:
    """The output of a prompt, and of what follows one token at a time."""
    cache = LaCTCache()
    pieces = [x[:, :GATE_PROMPT], *x[:, GATE_PROMPT:].split(1, dim=1)]
    return torch.cat([model(piece, cache) for piece in pieces], dim=1)


def _same(what: str, actual: dict[str, Tensor], exact: dict[str, Tensor]) -> bool:
    """Whether all of `actual` are as near as float64 lets expect; print how near."""
    errors = {}
    for name, x in actual.items():
        largest = exact[name].abs().max().item()
        errors[name] = (x - exact[name]).abs().max().item() / (largest or 1.0)
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    ok = errors[worst] <= GATE_LIMIT  # False for NaN
    _print_verdict("float64", what, ok, f", worst {worst} at {errors[worst]:.1e}")
    return ok


def _as_accurate(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> bool:
    """Whether ours is as accurate in the dtype of the run as the dense variant is, within the rule."""
    comparisons = compare_all(actual, plain, exact)
    ok = all(comparison.ok for comparison in comparisons.values())
    _print_verdict(str(actual["o"].dtype).removeprefix("torch."), "outputs and gradients", ok)
    if not ok:
        print(COMPARISON_HEADER)
        for name, comparison in comparisons.items():
            print(comparison_line(name, comparison), flush=True)
    return ok


def _joined(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and all gradients as one tensor, each divided by its own exact root mean square.

    A single gradient may have so few elements that the rms of its error is a matter of luck.
    """
    gradients = []
    for name, x in results.items():
        rms = exact[name].square().mean().sqrt()
        if name != "o" and rms > 0:
            gradients.append((x / rms.to(x.dtype)).flatten())
    return {"o": results["o"], "gradients": torch.cat(gradients)}


def _print_verdict(dtype: str, what: str, ok: bool, details: str = "") -> None:
    print(f"gate  {dtype:<8} {what:<23} {'ok' if ok else 'FAILED'}{details}", flush=True)
