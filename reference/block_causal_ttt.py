"""Chunk-by-chunk training of a SwiGLU fast-weight network, one chunk after the other."""

import torch
from torch import Tensor

from reference.ttt import LACT_COEFFICIENTS, ttt


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

    steps = []
    for start in range(0, q.shape[1], chunk_size):
        chunk = [(start, min(start + chunk_size, q.shape[1]))]
        steps += [("apply", chunk), ("update", chunk)]
    # The update of the last chunk would change no output.
    coefficients = LACT_COEFFICIENTS if muon else None
    how = {"momentum": momentum, "coefficients": coefficients, "prenorm": prenorm}
    return ttt(q, k, v, w0, w1, w2, lr0, lr1, lr2, steps[:-1], **how)[0]
