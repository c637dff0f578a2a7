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

One program computes one tile of tokens by hidden units. Products take the tokens' dtype and accumulate in
float32, in which everything between two products is; results are rounded to the tokens' dtype.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.configs import TRITON, TTTConfig, capability_of, ttt_config
from lact_kernels.triton.fast_weights import swiglu
from lact_kernels.triton.fast_weights.blocks import (
    of_activations,
    of_tokens,
    of_weights,
    of_weights_in_pairs,
)
from lact_kernels.triton.fast_weights.layout import (
    TOKEN_ARGUMENTS,
    Dims,
    Run,
    dims_constexprs,
    launcher_over_tokens,
)
from lact_kernels.triton.fast_weights.primitives import (
    activation_block,
    dot_columns,
    halves,
    head_weights,
    load_block,
    load_pair,
    store_activations,
    token_block,
    token_tile,
    weight_arguments,
)
from lact_kernels.triton.launch import outer_strides


@triton.jit(do_not_specialize=TOKEN_ARGUMENTS)
def _ttt_hidden_kernel(
    x,  # queries, or keys: a pointer, or without strides a descriptor, as y, weights and acts are then
    y,  # values, or the gradients of outputs; None: only `hidden` is stored
    lr_ptr,  # [3, B, H, T], contiguous, or None for rates of 1
    w0,  # see head_weights
    w1,
    w2,
    acts,  # [3, H, rows, DH], or [1, H, rows, DH]
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
    DESCRIBED: tl.constexpr = x_strides is None
    x_block = token_block(x, x_strides, b, first, h, number, NET.DK)
    w0_block, w1_block, w2_block = head_weights(
        (w0, w1, w2), weight_strides, place, b, h, H, NET, DESCRIBED
    )
    gate = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    gate_up = tl.zeros([BLOCK_T, 2 * BLOCK_H], tl.float32)
    dhidden = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    PAIRED: tl.constexpr = DESCRIBED and w2 is None
    # With w2 alone there is nothing that up has to do with, and with w1 alone nothing that dhidden has.
    UP: tl.constexpr = y is None or NET.W0 or NET.W1
    DHIDDEN: tl.constexpr = y is not None and (NET.W0 or NET.W2)
    ONE_LOOP: tl.constexpr = DHIDDEN and NET.DK == NET.DV
    CHECK_H: tl.constexpr = NET.DH % BLOCK_H != 0
    CHECK_K: tl.constexpr = NET.DK % BLOCK_K != 0
    if DHIDDEN:
        y_block = token_block(y, y_strides, b, first, h, number, NET.DV)
    tl.assume(num_k > 0)  # see dot_rows
    for start in range(0, num_k, BLOCK_K):
        k = load_block(x_block, 0, start, BLOCK_T, BLOCK_K, True, CHECK_K)
        if PAIRED:
            w = load_pair(w0_block, first_unit, start, BLOCK_H, BLOCK_K)
            gate_up = tl.dot(k, tl.trans(w), gate_up, input_precision="ieee")
        else:
            w = load_block(w0_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
            gate = tl.dot(k, tl.trans(w), gate, input_precision="ieee")
            if UP:
                w = load_block(w2_block, first_unit, start, BLOCK_H, BLOCK_K, CHECK_H, CHECK_K)
                up = tl.dot(k, tl.trans(w), up, input_precision="ieee")
        if ONE_LOOP:
            v = load_block(y_block, 0, start, BLOCK_T, BLOCK_K, True, CHECK_K)
            w = load_block(w1_block, start, first_unit, BLOCK_K, BLOCK_H, CHECK_K, CHECK_H)
            dhidden = tl.dot(v, w, dhidden, input_precision="ieee")
    if PAIRED:
        gate, up = halves(gate_up)
    if DHIDDEN and not ONE_LOOP:
        dhidden = dot_columns(
            dhidden, y_block, w1_block, first_unit, num_v, NET.DV, NET.DH, BLOCK_H, BLOCK_K
        )

    out = activation_block(acts, h, row, first_unit, num_rows, H, number, NET, DESCRIBED)
    if y is None:
        store_activations(out, 0, swiglu.hidden(gate, up))
    else:
        lr0 = tl.full([BLOCK_T, 1], 1.0, tl.float32)
        lr2 = lr0
        if lr_ptr is not None:
            tokens = tl.arange(0, BLOCK_T)
            lr_pointers = lr_ptr + (b * H + h) * T + first + tokens
            plane_lr = tl.cast(B, tl.int64) * H * T
            lr0 = tl.load(lr_pointers, mask=tokens < number, other=0.0)[:, None]
            lr2 = tl.load(lr_pointers + 2 * plane_lr, mask=tokens < number, other=0.0)[:, None]
        dgate, hidden, dup = swiglu.gradients(gate, up, dhidden, lr0, lr2)
        if NET.W0:
            store_activations(out, 0, dgate)
        if NET.W1:
            store_activations(out, 1, hidden)
        if NET.W2:
            store_activations(out, 2, dup)


HIDDEN_KERNELS = {TRITON: _ttt_hidden_kernel}


def ttt_hidden(
    x: Tensor,  # queries or keys `[B, T, H, Dk]`
    y: Tensor | None,  # `[B, T, H, Dv]`
    lr: Tensor | None,  # `[3, B, H, T]`
    weights: Tensor | Triple,  # `[places, H, SIZE]`, or three: see weight_arguments
    acts: Tensor,  # `[1, H, rows, Dh]` without y, else `[3, H, rows, Dh]`: written
    dims: Dims,
    described: bool = False,  # see `blocks`
) -> Callable[[Run], None]:
    """The hidden activations of a run of chunks, or what G0, G1 and G2, those of `dims`, have to do with."""
    given = not isinstance(weights, Tensor)
    name = "ttt_hidden" + "_grad" * (y is not None) + "_given" * given
    config = ttt_config(name, x.dtype, capability_of(x.device), described)
    if config.descriptors:
        of_matrices = of_weights if given else of_weights_in_pairs
        columns = config.columns_block
        tensors = (
            of_tokens(x, config.rows_block), of_tokens(y, config.rows_block), lr,
            *of_matrices(weights, dims, columns, columns[::-1]),
            of_activations(acts, (config.block_m, config.block_n)),
        )  # fmt: skip
        all_strides = (None, None, None)
    else:
        matrices, weight_strides = weight_arguments(weights)
        tensors = (x, y, lr, *matrices, acts)
        all_strides = (*outer_strides(x, y), weight_strides)
    return launcher_over_tokens(
        HIDDEN_KERNELS, config, dims.Dh, tensors, all_strides, acts, dims,
        **activation_constexprs(dims, config),
    )  # fmt: skip


def activation_constexprs(dims: Dims, config: TTTConfig) -> dict[str, int]:
    return {
        **dims_constexprs(dims),
        "BLOCK_T": config.block_m,
        "BLOCK_H": config.block_n,
        "BLOCK_K": config.block_k,
    }
