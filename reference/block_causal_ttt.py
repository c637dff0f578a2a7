"""Chunk-by-chunk training of a SwiGLU fast-weight network, one chunk after the other."""

import torch
from torch import Tensor

NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def block_causal_ttt(
    q: Tensor,  # [B, T, H, Dk]
    k: Tensor,  # [B, T, H, Dk]
    v: Tensor,  # [B, T, H, Dv]
    w0: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
    w1: Tensor,  # [H, Dv, Dh] or [B, H, Dv, Dh]
    w2: Tensor,  # [H, Dh, Dk] or [B, H, Dh, Dk]
    lr0: Tensor,  # [B, T, H]
    lr1: Tensor,  # [B, T, H]
    lr2: Tensor,  # [B, T, H]
    *,
    chunk_size: int = 2048,
    momentum: Tensor | None = None,  # [B, T, H]
    muon: bool = False,
    prenorm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Apply the fast weights to a chunk's queries, then update them with its keys and values.

    Products are computed in the dtype of `q`, weights and updates in theirs. Returns `[B, T, H, Dv]`.
    """
    options = {"chunk_size": chunk_size, "muon": muon, "prenorm": prenorm}
    if cu_seqlens is not None:
        N = len(cu_seqlens) - 1
        w0, w1, w2 = (w.expand(N, *w.shape[-3:]) for w in (w0, w1, w2))
        outputs = []
        for n, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist())):
            tokens = [x[:, start:stop] for x in (q, k, v)]
            weights = [w[n] for w in (w0, w1, w2)]
            rates = [x[:, start:stop] for x in (lr0, lr1, lr2)]
            beta = None if momentum is None else momentum[:, start:stop]
            outputs.append(block_causal_ttt(*tokens, *weights, *rates, momentum=beta, **options))
        return torch.cat(outputs, dim=1)

    w = [x.expand(q.shape[0], *x.shape[-3:]) for x in (w0, w1, w2)]
    target_norms = [x.norm(dim=-1, keepdim=True) for x in w]
    masters = list(w)
    buffers = [torch.zeros_like(x) for x in w]
    outputs = []
    for start in range(0, max(q.shape[1], 1), chunk_size):
        chunk = slice(start, min(start + chunk_size, q.shape[1]))
        outputs.append(_apply(q[:, chunk], *w))
        if chunk.stop == q.shape[1]:
            break  # the update of the last chunk would change no output
        steps = _gradients(
            k[:, chunk], v[:, chunk], *w, lr0[:, chunk], lr1[:, chunk], lr2[:, chunk]
        )
        if momentum is not None:
            beta = momentum[:, chunk].mean(dim=1)[:, :, None, None]
            buffers = steps = [g + beta * m for g, m in zip(steps, buffers)]
        if muon:
            steps = [newton_schulz(g) for g in steps]
        masters = [(m if prenorm else x) + step for m, x, step in zip(masters, w, steps)]
        w = [m / (m.norm(dim=-1, keepdim=True) + 1e-5) * n for m, n in zip(masters, target_norms)]
    return torch.cat(outputs, dim=1)


def _apply(q: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`w1 (silu(w0 q) * (w2 q))` for every token and head."""
    w0, w1, w2 = (w.to(q.dtype) for w in (w0, w1, w2))
    gate = torch.einsum("bhed,bthd->bthe", w0, q)
    up = torch.einsum("bhed,bthd->bthe", w2, q)
    return torch.einsum("bhve,bthe->bthv", w1, gate * gate.sigmoid() * up)


def _gradients(
    k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, lr0: Tensor, lr1: Tensor, lr2: Tensor
) -> list[Tensor]:
    """Gradients of `sum_t <f(k_t), v_t>`, each token's weighted by its learning rates."""
    dtype, weight_dtype = k.dtype, w0.dtype
    w0, w1, w2 = (w.to(dtype) for w in (w0, w1, w2))
    lr0, lr1, lr2 = (lr[..., None] for lr in (lr0, lr1, lr2))
    gate = torch.einsum("bhed,bthd->bthe", w0, k)
    up = torch.einsum("bhed,bthd->bthe", w2, k)
    sigmoid = gate.sigmoid()
    hidden = gate * sigmoid * up
    dhidden = torch.einsum("bhve,bthv->bthe", w1, v)
    dup = dhidden * gate * sigmoid
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    gradients = (
        torch.einsum("bthe,bthd->bhed", (lr0 * dgate).to(dtype), k),
        torch.einsum("bthv,bthe->bhve", (lr1 * v).to(dtype), hidden),
        torch.einsum("bthe,bthd->bhed", (lr2 * dup).to(dtype), k),
    )
    return [g.to(weight_dtype) for g in gradients]


def newton_schulz(g: Tensor) -> Tensor:
    """Muon's five-step orthogonalisation of each matrix in `[..., rows, columns]`."""
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    tall = g.shape[-2] > g.shape[-1]
    x = x.mT if tall else x
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
