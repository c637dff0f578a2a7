"""flash-attn 2.8's functions, for causal attention in a window.

Each function has the signature, the defaults and the results of flash-attn's function of the same name. An
option that asks for anything but causal attention raises `NotImplementedError`. The default does so, too:
flash-attn's `causal` is False.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, choose_backend, run_window_attn
from lact_kernels.ops.window_attn_with_kvcache import run_window_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

# Options that are not supported, and what to do instead.
INSTEAD = {
    "dropout_p": "pass 0.0",
    "softcap": "pass 0.0, or keep flash-attn for a model that was trained with it",
    "alibi_slopes": "pass None, or keep flash-attn for a model that was trained with them",
    "block_table": "pass keys and values that are not paged",
    "rotary_cos": "rotate q and k before the call",
    "rotary_sin": "rotate q and k before the call",
    "cache_batch_idx": "pass a cache whose row b belongs to row b of q",
    "cache_leftpad": "begin each row at slot 0 of the cache and say its length in cache_seqlens",
}


@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`lact_kernels.window_attn` with the signature of flash-attn's function.

    Args:
        q: queries `[B, Tq, Hq, D]`; float16, bfloat16, float32, or float64 (eager backend only).
        k: keys `[B, Tk, Hkv, D]`. The last query is aligned with the last key. `Hkv` divides `Hq`; query
            head h reads key head `h // (Hq // Hkv)`.
        v: values `[B, Tk, Hkv, Dv]`.
        dropout_p: 0.0.
        softmax_scale: factor on the scores, `D ** -0.5` by default.
        causal: must be True, unless `window_size` alone makes the attention causal.
        window_size: `(left, right)`. A query sees itself and the `left` tokens before it, which is
            `window_size = left + 1` in `window_attn`; with a negative `left`, all of them. With `causal`,
            `right` has no effect, as in flash-attn. Without `causal` it must be 0, unless there is at most
            one query, which has no later keys.
        softcap: 0.0.
        alibi_slopes: None.
        deterministic: has no effect, as the backward is always deterministic.
        return_attn_probs: also return lse, and an empty tensor `[0]`, which is what flash-attn returns as
            probabilities without dropout.
        backend: as in `window_attn`.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_attn_probs` also lse
        `[B, Hq, Tq]`, float32 (float64 for float64 inputs), and the empty tensor. Gradients flow to q,
        k and v.

    What differs from flash-attn:
        Where there are more queries than keys, the first `Tq - Tk` queries see no key. Their output is 0 in
        both, but their lse is -inf here and +inf there. Gradients flow through lse, too; flash-attn has
        none for it. float32, float64, `Dv` other than `D` and empty batches work here and are errors there.

    Raises:
        NotImplementedError: an option has a value that is not allowed above. The message names it.
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: a wrong shape, device or value. The messages of both name the argument.

    Source: the signature is that of github.com/Dao-AILab/flash-attention at v2.8.3.
    """
    _check_supported(dropout_p, softcap, alibi_slopes=alibi_slopes)
    checks.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    options = check_attention(q, k, v, None, softmax_scale)
    window = _window(causal, window_size, q.shape[1])
    options = options._replace(left=None if window is None else window - 1)
    o, lse = run_window_attn(q, k, v, options, None, None, backend)
    return (o, lse, q.new_empty(0)) if return_attn_probs else o


@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` for queries, keys and values in one tensor, `qkv [B, T, 3, H, D]`.

    The tensor is not copied, and its gradient is one tensor, too. Options, result, errors and differences
    from flash-attn are those of `flash_attn_func`.
    """
    checks.check_floating("qkv", qkv, "[B, T, 3, H, D]")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must have the shape [B, T, 3, H, D], got {tuple(qkv.shape)}")
    return flash_attn_func(
        *qkv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, block_table: Tensor | None = None,
    *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], block_table: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
    *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` for N sequences that are packed end to end, and do not see one another.

    Args:
        q: queries `[total_q, Hq, D]`.
        k: keys `[total_k, Hkv, D]`.
        v: values `[total_k, Hkv, Dv]`.
        cu_seqlens_q: int32 `[N+1]`, the borders of the sequences in q. It starts at 0, does not descend
            and ends at total_q. (flash-attn accepts less, and leaves the outputs after the last border
            undefined.) Each call reads the values to check this, as `window_attn` does, which waits for
            the device unless they are on the CPU.
        cu_seqlens_k: int32 `[N+1]`, the borders in k and v. In each sequence the last query is aligned with
            the last key, whether there are more queries or more keys.
        max_seqlen_q: the most queries of a sequence, an int or a tensor `[]`. The kernels do not need it.
            If it is at most 1, no query has later keys, and any `causal` and `window_size` are accepted. A
            tensor is read, which waits for its device, only where this decides.
        max_seqlen_k: the most keys of a sequence. Not needed either.
        block_table: None.

    The other options, errors and differences from flash-attn are those of `flash_attn_func`.

    Returns:
        The outputs `[total_q, Hq, Dv]`, and with `return_attn_probs` also lse `[Hq, total_q]` and the
        empty tensor.
    """
    _check_supported(dropout_p, softcap, alibi_slopes=alibi_slopes, block_table=block_table)
    checks.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    checks.check_floating("q", q, "[total_q, Hq, D]")
    checks.check_floating("k", k, "[total_k, Hkv, D]")
    checks.check_floating("v", v, "[total_k, Hkv, Dv]")
    q, k, v = q[None], k[None], v[None]  # a batch of one row
    options = check_attention(q, k, v, None, softmax_scale)
    checks.check_cu_seqlens(cu_seqlens_q, q, "cu_seqlens_q")
    checks.check_cu_seqlens(cu_seqlens_k, q, "cu_seqlens_k")
    N = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] != N + 1:
        raise ValueError(
            f"cu_seqlens_q has the borders of {N} sequences and cu_seqlens_k of"
            f" {cu_seqlens_k.shape[0] - 1}: they must be the same sequences"
        )
    _check_longest("max_seqlen_q", max_seqlen_q)
    _check_longest("max_seqlen_k", max_seqlen_k)
    # More queries than sequences belie a max_seqlen_q of 1.
    window = _window(causal, window_size, max_seqlen_q if q.shape[1] <= N else q.shape[1])
    options = options._replace(left=None if window is None else window - 1)
    o, lse = run_window_attn(q, k, v, options, None, (cu_seqlens_q, cu_seqlens_k), backend)
    return (o[0], lse[0], q.new_empty(0)) if return_attn_probs else o[0]


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
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
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
    _check_supported(
        softcap=softcap,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    checks.check_flags(rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse)
    checks.check_int("num_splits", num_splits)
    check_attention(q, k_cache, v_cache, None, softmax_scale, names=("k_cache", "v_cache"))
    window = _window(causal, window_size, q.shape[1])
    backend = choose_backend(backend, q, v_cache)
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
        q, k_cache, v_cache, window, cache_seqlens, softmax_scale, backend
    )
    return (o, lse) if return_softmax_lse else o


def _window(causal: bool, window_size: tuple[int, int], most_queries: int | Tensor) -> int | None:
    """`window_attn`'s `window_size` for flash-attn's `causal` and `window_size`, a pair `(left, right)`.

    `most_queries`, of a sequence, is read only if the answer depends on it.
    """
    checks.check_flag("causal", causal)
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    left, right = map(checks.plain, window_size) if is_pair else (None, None)
    if not checks.is_int(left) or not checks.is_int(right):
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    # Queries are aligned at the end: a single one is at the last key, and has no later keys.
    if not (causal or right == 0 or most_queries <= 1):
        raise NotImplementedError(
            f"causal=False with window_size={(left, right)} lets queries see later keys, which is"
            " not supported: pass causal=True, or a right side of 0"
        )
    return checks.check_count("window_size", left + 1) if left >= 0 else None


def _check_longest(name: str, length: int | Tensor) -> None:
    """Check the type: an int, or a tensor `[]` as `lengths.max()` returns it. The value is not read."""
    if not isinstance(length, Tensor):
        checks.check_int(name, length)
    elif length.ndim or length.is_floating_point() or length.dtype == torch.bool:
        raise TypeError(
            f"{name} must be an int or a tensor [] of integers, got {tuple(length.shape)} of"
            f" {length.dtype}"
        )


def _check_supported(dropout_p: float = 0.0, softcap: float = 0.0, **options) -> None:
    """Raise for the first option that is in use: a number above 0, or anything but None."""
    for name, number in {"dropout_p": dropout_p, "softcap": softcap}.items():
        number = checks.check_finite_number(name, number)
        options[name] = number if number > 0 else None
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported: {INSTEAD[name]}")


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
