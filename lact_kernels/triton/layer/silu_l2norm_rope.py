"""`silu_l2norm_rope`, forward and backward in one kernel each: every element is read once.

For q and for k, with R the rotation by the angles of a token:

```
    attn = R x                                       z = x scale + offset      a = silu(z) or z
    n = |a|      m = n + 1e-5      u = a / m         fast = R u or u

    du = R^T dfast or dfast                          da = du / m - a <du, a> / (n m^2)    (0 / 0 = 0)
    dz = da silu'(z) or da                           dx = R^T dattn + scale dz
    dscale = sum over tokens of x dz                 doffset = sum over tokens of dz
```

All is float32 and rounded to the dtype of the memory once. The backward computes z, a and n again: they
follow from x, which it reads anyway. The sums over tokens are taken in two steps (see `rows`).

A program's tile holds pairs of channels that are rotated against each other: pair i of a fast head is
channel i % (D / 2) of its attention head i // (D / 2), and the channel D / 2 further on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.silu_l2norm_rope import Gradients, Inputs, Options, Outputs, thirds
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
)
from lact_kernels.triton.layer.rows import (
    BACKWARD_PROGRAMS,
    FORWARD_PROGRAMS,
    num_splits,
    row_offsets,
)
from lact_kernels.triton.primitives import LOG2_E

NORM_EPS = tl.constexpr(1e-5)


@triton.jit
def tile_offsets(rows, T, strides, columns):
    """`[BLOCK_T, BLOCK_PAIRS]`, int64."""
    return row_offsets(rows, T, strides)[:, None] + columns[None, :]


@triton.jit
def program_pairs(Hf, HEAD_DIM: tl.constexpr, FAST_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """The pairs of a program and the channel of each one's first, its first block of tokens, and the step."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0) % Hf
    pairs = tl.arange(0, BLOCK_PAIRS)
    channels = head * FAST_DIM + pairs // HALF * HEAD_DIM + pairs % HALF
    return pairs, channels, tl.program_id(0) // Hf, tl.num_programs(0) // Hf


@triton.jit
def load_pair(ptr, offsets, inside, HALF: tl.constexpr):
    """The tile at `offsets`, and its partners half an attention head further on, in float32."""
    x1 = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def store_pair(ptr, offsets, x1, x2, inside, HALF: tl.constexpr):
    tl.store(ptr + offsets, x1.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + offsets + HALF, x2.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_column(ptr, channels, column, exists, HALF: tl.constexpr):
    """One column of `[C, 2]`, for a row of pairs: two tiles [1, BLOCK_PAIRS]."""
    x1, x2 = load_pair(ptr, channels * 2 + column, exists, 2 * HALF)
    return x1[None, :], x2[None, :]


@triton.jit
def store_sums(ptr, channels, column, x1, x2, exists, HALF: tl.constexpr):
    """The sums over the rows of two tiles, into one column of `[C, 2]`."""
    x1, x2 = tl.sum(x1, axis=0), tl.sum(x2, axis=0)
    store_pair(ptr, channels * 2 + column, x1, x2, exists, 2 * HALF)


@triton.jit
def rotated(x1, x2, cos, sin):
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def activated(z, SILU: tl.constexpr):
    """silu(z) and its derivative, or z and 1.

    The kernels are bound by instructions almost as much as by memory, and `tl.sigmoid` takes eleven of
    them: most take care of denormal numbers, which do not arise. The squared inverse root takes two.
    """
    if SILU:
        root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
        sigmoid = root * root
        silu = z * sigmoid
        return silu, sigmoid + silu * (1 - sigmoid)
    else:
        return z, 1.0


@triton.jit
def row_lengths(a1, a2):
    """Euclidean norms over a fast head, correctly rounded, as all factors of a row are.

    Channels that do not exist count for nothing: scale and offset, and so a, are 0 there.
    """
    return tl.sqrt_rn(tl.sum(a1 * a1 + a2 * a2, axis=1))


@triton.jit(do_not_specialize=["num_tokens", "T", "Hf", "angle_rows"])
def _silu_l2norm_rope_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,  # [C, 2], contiguous
    offset_ptr,  # likewise
    cos_ptr,  # [T, D / 2] or [B * T, D / 2], contiguous
    sin_ptr,  # likewise
    attn_q_ptr,  # [B * T, C], contiguous, like all results
    attn_k_ptr,
    attn_v_ptr,  # or None
    fast_q_ptr,
    fast_k_ptr,
    fast_v_ptr,  # or None
    num_tokens,  # B * T
    T,
    Hf,
    angle_rows,  # of each batch entry: T, or 0 where all have the same
    q_token_strides,  # of batch row and token, like the next two
    k_token_strides,
    v_token_strides,
    HEAD_DIM: tl.constexpr,
    FAST_DIM: tl.constexpr,
    SILU: tl.constexpr,
    ROTATE_FAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs, channels, first_block, step = program_pairs(Hf, HEAD_DIM, FAST_DIM, BLOCK_PAIRS)
    exists = pairs < FAST_DIM // 2
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    part = tl.program_id(1)
    if part < 2:
        if part == 0:
            x_ptr, attn_ptr, fast_ptr = q_ptr, attn_q_ptr, fast_q_ptr
            x_strides = q_token_strides
        else:
            x_ptr, attn_ptr, fast_ptr = k_ptr, attn_k_ptr, fast_k_ptr
            x_strides = k_token_strides
        scale1, scale2 = load_column(scale_ptr, channels, part, exists, HALF)  # [1, BLOCK_PAIRS]
        offset1, offset2 = load_column(offset_ptr, channels, part, exists, HALF)
        angles = pairs % HALF
        for block in range(first_block, num_blocks, step):
            rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
            inside = (rows < num_tokens)[:, None] & exists[None, :]
            angle_offsets = tile_offsets(rows, T, (angle_rows * HALF, HALF), angles)
            cos = tl.load(cos_ptr + angle_offsets, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_PAIRS]
            sin = tl.load(sin_ptr + angle_offsets, mask=inside, other=0.0)
            x_offsets = tile_offsets(rows, T, x_strides, channels)
            out_offsets = rows.to(tl.int64)[:, None] * (Hf * FAST_DIM) + channels[None, :]
            x1, x2 = load_pair(x_ptr, x_offsets, inside, HALF)
            y1, y2 = rotated(x1, x2, cos, sin)
            store_pair(attn_ptr, out_offsets, y1, y2, inside, HALF)
            a1, _ = activated(x1 * scale1 + offset1, SILU)
            a2, _ = activated(x2 * scale2 + offset2, SILU)
            inverse = tl.div_rn(1.0, row_lengths(a1, a2) + NORM_EPS)[:, None]  # [BLOCK_T, 1]
            y1, y2 = a1 * inverse, a2 * inverse
            if ROTATE_FAST:
                y1, y2 = rotated(y1, y2, cos, sin)
            store_pair(fast_ptr, out_offsets, y1, y2, inside, HALF)
    else:
        for block in range(first_block, num_blocks, step):
            rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
            inside = (rows < num_tokens)[:, None] & exists[None, :]
            v_offsets = tile_offsets(rows, T, v_token_strides, channels)
            out_offsets = rows.to(tl.int64)[:, None] * (Hf * FAST_DIM) + channels[None, :]
            v1, v2 = load_pair(v_ptr, v_offsets, inside, HALF)
            if attn_v_ptr is not None:
                store_pair(attn_v_ptr, out_offsets, v1, v2, inside, HALF)
            if fast_v_ptr is not None:
                y1, _ = activated(v1, True)
                y2, _ = activated(v2, True)
                store_pair(fast_v_ptr, out_offsets, y1, y2, inside, HALF)


@triton.jit(do_not_specialize=["num_tokens", "T", "Hf", "angle_rows"])
def _silu_l2norm_rope_bwd_kernel(
    dattn_q_ptr,
    dattn_k_ptr,
    dattn_v_ptr,  # or None
    dfast_q_ptr,
    dfast_k_ptr,
    dfast_v_ptr,  # or None
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,  # [C, 2], contiguous
    offset_ptr,  # likewise
    cos_ptr,  # [T, D / 2] or [B * T, D / 2], contiguous
    sin_ptr,  # likewise
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dscale_ptr,  # [splits, C, 2], contiguous: the sums over the tokens of some programs
    doffset_ptr,  # likewise
    num_tokens,  # B * T
    T,
    Hf,
    angle_rows,  # of each batch entry: T, or 0 where all have the same
    dattn_q_token_strides,  # of batch row and token, like the others
    dattn_k_token_strides,
    dattn_v_token_strides,
    dfast_q_token_strides,
    dfast_k_token_strides,
    dfast_v_token_strides,
    q_token_strides,
    k_token_strides,
    v_token_strides,
    dx_token_strides,  # of dq, dk and dv
    HEAD_DIM: tl.constexpr,
    FAST_DIM: tl.constexpr,
    SILU: tl.constexpr,
    ROTATE_FAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs, channels, first_block, step = program_pairs(Hf, HEAD_DIM, FAST_DIM, BLOCK_PAIRS)
    exists = pairs < FAST_DIM // 2
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    part = tl.program_id(1)
    if part < 2:
        if part == 0:
            x_ptr, dattn_ptr, dfast_ptr, dx_ptr = q_ptr, dattn_q_ptr, dfast_q_ptr, dq_ptr
            x_strides, dattn_strides = q_token_strides, dattn_q_token_strides
            dfast_strides = dfast_q_token_strides
        else:
            x_ptr, dattn_ptr, dfast_ptr, dx_ptr = k_ptr, dattn_k_ptr, dfast_k_ptr, dk_ptr
            x_strides, dattn_strides = k_token_strides, dattn_k_token_strides
            dfast_strides = dfast_k_token_strides
        scale1, scale2 = load_column(scale_ptr, channels, part, exists, HALF)  # [1, BLOCK_PAIRS]
        offset1, offset2 = load_column(offset_ptr, channels, part, exists, HALF)
        angles = pairs % HALF
        dscale1 = tl.zeros([BLOCK_T, BLOCK_PAIRS], tl.float32)
        dscale2, doffset1, doffset2 = dscale1, dscale1, dscale1
        for block in range(first_block, num_blocks, step):
            rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
            inside = (rows < num_tokens)[:, None] & exists[None, :]
            angle_offsets = tile_offsets(rows, T, (angle_rows * HALF, HALF), angles)
            cos = tl.load(cos_ptr + angle_offsets, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_PAIRS]
            sin = tl.load(sin_ptr + angle_offsets, mask=inside, other=0.0)
            x_offsets = tile_offsets(rows, T, x_strides, channels)
            dattn_offsets = tile_offsets(rows, T, dattn_strides, channels)
            dfast_offsets = tile_offsets(rows, T, dfast_strides, channels)
            dx_offsets = tile_offsets(rows, T, dx_token_strides, channels)
            x1, x2 = load_pair(x_ptr, x_offsets, inside, HALF)
            du1, du2 = load_pair(dfast_ptr, dfast_offsets, inside, HALF)
            if ROTATE_FAST:
                du1, du2 = rotated(du1, du2, cos, -sin)
            a1, slope1 = activated(x1 * scale1 + offset1, SILU)
            a2, slope2 = activated(x2 * scale2 + offset2, SILU)
            norm = row_lengths(a1, a2)  # [BLOCK_T]
            length = norm + NORM_EPS
            inverse = tl.div_rn(1.0, length)[:, None]
            along = tl.sum(du1 * a1 + du2 * a2, axis=1)
            shrink = tl.div_rn(along, tl.where(norm > 0, norm * length * length, 1.0))[:, None]
            dz1 = (du1 * inverse - a1 * shrink) * slope1
            dz2 = (du2 * inverse - a2 * shrink) * slope2
            dx1, dx2 = load_pair(dattn_ptr, dattn_offsets, inside, HALF)
            dx1, dx2 = rotated(dx1, dx2, cos, -sin)
            store_pair(dx_ptr, dx_offsets, dx1 + dz1 * scale1, dx2 + dz2 * scale2, inside, HALF)
            dscale1 += x1 * dz1
            dscale2 += x2 * dz2
            doffset1 += dz1
            doffset2 += dz2
        place = first_block.to(tl.int64) * (Hf * FAST_DIM * 2)
        store_sums(dscale_ptr + place, channels, part, dscale1, dscale2, exists, HALF)
        store_sums(doffset_ptr + place, channels, part, doffset1, doffset2, exists, HALF)
    else:
        for block in range(first_block, num_blocks, step):
            rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
            inside = (rows < num_tokens)[:, None] & exists[None, :]
            dv1 = tl.zeros([BLOCK_T, BLOCK_PAIRS], tl.float32)
            dv2 = dv1
            if dattn_v_ptr is not None:
                dattn_offsets = tile_offsets(rows, T, dattn_v_token_strides, channels)
                dv1, dv2 = load_pair(dattn_v_ptr, dattn_offsets, inside, HALF)
            if dfast_v_ptr is not None:
                v1, v2 = load_pair(
                    v_ptr, tile_offsets(rows, T, v_token_strides, channels), inside, HALF
                )
                dfast_offsets = tile_offsets(rows, T, dfast_v_token_strides, channels)
                dy1, dy2 = load_pair(dfast_v_ptr, dfast_offsets, inside, HALF)
                _, slope1 = activated(v1, True)
                _, slope2 = activated(v2, True)
                dv1 += dy1 * slope1
                dv2 += dy2 * slope2
            dx_offsets = tile_offsets(rows, T, dx_token_strides, channels)
            store_pair(dv_ptr, dx_offsets, dv1, dv2, inside, HALF)


FWD_KERNELS = {TRITON: _silu_l2norm_rope_fwd_kernel}
BWD_KERNELS = {TRITON: _silu_l2norm_rope_bwd_kernel}


def silu_l2norm_rope_fwd(inputs: Inputs, options: Options) -> Outputs:
    """The inputs of both branches."""
    qkv, qk_scale, qk_offset, cos, sin = inputs
    Hq, Hf, silu, silu_v, rotate_fast, with_attn_v = options
    q, k, v = thirds(qkv)
    B, T, C = q.shape
    attn_q, attn_k, *attn_v = (q.new_empty(B, T, Hq, C // Hq) for _ in range(2 + with_attn_v))
    fast_q, fast_k, *fast_v = (q.new_empty(B, T, Hf, C // Hf) for _ in range(2 + silu_v))
    outputs = Outputs(attn_q, attn_k, attn_v, fast_q, fast_k, fast_v)
    if q.numel() == 0:
        return outputs
    config = row_config("silu_l2norm_rope_fwd", C // Hf // 2, q.dtype)
    q, k, v = _readable(q, k, v)
    splits = num_splits(B * T, config.block_m, 2 * Hf, q.device, FORWARD_PROGRAMS)
    with on_device(q):
        launch(
            FWD_KERNELS, config, (splits * Hf, 3 if attn_v or fast_v else 2),
            q, k, v, qk_scale.contiguous(), qk_offset.contiguous(), cos.contiguous(), sin.contiguous(),
            attn_q, attn_k, _only(attn_v), fast_q, fast_k, _only(fast_v),
            B * T, T, Hf, _angle_rows(cos), *outer_strides(q, k, v),
            **constexprs(C // Hq, C // Hf, silu, rotate_fast, config),
        )  # fmt: skip
    return outputs


def silu_l2norm_rope_bwd(grads: Outputs, inputs: Inputs, options: Options) -> Gradients:
    """Those of q, k and v laid out as they are, so that they need not be joined afterwards."""
    qkv, qk_scale, qk_offset, cos, sin = inputs
    Hq, Hf, silu, _, rotate_fast, _ = options
    q, k, v = thirds(qkv)
    B, T, C = q.shape
    dqkv = [x.new_empty(x.shape) for x in qkv]
    config = row_config("silu_l2norm_rope_bwd", C // Hf // 2, q.dtype)
    splits = num_splits(B * T, config.block_m, 2 * Hf, q.device, BACKWARD_PROGRAMS)
    dscale, doffset = (q.new_empty(splits, C, 2, dtype=torch.float32) for _ in range(2))
    if q.numel():
        dq, dk, dv = thirds(dqkv)
        grads = (_only(x) if isinstance(x, list) else x for x in grads)
        tensors = _readable(*(x if x is None else x.flatten(2) for x in grads), q, k, v)
        with on_device(q):
            launch(
                BWD_KERNELS, config, (splits * Hf, 3),
                *tensors, qk_scale.contiguous(), qk_offset.contiguous(),
                cos.contiguous(), sin.contiguous(), dq, dk, dv, dscale, doffset,
                B * T, T, Hf, _angle_rows(cos), *outer_strides(*tensors, dq),
                **constexprs(C // Hq, C // Hf, silu, rotate_fast, config),
            )  # fmt: skip
    dscale, doffset = dscale.sum(dim=0), doffset.sum(dim=0)
    return Gradients(dqkv, dscale.to(qk_scale.dtype), doffset.to(qk_offset.dtype))


def _only(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _readable(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else readable_in_place(x)[0] for x in tensors]


def _angle_rows(cos: Tensor) -> int:
    return 0 if cos.shape[0] == 1 else cos.shape[1]


def constexprs(
    head_dim: int, fast_dim: int, silu: bool, rotate_fast: bool, config: RowConfig
) -> dict:
    """The compile-time arguments of both kernels."""
    return {
        "HEAD_DIM": head_dim,
        "FAST_DIM": fast_dim,
        "SILU": silu,
        "ROTATE_FAST": rotate_fast,
        "BLOCK_T": config.block_m,
        "BLOCK_PAIRS": config.block_n,
    }
