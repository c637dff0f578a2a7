"""`window_attn`: causal attention in a sliding window."""

from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.autograd.window_attn import window_attn_fwd
from lact_kernels.core.offsets import kept
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import cast_inputs, matching_dtype
from lact_kernels.ops.checks import FLOAT_DTYPES, MOST_TOKENS, Backend

MAX_TRITON_HEAD_DIM = 256
FLOAT32_MAX = torch.finfo(torch.float32).max


@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, cu_seqlens: Tensor | None = None, backend: Backend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, cu_seqlens: Tensor | None = None, backend: Backend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, cu_seqlens: Tensor | None = None, backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int] | None = None,
    *,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention in which a query sees itself and the `window_size - 1` tokens before it.

    Query i reads the keys `i - window_size < j <= i`; this is flash-attn's
    `causal=True, window_size=(window_size - 1, 0)`. For seven tokens and `window_size=3`:

        query 0   x . . . . . .
        query 1   x x . . . . .
        query 2   x x x . . . .
        query 3   . x x x . . .
        query 4   . . x x x . .
        query 5   . . . x x x .
        query 6   . . . . x x x

    Args:
        q: queries `[B, Tq, Hq, D]`; float16, bfloat16, float32, or float64 (eager backend only).
        k: keys `[B, Tk, Hkv, D]`, with `Tq <= Tk`. The last query stands at the last key (query i at
            position `i + Tk - Tq`), so that keys and values may come from a cache. `Hkv` divides `Hq`;
            query head h reads key head `h // (Hq // Hkv)`.
        v: values `[B, Tk, Hkv, Dv]`. All three share dtype and device. Any strides are read in place,
            as long as the last one is 1.
        window_size: tokens that a query sees, at least 1. `None` is full causal attention. Also
            flash-attn's pair `(left, 0)`, which is `left + 1`, or `(-1, 0)`, which is `None`.
        softmax_scale: factor on the scores, `D ** -0.5` by default.
        cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`,
            `Tq == Tk`); none sees another. It starts at 0, does not descend and ends at T. Each call
            reads it to check this: on the device of q that waits, on the CPU nothing does. It is not read
            while a CUDA graph is recorded, where it has to be on the GPU; a replayed graph may find other
            lengths in it that add up to T.
        return_lse: also return the log-sum-exp of the scaled scores of each query.
        backend: `"triton"` (NVIDIA GPUs, head dims up to 256), `"eager"` (any device), or `"auto"`:
            Triton where it can run, else eager. An explicit choice raises when it cannot run.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_lse` also lse `[B, Hq, Tq]`,
        float32 (float64 for float64 inputs), natural logarithm. Gradients flow to q, k and v through
        both. Softmax statistics and accumulation are in float32 whatever the input dtype. Time and
        memory are O(T * window_size) and O(T); the backward keeps the inputs, the outputs and lse.
        Under `torch.autocast` q, k and v are cast to its dtype first, as PyTorch's attention does.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument, what came and what was
            expected, before any kernel starts.
        NotImplementedError: a pair `window_size` with a right side other than 0.

    Source: the sliding-window branch of the LaCT layer, arXiv 2505.23884, section 3.3.
    """
    window_size = check_attention(q, k, v, window_size, softmax_scale)
    checks.check_flag("return_lse", return_lse)
    Tq, Tk = q.shape[1], k.shape[1]
    if Tq > Tk:
        raise ValueError(
            f"q has {Tq} tokens, more than the {Tk} of k: queries are aligned to the end"
        )
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)
        if Tq != Tk:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {Tq} and {Tk}")
    o, lse = run_window_attn(q, k, v, window_size, softmax_scale, cu_seqlens, cu_seqlens, backend)
    return (o, lse) if return_lse else o


def run_window_attn(
    q, k, v, window_size, softmax_scale, cu_seqlens_q, cu_seqlens_k, backend
) -> tuple[Tensor, Tensor]:
    """`window_attn` of checked arguments, which may have more queries than keys.

    A query before the first key of its sequence sees nothing: its output is 0, its lse -inf.
    `cu_seqlens_q` and `cu_seqlens_k` are the borders of queries and keys, given together or not at all.
    """
    backend = choose_backend(backend, q, v)
    scale = score_scale(q, softmax_scale)
    if cu_seqlens_q is not None:
        same = cu_seqlens_q is cu_seqlens_k
        cu_seqlens_q = kept(cu_seqlens_q)
        cu_seqlens_k = cu_seqlens_q if same else kept(cu_seqlens_k)
    q, k, v = cast_inputs(q, k, v)
    return window_attn_fwd(q, k, v, window_size, scale, cu_seqlens_q, cu_seqlens_k, backend)


def check_attention(q, k, v, window_size, softmax_scale, names=("k", "v")) -> int | None:
    """What every call of attention must fulfil. k and v, called `names`, have any number of tokens.

    An ordinary call is told at a glance. Where that fails, each argument is checked for a message of its own.

    Returns:
        The window, as how many tokens a query sees.
    """
    if _is_ordinary(q, k, v, window_size, softmax_scale):
        return window_size
    return _check_each(q, k, v, window_size, softmax_scale, names)


def _is_ordinary(q, k, v, window_size, softmax_scale) -> bool:
    """Whether `_check_each` would find nothing, of arguments of the usual types; False says nothing.

    It costs a fraction of it. Compiled code, which is checked once, is left to the checks themselves: what is
    compared here would bind it to the lengths that it was compiled for.
    """
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor):
        return False
    if q.is_nested or k.is_nested or v.is_nested or not (q.ndim == k.ndim == v.ndim == 4):
        return False
    (B, _, Hq, D), (Bk, Tk, Hkv, Dk), (Bv, Tv, Hv, Dv) = q.shape, k.shape, v.shape
    return (
        (B, Tk, Hkv, D) == (Bk, Tv, Hv, Dk)
        and B == Bv
        and min(Hq, Hkv, D, Dv) > 0
        and Hq % Hkv == 0
        and q.dtype is k.dtype is v.dtype
        and q.dtype in FLOAT_DTYPES
        and q.device == k.device == v.device
        and q.layout is k.layout is v.layout is torch.strided
        and (window_size is None or type(window_size) is int and 0 < window_size <= MOST_TOKENS)
        and (softmax_scale is None or type(softmax_scale) is float)
        and (softmax_scale is None or abs(softmax_scale) <= FLOAT32_MAX)
    )


def _check_each(q, k, v, window_size, softmax_scale, names: tuple[str, str]) -> int | None:
    layouts = "[B, Tk, Hkv, D]", "[B, Tk, Hkv, Dv]"
    checks.check_floating("q", q, "[B, Tq, Hq, D]")
    for name, x, layout in zip(names, (k, v), layouts):
        checks.check_floating(name, x, layout)
    (B, _, _, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    for name, x, layout, channels in zip(names, (k, v), layouts, (D, v.shape[3])):
        shape, dtype = (B, Tk, Hkv, channels), matching_dtype(x, q)
        checks.check_tensor(name, x, shape, layout, dtype, q.device)
    check_heads_and_scale(q, Hkv, softmax_scale, names)
    return checks.check_window("window_size", window_size)


def check_heads_and_scale(q: Tensor, Hkv: int, softmax_scale, names: tuple[str, str]) -> None:
    """The heads of q divide into groups, one for each head of the keys, and scores stay in float32."""
    Hq = q.shape[2]
    if Hq % Hkv:
        raise ValueError(
            f"the {Hq} heads of q must be a multiple of the {Hkv} heads of {' and '.join(names)}"
        )
    if softmax_scale is not None:
        scale = checks.check_finite_number("softmax_scale", softmax_scale)
        if abs(scale) > FLOAT32_MAX and q.dtype != torch.float64:
            raise ValueError(f"softmax_scale must be finite in float32, got {scale}")


def score_scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)


def choose_backend(backend: Backend, q: Tensor, v: Tensor) -> Backend:
    """The backend that runs attention; see `checks.choose_backend`."""
    head_dim, obstacle = max(q.shape[-1], v.shape[-1]), None
    if head_dim > MAX_TRITON_HEAD_DIM:
        obstacle = f"head dimensions go up to {MAX_TRITON_HEAD_DIM}, got {head_dim}"
    return checks.choose_backend(backend, q, obstacle)
