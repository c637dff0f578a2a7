"""The tokens of chunks that are not full yet, which an initial state brings along."""

import itertools

from lact_kernels.core.ttt_state import (
    TTTState,
    joined_tokens,
    packed_tokens,
    split_sequences,
)
from lact_kernels.core.ttt_types import Tokens


def pending_lengths(state: TTTState, pieces) -> tuple[int, ...]:
    """Of each packed sequence, or one number for all rows of a batch."""
    lengths = state.pending_lengths
    return lengths if pieces.packed else lengths[:1] or (0,)


def behind_pending(state: TTTState, tokens: Tokens, pieces, numbers: range) -> Tokens:
    """The tokens of some sequences, each behind its pending ones."""
    if not any(state.pending_lengths):
        return tokens
    if not pieces.packed:
        return Tokens(*joined_tokens(state, tokens))
    borders = [pieces.local_index(b) for b in pieces.borders[numbers.start : numbers.stop + 1]]
    lengths = [stop - start for start, stop in itertools.pairwise(borders)]
    entries = slice(numbers.start, numbers.stop)
    return Tokens(*packed_tokens(state, split_sequences(tokens, lengths), entries))
