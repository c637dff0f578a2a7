"""What lies between the products of the fast network: hidden activations, and their gradients.

Forward, for queries (apply) or keys and values (update), tokens in rows:

```
    gate = x w0^T     up = x w2^T     hidden = silu(gate) up                        (apply: stored)
    dhidden = y w1    dup = dhidden silu(gate)    dgate = dhidden up silu'(gate)
    stored: lr0 dgate, hidden, lr2 dup
```

These three are what the gradients of w0, w1 and w2 have to do with: G0 = (lr0 dgate)^T x,
G1 = (lr1 y)^T hidden, G2 = (lr2 dup)^T x. (lr1 hidden would often be subnormal in float16.) The same kernel
without learning rates, on queries and the outputs' gradients, is the backward of apply. Of an update those of
matrices that are not trained are neither stored nor, where no other needs them, computed.

Backward of the update, from the gradients dG0, dG1, dG2 of the three weight gradients:

```
    dgate_x = x dG0^T    dup_x = x dG2^T    hidden_y = y dG1
    dlr0 = rowsum(dgate_x dgate)    dlr1 = rowsum(hidden_y hidden)    dlr2 = rowsum(dup_x dup)
```

and with dgate_x, dup_x, hidden_y now times their learning rates, the chain rule gives what reaches

```
    gate      dgate_x dhidden up silu''(gate) + (dup_x dhidden + hidden_y up) silu'(gate)
    dhidden   dup_x silu(gate) + dgate_x up silu'(gate)
    up        dgate_x dhidden silu'(gate) + hidden_y silu(gate)
```

Without the terms of a matrix that is not trained: with w1 alone nothing reaches dhidden, with w2 alone
nothing reaches up, and neither is computed.

One program computes one tile of tokens by hidden units. Products take the tokens' dtype and accumulate in
float32, in which everything between two products is; results are rounded to the tokens' dtype.

Where dG0, dG1 and dG2 come in units (see `ttt_update_bwd`), so do the last three results: in one that brings
all of the chunk and head to at most 2^15. It comes from the bound |dG x| <= |dG|_F |x|, and what that
can do to one of the three with |dG|_F = 1 is their *reach*: with w the longest row of w0, w1 and w2, so that
|gate| and |up| <= w |x| and |dhidden| <= w sqrt(Dv) |y|,

    max over tokens of     lr w |x| (|x| + sqrt(Dv) |y| + w |x| sqrt(Dv) |y|)
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.configs import TRITON, TTTConfig, capability_of, ttt_config
from lact_kernels.triton.fast_weights.layout import (
    TOKEN_ARGUMENTS,
    Dims,
    Run,
    dims_constexprs,
    launcher_over_tokens,
)
from lact_kernels.triton.fast_weights.primitives import (
    GRADIENT_BITS,
    dot_columns,
    dot_rows,
    head_weights,
    power_of_two,
    token_pointers,
    token_tile,
    weight_arguments,
)
from lact_kernels.triton.launch import outer_strides
from lact_kernels.triton.primitives import load_rows


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_hidden_kernel(
    x_ptr,  # queries, or keys
    y_ptr,  # values, or the gradients of outputs; None: only `hidden` is stored
    lr_ptr,  # [3, B, H, T], contiguous, or None for rates of 1
    weights_ptr,  # [places, H, SIZE], or with strides three: see head_weights
    acts_ptr,  # [3, H, rows, DH], or [1, H, rows, DH]
    table_ptr,  # tokens of packed chunks, or None
    place,
    first_chunk,
    first_row,
    B,
    T,
    shift,
    chunk_size,
    width,
    num_rows,
    H,
    num_k,
    num_v,
    num_h,
    x_strides,  # of batch row, token and head, like the next
    y_strides,
    weight_strides,
    NET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, h, first_unit, b, first, row, number = token_tile(
        table_ptr,
        place,
        first_chunk,
        first_row,
        B,
        T,
        shift,
        chunk_size,
        width,
        H,
        NET.DH,
        BLOCK_T,
        BLOCK_H,
    )
    if number <= 0:
        return
    tokens = tl.arange(0, BLOCK_T)
    units = first_unit + tl.arange(0, BLOCK_H)
    w0_ptr, w1_ptr, w2_ptr = head_weights(weights_ptr, weight_strides, place, b, h, H, NET)
    x_pointers = token_pointers(x_ptr, x_strides, b, first, h, tokens)
    gate = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    # With w2 alone there is nothing that up has to do with.
    UP: tl.constexpr = y_ptr is None or NET.W0 or NET.W1
    gate, up = dot_rows(
        gate, up, x_pointers, tokens, number, w0_ptr, w2_ptr if UP else None, units, num_k,
        NET.DK, NET.DH, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    plane = tl.cast(num_rows, tl.int64) * H * NET.DH
    acts_ptr += (h * num_rows + row) * NET.DH
    offsets = tokens[:, None] * NET.DH + units[None, :]
    inside = (tokens < number)[:, None] & (units < NET.DH)[None, :]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if y_ptr is None:
        tl.store(acts_ptr + offsets, (silu * up).to(acts_ptr.dtype.element_ty), mask=inside)
    else:
        y_pointers = token_pointers(y_ptr, y_strides, b, first, h, tokens)
        dhidden = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        if NET.W0 or NET.W2:
            dhidden, _ = dot_columns(
                dhidden, dhidden, y_pointers, tokens, number, w1_ptr, None, units, num_v,
                NET.DV, NET.DH, BLOCK_H, BLOCK_K,
            )  # fmt: skip
        dgate = dhidden * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        hidden = silu * up
        dup = dhidden * silu
        if lr_ptr is not None:
            lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
            plane_lr = tl.cast(B, tl.int64) * H * T
            lr0 = tl.load(lr_pointers, mask=tokens < number, other=0.0)
            lr2 = tl.load(lr_pointers + 2 * plane_lr, mask=tokens < number, other=0.0)
            dgate *= lr0[:, None]
            dup *= lr2[:, None]
        if NET.W0:
            tl.store(acts_ptr + offsets, dgate.to(acts_ptr.dtype.element_ty), mask=inside)
        if NET.W1:
            tl.store(acts_ptr + plane + offsets, hidden.to(acts_ptr.dtype.element_ty), mask=inside)
        if NET.W2:
            tl.store(acts_ptr + 2 * plane + offsets, dup.to(acts_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_hidden_bwd_kernel(
    k_ptr,
    v_ptr,
    lr_ptr,  # [3, B, H, T], contiguous
    weights_ptr,  # [places, H, SIZE]
    dsteps_ptr,  # [places, H, SIZE]: gradients of the weight gradients
    units_ptr,  # [places, H, 4]: their units, and written: that of dacts; or None
    reach_ptr,  # [B, H, 3], with units
    acts_ptr,  # [3, H, rows, DH]: as the forward stores them
    dacts_ptr,  # [3, H, rows, DH]: what reaches gate, dhidden and up
    dlr_ptr,  # [tiles of DH, 3, H, rows]: partial sums
    table_ptr,
    place,
    first_chunk,
    first_row,
    B,
    T,
    shift,
    chunk_size,
    width,
    num_rows,
    H,
    num_k,
    num_v,
    num_h,
    k_strides,  # of batch row, token and head, like the next
    v_strides,
    NET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, h, first_unit, b, first, row, number = token_tile(
        table_ptr,
        place,
        first_chunk,
        first_row,
        B,
        T,
        shift,
        chunk_size,
        width,
        H,
        NET.DH,
        BLOCK_T,
        BLOCK_H,
    )
    if units_ptr is not None:
        units_ptr += (place * H + h) * 4
        reach_ptr += (b * H + h) * 3
        unit0, unit1, unit2 = tl.load(units_ptr), tl.load(units_ptr + 1), tl.load(units_ptr + 2)
        reach = unit0 * tl.load(reach_ptr) + unit1 * tl.load(reach_ptr + 1)
        reach += unit2 * tl.load(reach_ptr + 2)
        # 1.2 for silu', which is up to 1.1, and what is rounded.
        unit = power_of_two(reach * (1.2 * 2.0 ** (GRADIENT_BITS - 15)))
        if tl.program_id(0) % (tl.cdiv(NET.DH, BLOCK_H) * tl.cdiv(width, BLOCK_T)) == 0:
            tl.store(units_ptr + 3, unit)
    if number <= 0:
        return
    tokens = tl.arange(0, BLOCK_T)
    units = first_unit + tl.arange(0, BLOCK_H)
    matrices = (place * H + h) * NET.SIZE
    w_ptr = weights_ptr + matrices
    dg_ptr = dsteps_ptr + matrices
    k_pointers = token_pointers(k_ptr, k_strides, b, first, h, tokens)
    v_pointers = token_pointers(v_ptr, v_strides, b, first, h, tokens)

    CHECK: tl.constexpr = NET.DH % BLOCK_H != 0
    gate = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dhidden = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dgate_k = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dup_k = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    hidden_v = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    # One loop for all four products with k, which is loaded once for them. It is never skipped: see dot_rows.
    tl.assume(num_k > 0)
    for start in range(0, num_k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        k = load_rows(k_pointers + inner[None, :], tokens, number, inner, NET.DK, BLOCK_K, True)
        offsets = units[:, None] * NET.DK + inner[None, :]
        w0 = load_rows(w_ptr + offsets, units, NET.DH, inner, NET.DK, BLOCK_K, CHECK)
        gate = tl.dot(k, tl.trans(w0), gate, input_precision="ieee")
        if NET.W0 or NET.W1:
            w2 = load_rows(
                w_ptr + NET.OFFSET2 + offsets, units, NET.DH, inner, NET.DK, BLOCK_K, CHECK
            )
            up = tl.dot(k, tl.trans(w2), up, input_precision="ieee")
        if NET.W0:
            dg0 = load_rows(dg_ptr + offsets, units, NET.DH, inner, NET.DK, BLOCK_K, CHECK)
            dgate_k = tl.dot(k, tl.trans(dg0), dgate_k, input_precision="ieee")
        if NET.W2:
            dg2 = load_rows(
                dg_ptr + NET.OFFSET2 + offsets, units, NET.DH, inner, NET.DK, BLOCK_K, CHECK
            )
            dup_k = tl.dot(k, tl.trans(dg2), dup_k, input_precision="ieee")
    if NET.W0 or NET.W2:
        dhidden, hidden_v = dot_columns(
            dhidden, hidden_v, v_pointers, tokens, number, w_ptr + NET.OFFSET1,
            dg_ptr + NET.OFFSET1 if NET.W1 else None, units, num_v, NET.DV, NET.DH, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        hidden_v, _ = dot_columns(
            hidden_v, hidden_v, v_pointers, tokens, number, dg_ptr + NET.OFFSET1, None, units, num_v,
            NET.DV, NET.DH, BLOCK_H, BLOCK_K,
        )  # fmt: skip

    plane_lr = tl.cast(B, tl.int64) * H * T
    lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
    lr0 = tl.load(lr_pointers, mask=tokens < number, other=0.0)[:, None]
    lr1 = tl.load(lr_pointers + plane_lr, mask=tokens < number, other=0.0)[:, None]
    lr2 = tl.load(lr_pointers + 2 * plane_lr, mask=tokens < number, other=0.0)[:, None]
    rows_total = tl.cast(num_rows, tl.int64) * H
    plane = rows_total * NET.DH
    first_element = (h * num_rows + row) * NET.DH
    offsets = tokens[:, None] * NET.DH + units[None, :]
    inside = (tokens < number)[:, None] & (units < NET.DH)[None, :]
    acts_ptr += first_element
    dacts_ptr += first_element
    dlr_ptr += tl.cast(first_unit // BLOCK_H, tl.int64) * 3 * rows_total + h * num_rows + row

    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # silu'
    bend = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # silu''
    hidden = silu * up
    dup = dhidden * silu
    dgate = dhidden * up * slope
    # Units beyond DH are zero in every product.
    dlr0 = tl.sum(dgate_k * dgate, axis=1)
    dlr1 = tl.sum(hidden_v * hidden, axis=1)
    dlr2 = tl.sum(dup_k * dup, axis=1)
    if units_ptr is not None:
        dlr0, dlr1, dlr2 = dlr0 * unit0, dlr1 * unit1, dlr2 * unit2
    dtype = acts_ptr.dtype.element_ty
    if NET.W0:
        tl.store(dlr_ptr + tokens, dlr0, mask=tokens < number)
        tl.store(acts_ptr + offsets, (lr0 * dgate).to(dtype), mask=inside)
    if NET.W1:
        tl.store(dlr_ptr + rows_total + tokens, dlr1, mask=tokens < number)
        tl.store(acts_ptr + plane + offsets, hidden.to(dtype), mask=inside)
    if NET.W2:
        tl.store(dlr_ptr + 2 * rows_total + tokens, dlr2, mask=tokens < number)
        tl.store(acts_ptr + 2 * plane + offsets, (lr2 * dup).to(dtype), mask=inside)

    if units_ptr is not None:
        lr0 *= tl.div_rn(unit0, unit)
        lr1 *= tl.div_rn(unit1, unit)
        lr2 *= tl.div_rn(unit2, unit)
    dgate_k *= lr0
    hidden_v *= lr1
    dup_k *= lr2
    through_gate = dgate_k * dhidden * up * bend + (dup_k * dhidden + hidden_v * up) * slope
    tl.store(dacts_ptr + offsets, through_gate.to(dtype), mask=inside)
    if NET.W0 or NET.W2:
        through_dhidden = dup_k * silu + dgate_k * up * slope
        tl.store(dacts_ptr + plane + offsets, through_dhidden.to(dtype), mask=inside)
    if NET.W0 or NET.W1:
        through_up = dgate_k * dhidden * slope + hidden_v * silu
        tl.store(dacts_ptr + 2 * plane + offsets, through_up.to(dtype), mask=inside)


HIDDEN_KERNELS = {TRITON: _ttt_hidden_kernel}
HIDDEN_BWD_KERNELS = {TRITON: _ttt_hidden_bwd_kernel}


def ttt_hidden(
    x: Tensor,  # queries or keys `[B, T, H, Dk]`
    y: Tensor | None,  # `[B, T, H, Dv]`
    lr: Tensor | None,  # `[3, B, H, T]`
    weights: Tensor | Triple,  # `[places, H, SIZE]`, or three: see weight_arguments
    acts: Tensor,  # `[1, H, rows, Dh]` without y, else `[3, H, rows, Dh]`: written
    dims: Dims,
) -> Callable[[Run], None]:
    """The hidden activations of a run of chunks, or what G0, G1 and G2, those of `dims`, have to do with."""
    weights, weight_strides = weight_arguments(weights)
    name = "ttt_hidden" if weight_strides is None else "ttt_hidden_given"
    if y is not None:
        name = "ttt_hidden_grad"
    config = ttt_config(name, x.dtype, capability_of(x.device))
    return launcher_over_tokens(
        HIDDEN_KERNELS, config, dims.Dh, (x, y, lr, weights, acts),
        (*outer_strides(x, y), weight_strides), acts, dims, **activation_constexprs(dims, config),
    )  # fmt: skip


def ttt_hidden_bwd(
    k: Tensor,  # `[B, T, H, Dk]`
    v: Tensor,  # `[B, T, H, Dv]`
    lr: Tensor,  # `[3, B, H, T]`
    weights: Tensor,  # `[places, H, SIZE]`
    dsteps: Tensor,  # `[places, H, SIZE]`
    acts: Tensor,  # `[3, H, rows, Dh]`: written, like dacts and dlr
    dacts: Tensor,  # `[3, H, rows, Dh]`
    dlr: Tensor,  # `[tiles, 3, H, rows]`: partial sums, float32
    dims: Dims,
    units: Tensor | None = None,  # `[places, H, 4]`: of dsteps, or 0, and written: that of dacts
    reach: Tensor | None = None,  # `[B, H, 3]`, with units
) -> Callable[[Run], None]:
    """Backward of `ttt_hidden` with keys and values, which it computes again."""
    config = ttt_config("ttt_hidden_bwd", k.dtype, capability_of(k.device))
    return launcher_over_tokens(
        HIDDEN_BWD_KERNELS, config, dims.Dh,
        (k, v, lr, weights, dsteps, units, reach, acts, dacts, dlr),
        tuple(outer_strides(k, v)), acts, dims, **activation_constexprs(dims, config),
    )  # fmt: skip


def num_rate_tiles(k: Tensor, dims: Dims) -> int:
    """Partial sums of each learning rate's gradient: one for each tile of hidden units."""
    config = ttt_config("ttt_hidden_bwd", k.dtype, capability_of(k.device))
    return -(-dims.Dh // config.block_n)


def activation_constexprs(dims: Dims, config: TTTConfig) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        "BLOCK_T": config.block_m,
        "BLOCK_H": config.block_n,
        "BLOCK_K": config.block_k,
    }
