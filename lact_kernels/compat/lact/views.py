"""The function and the layer of LaCT's novel views, `lact_nvs/lact_ttt.py`.

Several models for 3D reconstruction, video and robots have a copy of this function.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lact_kernels.compat.lact.projections import (
    NORM_EPS,
    check_base_lr,
    check_sizes,
    head_norm,
    inv_softplus,
    learning_rates,
    silu_heads,
)
from lact_kernels.compat.lact.rows import Rows
from lact_kernels.core.fast_weights import wide_dtype
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.ttt_plan import Apply, TTTPlan, Update
from lact_kernels.layers.inputs import check_input
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.ttt import ttt
from lact_kernels.ops.ttt_apply import ttt_apply

TTTOperator = collections.namedtuple("TTTOperator", ["start", "end", "update", "apply"])
TTTOperator.__doc__ = """An entry of an order: an update on the keys `start:end`, if `update`, and then the
outputs of the queries `start:end`, if `apply`. An end of -1 is that of the sequence."""


def fast_weight_swish_glu_weight_norm_mini_batch_apply(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    ttt_ua_order: Iterable,
    muon_update_steps: int = 0,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fast weights that are updated and applied in any order: `lact_kernels.ttt`, called as theirs is.

    The network of a row is `f(x) = (silu(x w0) * (x w2)) w1`. Rows are batch and heads as one axis, `b*h`.

    Args:
        w0: initial gate weights `[b*h, dk, dh]`; float16, bfloat16 or float32. They are cast to float32, and
            so are all updates; gradients come back in the dtype given. Below, float64 for q, k, v and the
            weights together is possible too.
        w1: initial output weights `[b*h, dh, dv]`.
        w2: initial up weights `[b*h, dk, dh]`.
        q: queries `[b*h, lq, dk]`. Cast to the dtype of v, in which all products are taken.
        k: keys `[b*h, l, dk]`. Cast to the dtype of v.
        v: values `[b*h, l, dv]`; float16, bfloat16, float32 or float64.
        lr0: learning rate of each key for w0, `[b*h, l, 1]`, of any floating dtype; cast to float32.
        lr1: the same for w1.
        lr2: the same for w2.
        ttt_ua_order: the order, of `TTTOperator` (any objects with the fields start, end, update and apply)
            or sequences of these four. For each in turn: one update on the keys `start:end`, if `update`;
            then the queries `start:end` through the weights as they now are, if `apply`. An end of -1 is
            that of the sequence. What lies beyond the tokens is cut off, as slices do.
        muon_update_steps: Newton-Schulz steps by which each update is orthogonalised. 0 leaves the division
            of each gradient by its Frobenius norm.
        backend: as in `ttt`.

    Returns:
        The outputs `[b*h, sum of the applied lengths, dv]` in the dtype of v, end to end in their order, and
        the new w0, w1 and w2 in the layout given, float32 (float64 for float64). Weights come back as they
        were given if nothing is updated. Gradients flow to every tensor; the norms that the weights are
        brought back to after each update are constants in the backward, as in theirs.

    What differs from the authors' function:
        Precision. Theirs iterates Newton-Schulz in bfloat16, and so rounds every update to it, also with 0
        steps; here it is float16 or better (see `block_causal_ttt`). Under `torch.autocast` theirs takes
        products in its dtype, here they have that of v, which such models have cast by then.
        An end of -1 is that of the sequence, as in ZipMap; theirs takes a slice, without the last token.
        Learning rates per channel (a last axis other than 1), and rates that broadcast over `b*h`, are
        errors, and so are other negative ends. An order without an apply is possible.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument.

    Source: arXiv 2505.23884, section 3.1; the signature is that of github.com/a1600012888/LaCT at 1f84d47.
    """
    given = (w0, w1, w2)
    steps = newton_schulz("muon_update_steps", muon_update_steps)
    rows = Rows.of(given, (q, k, v), (lr0, lr1, lr2), transposed=True, any_queries=True)
    plan = plan_of(ttt_ua_order, q.shape[1], k.shape[1])
    o, weights = _run(rows.tokens, rows.weights, rows.rates, plan, steps, backend)
    if weights is None:
        return o[:, :, 0], *given
    return o[:, :, 0], *(w[:, 0].mT for w in weights)


def plan_of(order: Iterable, Tq: int, Tk: int) -> TTTPlan:
    """The plan of an order, for so many queries and keys: what is beyond them is cut off."""
    plan = TTTPlan.of_ttt_operators(order).shard(queries=(0, Tq), keys=(0, Tk))
    return TTTPlan([step for step in plan.steps if step != Update(0, 0)])


def _run(tokens, weights, rates, plan: TTTPlan, muon: NewtonSchulz, backend: Backend):
    """The outputs, and the new weights `[B, H, out, in]`, or None if nothing is updated."""
    q, k, v = tokens
    if not all(isinstance(step, Apply) for step in plan.steps):
        o, state = ttt(
            q,
            k,
            v,
            *weights,
            *rates,
            plan,
            muon=muon,
            detach_norms=True,
            return_state=True,
            backend=backend,
        )
        return o, state.weights
    # Weights that are given for new tokens, as when a view is rendered.
    return ttt_apply(applied(q, plan), *weights, backend=backend), None


def applied(x: Tensor, plan: TTTPlan) -> Tensor:
    """The pieces of `x [B, T, ...]` whose outputs a plan gives, in its order. One piece is not copied."""
    pieces = [x[:, step.start : step.stop] for step in plan.steps if isinstance(step, Apply)]
    return pieces[0] if len(pieces) == 1 else torch.cat([x[:, :0], *pieces], dim=1)


def newton_schulz(name: str, steps: int) -> NewtonSchulz:
    """So many steps of the triple that novel views and video share."""
    steps = checks.check_int(name, steps)
    if steps < 0:
        raise ValueError(f"{name} must not be negative, got {steps}")
    # Written here: with dynamic=True, torch.compile makes variables of the numbers of a module.
    return NewtonSchulz(((3.4445, -4.7750, 2.0315),) * steps)


class FastWeightGluMLPMultihead(nn.Module):
    """The layer of LaCT's novel views, with the names, shapes and order of their parameters.

        q, k, v = silu(to_qkv(x));  q, k divided by their norms + 1e-5, for each head
        rates   = softplus(lr_fc(x) + softplus^-1(base_lr))
        o, w    = fast_weight_swish_glu_weight_norm_mini_batch_apply(w0, w1, w2, q, k, v, rates, order)
        y       = c_proj(rms_norm(o) [* silu(gate_fn(x))])

    Args:
        dim: channels of a token.
        head_dim: channels of a head, a divisor of `dim`.
        inter_multi: hidden width of the fast network, relative to `head_dim`.
        bias: whether `to_qkv`, `c_proj` and `gate_fn` have biases.
        base_lr: learning rate of every token before training.
        muon_update_steps: Newton-Schulz steps of each update; 0 leaves the division by the Frobenius norm.
        use_gate_fn: ZipMap's gate on the outputs, one factor for each channel.
        backend: as in `ttt`.
        device, dtype: of the parameters.

    Attributes:
        w0, w2: initial fast weights `[H, head_dim, dh]`.
        w1: `[H, dh, head_dim]`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, which the message names.

    Source: arXiv 2505.23884, section 3.3; names as in github.com/a1600012888/LaCT at 1f84d47.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inter_multi: float = 1,
        bias: bool = False,
        base_lr: float = 0.01,
        muon_update_steps: int = 0,
        use_gate_fn: bool = False,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(dim, inter_multi, head_dim=head_dim)
        checks.check_flags(bias=bias, use_gate_fn=use_gate_fn)
        newton_schulz("muon_update_steps", muon_update_steps)
        checks.check_backend(backend)
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = H = dim // head_dim
        self.muon_update_steps = muon_update_steps
        self.use_gate_fn = use_gate_fn
        self.base_lr_inv = inv_softplus(check_base_lr(base_lr))
        self.backend: Backend = backend

        dh = int(head_dim * inter_multi)
        self.w0 = nn.Parameter(torch.empty(H, head_dim, dh, **factory))
        self.w1 = nn.Parameter(torch.empty(H, dh, head_dim, **factory))
        self.w2 = nn.Parameter(torch.empty(H, head_dim, dh, **factory))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias, **factory)
        self.c_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.lr_fc = nn.Linear(dim, 3 * H, **factory)
        if use_gate_fn:
            self.gate_fn = nn.Sequential(nn.Linear(dim, dim, bias=bias, **factory), nn.SiLU())
        self.o_norm = nn.RMSNorm(head_dim, eps=NORM_EPS, **factory)
        self.reset_fast_weights()

    def reset_fast_weights(self) -> None:
        """Draw the initial fast weights anew."""
        for w in (self.w0, self.w1, self.w2):
            nn.init.normal_(w, std=(2 / w.shape[1]) ** 0.5)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, head_dim={self.w0.shape[1]}, dh={self.w0.shape[2]},"
            f" muon_update_steps={self.muon_update_steps}"
        )

    def forward(
        self, x: Tensor, info: Mapping[str, Any], *args: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix the tokens of each row.

        Args:
            x: `[B, T, dim]`.
            info: `"ttt_op_order"`, as `ttt_ua_order` of the function; and `"w0"`, `"w1"`, `"w2"`, all of them
                or none (or None): fast weights to begin with in place of the layer's own, `[B * H, ...]`, as
                an earlier call returned them.
            args: have no effect, as in theirs.

        Returns:
            `[B, sum of the applied lengths, dim]`, and the fast weights after the order: w0, w1 and w2 by
            their names, `[B * H, ...]`.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or value, or an `info` without an order or with a part of the
                weights.
        """
        check_input("x", x, "[B, T, dim]", self.dim, self.to_qkv)
        if not isinstance(info, Mapping):
            raise TypeError(f"info must be a mapping, got {type(info).__name__}")
        if "ttt_op_order" not in info:
            raise ValueError(f"info must have 'ttt_op_order', got {list(info)}")
        B, H = x.shape[0], self.num_heads
        q, k, v = silu_heads(self.to_qkv(x), H, l2_norm=True)
        rates = learning_rates(self.lr_fc, x, self.base_lr_inv).unflatten(-1, (3, H)).unbind(2)
        given = self._given_weights(info, B)
        own = given is None
        weights = [w.to(wide_dtype(v)).mT for w in ((self.w0, self.w1, self.w2) if own else given)]
        if not own:
            weights = [w.unflatten(0, (B, H)) for w in weights]
        plan = plan_of(info["ttt_op_order"], x.shape[1], x.shape[1])
        muon = newton_schulz("muon_update_steps", self.muon_update_steps)
        o, new = _run((q, k, v), weights, rates, plan, muon, self.backend)
        if new is not None:
            given = [w.flatten(0, 1).mT for w in new]
        elif own:
            given = [w.mT.repeat(B, 1, 1) for w in weights]
        o = head_norm(self.o_norm, o).flatten(2)
        if self.use_gate_fn:
            o = o * applied(self.gate_fn(x), plan)
        return self.c_proj(o), dict(zip(("w0", "w1", "w2"), given))

    def _given_weights(self, info: Mapping[str, Any], B: int) -> list[Tensor] | None:
        given = {name: info.get(name) for name in ("w0", "w1", "w2")}
        missing = [name for name, w in given.items() if w is None]
        if len(missing) == 3:
            return None
        if missing:
            raise ValueError(
                f"info must have w0, w1 and w2 or none of them, and {missing} are not there"
            )
        for name, w in given.items():
            own = getattr(self, name)
            checks.check_float_dtype(name, w, "[B * H, ...]")
            shape = (B * self.num_heads, *own.shape[1:])
            checks.check_tensor(name, w, shape, "[B * H, ...]", w.dtype, own.device, "this layer")
        return list(given.values())
