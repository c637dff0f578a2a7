"""`window_attn` of sequences in pieces: each rank fetches the keys that its first queries still see.

A rank's piece begins with up to `window_size - 1` queries that see keys of the ranks before it, the *edge*.
All others see its own keys only, the *interior*. So the keys and values before the piece, the *halo*, travel
while the interior is computed; in the backward the edge comes first, and the gradients of the halo travel
home while the interior is computed.

        keys    halo | own piece
                . . . x x x x x
        edge    x x x x . . . .
        edge    . x x x x . . .         window_size = 4
        edge    . . x x x x . .
        inside  . . . x x x x .
        inside  . . . . x x x x
"""

import bisect
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.autograd.window_attn import window_attn_bwd, window_attn_fwd
from lact_kernels.distributed.exchange import TokenExchange
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.ops import checks
from lact_kernels.ops import window_attn as ops
from lact_kernels.ops.autocast import autocast_dtype, cast_inputs
from lact_kernels.ops.checks import Backend


@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces,
    softmax_scale: float | None = None, backend: Backend = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces,
    softmax_scale: float | None = None, backend: Backend = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces,
    softmax_scale: float | None = None, backend: Backend = "auto", return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@torch.compiler.disable  # what is compiled calls it as it is: all ranks must take part in the same order
def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int] | None = None,
    *,
    pieces: SequencePieces,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`lact_kernels.window_attn` of sequences that the ranks of a mesh hold in contiguous pieces.

    Every rank gives its own t tokens, and gets their outputs. All ranks must call it, and all must run the
    backward if one does.

    Args:
        q: queries of this rank's tokens, `[B, t, Hq, D]`.
        k: their keys, `[B, t, Hkv, D]`.
        v: their values, `[B, t, Hkv, Dv]`. Dtypes and strides as in `lact_kernels.window_attn`.
        window_size: tokens that a query sees, at least 1, or a pair `(left, 0)`, as in
            `lact_kernels.window_attn`; None is full causal attention, for which every rank receives all
            keys before its own: a ring attention suits that better.
        pieces: contiguous pieces, with the borders of packed sequences if there are any.
        softmax_scale, return_lse, backend: as in `lact_kernels.window_attn`.

    Returns:
        The outputs `[B, t, Hq, Dv]`, and with `return_lse` also lse `[B, Hq, t]`. Gradients flow to q, k
        and v of all ranks; the objective is the sum of what the ranks derive. A rank receives the keys and
        values of the `window_size - 1` tokens before its piece, from as many ranks as hold them:
        B (W - 1) Hkv (D + Dv) elements of their dtype whatever T is, fewer near the start of a sequence, and
        sends as many gradients back.

    Raises:
        TypeError, ValueError: as `lact_kernels.window_attn`, or what the ranks give does not fit together.
        RuntimeError: a wrong argument on another rank, or a rank that does not answer within the timeout of
            the process group.
    """
    pieces.agree(
        "window_attn",
        lambda: _facts(q, k, v, window_size, softmax_scale, return_lse, backend, pieces),
    )
    window_size = checks.check_causal_window("window_size", window_size)
    backend = ops.choose_backend(backend, q, v)
    q, k, v = cast_inputs(q, k, v)
    plan = pieces.once(("window_attn", window_size), lambda: _Plan.of(pieces, window_size))
    options = ops.attention_options(
        q, checks.check_window("window_size", window_size), softmax_scale, None
    )
    o, lse = _WindowAttn.apply(q, k, v, options, plan, backend)
    return (o, lse) if return_lse else o


def _facts(q, k, v, window_size, softmax_scale, return_lse, backend, pieces) -> dict:
    window_size = checks.check_causal_window("window_size", window_size)
    ops.check_attention(q, k, v, window_size, softmax_scale)
    checks.check_flag("return_lse", return_lse)
    ops.choose_backend(backend, q, v)
    if pieces.chunk_size is not None:
        raise ValueError(f"pieces must be contiguous for window_attn, got {pieces}")
    for name, x in (("q", q), ("k", k)):
        pieces.check_tokens(name, x)
    return {
        "B": q.shape[0],
        "heads of q": q.shape[2:],
        "heads of k": k.shape[2:],
        "heads of v": v.shape[2:],
        "dtype": str(autocast_dtype(q)),
        "window_size": window_size,
        "softmax_scale": softmax_scale,
        "gradients": checks.needs_gradient(q, k, v),
    }


class _Plan(NamedTuple):
    """Where the edge ends, which keys it needs, and the borders of what is left."""

    halo: TokenExchange
    edge: int  # queries that see keys before the piece
    cu_seqlens_q: Tensor | None  # of the interior, on the host
    cu_seqlens_k: Tensor | None

    @classmethod
    def of(cls, pieces: SequencePieces, window_size: int | None) -> "_Plan":
        borders, cu_seqlens, wanted = pieces.borders, pieces.cu_seqlens, []
        behind = pieces.num_tokens if window_size is None else window_size - 1
        for start, stop in pieces.spans:
            # A border belongs to the sequence that begins there.
            first = borders[bisect.bisect_right(borders, start) - 1]
            wanted.append([(max(first, start - behind), start)] if start < stop else [])
        halo, edge = TokenExchange(pieces, wanted), 0
        if halo.num_tokens:
            end = borders[bisect.bisect_right(borders, pieces.start)]
            edge = min(behind, min(end, pieces.stop) - pieces.start)
        if cu_seqlens is None or not edge:
            return cls(halo, edge, cu_seqlens, cu_seqlens)
        return cls(halo, edge, (cu_seqlens - edge).clamp_min(0), cu_seqlens)


class _WindowAttn(FirstOrderFunction):
    op = "lact_kernels.distributed.window_attn"

    @staticmethod
    def forward(ctx, q, k, v, options, plan: _Plan, backend):
        edge, options = plan.edge, (*options, None)
        borders = plan.cu_seqlens_q, plan.cu_seqlens_k
        transfer = None if plan.halo.is_empty else plan.halo.start((k, v))
        interior = window_attn_fwd(q[:, edge:], k, v, *options, *borders, backend)
        halo = (k[:, :0], v[:, :0]) if transfer is None else plan.halo.finish(transfer)
        o, lse = interior
        if edge:
            ks, vs = (torch.cat([h, x[:, :edge]], dim=1) for h, x in zip(halo, (k, v)))
            first = window_attn_fwd(q[:, :edge], ks, vs, *options, None, None, backend)
            o, lse = torch.cat([first[0], o], dim=1), torch.cat([first[1], lse], dim=2)
        ctx.save_for_backward(q, k, v, *halo, o, lse, *borders)
        ctx.options, ctx.plan, ctx.backend = options, plan, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, halo_k, halo_v, o, lse, *borders = ctx.saved_tensors
        plan, edge = ctx.plan, ctx.plan.edge
        if do is None:
            do = torch.zeros_like(o)

        def backward(queries: slice, k, v, *borders):
            return window_attn_bwd(
                do[:, queries], None if dlse is None else dlse[:, :, queries], q[:, queries], k, v,
                o[:, queries], lse[:, :, queries], *ctx.options, *borders, ctx.backend,
            )  # fmt: skip

        transfer, dhalo = None, (torch.empty_like(halo_k), torch.empty_like(halo_v))
        if edge:
            n = halo_k.shape[1]
            ks, vs = (torch.cat([h, x[:, :edge]], dim=1) for h, x in ((halo_k, k), (halo_v, v)))
            dq_edge, *dedge, _ = backward(slice(0, edge), ks, vs, None, None)
            dhalo = [x[:, :n] for x in dedge]
        if not plan.halo.is_empty:
            transfer = plan.halo.start_home(dhalo)
        dq, dk, dv, _ = backward(slice(edge, None), k, v, *borders)
        if edge:
            dq = torch.cat([dq_edge, dq], dim=1)
            for own, part in zip((dk, dv), dedge):
                own[:, :edge] += part[:, n:]
        if transfer is not None:
            plan.halo.finish_home(transfer, (dk, dv))
        return dq, dk, dv, None, None, None
