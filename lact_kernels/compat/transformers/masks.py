"""What the masks of `transformers` models say, as "lact_window_attn" takes them.

A model makes its masks once per forward pass, one for each kind of layers, of a mask function: which keys a
query sees, as functions of `transformers.masking_utils`, combined. `sequence_mask` returns a `SequenceMask`
`[B, S]` of what exists, together with the window that the function has. So layers that are not told their
window have it from their mask. It is never None: a model with attention of its own might take that for a mask
that hides nothing.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from lact_kernels.compat.transformers.forward_pass import PASS

NAME = "lact_window_attn"
ELSE = "use another attn_implementation, such as 'eager'"
# Mask functions that are not supported, and what they are of.
UNSUPPORTED = {
    "blockwise_overlay": "of images whose tokens see each other",
    "chunked_overlay": "of chunks that do not see each other",
}
# Methods of a tensor that leave a mask what it is.
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.clone, Tensor.contiguous, Tensor.detach}


class Window(NamedTuple):
    """A query at position p sees the keys from `p - left` to `p + right`; None is no limit."""

    left: int | None
    right: int | None

    def __and__(self, other: "Window") -> "Window":
        return Window(*(_least(*limits) for limits in zip(self, other)))

    def __or__(self, other: "Window") -> "Window":
        return Window(*(None if None in limits else max(limits) for limits in zip(self, other)))


CAUSAL = Window(None, 0)
EVERYTHING = Window(None, None)


def _least(*limits: int | None) -> int | None:
    return min((x for x in limits if x is not None), default=None)


class SequenceMask(Tensor):
    """The numbers `[B, S]` of the sequences of a row, 0 for padding, and the window that layers have here.

    A model may move it, and ask for its shape and the like. One that computes with it expects another kind of
    mask, of queries and keys, which is an error here.
    """

    window: Window
    is_full: bool  # whether it is known that there is no padding, and a single sequence in each row

    @classmethod
    def of(cls, numbers: Tensor, window: Window, is_full: bool = False) -> "SequenceMask":
        mask = numbers.as_subclass(cls)
        mask.window, mask.is_full = window, is_full
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, reason = getattr(func, "__name__", str(func)), None
        with torch._C.DisableTorchFunctionSubclass():
            try:
                result = func(*args, **kwargs or {})
            except (RuntimeError, IndexError) as error:  # such as an index for heads
                result, reason = None, error
        if reason is None and (
            not isinstance(result, Tensor) or result.ndim == 0 or name == "__get__"
        ):
            return result
        mask = args[0]
        if func in MOVES and isinstance(mask, cls) and not result.is_floating_point():
            return cls.of(result, mask.window, mask.is_full)
        raise NotImplementedError(
            f"the model computes with its mask ({name}), which for {NAME} is not one of queries and keys, but"
            f" has the shape [B, S]: {ELSE}"
        ) from reason


def values_of(mask: Tensor) -> Tensor:
    """A mask as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return mask.as_subclass(Tensor)


class _Seen(NamedTuple):
    """What a mask function lets a query see."""

    window: Window
    sequences: Tensor | None = None  # numbers [B, T] of packed sequences, from 0


@torch.compiler.disable  # reads values
def sequence_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    **others,
) -> SequenceMask:
    """Make the mask of a forward pass, or of its layers with a window.

    Args:
        batch_size: B.
        q_length: the number of queries, Tq.
        kv_length: the number of keys, Tk.
        q_offset: the position of the first query.
        kv_offset: the position of the first key.
        mask_function: which keys a query sees: functions of `transformers.masking_utils`, combined.
        attention_mask: boolean padding mask `[B, T]` of the tokens so far, False for padding.
        others: `config`, and from transformers 4 instead of `q_length` and `q_offset` the positions of the
            queries, `cache_position`.

    Returns:
        The mask `[B, S]`. With a window, or if attention is causal, S is how many keys there are up to the
        last query; slots of a static cache from S on are free. Otherwise queries see all of the keys, which
        may be those of another sequence.

    Raises:
        NotImplementedError: the mask function is anything but attention in a window, causal or not, of rows
            or packed sequences.
        ValueError: the attention mask has fewer tokens than there are keys.
    """
    PASS.begin(others.get("config"))
    window, sequences = _seen(mask_function)
    if isinstance(attention_mask, SequenceMask):
        # `generate` made it in advance, for a static cache. Models that pass it here again get what it is.
        window = attention_mask.window
    cache_position = others.get("cache_position")
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    position = int(q_offset) + q_length  # of the next token
    if window == EVERYTHING:
        position = kv_offset + kv_length
        if attention_mask is not None:
            position = min(position, attention_mask.shape[1])
    S = position - kv_offset
    if window.right != 0 and window != EVERYTHING and S != kv_length:
        raise NotImplementedError(
            f"a window with two sides of {q_length} queries over {kv_length} keys, of which {S} are up to the"
            f" last query, is not supported by {NAME}: {ELSE}"
        )
    numbers = None if sequences is None else (sequences + 1).expand(batch_size, -1)
    padding = _padding(attention_mask, position, S)
    if padding is not None:
        numbers = padding if numbers is None else numbers * padding
    if numbers is not None:
        return SequenceMask.of(numbers, window)
    full = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, S)
    return SequenceMask.of(full, window, is_full=True)


def _padding(attention_mask: Tensor | None, position: int, S: int) -> Tensor | None:
    """The padding mask of the S keys before `position`, or None if all of them are tokens."""
    if attention_mask is None:
        return None
    is_full = isinstance(attention_mask, SequenceMask) and attention_mask.is_full
    attention_mask = values_of(attention_mask)
    # A mask made in advance may be longer.
    mask = attention_mask[:, :position][:, -S:]
    if mask.shape[1] < S:
        raise ValueError(
            f"attention_mask must cover the {position} tokens so far, cached ones included, got"
            f" {tuple(attention_mask.shape)}"
        )
    # A copy: checkpointed layers read it again in the backward, when the buffer may hold the next batch.
    return None if is_full or bool(mask.all()) else mask.clone()


def _seen(mask_function: Callable) -> _Seen:
    if mask_function is causal_mask_function:
        return _Seen(CAUSAL)
    if _is_of_transformers(mask_function):
        parts = inspect.getclosurevars(mask_function).nonlocals
        name = mask_function.__qualname__.split(".")[0]
        match name:
            case "packed_sequence_mask_function":
                return _Seen(EVERYTHING, parts["packed_sequence_mask"])
            case "remap_positions_for_packed_sequence":
                return _seen(parts["mask_function"])
            case "and_masks":
                return _all_of([_seen(part) for part in parts["mask_functions"]])
            case "or_masks":
                return _any_of(
                    [_seen(part) for part in parts["mask_functions"] if not _is_empty(part)]
                )
        window = _window(name, **parts)
        if window is None and _is_always_true(mask_function):
            return _Seen(EVERYTHING)
        if window is not None and _has_the_edges_of(window, mask_function):
            return _Seen(window)
    raise _unsupported(getattr(mask_function, "__qualname__", repr(mask_function)))


def _is_of_transformers(mask_function: Callable) -> bool:
    module = mask_function.__module__ if inspect.isfunction(mask_function) else ""
    return module == causal_mask_function.__module__ or module.startswith("transformers.models.")


def _all_of(seen: list[_Seen]) -> _Seen:
    packed = [x.sequences for x in seen if x.sequences is not None]
    if len(packed) > 1:
        raise _unsupported("and_masks of several functions of packed sequences")
    window = functools.reduce(operator.and_, (x.window for x in seen))
    return _Seen(window, packed[0] if packed else None)


def _any_of(seen: list[_Seen]) -> _Seen:
    if any(x.sequences is not None for x in seen):
        raise _unsupported("or_masks of functions of packed sequences")
    return _Seen(functools.reduce(operator.or_, (x.window for x in seen)))


def _is_empty(mask_function: Callable) -> bool:
    """Whether it is that of images in a text, in which there are none."""
    is_known = _is_of_transformers(mask_function)
    if not is_known or not mask_function.__qualname__.startswith("blockwise_overlay."):
        return False
    blocks = inspect.getclosurevars(mask_function).nonlocals["block_sequence_ids"]
    return not bool((blocks >= 0).any())


def _window(name: str, sliding_window=None, is_causal: bool | None = None, **_) -> Window | None:
    """The window of a mask function of `transformers`, by its name and what it was made of."""
    match name, sliding_window, is_causal:
        case "causal_mask_function", None, None:
            return CAUSAL
        case "bidirectional_mask_function", None, None:
            return EVERYTHING
        case "sliding_window_overlay", int(n), None:
            return Window(n - 1, None)
        case "sliding_window_bidirectional_overlay", int(n), None:
            return Window(n, n)
        case "_bidirectional_window_overlay", int(n), None:
            return Window(n - 1, n - 1)
        case "sliding_window_mask_function", (int(left), int(right)), None:
            return Window(left - 1, max(right - 1, 0))
        case "sliding_window_mask_function", int(n), True:
            return Window(n - 1, 0)
        case "sliding_window_mask_function", int(n), False:
            return Window((n + 1) // 2 - 1, n // 2)
    return None


def _has_the_edges_of(window: Window, mask_function: Callable) -> bool:
    """Whether a query sees itself, and the function says so of keys beside both edges and far away."""
    far = 1 << 24
    left, right = (far if limit is None else limit for limit in window)
    if left < 0:
        return False
    distances = {-left, -left - 1, 0, right, right + 1, -far, far}
    q, zero = torch.tensor([2 * far, 0], device="cpu")
    return all(
        bool(mask_function(zero, zero, q, q + d)) == (-left <= d <= right)
        for d in distances
        if abs(d) <= far
    )


def _is_always_true(mask_function: Callable) -> bool:
    """Whether it is a constant: it says True of arguments that there is nothing to know of."""
    try:
        return bool(mask_function(*(object() for _ in range(4))))
    except Exception:
        return False


def _unsupported(name: str) -> NotImplementedError:
    meaning = UNSUPPORTED.get(name.split(".")[0])
    name = f"{name}, {meaning}," if meaning else name
    return NotImplementedError(
        f"the mask function {name} is not supported by {NAME}, which knows attention in a sliding window,"
        f" causal or not, of padded rows or packed sequences, and nothing beside it: {ELSE}"
    )
