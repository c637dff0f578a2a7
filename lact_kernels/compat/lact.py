"""The two causal functions of the LaCT authors' `lact_llm/lact_model/ttt_operation.py`."""

import torch
from torch import Tensor

from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import block_causal_ttt

__all__ = ["block_causal_lact_swiglu", "prenorm_block_causal_lact_swiglu"]


def block_causal_lact_swiglu(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    chunk_size: int = 2048,
    use_muon: bool = False,
    momentum: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`lact_kernels.block_causal_ttt` with post-norm, called as the authors' function of this name is.

    Batch and heads are one axis, `b*h`. Inputs and output are read and written in this layout:
    nothing is copied but to change a dtype.

    Args:
        w0: initial gate weights `[b*h, dh, dk]`; float16, bfloat16 or float32. They are cast to
            float32, and so are all updates; gradients come back in the dtype given. Below, float64
            for q, k, v and the weights together is possible too.
        w1: initial output weights `[b*h, dv, dh]`.
        w2: initial up weights `[b*h, dh, dk]`.
        q: queries `[b*h, l, dk]`. Cast to the dtype of v, in which all products are taken.
        k: keys `[b*h, l, dk]`. Cast to the dtype of v.
        v: values `[b*h, l, dv]`; float16, bfloat16, float32 or float64.
        lr0: learning rate of each token for w0, `[b*h, l, 1]`, of any floating dtype; cast to float32.
        lr1: the same for w1.
        lr2: the same for w2.
        chunk_size: tokens from one update to the next, at least 1. The last chunk may be shorter.
            Its queries are answered and its keys train nothing.
        use_muon: orthogonalise each step by five Newton-Schulz iterations.
        momentum: `[b*h, l, 1]` in [0, 1], of any floating dtype; cast to float32. Its mean over a
            chunk is the share of the last step kept.
        backend: as in `block_causal_ttt`.

    Returns:
        The outputs `[b*h, l, dv]` in the dtype of v. Gradients flow to every tensor.

    What differs from the authors' function:
        Precision. Theirs takes every product in bfloat16 on a GPU, and iterates Newton-Schulz in
        bfloat16 everywhere, which changes the outputs by several percent. Here products take the
        dtype of v and accumulate in float32, and Newton-Schulz is more precise (see
        `block_causal_ttt`). An active `torch.autocast` changes neither.
        Learning rates per channel (a last axis other than 1), and rates or momentum that broadcast
        over `b*h`, which theirs accepts, are errors.
        Their fused variant (`ttt_operation_fused_kernel.py`) is the same function without Muon only:
        with Muon it orthogonalises the steps of w0 and w2 stacked into one matrix, while here, as in
        their `ttt_operation.py`, each of the three steps is orthogonalised on its own.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument.

    Source: arXiv 2505.23884; the signature is that of github.com/a1600012888/LaCT at 1f84d47.
    """
    weights, tokens = (w0, w1, w2), (q, k, v)
    options = (chunk_size, use_muon, momentum, False, backend)
    return _block_causal_lact_swiglu(weights, tokens, (lr0, lr1, lr2), *options)


def prenorm_block_causal_lact_swiglu(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    chunk_size: int = 2048,
    use_muon: bool = False,
    momentum: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`block_causal_lact_swiglu` with pre-norm: steps add up in weights that are not normalised.

    Arguments, result, errors and differences from the authors' function of this name are the same.
    """
    weights, tokens = (w0, w1, w2), (q, k, v)
    options = (chunk_size, use_muon, momentum, True, backend)
    return _block_causal_lact_swiglu(weights, tokens, (lr0, lr1, lr2), *options)


def _block_causal_lact_swiglu(
    weights, tokens, lrs, chunk_size, use_muon, momentum, prenorm, backend
):
    """Each of the b*h rows is a batch row of one head, with weights of its own. These are views."""
    _check_inputs(weights, tokens, lrs, momentum)
    checks.check_positive_int("chunk_size", chunk_size)
    checks.check_flag("use_muon", use_muon)
    dtype = tokens[2].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype)[:, :, None] for x in tokens)  # [b*h, l, 1, d]
    w0, w1, w2 = (w.to(wide)[:, None] for w in weights)  # [b*h, 1, rows, columns]
    lr0, lr1, lr2 = (lr.to(wide) for lr in lrs)  # [b*h, l, 1]
    o = block_causal_ttt(
        q,
        k,
        v,
        w0,
        w1,
        w2,
        lr0,
        lr1,
        lr2,
        chunk_size=chunk_size,
        momentum=None if momentum is None else momentum.to(wide),
        muon=use_muon,
        prenorm=prenorm,
        backend=backend,
    )
    return o[:, :, 0]


def _check_inputs(weights, tokens, lrs, momentum) -> None:
    """Types, dtypes, devices and shapes, in the layout of this module."""
    q, k, v = tokens
    tensors = dict(zip(("v", "q", "k", "w0", "w1", "w2"), (v, q, k, *weights)))
    rates = dict(zip(("lr0", "lr1", "lr2"), lrs))
    if momentum is not None:
        rates["momentum"] = momentum
    for name, x in (tensors | rates).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}")
        if x.ndim != 3:
            raise ValueError(f"{name} must have three axes, b*h first, got {tuple(x.shape)}")
        if x.device != v.device:
            raise ValueError(f"{name} must be on {v.device} like v, got {x.device}")

    double = v.dtype == torch.float64
    for name, x in tensors.items():
        if (x.dtype == torch.float64) != double:
            expected = "float64" if double else "float32, bfloat16 or float16"
            raise TypeError(f"{name} must be {expected} as v is {v.dtype}, got {x.dtype}")

    rows, l, dk = q.shape
    dv, dh = v.shape[2], tensors["w0"].shape[1]
    shapes = {
        "k": ("[b*h, l, dk]", (rows, l, dk)),
        "v": ("[b*h, l, dv]", (rows, l, dv)),
        "w0": ("[b*h, dh, dk]", (rows, dh, dk)),
        "w1": ("[b*h, dv, dh]", (rows, dv, dh)),
        "w2": ("[b*h, dh, dk]", (rows, dh, dk)),
    }
    for name, (layout, shape) in shapes.items():
        _check_shape(name, tensors[name], layout, shape)
    for name, x in rates.items():
        if x.shape[2] != 1:
            raise ValueError(
                f"{name} must have one value per token, [b*h, l, 1] = {(rows, l, 1)}: a last axis"
                f" other than 1 (values per channel) is not supported, got {tuple(x.shape)}"
            )
        _check_shape(name, x, "[b*h, l, 1]", (rows, l, 1))


def _check_shape(name: str, x: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have the shape {layout} = {shape}, got {tuple(x.shape)}")
