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
    B, t = call.q.shape[:2]
    pending = pending_lengths(state, pieces)
    call = call._replace(ranks=remember(SharedUpdates(pieces.group)))
    if any(pending) and pieces.rank == 0:
        numbers = range(len(pending))
        call = call._replace(tokens=behind_pending(state, call.tokens, pieces, numbers))
    rows, num_keys = 1, call.tokens.k.shape[1]
    if backend == "triton" and B > 1:  # whose kernels find the chunks of a plan in one row only
        rows = B
        call = call._replace(q=call.q.flatten(0, 1)[None], tokens=call.tokens.as_row())

    def make() -> Tensor:
        plan = _shared_plan(pieces, pending, call.options)
        return (plan if rows == 1 else _repeated(plan, rows, t, num_keys)).to_tensor()

    key = ("within", call.options.chunk_size, pending, call.options.return_end, rows)
    o, end = run(call._replace(plan=pieces.once(key, make)), backend)
    return o.view(B, t, *o.shape[2:]), end


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


def _repeated(plan: Plan, rows: int, queries: int, keys: int) -> Plan:
    """The plan of one row for several that lie end to end."""
    return Plan(
        [[(a + row * keys, b + row * keys) for a, b in plan.keys[0]] for row in range(rows)],
        [[border + row * queries for border in plan.queries[0]] for row in range(rows)],
    )
