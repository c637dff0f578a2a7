"""Blocked sliding-window attention in plain PyTorch: time O(T * W), memory O(T + W), any device.

The first W queries of a sequence see everything up to themselves. On the CPU they are one call of PyTorch's
causal flash kernel, which is all there is where the window covers the sequence.

The queries behind them are cut into blocks of R rows. A block reads one contiguous range of keys, its own R
and the W before them, of which row r sees the band r < s <= r + W:

                s = 0           W         R + W
    r = 0         . x x x x x x x . . . . .
                  . . x x x x x x x . . . .
                  . . . x x x x x x x . . .
                  . . . . x x x x x x x . .
                  . . . . . x x x x x x x .
    r = R - 1     . . . . . . x x x x x x x

A window that ends `right` keys after its query is one of W = left + right + 1 keys whose queries stand so
much further on, and whose range is cut off where the keys end. Where every query sees every key there is one
block, and no mask.

This band is the only mask there is. Blocks whose range lies inside the sequence run together: their
ranges overlap, and are strided views of k and v, not copies. Blocks whose range would begin before the
sequence (of queries that are fewer than the keys, and where no causal kernel runs or would not be
precise), or end behind it, and the last, shorter one run one by one, with the band cut to fit.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from lact_kernels.core.attention import AttentionOptions
from lact_kernels.core.offsets import Offsets
from lact_kernels.eager import masked_attention
from lact_kernels.eager.masked_attention import Saved

FLASH_ROWS = 32  # of a block in the flash forward, which takes fewer rows than 192 in parts of 32
MIN_ROWS, MAX_ROWS = 64, 256  # of other blocks
MAX_BLOCKS = 64  # in one batch, which bounds the memory of the backward's per-block dk and dv


class _Blocks(NamedTuple):
    """`count` blocks of `rows` queries each, the first of which starts at the given query and key.

    One block is that of every row of the batch, several are those of `row`. Of grouped heads it is one
    query head for each key head, which are read in place like this.
    """

    first_query: int
    first_key: int
    rows: int
    keys: int
    mask: Tensor | None = None  # [rows, keys]
    causal: bool = False  # in place of a mask
    count: int = 1
    row: int = 0
    heads: slice = slice(None)  # of the queries

    def queries(self, x: Tensor) -> Tensor:
        """The blocks' rows of `[B, Tq, Hq, D]`, as a view `[N, Hkv, rows, D]`."""
        return self._view(x, self.first_query, self.rows, self.heads)

    def statistics(self, x: Tensor) -> Tensor:
        """The same of `[B, Hq, Tq]`, as a view `[N, Hkv, rows]`."""
        return self.queries(x.mT[..., None])[..., 0]

    def rows_of_heads(self, x: Tensor) -> Tensor:
        """The same of `[B, Hq]`, as a view `[N, Hkv]`."""
        if self.count == 1:
            return x[:, self.heads]
        return x[self.row, self.heads].expand(self.count, -1)

    def window(self, x: Tensor) -> Tensor:
        """The blocks' keys of `[B, Tk, Hkv, D]`, as an overlapping view `[N, Hkv, keys, D]`."""
        return self._view(x, self.first_key, self.keys, slice(None))

    def add_to_window(self, x: Tensor, parts: Tensor) -> None:
        """Add `parts` `[N, Hkv, keys, D]` to the blocks' keys of `[B, Tk, Hkv, D]`, which overlap."""
        if self.count == 1:
            self.window(x).add_(parts)
            return
        for i, part in enumerate(parts):
            first = self.first_key + i * self.rows
            x[self.row, first : first + self.keys] += part.transpose(0, 1)

    def _view(self, x: Tensor, first: int, length: int, heads: slice) -> Tensor:
        if self.count == 1:
            return x[:, first : first + length, heads].transpose(1, 2)
        stop = first + (self.count - 1) * self.rows + length
        return x[self.row, first:stop, heads].unfold(0, length, self.rows).transpose(2, -1)


def window_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Tq, Hq, Dv]` and lse `[B, Hq, Tq]`: 0 and -inf, or the sink, where no key is seen."""
    o, lse = _forward(q, k, v, options, offsets)
    return (o, lse) if sinks is None else masked_attention.add_sinks(o, lse, sinks)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, offsets: Offsets | None
) -> tuple[Tensor, Tensor]:
    """The same without sinks."""
    softcap = options.softcap
    q, scale, _ = masked_attention.split_scale(q, k, options.softmax_scale, softcap)
    causal = masked_attention.has_causal_flash(q, scale, softcap)
    rows = FLASH_ROWS if masked_attention.has_flash(q, softcap) else MAX_ROWS

    def outputs(blocks: _Blocks) -> tuple[Tensor, Tensor]:
        inputs = blocks.queries(q), blocks.window(k), blocks.window(v)
        return masked_attention.forward(*inputs, blocks.mask, scale, softcap, blocks.causal)

    spans = _spans(q, k, offsets)
    pieces = list(_cut(q, k, options, spans, rows, lambda *_: causal))
    if _is_all(pieces, q, k):
        o, lse = outputs(pieces[0])
        return o.transpose(1, 2).contiguous(), lse.contiguous()
    B, Tq, Hq, _ = q.shape
    blind = any(span.sees_nothing(options.right) for span in spans)
    o = (q.new_zeros if blind else q.new_empty)(B, Tq, Hq, v.shape[-1])
    lse = q.new_full((B, Hq, Tq), -math.inf, dtype=masked_attention.lse_dtype(q.dtype))
    for blocks in pieces:
        out, out_lse = outputs(blocks)
        blocks.queries(o).copy_(out)
        blocks.statistics(lse).copy_(out_lse)
    return o, lse


def window_attn_bwd(
    do: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (empty without); each block computes its probabilities again."""
    q, k, v, o, lse = saved
    softcap = options.softcap
    q, scale, factor = masked_attention.split_scale(q, k, options.softmax_scale, softcap)
    has_causal = masked_attention.has_causal_flash(q, scale, softcap)

    def causal(first: int, stop: int) -> bool:
        lses = lse[..., first:stop]
        return has_causal and masked_attention.flash_is_precise(q, lses, stop - first, scale)

    def gradients(blocks: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys, lses = blocks.queries, blocks.window, blocks.statistics
        block = Saved(rows(q), keys(k), keys(v), rows(o), lses(lse))
        block_dlse = None if dlse is None else lses(dlse)
        block_sinks = None if sinks is None else blocks.rows_of_heads(sinks)
        return masked_attention.backward(
            rows(do), block_dlse, block, block_sinks, blocks.mask, scale, softcap, blocks.causal
        )

    pieces = list(_cut(q, k, options, _spans(q, k, offsets), MAX_ROWS, causal))
    if _is_all(pieces, q, k):
        dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients(pieces[0]))
    else:
        dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
        for blocks in pieces:
            dq_part, dk_part, dv_part = gradients(blocks)
            blocks.queries(dq).copy_(dq_part)
            blocks.add_to_window(dk, dk_part)
            blocks.add_to_window(dv, dv_part)
    if factor != 1.0:
        dq *= factor
    if sinks is None:
        dsinks = lse.new_empty(0)
    else:
        dsinks = masked_attention.sinks_backward(do, dlse, saved, sinks)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def _is_all(pieces: list[_Blocks], q: Tensor, k: Tensor) -> bool:
    """Whether one call does everything, whose results need no place in others."""
    sizes = [(blocks.rows, blocks.keys) for blocks in pieces]
    return sizes == [(q.shape[1], k.shape[1])]


class _Span(NamedTuple):
    """The queries and keys of one sequence."""

    first_query: int
    last_query: int
    first_key: int
    last_key: int

    @property
    def num_queries(self) -> int:
        return self.last_query - self.first_query

    @property
    def num_keys(self) -> int:
        return self.last_key - self.first_key

    def lead(self, right: int) -> int:
        """Keys before the last one that the first query reaches; below 0 the queries that reach none."""
        return self.num_keys - self.num_queries + right

    def sees_nothing(self, right: int) -> bool:
        """Whether some query sees no key."""
        return self.lead(right) < 0 or self.num_keys == 0

    def sees_all(self, options: AttentionOptions) -> bool:
        """Whether every query sees every key."""
        last = self.num_keys - 1
        return self.lead(options.right) >= last and options.left >= last


def _spans(q: Tensor, k: Tensor, offsets: Offsets | None) -> list[_Span]:
    if offsets is None:
        return [_Span(0, q.shape[1], 0, k.shape[1])]
    borders = itertools.pairwise(offsets.queries), itertools.pairwise(offsets.keys)
    return [_Span(*queries, *keys) for queries, keys in zip(*borders)]


def _cut(
    q: Tensor,
    k: Tensor,
    options: AttentionOptions,
    spans: list[_Span],
    max_rows: int,
    causal: Callable[[int, int], bool],
) -> Iterator[_Blocks]:
    """All blocks of all sequences; `causal(first, stop)` says whether these queries may be a causal one."""
    B, groups = q.shape[0], q.shape[2] // k.shape[2]
    most_queries = max(span.num_queries for span in spans)
    most_keys = max(span.num_keys for span in spans)
    options = options.within(most_queries, most_keys)
    half = 1 << max(0, (options.width // 2).bit_length() - 1)  # of it, down to a power of two
    single = min(MAX_ROWS, max(MIN_ROWS, half), max(1, most_queries))
    band_of = functools.cache(lambda rows: masked_attention.band(rows, options.width, q))
    for span in spans:
        sizes = (min(max_rows, single), single)
        for blocks in _cut_span(span, options, sizes, band_of, causal):
            for row in range(B if blocks.count > 1 else 1):
                for group in range(groups):
                    heads = slice(None) if groups == 1 else slice(group, None, groups)
                    yield blocks._replace(row=row, heads=heads)


def _cut_span(
    span: _Span,
    options: AttentionOptions,
    sizes: tuple[int, int],
    band_of: Callable[[int], Tensor],
    causal: Callable[[int, int], bool],
) -> Iterator[_Blocks]:
    """The blocks of one sequence, in order, from the first query that sees a key.

    `sizes` are the rows of a block among many, and of one whose range is cut off.
    """
    if not span.num_queries or not span.num_keys:
        return
    if span.sees_all(options):
        yield _Blocks(span.first_query, span.first_key, span.num_queries, span.num_keys)
        return
    window_size, lead = options.width, span.lead(options.right)
    query = span.first_query + max(0, -lead)
    if lead == 0:
        prefix = min(window_size, span.num_queries, span.num_keys)
        if causal(query, query + prefix):
            yield _Blocks(query, span.first_key, prefix, prefix, causal=True)
            query += prefix
    while query < span.last_query:
        left = span.last_query - query
        position = query - span.first_query + lead  # of the last key that this query reaches
        cut_off = max(0, window_size - position)  # columns of the band before the first key
        ahead = span.num_keys - position  # queries whose windows end within the keys
        rows = sizes[cut_off > 0 or ahead < min(left, sizes[0])]
        length = min(rows, left)
        count = 1 if cut_off else min(MAX_BLOCKS, max(1, min(left, ahead) // rows))
        mask = band_of(rows)[:length, cut_off : window_size + min(length, ahead)]
        first_key = span.first_key + position - window_size + cut_off
        yield _Blocks(query, first_key, length, mask.shape[1], mask, count=count)
        query += count * length
