"""Blocked sliding-window attention in plain PyTorch: time O(T * W), memory O(T + W), any device.

Queries are cut into blocks of R rows. A block reads one contiguous range of keys, its own R and the
W - 1 before them, of which row r sees the band r <= s < r + W:

                s = 0         W          R + W - 1
    r = 0         x x x x x x x . . . . .
                  . x x x x x x x . . . .
                  . . x x x x x x x . . .
                  . . . x x x x x x x . .
                  . . . . x x x x x x x .
    r = R - 1     . . . . . x x x x x x x

This band is the only mask there is. Blocks whose range begins inside the sequence run together: their
ranges overlap, and are strided views of k and v, not copies. The blocks at the start, whose range
would begin before the sequence, and the last, shorter one run one by one, with the band cut to fit.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.core.offsets import Offsets
from lact_kernels.eager import masked_attention
from lact_kernels.eager.masked_attention import Saved

MIN_ROWS, MAX_ROWS = 64, 256
MAX_BLOCKS = 64  # in one batch, which bounds the memory of the backward's per-block dk and dv


class _Blocks(NamedTuple):
    """`count` blocks of `rows` queries each, the first of which starts at the given query and key."""

    first_query: int
    first_key: int
    rows: int
    keys: int
    count: int
    mask: Tensor  # [rows, keys]

    def queries(self, x: Tensor) -> Tensor:
        """The blocks' rows of `[Tq, H, D]`, as a view `[count, H, rows, D]`."""
        return self._view(x, self.first_query, self.rows)

    def statistics(self, x: Tensor) -> Tensor:
        """The same of `[Tq, H]`, as a view `[count, H, rows]`."""
        return self.queries(x[..., None])[..., 0]

    def window(self, x: Tensor) -> Tensor:
        """The blocks' keys of `[Tk, H, D]`, as an overlapping view `[count, H, keys, D]`."""
        return self._view(x, self.first_key, self.keys)

    def add_to_window(self, x: Tensor, parts: Tensor) -> None:
        """Add `parts` `[count, H, keys, D]` to the blocks' keys of `[Tk, H, D]`, which overlap."""
        for first, part in zip(range(self.first_key, x.shape[0], self.rows), parts):
            x[first : first + self.keys] += part.transpose(0, 1)

    def _view(self, x: Tensor, first: int, length: int) -> Tensor:
        stop = first + (self.count - 1) * self.rows + length
        return x[first:stop].unfold(0, length, self.rows).transpose(2, -1)


def window_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    softmax_scale: float,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Tq, Hq, Dv]` and lse `[B, Hq, Tq]`, 0 and -inf for a query before the first key."""
    B, Tq, Hq, _ = q.shape
    o = q.new_zeros(B, Tq, Hq, v.shape[-1])
    lse = q.new_full((B, Hq, Tq), -math.inf, dtype=masked_attention.lse_dtype(q.dtype))
    for blocks, (qs, os, lses), (ks, vs) in _views((q, o, lse.mT), (k, v), window_size, offsets):
        out, out_lse = masked_attention.forward(
            blocks.queries(qs), blocks.window(ks), blocks.window(vs), blocks.mask, softmax_scale
        )
        blocks.queries(os).copy_(out)
        blocks.statistics(lses).copy_(out_lse)
    return o, lse


def window_attn_bwd(
    do: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    window_size: int,
    softmax_scale: float,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; each block computes its probabilities again."""
    q, k, v, o, lse = saved
    dq, dk, dv = (
        torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format)
        for x in (q, k, v)
    )
    queries, keys = (q, o, do, dq, lse.mT), (k, v, dk, dv)
    if dlse is not None:
        queries = (*queries, dlse.mT)
    for blocks, (qs, os, dos, dqs, *statistics), (ks, vs, dks, dvs) in _views(
        queries, keys, window_size, offsets
    ):
        lses, *dlses = map(blocks.statistics, statistics)
        block = Saved(
            blocks.queries(qs), blocks.window(ks), blocks.window(vs), blocks.queries(os), lses
        )
        dq_part, dk_part, dv_part = masked_attention.backward(
            blocks.queries(dos), dlses[0] if dlses else None, block, blocks.mask, softmax_scale
        )
        blocks.queries(dqs).copy_(dq_part)
        blocks.add_to_window(dks, dk_part)
        blocks.add_to_window(dvs, dv_part)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _views(
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    window_size: int,
    offsets: Offsets | None,
) -> Iterator[tuple[_Blocks, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """All blocks of all sequences, with the `[T, Hkv, ...]` views of the tensors that they cut up.

    One view for each batch row and each query head of a group, so that grouped heads and rows of
    any stride are read in place.
    """
    q, k = queries[0], keys[0]
    (B, Tq, Hq), (Tk, Hkv) = q.shape[:3], k.shape[1:3]
    spans = [(0, Tq, 0, Tk)]
    if offsets is not None:
        borders = itertools.pairwise(offsets.queries), itertools.pairwise(offsets.keys)
        spans = [(*queries, *keys) for queries, keys in zip(*borders)]
    most_queries = max(stop - start for start, stop, _, _ in spans)
    most_keys = max(stop - start for _, _, start, stop in spans)
    window_size = max(1, min(window_size, most_keys))
    half = 1 << max(0, (window_size // 2).bit_length() - 1)  # of the window, down to a power of two
    rows = min(MAX_ROWS, max(MIN_ROWS, half), max(1, most_queries))
    band = masked_attention.band(rows, window_size, q)
    queries = tuple(x.unflatten(2, (Hkv, Hq // Hkv)) for x in queries)
    for first_query, last_query, first_key, last_key in spans:
        for blocks in _cut(last_query - first_query, last_key - first_key, window_size, band):
            for b in range(B):
                ks = tuple(x[b, first_key:last_key] for x in keys)
                for g in range(Hq // Hkv):
                    yield blocks, tuple(x[b, first_query:last_query, :, g] for x in queries), ks


def _cut(Tq: int, Tk: int, window_size: int, band: Tensor) -> Iterator[_Blocks]:
    """The blocks of one sequence, in order, from the first query that sees a key."""
    rows = band.shape[0]
    query = max(0, Tq - Tk)
    while query < Tq:
        position = query + Tk - Tq
        cut_off = max(0, window_size - 1 - position)  # columns of the band before the first key
        length = min(rows, Tq - query)
        count = 1 if cut_off else min(MAX_BLOCKS, max(1, (Tq - query) // rows))
        mask = band[:length, cut_off : window_size - 1 + length]
        yield _Blocks(
            query, position - (window_size - 1) + cut_off, length, mask.shape[1], count, mask
        )
        query += count * length
