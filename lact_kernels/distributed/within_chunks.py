"""Ranks that have a part of each chunk's tokens, and share its update."""

import itertools

from torch import Tensor

from lact_kernels.core.call import Call, Options
from lact_kernels.core.fast_weights import FastWeights
from lact_kernels.core.plan import Plan, num_updates
from lact_kernels.core.ranks import remember
from lact_kernels.core.state import TTTState
from lact_kernels.distributed.pending import behind_pending, pending_lengths
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.shared_updates import SharedUpdates
from lact_kernels.ops.fast_weights import run


def scan_within_chunks(
    call: Call, state: TTTState, pieces: SequencePieces, backend: str
) -> tuple[Tensor, FastWeights | None]:
    """Outputs, and the end if asked for, of ranks that share chunks. The first has the pending tokens."""
    pending = pending_lengths(state, pieces)
    call = call._replace(ranks=remember(SharedUpdates(pieces.group)))
    if any(pending) and pieces.rank == 0:
        numbers = range(len(pending))
        call = call._replace(tokens=behind_pending(state, call.tokens, pieces, numbers))

    def make() -> Tensor:
        return _shared_plan(pieces, pending, call.options).to_tensor()

    key = ("within", call.options.chunk_size, pending, call.options.return_end)
    return run(call._replace(plan=pieces.once(key, make)), backend)


def _shared_plan(pieces: SequencePieces, pending: tuple[int, ...], options: Options) -> Plan:
    """Where the chunks of every sequence are among this rank's tokens."""
    plan, shift, C = Plan([], []), 0, options.chunk_size
    for (start, stop), before in zip(itertools.pairwise(pieces.borders), pending):
        updates = num_updates(before + stop - start, C, options.return_end)
        firsts = (start - before + c * C for c in range(updates + 1))
        places = [*(min(max(first, start), stop) for first in firsts), stop]
        borders = [pieces.local_index(place) for place in places]
        plan.queries.append(borders)
        if pieces.rank > 0:
            before = 0
        keys = [borders[0] + shift, *(border + shift + before for border in borders[1:-1])]
        plan.keys.append(list(itertools.pairwise(keys)))
        shift += before
    return plan
