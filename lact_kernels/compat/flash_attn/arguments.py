"""What flash-attn's functions have in common: which of its options are there, and what they mean here."""

import torch
from torch import Tensor

from lact_kernels.ops import checks

# Options that are not supported, and what to do instead.
INSTEAD = {
    "dropout_p": "pass 0.0",
    "softcap": "pass 0.0, or keep flash-attn for a model that was trained with it",
    "alibi_slopes": "pass None, or keep flash-attn for a model that was trained with them",
    "block_table": "pass keys and values that are not paged",
    "rotary_cos": "rotate q and k before the call",
    "rotary_sin": "rotate q and k before the call",
    "cache_batch_idx": "pass a cache whose row b belongs to row b of q",
    "cache_leftpad": "begin each row at slot 0 of the cache and say its length in cache_seqlens",
}


def window(causal: bool, window_size: tuple[int, int], most_queries: int | Tensor) -> int | None:
    """`window_attn`'s `window_size` for flash-attn's `causal` and `window_size`, a pair `(left, right)`.

    `most_queries`, of a sequence, is read only if the answer depends on it.
    """
    checks.check_flag("causal", causal)
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    left, right = map(checks.plain, window_size) if is_pair else (None, None)
    if not checks.is_int(left) or not checks.is_int(right):
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    # Queries are aligned at the end: a single one is at the last key, and has no later keys.
    if not (causal or right == 0 or most_queries <= 1):
        raise NotImplementedError(
            f"causal=False with window_size={(left, right)} lets queries see later keys, which is"
            " not supported: pass causal=True, or a right side of 0"
        )
    return checks.check_count("window_size", left + 1) if left >= 0 else None


def check_longest(name: str, length: int | Tensor) -> None:
    """Check the type: an int, or a tensor `[]` as `lengths.max()` returns it. The value is not read."""
    if not isinstance(length, Tensor):
        checks.check_int(name, length)
    elif length.ndim or length.is_floating_point() or length.dtype == torch.bool:
        raise TypeError(
            f"{name} must be an int or a tensor [] of integers, got {tuple(length.shape)} of"
            f" {length.dtype}"
        )


def check_supported(dropout_p: float = 0.0, softcap: float = 0.0, **options) -> None:
    """Raise for the first option that is in use: a number above 0, or anything but None."""
    for name, number in {"dropout_p": dropout_p, "softcap": softcap}.items():
        number = checks.check_finite_number(name, number)
        options[name] = number if number > 0 else None
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported: {INSTEAD[name]}")
