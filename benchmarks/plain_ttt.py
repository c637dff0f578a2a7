"""`ttt` and `ttt_apply` as users write them: a loop in plain PyTorch, to be compiled or not.

The layout is that of LaCT's code for views: tokens `[b, T, D]` and rates `[b, T, 1]`, an entry for each row
and head, multiply the weights w0, w2 `[b, Dk, Dh]` and w1 `[b, Dh, Dv]` from the left. Dtypes are as there:
products take that of the tokens, weights stay float32, and Newton-Schulz runs in bfloat16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Steps

MUON_DTYPE = torch.bfloat16  # of Newton-Schulz


def plain_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr0: Tensor | None = None,
    lr1: Tensor | None = None,
    lr2: Tensor | None = None,
    *,
    steps: Steps,
    coefficients: tuple[tuple[float, float, float], ...] | None,
    detach_norms: bool,
) -> Tensor:
    """The outputs `[b, T, Dv]` of every apply, end to end. Weights without rates are not trained."""
    weights, rates = [w0, w1, w2], (lr0, lr1, lr2)
    norms = [(w.detach() if detach_norms else w).norm(dim=1, keepdim=True) for w in weights]
    outputs = []
    for kind, start, stop in steps:
        if kind == "apply":
            outputs.append(plain_apply(q[:, start:stop], *(w.to(q.dtype) for w in weights)))
            continue
        piece = [None if lr is None else lr[:, start:stop] for lr in rates]
        gradients = plain_gradients(k[:, start:stop], v[:, start:stop], weights, piece)
        for i, g in enumerate(gradients):
            if g is None:
                continue
            if coefficients is not None:
                g = plain_newton_schulz(g, coefficients, MUON_DTYPE)
            w = weights[i] + g
            weights[i] = w / (w.norm(dim=1, keepdim=True) + 1e-5) * norms[i]
    return torch.cat(outputs, dim=1)


def plain_apply(q: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`[b, T, Dv]`, of weights in the dtype of q."""
    return (F.silu(q @ w0) * (q @ w2)) @ w1


def plain_gradients(
    k: Tensor, v: Tensor, weights: Sequence[Tensor], rates: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of the weights, in their layout and in the dtype of k: None where there is no rate."""
    w0, w1, w2 = (w.to(k.dtype) for w in weights)
    gate, up = k @ w0, k @ w2
    sigmoid = gate.sigmoid()
    dhidden = v @ w1.mT
    factors = (
        (k, dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))),
        (gate * sigmoid * up, v),
        (k, dhidden * gate * sigmoid),
    )
    return [
        None if lr is None else (x * lr).to(k.dtype).mT @ y for lr, (x, y) in zip(rates, factors)
    ]


def plain_newton_schulz(
    g: Tensor, coefficients: Sequence[tuple[float, float, float]], dtype: torch.dtype
) -> Tensor:
    """The step `[b, rows, columns]` of a gradient. It is iterated, and returned, in `dtype`."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.to(dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
