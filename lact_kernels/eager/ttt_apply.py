"""`ttt_apply` in plain PyTorch, on any device: the products are those of `swiglu`."""

import torch
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.eager import swiglu


def ttt_apply_fwd(q: Tensor, weights: Triple) -> Tensor:
    """f(q), `[B, T, H, Dv]`, for weights `[B or 1, H, ...]`; with 1 all rows share them."""
    rows, borders = _rows(q, weights)
    o = q.new_empty(*rows.shape[:3], weights[1].shape[-2])
    swiglu.apply(rows, borders, tuple(w[None] for w in weights), out=o)
    return o.view(*q.shape[:3], o.shape[-1])


def ttt_apply_bwd(do: Tensor, q: Tensor, weights: Triple) -> tuple[Tensor, Triple]:
    """Gradients of q and the weights, which are summed over the rows that share them."""
    (rows, borders), (drows, _) = _rows(q, weights), _rows(do, weights)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(rows.shape)
    stacks = tuple(w[None].to(wide) for w in weights)
    dweights = swiglu.apply_bwd(drows, rows, borders, stacks, out=dq)
    return dq.view(q.shape), tuple(dw[0].to(w.dtype) for dw, w in zip(dweights, weights))


def _rows(x: Tensor, weights: Triple) -> tuple[Tensor, list[int]]:
    """The tokens `[B, T, H, D]`, those that share weights in one row, and the borders of a row."""
    if len(weights[0]) != len(x):
        x = x.flatten(0, 1)[None]
    return x, [0, x.shape[1]]
