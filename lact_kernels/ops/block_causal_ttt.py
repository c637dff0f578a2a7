"""`block_causal_ttt`: test-time training of SwiGLU fast weights, chunk by chunk."""

import itertools
import operator
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lact_kernels.autograd.ttt import packed_plan, ttt_fwd
from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.offsets import packed_offsets
from lact_kernels.core.plan import Plan, num_updates
from lact_kernels.core.state import TTTState, TTTTokens, behind_pending, joined_tokens
from lact_kernels.core.tokens import Tokens
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import autocast_dtype, autocasts
from lact_kernels.ops.checks import Backend

__all__ = ["TTTState", "TTTTokens", "block_causal_ttt"]

MAX_TRITON_DIM = 1024
HALF_DTYPES = (torch.float16, torch.bfloat16)


@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Tensor, TTTState]: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, chunk_size: int = 2048, momentum: Tensor | None = None,
    muon: bool = False, prenorm: bool = False, cu_seqlens: Tensor | None = None,
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
    muon: bool = False,
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
        muon: orthogonalise each step by five Newton-Schulz iterations.
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
        backend: `"triton"` (NVIDIA GPUs; float16, bfloat16 and float32; Dk, Dv and Dh up to 1024),
            `"eager"` (any device), or `"auto"`: Triton where it can run, else eager. An explicit
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
        chunk_size, muon, prenorm, momentum is not None, return_state, checkpoint_interval
    )
    options = check_call(q, tokens, weights, N, initial_state, options)
    backend = checks.choose_backend(backend, q, triton_obstacle(q, v, w0))
    state = initial_state or new_state(weights, N, options, q.dtype)
    if initial_state is None and not return_state:
        plan = None
        if cu_seqlens is not None:
            plan = packed_plan(cu_seqlens, q.shape[1], options.chunk_size, False)
        return run(Call(q, tokens, state.fast_weights, plan, options), backend)[0]
    if initial_state is None or checks.left_inference_mode(state.weights[0]):
        state = state.map(torch.clone)  # its own memory: an optimizer changes w0, w1, w2 in place
    offsets = None if cu_seqlens is None else packed_offsets(cu_seqlens, q.shape[1])
    o, state = _continue(
        Call(q, tokens, state.fast_weights, None, options), state, offsets, backend
    )
    return (o, state) if return_state else o


def autocast_inputs(q: Tensor, tokens: Tokens, weights) -> tuple[Tensor, Tokens, tuple]:
    """The arguments as they are, or where autocast has made dtypes that do not fit, in those that do."""
    if not autocasts(q):
        return q, tokens, weights
    qkv, scalars = (q, *tokens[:2]), tokens[2:]
    if len({x.dtype for x in qkv if isinstance(x, Tensor)}) > 1:
        qkv = tree_map_only(Tensor, lambda x: x.to(autocast_dtype(x)), qkv)
    scalars, weights = tree_map_only(
        Tensor, lambda x: x.float() if x.dtype in HALF_DTYPES else x, (scalars, weights)
    )
    return qkv[0], Tokens(*qkv[1:], *scalars), weights


def new_state(weights, N: int, options: Options, dtype: torch.dtype) -> TTTState:
    """The state before the first token of N sequences, which shares the memory of the weights."""
    weights = tuple(w.expand(N, *w.shape[-3:]) for w in weights)
    norms = tuple(torch.linalg.vector_norm(w, dim=-1) for w in weights)
    buffers = ()
    if options.momentum:
        buffers = tuple(w.new_zeros(()).expand(w.shape) for w in weights)
    masters = weights if options.prenorm else ()
    return TTTState.of(FastWeights(weights, norms, masters, buffers), options, dtype)


def run(call: Call, backend: Backend) -> tuple[Tensor, FastWeights | None]:
    """The registered op: outputs, and with `return_end` the fast weights after the last update."""
    q, tokens, start, plan, options, ranks = call
    start = start.to_list()
    interval = options.checkpoint_interval
    if not checks.may_need_backward(q, *tokens, *start):
        interval = 0
    o, end, _ = ttt_fwd(
        q, *tokens, start, plan, options.chunk_size, options.muon, options.prenorm,
        options.return_end, interval, backend, ranks,
    )  # fmt: skip
    return o, FastWeights.from_list(end, options.prenorm) if end else None


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


def check_call(q, tokens: Tokens, weights, rows: int, state, options: Options) -> Options:
    """What every call must fulfil; `rows` is the number of its sequences.

    Returns:
        The options, with plain numbers.
    """
    chunk_size = checks.check_count("chunk_size", options.chunk_size)
    checks.check_flags(muon=options.muon, prenorm=options.prenorm)
    interval = checks.check_count("checkpoint_interval", options.checkpoint_interval)
    # Not by `_replace`: torch.compile loses what it makes where a call is compiled in parts.
    options = Options(chunk_size, *options[1:5], interval)
    _check_tensors(q, tokens, weights, rows)
    if state is not None:
        _check_state(state, tokens, weights, rows, options.shared)
    return options


def _check_tensors(q, tokens: Tokens, weights, rows: int) -> None:
    k, v, *lrs, momentum = tokens
    checks.check_floating("q", q, "[B, T, H, Dk]")
    checks.check_floating("v", v, "[B, T, H, Dv]")
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    checks.check_tensor("k", k, (B, T, H, Dk), "[B, T, H, Dk]", q.dtype, q.device)
    checks.check_tensor("v", v, (B, T, H, Dv), "[B, T, H, Dv]", q.dtype, q.device)

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    checks.check_floating("w0", weights[0], "[H, Dh, Dk]", "[B, H, Dh, Dk]")
    Dh = weights[0].shape[-2]
    shapes = {
        "w0": ((H, Dh, Dk), "H, Dh, Dk"),
        "w1": ((H, Dv, Dh), "H, Dv, Dh"),
        "w2": ((H, Dh, Dk), "H, Dh, Dk"),
    }
    for (name, (shape, layout)), w in zip(shapes.items(), weights):
        batched = isinstance(w, Tensor) and w.ndim == 4
        shape, layout = ((rows, *shape), f"[B, {layout}]") if batched else (shape, f"[{layout}]")
        _check_wide(name, w, shape, layout, wide, q.device)
    for name, x in zip(("lr0", "lr1", "lr2", "momentum"), (*lrs, momentum)):
        if x is not None or name != "momentum":
            _check_wide(name, x, (B, T, H), "[B, T, H]", wide, q.device)


def _check_wide(name: str, x: Tensor, shape, layout: str, dtype, device) -> None:
    if isinstance(x, Tensor) and x.dtype in HALF_DTYPES:
        raise TypeError(
            f"{name} must have the dtype {dtype}, got {x.dtype}: weights, rates and momentum are not"
            f" rounded to 16 bits, pass {name}.to({dtype})"
        )
    checks.check_tensor(name, x, shape, layout, dtype, device)


def triton_obstacle(q, v, w0) -> str | None:
    for name, size in (("Dk", q.shape[-1]), ("Dv", v.shape[-1]), ("Dh", w0.shape[-2])):
        if size > MAX_TRITON_DIM:
            return f"Dk, Dv and Dh go up to {MAX_TRITON_DIM}, got {name} = {size} (choose a smaller one)"
    return None


def _check_state(state, tokens: Tokens, weights, rows: int, options: Options) -> None:
    if not isinstance(state, TTTState):
        raise TypeError(f"initial_state must be a TTTState, got {type(state).__name__}")
    if state.options != options:
        raise ValueError(f"initial_state was made with {state.options}; this call has {options}")
    for i, (ours, w) in enumerate(zip(state.weights, weights)):
        layout = f"[N, H, {('Dh, Dk', 'Dv, Dh', 'Dh, Dk')[i]}] of this call"
        shape = (rows, *w.shape[-3:])
        checks.check_tensor(f"initial_state.weights[{i}]", ours, shape, layout, w.dtype, w.device)
    for name, i, x in (("k", 0, tokens.k), ("v", 1, tokens.v)):
        for waiting in state.pending[:1]:
            shape = (rows, waiting[i].shape[1], *x.shape[2:])
            layout = "[N, pending, H, D] of this call"
            checks.check_tensor(
                f"initial_state.pending.{name}", waiting[i], shape, layout, x.dtype, x.device
            )
    if state.dtype != tokens.k.dtype:
        dtype = tokens.k.dtype
        raise TypeError(f"initial_state was made of {state.dtype} tokens; this call has {dtype}")
