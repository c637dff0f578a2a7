"""`rms_norm_scale_add`, forward and backward in one kernel each: every element is read once.

For each row x of the fast weights' outputs, one fast head of one token, with the means over its channels:

```
    r = 1 / sqrt(mean(x^2) + eps)    h = r x         out = attn + h weight scale
    dh = dout weight scale                           dx = r (dh - h mean(h dh))
    dweight = sum over rows of dout h scale          dscale = <dout, h weight>
```

All is float32 and rounded to the dtype of the memory once. The backward computes r again: it follows
from x, which it reads anyway. The sum over rows is taken in two steps (see `rows`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.triton.configs import (
    TRITON,
    RowConfig,
    row_config,
)
from lact_kernels.triton.launch import (
    launch,
    on_device,
    outer_strides,
    readable_in_place,
    strides,
)
from lact_kernels.triton.layer.rows import (
    BACKWARD_PROGRAMS,
    num_splits,
    row_offsets,
)


@triton.jit
def head_offsets(rows, T, Hf, strides):
    """Where the rows of `[B * T * Hf]` begin, int64; strides are of batch row, token and head."""
    return row_offsets(rows // Hf, T, strides) + (rows % Hf).to(tl.int64) * strides[2]


@triton.jit
def inverse_rms(x, FAST_DIM: tl.constexpr, EPS: tl.constexpr):
    """`[BLOCK_ROWS]`, correctly rounded."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / FAST_DIM + EPS))


@triton.jit
def load_rows(ptr, rows, columns, inside, T, Hf, strides):
    offsets = head_offsets(rows, T, Hf, strides)[:, None] + columns[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "T", "Hf"])
def _rms_norm_scale_add_fwd_kernel(
    attn_ptr,
    ttt_ptr,
    weight_ptr,  # [Df], contiguous
    scale_ptr,  # or None
    out_ptr,  # [B * T * Hf, Df], contiguous
    num_rows,  # B * T * Hf
    T,
    Hf,
    attn_token_strides,  # of batch row and token
    ttt_strides,  # of batch row, token and fast head
    scale_strides,  # likewise
    FAST_DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < FAST_DIM, other=0.0).to(tl.float32)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < num_rows
    inside = real[:, None] & (columns < FAST_DIM)[None, :]
    x = load_rows(ttt_ptr, rows, columns, inside, T, Hf, ttt_strides)
    attn_strides = (attn_token_strides[0], attn_token_strides[1], FAST_DIM)
    attn = load_rows(attn_ptr, rows, columns, inside, T, Hf, attn_strides)
    factor = inverse_rms(x, FAST_DIM, EPS)
    if scale_ptr is not None:
        scale_offsets = head_offsets(rows, T, Hf, scale_strides)
        factor *= tl.load(scale_ptr + scale_offsets, mask=real, other=0.0).to(tl.float32)
    out = attn + x * factor[:, None] * weight[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    out_offsets = rows.to(tl.int64)[:, None] * FAST_DIM + columns[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "T", "Hf"])
def _rms_norm_scale_add_bwd_kernel(
    dout_ptr,
    ttt_ptr,
    weight_ptr,  # [Df], contiguous
    scale_ptr,  # or None
    dttt_ptr,  # [B * T * Hf, Df], contiguous
    dweight_ptr,  # [splits, Df], contiguous: the sums over the rows of one program
    dscale_ptr,  # [B * T * Hf], contiguous, with scale_ptr
    num_rows,  # B * T * Hf
    T,
    Hf,
    dout_token_strides,  # of batch row and token
    ttt_strides,  # of batch row, token and fast head
    scale_strides,  # likewise
    FAST_DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_COLUMNS)
    exists = columns < FAST_DIM
    weight = tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    dout_strides = (dout_token_strides[0], dout_token_strides[1], FAST_DIM)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        real = rows < num_rows
        inside = real[:, None] & exists[None, :]
        x = load_rows(ttt_ptr, rows, columns, inside, T, Hf, ttt_strides)
        dout = load_rows(dout_ptr, rows, columns, inside, T, Hf, dout_strides)
        factor = inverse_rms(x, FAST_DIM, EPS)  # [BLOCK_ROWS]
        h = x * factor[:, None]
        along = tl.sum(dout * weight * h, axis=1)
        if scale_ptr is not None:
            scale_offsets = head_offsets(rows, T, Hf, scale_strides)
            scale = tl.load(scale_ptr + scale_offsets, mask=real, other=0.0).to(tl.float32)
            tl.store(dscale_ptr + rows, along.to(dscale_ptr.dtype.element_ty), mask=real)
            dout *= scale[:, None]
            along *= scale
        dweight += dout * h
        dttt = (dout * weight - h * (along / FAST_DIM)[:, None]) * factor[:, None]
        dttt_offsets = rows.to(tl.int64)[:, None] * FAST_DIM + columns[None, :]
        tl.store(dttt_ptr + dttt_offsets, dttt.to(dttt_ptr.dtype.element_ty), mask=inside)
    tl.store(
        dweight_ptr + tl.program_id(0) * FAST_DIM + columns, tl.sum(dweight, axis=0), mask=exists
    )


FWD_KERNELS = {TRITON: _rms_norm_scale_add_fwd_kernel}
BWD_KERNELS = {TRITON: _rms_norm_scale_add_bwd_kernel}


def rms_norm_scale_add_fwd(
    attn: Tensor,  # [B, T, Hq, D]
    ttt: Tensor,  # [B, T, Hf, Df]
    norm_weight: Tensor,  # [Df]
    scale: Tensor | None,  # [B, T, Hf]
    eps: float,
) -> Tensor:
    """The attention's output plus the normed and scaled one of the fast weights, `[B, T, C]`."""
    B, T, Hf, Df = ttt.shape
    out = ttt.new_empty(B, T, Hf * Df)
    if out.numel() == 0:
        return out
    config = row_config("rms_norm_scale_add_fwd", Df, ttt.dtype)
    attn, ttt = readable_in_place(attn.flatten(2), ttt)
    with on_device(ttt):
        launch(
            FWD_KERNELS, config, (triton.cdiv(B * T * Hf, config.block_m),),
            attn, ttt, norm_weight.contiguous(), scale, out, B * T * Hf, T, Hf,
            *outer_strides(attn, ttt), None if scale is None else strides(scale),
            **constexprs(Df, eps, config),
        )  # fmt: skip
    return out


def rms_norm_scale_add_bwd(
    dout: Tensor,  # [B, T, C]
    ttt: Tensor,
    norm_weight: Tensor,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of ttt, norm_weight and (with scale) scale."""
    B, T, Hf, Df = ttt.shape
    dttt = ttt.new_empty(ttt.shape)
    dscale = None if scale is None else scale.new_empty(scale.shape)
    config = row_config("rms_norm_scale_add_bwd", Df, ttt.dtype)
    splits = num_splits(B * T * Hf, config.block_m, 1, ttt.device, BACKWARD_PROGRAMS)
    dweight = ttt.new_empty(splits, Df, dtype=torch.float32)
    if ttt.numel():
        dout, ttt = readable_in_place(dout, ttt)
        with on_device(ttt):
            launch(
                BWD_KERNELS, config, (splits,),
                dout, ttt, norm_weight.contiguous(), scale, dttt, dweight, dscale,
                B * T * Hf, T, Hf,
                *outer_strides(dout, ttt), None if scale is None else strides(scale),
                **constexprs(Df, eps, config),
            )  # fmt: skip
    dweight = dweight.sum(dim=0).to(norm_weight.dtype)
    return dttt, dweight, [] if scale is None else [dscale]


def constexprs(fast_dim: int, eps: float, config: RowConfig) -> dict:
    """The compile-time arguments of both kernels."""
    return {
        "FAST_DIM": fast_dim,
        "EPS": eps,
        "BLOCK_ROWS": config.block_m,
        "BLOCK_COLUMNS": config.block_n,
    }
