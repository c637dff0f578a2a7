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
    arguments.check_supported(
        dropout_p, softcap, alibi_slopes=alibi_slopes, block_table=block_table
    )
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
    arguments.check_longest("max_seqlen_q", max_seqlen_q)
    arguments.check_longest("max_seqlen_k", max_seqlen_k)
    # More queries than sequences belie a max_seqlen_q of 1.
    window = arguments.window(causal, window_size, max_seqlen_q if q.shape[1] <= N else q.shape[1])
    options = options._replace(left=None if window is None else window - 1)
    o, lse = run_window_attn(q, k, v, options, None, (cu_seqlens_q, cu_seqlens_k), backend)
    return (o[0], lse[0], q.new_empty(0)) if return_attn_probs else o[0]
