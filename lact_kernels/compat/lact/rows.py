"""Tensors as the LaCT authors' functions take them: batch and heads are one axis, `b*h`, the first.

Each of these rows is a batch row of one head here, with weights of its own. Changing between the two layouts
copies nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.fast_weights import Triple, wide_dtype
from lact_kernels.ops import checks


class Rows(NamedTuple):
    """The arguments of a call in the layout of `block_causal_ttt` and `ttt`, with `B = b*h` and `H = 1`."""

    tokens: Triple  # q, k, v
    weights: Triple  # out x in, float32 (float64 beside float64 tokens), as are the rates
    rates: Triple
    momentum: Tensor | None

    @classmethod
    def of(
        cls,
        weights: Triple,
        tokens: Triple,
        rates: Triple,
        momentum: Tensor | None = None,
        *,
        transposed: bool = False,
        any_queries: bool = False,
    ) -> "Rows":
        """Checked, and cast: q and k to the dtype of v, everything else to float32.

        Args:
            weights: w0, w1, w2, `[b*h, out, in]`, or `[b*h, in, out]` if `transposed`.
            tokens: q `[b*h, l, dk]`, k `[b*h, l, dk]` and v `[b*h, l, dv]`.
            rates: lr0, lr1, lr2, `[b*h, l, 1]`.
            momentum: likewise.
            any_queries: q may have another number of tokens than the others.

        Raises:
            TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
            ValueError: a wrong shape or device.
        """
        _check(weights, tokens, rates, momentum, transposed, any_queries)
        v = tokens[2]
        wide = wide_dtype(v)
        tokens = tuple(x.to(v.dtype)[:, :, None] for x in tokens)
        weights = tuple((w.mT if transposed else w).to(wide)[:, None] for w in weights)
        rates = tuple(lr.to(wide) for lr in rates)
        return cls(tokens, weights, rates, None if momentum is None else momentum.to(wide))


def _check(weights, tokens, rates, momentum, transposed, any_queries) -> None:
    """Types, dtypes, devices and shapes."""
    q, k, v = tokens
    tensors = dict(zip(("v", "q", "k", "w0", "w1", "w2"), (v, q, k, *weights)))
    rates = dict(zip(("lr0", "lr1", "lr2"), rates))
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

    sizes = {"b*h": q.shape[0], "dk": q.shape[2], "dv": v.shape[2]}
    sizes["l"] = k.shape[1] if any_queries else q.shape[1]
    sizes["dh"] = tensors["w0"].shape[2 if transposed else 1]
    into, out = ("dk, dh", "dh, dv") if transposed else ("dh, dk", "dv, dh")
    layouts = {"k": "l, dk", "v": "l, dv", "w0": into, "w1": out, "w2": into}
    for name, layout in layouts.items():
        shape = tuple(sizes[size] for size in ("b*h", *layout.split(", ")))
        _check_shape(name, tensors[name], f"[b*h, {layout}]", shape)
    shape = (sizes["b*h"], sizes["l"], 1)
    for name, x in rates.items():
        if x.shape[2] != 1:
            raise ValueError(
                f"{name} must have one value per token, [b*h, l, 1] = {shape}: a last axis"
                f" other than 1 (values per channel) is not supported, got {tuple(x.shape)}"
            )
        _check_shape(name, x, "[b*h, l, 1]", shape)


def _check_shape(name: str, x: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have the shape {layout} = {shape}, got {tuple(x.shape)}")
