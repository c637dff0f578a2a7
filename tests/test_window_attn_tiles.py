"""Which tiles the attention kernels visit, read from the functions that give their loops their bounds."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from lact_kernels.triton.primitives import (
    key_tile_bounds,
    num_tile_slots,
    query_tile_bounds,
    sequence_of_slot,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _bounds_kernel(
    out_ptr,
    Tq,
    Tk,
    window_size,
    right,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    if KEYS:
        a, b, c, d = key_tile_bounds(tile * BLOCK_M, Tq, Tk, window_size, right, BLOCK_M, BLOCK_N)
    else:
        a, b, c, d = query_tile_bounds(tile * BLOCK_N, Tq, Tk, window_size, right, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + tile * 4, a)
    tl.store(out_ptr + tile * 4 + 1, b)
    tl.store(out_ptr + tile * 4 + 2, c)
    tl.store(out_ptr + tile * 4 + 3, d)


def tile_bounds(Tq, Tk, window, block_m, block_n, by_query):
    """(first, interior, edge or diagonal, end) of each tile, and of the window (left, right)."""
    tiles = triton.cdiv(Tq, block_m) if by_query else triton.cdiv(Tk, block_n)
    bounds = torch.empty(tiles, 4, dtype=torch.int32, device=DEVICE)
    _bounds_kernel[(tiles,)](
        bounds,
        Tq,
        Tk,
        sum(window) + 1,
        window[1] or None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        KEYS=by_query,
    )
    return bounds.tolist()


def check_bounds(Tq, Tk, window, block_m, block_n):
    left, right = window
    position = torch.arange(Tq)[:, None] + Tk - Tq
    key = torch.arange(Tk)
    seen = (key <= position + right) & (key >= position - left)
    for by_query in (True, False):
        rows, own, other = (seen, block_m, block_n) if by_query else (seen.T, block_n, block_m)
        tiles = [row_tile.split(other, dim=1) for row_tile in rows.split(own)]
        bounds = tile_bounds(Tq, Tk, window, block_m, block_n, by_query)
        assert len(bounds) == len(tiles)
        for row_tile, (first, interior, after, end) in zip(tiles, bounds):
            visited = list(range(first, end))
            assert visited == [n for n, tile in enumerate(row_tile) if tile.any()]
            assert first <= interior <= after <= max(end, first)
            for n in visited:
                # Interior: every pair visible, and no looped-over row out of bounds. (A ragged
                # tile of the program's own rows is masked where it is stored.)
                tile = row_tile[n]
                whole = bool(tile.all()) and tile.shape[1] == other
                assert (interior <= n < after) == whole


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize(
    "Tq, Tk", [(1, 1), (64, 64), (83, 83), (50, 80), (50, 131), (1, 70), (70, 40), (40, 1)]
)
def test_only_tiles_that_intersect_the_window_are_visited(Tq, Tk, block_m, block_n):
    for left in {0, 1, 15, 16, 32, 47, Tk - 1}:
        check_bounds(Tq, Tk, (min(left, Tk - 1), 0), block_m, block_n)
    for left, right in {(0, 1), (5, 16), (Tk, Tq - 1)}:
        check_bounds(Tq, Tk, (left, right), block_m, block_n)


blocks = st.sampled_from([16, 32, 64, 128, 256])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 600), st.data(), blocks, blocks)
def test_only_tiles_that_intersect_any_window_are_visited(Tq, Tk, left, data, block_m, block_n):
    left = min(left, Tk)
    right = data.draw(st.one_of(st.just(0), st.integers(0, Tq - 1)))
    check_bounds(Tq, Tk, (left, right), block_m, block_n)


@pytest.mark.parametrize("by_query", [True, False], ids=["forward and dq", "dk and dv"])
@pytest.mark.parametrize(
    "window, block_m, block_n", [((0, 0), 64, 64), ((699, 0), 128, 64), ((300, 399), 128, 64)]
)
def test_twice_the_tokens_are_twice_the_tiles(window, block_m, block_n, by_query):
    def work(T):
        bounds = tile_bounds(T, T, window, block_m, block_n, by_query)
        return sum(end - first for first, _, _, end in bounds)

    T = 1024
    first, second, third = work(T), work(2 * T), work(4 * T)
    assert third - second == 2 * (second - first)  # every further token costs the same
    window_size = sum(window) + 1
    before = window_size * (window_size + 2 * block_n) // (2 * block_m * block_n) + 1
    assert (
        second <= 2 * first + before
    )  # of which the first window has less, with nothing before it
    assert num_tile_slots(2 * T, 0, block_m) == 2 * num_tile_slots(T, 0, block_m)


@triton.jit
def _slots_kernel(out_ptr, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    slot = tl.program_id(0)
    n, tile = sequence_of_slot(slot, cu_seqlens_ptr, num_sequences, BLOCK)
    tl.store(out_ptr + slot * 2, n)
    tl.store(out_ptr + slot * 2 + 1, tile)


lengths = st.lists(
    st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 400)),
    min_size=1,
    max_size=300,
)


@settings(max_examples=100, deadline=None)
@given(lengths, st.sampled_from([16, 64, 128]))
def test_every_tile_of_every_sequence_has_one_program(lengths, block):
    borders = list(itertools.accumulate(lengths, initial=0))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    slots = num_tile_slots(borders[-1], len(lengths), block)
    owners = torch.empty(slots, 2, dtype=torch.int32, device=DEVICE)
    _slots_kernel[(slots,)](owners, cu_seqlens, len(lengths), BLOCK=block)
    tiles = [triton.cdiv(length, block) for length in lengths]
    found = [(n, tile) for n, tile in owners.tolist() if tile < tiles[n]]
    assert found == [(n, tile) for n, count in enumerate(tiles) for tile in range(count)]
    assert slots <= sum(tiles) + len(lengths)  # at most one program with nothing to do per sequence


def test_an_index_of_more_sequences_than_two_searches_read():
    T = 128**2 + 5  # sequences of one token each
    cu_seqlens = torch.arange(T + 1, dtype=torch.int32, device=DEVICE)
    slots = num_tile_slots(T, T, 128)
    owners = torch.empty(slots, 2, dtype=torch.int32, device=DEVICE)
    some = torch.randint(slots, (20,)).tolist()
    for slot in (0, *some, slots - 1):
        expected = max(n for n in range(T) if n // 128 + n <= slot)
        _one_slot_kernel[(1,)](owners, cu_seqlens, T, slot, BLOCK=128)
        assert owners[0, 0] == expected


@triton.jit
def _one_slot_kernel(out_ptr, cu_seqlens_ptr, num_sequences, slot, BLOCK: tl.constexpr):
    n, _ = sequence_of_slot(slot, cu_seqlens_ptr, num_sequences, BLOCK)
    tl.store(out_ptr, n)
