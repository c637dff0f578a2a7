"""flash-attn's functions for sequences that are packed end to end."""

from typing import Literal, overload

from torch import Tensor

from lact_kernels.compat.flash_attn import arguments
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import check_attention, run_window_attn


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
        max_seqlen_q: the most queries of a sequence, an int or a tensor `[]`. Not needed, and not read.
        max_seqlen_k: the most keys of a sequence, likewise. It stands for `Tk` where `flash_attn_func` says
            what holds for more queries than keys. A tensor is read, which waits for its device, only where
            that may matter: without `causal`, in a window, with borders of their own for the keys.
        block_table: None.

    The other options, errors and differences from flash-attn are those of `flash_attn_func`.

    Returns:
        The outputs `[total_q, Hq, Dv]`, and with `return_attn_probs` also lse `[Hq, total_q]` and the
        empty tensor.
    """
    arguments.check_supported(dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    arguments.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    arguments.check_longest("max_seqlen_q", max_seqlen_q)
    arguments.check_longest("max_seqlen_k", max_seqlen_k)
    checks.check_floating("q", q, "[total_q, Hq, D]")
    checks.check_floating("k", k, "[total_k, Hkv, D]")
    checks.check_floating("v", v, "[total_k, Hkv, Dv]")
    q, k, v = q[None], k[None], v[None]  # a batch of one row
    options = check_attention(q, k, v, None, softmax_scale, arguments.soft_cap(softcap))
    _check_borders(cu_seqlens_q, cu_seqlens_k, q)
    # With the same borders no query stands before the first key.
    most_keys = None if cu_seqlens_q is cu_seqlens_k else max_seqlen_k
    left, right = arguments.window(causal, window_size, most_keys)
    options, borders = options._replace(left=left, right=right), (cu_seqlens_q, cu_seqlens_k)
    o, lse = run_window_attn(q, k, v, options, None, borders, backend)
    return (o[0], lse[0], q.new_empty(0)) if return_attn_probs else o[0]


@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` for keys and values in one tensor, `kv [total_k, 2, Hkv, D]`.

    The tensor is not copied, and its gradient is one tensor, too. q is `[total_q, Hq, D]`. Options, result,
    errors and differences from flash-attn are those of `flash_attn_varlen_func`.
    """
    k, v = arguments.unpack_kv(q, kv, "[total_q, Hq, D]", "[total_k, 2, Hkv, D]")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
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
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: Literal[False] = False, *, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    *, return_attn_probs: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
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
    """`flash_attn_varlen_func` for queries, keys and values in one tensor, `qkv [total, 3, H, D]`.

    The tensor is not copied, and its gradient is one tensor, too. `cu_seqlens` has the borders of all
    three, and `max_seqlen`, the most tokens of a sequence, is not read. Options, result, errors and
    differences from flash-attn are those of `flash_attn_varlen_func`.
    """
    q, k, v = arguments.unpack_qkv(qkv, "[total, 3, H, D]")
    checks.check_cu_seqlens(cu_seqlens, q[None])
    arguments.check_longest("max_seqlen", max_seqlen)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
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


def _check_borders(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor) -> None:
    """Check that they are the borders of the same number of sequences."""
    checks.check_cu_seqlens(cu_seqlens_q, q, "cu_seqlens_q")
    checks.check_cu_seqlens(cu_seqlens_k, q, "cu_seqlens_k")
    N, N_of_keys = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
    if N != N_of_keys:
        raise ValueError(
            f"cu_seqlens_q has the borders of {N} sequences and cu_seqlens_k of {N_of_keys}: they must be the"
            " same sequences"
        )
