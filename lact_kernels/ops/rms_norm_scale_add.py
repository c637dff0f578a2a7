"""`rms_norm_scale_add`: what a LaCT layer does with the outputs of its two operations (arXiv 2505.23884)."""

from torch import Tensor

from lact_kernels.autograd.rms_norm_scale_add import rms_norm_scale_add_fwd
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend


def rms_norm_scale_add(
    attn: Tensor,
    ttt: Tensor,
    norm_weight: Tensor,
    scale: Tensor | None,
    *,
    eps: float,
    backend: Backend = "auto",
) -> Tensor:
    """The outputs of the fast weights, normed and scaled, plus those of the attention.

        out = attn + ttt / sqrt(mean(ttt^2) + eps) * norm_weight * scale

    with the mean over the channels of each fast head, and all terms in the same C channels.

    Args:
        attn: outputs of the attention `[B, T, Hq, D]`; float16, bfloat16, float32, or float64 (eager
            backend only).
        ttt: outputs of the fast weights `[B, T, Hf, Df]` with Hf Df = Hq D, in the dtype of attn.
        norm_weight: `[Df]`, of any of these dtypes.
        scale: `[B, T, Hf]` in the dtype of attn, or None for 1.
        eps: added to the mean, not negative.
        backend: `"triton"` (NVIDIA GPUs, Df up to 2048), `"eager"` (any device), or `"auto"`: Triton
            where it can run, else eager. An explicit choice raises when it cannot run.

    Returns:
        `[B, T, C]` in the dtype of attn, computed in float32 (float64 for float64 inputs) and rounded
        once. Gradients flow to attn, ttt, norm_weight and scale; the backward keeps the last three.
        `torch.autocast` changes nothing.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument, what came and what was
            expected, before any kernel starts.
    """
    checks.check_floating("attn", attn, "[B, T, Hq, D]")
    checks.check_floating("ttt", ttt, "[B, T, Hf, Df]")
    B, T, Hq, D = attn.shape
    Hf, Df = ttt.shape[2:]
    checks.check_float_dtype("norm_weight", norm_weight, "[Df]")
    checks.check_tensor(
        "ttt", ttt, (B, T, Hf, Df), "[B, T, Hf, Df]", attn.dtype, attn.device, "attn"
    )
    if Hf * Df != Hq * D:
        raise ValueError(
            f"ttt must have the {Hq * D} channels of attn, got {Hf} heads of {Df}: {Hf * Df}"
        )
    checks.check_tensor(
        "norm_weight", norm_weight, (Df,), "[Df]", norm_weight.dtype, attn.device, "attn"
    )
    if scale is not None:
        checks.check_tensor(
            "scale", scale, (B, T, Hf), "[B, T, Hf]", attn.dtype, attn.device, "attn"
        )
    eps = checks.check_finite_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    backend = checks.choose_backend(backend, attn, checks.wide_fast_heads_obstacle(Df))
    return rms_norm_scale_add_fwd(attn, ttt, norm_weight, scale, float(eps), backend)
