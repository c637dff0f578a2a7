"""`block_causal_ttt` of sequences that are sharded over ranks, in two ways.

*Across chunks.* Each rank scans the chunks of its shard, and sends the fast weights to the next before it
applies its queries. Scans follow one another; all else is parallel, and so are different layers: while a
rank waits for the fast weights of one, those before it are in the next. The tokens of a chunk that has begun
on an earlier rank are fetched from there.

*Within chunks.* Each rank has a part of the tokens of a chunk. The weight gradients are summed over the
ranks, once per chunk, and every rank makes the same update.
"""

import itertools
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from lact_kernels.autograd.derivatives import refuse_transforms
from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.state import TTTState, TTTTokens, joined_tokens
from lact_kernels.core.tokens import Tokens
from lact_kernels.distributed.across_chunks import scan_across_chunks
from lact_kernels.distributed.exchange import TokenExchange, exchanged
from lact_kernels.distributed.pending import pending_lengths
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.within_chunks import scan_within_chunks
from lact_kernels.ops import checks
from lact_kernels.ops import fast_weights as ops
from lact_kernels.ops.checks import Backend

Scheme = Literal["auto", "across_chunks", "within_chunks"]
SCHEMES = get_args(Scheme)


@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, pieces: SequencePieces, scheme: Scheme = "auto",
    chunk_size: int = 2048, momentum: Tensor | None = None, muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, pieces: SequencePieces, scheme: Scheme = "auto",
    chunk_size: int = 2048, momentum: Tensor | None = None, muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: Literal[True],
) -> tuple[Tensor, TTTState]: ...  # fmt: skip
@overload
def block_causal_ttt(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    lr0: Tensor, lr1: Tensor, lr2: Tensor, *, pieces: SequencePieces, scheme: Scheme = "auto",
    chunk_size: int = 2048, momentum: Tensor | None = None, muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    initial_state: TTTState | None = None, checkpoint_interval: int = 1, backend: Backend = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TTTState]: ...  # fmt: skip
@torch.compiler.disable  # what is compiled calls it as it is: all ranks must take part in the same order
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
    pieces: SequencePieces,
    scheme: Scheme = "auto",
    chunk_size: int = 2048,
    momentum: Tensor | None = None,
    muon: bool | NewtonSchulz = False,
    prenorm: bool = False,
    initial_state: TTTState | None = None,
    return_state: bool = False,
    checkpoint_interval: int = 1,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, TTTState]:
    """`lact_kernels.block_causal_ttt` of sequences that the ranks of a mesh hold in pieces.

    Every rank gives its own t tokens, and gets their outputs. All ranks must call it, and all must run the
    backward if one does.

    Args:
        q: queries of this rank's tokens, `[B, t, H, Dk]`.
        k: their keys, `[B, t, H, Dk]`.
        v: their values, `[B, t, H, Dv]`.
        w0, w1, w2: the initial weights, the same on every rank. `[H, ...]` as in
            `lact_kernels.block_causal_ttt`, or `[N, H, ...]` with one set for each batch row or each packed
            sequence of the whole row.
        lr0, lr1, lr2: learning rates of this rank's tokens, `[B, t, H]`.
        pieces: who holds which tokens, with the borders of packed sequences if there are any.
        scheme: `"across_chunks"` for contiguous pieces: a rank receives and sends 3 H Dh D float32 weights
            (twice that with pre-norm or momentum, three times with both) for each row, and as many gradients
            in the backward, and the tokens of an unfinished chunk. `"within_chunks"` for any pieces: one
            all-reduce of 3 H Dh D float32 per chunk and row in each direction, and one of the chunks' mean
            momentum. `"auto"` is across chunks where there are at least as many chunks as ranks.
        momentum: of this rank's tokens, `[B, t, H]`.
        initial_state: go on where an earlier call stopped; the same on every rank. The rows of a batch must
            stand at the same place of their chunks.
        return_state: also return the state after the last token, whole on every rank. It is sent to all, and
            so are the tokens of unfinished chunks.
        chunk_size, muon, prenorm, checkpoint_interval, backend: as in `lact_kernels.block_causal_ttt`. With a
            checkpoint interval in the scheme within chunks the backward repeats the all-reduces of the scan.

    Returns:
        The outputs `[B, t, H, Dv]`, and with `return_state` the `TTTState`. Gradients are exact, and the
        objective is the sum of what the ranks derive. What is the same on every rank (weights, states) gets
        on each rank a part of its gradient, whose sum over the ranks is the whole; use a returned state
        alike on all ranks.

    Raises:
        TypeError, ValueError: as `lact_kernels.block_causal_ttt`, or what the ranks give does not fit
            together.
        RuntimeError: a wrong argument on another rank, or a rank that does not answer within the timeout of
            the process group.

    Source: arXiv 2505.23884, whose context parallelism is the scheme within chunks.
    """
    tokens, weights = Tokens(k, v, lr0, lr1, lr2, momentum), (w0, w1, w2)
    refuse_transforms("lact_kernels.distributed.block_causal_ttt", q, *tokens, *weights)
    if isinstance(q, Tensor):
        q, tokens, weights = ops.autocast_inputs(q, tokens, weights)
    options = Options(
        chunk_size, muon, prenorm, momentum is not None,
        return_end=return_state, checkpoint_interval=checkpoint_interval,
    )  # fmt: skip

    def facts():
        nonlocal options
        checks.check_floating("q", q, "[B, T, H, Dk]")
        rows = len(pieces.borders) - 1 if pieces.packed else q.shape[0]
        options = ops.check_call(q, tokens, weights, rows, initial_state, options)
        checks.check_flag("return_state", return_state)
        checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0))
        _check_pieces(q, pieces, scheme, options.chunk_size, initial_state)
        fields = weights
        if initial_state is not None:
            fields = initial_state.fast_weights.to_list()
        return {
            "q": (q.shape[0], *q.shape[2:]),
            "v": tuple(v.shape[2:]),
            "dtype": str(q.dtype),
            "weights": tuple(tuple(w.shape) for w in weights),
            "chunk_size": options.chunk_size,
            "muon": options.muon,
            "prenorm": prenorm,
            "momentum": options.momentum,
            "scheme": scheme,
            "initial_state": initial_state and initial_state.pending_lengths,
            "return_state": return_state,
            "gradients": checks.needs_gradient(q, *tokens, *fields),
        }

    pieces.agree("block_causal_ttt", facts)
    backend = checks.choose_backend(backend, q, ops.triton_obstacle(q, v, w0))
    N = len(pieces.borders) - 1 if pieces.packed else q.shape[0]
    state = initial_state or ops.new_state(weights, N, options, q.dtype)
    if scheme == "auto":
        contiguous = pieces.chunk_size is None
        across = contiguous and pieces.num_tokens >= pieces.size * options.chunk_size
        scheme = "across_chunks" if across else "within_chunks"
    scan = scan_across_chunks if scheme == "across_chunks" else scan_within_chunks
    call = Call(q, tokens, state.fast_weights, None, options)
    o, end = scan(call, state, pieces, backend)
    if not return_state:
        return o
    return o, _end_state(state, end, tokens, pieces)


def _check_pieces(q, pieces, scheme, chunk_size, state) -> None:
    pieces.check_tokens("q", q)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    pending = () if state is None else state.pending_lengths
    if not pieces.packed and len(set(pending)) > 1:
        raise ValueError(
            "the rows of initial_state must stand at the same place of their chunks, got"
            f" {pending} pending tokens"
        )
    if pieces.chunk_size is not None:
        if scheme == "across_chunks":
            raise ValueError(f"scheme='across_chunks' needs contiguous pieces, got {pieces}")
        if pieces.chunk_size != chunk_size:
            raise ValueError(
                f"pieces are of chunks of {pieces.chunk_size} tokens, and chunk_size is {chunk_size}"
            )
        if any(pending):
            raise ValueError(
                f"initial_state must end with a full chunk for pieces of chunks, got {pending}"
                " pending tokens"
            )


def _end_state(
    state: TTTState, end: FastWeights, tokens: Tokens, pieces: SequencePieces
) -> TTTState:
    """The state after the last token: `end`, and the tokens of chunks that are not full."""
    C, pending = state.chunk_size, pending_lengths(state, pieces)
    spans = list(itertools.pairwise(pieces.borders))
    lengths = [stop - start for start, stop in spans]
    left = [(before + length) % C for before, length in zip(pending, lengths)]
    fetched = [min(rest, length) for rest, length in zip(left, lengths)]
    new = TTTState.of(end, state.options, state.dtype)
    if not any(left):
        return new

    def exchange():
        wanted = [(stop - n, stop) for (_, stop), n in zip(spans, fetched) if n]
        return TokenExchange(pieces, [wanted] * pieces.size)

    rest = exchanged(pieces.once(("end", C, pending), exchange), tokens)
    if not pieces.packed:
        if left[0] > fetched[0]:
            rest = joined_tokens(state, rest)
        return new.append(TTTTokens(*rest, (left[0],) * state.num_sequences))
    sequences = rest.sequences(fetched)
    for n, sequence in enumerate(sequences):
        if left[n] > fetched[n]:
            row = joined_tokens(state.entry(n), sequence.map(lambda x: x[None]))
            sequences[n] = row.map(lambda x: x[0])
    return new.append(TTTTokens.padded(sequences))
