"""`ttt` of a plan whose ranges are split over ranks: each has some of the tokens of every update.

The i-th updates of all ranks are one: the gradients of each rank's keys are summed over the ranks, and every
rank makes the same step. Applies need nothing of other ranks.
"""

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lact_kernels.autograd.derivatives import refuse_transforms
from lact_kernels.core.call import Call, Options
from lact_kernels.core.lowering import Lowered, lower
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.ranks import remember
from lact_kernels.core.state import TTTState
from lact_kernels.core.tokens import Tokens
from lact_kernels.core.ttt_plan import TTTPlan
from lact_kernels.distributed.agreement import Agreement
from lact_kernels.distributed.shared_updates import SharedUpdates
from lact_kernels.ops import checks
from lact_kernels.ops import fast_weights as ops
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.ttt import check_plan, check_rates, lowered_call, start_of


@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan, *,
    group: dist.ProcessGroup | DeviceMesh, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan, *,
    group: dist.ProcessGroup | DeviceMesh, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Tensor, TTTState]: ...  # fmt: skip
@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan, *,
    group: dist.ProcessGroup | DeviceMesh, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TTTState]: ...  # fmt: skip
@torch.compiler.disable  # what is compiled calls it as it is: all ranks must take part in the same order
def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr0: Tensor | None,
    lr1: Tensor | None,
    lr2: Tensor | None,
    plan: TTTPlan,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    weight_norm: bool = True,
    detach_norms: bool = False,
    momentum_after_muon: bool = False,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    checkpoint_interval: int = 1,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TTTState]:
    """`lact_kernels.ttt` of a plan whose ranges are split over the ranks of a group.

    Every rank gives its own tokens, and a plan over these. The i-th updates of all plans are one step on all
    their keys together: gradients are summed over the ranks, before momentum and Newton-Schulz. An apply is
    of a rank's own queries. All ranks must call it, and all must run the backward if one does, a rank without
    outputs, too (`o.sum().backward()` does).

    Args:
        q: queries of this rank, `[B, tq, H, Dk]`. Ranks may have different numbers of them, or none.
        k: its keys, `[B, tk, H, Dk]`, likewise.
        v: their values, `[B, tk, H, Dv]`.
        w0, w1, w2: the initial weights, the same on every rank; `[H, ...]` or `[B, H, ...]`.
        lr0, lr1, lr2: learning rates of this rank's keys, `[B, tk, H]`. None if that weight is not trained,
            then on all ranks.
        plan: the updates and applies of this rank's tokens, whose ranges count from its first query and its
            first key. Every rank has as many updates, some perhaps without keys (`Update(0, 0)`), and any
            number of applies. `TTTPlan.shard` makes it of a plan for the tokens of all ranks. No update is
            left out, also if no apply follows, as one may on another rank. An update of which no rank has a
            key is one with gradients and a momentum of 0.
        group: a process group, or a 1-D `DeviceMesh`.
        momentum: of this rank's keys, `[B, tk, H]`. The share of the last step kept is its mean over the keys
            that all ranks have of an update.
        initial_state: go on where an earlier call stopped; the same on every rank.
        return_state: also return the state after the last step, which is the same on every rank.
        muon, prenorm, weight_norm, detach_norms, momentum_after_muon, checkpoint_interval, backend: as in
            `lact_kernels.ttt`, the same on every rank. With a checkpoint interval the backward repeats the
            all-reduces of the forward.

    Returns:
        The outputs of this rank's applies `[B, to, H, Dv]`, in the order of its plan, and with `return_state`
        the `TTTState`. Gradients are exact, and the objective is the sum of what the ranks derive. What is
        the same on every rank (weights, states) gets on each rank a part of its gradient, whose sum over the
        ranks is the whole. Each update takes one all-reduce of B H (2 Dh Dk + Dv Dh) float32 in the forward,
        or less if some weights are not trained, and one in the backward.

    Raises:
        TypeError, ValueError: as `lact_kernels.ttt`, or what the ranks give does not fit together.
        RuntimeError: a wrong argument on another rank, or a rank that does not answer within the timeout of
            the process group.

    Source: arXiv 2505.23884, whose context parallelism this is for any plan.
    """
    tokens, weights = Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2)
    refuse_transforms("lact_kernels.distributed.ttt", q, *tokens, *weights)
    agreement = Agreement.of(group)
    if isinstance(q, Tensor):
        q, tokens, weights = ops.autocast_inputs(q, tokens, weights)
    options = Options(
        None, muon, prenorm, momentum is not None, weight_norm, momentum_after_muon,
        return_state, checkpoint_interval,
    )  # fmt: skip
    lowered = None

    def facts():
        nonlocal options, lowered
        checks.check_flags(return_state=return_state, detach_norms=detach_norms)
        checks.check_floating("q", q, "[B, Tq, H, Dk]")
        checks.check_floating("k", k, "[B, Tk, H, Dk]")
        num_keys = k.shape[1]
        options = ops.check_call(q, tokens, weights, q.shape[0], initial_state, options, num_keys)
        own_plans = check_plan(plan, 1, packed=False)
        borders = [0, q.shape[1]], [0, num_keys]
        lowered = lower(own_plans, *borders, return_state, distributed=True)
        if lowered.plan.keys[0]:
            check_rates(tokens)
        rates, fields = tokens.rates, weights
        if initial_state is not None:
            fields = initial_state.fast_weights.to_list()
        return {
            "q": (q.shape[0], *q.shape[2:]),
            "v": tuple(v.shape[2:]),
            "dtype": str(q.dtype),
            "device": q.device.type,
            "weights": tuple(tuple(w.shape) for w in weights),
            "trained weights": tuple(f"w{i}" for i, lr in enumerate(rates) if lr is not None),
            "number of updates": len(lowered.plan.keys[0]),
            "momentum": options.momentum,
            "muon": options.muon,
            "prenorm": prenorm,
            "weight_norm": weight_norm,
            "detach_norms": detach_norms,
            "momentum_after_muon": momentum_after_muon,
            "initial_state": initial_state is not None,
            "return_state": return_state,
            "checkpoint_interval": options.checkpoint_interval,
            "backend": checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0)),
            "gradients": checks.needs_gradient(q, *tokens, *fields),
        }

    agreement.agree("ttt", facts)
    backend = checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0))
    start = start_of(initial_state, weights, q.shape[0], options, detach_norms)
    numbers = None
    if options.momentum and lowered.plan.keys[0]:
        numbers = _numbers_of_keys(lowered, q.device, agreement.group)
    ranks = remember(SharedUpdates(agreement.group))
    call = Call(q, tokens, start, None, options, ranks)
    o, end = ops.run(lowered_call(call, lowered, numbers), backend)
    return (o, TTTState.of(end, options, q.dtype)) if return_state else o


def _numbers_of_keys(
    lowered: Lowered, device: torch.device, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """How many keys each update has on all ranks together. They stay on the device."""
    own = torch.tensor([stop - start for start, stop in lowered.plan.keys[0]], dtype=torch.int64)
    numbers = own.to(device, non_blocking=True)
    dist.all_reduce(numbers, group=group)
    return numbers.unbind()
