"""`ttt_apply`: a fast network of given weights, over any number of tokens."""

import torch
from torch import Tensor

from lact_kernels.autograd.ttt_apply import ttt_apply_fwd
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import autocast_dtype, autocasts
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.fast_weights import size_obstacle, weight_layouts

__all__ = ["ttt_apply"]


def ttt_apply(
    q: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """A small network per head, `f(x) = w1 (silu(w0 x) * (w2 x))`, for every token.

    It is what `block_causal_ttt` does with the queries of a chunk, for weights that are known: to render from
    weights that have been trained and stored, to query a state, to take a control step of one token.

    On a GPU it is two kernels and nothing else, where the weights have the dtype of q: nothing waits for the
    device, and a CUDA graph can record it. The kernels read the weights where they lie, as long as the
    matrix of each head is contiguous. Weights in float32 beside q of 16 bits are rounded to its dtype first,
    at each call and one kernel for each: who applies them often stores them in the dtype of q.

    Args:
        q: queries `[B, T, H, Dk]`; float16, bfloat16, float32 or float64. Any strides are read in place, as
            long as the last one is 1.
        w0: gate weights `[H, Dh, Dk]`, or `[B, H, Dh, Dk]` with one set for each batch row; in the dtype of
            q, or float32 beside q of 16 bits.
        w1: output weights `[H, Dv, Dh]`, or with the leading B.
        w2: up weights, shaped like w0.
        backend: `"triton"` (NVIDIA GPUs; float16, bfloat16 and float32; Dk and Dv up to 2048, Dh up to
            4096), `"eager"` (any device), or `"auto"`: Triton where it can run, else eager. An explicit
            choice raises when it cannot run.

    Returns:
        The outputs `[B, T, H, Dv]` in the dtype of q. Matrix products take this dtype and accumulate in
        float32; the hidden activations are rounded to it between them. Gradients flow to q and the weights,
        of which each has its in its own dtype, summed in float32; the backward keeps these inputs and nothing
        else.

        Beside the outputs it takes memory for the hidden activations, `B T H Dh` elements of q's dtype, up to
        1 GiB: beyond that tokens take turns, with two kernels for each.

        Under `torch.autocast` q is cast to its dtype where the weights' does not fit, and weights of another
        16-bit dtype to float32. What fits together is computed as it is.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument, what came and what was
            expected, before any work starts.

    Source: arXiv 2505.23884, section 3.1.
    """
    checks.check_floating("q", q, "[B, T, H, Dk]")
    q, (w0, w1, w2) = _autocast_inputs(q, (w0, w1, w2))
    _check_weights(q, w0, w1, w2)
    backend = checks.choose_backend(
        backend, q, size_obstacle(q.shape[-1], w1.shape[-2], w0.shape[-2])
    )
    weights = (w0, w1, w2)
    if any(w.ndim == 4 for w in weights):
        weights = tuple(w.expand(q.shape[0], -1, -1, -1) for w in weights)
    else:
        weights = tuple(w[None] for w in weights)
    return ttt_apply_fwd(q, *weights, backend)


def _autocast_inputs(q: Tensor, weights: tuple) -> tuple[Tensor, tuple]:
    """The arguments as they are, or where autocast has made dtypes that do not fit, in those that do."""
    if not autocasts(q):
        return q, weights

    def fit(q: Tensor) -> list[bool]:
        return [not isinstance(w, Tensor) or w.dtype in _weight_dtypes(q) for w in weights]

    if not all(fit(q)):
        q = q.to(autocast_dtype(q))
    return q, tuple(
        w if fits or not autocasts(w) else w.float() for w, fits in zip(weights, fit(q))
    )


def _weight_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    """Those that weights may have beside q: its own, and for 16 bits also that which is rounded to it."""
    return (q.dtype, torch.float32) if q.dtype.itemsize == 2 else (q.dtype,)


def _check_weights(q: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> None:
    checks.check_floating("w0", w0, "[H, Dh, Dk]", "[B, H, Dh, Dk]")
    checks.check_floating("w1", w1, "[H, Dv, Dh]", "[B, H, Dv, Dh]")
    B, _, H, Dk = q.shape
    sizes = Dk, w1.shape[-2], w0.shape[-2]
    for name, w, shape, layout in weight_layouts((w0, w1, w2), B, H, sizes):
        dtypes = _weight_dtypes(q)
        if isinstance(w, Tensor) and w.dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise TypeError(f"{name} must have the dtype {expected} beside q, got {w.dtype}")
        dtype = w.dtype if isinstance(w, Tensor) else q.dtype
        checks.check_tensor(name, w, shape, layout, dtype, q.device)
