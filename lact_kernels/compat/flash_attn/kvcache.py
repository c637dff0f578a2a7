"""flash-attn's function for generation, over a cache of keys and values."""

from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.compat.flash_attn import arguments
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, choose_backend
from lact_kernels.ops.window_attn_with_kvcache import run_window_attn_with_kvcache


@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0,
    *, return_softmax_lse: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Write new keys and values into a cache, and compute `lact_kernels.window_attn_with_kvcache` on it.

    Args:
        q: queries `[B, Tq, Hq, D]` of the last Tq tokens of each row; dtypes as in `flash_attn_func`.
        k_cache: keys `[B, S, Hkv, D]`, changed in place if k is given. `Hkv` divides `Hq`.
        v_cache: values `[B, S, Hkv, Dv]`, likewise.
        k: keys `[B, n, Hkv, D]` of n new tokens, in the dtype of the cache.
        v: their values `[B, n, Hkv, Dv]`. k and v are given together or not at all.
        rotary_cos, rotary_sin: None.
        cache_seqlens: the number of tokens of each row that are in the cache before this call: int32 `[B]`,
            or an int, or a tensor `[]`, for all rows. New tokens are written into the slots after them, and
            the queries are aligned with the last tokens, new ones included. Required with k; otherwise the
            default is S.
        cache_batch_idx, cache_leftpad, block_table: None.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`. Where that says
            what holds for more queries than keys, `Tk` is S here.
        rotary_interleaved: has no effect without `rotary_cos`.
        num_splits: has no effect, as the shapes decide how the work is split.
        return_softmax_lse: also return lse.
        backend: as in `window_attn`.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_softmax_lse` also lse
        `[B, Hq, Tq]`, float32 (float64 for float64 inputs). There is no backward.

    What differs from flash-attn:
        An input that requires a gradient is an error; flash-attn returns outputs without one. A cache of
        more rows than q has is an error. More tokens than the cache has slots are an error on the CPU. On
        other devices the host does not read the values of a tensor, so that it never waits and CUDA graphs
        can be recorded. There such tokens overwrite the oldest ones, as in a ring buffer, and a row whose
        queries need those gets NaN. The lse of a query that sees no key is -inf, not +inf.

    Raises:
        NotImplementedError: an option has a value that is not allowed above. The message names it.
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: a wrong shape, device or value, or an input that requires a gradient. Nothing has been
            written when an error is raised.

    Source: the signature is that of github.com/Dao-AILab/flash-attention at v2.8.3.
    """
    arguments.check_supported(
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    arguments.check_flags(
        rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse
    )
    checks.check_int("num_splits", num_splits)
    softcap, names = arguments.soft_cap(softcap), ("k_cache", "v_cache")
    options = check_attention(q, k_cache, v_cache, None, softmax_scale, softcap, names=names)
    left, right = arguments.window(causal, window_size, k_cache.shape[1])
    options = options._replace(left=left, right=right)
    backend = choose_backend(backend, q, v_cache, softcap)
    _check_new_tokens(k, v, k_cache, v_cache)
    if cache_seqlens is not None:
        cache_seqlens = checks.check_cache_seqlens(cache_seqlens, len(q), q.device)
    _check_slots(cache_seqlens, k, k_cache)
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    checks.check_no_gradient("flash_attn_with_kvcache", "flash_attn_func", **tensors)
    if k is not None:
        _write(k_cache, k, cache_seqlens)
        _write(v_cache, v, cache_seqlens)
        cache_seqlens = cache_seqlens + k.shape[1]
    o, lse = run_window_attn_with_kvcache(
        q, k_cache, v_cache, options, None, cache_seqlens, backend
    )
    return (o, lse) if return_softmax_lse else o


def _check_new_tokens(k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor) -> None:
    """Check that k and v fit the cache, or that neither is given."""
    if k is None and v is None:
        return
    checks.check_floating("k", k, "[B, n, Hkv, D]")
    (B, _, Hkv, D), n = k_cache.shape, k.shape[1]
    device, dtype = k_cache.device, k_cache.dtype
    checks.check_tensor("k", k, (B, n, Hkv, D), "[B, n, Hkv, D]", dtype, device)
    checks.check_tensor("v", v, (B, n, Hkv, v_cache.shape[3]), "[B, n, Hkv, Dv]", dtype, device)


def _check_slots(cache_seqlens: int | Tensor | None, k: Tensor | None, k_cache: Tensor) -> None:
    """Check that the cache has slots for all tokens, as far as that is known without waiting."""
    S, n = k_cache.shape[1], 0 if k is None else k.shape[1]
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens must say where k and v go, got None")
    lengths = [] if cache_seqlens is None else checks.known_seqlens(cache_seqlens)
    for length in [0, *lengths]:  # lengths that are not known are at least 0
        if length + n > S:
            raise ValueError(
                f"cache_seqlens is {length} and k has {n} tokens, more than the {S} slots of k_cache"
            )


def _write(cache: Tensor, new: Tensor, cache_seqlens: int | Tensor) -> None:
    """Write `new [B, n, ..]` into the slots of `cache [B, S, ..]` after the tokens of each row."""
    B, n = new.shape[:2]
    first = cache_seqlens[:, None] if isinstance(cache_seqlens, Tensor) else cache_seqlens
    slots = first + torch.arange(n, device=cache.device)  # [B, n] or [n]
    rows = torch.arange(B, device=cache.device)[:, None]
    # Lengths on a device are not checked: the remainder keeps the slots within the cache.
    cache[rows, slots.remainder(cache.shape[1])] = new
