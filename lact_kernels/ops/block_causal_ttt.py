"""`block_causal_ttt`: test-time training of SwiGLU fast weights, chunk by chunk."""

import itertools
import operator
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.autograd.ttt import packed_plan
from lact_kernels.core.call import Call, Options
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.offsets import packed_offsets
from lact_kernels.core.plan import Plan, num_updates
from lact_kernels.core.state import TTTState, TTTTokens, behind_pending, joined_tokens
from lact_kernels.core.tokens import Tokens
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.fast_weights import (
    autocast_inputs,
    check_call,
    new_start,
    new_state,
    run,
    triton_obstacle,
)

__all__ = ["TTTState", "TTTTokens", "block_causal_ttt"]


@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Tensor, TTTState]: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TTTState]: ...  # fmt: skip
def block_causal_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    *,
    chunk_size: int = 2048,
    momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    checkpoint_interval: int = 1,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TTTState]:
    """A small network per head, `f(x) = w1 (silu(w0 x) * (w2 x))`, that learns from what it has read.

    For each chunk of `chunk_size` tokens the current weights are first applied to its queries,
    `o_t = f(q_t)`, then updated with its keys and values, so as to raise `<f(k_t), v_t>`:

        gate_t = w0 k_t      up_t = w2 k_t      hidden_t = silu(gate_t) * up_t
        dhidden_t = w1^T v_t    dup_t = dhidden_t * silu(gate_t)    dgate_t = dhidden_t * up_t * silu'(gate_t)

        G0 = sum_t lr0_t dgate_t k_t^T      G1 = sum_t lr1_t v_t hidden_t^T      G2 = sum_t lr2_t dup_t k_t^T
        momentum    M_i <- G_i + mean_t(momentum_t) M_i;   step_i = M_i   (without: step_i = G_i)
        muon        step_i <- NewtonSchulz5(step_i)
        post-norm   w_i <- renorm(w_i + step_i)
        pre-norm    m_i <- m_i + step_i;   w_i <- renorm(m_i)   (m_i starts at w_i)

    where `renorm(x) = x / (||row of x|| + 1e-5) * ||same row of the initial w_i||`, rows being the
    last axis. So the outputs of a chunk depend on the chunks before it, and on no key of its own.

    Args:
        q: queries `[B, T, H, Dk]`; float16, bfloat16, float32 or float64.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`; q, k and v share dtype and device.
        w0: initial gate weights `[H, Dh, Dk]`, or `[B, H, Dh, Dk]` with one set for each batch row (for
            each sequence of a packed batch). The weights, rates and momentum are float32
            (float64 for float64 inputs).
        w1: initial output weights `[H, Dv, Dh]`, or with the leading B.
        w2: initial up weights, shaped like w0.
        lr0: learning rate of each token for w0, `[B, T, H]`. The values of rates and momentum are not
            checked: the equations hold for any (a rate below 0 descends), and a NaN shows in the outputs.
        lr1: the same for w1.
        lr2: the same for w2.
        chunk_size: tokens from one update to the next, at least 1.
        momentum: `[B, T, H]`; its mean over a chunk is the share of the last step kept, in LaCT from 0 to 1.
        muon: orthogonalise each step by Newton-Schulz iterations: LaCT's five, or those of a
            `NewtonSchulz`.
        prenorm: accumulate steps in un-normalised masters instead of the normalised weights.
        cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`); the
            fast weights start afresh in each. It starts at 0, does not descend and ends at T. It is on
            the device of q, where each call waits to read it, or on the CPU, where nothing waits.
        initial_state: go on where the call that returned this state stopped. Then the weights come
            from it, and w0, w1, w2 are only checked against it. It has one entry for each batch row
            or packed sequence.
        return_state: also return the state after the last token. Cutting a sequence anywhere, any
            number of times, and passing the state on gives the outputs of one call.
        checkpoint_interval: keep the fast weights of every n-th chunk only for the backward, which
            recomputes the others. Less memory, no other difference; it is no part of a state. Where
            nothing needs a gradient, none are kept.
        backend: `"triton"` (NVIDIA GPUs; float16, bfloat16 and float32; Dk and Dv up to 2048, Dh up to
            4096), `"eager"` (any device), or `"auto"`: Triton where it can run, else eager. An explicit
            choice raises when it cannot run.

    Returns:
        The outputs `[B, T, H, Dv]` in the dtype of q, and with `return_state` also the `TTTState`.
        Gradients flow to every floating-point argument, through every update, through
        `initial_state` and through the returned state; a state holds on to the graph that made it
        (`state.map(torch.Tensor.detach)` cuts it). Weights and updates are float32; matrix products
        take the input dtype and accumulate in float32. Newton-Schulz runs in float32; on the Triton
        backend with half-precision inputs in float16 with float32 accumulation.

        Under `torch.autocast` weights, rates and momentum of 16 bits are cast to float32, and q, k and v
        to its dtype where theirs differ. What fits together is computed as it is.

        Beside the inputs, the Triton backend keeps for the backward, for each chunk and fast weight,
        `e + 4` bytes, or `e + 8` with momentum or Muon: the weights in the dtype of the products, of
        e bytes, their float32 sums before renorm, and the float32 steps. The eager backend keeps two
        (pre-norm: three) float32 copies of the weights. With a `checkpoint_interval` of n the former
        keeps this for every n-th chunk only; the latter keeps, for each interval, one copy each of
        the weights, the pre-norm masters and the momentum.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value, or a state that does not fit the call. Both name
            the argument, what came and what was expected, before any work starts.

    Source: arXiv 2505.23884, sections 3.1 and 3.2, and its shifted block-causal order, section 3.3.
    """
    checks.check_flag("return_state", return_state)
    checks.check_floating("q", q, "[B, T, H, Dk]")
    q, tokens, weights = autocast_inputs(q, Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2))
    N = q.shape[0]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)
        N = cu_seqlens.shape[0] - 1
    options = Options(
        chunk_size, muon, prenorm, momentum is not None,
        return_end=return_state, checkpoint_interval=checkpoint_interval,
    )  # fmt: skip
    options = check_call(q, tokens, weights, N, initial_state, options)
    backend = checks.choose_backend(backend, q, triton_obstacle(q, v, w0))
    if initial_state is None and not return_state:
        plan = None
        if cu_seqlens is not None:
            plan = packed_plan(cu_seqlens, q.shape[1], options.chunk_size, False)
        return run(Call(q, tokens, new_start(weights, N), plan, options), backend)[0]
    state = initial_state or new_state(weights, N, options, q.dtype)
    if initial_state is None or checks.left_inference_mode(state.weights[0]):
        state = state.map(torch.clone)  # its own memory: an optimizer changes w0, w1, w2 in place
    offsets = None if cu_seqlens is None else packed_offsets(cu_seqlens, q.shape[1])
    o, state = _continue(
        Call(q, tokens, state.fast_weights, None, options), state, offsets, backend
    )
    return (o, state) if return_state else o


def _continue(
    call: Call, state: TTTState, offsets: list[int] | None, backend: Backend
) -> tuple[Tensor, TTTState | None]:
    """Outputs, and with `return_end` the state after these tokens.

    Sequences none of which fills a chunk only apply their weights. Rows that stand at the same place
    of their chunks are scanned as they are; all others as one packed row, side by side.
    """
    q, tokens, options = call.q, call.tokens, call.options
    B, T = q.shape[:2]
    C, return_end = options.chunk_size, options.return_end
    lengths = (T,) * B
    if offsets is not None:
        lengths = tuple(stop - start for start, stop in zip(offsets, offsets[1:]))
    totals = tuple(map(operator.add, state.pending_lengths, lengths))

    if not any(num_updates(total, C, return_end) for total in totals):
        plan = (
            None if offsets is None else Plan.block_causal(offsets, offsets, C, False).to_tensor()
        )
        o, _ = run(call._replace(plan=plan, options=options._replace(return_end=False)), backend)
        if not return_end:
            return o, None
        if offsets is None:
            return o, state.append(TTTTokens(*tokens, lengths))
        return o, state.append(TTTTokens.padded(tokens.sequences(lengths)))

    if offsets is None and len(set(totals)) == 1:
        tokens = joined_tokens(state, tokens)
        o, end = run(call._replace(tokens=tokens), backend)
        if end is None:
            return o, None
        left = totals[0] % C
        rest = TTTTokens(*tokens.at(slice(tokens.k.shape[1] - left, None)), (left,) * B)
        return o, TTTState.of(end, options, state.dtype).append(rest)

    if offsets is None:
        q, tokens, offsets = q.flatten(0, 1)[None], tokens.as_row(), _borders(lengths)
    tokens = behind_pending(state, tokens, lengths)
    plan = Plan.block_causal(_borders(totals), offsets, C, return_end).to_tensor()
    o, end = run(call._replace(q=q, tokens=tokens, plan=plan), backend)
    o = o.view(B, T, *o.shape[2:])
    if end is None:
        return o, None
    rest = [x.map(lambda x: x[len(x) // C * C :]) for x in tokens.sequences(totals)]
    return o, TTTState.of(end, options, state.dtype).append(TTTTokens.padded(rest))


def _borders(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]
