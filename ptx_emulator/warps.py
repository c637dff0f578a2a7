"""What the 32 threads of a warp exchange without memory."""

import numpy as np

WARP = 32


def shuffle_bfly(S, x, distance):
    return _shuffled(S, x, lambda lanes: lanes ^ distance)


def shuffle_idx(S, x, lane):
    return _shuffled(S, x, lambda lanes: lane)


def shuffle_up(S, x, distance):
    return _shuffled(S, x, lambda lanes: np.where(lanes >= distance, lanes - distance, lanes))


def shuffle_down(S, x, distance):
    return _shuffled(S, x, lambda lanes: np.where(lanes + distance < WARP, lanes + distance, lanes))


def _shuffled(S, x, source):
    """Each thread gets what the lane `source(its own lane)` of its warp has."""
    if x.shape[1] == 1:
        return x
    lanes = np.arange(x.shape[1]) % WARP
    chosen = source(lanes)
    if isinstance(chosen, np.ndarray) and chosen.ndim == 2:  # another one in each thread
        programs = max(len(x), len(chosen))
        x = np.broadcast_to(x, (programs, S.num_threads))
        chosen = np.broadcast_to(chosen, x.shape).astype(np.int64)
        place = (chosen % WARP) + np.arange(S.num_threads) // WARP * WARP
        return np.take_along_axis(x, place, axis=1)
    return x[:, (chosen % WARP) + np.arange(x.shape[1]) // WARP * WARP]


def reduce_warp(S, x, what):
    x = np.broadcast_to(x, (len(x), S.num_threads)).reshape(len(x), -1, WARP)
    result = {
        "add": lambda: x.sum(2, dtype=x.dtype),
        "min": lambda: x.min(2),
        "max": lambda: x.max(2),
        "and": lambda: np.bitwise_and.reduce(x, 2),
        "or": lambda: np.bitwise_or.reduce(x, 2),
        "xor": lambda: np.bitwise_xor.reduce(x, 2),
    }[what]()
    return np.repeat(result, WARP, axis=1)


def ballot(S, predicate):
    """Bit i is the predicate of lane i."""
    bits = np.broadcast_to(predicate, (len(predicate), S.num_threads)).reshape(-1, WARP)
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    return np.repeat(words.reshape(len(predicate), -1), WARP, axis=1)


def elected(S):
    """One thread of each warp: the first."""
    return (np.arange(S.num_threads) % WARP == 0)[None]
