"""`window_attn`: attention in a sliding window."""

import sys
from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.autograd.window_attn import window_attn_fwd
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.core.offsets import kept
from lact_kernels.eager.masked_attention import lse_dtype
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import autocast_dtype, cast_inputs, matching_dtype
from lact_kernels.ops.checks import FLOAT_DTYPES, MOST_TOKENS, Backend

MAX_TRITON_HEAD_DIM = 256
MAX_TRITON_SOFTCAP = 1000  # for 16-bit inputs, whose tanh is exact to 5e-7 of it
FLOAT32_MAX = torch.finfo(torch.float32).max


@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    softmax_scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None, backend: Backend = "auto", return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int] | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in a window: causal, of a query and the tokens before it, or with later ones as well.

    With `window_size` a number W query i reads the keys `i - W < j <= i`; with a pair `(left, right)`, which
    is flash-attn's, the keys `i - left <= j <= i + right`. So W is `(W - 1, 0)`. For seven tokens:

                  window_size=3        window_size=(1, 2)
        query 0   x . . . . . .        x x x . . . .
        query 1   x x . . . . .        x x x x . . .
        query 2   x x x . . . .        . x x x x . .
        query 3   . x x x . . .        . . x x x x .
        query 4   . . x x x . .        . . . x x x x
        query 5   . . . x x x .        . . . . x x x
        query 6   . . . . x x x        . . . . . x x

    Args:
        q: queries `[B, Tq, Hq, D]`; float16, bfloat16, float32, or float64 (eager backend only).
        k: keys `[B, Tk, Hkv, D]`, with `Tq <= Tk`. The last query stands at the last key (query i at
            position `i + Tk - Tq`), so that keys and values may come from a cache. `Hkv` divides `Hq`;
            query head h reads key head `h // (Hq // Hkv)`.
        v: values `[B, Tk, Hkv, Dv]`. All three share dtype and device. Any strides are read in place,
            as long as the last one is 1.
        window_size: tokens that a query sees, itself and those before it, at least 1. `None` is full causal
            attention. Or a pair `(left, right)`, of at least 0 each; -1 is no limit: `(-1, 0)` is `None`,
            `(-1, -1)` sees everything.
        softmax_scale: factor on the scores, `D ** -0.5` by default.
        softcap: above 0: scores become `softcap * tanh(scores / softcap)`, after the factor and before the
            mask, and so stay between -softcap and softcap.
        sinks: `[Hq]`, float32 or the dtype of q: a logit for each head, which counts in the softmax of
            every row of that head and has no value. A row that sees no key has the output 0.
        cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`,
            `Tq == Tk`); none sees another. It starts at 0, does not descend and ends at T. Each call
            reads it to check this: on the device of q that waits, on the CPU nothing does. It is not read
            while a CUDA graph is recorded, where it has to be on the GPU; a replayed graph may find other
            lengths in it that add up to T.
        return_lse: also return the log-sum-exp of the logits of each query: its scores, and the sink.
        backend: `"triton"` (NVIDIA GPUs, head dims up to 256, soft caps up to 1000 in 16 bits), `"eager"`
            (any device), or `"auto"`: Triton where it can run, else eager. An explicit choice raises when it
            cannot run.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of q, and with `return_lse` also lse `[B, Hq, Tq]`,
        float32 (float64 for float64 inputs), natural logarithm. Gradients flow to q, k, v and sinks through
        both. Softmax statistics and accumulation are in float32 whatever the input dtype. With W keys in a
        window time and memory are O(T * W) and O(T); the backward keeps the inputs, the outputs and lse.
        Under `torch.autocast` q, k and v are cast to its dtype first, as PyTorch's attention does.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument, what came and what was
            expected, before any kernel starts.

    Source: the sliding-window branch of the LaCT layer, arXiv 2505.23884, section 3.3. Soft caps: Gemma 2,
    arXiv 2408.00118, section 2. Sinks: gpt-oss, arXiv 2508.10925, section 2.
    """
    options = check_attention(q, k, v, window_size, softmax_scale, softcap, sinks)
    checks.check_flag("return_lse", return_lse)
    Tq, Tk = q.shape[1], k.shape[1]
    if Tq > Tk:
        raise ValueError(
            f"q has {Tq} tokens, more than the {Tk} of k: queries are the last ones of the sequence;"
            " lact_kernels.compat.flash_attn_func takes more, as cross-attention has them"
        )
    borders = None
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)
        if Tq != Tk:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {Tq} and {Tk}")
        borders = cu_seqlens, cu_seqlens
    o, lse = run_window_attn(q, k, v, options, sinks, borders, backend)
    return (o, lse) if return_lse else o


def run_window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    borders: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`window_attn` of checked arguments, which may have more queries than keys; outputs and lse.

    `borders` are `cu_seqlens` of the queries and of the keys. A query that sees no key has the output 0, and
    its sink as lse, or -inf.
    """
    backend = choose_backend(backend, q, v, options.softcap)
    borders_q = borders_k = None
    if borders is not None:
        borders_q = borders_k = kept(borders[0])
        if borders[1] is not borders[0]:
            borders_k = kept(borders[1])
    q, k, v = cast_inputs(q, k, v)
    sinks = inner_sinks(q, sinks)
    return window_attn_fwd(q, k, v, *options, sinks, borders_q, borders_k, backend)


def inner_sinks(q: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Sinks as the registered ops take them: of each row of the batch, `[B, Hq]`, in the dtype of lse."""
    return None if sinks is None else sinks.to(lse_dtype(q.dtype)).expand(len(q), -1)


def check_attention(
    q, k, v, window_size, softmax_scale, softcap=None, sinks=None, names=("k", "v")
) -> AttentionOptions:
    """What every call of attention must fulfil. k and v, called `names`, have any number of tokens.

    An ordinary call is told at a glance. Where that fails, each argument is checked for a message of its own.
    """
    is_ordinary = _are_ordinary(q, k, v) and _is_ordinary(
        q, window_size, softmax_scale, softcap, sinks
    )
    if not is_ordinary:
        _check_tensors(q, k, v, names)
        check_scores(q, k.shape[2], softmax_scale, softcap, sinks, names)
        window_size = checks.check_window("window_size", window_size)
    elif window_size is None:
        window_size = None, 0
    elif type(window_size) is int:
        window_size = window_size - 1, 0
    return attention_options(q, window_size, softmax_scale, softcap)


def attention_options(
    q: Tensor, window: tuple[int | None, int | None], softmax_scale, softcap
) -> AttentionOptions:
    """Of checked arguments, and the window as `checks.check_window` returns it."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return AttentionOptions(*window, scale, None if softcap is None else float(softcap))


def _are_ordinary(q, k, v) -> bool:
    """Whether `_check_tensors` would find nothing, of arguments of the usual types; False says nothing.

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
    )


def _is_ordinary(q, window_size, softmax_scale, softcap, sinks) -> bool:
    """The same of `check_scores` and the window."""
    return (
        (window_size is None or type(window_size) is int and 0 < window_size <= MOST_TOKENS)
        and (softmax_scale is None or type(softmax_scale) is float)
        and (softmax_scale is None or abs(softmax_scale) <= FLOAT32_MAX)
        and softcap is None
        and (sinks is None or _are_ordinary_sinks(q, sinks))
    )


def _are_ordinary_sinks(q: Tensor, sinks) -> bool:
    return (
        type(sinks) in (Tensor, torch.nn.Parameter)
        and not sinks.is_nested
        and sinks.shape == q.shape[2:3]
        and (sinks.dtype is torch.float32 or sinks.dtype is q.dtype)
        and sinks.device == q.device
        and sinks.layout is torch.strided
    )


def _check_tensors(q, k, v, names: tuple[str, str]) -> None:
    layouts = "[B, Tk, Hkv, D]", "[B, Tk, Hkv, Dv]"
    checks.check_floating("q", q, "[B, Tq, Hq, D]")
    for name, x, layout in zip(names, (k, v), layouts):
        checks.check_floating(name, x, layout)
    (B, _, _, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    for name, x, layout, channels in zip(names, (k, v), layouts, (D, v.shape[3])):
        shape, dtype = (B, Tk, Hkv, channels), matching_dtype(x, q)
        checks.check_tensor(name, x, shape, layout, dtype, q.device)


def check_scores(
    q: Tensor, Hkv: int, softmax_scale, softcap, sinks, names: tuple[str, str]
) -> None:
    """The heads of q divide into groups, one for each head of the keys, and scores stay in float32."""
    Hq, scale = q.shape[2], q.shape[3] ** -0.5
    if Hq % Hkv:
        raise ValueError(
            f"the {Hq} heads of q must be a multiple of the {Hkv} heads of {' and '.join(names)}"
        )
    largest = FLOAT32_MAX if q.dtype != torch.float64 else sys.float_info.max
    if softmax_scale is not None:
        scale = checks.check_finite_number("softmax_scale", softmax_scale)
        if abs(scale) > largest:
            raise ValueError(f"softmax_scale must be finite in float32, got {scale}")
    if softcap is not None:
        cap = checks.check_finite_number("softcap", softcap)
        if not cap > 0:
            raise ValueError(f"softcap must be above 0, or None for none, got {cap}")
        if cap > largest or abs(scale) > largest / 4 * cap:  # kernels multiply it by 2 log2(e)
            raise ValueError(
                f"softcap, and softmax_scale / softcap, must be finite in float32, got {cap} and a scale of"
                f" {scale}"
            )
    if sinks is not None:
        checks.check_float_dtype("sinks", sinks, "[Hq]")
        if sinks.dtype not in (torch.float32, q.dtype):
            raise TypeError(
                f"sinks must be float32 or have the dtype of q, {q.dtype}, got {sinks.dtype}"
            )
        checks.check_tensor("sinks", sinks, (Hq,), "[Hq]", sinks.dtype, q.device)


def choose_backend(backend: Backend, q: Tensor, v: Tensor, softcap: float | None = None) -> Backend:
    """The backend that runs attention; see `checks.choose_backend`."""
    head_dim, obstacle = max(q.shape[-1], v.shape[-1]), None
    if head_dim > MAX_TRITON_HEAD_DIM:
        obstacle = f"head dimensions go up to {MAX_TRITON_HEAD_DIM}, got {head_dim}"
    elif softcap is not None and softcap > MAX_TRITON_SOFTCAP:
        if autocast_dtype(q) != torch.float32:
            obstacle = f"its softcap for 16 bits goes up to {MAX_TRITON_SOFTCAP}, got {softcap}"
    return checks.choose_backend(backend, q, obstacle)
