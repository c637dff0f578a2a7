"""Elements, bytes and floating-point operations of each rank: a formula a function, all of them exact.

The T tokens of a sequence are cut into contiguous pieces over n ranks, each of at least one token.
"""

import dataclasses
import math
from collections.abc import Sequence

FLOAT32 = 4  # bytes
HALF = 2  # bytes of bfloat16: tokens and gathered parameters


# Elements that go from rank to rank in one layer.


def piece_starts(T: int, n: int) -> list[int]:
    """Rank r has the tokens from ⌊r T / n⌋ up to the start of the next rank."""
    return [r * T // n for r in range(n)]


def window_halo_elements(start: int, W: int, B: int, Hkv: int, D: int, Dv: int) -> int:
    """Received in the forward by a piece from `start` on: min(start, W − 1) B Hkv (D + Dv).

    They are keys and values of the tokens before it, in their dtype. The backward sends as many gradients
    back.
    """
    return min(start, W - 1) * B * Hkv * (D + Dv)


def chunk_halo_elements(
    start: int, C: int, B: int, H: int, Dk: int, Dv: int, momentum: bool
) -> tuple[int, int]:
    """Received across chunks: (start mod C) B H (Dk + Dv), and (start mod C) B H (3 + momentum).

    The first are keys and values in their dtype, the second rates and momentum in float32. The backward sends
    as many gradients back.
    """
    tokens = start % C * B * H
    return tokens * (Dk + Dv), tokens * (3 + momentum)


def halo_tokens(starts: Sequence[int], reach: Sequence[int]) -> list[dict[int, int]]:
    """What each rank r receives, by sender: |[start_r − reach_r, start_r) ∩ piece of the sender|."""
    received = []
    for r, start in enumerate(starts):
        first, tokens, sender, stop = max(0, start - reach[r]), {}, r - 1, start
        while stop > first:
            begin = max(first, starts[sender])
            tokens[sender] = stop - begin
            sender, stop = sender - 1, begin
        received.append(tokens)
    return received


def fast_weight_elements(H: int, Dk: int, Dv: int, Dh: int) -> int:
    """Of one row: H (2 Dh Dk + Dv Dh), which is 3 H Dh Dk where Dv = Dk."""
    return H * (2 * Dh * Dk + Dv * Dh)


def chain_elements(B: int, H: int, Dk: int, Dv: int, Dh: int, prenorm: bool, momentum: bool) -> int:
    """Received across chunks by every rank but the first: (1 + prenorm + momentum) B H (2 Dh Dk + Dv Dh).

    All float32. The backward is the same from rank r + 1 to r, so that the last receives none.
    """
    return (1 + prenorm + momentum) * B * fast_weight_elements(H, Dk, Dv, Dh)


def num_updates(T: int, C: int) -> int:
    """⌈T / C⌉ − 1: the update of the last chunk would change no output."""
    return max(0, math.ceil(T / C) - 1)


def chunk_allreduce_elements(
    T: int, C: int, B: int, H: int, Dk: int, Dv: int, Dh: int
) -> tuple[int, int]:
    """Within the chunk: the elements of one all-reduce, B H (2 Dh Dk + Dv Dh) of float32, and their number.

    There is one for each update, and in the backward as many of the same size. The Triton backend rounds each
    matrix of a head up to a multiple of 16 elements, which those of real sizes are.
    """
    return B * fast_weight_elements(H, Dk, Dv, Dh), num_updates(T, C)


def momentum_allreduce_elements(
    T: int, C: int, B: int, H: int, backend: str = "triton"
) -> tuple[int, int]:
    """Within the chunk, forward and backward: the means of momentum, in float32, as one all-reduce.

    Triton sums those of all chunks, ⌈T / C⌉ B H, and keeps them for the backward: the predictions are for it.
    The eager backend sums those of updates, (⌈T / C⌉ − 1) B H, and again in the backward.
    """
    if backend == "triton":
        return math.ceil(T / C) * B * H, 0
    return num_updates(T, C) * B * H, num_updates(T, C) * B * H


def ring_bytes(size: float, n: int) -> float:
    """Sent by each rank of a ring that gathers or scatters `size` bytes: (n − 1) / n of them.

    An all-reduce does both.
    """
    return (n - 1) / n * size


# Floating-point operations, two for each multiply-add.


def window_pairs(start: int, stop: int, W: int) -> int:
    """Pairs that the queries of [start, stop) see: Σ min(i + 1, W)."""

    def before(i: int) -> int:
        ramp = min(i, W)
        return ramp * (ramp + 1) // 2 + (i - ramp) * W

    return before(stop) - before(start)


def window_attn_flops(pairs: int, Hq: int, D: int, Dv: int) -> tuple[int, int]:
    """Forward 2 P Hq (D + Dv), backward 2 P Hq (3 D + 2 Dv)."""
    return 2 * pairs * Hq * (D + Dv), 2 * pairs * Hq * (3 * D + 2 * Dv)


@dataclasses.dataclass(frozen=True)
class TTTFlops:
    """Of one token and head, by phase, as products of the equations in docs/block_causal_ttt.md.

    With Dk = Dv the five are 6, 12, 16, 18 and 12 units of Dh Dk: 18 forward, 46 backward.
    """

    apply: int  # w0 q, w2 q, w1 h
    update: int  # w0 k, w2 k, w1ᵀ v; G0, G1, G2
    apply_backward: int  # w0 q, w2 q, w1ᵀ δo; three δw; w0ᵀ a, w2ᵀ b
    reverse_scan: int  # w0 k, w2 k, w1ᵀ v; δG0 k, δG1ᵀ v, δG2 k; three δw
    deferred: int  # four products for δk, two for δv


def ttt_flops(Dk: int, Dv: int, Dh: int) -> TTTFlops:
    """With i = 2 Dh Dk for a product with w0 or w2, o = 2 Dv Dh for one with w1: see each term."""
    i, o = 2 * Dh * Dk, 2 * Dv * Dh
    return TTTFlops(
        apply=2 * i + o,
        update=2 * (2 * i + o),
        apply_backward=2 * (2 * i + o) + 2 * i,
        reverse_scan=3 * (2 * i + o),
        deferred=4 * i + 2 * o,
    )


def muon_flops(rows: int, columns: int) -> tuple[int, int]:
    """Of one matrix, m ≤ n its sides: forward 5 (3 m² n + m³), backward 5 (9 m² n + 3 m³)."""
    m, n = sorted((rows, columns))
    forward = 5 * (3 * m * m * n + m**3)
    return forward, 3 * forward


def chunk_muon_flops(Dk: int, Dv: int, Dh: int) -> tuple[int, int]:
    """Of one chunk and head: two matrices [Dh, Dk] and one [Dv, Dh]."""
    (f, b), (f1, b1) = muon_flops(Dh, Dk), muon_flops(Dv, Dh)
    return 2 * f + f1, 2 * b + b1


def chunks_scanned(start: int, stop: int, T: int, C: int) -> int:
    """Across chunks: the updates of the chunks that end in this piece, ⌊stop / C⌋ − ⌊start / C⌋.

    Less one in the last piece if C divides T, as the last chunk of all updates nothing.
    """
    updates = num_updates(T, C)
    return min(stop // C, updates) - min(start // C, updates)
