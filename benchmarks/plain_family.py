"""Fast-weight functions and layers of LaCT's family (views, video, robots), in plain PyTorch.

They take the place of the authors' in tests and benchmarks, so that their packages are not needed. Layouts,
defaults, attributes and names of parameters are theirs. Batch and heads are one axis, `b*h`: tokens
`[b*h, l, D]`, rates `[b*h, l, 1]`. Newton-Schulz is iterated in `muon_dtype`: bfloat16 as published.

`bidirectional` computes what the published function means: with Muon that one adds the gradient to its
orthogonalised self, and forgets the weights.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_ttt import plain_apply, plain_gradients, plain_newton_schulz
from benchmarks.registry import NEWTON_SCHULZ
from reference.ttt import LACT_COEFFICIENTS

MUON = NEWTON_SCHULZ[0]  # of every step, but for those of Muon with LaCT's five triples

Weights = Sequence[Tensor]  # w0, w2 [b*h, Dk, Dh], w1 [b*h, Dh, Dv]
Coefficients = Sequence[tuple[float, float, float]]


class TTTOperator(NamedTuple):
    start: int
    end: int
    update: bool
    apply: bool


def mini_batch_apply(
    w0: Tensor,  # [b*h, Dk, Dh]
    w1: Tensor,  # [b*h, Dh, Dv]
    w2: Tensor,  # [b*h, Dk, Dh]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    order: Iterable[tuple[int, int, bool, bool]],
    muon_update_steps: int = 0,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each `(start, end, update, apply)` of the order a step on these keys, then these queries.

    An end of -1 is the end of the tokens. Target norms are detached. Without a step of Muon a gradient is
    divided by its Frobenius norm.
    """
    weights, norms = [w0, w1, w2], _norms([w0.detach(), w1.detach(), w2.detach()])
    outputs = [v[:, :0]]
    for start, end, update, apply in order:
        piece = slice(start, None if end == -1 else end)
        if update:
            rates = [lr[:, piece] for lr in (lr0, lr1, lr2)]
            gradients = plain_gradients(k[:, piece], v[:, piece], weights, rates)
            steps = _muon(gradients, [MUON] * muon_update_steps, muon_dtype)
            weights = _updated(weights, steps, norms)
        if apply:
            outputs.append(_apply(q[:, piece], weights))
    return torch.cat(outputs, dim=1), *weights


def bidirectional(
    w0: Tensor,  # [b*h, Dh, Dk]
    w1: Tensor,  # [b*h, Dv, Dh]
    w2: Tensor,  # [b*h, Dh, Dk]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    use_muon: bool = True,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One step on all keys, with five triples if with Muon, then all queries."""
    weights = [w.mT for w in (w0, w1, w2)]
    steps = plain_gradients(k, v, weights, (lr0, lr1, lr2))
    steps = _muon(steps, LACT_COEFFICIENTS, muon_dtype) if use_muon else steps
    return _apply(q, _updated(weights, steps, _norms(weights)))


def ar_mini_batch(
    w0: Tensor,  # [b*h, Dh, Dk]
    w1: Tensor,  # [b*h, Dv, Dh]
    w2: Tensor,  # [b*h, Dh, Dk]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    w_scale: float,
    num_repeat: int = 1,
    mini_batch_size: int = -1,
    update_length: int = -1,
    update_every: int = -1,
    use_moun: bool = False,
    num_moun_iters: int = 3,
    weight_norm: bool = True,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pieces of video: a step on the clean tokens of a piece, then all of its tokens, clean and noisy.

    The noisy tokens of the first piece are read with the initial weights. Steps go on over `num_repeat`
    passes, of which the last gives the outputs. Where nothing is applied, outputs are zero.
    """
    update_length = k.shape[1] if update_length == -1 else update_length
    mini_batch_size = update_length if mini_batch_size == -1 else mini_batch_size
    update_every = 2 * mini_batch_size if update_every == -1 else update_every
    first = update_every - mini_batch_size

    weights = [w.mT for w in (w0, w1, w2)]
    norms = _norms(weights) if weight_norm else None
    coefficients = [MUON] * num_moun_iters if use_moun else None
    o = v.new_zeros(*q.shape[:2], v.shape[2])
    o[:, :first] = _apply(q[:, :first], weights)
    for _ in range(num_repeat):
        for start in range(first, update_length, update_every):
            keys = slice(start, start + mini_batch_size)
            rates = [lr[:, keys] * w_scale for lr in (lr0, lr1, lr2)]
            steps = plain_gradients(k[:, keys], v[:, keys], weights, rates)
            steps = steps if coefficients is None else _muon(steps, coefficients, muon_dtype)
            weights = _updated(weights, steps, norms)
            queries = slice(start, start + update_every)
            o[:, queries] = _apply(q[:, queries], weights)
    return o, *(w.mT for w in weights)


def ar_mini_batch_inference(
    w0: Tensor,  # [b*h, Dh, Dk]
    w1: Tensor,  # [b*h, Dv, Dh]
    w2: Tensor,  # [b*h, Dh, Dk]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    w_scale: float,
    num_repeat: int = 1,
    mini_batch_size: int = -1,
    do_update: bool = False,
    use_moun: bool = False,
    num_moun_iters: int = 3,
    weight_norm: bool = True,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_repeat` steps on the first keys, if any are wanted, then all queries."""
    weights = [w.mT for w in (w0, w1, w2)]
    norms = _norms(weights) if weight_norm else None
    keys = slice(0, None if mini_batch_size == -1 else mini_batch_size)
    for _ in range(num_repeat if do_update else 0):
        rates = [lr[:, keys] * w_scale for lr in (lr0, lr1, lr2)]
        steps = plain_gradients(k[:, keys], v[:, keys], weights, rates)
        steps = _muon(steps, [MUON] * num_moun_iters, muon_dtype) if use_moun else steps
        weights = _updated(weights, steps, norms)
    return _apply(q, weights), *(w.mT for w in weights)


def block_causal(
    w0: Tensor,  # [b*h, Dh, Dk]
    w1: Tensor,  # [b*h, Dv, Dh]
    w2: Tensor,  # [b*h, Dh, Dk]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    momentum: Tensor | None = None,  # [b*h, l, 1]
    use_muon: bool = True,
    chunk_size: int = 2048,
    *,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Chunk by chunk: its queries, then a step on its keys, as in the minimal implementation."""
    weights = [w.mT for w in (w0, w1, w2)]
    norms, buffers = _norms(weights), [torch.zeros_like(w) for w in weights]
    outputs = [v[:, :0]]
    for chunk in (slice(i, i + chunk_size) for i in range(0, k.shape[1], chunk_size)):
        outputs.append(_apply(q[:, chunk], weights))
        if chunk.stop >= k.shape[1]:
            break
        rates = [lr[:, chunk] for lr in (lr0, lr1, lr2)]
        steps = plain_gradients(k[:, chunk], v[:, chunk], weights, rates)
        if momentum is not None:
            beta = momentum[:, chunk].mean(dim=1, keepdim=True)
            steps = buffers = [g + beta * m for g, m in zip(steps, buffers)]
        steps = _muon(steps, LACT_COEFFICIENTS, muon_dtype) if use_muon else steps
        weights = _updated(weights, steps, norms)
    return torch.cat(outputs, dim=1)


def windows(
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
    muon_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """LoGeR's: the queries of a window, then a step on its keys, with momentum behind Newton-Schulz.

    Target norms are detached. Returns the outputs, the weights and the momentum.
    """
    weights, buffers = [w0, w1, w2], [torch.zeros_like(w) for w in (w0, w1, w2)]
    norms = _norms([w0.detach(), w1.detach(), w2.detach()])
    outputs = []
    for piece in (slice(i, i + window) for i in range(0, k.shape[1], window)):
        outputs.append(_apply(q[:, piece], weights))
        rates = [lr[:, piece] for lr in (lr0, lr1, lr2)]
        gradients = plain_gradients(k[:, piece], v[:, piece], weights, rates)
        beta = momentum[:, piece].mean(dim=1, keepdim=True)
        steps = _muon(gradients, NEWTON_SCHULZ, muon_dtype)
        buffers = [step + beta * m for step, m in zip(steps, buffers)]
        weights = _updated(weights, buffers, norms)
    return torch.cat(outputs, dim=1), weights, buffers


def _apply(q: Tensor, weights: Weights) -> Tensor:
    return plain_apply(q, *(w.to(q.dtype) for w in weights))


def _norms(weights: Weights) -> list[Tensor]:
    return [w.norm(dim=1, keepdim=True) for w in weights]


def _muon(gradients: Weights, coefficients: Coefficients, dtype: torch.dtype) -> list[Tensor]:
    with torch.autocast(gradients[0].device.type, enabled=False):  # which would choose the dtype
        return [plain_newton_schulz(g, coefficients, dtype) for g in gradients]


def _updated(weights: Weights, steps: Weights, norms: Weights | None) -> list[Tensor]:
    new = [w + step.to(w.dtype) for w, step in zip(weights, steps)]
    if norms is None:
        return new
    return [w / (w.norm(dim=1, keepdim=True) + 1e-5) * n for w, n in zip(new, norms)]


class FastWeightGluMLPMultihead(nn.Module):
    """The layer of models of views and 3D. LaCT's own, `use_gate_fn` None, has no such attribute."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inter_multi: float = 1,
        bias: bool = False,
        base_lr: float = 0.01,
        muon_update_steps: int = 0,
        use_gate_fn: bool | None = None,
        *,
        muon_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.dim = dim
        self.num_heads = self.lr_dim = dim // head_dim
        self.muon_update_steps, self.muon_dtype = muon_update_steps, muon_dtype
        D, Dh = head_dim, int(head_dim * inter_multi)
        for name, rows, columns in (("w0", D, Dh), ("w1", Dh, D), ("w2", D, Dh)):
            w = torch.randn(self.num_heads, rows, columns) * (2 / rows) ** 0.5
            setattr(self, name, nn.Parameter(w))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)
        self.lr_fc = nn.Linear(dim, 3 * self.lr_dim)
        self.base_lr_inv = _inv_softplus(base_lr)
        if use_gate_fn is not None:
            self.use_gate_fn = use_gate_fn
        if use_gate_fn:
            self.gate_fn = nn.Sequential(nn.Linear(dim, dim, bias=bias), nn.SiLU())
        self.o_norm = nn.RMSNorm(head_dim, eps=1e-5)

    def forward(self, x: Tensor, info: dict[str, Any], *args) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = _split(F.silu(self.to_qkv(x)), self.num_heads)
        q, k = (y / (y.norm(dim=2, keepdim=True) + 1e-5).to(x.dtype) for y in (q, k))
        with torch.autocast(x.device.type, enabled=False):
            rates = F.softplus(self.lr_fc(_wide(x)) + self.base_lr_inv)
        weights = [
            info[name] if "w0" in info else getattr(self, name).repeat(len(x), 1, 1)
            for name in ("w0", "w1", "w2")
        ]
        o, w0, w1, w2 = mini_batch_apply(
            *weights,
            *(q, k, v),
            *_split(rates, self.num_heads),
            info["ttt_op_order"],
            self.muon_update_steps,
            muon_dtype=self.muon_dtype,
        )
        o = _join(self.o_norm(o), self.num_heads)
        if hasattr(self, "gate_fn"):
            o = o * self.gate_fn(x)
        return self.c_proj(o), {"w0": w0, "w1": w1, "w2": w2}


class BidirectionalLaCTSwiGLU(nn.Module):
    """The minimal implementation's layer for sets: every token sees every other."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inter_multi: float = 1,
        use_o_norm: bool = True,
        qk_l2_norm: bool = True,
        use_muon: bool = True,
        base_lr: float = 1e-2,
        *,
        muon_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.dim, self.head_dim, self.inter_multi = dim, head_dim, inter_multi
        self.use_o_norm, self.qk_l2_norm, self.use_muon = use_o_norm, qk_l2_norm, use_muon
        self.muon_dtype = muon_dtype
        self.num_heads = dim // head_dim
        _make_projections(self, self.num_heads, base_lr)
        _make_weights(self, self.num_heads, head_dim, int(head_dim * inter_multi))
        self.o_norm = nn.RMSNorm(head_dim, eps=1e-5) if use_o_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _split(F.silu(self.to_qkv(x)), self.num_heads)
        if self.qk_l2_norm:
            q, k = _l2_norm(q), _l2_norm(k)
        weights = [w.repeat(len(x), 1, 1) for w in (self.w0, self.w1, self.w2)]
        o = bidirectional(
            *weights,
            *(q, k, v),
            *_rates(self, x, self.num_heads),
            self.use_muon,
            muon_dtype=self.muon_dtype,
        )
        return self.o_proj(_join(self.o_norm(o), self.num_heads))


class CausalLaCTSwiGLUWithSlidingWindowAttn(nn.Module):
    """The minimal implementation's layer for sequences, with attention by `scaled_dot_product_attention`."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        attn_head_dim: int,
        lact_chunk_size: int = 2048,
        window_size: int | None = 2048,
        inter_multi: float = 1,
        use_o_norm: bool = True,
        use_momentum: bool = True,
        use_muon: bool = True,
        base_lr: float = 1e-2,
        ttt_scale_before_sum: bool = True,
        *,
        muon_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.dim, self.head_dim, self.attn_head_dim = dim, head_dim, attn_head_dim
        self.inter_multi, self.lact_chunk_size = inter_multi, lact_chunk_size
        self.window_size, self.muon_dtype = window_size, muon_dtype
        self.use_o_norm, self.use_momentum, self.use_muon = use_o_norm, use_momentum, use_muon
        self.num_ttt_heads, self.num_attn_heads = dim // head_dim, dim // attn_head_dim
        _make_projections(self, self.num_ttt_heads, base_lr)
        _make_weights(self, self.num_ttt_heads, head_dim, int(head_dim * inter_multi))
        if use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(dim, self.num_ttt_heads), nn.Sigmoid())
        self.o_norm = nn.RMSNorm(head_dim, eps=1e-5) if use_o_norm else nn.Identity()
        self.qk_scale = nn.Parameter(torch.ones(dim, 2))
        self.qk_offset = nn.Parameter(torch.zeros(dim, 2))
        if ttt_scale_before_sum:
            self.ttt_scale_proj = nn.Linear(dim, self.num_ttt_heads)

    def forward(self, x: Tensor) -> Tensor:
        qkv, H = self.to_qkv(x), self.num_ttt_heads
        q, k, v = _split(F.silu(qkv), H)
        momentum = _split_heads(self.momentum_proj(x), H) if self.use_momentum else None
        weights = [w.repeat(len(x), 1, 1) for w in (self.w0, self.w1, self.w2)]
        o = block_causal(
            *weights,
            *(_l2_norm(q), _l2_norm(k), v),
            *_rates(self, x, H),
            momentum,
            self.use_muon,
            self.lact_chunk_size,
            muon_dtype=self.muon_dtype,
        )
        o = self.o_norm(o)
        if hasattr(self, "ttt_scale_proj"):
            o = o * _split_heads(F.silu(self.ttt_scale_proj(x)), H)
        return self.o_proj(self._attention(qkv) + _join(o, H))

    def _attention(self, qkv: Tensor) -> Tensor:
        """Each token sees itself and the `window_size - 1` before it; None: all before it."""
        q, k, v = qkv.chunk(3, dim=-1)
        q = (q * self.qk_scale[:, 0] + self.qk_offset[:, 0]).to(v.dtype)
        k = (k * self.qk_scale[:, 1] + self.qk_offset[:, 1]).to(v.dtype)
        T = qkv.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
        if self.window_size is not None:
            seen = seen.triu(1 - self.window_size)
        q, k, v = (_split_heads(y, self.num_attn_heads) for y in (q, k, v))
        return _join(F.scaled_dot_product_attention(q, k, v, seen), self.num_attn_heads)


def _make_weights(layer: nn.Module, H: int, D: int, Dh: int) -> None:
    """Initial fast weights w0, w2 `[H, Dh, D]` and w1 `[H, D, Dh]`."""
    for name, rows, columns in (("w0", Dh, D), ("w1", D, Dh), ("w2", Dh, D)):
        setattr(layer, name, nn.Parameter(torch.randn(H, rows, columns) * columns**-0.5))


def _make_projections(layer: nn.Module, H: int, base_lr: float) -> None:
    """What the two layers of the minimal implementations have in common."""
    layer.to_qkv = nn.Linear(layer.dim, 3 * layer.dim, bias=False)
    layer.o_proj = nn.Linear(layer.dim, layer.dim, bias=False)
    layer.lr_dim, layer.base_lr, layer.base_lr_inv = 1, base_lr, _inv_softplus(base_lr)
    layer.lr_proj = nn.Linear(layer.dim, 3 * H, bias=False)


def _rates(layer: nn.Module, x: Tensor, H: int) -> tuple[Tensor, ...]:
    """Three times `[b*h, l, 1]`: the three rates of a head lie side by side."""
    with torch.autocast(x.device.type, enabled=False):
        rates = layer.lr_proj(x)
    rates = F.softplus(_wide(rates) + layer.base_lr_inv)
    return _split(rates.unflatten(2, (H, 3)).mT.flatten(2), H)


def _split(x: Tensor, H: int) -> tuple[Tensor, ...]:
    """`[b, l, 3 h d]` as three times `[b*h, l, d]`."""
    return tuple(_split_heads(y, H) for y in x.chunk(3, dim=2))


def _split_heads(x: Tensor, H: int) -> Tensor:
    return x.unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1)


def _join(x: Tensor, H: int) -> Tensor:
    """`[b*h, l, d]` as `[b, l, h d]`."""
    return x.unflatten(0, (-1, H)).transpose(1, 2).flatten(2)


def _l2_norm(x: Tensor) -> Tensor:
    return (x / (x.norm(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inv_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))
