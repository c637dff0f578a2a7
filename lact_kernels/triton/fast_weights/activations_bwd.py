"""Backward of `activations` with keys and values, from the gradients dG0, dG1, dG2 of the weight gradients.

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

from lact_kernels.triton.configs import TRITON, capability_of, ttt_config
from lact_kernels.triton.fast_weights import swiglu
from lact_kernels.triton.fast_weights.activations import activation_constexprs
from lact_kernels.triton.fast_weights.blocks import (
    of_activations,
    of_tokens,
    of_weights_in_pairs,
)
from lact_kernels.triton.fast_weights.layout import (
    TOKEN_ARGUMENTS,
    Dims,
    Run,
    launcher_over_tokens,
)
from lact_kernels.triton.fast_weights.primitives import (
    GRADIENT_BITS,
    activation_block,
    halves,
    head_weights,
    load_block,
    load_pair,
    power_of_two,
    store_activations,
    token_block,
    token_tile,
)
from lact_kernels.triton.launch import outer_strides


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_hidden_bwd_kernel(
    k,  # a pointer, or without strides a descriptor, as v, weights, acts and dacts are then
    v,
    lr_ptr,  # [3, B, H, T], contiguous
    w0,  # see head_weights
    w1,
    w2,
    dg0,  # likewise the gradients of the weight gradients
    dg1,
    dg2,
    units_ptr,  # [places, H, 4]: their units, and written: that of dacts; or None
    reach_ptr,  # [B, H, 3], with units
    acts,  # [3, H, rows, DH]: as the forward stores them
    dacts,  # [3, H, rows, DH]: what reaches gate, dhidden and up
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
    DESCRIBED: tl.constexpr = k_strides is None
    k_block = token_block(k, k_strides, b, first, h, number, NET.DK)
    v_block = token_block(v, v_strides, b, first, h, number, NET.DV)
    w0_block, w1_block, w2_block = head_weights((w0, w1, w2), None, place, b, h, H, NET, DESCRIBED)
    dg0_block, dg1_block, dg2_block = head_weights(
        (dg0, dg1, dg2), None, place, b, h, H, NET, DESCRIBED
    )
    gate = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    gate_up = tl.zeros([BLOCK_T, 2 * BLOCK_H], tl.float32)
    dhidden = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dgate_k = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dup_k = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dgate_dup_k = tl.zeros([BLOCK_T, 2 * BLOCK_H], tl.float32)
    hidden_v = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    CHECK_H: tl.constexpr = NET.DH % BLOCK_H != 0
    CHECK_K: tl.constexpr = NET.DK % BLOCK_K != 0
    CHECK_V: tl.constexpr = NET.DV % BLOCK_K != 0
    # One loop for all products, or one with k and one with v: where their widths differ, and by pointers,
    # which take registers.
    ONE_LOOP: tl.constexpr = DESCRIBED and NET.DK == NET.DV
    tl.assume(num_k > 0)  # see dot_rows
    for start in range(0, num_k, BLOCK_K):
        x = load_block(k_block, 0, start, BLOCK_T, BLOCK_K, True, CHECK_K)
        if DESCRIBED:
            w = load_pair(w0_block, first_unit, start, BLOCK_H, BLOCK_K)
            gate_up = tl.dot(x, tl.trans(w), gate_up, input_precision="ieee")
            if NET.W0 or NET.W2:
                w = load_pair(dg0_block, first_unit, start, BLOCK_H, BLOCK_K)
                dgate_dup_k = tl.dot(x, tl.trans(w), dgate_dup_k, input_precision="ieee")
        else:
            w = load_block(w0_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
            gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
            if NET.W0 or NET.W1:
                w = load_block(w2_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
                up = tl.dot(x, tl.trans(w), up, input_precision="ieee")
            if NET.W0:
                w = load_block(dg0_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
                dgate_k = tl.dot(x, tl.trans(w), dgate_k, input_precision="ieee")
            if NET.W2:
                w = load_block(dg2_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
                dup_k = tl.dot(x, tl.trans(w), dup_k, input_precision="ieee")
        if ONE_LOOP:
            dhidden, hidden_v = _add_products_with_values(
                dhidden, hidden_v, v_block, w1_block, dg1_block, start, first_unit,
                NET, BLOCK_K, CHECK_V, CHECK_H,
            )  # fmt: skip
    if not ONE_LOOP:
        tl.assume(num_v > 0)
        for start in range(0, num_v, BLOCK_K):
            dhidden, hidden_v = _add_products_with_values(
                dhidden, hidden_v, v_block, w1_block, dg1_block, start, first_unit,
                NET, BLOCK_K, CHECK_V, CHECK_H,
            )  # fmt: skip

    if DESCRIBED:
        gate, up = halves(gate_up)
        # Gradients of matrices that are not trained are not written.
        dgate, dup = halves(dgate_dup_k)
        if NET.W0:
            dgate_k = dgate
        if NET.W2:
            dup_k = dup

    tokens = tl.arange(0, BLOCK_T)
    plane_lr = tl.cast(B, tl.int64) * H * T
    lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
    lr0 = tl.load(lr_pointers, mask=tokens < number, other=0.0)[:, None]
    lr1 = tl.load(lr_pointers + plane_lr, mask=tokens < number, other=0.0)[:, None]
    lr2 = tl.load(lr_pointers + 2 * plane_lr, mask=tokens < number, other=0.0)[:, None]
    rate0, rate1, rate2 = lr0, lr1, lr2
    if units_ptr is not None:
        rate0 *= tl.div_rn(unit0, unit)
        rate1 *= tl.div_rn(unit1, unit)
        rate2 *= tl.div_rn(unit2, unit)
    dgate, hidden, dup, dlr0, dlr1, dlr2, through_gate, through_dhidden, through_up = (
        swiglu.gradients_bwd(
            (gate, up, dhidden), (dgate_k, dup_k, hidden_v), (lr0, lr1, lr2), (rate0, rate1, rate2)
        )
    )
    # Units beyond DH are zero in every product.
    dlr0, dlr1, dlr2 = tl.sum(dlr0, axis=1), tl.sum(dlr1, axis=1), tl.sum(dlr2, axis=1)
    if units_ptr is not None:
        dlr0, dlr1, dlr2 = dlr0 * unit0, dlr1 * unit1, dlr2 * unit2
    rows_total = tl.cast(num_rows, tl.int64) * H
    dlr_ptr += tl.cast(first_unit // BLOCK_H, tl.int64) * 3 * rows_total + h * num_rows + row
    out = activation_block(acts, h, row, first_unit, num_rows, H, number, NET, DESCRIBED)
    dout = activation_block(dacts, h, row, first_unit, num_rows, H, number, NET, DESCRIBED)
    if NET.W0:
        tl.store(dlr_ptr + tokens, dlr0, mask=tokens < number)
        store_activations(out, 0, dgate)
    if NET.W1:
        tl.store(dlr_ptr + rows_total + tokens, dlr1, mask=tokens < number)
        store_activations(out, 1, hidden)
    if NET.W2:
        tl.store(dlr_ptr + 2 * rows_total + tokens, dlr2, mask=tokens < number)
        store_activations(out, 2, dup)
    store_activations(dout, 0, through_gate)
    if NET.W0 or NET.W2:
        store_activations(dout, 1, through_dhidden)
    if NET.W0 or NET.W1:
        store_activations(dout, 2, through_up)


@triton.jit
def _add_products_with_values(
    dhidden, hidden_v, v_block, w1_block, dg1_block, start, first_unit,
    NET: tl.constexpr, BLOCK_K: tl.constexpr, CHECK_V: tl.constexpr, CHECK_H: tl.constexpr,
):  # fmt: skip
    """Those of BLOCK_K channels of v, from `start` on, with w1 and with the gradient of its gradient."""
    BLOCK_T: tl.constexpr = dhidden.shape[0]
    BLOCK_H: tl.constexpr = dhidden.shape[1]
    y = load_block(v_block, 0, start, BLOCK_T, BLOCK_K, True, CHECK_V)
    if NET.W0 or NET.W2:
        w = load_block(w1_block, start, first_unit, BLOCK_K, BLOCK_H, CHECK_V, CHECK_H)
        dhidden = tl.dot(y, w, dhidden, input_precision="ieee")
    if NET.W1:
        w = load_block(dg1_block, start, first_unit, BLOCK_K, BLOCK_H, CHECK_V, CHECK_H)
        hidden_v = tl.dot(y, w, hidden_v, input_precision="ieee")
    return dhidden, hidden_v


HIDDEN_BWD_KERNELS = {TRITON: _ttt_hidden_bwd_kernel}


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
    described: bool = False,  # see `blocks`
) -> Callable[[Run], None]:
    """Backward of `ttt_hidden` with keys and values, which it computes again."""
    config = ttt_config("ttt_hidden_bwd", k.dtype, capability_of(k.device), described)
    tensors = (k, v, lr, weights, None, None, dsteps, None, None, units, reach, acts, dacts, dlr)
    all_strides = tuple(outer_strides(k, v))
    if config.descriptors:
        columns, out = config.columns_block, (config.block_m, config.block_n)
        tensors = (
            of_tokens(k, config.rows_block), of_tokens(v, config.rows_block), lr,
            *of_weights_in_pairs(weights, dims, columns, columns[::-1]),
            *of_weights_in_pairs(dsteps, dims, columns, columns[::-1]),
            units, reach, of_activations(acts, out), of_activations(dacts, out), dlr,
        )  # fmt: skip
        all_strides = (None, None)
    return launcher_over_tokens(
        HIDDEN_BWD_KERNELS, config, dims.Dh, tensors, all_strides, acts, dims,
        **activation_constexprs(dims, config),
    )  # fmt: skip


def num_rate_tiles(k: Tensor, dims: Dims, described: bool) -> int:
    """Partial sums of each learning rate's gradient: one for each tile of hidden units."""
    config = ttt_config("ttt_hidden_bwd", k.dtype, capability_of(k.device), described)
    return -(-dims.Dh // config.block_n)
