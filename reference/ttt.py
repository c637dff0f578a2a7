"""Updates of a SwiGLU fast-weight network and applies, one after the other, in any order."""

import torch
from torch import Tensor

from reference.ttt_apply import ttt_apply

LACT_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def ttt(
    q: Tensor,  # [B, Tq, H, Dk]
    k: Tensor,  # [B, Tk, H, Dk]
    v: Tensor,  # [B, Tk, H, Dv]
    w0: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
    w1: Tensor,  # [H, Dv, Dh] or [B, H, Dv, Dh]
    w2: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
    lr0: Tensor | None,  # [B, Tk, H], or None: w0 is not trained
    lr1: Tensor | None,
    lr2: Tensor | None,
    steps: list[
        tuple[str, list[tuple[int, int]]]
    ],  # ("update" or "apply", ranges of keys or queries)
    *,
    momentum: Tensor | None = None,  # [B, Tk, H]
    coefficients: tuple[tuple[float, float, float], ...] | None = None,  # of Muon
    prenorm: bool = False,
    weight_norm: bool = True,
    detach_norms: bool = False,
    momentum_after_muon: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """What each apply gives, end to end, and then the weights, masters and momentum at the end.

    Products are computed in the dtype of `q`, weights and updates in theirs.
    """
    w = [x.expand(q.shape[0], *x.shape[-3:]) for x in (w0, w1, w2)]
    target_norms = [(x.detach() if detach_norms else x).norm(dim=-1, keepdim=True) for x in w]
    masters = list(w)
    buffers = [torch.zeros_like(x) for x in w]
    rates = (lr0, lr1, lr2)
    outputs = [ttt_apply(q[:, :0], *w)]  # for what has no apply at all
    for kind, ranges in steps:
        if kind == "apply":
            outputs += [ttt_apply(q[:, start:stop], *w) for start, stop in ranges]
            continue
        keys = torch.cat([torch.arange(start, stop, device=k.device) for start, stop in ranges])
        steps_of_keys = [None if lr is None else lr[:, keys] for lr in rates]
        gradients = _gradients(k[:, keys], v[:, keys], *w, steps_of_keys)
        beta = 0.0
        if momentum is not None:
            beta = momentum[:, keys].mean(dim=1)[:, :, None, None]
        for i, g in enumerate(gradients):
            if g is None:
                continue
            if momentum_after_muon:
                g = newton_schulz(g, coefficients)
            step = buffers[i] = g + beta * buffers[i]
            if coefficients is not None and not momentum_after_muon:
                step = newton_schulz(step, coefficients)
            masters[i] = (masters[i] if prenorm else w[i]) + step
            w[i] = masters[i]
            if weight_norm:
                w[i] = w[i] / (w[i].norm(dim=-1, keepdim=True) + 1e-5) * target_norms[i]
    return torch.cat(outputs, dim=1), w, masters, buffers


def _gradients(
    k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, rates: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `sum_t <f(k_t), v_t>`, each token's weighted by its learning rates."""
    dtype, weight_dtype = k.dtype, w0.dtype
    w0, w1, w2 = (w.to(dtype) for w in (w0, w1, w2))
    lr0, lr1, lr2 = (None if lr is None else lr[..., None] for lr in rates)
    gate = torch.einsum("bhed,bthd->bthe", w0, k)
    up = torch.einsum("bhed,bthd->bthe", w2, k)
    sigmoid = gate.sigmoid()
    hidden = gate * sigmoid * up
    dhidden = torch.einsum("bhve,bthv->bthe", w1, v)
    dup = dhidden * gate * sigmoid
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    gradients: list[Tensor | None] = [None, None, None]
    if lr0 is not None:
        gradients[0] = torch.einsum("bthe,bthd->bhed", (lr0 * dgate).to(dtype), k)
    if lr1 is not None:
        gradients[1] = torch.einsum("bthv,bthe->bhve", (lr1 * v).to(dtype), hidden)
    if lr2 is not None:
        gradients[2] = torch.einsum("bthe,bthd->bhed", (lr2 * dup).to(dtype), k)
    return [None if g is None else g.to(weight_dtype) for g in gradients]


def newton_schulz(
    g: Tensor, coefficients: tuple[tuple[float, float, float], ...] = LACT_COEFFICIENTS
) -> Tensor:
    """Muon's orthogonalisation of each matrix in `[..., rows, columns]`, a step for each triple."""
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    tall = g.shape[-2] > g.shape[-1]
    x = x.mT if tall else x
    for a, b, c in coefficients:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
