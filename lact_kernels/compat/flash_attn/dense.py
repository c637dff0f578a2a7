"""flash-attn's functions for batches of sequences of one length."""

from typing import Literal, overload

from torch import Tensor

from lact_kernels.compat.flash_attn import arguments
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, run_window_attn


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
        k: keys `[B, Tk, Hkv, D]`. The last query is aligned with the last key: query i stands at position
            `i + Tk - Tq`, in every window, causal or not. `Hkv` divides `Hq`; query head h reads key head
            `h // (Hq // Hkv)`.
        v: values `[B, Tk, Hkv, Dv]`.
        dropout_p: 0.0.
        softmax_scale: factor on the scores, `D ** -0.5` by default.
        causal: a query sees no later keys.
        window_size: `(left, right)`. The query at position p sees the keys `p - left .. p + right`; a
            negative side has no limit. With `causal`, `right` is 0 whatever is given.
        softcap: if positive, scaled scores s become `softcap * tanh(s / softcap)`.
        alibi_slopes: None.
        deterministic: has no effect, as the backward is always deterministic.
        return_attn_probs: also return lse, and an empty tensor `[0]`, which is what flash-attn returns as
            probabilities without dropout.
        backend: as in `window_attn`.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_attn_probs` also lse
        `[B, Hq, Tq]`, float32 (float64 for float64 inputs), and the empty tensor. Gradients flow to q,
        k and v. A query that sees no key has the output 0.

    More queries than keys:
        The first queries then stand before the first key. Without `causal` it shows there that, in
        flash-attn and so here, a side of `Tk` or more is no limit either, and that the limit of `right` is
        `Tk` where `left` alone has another: `(3, -1)` is `(3, Tk)`.

    What differs from flash-attn:
        The lse of a query that sees no key is -inf here and +inf there. Gradients flow through lse, too;
        flash-attn has none for it. float32, float64, `Dv` other than `D` and empty batches work here and
        are errors there.

    Raises:
        NotImplementedError: an option has a value that is not allowed above. The message names it.
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: a wrong shape, device or value. The messages of both name the argument.

    Source: the signature and the rules are those of github.com/Dao-AILab/flash-attention at v2.8.3.
    """
    arguments.check_supported(dropout_p, alibi_slopes=alibi_slopes)
    arguments.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    options = check_attention(q, k, v, None, softmax_scale, arguments.soft_cap(softcap))
    left, right = arguments.window(causal, window_size, k.shape[1])
    options = options._replace(left=left, right=right)
    o, lse = run_window_attn(q, k, v, options, None, None, backend)
    return (o, lse, q.new_empty(0)) if return_attn_probs else o


@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    """`flash_attn_func` for keys and values in one tensor, `kv [B, Tk, 2, Hkv, D]`.

    The tensor is not copied, and its gradient is one tensor, too. q is `[B, Tq, Hq, D]`. Options, result,
    errors and differences from flash-attn are those of `flash_attn_func`.
    """
    k, v = arguments.unpack_kv(q, kv, "[B, Tq, Hq, D]", "[B, Tk, 2, Hkv, D]")
    return flash_attn_func(
        q,
        k,
        v,
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
    q, k, v = arguments.unpack_qkv(qkv, "[B, T, 3, H, D]")
    return flash_attn_func(
        q,
        k,
        v,
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
