"""LaCT layers of every option, small, and their oracle."""

import torch
from torch import Tensor

import reference
from lact_kernels import LaCTLayer

SMALL = dict(
    hidden_size=32,
    num_attn_heads=4,
    num_lact_heads=2,
    inter_multi=1.5,
    window_size=5,
    lact_chunk_size=8,
    rope_theta=100.0,
    layer_idx=0,
)
# What each case is there for is its name. All have the options of the paper's models unless they differ.
PAPER = dict(attn_qk_norm=False, learnable_ttt_scale=True, use_momentum=True, w0_w2_low_rank=4)
CASES = {
    "paper": PAPER,
    "paper-muon": PAPER | dict(use_muon=True),
    "defaults": {},
    "qk-norm-bias": PAPER | dict(attn_qk_norm=True, qkv_bias=True),
    "prenorm": PAPER | dict(ttt_prenorm=True),
    "prenorm-muon": dict(ttt_prenorm=True, use_muon=True),
    "nope": PAPER | dict(ttt_nope=True),
    "no-silu": PAPER | dict(qkv_silu=False),
    "no-v-silu": PAPER | dict(no_v_silu=True),
    "full-attention": PAPER | dict(window_size=None),
    "reduction": PAPER | dict(temporal_reduction=3, lact_chunk_size=3),
    "more-fast-heads": dict(num_attn_heads=2, num_lact_heads=4),
}
CAUSAL = tuple(CASES)  # what takes a cache
CASES |= {
    "two-sided": PAPER | dict(window_size=(3, 2)),
    "sees-all": dict(window_size=(-1, -1)),
}
ORACLE_OPTIONS = (
    "num_attn_heads",
    "num_lact_heads",
    "window_size",
    "lact_chunk_size",
    "qkv_silu",
    "no_v_silu",
    "use_muon",
    "ttt_prenorm",
    "ttt_nope",
    "rope_theta",
    "temporal_reduction",
)


def make_layer(case: str, dtype: torch.dtype = torch.float64, **options) -> LaCTLayer:
    """A layer with random values in every parameter, also in those that start at 0 or 1."""
    return randomised(LaCTLayer(**SMALL | CASES[case] | options, dtype=dtype))


def randomised(layer: LaCTLayer) -> LaCTLayer:
    """The layer, after changing what starts at 0 or 1."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("bias") or "norm" in name or name.startswith("qk_"):
                p.add_(0.3 * torch.randn_like(p))
        layer.lr_proj.bias.add_(5)  # rates of about 0.1: an update changes the outputs visibly
    return layer


def oracle(layer: LaCTLayer, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """`reference.lact_layer` of one sequence `[T, C]`."""
    options = {name: getattr(layer, name) for name in ORACLE_OPTIONS}
    parameters = dict(layer.named_parameters()) if parameters is None else parameters
    return reference.lact_layer(x, parameters, **options)


def gradients(layer: LaCTLayer, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of the input and all parameters."""
    names, parameters = zip(*layer.named_parameters())
    return dict(zip(("x", *names), torch.autograd.grad(y, [x, *parameters], dy)))
