"""`block_causal_ttt`: test-time training of SwiGLU fast weights, chunk by chunk."""

import torch
from torch import Tensor

from lact_kernels.autograd.block_causal_ttt import block_causal_ttt_fwd, num_updates
from lact_kernels.ops import checks
from lact_kernels.ops.ttt_state import TTTState, TTTTokens, describe_options, joined_tokens

__all__ = ["TTTState", "TTTTokens", "block_causal_ttt"]


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
    backend: str = "auto",
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
        lr0: learning rate of each token for w0, `[B, T, H]`, at least 0.
        lr1: the same for w1.
        lr2: the same for w2.
        chunk_size: tokens from one update to the next, at least 1.
        momentum: `[B, T, H]` in [0, 1]; its mean over a chunk is the share of the last step kept.
        muon: orthogonalise each step by five Newton-Schulz iterations.
        prenorm: accumulate steps in un-normalised masters instead of the normalised weights.
        cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`); the
            fast weights start afresh in each. It starts at 0, does not descend and ends at T.
        initial_state: go on where the call that returned this state stopped. Then the weights come
            from it, and w0, w1, w2 are only checked against it. It has one entry for each batch row
            or packed sequence.
        return_state: also return the state after the last token. Cutting a sequence anywhere, any
            number of times, and passing the state on gives the outputs of one call.
        backend: `"eager"` (any device), or `"auto"`. There are no Triton kernels for this operation
            yet: `"triton"` raises.

    Returns:
        The outputs `[B, T, H, Dv]` in the dtype of q, and with `return_state` also the `TTTState`.
        Gradients flow to every floating-point argument, through every update, through
        `initial_state` and through the returned state; a state holds on to the graph that made it
        (`state.map(torch.Tensor.detach)` cuts it). Weights and updates are float32; matrix products
        take the input dtype and accumulate in float32; Newton-Schulz runs in float32. Beside its
        inputs, the backward keeps two (pre-norm: three) float32 copies of the weights per update.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value, or a state that does not fit the call. Both name
            the argument, what came and what was expected, before any work starts.

    Source: arXiv 2505.23884, sections 3.1 and 3.2, and its shifted block-causal order, section 3.3.
    """
    checks.check_flag("return_state", return_state)
    _check_inputs(q, k, v, (w0, w1, w2), (lr0, lr1, lr2), momentum, cu_seqlens)
    _check_options(chunk_size, muon, prenorm, backend)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = tuple(w.expand(N, *w.shape[-3:]) for w in (w0, w1, w2))
    if initial_state is not None:
        _check_state(initial_state, k, v, weights, chunk_size, muon, prenorm, momentum)
    state = initial_state or _initial_state(weights, chunk_size, muon, prenorm, momentum)
    tokens = (k, v, lr0, lr1, lr2, momentum)
    if initial_state is None and not return_state:
        return _run(q, tokens, state, cu_seqlens)[0]
    if initial_state is None:
        state = state.map(torch.clone)  # its own memory: an optimizer changes w0, w1, w2 in place
    o, state = _continue(q, tokens, state, cu_seqlens, return_state)
    return (o, state) if return_state else o


def _initial_state(weights, chunk_size, muon, prenorm, momentum) -> TTTState:
    norms = tuple(torch.linalg.vector_norm(w, dim=-1) for w in weights)
    buffers = () if momentum is None else tuple(w.new_zeros(()).expand(w.shape) for w in weights)
    return TTTState(weights, norms, weights if prenorm else (), buffers, (), chunk_size, muon)


def _run(q, tokens, state: TTTState, cu_seqlens=None, return_end: bool = False):
    """The registered op: outputs, and with `return_end` the state after the last full chunk."""
    fast_weights = [x for triple in state[:4] for x in triple]
    o, end, _ = block_causal_ttt_fwd(
        q,
        *tokens,
        fast_weights,
        cu_seqlens,
        state.chunk_size,
        state.muon,
        len(state.masters) > 0,
        return_end,
    )
    if return_end:
        end = iter(end)
        state = TTTState(
            *(tuple(next(end) for _ in triple) for triple in state[:4]), (), *state[5:]
        )
    return o, state


def _continue(q, tokens, state: TTTState, cu_seqlens, return_state: bool):
    """Outputs, and the state after these tokens.

    Sequences none of which fills a chunk only apply their weights, together. Those that stand at
    the same place of their chunk are scanned together. All others are taken one by one.
    """
    B, T = q.shape[:2]
    offsets = None if cu_seqlens is None else checks.packed_offsets(cu_seqlens, T)
    spans = [(0, T)] * B if offsets is None else list(zip(offsets, offsets[1:]))
    lengths = tuple(stop - start for start, stop in spans)
    pending = state.pending_lengths
    C = state.chunk_size
    if not any(num_updates(p + t, C, return_state) for p, t in zip(pending, lengths)):
        o, _ = _run(q, tokens, state, cu_seqlens)
        return o, state.append(_as_tokens(tokens, spans, lengths, cu_seqlens))

    if cu_seqlens is None and len(set(pending)) == 1:
        joined = joined_tokens(state, TTTTokens(*tokens, lengths))
        o, end = _run(q, joined, state, return_end=return_state)
        if not return_state:
            return o, None
        left = (pending[0] + T) % C
        rest = (None if x is None else x[:, x.shape[1] - left :] for x in joined)
        return o, end.append(TTTTokens(*rest, (left,) * B))

    outputs, states = [], []
    for n, (start, stop) in enumerate(spans):
        at = (slice(n, n + 1),) if cu_seqlens is None else (slice(None), slice(start, stop))
        row = tuple(None if x is None else x[at] for x in tokens)
        o, end = _continue(q[at], row, state.entry(n), None, return_state)
        outputs.append(o)
        states.append(end)
    o = torch.cat(outputs, dim=0 if cu_seqlens is None else 1)
    return o, TTTState.stack(states) if return_state else None


def _as_tokens(tokens, spans, lengths, cu_seqlens) -> TTTTokens:
    """The tokens of a call as one piece of a state: a packed row is cut up and padded."""
    if cu_seqlens is not None:
        tokens = (
            None
            if x is None
            else torch.nn.utils.rnn.pad_sequence([x[0, a:b] for a, b in spans], True)
            for x in tokens
        )
    return TTTTokens(*tokens, lengths)


def _check_inputs(q, k, v, weights, lrs, momentum, cu_seqlens) -> None:
    checks.check_floating("q", q, "[B, T, H, Dk]")
    checks.check_floating("v", v, "[B, T, H, Dv]")
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    checks.check_tensor("k", k, (B, T, H, Dk), "[B, T, H, Dk]", q.dtype, q.device)
    checks.check_tensor("v", v, (B, T, H, Dv), "[B, T, H, Dv]", q.dtype, q.device)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    checks.check_floating("w0", weights[0], "[H, Dh, Dk]", "[B, H, Dh, Dk]")
    Dh = weights[0].shape[-2]
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = {
        "w0": ((H, Dh, Dk), "H, Dh, Dk"),
        "w1": ((H, Dv, Dh), "H, Dv, Dh"),
        "w2": ((H, Dh, Dk), "H, Dh, Dk"),
    }
    for (name, (shape, layout)), w in zip(shapes.items(), weights):
        batched = isinstance(w, Tensor) and w.ndim == 4
        shape, layout = ((rows, *shape), f"[B, {layout}]") if batched else (shape, f"[{layout}]")
        checks.check_tensor(name, w, shape, layout, wide, q.device)
    for name, x in zip(("lr0", "lr1", "lr2", "momentum"), (*lrs, momentum)):
        if x is not None or name != "momentum":
            checks.check_tensor(name, x, (B, T, H), "[B, T, H]", wide, q.device)


def _check_options(chunk_size, muon, prenorm, backend) -> None:
    checks.check_positive_int("chunk_size", chunk_size)
    checks.check_flag("muon", muon)
    checks.check_flag("prenorm", prenorm)
    checks.check_backend(backend)
    if backend == "triton":
        raise ValueError(
            "backend='triton' cannot run: block_causal_ttt has no Triton kernels; use 'eager' or 'auto'"
        )


def _check_state(state, k, v, weights, chunk_size, muon, prenorm, momentum) -> None:
    if not isinstance(state, TTTState):
        raise TypeError(f"initial_state must be a TTTState, got {type(state).__name__}")
    options = describe_options(chunk_size, muon, prenorm, momentum is not None)
    if state.options != options:
        raise ValueError(f"initial_state was made with {state.options}; this call has {options}")
    for i, (ours, w) in enumerate(zip(state.weights, weights)):
        layout = "[N, H, rows, columns] of the call"
        checks.check_tensor(f"initial_state.weights[{i}]", ours, w.shape, layout, w.dtype, w.device)
    for name, i, x in (("k", 0, k), ("v", 1, v)):
        for piece in state.pending[:1]:
            shape = (len(weights[0]), piece[i].shape[1], *x.shape[2:])
            layout = "[N, pending, H, D] of the call"
            checks.check_tensor(
                f"initial_state.pending.{name}", piece[i], shape, layout, x.dtype, x.device
            )
