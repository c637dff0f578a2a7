"""`window_attn`, backward from the lse: two deterministic passes and no atomics.

```
    P = exp(S * scale - lse)      delta = rowsum(dO * O) - dlse      dS = P * (dO V^T - delta)
    dQ = scale * dS K             dV = P^T dO                        dK = scale * dS^T Q
```

With a soft cap S is a tanh (see `softmax`), and dS has its derivative, 1 - S^2, as one more factor. A sink
has the probability `exp(sink - lse)` in each row of its head, and a dP of 0: the dq pass leaves its dS for
each row, and the gradient is their sum.

The dq pass walks the key tiles that a tile of queries sees, as the forward does, and leaves the
row statistics (lse and `delta`) for the other. The dk/dv pass walks the query tiles that see a tile
of keys, for each query head of its kv head. Each pass has one loop over its tiles, from left to right, so
that its pipeline fills once; only tiles at the diagonal and at the window's edge take the branch that masks
P (masked scores would make the compiler pack the bits of a mask, to unpack them again). Where the two
accumulators do not fit in registers (head dims beyond 128 on sm_90), dk and dv have a launch each, and the
scores are computed twice. The transposed products are computed directly, `S^T = K Q^T`: a transposed matrix
product that feeds another one is miscompiled on Hopper.

Both products of inputs, S and dO V^T, are issued before the exponentials, which run beside the second.

For float32 inputs P is divided by the sums of its rows, which the dq pass finds on its way and leaves
for the other: the rounding of a large lse is a relative error of P, the same for a whole row.

Products take the input dtype and accumulate in float32 (for float32 input they are full float32 products,
without tensor cores); P and dS are rounded to the input dtype for their second product. Everything is read
in place, and nothing saved by the forward is written.
"""

from typing import Any

import torch
from torch import Tensor

from lact_kernels.core.attention import AttentionOptions
from lact_kernels.triton.configs import (
    TRITON,
    KernelConfig,
    capability_of,
    kernel_config,
)
from lact_kernels.triton.descriptors import aligned_strides, attention_descriptors
from lact_kernels.triton.launch import (
    launch,
    on_device,
    outer_strides,
    packing_arguments,
    positive_scale,
    readable_in_place,
)
from lact_kernels.triton.primitives import Sizes, num_tile_slots
from lact_kernels.triton.window_attn.bwd_dkv import _window_attn_bwd_dkv_kernel
from lact_kernels.triton.window_attn.bwd_dq import _window_attn_bwd_dq_kernel

DQ_KERNELS = {TRITON: _window_attn_bwd_dq_kernel}
DKV_KERNELS = {TRITON: _window_attn_bwd_dkv_kernel}


def window_attn_bwd(
    do: Tensor,  # [B, Tq, Hq, Dv]
    dlse: Tensor | None,  # [B, Hq, Tq]
    q: Tensor,  # [B, Tq, Hq, D]
    k: Tensor,  # [B, Tk, Hkv, D]
    v: Tensor,  # [B, Tk, Hkv, Dv]
    o: Tensor,  # [B, Tq, Hq, Dv]
    lse: Tensor,  # [B, Hq, Tq]
    options: AttentionOptions,  # with both limits
    sinks: Tensor | None = None,  # [B, Hq], float32
    cu_seqlens_q: Tensor | None = None,  # [N + 1], int32, contiguous, with B = 1; likewise:
    cu_seqlens_k: Tensor | None = None,
    *,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients `(dq, dk, dv, dsinks)` in the shapes and dtypes of q, k, v and sinks, contiguous.

    Without sinks the last is empty. The lse is that of the forward, in which they count. `config` overrides
    the table for both passes.
    """
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if do.numel() == 0:
        dsinks = lse.new_zeros(0 if sinks is None else sinks.shape)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    q, sign, softmax_scale, bend = positive_scale(q, options)
    q, k, v, o, do = readable_in_place(q, k, v, o, do)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    capability = capability_of(q.device)
    tensors, strides = (q, k, v), list(map(aligned_strides, (q, k, v)))
    described = cu_seqlens_q is None and None not in strides
    row, softcap = (D, Dv, q.dtype, capability), bend is not None
    dq_config = config or kernel_config("window_attn_bwd_dq", *row, described, softcap)
    dkv_config = config or kernel_config("window_attn_bwd_dkv", *row, softcap=softcap)
    stats = lse.new_empty(B, Hq, _num_stats(q.dtype), Tq)
    sinks_ds = None if sinks is None else lse.new_empty(B, Hq, Tq)
    packing = packing_arguments(cu_seqlens_q, cu_seqlens_k, q.device)
    window = (options.width, options.right or None)
    sizes = (*packing, softmax_scale, bend, *window, Tq, Tk, Hq, Hkv)
    query_slots = num_tile_slots(Tq, packing[-1], dq_config.block_m)
    key_slots = num_tile_slots(Tk, packing[-1], dkv_config.block_n)
    if dq_config.descriptors:
        tensors = attention_descriptors(tensors, strides, Sizes.of(D, Dv, dq_config))
        strides = (None, None, None)
    else:
        strides = outer_strides(*tensors)
    with on_device(q):
        launch(
            DQ_KERNELS, dq_config, (query_slots * B * Hq,),
            *tensors, o, do, lse, dlse, sinks, stats, dq, sinks_ds, *sizes,
            *strides, *outer_strides(o, do, dq), **_dq_constexprs(D, Dv, q.dtype, dq_config),
        )  # fmt: skip
        for owned in _owned(dkv_config):
            launch(
                DKV_KERNELS, dkv_config, (key_slots * B * Hkv,),
                q, k, v, do, stats, dk, dv, *sizes, *outer_strides(q, k, v, do, dk, dv),
                **_dkv_constexprs(D, Dv, q.dtype, dkv_config), **owned,
            )  # fmt: skip
    dsinks = lse.new_empty(0) if sinks is None else _sum_over_rows(sinks_ds, stats)
    return (dq if sign == 1 else dq * sign), dk, dv, dsinks


def _sum_over_rows(sinks_ds: Tensor, stats: Tensor) -> Tensor:
    """Gradient `[B, Hq]` of the sinks from their dS in each row, which in float32 lack the normaliser."""
    return (sinks_ds * stats[:, :, 2] if stats.shape[2] == 3 else sinks_ds).sum(dim=-1)


def _owned(config: KernelConfig) -> list[dict[str, bool]]:
    """The launches of the dk/dv pass, by the gradients that each owns: both, or one after the other."""
    both = {"OWNS_DK": True, "OWNS_DV": True}
    return [both | {"OWNS_DV": False}, both | {"OWNS_DK": False}] if config.split else [both]


def _num_stats(dtype: torch.dtype) -> int:
    """Numbers per query that the dq pass leaves: lse and `delta`, in float32 the normaliser as well."""
    return 3 if dtype == torch.float32 else 2


def _copies(dkv_config: KernelConfig) -> int:
    """How often the dk/dv pass loads a number of each query of a tile, into a tile of their own.

    So often that this tile has as many elements as the program has threads: it is copied asynchronously,
    once per thread. Of a smaller one every thread would load all numbers that it needs for itself.
    """
    return max(2, 32 * dkv_config.num_warps // dkv_config.block_m)


def _dq_constexprs(D: int, Dv: int, dtype: torch.dtype, config: KernelConfig) -> dict[str, Any]:
    return {"SIZES": Sizes.of(D, Dv, config), "NUM_STATS": _num_stats(dtype)}


def _dkv_constexprs(D: int, Dv: int, dtype: torch.dtype, config: KernelConfig) -> dict[str, Any]:
    return {**_dq_constexprs(D, Dv, dtype, config), "COPIES": _copies(config)}
