"""Ranks that have a part of each chunk: their weight gradients are summed before every update."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.core.offsets import ChunkOffsets
from lact_kernels.core.ttt_state import TTTState
from lact_kernels.core.ttt_types import FastWeights, Ranks, Tokens, num_updates
from lact_kernels.distributed.pending import behind_pending, pending_lengths
from lact_kernels.distributed.pieces import SequencePieces
from lact_kernels.distributed.scan import Scan, needs_gradient


class SharedChunks(Ranks):
    """Ranks that have a part of each chunk's tokens: the weight gradients are summed before each update.

    All of them then make the same updates. Of the gradients that they know alike, the first rank gives all.
    """

    share_chunks = True

    def __init__(self, pieces: SequencePieces):
        self.group, self.is_first = pieces.group, pieces.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0], group=self.group)
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat, group=self.group)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view(x.shape))

    def part(self, x: Tensor) -> Tensor:
        return x if self.is_first else torch.zeros_like(x)


def scan_within_chunks(q, tokens: Tokens, state: TTTState, pieces, return_state: bool, how):
    """Outputs and end (if asked for) of ranks that share the chunks. The first has the pending tokens."""
    B, t = q.shape[:2]
    pending = pending_lengths(state, pieces)
    offsets = pieces.once(
        ("within", state.chunk_size, pending, return_state),
        lambda: _shared_offsets(pieces, pending, state.chunk_size, return_state),
    )
    if any(pending) and pieces.rank == 0:
        tokens = behind_pending(state, tokens, pieces, range(len(pending)))
    if how[1] == "triton" and B > 1:  # whose kernels find chunks of such borders in one row only
        q, tokens, offsets = _as_one_row(q, tokens, offsets)
    gradients = needs_gradient(q, tokens, state)
    scan = Scan.of(SharedChunks(pieces), offsets, state, return_state, how, gradients)
    o, end = scan(q, tokens, FastWeights(*state[:4]))
    return o.view(B, t, *o.shape[2:]), end


def _shared_offsets(pieces, pending, chunk_size: int, return_end: bool) -> ChunkOffsets:
    """Where the chunks of every sequence are among this rank's tokens."""
    queries, keys, shift = [], [], 0
    for (start, stop), before in zip(itertools.pairwise(pieces.borders), pending):
        updates = num_updates(before + stop - start, chunk_size, return_end)
        firsts = (start - before + c * chunk_size for c in range(updates + 1))
        places = [*(min(max(first, start), stop) for first in firsts), stop]
        borders = [pieces.local_index(place) for place in places]
        queries.append(borders)
        if pieces.rank > 0:
            before = 0
        keys.append([borders[0] + shift, *(border + shift + before for border in borders[1:])])
        shift += before
    return ChunkOffsets(queries, keys)


def _as_one_row(q, tokens: Tokens, offsets: ChunkOffsets):
    B = q.shape[0]

    def repeated(borders: list[int], t: int) -> list[list[int]]:
        return [[border + b * t for border in borders] for b in range(B)]

    (queries,), (keys,) = offsets
    offsets = ChunkOffsets(repeated(queries, q.shape[1]), repeated(keys, tokens.k.shape[1]))
    tokens = Tokens(*(None if x is None else x.flatten(0, 1)[None] for x in tokens))
    return q.flatten(0, 1)[None], tokens, offsets
