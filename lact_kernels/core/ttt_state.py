"""`TTTState`: what `block_causal_ttt` needs to go on where an earlier call stopped."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.ttt_types import Triple

# The tokens of several sequences: for each field of `TTTTokens` (None: no momentum), one tensor each.
Sequences = list[Sequence[Tensor] | None]


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
    def padded(cls, sequences: Sequences) -> "TTTTokens":
        """Of sequences of any lengths."""
        lengths = tuple(x.shape[0] for x in sequences[0])
        tensors = (None if x is None else _padded(x) for x in sequences)
        return cls(*tensors, lengths)

    def sequences(self) -> Sequences:
        """Without the padding."""
        return [
            None if x is None else [row[:length] for row, length in zip(x, self.lengths)]
            for x in self.tensors
        ]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:-1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TTTTokens":
        return TTTTokens(*(None if x is None else fn(x) for x in self.tensors), self.lengths)

    @property
    def is_padded(self) -> bool:
        return any(length != self.k.shape[1] for length in self.lengths)


class StateOptions(NamedTuple):
    """The options that all calls of one sequence share."""

    chunk_size: int
    muon: bool
    prenorm: bool
    momentum: bool

    def __str__(self) -> str:
        given = "given" if self.momentum else "not given"
        return (
            f"chunk_size={self.chunk_size}, muon={self.muon}, prenorm={self.prenorm},"
            f" momentum {given}"
        )


class TTTState(NamedTuple):
    """Fast weights in the middle of N sequences. A plain tuple of tensors, never changed in place.

    Attributes:
        weights: the current w0, w1, w2, `[N, H, rows, columns]`, float32 (float64 for float64 tokens).
        norms: the norms of the initial weights' rows, `[N, H, rows]`, which every update restores.
        masters: weights before renorm, pre-norm only, else empty.
        buffers: momentum, where the calls are given any, else empty.
        pending: the tokens since the last update, in order, in pieces. Short pieces are merged as
            more arrive, so that a token is copied at most log2(chunk_size) times while it waits.
        chunk_size, muon, dtype: options that every call of one sequence shares, and the tokens' dtype.
    """

    weights: Triple
    norms: Triple
    masters: Triple
    buffers: Triple
    pending: tuple[TTTTokens, ...]
    chunk_size: int
    muon: bool
    dtype: torch.dtype

    def __repr__(self) -> str:
        w0, w1, w2 = (f"w{i} {list(w.shape)}" for i, w in enumerate(self.weights))
        return (
            f"TTTState({w0}, {w1}, {w2}, {self.weights[0].dtype} on {self.weights[0].device},"
            f" {self.options}, {_said(self.pending_lengths)} of {self.dtype} pending)"
        )

    @property
    def num_sequences(self) -> int:
        return self.weights[0].shape[0]

    @property
    def pending_lengths(self) -> tuple[int, ...]:
        """How many tokens of its current chunk each sequence has read."""
        columns = [piece.lengths for piece in self.pending]
        return tuple(map(sum, zip(*columns))) if columns else (0,) * self.num_sequences

    def append(self, tokens: TTTTokens) -> "TTTState":
        """The state after more tokens that do not fill a chunk. They are copied."""
        if not any(tokens.lengths):
            return self
        tokens = tokens.map(torch.clone)
        pieces = list(self.pending)
        while pieces and _can_merge(pieces[-1], tokens):
            tokens = _concatenate(pieces.pop(), tokens)
        return TTTState(*self[:4], (*pieces, tokens), *self[5:])

    def entry(self, n: int) -> "TTTState":
        """The state of sequence n alone (N = 1), 0 <= n < N."""
        if not 0 <= n < self.num_sequences:
            raise IndexError(f"n must be from 0 to {self.num_sequences - 1}, got {n}")
        fields = [tuple(x[n : n + 1] for x in triple) for triple in self[:4]]
        pending = (_entry_tokens(piece, n) for piece in self.pending if piece.lengths[n])
        return TTTState(*fields, tuple(pending), *self[5:])

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
        fields = [tuple(x.index_select(0, rows) for x in triple) for triple in self[:4]]
        pending = (
            TTTTokens(
                *(None if x is None else x.index_select(0, rows) for x in piece.tensors),
                tuple(piece.lengths[n] for n in numbers),
            )
            for piece in self.pending
        )
        return TTTState(*fields, tuple(pending), *self[5:])

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
        pending = _stack_tokens([s.entry(n) for s in states for n in range(s.num_sequences)])
        return TTTState(*fields, pending, *first[5:])

    @property
    def options(self) -> "StateOptions":
        """The options of the calls that made this state."""
        return StateOptions(
            self.chunk_size, self.muon, len(self.masters) > 0, len(self.buffers) > 0
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TTTState":
        """The state with `fn` applied to every tensor: `state.map(torch.Tensor.detach)`."""
        fields = [tuple(map(fn, triple)) for triple in self[:4]]
        pending = tuple(piece.map(fn) for piece in self.pending)
        return TTTState(*fields, pending, *self[5:])


def joined_tokens(state: TTTState, tokens: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The pending and the new tokens of entries that have equally many, `[N, t, ...]`.

    Pieces may still differ: entries that were fed 1 + 2 tokens and 2 + 1 tokens have three each.
    """
    if any(piece.is_padded for piece in state.pending):
        rows = [None if x is None else x.unbind() for x in tokens]
        shape = (state.num_sequences, state.pending_lengths[0] + tokens[0].shape[1])
        packed = packed_tokens(state, rows)
        return [None if x is None else x[0].unflatten(0, shape) for x in packed]
    columns = zip(*(piece.tensors for piece in state.pending), tokens)
    return [None if column[0] is None else torch.cat(column, dim=1) for column in columns]


def split_sequences(tokens, lengths: Sequence[int]) -> Sequences:
    """The tokens `[1, t, ...]` of a packed row, sequence by sequence."""
    return [None if x is None else x[0].split(lengths) for x in tokens]


def packed_tokens(
    state: TTTState, sequences: Sequences, entries: slice = slice(None)
) -> list[Tensor | None]:
    """The pending and the new tokens of each sequence, all end to end in one row, `[1, t, ...]`.

    `entries` are those of the state that the sequences are.
    """
    pending = (
        [None if x is None else x[entries] for x in piece.sequences()] for piece in state.pending
    )
    columns = zip(*pending, sequences)
    return [
        None if column[0] is None else torch.cat([x for parts in zip(*column) for x in parts])[None]
        for column in columns
    ]


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


def _concatenate(a: TTTTokens, b: TTTTokens) -> TTTTokens:
    tensors = [
        None if x is None else torch.cat([x, y], dim=1) for x, y in zip(a.tensors, b.tensors)
    ]
    return TTTTokens(*tensors, tuple(x + y for x, y in zip(a.lengths, b.lengths)))


def _entry_tokens(piece: TTTTokens, n: int) -> TTTTokens:
    length = piece.lengths[n]
    tensors = (None if x is None else x[n : n + 1, :length] for x in piece.tensors)
    return TTTTokens(*tensors, (length,))


def _stack_tokens(entries: list[TTTState]) -> tuple[TTTTokens, ...]:
    """The pending tokens of one-sequence states, padded to the longest."""
    lengths = tuple(entry.pending_lengths[0] for entry in entries)
    if not any(lengths):
        return ()
    template = next(entry.pending[0] for entry in entries if entry.pending)
    columns = []
    for i, like in enumerate(template.tensors):
        if like is None:
            columns.append(None)
            continue
        rows = [
            torch.cat([piece[i][0] for piece in entry.pending])
            if entry.pending
            else like.new_empty(0, *like.shape[2:])
            for entry in entries
        ]
        columns.append(_padded(rows))
    return (TTTTokens(*columns, lengths),)
