"""What flash-attn's functions have in common: which of its options are there, and what they mean here."""

import torch
from torch import Tensor

from lact_kernels.ops import checks
from lact_kernels.ops.autocast import matching_dtype

# Options that are not supported, and what to do instead.
INSTEAD = {
    "dropout_p": "pass 0.0",
    "alibi_slopes": "pass None, or keep flash-attn for a model that was trained with them",
    "block_table": "pass keys and values that are not paged",
    "rotary_cos": "rotate q and k before the call",
    "rotary_sin": "rotate q and k before the call",
    "cache_batch_idx": "pass a cache whose row b belongs to row b of q",
    "cache_leftpad": "begin each row at slot 0 of the cache and say its length in cache_seqlens",
}


def check_supported(dropout_p: float = 0.0, **options: object) -> None:
    """Raise for the first option that is in use: dropout above 0, or anything but None."""
    dropout_p = checks.check_finite_number("dropout_p", dropout_p)
    options["dropout_p"] = dropout_p if dropout_p > 0 else None
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported: {INSTEAD[name]}")


def check_flags(**flags: bool) -> None:
    """Check that these are True or False, which may be NumPy's."""
    for name, flag in flags.items():
        if getattr(flag, "dtype", None) != "bool":  # torch's dtype is no string
            checks.check_flag(name, flag)


def check_longest(name: str, length: int | Tensor) -> None:
    """Check the type: an int, or a tensor `[]` as `lengths.max()` returns it. The value is not read."""
    if not isinstance(length, Tensor):
        checks.check_int(name, length)
    elif length.ndim or length.is_floating_point() or length.dtype == torch.bool:
        raise TypeError(
            f"{name} must be an int or a tensor [] of integers, got {tuple(length.shape)} of"
            f" {length.dtype}"
        )


def soft_cap(softcap: float) -> float | None:
    """`window_attn`'s `softcap`; flash-attn has none where it is not positive."""
    softcap = checks.check_finite_number("softcap", softcap)
    return softcap if softcap > 0 else None


def window(
    causal: bool, window_size: tuple[int, int], most_keys: int | Tensor | None
) -> tuple[int | None, int | None]:
    """How far a query sees to its left and right, None for no limit, of their `causal` and `window_size`.

    In flash-attn a side of `most_keys` or more has no limit, and the right one has the limit `most_keys`
    after all where the left one has another. Only queries before the first key of their sequence can tell:
    `most_keys` is None where there are none. A tensor is read only if the answer depends on it.
    """
    check_flags(causal=causal)
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    left, right = map(checks.plain, window_size) if is_pair else (None, None)
    if not checks.is_int(left) or not checks.is_int(right):
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    left, right = max(left, -1), 0 if causal else max(right, -1)
    if not (causal or most_keys is None or left == right == -1):
        most_keys = int(most_keys)
        left = left if left < most_keys else -1
        right = right if right < most_keys else -1
        if left >= 0 and right == -1:
            right = most_keys
    return checks.check_window("window_size", (left, right))


def unpack_kv(q: Tensor, kv: Tensor, q_layout: str, layout: str) -> tuple[Tensor, ...]:
    """Keys and values, which lie side by side on the third axis from the end."""
    checks.check_floating("q", q, q_layout)
    checks.check_floating("kv", kv, layout)
    shape = (*q.shape[:-3], kv.shape[-4], 2, kv.shape[-2], q.shape[-1])
    checks.check_tensor("kv", kv, shape, layout, matching_dtype(kv, q), q.device)
    return kv.unbind(-3)


def unpack_qkv(qkv: Tensor, layout: str) -> tuple[Tensor, ...]:
    """Queries, keys and values, likewise."""
    checks.check_floating("qkv", qkv, layout)
    if qkv.shape[-3] != 3:
        raise ValueError(f"qkv must have the shape {layout}, got {tuple(qkv.shape)}")
    return qkv.unbind(-3)
