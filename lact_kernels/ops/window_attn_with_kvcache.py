"""`window_attn_with_kvcache`: sliding-window attention of new tokens over a cache, for generation."""

from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.autograd.window_attn_with_kvcache import window_attn_with_kvcache as op
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import cast_inputs
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, choose_backend, inner_sinks

NAMES = ("k_cache", "v_cache")


@overload
def window_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, window_size: int | tuple[int, int] | None = None, *,
    cache_seqlens: Tensor | int | None = None, softmax_scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, backend: Backend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def window_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, window_size: int | tuple[int, int] | None = None, *,
    cache_seqlens: Tensor | int | None = None, softmax_scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, backend: Backend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def window_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, window_size: int | tuple[int, int] | None = None, *,
    cache_seqlens: Tensor | int | None = None, softmax_scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def window_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_size: int | tuple[int, int] | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`window_attn` of the last tokens of each row, whose keys and values are in a cache already.

    The token at position p has the slot `p % S` of a cache of S slots. With at most S tokens this is a
    cache as one writes it from the front; with more it is a ring buffer (`RingKVCache`). Only the
    slots that the window covers are read, whatever has been read or written before: one query costs
    O(window), at any position.

    Args:
        q: queries `[B, Tq, Hq, D]` of the last Tq tokens of each row; float16, bfloat16, float32, or
            float64 (eager backend only). A handful of queries is what this function is made for; any
            number works.
        k_cache: keys `[B, S, Hkv, D]`, those of the Tq tokens included. `Hkv` divides `Hq`. Read in
            place with any strides, as long as the last one is 1.
        v_cache: values `[B, S, Hkv, Dv]`.
        window_size: as in `window_attn`. A query sees only tokens that its row has had, so the right side
            of a pair counts for the first of several queries and not for the last one.
        cache_seqlens: how many tokens each row has had so far, the Tq of q included: int32 `[B]`, or an
            int for all rows, or that in a tensor `[]`; S by default. Rows may differ. A query whose window
            ends before the first token of its row has the output 0, and as lse its sink, or -inf.
        softmax_scale: factor on the scores, `D ** -0.5` by default.
        softcap: as in `window_attn`.
        sinks: as in `window_attn`.
        return_lse: also return the log-sum-exp of the logits of each query: its scores, and the sink.
        backend: as in `window_attn`.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_lse` also lse `[B, Hq, Tq]`,
        float32 (float64 for float64 inputs). There is no backward. Statistics and accumulation are in
        float32. Under `torch.autocast` q and the cache are cast to its dtype.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value; an input that needs a gradient; or a row that has had
            more than S tokens where `S < left + Tq`, with `left` the left side of the window, which is
            `window_size - 1` of a number: its window is no longer in the cache.
            Values of `cache_seqlens` on a GPU are not checked, nor does the Triton backend read them on
            the host, so that nothing waits and CUDA graphs can be recorded: such a row gives NaN there.

    Source: the sliding-window branch of the LaCT layer, arXiv 2505.23884, section 3.3.
    """
    options = check_attention(
        q, k_cache, v_cache, window_size, softmax_scale, softcap, sinks, NAMES
    )
    checks.check_flag("return_lse", return_lse)
    check_no_gradient(q, k_cache, v_cache, sinks)
    if cache_seqlens is not None:
        cache_seqlens = checks.check_cache_seqlens(cache_seqlens, q.shape[0], q.device)
        _check_slots(cache_seqlens, q.shape[1], k_cache.shape[1], options.left)
    o, lse = run_window_attn_with_kvcache(
        q, k_cache, v_cache, options, sinks, cache_seqlens, backend
    )
    return (o, lse) if return_lse else o


def run_window_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`window_attn_with_kvcache` of checked arguments; outputs and lse."""
    backend = choose_backend(backend, q, v_cache, options.softcap)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)
    q, k_cache, v_cache = cast_inputs(q, k_cache, v_cache)
    return op(q, k_cache, v_cache, cache_seqlens, *options, inner_sinks(q, sinks), backend)


def check_no_gradient(q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks}
    checks.check_no_gradient("window_attn_with_kvcache", "window_attn", **tensors)


def _check_slots(cache_seqlens: Tensor | int, Tq: int, S: int, left: int | None) -> None:
    """A row of more tokens than slots still has its window, as far as that is known without waiting."""
    for seqlen in checks.known_seqlens(cache_seqlens):
        if seqlen > S and (left is None or S < left + Tq):
            ring = "" if left is None else f", and than the {left + Tq} that the window needs"
            raise ValueError(f"cache_seqlens is {seqlen}, but the cache has fewer slots{ring}: {S}")
