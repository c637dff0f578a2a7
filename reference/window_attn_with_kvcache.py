"""Sliding-window attention over a cache of keys and values, one row and one key at a time."""

import torch
from torch import Tensor

from reference.window_attn import window_attn


def window_attn_with_kvcache(
    q: Tensor,  # [B, Tq, Hq, D]
    k_cache: Tensor,  # [B, S, Hkv, D]
    v_cache: Tensor,  # [B, S, Hkv, Dv]
    window_size: int | tuple[int, int] | None = None,
    *,
    cache_seqlens: Tensor | None = None,  # [B]
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last Tq tokens of each row, of which the cache holds those that have a slot.

    The token at position p is in slot `p % S`, until the token at position `p + S` takes its place.
    """
    S = k_cache.shape[1]
    lengths = [S] * len(q) if cache_seqlens is None else cache_seqlens.tolist()
    outputs = []
    for b, length in enumerate(lengths):
        slots = [p % S for p in range(max(0, length - S), length)]
        outputs.append(
            window_attn(
                q[b : b + 1],
                k_cache[b : b + 1, slots],
                v_cache[b : b + 1, slots],
                window_size,
                softmax_scale=softmax_scale,
                softcap=softcap,
                sinks=sinks,
                return_lse=True,
            )
        )
    o, lse = (torch.cat(x) for x in zip(*outputs))
    return (o, lse) if return_lse else o
