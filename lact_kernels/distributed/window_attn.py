"""`window_attn` of sequences in pieces: each rank fetches the keys around its piece that its queries see.

The first `left` queries of a piece see keys of the ranks before it, the last `right` ones keys of those
behind it: the *edges*. All others see its own keys only, the *interior*. So the keys and values on both
sides, the *halo*, travel while the interior is computed; in the backward the edges come first, and the
gradients of the halo travel home while the interior is computed.

        keys    halo  | own piece         | halo
                . . . | x x x x x x x x x | .
        edge    x x x | x x . . . . . . . | .
        edge    . x x | x x x . . . . . . | .         window_size = (3, 1)
        edge    . . x | x x x x . . . . . | .
        inside  . . . | x x x x x . . . . | .
                              ...
        inside  . . . | . . . . x x x x x | .
        edge    . . . | . . . . . x x x x | x

A piece so short that its edges overlap is one edge, with the keys of both sides. A causal window has no edge
at the end. Each query is in one call with all its keys, as a sink counts once in its softmax.
"""

import bisect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.autograd.window_attn import window_attn_bwd, window_attn_fwd
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.distributed.exchange import TokenExchange
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.ops import checks
from lact_kernels.ops import window_attn as ops
from lact_kernels.ops.autocast import autocast_dtype, cast_inputs
from lact_kernels.ops.checks import Backend


@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces, softmax_scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces, softmax_scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def window_attn(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | tuple[int, int] | None = None, *,
    pieces: SequencePieces, softmax_scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, backend: Backend = "auto", return_lse: bool = False,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        window_size: tokens that a query sees, at least 1, or a pair `(left, right)`, as in
            `lact_kernels.window_attn`. None is full causal attention, for which every rank receives all keys
            before its own, as those on a side of -1: a ring attention suits that better.
        pieces: contiguous pieces, with the borders of packed sequences if there are any.
        sinks: `[Hq]`, a parameter like any other: the same on every rank, which is not compared.
        softmax_scale, softcap, return_lse, backend: as in `lact_kernels.window_attn`.

    Returns:
        The outputs `[B, t, Hq, Dv]`, and with `return_lse` also lse `[B, Hq, t]`. The objective is the sum of
        what the ranks derive. The gradients of q, k and v are whole, whichever ranks they come from. That of
        the sinks is of this rank's queries alone, as that of every parameter which all ranks hold: the sum
        over the ranks, which DDP and FSDP make, is the whole.

        A rank receives the keys and values of the `left` tokens before its piece and the `right` ones behind
        it, of its sequences and from as many ranks as hold them: B (left + right) Hkv (D + Dv) elements of
        their dtype whatever T is, and sends as many gradients back. A window of W tokens has W - 1 on the
        left.

    Raises:
        TypeError, ValueError: as `lact_kernels.window_attn`, or what the ranks give does not fit together.
        RuntimeError: a wrong argument on another rank, or a rank that does not answer within the timeout of
            the process group.
    """

    def checked() -> tuple[AttentionOptions, Backend]:
        options = ops.check_attention(q, k, v, window_size, softmax_scale, softcap, sinks)
        checks.check_flag("return_lse", return_lse)
        return options, ops.choose_backend(backend, q, v, options.softcap)

    pieces.agree("window_attn", lambda: _facts(q, k, v, sinks, checked()[0], pieces))
    options, chosen = checked()
    q, k, v = cast_inputs(q, k, v)
    sinks = ops.inner_sinks(q, sinks)
    left, right = options.left, options.right
    plan = pieces.once(("window_attn", left, right), lambda: _Plan.of(pieces, left, right))
    o, lse = _WindowAttn.apply(q, k, v, sinks, options, plan, chosen)
    return (o, lse) if return_lse else o


def _facts(q, k, v, sinks, options: AttentionOptions, pieces: SequencePieces) -> dict[str, Any]:
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
        "window_size": tuple(
            -1 if side is None else side for side in (options.left, options.right)
        ),
        "softmax_scale": options.softmax_scale,
        "softcap": options.softcap,
        "sinks": None if sinks is None else tuple(sinks.shape),
        "gradients": checks.needs_gradient(q, k, v, sinks),
    }


class _Call(NamedTuple):
    """Some of this rank's queries, and all keys that they see: a part of the halo, and of its own."""

    queries: slice
    own: slice  # of this rank's keys
    before: int = 0  # keys of the halo at the start of the piece,
    behind: int = 0  # and at its end
    ahead: int = 0  # keys that follow the one of the last query
    borders: tuple[Tensor | None, Tensor | None] = None, None  # of queries and keys, on the host

    def options(self, options: AttentionOptions) -> AttentionOptions:
        """The same window, for queries that are taken to stand where the keys end."""
        left, right = options.left, options.right
        return options._replace(
            left=None if left is None else left + self.ahead,
            right=None if right is None else right - self.ahead,
        )

    def keys(self, own: Tensor, halo: Tensor) -> Tensor:
        """The keys among this rank's own `[B, t, ...]` and those of the halo `[B, n, ...]`."""
        own = own[:, self.own]
        if not (self.before or self.behind):
            return own
        before, behind = halo[:, : self.before], halo[:, halo.shape[1] - self.behind :]
        return torch.cat([before, own, behind], dim=1)

    def parts(self, keys: Tensor) -> tuple[Tensor, ...]:
        """What `keys` has put together: before the piece, its own, behind it."""
        return keys.split((self.before, self.own.stop - self.own.start, self.behind), dim=1)


class _Plan(NamedTuple):
    """What a rank receives, and the calls for its piece: every query is in exactly one of them."""

    halo: TokenExchange  # tokens before the piece, then those behind it
    edges: list[_Call]
    interior: list[_Call]  # one or two, whose keys are all of its own, end to end

    @classmethod
    def of(cls, pieces: SequencePieces, left: int | None, right: int | None) -> "_Plan":
        left, right = (pieces.num_tokens if side is None else side for side in (left, right))
        borders, wanted = pieces.borders, []
        for start, stop in pieces.spans:
            # A border belongs to the sequence that begins there.
            first = borders[bisect.bisect_right(borders, start) - 1]
            last = borders[bisect.bisect_left(borders, stop)]
            around = [(max(first, start - left), start), (stop, min(last, stop + right))]
            wanted.append(around if start < stop else [])
        halo, t = TokenExchange(pieces, wanted), pieces.num_local_tokens
        before, behind = [stop - start for start, stop in wanted[pieces.rank]] or (0, 0)
        # The first sequence ends here, the last one begins.
        inside = [b - pieces.start for b in borders if pieces.start < b < pieces.stop]
        end, begin = (inside[0], inside[-1]) if inside else (t, 0)

        head, tail = min(left, end) * (before > 0), min(right, t - begin) * (behind > 0)
        if head + tail > t:  # of one sequence: all its queries are an edge
            edge = _Call(slice(0, t), slice(0, t), before, behind, ahead=behind)
            return cls(halo, [edge], _interior(pieces, t, 0, begin))
        edges = []
        if head:
            seen = min(head + right, end)
            edges.append(_Call(slice(0, head), slice(0, seen), before, ahead=seen - head))
        if tail:
            own = slice(max(begin, t - tail - left), t)
            edges.append(_Call(slice(t - tail, t), own, behind=behind, ahead=behind))
        return cls(halo, edges, _interior(pieces, head, tail, begin))

    def in_order(self, outputs: Sequence[Tensor], dim: int) -> Tensor:
        """What edges and interior have for their queries, in the order of these."""
        outputs = zip([*self.edges, *self.interior], outputs)
        return _joined([x for _, x in sorted(outputs, key=lambda x: x[0].queries.start)], dim)


def _interior(pieces: SequencePieces, head: int, tail: int, begin: int) -> list[_Call]:
    """The calls of all but the first `head` and the last `tail` queries; the last sequence starts at `begin`.

    Where an edge is cut off the end of the last of several sequences, this one has keys ahead that the others
    have not, and so a call of its own.
    """
    t, calls = pieces.num_local_tokens, []
    if pieces.packed and (begin or not tail):
        stop = begin if tail else t
        of_keys = pieces.cu_seqlens.clamp_max(stop)
        of_queries = (of_keys - head).clamp_min(0) if head else of_keys
        calls.append(_Call(slice(head, stop), slice(0, stop), borders=(of_queries, of_keys)))
        head = stop
    else:
        begin = 0
    if tail or not pieces.packed:
        calls.append(_Call(slice(head, t - tail), slice(begin, t), ahead=tail))
    return calls


class _WindowAttn(FirstOrderFunction):
    op = "lact_kernels.distributed.window_attn"

    @staticmethod
    def forward(ctx, q, k, v, sinks, options: AttentionOptions, plan: _Plan, backend):
        def attend(call: _Call, *halo: Tensor):
            ks, vs = map(call.keys, (k, v), halo)
            return window_attn_fwd(
                q[:, call.queries], ks, vs, *call.options(options), sinks, *call.borders, backend
            )

        halo = k[:, :0], v[:, :0]
        transfer = None if plan.halo.is_empty else plan.halo.start((k, v))
        interior = [attend(call, *halo) for call in plan.interior]
        if transfer is not None:
            halo = plan.halo.finish(transfer)
        edges = [attend(call, *halo) for call in plan.edges]
        os, lses = zip(*edges, *interior)
        o, lse = plan.in_order(os, dim=1), plan.in_order(lses, dim=2)
        ctx.save_for_backward(q, k, v, sinks, o, lse, *halo)
        ctx.options, ctx.plan, ctx.backend = options, plan, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, sinks, o, lse, *halo = ctx.saved_tensors
        plan = ctx.plan
        if do is None:
            do = torch.zeros_like(o)

        def gradients(call: _Call):
            rows, (ks, vs) = call.queries, map(call.keys, (k, v), halo)
            return window_attn_bwd(
                do[:, rows], None if dlse is None else dlse[:, :, rows], q[:, rows], ks, vs,
                o[:, rows], lse[:, :, rows], *call.options(ctx.options), sinks, *call.borders,
                ctx.backend,
            )  # fmt: skip

        edges = [gradients(call) for call in plan.edges]
        # Of keys and of values, by edges: before the piece, its own, behind it.
        parts = [[call.parts(x[i]) for call, x in zip(plan.edges, edges)] for i in (1, 2)]
        transfer = None
        if not plan.halo.is_empty:
            home = [
                _joined([h[:, :0], *(x[0] for x in xs), *(x[2] for x in xs)], dim=1)
                for h, xs in zip(halo, parts)
            ]
            transfer = plan.halo.start_home(home)
        interior = [gradients(call) for call in plan.interior]
        dk, dv = (_joined([x[i] for x in interior], dim=1) for i in (1, 2))
        for own, xs in zip((dk, dv), parts):
            for call, x in zip(plan.edges, xs):
                own[:, call.own] += x[1]
        if transfer is not None:
            plan.halo.finish_home(transfer, (dk, dv))
        dqs, _, _, dsinks = zip(*edges, *interior)
        dsinks = None if sinks is None else sum(dsinks)
        return plan.in_order(dqs, dim=1), dk, dv, dsinks, None, None, None


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors end to end, without a copy where only one of them is not empty."""
    parts = [x for x in parts if x.shape[dim]] or parts[:1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
