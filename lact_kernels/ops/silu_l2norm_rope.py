"""`silu_l2norm_rope`: what a LaCT layer does to q, k and v before its two operations.

The layer (arXiv 2505.23884, section 3.3; `LaCTSWIGLULayer` in the authors' repository) shares one
projection between attention and fast weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lact_kernels.autograd.silu_l2norm_rope import silu_l2norm_rope_fwd
from lact_kernels.core.silu_l2norm_rope import thirds
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend

__all__ = ["silu_l2norm_rope"]


def silu_l2norm_rope(
    qkv: Tensor | Sequence[Tensor],
    qk_scale: Tensor,
    qk_offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_attn_heads: int,
    num_lact_heads: int,
    silu: bool,
    silu_v: bool,
    rotate_fast: bool,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of attention and fast weights in a LaCT layer, from the q, k and v that they share.

    The C channels are Hq attention heads of D channels, and also Hf fast heads of Df. `rope` rotates
    the channels i and i + D/2 of each attention head against each other:

        y[i]       = x[i] cos[i] - x[i + D/2] sin[i]
        y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

    The attention takes `rope(q)`, `rope(k)` and v, the fast weights

        x = q * qk_scale[:, 0] + qk_offset[:, 0]        (k: column 1)
        x = silu(x)                                     with `silu`
        x = x / (|x| + 1e-5)                            |x| over each fast head
        x = rope(x)                                     with `rotate_fast`

    and v, or with `silu_v` silu(v).

    Args:
        qkv: q, k and v side by side, `[B, T, 3C]`, or three tensors `[B, T, C]`, all of one dtype and
            device; float16, bfloat16, float32, or float64 (eager backend only). Any strides are read in
            place, as long as the last one is 1. The gradient of one tensor is written as one.
        qk_scale, qk_offset: `[C, 2]`, of any of these dtypes.
        cos, sin: `[1, T, D/2]`, or `[B, T, D/2]` with positions of its own for each row. float32, or
            float64 for float64 inputs. They get no gradient, and so must not require one.
        num_attn_heads: Hq, with D = C / Hq even.
        num_lact_heads: Hf.
        silu: apply SiLU to the scaled and shifted q and k of the fast weights.
        silu_v: apply it to the v of the fast weights.
        rotate_fast: rotate q and k of the fast weights, in the heads of the attention.
        backend: `"triton"` (NVIDIA GPUs; each fast head holds whole attention heads, that is, D
            divides Df, and Df is at most 2048), `"eager"` (any device), or `"auto"`: Triton where it
            can run, else eager. An explicit choice raises when it cannot run.

    Returns:
        `(attn_q, attn_k, attn_v, fast_q, fast_k, fast_v)`, the first three `[B, T, Hq, D]`, the others
        `[B, T, Hf, Df]`, in the dtype of q. attn_v is a view of v (a copy where v may need a
        gradient and the call is compiled or transformed); without `silu_v` fast_v is a view of attn_v.
        All else is computed in float32 (float64 for float64 inputs) and rounded once, at the end.
        Gradients flow to q, k, v, qk_scale and qk_offset; the backward keeps these inputs and nothing
        else. Where a fast head is 0 the gradient of its norm counts as 0. `torch.autocast` changes nothing.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value, or a `cos` or `sin` that requires a gradient. Both
            name the argument, what came and what was expected, before any kernel starts.
    """
    qkv = _checked(qkv)
    q, _, v = thirds(qkv)
    B, T, C = q.shape
    for name, x in (("qk_scale", qk_scale), ("qk_offset", qk_offset)):
        checks.check_float_dtype(name, x, "[C, 2]")
        checks.check_tensor(name, x, (C, 2), "[C, 2]", x.dtype, q.device)
    num_attn_heads = checks.check_positive_int("num_attn_heads", num_attn_heads)
    num_lact_heads = checks.check_positive_int("num_lact_heads", num_lact_heads)
    for name, heads in (("num_attn_heads", num_attn_heads), ("num_lact_heads", num_lact_heads)):
        if C % heads:
            raise ValueError(f"{name} must divide the {C} channels of q, got {heads}")
    head_dim, fast_dim = C // num_attn_heads, C // num_lact_heads
    if head_dim % 2:
        raise ValueError(
            f"the {C} channels of q in num_attn_heads = {num_attn_heads} heads are {head_dim} each,"
            " expected an even number"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        _check_angles(name, x, (B, T, head_dim // 2), q)
    if cos.shape != sin.shape:
        raise ValueError(
            f"sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    checks.check_flags(silu=silu, silu_v=silu_v, rotate_fast=rotate_fast)
    obstacle = checks.wide_fast_heads_obstacle(fast_dim)
    if fast_dim % head_dim:
        obstacle = (
            f"each fast head must hold whole attention heads, and the {head_dim} channels of these"
            f" do not divide its {fast_dim}"
        )
    backend = checks.choose_backend(backend, q, obstacle)
    attn_q, attn_k, attn_v, fast_q, fast_k, fast_v = silu_l2norm_rope_fwd(
        qkv, qk_scale, qk_offset, cos, sin,
        num_attn_heads, num_lact_heads, silu, silu_v, rotate_fast, checks.may_need_backward(v), backend,
    )  # fmt: skip
    v = attn_v[0] if attn_v else v.unflatten(-1, (num_attn_heads, head_dim))
    fast_v = fast_v[0] if fast_v else v.flatten(2).unflatten(-1, (num_lact_heads, fast_dim))
    return attn_q, attn_k, v, fast_q, fast_k, fast_v


def _checked(qkv: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One tensor `[B, T, 3C]`, or three `[B, T, C]`."""
    if isinstance(qkv, Tensor):
        checks.check_float_dtype("qkv", qkv, "[B, T, 3C]")
        if qkv.ndim != 3 or qkv.shape[2] == 0 or qkv.shape[2] % 3:
            raise ValueError(
                f"qkv must have the shape [B, T, 3C] with C > 0, got {tuple(qkv.shape)}"
            )
        return [qkv]
    if not isinstance(qkv, Sequence) or len(qkv) != 3:
        given = f"{len(qkv)}" if isinstance(qkv, Sequence) else type(qkv).__name__
        raise TypeError(f"qkv must be a tensor [B, T, 3C] or three of [B, T, C], got {given}")
    q = qkv[0]
    checks.check_float_dtype("q", q, "[B, T, C]")
    if q.ndim != 3 or q.shape[2] == 0:
        raise ValueError(f"q must have the shape [B, T, C] with C > 0, got {tuple(q.shape)}")
    for name, x in zip("kv", qkv[1:]):
        checks.check_tensor(name, x, tuple(q.shape), "[B, T, C]", q.dtype, q.device)
    return list(qkv)


def _check_angles(name: str, x: Tensor, shape: tuple[int, int, int], q: Tensor) -> None:
    """`x` is cos or sin: of this shape or with one row for the whole batch, and without a gradient."""
    if isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == 1:
        shape = (1, *shape[1:])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    checks.check_tensor(name, x, shape, "[1 or B, T, D/2]", dtype, q.device)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and gets none: pass {name}.detach()")
