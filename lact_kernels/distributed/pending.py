"""The tokens of chunks that are not full yet, which an initial state brings along."""

import itertools

import torch
from torch import Tensor

from lact_kernels.ops.ttt_state import TTTState
from lact_kernels.ops.ttt_types import Tokens


def joined_tokens(first, second) -> list[Tensor | None]:
    return [None if x is None else torch.cat([x, y], dim=1) for x, y in zip(first, second)]


def pending_lengths(state: TTTState, pieces) -> tuple[int, ...]:
    """Of each packed sequence, or one number for all rows of a batch."""
    lengths = state.pending_lengths
    return lengths if pieces.packed else lengths[:1] or (0,)


def pending_tokens(state: TTTState, n: int | None) -> list[Tensor | None]:
    """The pending tokens of one sequence, or of all rows of a batch, `[.., p, ...]`."""
    entry = state if n is None else state.entry(n)
    columns = zip(*(piece.tensors for piece in entry.pending))
    return [None if column[0] is None else torch.cat(column, dim=1) for column in columns]


def behind_pending(state: TTTState, tokens: Tokens, pieces, numbers: range) -> Tokens:
    """The tokens of some sequences, each behind its pending ones."""
    if not any(state.pending_lengths):
        return tokens
    if not pieces.packed:
        return Tokens(*joined_tokens(pending_tokens(state, None), tokens))
    borders = [pieces.local_index(b) for b in pieces.borders[numbers.start : numbers.stop + 1]]
    lengths = [stop - start for start, stop in itertools.pairwise(borders)]
    columns = [[] if x is None else x.split(lengths, dim=1) for x in tokens]
    parts = [[] for _ in tokens]
    for i, n in enumerate(numbers):
        before = pending_tokens(state, n) if state.pending_lengths[n] else None
        for j, column in enumerate(columns):
            if column:
                parts[j] += [column[i]] if before is None else [before[j], column[i]]
    return Tokens(*(torch.cat(x, dim=1) if x else None for x in parts))
