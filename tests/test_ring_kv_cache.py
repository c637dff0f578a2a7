"""`RingKVCache` on both backends, against attention over all tokens that a row has had."""

import dataclasses

import pytest
import torch

import reference
from lact_kernels import RingKVCache, window_attn
from tests.test_window_attn_with_kvcache import DEVICE, ON_CPU, Operations


@dataclasses.dataclass
class Rows:
    """All keys and values that each row has had, which a ring buffer forgets."""

    window_size: int | tuple[int, int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def append(self, k, v, lengths):
        for kept, new in ((self.keys, k), (self.values, v)):
            for b, length in enumerate(lengths):
                kept[b] = torch.cat([kept[b], new[b, :length]])


def ring_and_rows(B, W, **options):
    ring = RingKVCache(B, W, 2, 16, head_dim_v=24, device=DEVICE, **options)
    empty = [torch.empty(0, 2, d, device=DEVICE, dtype=ring.k.dtype) for d in (16, 24)]
    return ring, Rows(W, *([x] * B for x in empty))


def new_tokens(ring, t):
    B, dtype = len(ring.k), ring.k.dtype
    return [torch.randn(B, t, 2, d, device=DEVICE, dtype=dtype) for d in (16, 24)]


@pytest.mark.skipif(not ON_CPU, reason="of the eager backend")
def test_appending_a_token_writes_it_and_little_else():
    ring, _ = ring_and_rows(2, 5)
    k, v = new_tokens(ring, 1)
    with Operations() as ran:
        ring.append(k, v)
    assert ran.names.count("aten::copy_") == 2 and "aten::index_copy_" not in ran.names
    assert len(ran.names) <= 8


def check_ring(ring, rows, Tq, backend="auto", **options):
    B = len(ring.k)
    q = torch.randn(B, Tq, 4, 16, device=DEVICE, dtype=ring.k.dtype)
    o, lse = ring.window_attn(q, **options, return_lse=True, backend=backend)
    for b in range(B):
        k, v = rows.keys[b][None], rows.values[b][None]
        expected = reference.window_attn(
            q[b : b + 1], k, v, rows.window_size, **options, return_lse=True
        )
        torch.testing.assert_close((o[b : b + 1], lse[b : b + 1]), expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_ring_buffer_goes_round(backend):
    """Token by token, with prompts shorter and longer than the ring before and in between."""
    ring, rows = ring_and_rows(2, 5)
    for t in (3, 1, 1, 1, 1, 1, 12, 1, 1, 1, 0, 4, 5, 6, 1):
        k, v = new_tokens(ring, t)
        ring.append(k, v)
        rows.append(k, v, (t, t))
        check_ring(ring, rows, 1, backend)
    assert ring.seqlens.tolist() == [39, 39] and ring.max_seqlen == 39
    assert ring.k.shape == (2, 5, 2, 16) and ring.v.shape == (2, 5, 2, 24)


@pytest.mark.parametrize("window", [6, (5, 1), (5, -1)], ids=str)
def test_rows_of_different_lengths_and_several_queries(window):
    ring, rows = ring_and_rows(3, window, max_queries=3, dtype=torch.float64)
    options = {} if window == 6 else {"softcap": 2.0, "sinks": torch.randn(4, device=DEVICE)}
    assert ring.k.shape[1] == 8
    steps = [(7, (0, 3, 7)), (2, (2, 0, 1)), (1, (1, 1, 1)), (20, (20, 8, 9)), (3, (3, 2, 0))]
    for t, lengths in 3 * steps:
        k, v = new_tokens(ring, t)
        ring.append(k, v, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
        rows.append(k, v, lengths)
        for Tq in (1, 2, 3):
            check_ring(ring, rows, Tq, **options)
        assert ring.seqlens.tolist() == [len(x) for x in rows.keys]


def test_view_is_in_order_and_aligned_at_the_end():
    ring, rows = ring_and_rows(2, 4)
    for t, lengths in [(0, (0, 0)), (2, (2, 1)), (1, (1, 1)), (9, (0, 9)), (1, (1, 0))]:
        k, v = new_tokens(ring, t)
        ring.append(k, v, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
        rows.append(k, v, lengths)
        for kept, seen in zip((rows.keys, rows.values), ring.view()):
            assert seen.shape[1] == min(ring.max_seqlen, 4)
            for b in range(2):
                last = kept[b][-4:]
                padding = seen.shape[1] - len(last)
                assert torch.equal(seen[b, padding:], last)
                assert not seen[b, :padding].any()


def test_a_prompt_goes_on_behind_the_view():
    """Any split of a sequence into pieces and single tokens gives the outputs of one call."""
    T, W = 40, 7
    q, k, v = (torch.randn(2, T, h, 16, device=DEVICE) for h in (4, 2, 2))
    whole = reference.window_attn(q, k, v, W)
    ring, outputs, start = RingKVCache(2, W, 2, 16, device=DEVICE), [], 0
    for t in (3, 1, 1, 11, 1, 5, 1, 1, 9, 7):
        piece = slice(start, start + t)
        kept = ring.view()
        keys, values = (torch.cat(x, dim=1) for x in zip(kept, (k[:, piece], v[:, piece])))
        ring.append(k[:, piece], v[:, piece])
        if t == 1:
            outputs.append(ring.window_attn(q[:, piece]))
        else:
            outputs.append(window_attn(q[:, piece], keys, values, W))
        start += t
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


RING_BAD = [
    (
        lambda ring, k, v: ring.append(k[:1], v),
        ValueError,
        r"k must have the shape .*\(2, 3, 2, 16",
    ),
    (lambda ring, k, v: ring.append(k, v[:, :2]), ValueError, "v must have the shape"),
    (lambda ring, k, v: ring.append(k.half(), v), TypeError, "k must have the dtype torch.float32"),
    (lambda ring, k, v: ring.append(k, v, [1, 2]), TypeError, "lengths must be a tensor"),
    (lambda ring, k, v: ring.append(k, v, torch.tensor([1, 4]).int()), ValueError, "0 and t = 3"),
    (lambda ring, k, v: ring.append(k, v, torch.tensor([-1, 1]).int()), ValueError, "got -1"),
    (lambda ring, k, v: ring.window_attn(torch.ones(2, 2, 4, 16)), ValueError, "max_queries = 1"),
    (lambda ring, k, v: ring.window_attn(torch.ones(3, 1, 4, 16)), ValueError, "^q must have the"),
    (
        lambda ring, k, v: ring.window_attn(torch.ones(2, 1, 4, 16).half()),
        TypeError,
        "^q must have",
    ),
    (lambda ring, k, v: RingKVCache(2, 0, 2, 16), ValueError, "window_size must be at least 1"),
    (lambda ring, k, v: RingKVCache(2, None, 2, 16), TypeError, "window_size must be an int"),
    (lambda ring, k, v: RingKVCache(2, (-1, 3), 2, 16), TypeError, "a limit on the left side"),
    (lambda ring, k, v: RingKVCache(2, (3, -2), 2, 16), ValueError, "window_size must have sides"),
    (
        lambda ring, k, v: ring.window_attn(torch.ones(2, 1, 4, 16), softcap=0.0),
        ValueError,
        "softcap must be above 0",
    ),
    (
        lambda ring, k, v: ring.window_attn(torch.ones(2, 1, 4, 16), sinks=torch.ones(2)),
        ValueError,
        r"sinks must have the shape \[Hq\] = \(4,\)",
    ),
    (lambda ring, k, v: RingKVCache(2, 4, 2, 16, max_queries=0), ValueError, "max_queries"),
]


@pytest.mark.skipif(not ON_CPU, reason="lengths are read on the CPU only")
@pytest.mark.parametrize("call, error, message", RING_BAD)
def test_ring_buffer_refuses(call, error, message):
    ring, _ = ring_and_rows(2, 5)
    k, v = new_tokens(ring, 3)
    with pytest.raises(error, match=message):
        call(ring, k, v)
    assert not ring.seqlens.any() and not ring.k.any()
