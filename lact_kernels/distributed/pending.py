"""The tokens of chunks that are not full yet, which an initial state brings along."""

import itertools

from lact_kernels.core import state as core
from lact_kernels.core.state import TTTState
from lact_kernels.core.tokens import Tokens


def pending_lengths(state: TTTState, pieces) -> tuple[int, ...]:
    """Of each packed sequence, or one number for all rows of a batch."""
    lengths = state.pending_lengths
    return lengths if pieces.packed else lengths[:1] or (0,)


def behind_pending(state: TTTState, tokens: Tokens, pieces, numbers: range) -> Tokens:
    """The tokens of some sequences, each behind its pending ones."""
    if not any(state.pending_lengths):
        return tokens
    if not pieces.packed:
        return core.joined_tokens(state, tokens)
    borders = [pieces.local_index(b) for b in pieces.borders[numbers.start : numbers.stop + 1]]
    lengths = [stop - start for start, stop in itertools.pairwise(borders)]
    return core.behind_pending(state, tokens, lengths, slice(numbers.start, numbers.stop))
