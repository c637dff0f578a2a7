"""`ttt`: updates of SwiGLU fast weights and applies, in any order; `ttt_update`: one update alone."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights, Triple
from lact_kernels.core.lowering import Lowered, divided, gather, lower
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.offsets import packed_offsets
from lact_kernels.core.state import TTTState
from lact_kernels.core.tokens import Tokens
from lact_kernels.core.ttt_plan import TTTPlan
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.fast_weights import (
    autocast_inputs,
    check_call,
    new_start,
    run,
    triton_obstacle,
)

__all__ = ["ttt", "ttt_update"]


@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan | Sequence[TTTPlan], *,
    momentum: Tensor | None = None, muon: bool | NewtonSchulz = False, prenorm: bool = False,
    weight_norm: bool = True, detach_norms: bool = False, momentum_after_muon: bool = False,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None, initial_state: TTTState | None = None,
    checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan | Sequence[TTTPlan], *,
    momentum: Tensor | None = None, muon: bool | NewtonSchulz = False, prenorm: bool = False,
    weight_norm: bool = True, detach_norms: bool = False, momentum_after_muon: bool = False,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None, initial_state: TTTState | None = None,
    checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Tensor, TTTState]: ...  # fmt: skip
@overload
def ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, plan: TTTPlan | Sequence[TTTPlan], *,
    momentum: Tensor | None = None, muon: bool | NewtonSchulz = False, prenorm: bool = False,
    weight_norm: bool = True, detach_norms: bool = False, momentum_after_muon: bool = False,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None, initial_state: TTTState | None = None,
    checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TTTState]: ...  # fmt: skip
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
    plan: TTTPlan | Sequence[TTTPlan],
    *,
    momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    weight_norm: bool = True,
    detach_norms: bool = False,
    momentum_after_muon: bool = False,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    checkpoint_interval: int = 1,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TTTState]:
    """Fast weights of `f(x) = w1 (silu(w0 x) * (w2 x))` that are updated and applied in the order of a plan.

    An `Apply(start, stop)` gives the outputs `o_t = f(q_t)` of these queries with the weights as they are
    then. An `Update(start, stop)` changes the weights so as to raise `<f(k_t), v_t>` of these keys and
    values:

        gate_t = w0 k_t      up_t = w2 k_t      hidden_t = silu(gate_t) * up_t
        dhidden_t = w1^T v_t    dup_t = dhidden_t * silu(gate_t)    dgate_t = dhidden_t * up_t * silu'(gate_t)

        G0 = sum_t lr0_t dgate_t k_t^T      G1 = sum_t lr1_t v_t hidden_t^T      G2 = sum_t lr2_t dup_t k_t^T
        momentum    M_i <- G_i + mean_t(momentum_t) M_i;   step_i = M_i   (without: step_i = G_i)
        muon        step_i <- NewtonSchulz(step_i)
        both, with momentum_after_muon
                    M_i <- NewtonSchulz(G_i) + mean_t(momentum_t) M_i;   step_i = M_i
        post-norm   w_i <- renorm(w_i + step_i)
        pre-norm    m_i <- m_i + step_i;   w_i <- renorm(m_i)   (m_i starts at w_i)

    where `renorm(x) = x / (||row of x|| + 1e-5) * ||same row of the initial w_i||`, rows being the last axis,
    and `renorm(x) = x` without `weight_norm`. Sums and means are over all keys of the update.

    Args:
        q: queries `[B, Tq, H, Dk]`; float16, bfloat16, float32 or float64.
        k: keys `[B, Tk, H, Dk]`. Their number has nothing to do with that of the queries.
        v: values `[B, Tk, H, Dv]`; q, k and v share dtype and device.
        w0: initial gate weights `[H, Dh, Dk]`, or `[B, H, Dh, Dk]` with one set for each batch row (for each
            sequence of a packed batch). The weights, rates and momentum are float32 (float64 for float64
            inputs).
        w1: initial output weights `[H, Dv, Dh]`, or with the leading B.
        w2: initial up weights, shaped like w0.
        lr0: learning rate of each key for w0, `[B, Tk, H]`, or None: w0 is not trained. Then it stays as it
            is, and its gradient G0 is not computed. The values of rates and momentum are not checked.
        lr1: the same for w1.
        lr2: the same for w2. Where there are updates, at least one of the three is given.
        plan: the updates and applies, the same for all batch rows. Of a packed batch the plan of each
            sequence, or one for all; its ranges count from the first token of the sequence. An update that
            no apply follows is left out, unless `return_state` needs it. Keys of an update are read in place
            if they are one range which no other update reads, and so are queries whose outputs come in their
            own order; otherwise they are copied first.
        momentum: `[B, Tk, H]`; its mean over the keys of an update is the share of the last step kept.
        muon: orthogonalise each step by Newton-Schulz iterations: LaCT's five (True), or those of a
            `NewtonSchulz`.
        prenorm: accumulate steps in un-normalised masters instead of the normalised weights.
        weight_norm: bring the rows of the weights back to their initial norms after each update.
        detach_norms: take these norms as constants in the backward.
        momentum_after_muon: orthogonalise the gradients, and then add momentum. It needs both.
        cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`), in which
            the queries and the keys lie alike; or a pair, of the queries' borders and of the keys'. On the
            device of q, where each call waits to read it, or on the CPU, where nothing waits.
        initial_state: go on with the weights, masters, momentum and norms that an earlier call returned. Then
            w0, w1 and w2 are only checked against it.
        return_state: also return the state after the last step of the plan.
        checkpoint_interval: keep the fast weights of every n-th version only for the backward, which
            recomputes the others.
        backend: `"triton"` (NVIDIA GPUs; float16, bfloat16 and float32; Dk and Dv up to 2048, Dh up to 4096),
            `"eager"` (any device), or `"auto"`: Triton where it can run, else eager. An explicit choice
            raises when it cannot run.

    Returns:
        The outputs `[B, To, H, Dv]` in the dtype of q, those of every apply end to end in the order of the
        plan (and of packed sequences, one sequence's behind the other's); with `return_state` also the
        `TTTState`. Gradients flow to every floating-point argument, through every update, through
        `initial_state` and through the returned state. Precision is that of `block_causal_ttt`.

        Beside the inputs, the Triton backend keeps for the backward, for the start and each update that is
        done, `e + 4` bytes for each fast weight with products of e bytes, `e + 8` with momentum or Muon, and
        `e + 12` with `momentum_after_muon`: with (Dk, Dh) = (1024, 4096) and 16 bits these are 72, 120 and
        168 MiB for each head. The eager backend keeps two float32 copies of the weights that are trained
        (pre-norm, and `momentum_after_muon`: one more each).

        A plan, and with it the numbers of queries and keys, are constants of a program that `torch.compile`
        makes, which another batch size does not change. With `cu_seqlens` it is compiled in parts.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value, a plan that goes beyond its sequence, or a state that does
            not fit the call. Both name the argument, what came and what was expected, before any work starts.

    Source: arXiv 2505.23884, section 3, whose orders of updates and applies are plans.
    """
    checks.check_flags(return_state=return_state, detach_norms=detach_norms)
    checks.check_floating("q", q, "[B, Tq, H, Dk]")
    checks.check_floating("k", k, "[B, Tk, H, Dk]")
    q, tokens, weights = autocast_inputs(q, Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2))
    N, borders = q.shape[0], _borders(q, k, cu_seqlens)
    if borders is not None:
        N = len(borders[0]) - 1
    options = Options(
        None, muon, prenorm, momentum is not None, weight_norm, momentum_after_muon,
        return_state, checkpoint_interval,
    )  # fmt: skip
    num_keys = k.shape[1]
    options = check_call(q, tokens, weights, N, initial_state, options, num_keys)
    plans = check_plan(plan, 1 if borders is None else N, cu_seqlens is not None)
    if borders is None:
        borders = [0, q.shape[1]], [0, num_keys]
    lowered = lower(plans, *borders, return_state)
    if any(lowered.plan.keys):
        check_rates(tokens)
    backend = checks.choose_backend(backend, q, triton_obstacle(q, v, w0))
    start = start_of(initial_state, weights, N, options, detach_norms)
    o, end = run(lowered_call(Call(q, tokens, start, None, options), lowered), backend)
    return (o, TTTState.of(end, options, q.dtype)) if return_state else o


@overload
def ttt_update(
    k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, *, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False, initial_state: TTTState | None = None,
    backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Triple: ...  # fmt: skip
@overload
def ttt_update(
    k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, *, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False, initial_state: TTTState | None = None,
    backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Triple, TTTState]: ...  # fmt: skip
@overload
def ttt_update(
    k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor | None, lr1: Tensor | None, lr2: Tensor | None, *, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, weight_norm: bool = True,
    detach_norms: bool = False, momentum_after_muon: bool = False, initial_state: TTTState | None = None,
    backend: Backend = "auto",
    return_state: bool = False,
) -> Triple | tuple[Triple, TTTState]: ...  # fmt: skip
def ttt_update(
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr0: Tensor | None,
    lr1: Tensor | None,
    lr2: Tensor | None,
    *,
    momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    weight_norm: bool = True,
    detach_norms: bool = False,
    momentum_after_muon: bool = False,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> Triple | tuple[Triple, TTTState]:
    """One update of the fast weights on all keys: `ttt` with the plan `[Update(0, Tk)]`, without its table.

    Nothing waits for a device, and a CUDA graph can capture it. `ttt_apply` applies the result.

    Args:
        k: keys `[B, Tk, H, Dk]`, at least one.
        v: values `[B, Tk, H, Dv]`.
        w0, w1, w2, lr0, lr1, lr2, momentum, muon, prenorm, weight_norm, detach_norms, momentum_after_muon,
            initial_state, backend: as in `ttt`.
        return_state: also return the state after the update, which the next one goes on from. Momentum and
            pre-norm's masters are in it, and the norms of the first weights.

    Returns:
        The new w0, w1, w2, `[B, H, ...]`, float32 (float64 for float64 keys), with gradients as in `ttt`;
        with `return_state` also the `TTTState`.

    Raises:
        TypeError, ValueError: as `ttt`.
    """
    checks.check_flags(return_state=return_state, detach_norms=detach_norms)
    checks.check_floating("k", k, "[B, Tk, H, Dk]")
    if k.shape[1] == 0:
        raise ValueError(f"k must have at least one token to update with, got {tuple(k.shape)}")
    k, tokens, weights = autocast_inputs(k, Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2))
    N, num_keys = k.shape[:2]
    options = Options(
        None, muon, prenorm, momentum is not None, weight_norm, momentum_after_muon, True
    )
    options = check_call(k, tokens, weights, N, initial_state, options, num_keys)
    check_rates(tokens)
    backend = checks.choose_backend(backend, k, triton_obstacle(k, v, w0))
    start = start_of(initial_state, weights, N, options, detach_norms)
    call = Call(k[:, :0], tokens, start, None, Options(num_keys, *options[1:]))
    _, end = run(call, backend)
    return (end.weights, TTTState.of(end, options, k.dtype)) if return_state else end.weights


def check_plan(plan: TTTPlan | Sequence[TTTPlan], N: int, packed: bool) -> list[TTTPlan]:
    """The plan of each of N packed sequences, or the one of all rows."""
    if isinstance(plan, TTTPlan):
        return [plan] * N
    if not isinstance(plan, Sequence) or not all(isinstance(x, TTTPlan) for x in plan):
        raise TypeError(
            f"plan must be a TTTPlan, which TTTPlan([...]) makes of steps, got {plan!r}"
        )
    if not packed:
        raise TypeError(f"plan must be one TTTPlan without cu_seqlens, got {len(plan)} of them")
    if len(plan) != N:
        raise ValueError(f"plan must have one TTTPlan for each of {N} sequences, got {len(plan)}")
    return list(plan)


def check_rates(tokens: Tokens) -> None:
    """There are rates for what the updates train."""
    if all(lr is None for lr in tokens.rates):
        raise ValueError(
            "lr0, lr1 and lr2 are all None, and the plan has an update: give the rates of the weights"
            " that it trains"
        )


def lowered_call(call: Call, lowered: Lowered, numbers: Sequence[Tensor] | None = None) -> Call:
    """The call with the tokens and the plan that `lowered` says.

    `numbers` are those of the keys that each update has on all ranks; without ranks they are those of the
    plan.
    """
    tokens, size = call.tokens, 1
    updates = [r for ranges in lowered.plan.keys for r in ranges]
    if not updates:
        tokens = tokens.at(slice(0, 0))
    elif lowered.keys is not None:
        tokens = tokens.map(lambda x: gather(x, lowered.keys))
    if call.options.momentum and updates:
        lengths = [stop - start for start, stop in updates]
        if numbers is None and len(set(lengths)) == 1:
            size = lengths[0]
        else:
            momentum = divided(tokens.momentum, updates, numbers or lengths)
            tokens = Tokens(*tokens[:5], momentum)
    q, plan = gather(call.q, lowered.queries), lowered.plan.to_tensor()
    return Call(q, tokens, call.start, plan, Options(size, *call.options[1:]), call.ranks)


def start_of(given: TTTState | None, weights, N: int, options, detach_norms: bool) -> FastWeights:
    """The fast weights to begin with: those of a state that is given, or new ones of N sequences."""
    if given is None:
        start = new_start(weights, N)
        return start.begun(options.prenorm, options.momentum, True) if detach_norms else start
    start = given.fast_weights
    if detach_norms:
        start = FastWeights(start.weights, tuple(x.detach() for x in start.norms), *start[2:])
    return start.map(torch.clone) if checks.left_inference_mode(start.weights[0]) else start


def _borders(q, k, cu_seqlens) -> tuple[list[int], list[int]] | None:
    """Those of packed sequences in the queries and in the keys."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, tuple):
        checks.check_cu_seqlens(cu_seqlens, q)
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"cu_seqlens must be a pair, of the {q.shape[1]} queries and of the {k.shape[1]} keys,"
                " where these differ in number"
            )
        borders = packed_offsets(cu_seqlens, q.shape[1])
        return borders, borders
    if len(cu_seqlens) != 2:
        raise ValueError(
            f"cu_seqlens must be one tensor, or a pair for queries and keys, got {len(cu_seqlens)}"
        )
    for i, borders in enumerate(cu_seqlens):
        checks.check_cu_seqlens(borders, q, f"cu_seqlens[{i}]")
    if cu_seqlens[0].shape != cu_seqlens[1].shape:
        numbers = [x.shape[0] - 1 for x in cu_seqlens]
        raise ValueError(f"cu_seqlens must be borders of as many sequences, got {numbers}")
    lengths = zip(cu_seqlens, (q.shape[1], k.shape[1]))
    return tuple(packed_offsets(x, T, f"cu_seqlens[{i}]") for i, (x, T) in enumerate(lengths))
