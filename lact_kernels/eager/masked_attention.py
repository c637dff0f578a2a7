"""Softmax attention under a mask, with its lse, both ways. A row without a finite score has the output 0.

Tensors are `[N, H, rows, D]` and `[N, H, keys, D]`, with one D for q, k and v; the mask is additive,
`[rows, keys]` or `[N, 1, rows, keys]`. On the CPU this is PyTorch's own flash kernel, called one level
below `scaled_dot_product_attention`, which does not hand out the lse. On other devices, whose flash
kernels take no such mask, it is written out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and accumulators: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs in the dtype of q, and lse `[N, H, rows]`."""
    if not q.is_cpu:
        return forward_written_out(q, k, v, mask, scale)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, attn_mask=mask, scale=scale)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if not q.is_cpu:
        return backward_written_out(do, q, k, v, o, lse, mask, scale)
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(do, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale)


def forward_written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(q.dtype)
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale + mask
    lse = scores.logsumexp(dim=-1)
    o = torch.exp(scores - _finite(lse)[..., None]) @ v.to(dtype)
    return o.to(q.dtype), lse


def backward_written_out(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse_dtype(q.dtype)
    do, q, k, v, o = (x.to(dtype) for x in (do, q, k, v, o))
    p = torch.exp((q @ k.mT) * scale + mask - _finite(lse)[..., None])
    delta = (do * o).sum(dim=-1, keepdim=True)
    ds = p * (do @ v.mT - delta) * scale
    return ds @ k, ds.mT @ q, p.mT @ do


def band(rows: int, window_size: int, like: Tensor) -> Tensor:
    """The additive mask `[R, R + W - 1]`: 0 where r <= s < r + W, -inf elsewhere."""
    ones = like.new_ones(rows, rows + window_size - 1, dtype=torch.bool)
    visible = ones.triu().tril(window_size - 1)
    return like.new_zeros(visible.shape).masked_fill_(~visible, -math.inf)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """The same channels, zeros behind them, and a last stride of 1, in place where that is given."""
    x = F.pad(x, (0, channels - x.shape[-1])) if x.shape[-1] < channels else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _finite(lse: Tensor) -> Tensor:
    """The lse, with any finite value where it is -inf: `exp(-inf - x)` is 0 for those."""
    return lse.masked_fill(lse == -math.inf, 0.0)
