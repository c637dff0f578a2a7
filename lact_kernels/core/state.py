"""`TTTState`: what `block_causal_ttt` and `ttt` need to go on where an earlier call stopped."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.call import Options
from lact_kernels.core.fast_weights import FastWeights, Triple
from lact_kernels.core.newton_schulz import NewtonSchulz
from lact_kernels.core.tokens import Tokens


class TTTTokens(NamedTuple):
    """Tokens of a chunk that is not full yet: k `[N, t, H, Dk]`, v `[N, t, H, Dv]`, the rest `[N, t, H]`.

    Entry n holds `lengths[n]` tokens; what lies behind them is padding.
    """

    k: Tensor
    v: Tensor
    lr0: Tensor
    lr1: Tensor
    lr2: Tensor
    momentum: Tensor | None
    lengths: tuple[int, ...]

    def __repr__(self) -> str:
        shapes = f"k {list(self.k.shape)}, v {list(self.v.shape)}"
        return f"TTTTokens({shapes}, {_said(self.lengths)}, {self.k.dtype} on {self.k.device})"

    @classmethod
    def padded(cls, sequences: Sequence[Tokens]) -> "TTTTokens":
        """Of sequences `[t, ...]` of any lengths."""
        first, *rest = sequences
        padded = first.map(lambda *xs: _padded(xs), *rest)
        return cls(*padded, tuple(len(x.k) for x in sequences))

    @property
    def tokens(self) -> Tokens:
        return Tokens(*self[:6])

    def sequences(self) -> list[Tokens]:
        """Each entry without its padding, `[t, ...]`."""
        rows = self.tokens.split((1,) * len(self.lengths), dim=0)
        return [row.map(lambda x, t=t: x[0, :t]) for row, t in zip(rows, self.lengths)]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TTTTokens":
        return TTTTokens(*self.tokens.map(fn), self.lengths)

    @property
    def is_padded(self) -> bool:
        return any(length != self.k.shape[1] for length in self.lengths)


class TTTState(NamedTuple):
    """Fast weights in the middle of N sequences. A plain tuple of tensors, never changed in place.

    Attributes:
        weights: the current w0, w1, w2, `[N, H, rows, columns]`, float32 (float64 for float64 tokens).
        norms: the norms of the initial weights' rows, `[N, H, rows]`, which every update restores.
        masters: weights before renorm, pre-norm only, else empty.
        buffers: momentum, where the calls are given any, else empty.
        pending: the tokens since the last update, in order, as one or more `TTTTokens`. Short ones are
            merged as more arrive, so that a token is copied at most log2(chunk_size) times while it waits.
        chunk_size, muon, weight_norm, momentum_after_muon: options that every call of one sequence shares.
            `chunk_size` is None, and no token is pending, after a plan.
        dtype: that of the tokens.
    """

    weights: Triple
    norms: Triple
    masters: Triple
    buffers: Triple
    pending: tuple[TTTTokens, ...]
    chunk_size: int | None
    muon: bool | NewtonSchulz
    dtype: torch.dtype
    weight_norm: bool = True
    momentum_after_muon: bool = False

    def __repr__(self) -> str:
        w0, w1, w2 = (f"w{i} {list(w.shape)}" for i, w in enumerate(self.weights))
        return (
            f"TTTState({w0}, {w1}, {w2}, {self.weights[0].dtype} on {self.weights[0].device},"
            f" {self.options}, {_said(self.pending_lengths)} of {self.dtype} pending)"
        )

    @staticmethod
    def of(fast: FastWeights, options: Options, dtype: torch.dtype) -> "TTTState":
        """With no token pending."""
        chunk_size, muon, *_ = options
        how = options.weight_norm, options.momentum_after_muon
        return TTTState(*fast, (), chunk_size, muon, dtype, *how)

    @property
    def fast_weights(self) -> FastWeights:
        return FastWeights(*self[:4])

    @property
    def num_sequences(self) -> int:
        return self.weights[0].shape[0]

    @property
    def pending_lengths(self) -> tuple[int, ...]:
        """How many tokens of its current chunk each sequence has read."""
        columns = [waiting.lengths for waiting in self.pending]
        return tuple(map(sum, zip(*columns))) if columns else (0,) * self.num_sequences

    def append(self, tokens: TTTTokens) -> "TTTState":
        """The state after more tokens that do not fill a chunk. They are copied."""
        if not any(tokens.lengths):
            return self
        tokens = tokens.map(torch.clone)
        pending = list(self.pending)
        while pending and _can_merge(pending[-1], tokens):
            last = pending.pop()
            lengths = tuple(x + y for x, y in zip(last.lengths, tokens.lengths))
            tokens = TTTTokens(*Tokens.cat([last.tokens, tokens.tokens]), lengths)
        return TTTState(*self[:4], (*pending, tokens), *self[5:])

    def entry(self, n: int) -> "TTTState":
        """The state of sequence n alone (N = 1), 0 <= n < N."""
        if not 0 <= n < self.num_sequences:
            raise IndexError(f"n must be from 0 to {self.num_sequences - 1}, got {n}")
        pending = (
            TTTTokens(*waiting.tokens.map(lambda x, t=t: x[n : n + 1, :t]), (t,))
            for waiting in self.pending
            if (t := waiting.lengths[n])
        )
        fast = self.fast_weights.at(slice(n, n + 1))
        return TTTState(*fast, tuple(pending), *self[5:])

    def select(self, rows: Tensor) -> "TTTState":
        """The sequences of these numbers, int64 `[N']`, in this order, as copies: for beam search.

        Raises:
            TypeError: `rows` is no tensor of this dtype.
            ValueError: it has another shape, or names a sequence that does not exist.
        """
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            raise TypeError(f"rows must be an int64 tensor [N'], got {rows!r}")
        numbers, N = rows.tolist(), self.num_sequences
        if rows.ndim != 1 or not all(0 <= n < N for n in numbers):
            raise ValueError(f"rows must name sequences of 0 .. {N - 1} in one axis, got {numbers}")
        pending = (
            TTTTokens(
                *waiting.tokens.map(lambda x: x.index_select(0, rows)),
                tuple(waiting.lengths[n] for n in numbers),
            )
            for waiting in self.pending
        )
        fast = self.fast_weights.map(lambda x: x.index_select(0, rows))
        return TTTState(*fast, tuple(pending), *self[5:])

    @staticmethod
    def stack(states: list["TTTState"]) -> "TTTState":
        """The states of several sequences as one, in order. Their options and dtype must be the same."""
        if not states:
            raise ValueError("states must have at least one TTTState, got none")
        first = states[0]
        for other in states[1:]:
            if other.options != first.options:
                raise ValueError(f"cannot stack states of ({first.options}) and ({other.options})")
            if other.dtype != first.dtype:
                raise ValueError(f"cannot stack states of {first.dtype} and {other.dtype} tokens")
        fields = [tuple(map(torch.cat, zip(*triples))) for triples in zip(*(s[:4] for s in states))]
        return TTTState(*fields, _stacked(states), *first[5:])

    @property
    def options(self) -> Options:
        """The options of the calls that made this state."""
        given = bool(self.masters), bool(self.buffers)
        return Options(self.chunk_size, self.muon, *given, *self[8:])

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TTTState":
        """The state with `fn` applied to every tensor: `state.map(torch.Tensor.detach)`."""
        pending = tuple(waiting.map(fn) for waiting in self.pending)
        return TTTState(*self.fast_weights.map(fn), pending, *self[5:])


def joined_tokens(state: TTTState, tokens: Tokens) -> Tokens:
    """The pending and the new tokens of entries that have equally many of each, `[N, t, ...]`.

    What is pending may still be padded: entries that were fed 1 + 2 tokens and 2 + 1 tokens have three each.
    """
    if not any(waiting.is_padded for waiting in state.pending):
        return Tokens.cat([*(waiting.tokens for waiting in state.pending), tokens])
    N, t = tokens.k.shape[:2]
    row = behind_pending(state, tokens.as_row(), (t,) * N)
    return row.map(lambda x: x[0].unflatten(0, (N, -1)))


def behind_pending(
    state: TTTState, row: Tokens, lengths: Sequence[int], entries: slice = slice(None)
) -> Tokens:
    """Sequences of these lengths in one row, `[1, t, ...]`, each behind its pending tokens.

    `entries` are those of the state that the sequences are.
    """
    if not state.pending:
        return row
    pending = [waiting.sequences()[entries] for waiting in state.pending]
    parts = [part for parts in zip(*pending, row.sequences(lengths)) for part in parts]
    return Tokens.cat(parts, dim=0).map(lambda x: x[None])


def _said(lengths: Sequence[int]) -> str:
    """How many tokens sequences of these lengths have: one number, or the least and the most."""
    numbers = sorted({min(lengths, default=0), max(lengths, default=0)})
    return f"{' to '.join(map(str, numbers))} tokens"


def _padded(sequences: Sequence[Tensor]) -> Tensor:
    """`[N, longest, ...]`. The backward of torch's `pad_sequence` copies all of it for each sequence."""
    longest = max(x.shape[0] for x in sequences)
    zeros = sequences[0].new_zeros(longest, *sequences[0].shape[1:])
    parts = [part for x in sequences for part in (x, zeros[: longest - x.shape[0]])]
    return torch.cat(parts).unflatten(0, (len(sequences), longest))


def _can_merge(last: TTTTokens, tokens: TTTTokens) -> bool:
    smaller = last.k.shape[1] <= tokens.k.shape[1]
    return smaller and not last.is_padded and not tokens.is_padded


def _stacked(states: Sequence[TTTState]) -> tuple[TTTTokens, ...]:
    """The pending tokens of all sequences of some states, padded to the longest."""
    given = [waiting.tokens for state in states for waiting in state.pending]
    if not given:
        return ()
    none = given[0].map(lambda x: x.new_empty(0, *x.shape[2:]))
    sequences = []
    for state in states:
        columns = [waiting.sequences() for waiting in state.pending]
        for n in range(state.num_sequences):
            sequences.append(Tokens.cat([none, *(column[n] for column in columns)], dim=0))
    return (TTTTokens.padded(sequences),)
