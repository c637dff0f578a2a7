"""What `ttt` and `block_causal_ttt` share: checks, the state before the first token, the registered op."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lact_kernels.autograd.ttt import ttt_fwd
from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights, wide_dtype
from lact_kernels.core.newton_schulz import LACT, NewtonSchulz
from lact_kernels.core.state import TTTState
from lact_kernels.core.tokens import Tokens
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import autocast_dtype, autocasts
from lact_kernels.ops.checks import Backend

MAX_TRITON_DIMS = {"Dk": 2048, "Dv": 2048, "Dh": 4096}
HALF_DTYPES = (torch.float16, torch.bfloat16)


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


def new_state(
    weights, N: int, options: Options, dtype: torch.dtype, detach_norms: bool = False
) -> TTTState:
    """The state before the first token of N sequences, which shares the memory of the weights."""
    start = new_start(weights, N).begun(options.prenorm, options.momentum, detach_norms)
    return TTTState.of(start, options, dtype)


def new_start(weights, N: int) -> FastWeights:
    """The weights before the first token of N sequences, alone."""
    if N == 1:  # as a view, whose gradient is one, too
        return FastWeights(tuple(w if w.ndim == 4 else w[None] for w in weights))
    return FastWeights(tuple(w.expand(N, *w.shape[-3:]) for w in weights))


def run(call: Call, backend: Backend) -> tuple[Tensor, FastWeights | None]:
    """The registered op: outputs, and with `return_end` the fast weights after the last update."""
    q, tokens, start, plan, options, ranks = call
    start = start.to_list()
    interval = options.checkpoint_interval
    if not checks.may_need_backward(q, *tokens, *start):
        interval = 0
    o, end, _ = ttt_fwd(
        q, *tokens, start, plan, options.chunk_size, options.muon_text, options.prenorm, options.weight_norm,
        options.momentum_after_muon, options.return_end, interval, backend, ranks,
    )  # fmt: skip
    return o, FastWeights.from_list(end, options.prenorm) if end else None


def check_call(
    q, tokens: Tokens, weights, rows: int, state, options: Options, num_keys: int | None = None
) -> Options:
    """What every call must fulfil; `rows` is the number of its sequences.

    A call of `block_causal_ttt` has as many keys as queries, and rates for every weight. With `num_keys` it
    has so many, and rates of None where a weight is not trained.

    Returns:
        The options, with plain numbers.
    """
    chunk_size = options.chunk_size
    if chunk_size is not None:
        chunk_size = checks.check_count("chunk_size", chunk_size)
    checks.check_flags(
        prenorm=options.prenorm,
        weight_norm=options.weight_norm,
        momentum_after_muon=options.momentum_after_muon,
    )
    muon = _check_muon(options.muon)
    interval = checks.check_count("checkpoint_interval", options.checkpoint_interval)
    # Not by `_replace`: torch.compile loses what it makes where a call is compiled in parts.
    options = Options(chunk_size, muon, *options[2:7], interval)
    _check_tensors(q, tokens, weights, rows, num_keys)
    if options.momentum_after_muon and (options.muon is False or not options.momentum):
        raise ValueError(
            "momentum_after_muon=True needs muon and momentum, got"
            f" muon={options.muon} and momentum {'given' if options.momentum else 'None'}"
        )
    if state is not None:
        _check_state(state, tokens, weights, rows, options.shared)
    return options


def _check_muon(muon: bool | NewtonSchulz) -> bool | NewtonSchulz:
    """`muon` as one of its spellings: True where the coefficients are LaCT's."""
    if not isinstance(muon, (bool, NewtonSchulz)):
        raise TypeError(f"muon must be True, False or a NewtonSchulz, got {muon!r}")
    return True if muon == LACT else muon


def _check_tensors(q, tokens: Tokens, weights, rows: int, num_keys: int | None) -> None:
    k, v, *rates, momentum = tokens
    checks.check_floating("q", q, "[B, T, H, Dk]")
    checks.check_floating("v", v, "[B, T, H, Dv]")
    B, T, H, Dk = q.shape
    Dv, t = v.shape[-1], "T"
    optional = ("momentum",)
    if num_keys is not None:
        T, t, optional = num_keys, "Tk", ("lr0", "lr1", "lr2", "momentum")
    checks.check_tensor("k", k, (B, T, H, Dk), f"[B, {t}, H, Dk]", q.dtype, q.device)
    checks.check_tensor("v", v, (B, T, H, Dv), f"[B, {t}, H, Dv]", q.dtype, q.device)

    wide = wide_dtype(q)
    checks.check_floating("w0", weights[0], "[H, Dh, Dk]", "[B, H, Dh, Dk]")
    for name, w, shape, layout in weight_layouts(weights, rows, H, (Dk, Dv, weights[0].shape[-2])):
        _check_wide(name, w, shape, layout, wide, q.device)
    for name, x in zip(("lr0", "lr1", "lr2", "momentum"), (*rates, momentum)):
        if x is not None or name not in optional:
            _check_wide(name, x, (B, T, H), f"[B, {t}, H]", wide, q.device)


def weight_layouts(
    weights, rows: int, H: int, sizes: tuple[int, int, int]
) -> Iterator[tuple[str, Any, tuple[int, ...], str]]:
    """Name, value, and shape and layout to have, of weights with one set for all rows, or one for each.

    `sizes` are Dk, Dv and Dh.
    """
    Dk, Dv, Dh = sizes
    shapes = {
        "w0": ((H, Dh, Dk), "H, Dh, Dk"),
        "w1": ((H, Dv, Dh), "H, Dv, Dh"),
        "w2": ((H, Dh, Dk), "H, Dh, Dk"),
    }
    for (name, (shape, layout)), w in zip(shapes.items(), weights):
        batched = isinstance(w, Tensor) and w.ndim == 4
        shape, layout = ((rows, *shape), f"[B, {layout}]") if batched else (shape, f"[{layout}]")
        yield name, w, shape, layout


def _check_wide(name: str, x: Tensor, shape, layout: str, dtype, device) -> None:
    if isinstance(x, Tensor) and x.dtype in HALF_DTYPES:
        raise TypeError(
            f"{name} must have the dtype {dtype}, got {x.dtype}: weights, rates and momentum are not"
            f" rounded to 16 bits, pass {name}.to({dtype})"
        )
    checks.check_tensor(name, x, shape, layout, dtype, device)


def triton_obstacle(q, v, w0) -> str | None:
    return size_obstacle(q.shape[-1], v.shape[-1], w0.shape[-2])


def size_obstacle(Dk: int, Dv: int, Dh: int) -> str | None:
    """What keeps a network of these sizes from the kernels, if anything does."""
    for (name, most), size in zip(MAX_TRITON_DIMS.items(), (Dk, Dv, Dh)):
        if size > most:
            return f"{name} goes up to {most}, got {name} = {size} (choose a smaller one)"
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
