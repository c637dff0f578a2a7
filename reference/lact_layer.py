"""The LaCT layer on one sequence, as plainly as it can be written."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.block_causal_ttt import block_causal_ttt
from reference.window_attn import window_attn

BASE_LR = 0.001
EPS = 1e-5  # of the RMS norms, and beside the L2 norms


def lact_layer(
    hidden_states: Tensor,  # [T, C]
    parameters: dict[str, Tensor],  # by their names in the layer's state dict
    *,
    num_attn_heads: int,
    num_lact_heads: int,
    window_size: int | None,
    lact_chunk_size: int,
    qkv_silu: bool = True,
    no_v_silu: bool = False,
    use_muon: bool = False,
    ttt_prenorm: bool = False,
    ttt_nope: bool = False,
    rope_theta: float = 500000.0,
    temporal_reduction: int = 1,
) -> Tensor:
    """Windowed attention plus a fast-weight network over one projection. Returns `[T, C]`.

    Query norms, low-rank fast weights, momentum, the output scale and biases are on where `parameters`
    has them. Everything is computed in the dtype of `hidden_states`.
    """
    p = parameters
    T = len(hidden_states)
    r = temporal_reduction
    if T == 0:
        return hidden_states
    if r > 1:
        x = F.pad(hidden_states, (0, 0, 0, -T % r)).unflatten(0, (-1, r))  # [T / r, r, C]
        kernel = p["temporal_conv.weight"][:, 0].T  # [r, C]
        hidden_states = (x * kernel).sum(1) + p["temporal_conv.bias"]

    x = hidden_states
    q, k, v = F.linear(x, p["qkv.weight"], p.get("qkv.bias")).chunk(3, dim=-1)
    if "q_norm.weight" in p:
        q, k = _rms_norm(q, p["q_norm.weight"]), _rms_norm(k, p["k_norm.weight"])

    def rope(x):
        return _rope(x.unflatten(-1, (num_attn_heads, -1)), rope_theta).flatten(-2)

    attention = window_attn(
        *(x.unflatten(-1, (num_attn_heads, -1))[None] for x in (rope(q), rope(k), v)), window_size
    )

    fast = [
        q * p["qk_scale"][:, 0] + p["qk_offset"][:, 0],
        k * p["qk_scale"][:, 1] + p["qk_offset"][:, 1],
        v,
    ]
    if qkv_silu:
        fast = [F.silu(fast[0]), F.silu(fast[1]), v if no_v_silu else F.silu(v)]
    fast_q, fast_k, fast_v = (x.unflatten(-1, (num_lact_heads, -1)) for x in fast)
    fast_q, fast_k = (x / (x.norm(dim=-1, keepdim=True) + EPS) for x in (fast_q, fast_k))
    if not ttt_nope:
        fast_q, fast_k = (rope(x.flatten(-2)).view_as(x) for x in (fast_q, fast_k))

    rates = F.linear(x, p["lr_proj.weight"], p["lr_proj.bias"])
    rates = F.softplus(rates + math.log(math.expm1(BASE_LR))).unflatten(-1, (num_lact_heads, 3))
    momentum = None
    if "momentum_proj.0.weight" in p:
        momentum = F.linear(x, p["momentum_proj.0.weight"], p["momentum_proj.0.bias"])
        momentum = momentum.sigmoid()[None]
    ttt = block_causal_ttt(
        *(x[None] for x in (fast_q, fast_k, fast_v)),
        _fast_weight("w0", p),
        p["w1"],
        _fast_weight("w2", p),
        *(lr[None] for lr in rates.unbind(-1)),
        chunk_size=lact_chunk_size,
        momentum=momentum,
        muon=use_muon,
        prenorm=ttt_prenorm,
    )

    ttt = _rms_norm(ttt[0], p["ttt_norm.weight"])
    if "ttt_scale_proj.weight" in p:
        scale = F.silu(F.linear(x, p["ttt_scale_proj.weight"], p["ttt_scale_proj.bias"]))
        ttt = ttt * scale[..., None]
    o = F.linear(attention[0].flatten(-2) + ttt.flatten(-2), p["o_proj.weight"])
    return o.repeat_interleave(r, dim=0)[:T]


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def _rope(x: Tensor, theta: float) -> Tensor:
    """Rotate channels i and i + D/2 of token t by the angle t theta^(-2i/D); x is `[T, H, D]`."""
    T, _, D = x.shape
    angle = torch.outer(
        torch.arange(T, dtype=torch.float64, device=x.device),
        theta ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D),
    )[:, None]  # [T, 1, D / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _fast_weight(name: str, p: dict[str, Tensor]) -> Tensor:
    """`[H, Dh, D]`, which is `w_left w_right + I / 2` with low rank."""
    if name in p:
        return p[name]
    w = p[f"{name}.w_left"] @ p[f"{name}.w_right"]
    return w + torch.eye(*w.shape[1:], dtype=w.dtype, device=w.device) / 2
