"""Attention of Hugging Face `transformers` models, computed by `lact_kernels`.

Importing this module registers the name "lact_window_attn":

    import lact_kernels.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lact_window_attn")

A model makes a mask once per forward pass (`masks.py`), and passes it to the attention of every layer
(`lact_window_attn_forward`). Here the mask is `[B, S]`, and numbers the sequences of a row: token t of
row b belongs to sequence `mask[b, t]`, and 0 is padding. A boolean padding mask is a special case. Padding is
left out, and the sequences are computed end to end (`packing.py`).
"""

import warnings
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lact_kernels.compat.transformers.masks import (
    CAUSAL,
    ELSE,
    EVERYTHING,
    NAME,
    SequenceMask,
    Window,
    sequence_mask,
)
from lact_kernels.compat.transformers.packing import (
    Packing,
    given_packing,
    pack,
    packing_of_keys,
    packing_of_mask,
    packing_of_positions,
    unpack,
)
from lact_kernels.ops import checks
from lact_kernels.ops.window_attn import check_attention, run_window_attn

# What configurations call a window.
WINDOW_NAMES = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "local_attention",
)
# Options of some models that are not supported, and what they are.
UNSUPPORTED = {
    "position_bias": "a bias on the scores",
    "indices": "attention to selected keys",
    "block_indices": "attention to selected blocks of keys",
    "block_table": "a paged cache",
}


def lact_window_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None | EllipsisType = ...,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`lact_kernels.window_attn` with the signature of attention functions in `transformers`.

    Args:
        module: the layer that calls.
        query: `[B, Hq, Tq, D]`; float16, bfloat16, float32, or float64. None of the three is copied.
        key: `[B, Hkv, Tk, D]`, cached keys included; `Hkv` divides `Hq`. The queries are those of the
            last Tq tokens.
        value: `[B, Hkv, Tk, Dv]`.
        attention_mask: None, or `[B, S]` with `Tq <= S <= Tk`: 0 for padding, else the number of the
            sequence that the token belongs to. Numbers do not descend along a row; with a single sequence
            all of them are 1, or True. Keys from S on are free slots of a static cache. The values are read
            once per forward pass, not in each layer, to pack the sequences end to end without the padding.
            A boolean mask of queries that see everything, before and after them, is of the keys alone, which
            may be those of another sequence.
        scaling: factor on the scores, `D ** -0.5` by default.
        sliding_window: the window of the layer. For causal attention it is how many tokens a query sees,
            itself included. With two sides it is one more than how many a query sees on either, as for flash
            attention. None is no window. A mask that the model made has its own, which is what counts, as
            for eager attention; if the two differ, a warning says so.
        softcap: scores become `softcap * tanh(scores / softcap)`; None is none.
        s_aux: attention sinks `[Hq]`, float32 or the dtype of query: one more logit in each row's softmax.
        sinks: another name of `s_aux`.
        dropout: 0.0.
        is_causal: whether a query sees none of the later keys, where there is no mask that says it; None for
            what `module` says.
        position_ids: `[B, Tq]` or `[1, Tq]`. Used if attention is causal, nothing is padded and there are as
            many keys as queries: where a position does not ascend, another sequence of the row begins.
        cu_seq_lens_q: int32 `[N+1]`, the borders of packed sequences in the queries of all rows, one row
            after the other. Given with `cu_seq_lens_k` or not at all, and read once per forward pass.
        cu_seq_lens_k: int32 `[N+1]`, the borders in keys and values. In each sequence the last query is
            aligned with the last key.
        kwargs: other arguments that models pass, such as `max_length_q`, have no effect. Options in
            `UNSUPPORTED` must be None.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of query, and None in place of the probabilities. Those of
        padding are 0 if there is a window or attention is causal. Gradients flow to query, key, value and
        sinks.

    Raises:
        NotImplementedError: dropout, a mask of every query and key, an option of `UNSUPPORTED`, padding
            between the tokens of a row that is longer than the window, or a model that has a window but
            passes it neither to its attention nor to its mask.
        TypeError: a tensor has the wrong dtype.
        ValueError: a wrong shape or value. The messages of all three name the argument.
    """
    _check_supported(attention_mask, dropout, kwargs)
    window = _window(module, attention_mask, sliding_window, is_causal)
    sinks = s_aux if sinks is None else sinks
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = check_attention(q, k, v, checks.given_window(*window), scaling, softcap, sinks)
    if isinstance(attention_mask, SequenceMask) and attention_mask.is_full:
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
        attention_mask = None

    packing = None
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            # A mask of integers was made from position_ids, and describes the same sequences.
            raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other")
        packing = given_packing(module, q, cu_seq_lens_q, cu_seq_lens_k)
    elif attention_mask is not None:
        k, v, packing = _by_mask(module, attention_mask, window, q, k, v)
    elif window.right == 0 and _are_positions(position_ids, q, k):
        packing = packing_of_positions(module, position_ids, *q.shape[:2])

    if packing is None:
        return run_window_attn(q, k, v, options, sinks)[0], None
    B, Tq = q.shape[:2]
    q = pack(q, packing.queries)
    k, v = (pack(x, packing.keys) for x in (k, v))
    o, _ = run_window_attn(q, k, v, options, sinks, packing.borders)
    return unpack(o, packing.queries, B, Tq), None


def _by_mask(
    module, mask: Tensor, window: Window, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Packing | None]:
    """The keys and values that the mask covers and the window reaches, and how to pack them."""
    (B, Tq), Tk, S = q.shape[:2], k.shape[1], mask.shape[1]
    sees_all = window == EVERYTHING and mask.dtype == torch.bool
    if mask.shape[0] != B or S > Tk or (S < Tq and not sees_all):
        raise ValueError(
            f"attention_mask must have the shape [B, S] with B = {B} and S from Tq = {Tq} to Tk = {Tk}, got"
            f" {tuple(mask.shape)}"
        )
    if sees_all:
        return k[:, :S], v[:, :S], packing_of_keys(module, mask, Tq)
    # No query sees a key before this one: a decoding step packs a window, and not the whole cache.
    first = 0 if window.left is None else max(0, S - Tq - window.left)
    packing = packing_of_mask(module, mask, Tq, first)
    if packing is not None and packing.has_gaps and _has_limits(window, S - first):
        raise NotImplementedError(
            "attention_mask has padding between the tokens of a row, over which a window of"
            f" {checks.given_window(*window)} is not supported: pad on the left or on the right"
        )
    return k[:, first:S], v[:, first:S], packing


def _has_limits(window: Window, T: int) -> bool:
    """Whether it hides keys by their distance, among T tokens."""
    left, right = window
    return (left is not None and left < T - 1) or (right is not None and 0 < right < T - 1)


def _are_positions(position_ids, q: Tensor, k: Tensor) -> bool:
    """Whether they are of all queries and keys of a row."""
    return (
        position_ids is not None
        and position_ids.ndim == 2
        and q.shape[1] == k.shape[1] == position_ids.shape[1]
    )


def _window(module, mask, sliding_window, is_causal) -> Window:
    """Which keys a query sees.

    That is what the mask says, if the model has made one, as for eager attention. Otherwise it is what the
    layer says of itself, whose window has two sides of the same length if it is not causal.
    """
    own = CAUSAL if sliding_window is None else None
    if own is None and sliding_window is not ...:
        own = Window(checks.check_count("sliding_window", sliding_window) - 1, 0)
    if isinstance(mask, SequenceMask):
        if own is not None and mask.window.right != 0:
            own = Window(own.left, own.left)
        if own not in (None, mask.window):
            told, masked = (checks.given_window(*window) for window in (own, mask.window))
            warnings.warn(
                f"{type(module).__name__} has a sliding_window of {told}, and its mask one of"
                f" {masked}: {NAME} computes what the mask says, as eager attention does",
                stacklevel=2,
            )
        return mask.window
    if own is None:
        window = _configured_window(getattr(module, "config", None))
        if window is not None:
            raise NotImplementedError(
                f"the config has a window of {window}, but {type(module).__name__} does not pass a"
                f" sliding_window to its attention, nor a mask that has it, so that {NAME} cannot know which"
                f" layers have it: {ELSE}"
            )
        own = CAUSAL
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return own if is_causal else Window(own.left, own.left)


def _configured_window(config) -> Any:
    """The window of a model, by any of its names; None if it has none."""
    # Not by getattr, which is an error for what differs between layers.
    values = {} if config is None else vars(config)
    return next((values[name] for name in WINDOW_NAMES if values.get(name)), None)


def _check_supported(attention_mask, dropout, kwargs) -> None:
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}, {meaning}, is not supported by {NAME}: {ELSE}")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(f"output_attentions is not supported by {NAME}: {ELSE}")
    if dropout:
        raise NotImplementedError(
            f"dropout of attention is not supported by {NAME}, got {dropout}: set attention_dropout"
            " of the config to 0.0"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            "attention_mask must be None or have the shape [B, S]: a mask of queries and keys, such as"
            f" {tuple(attention_mask.shape)}, is not supported by {NAME}"
        )


AttentionInterface.register(NAME, lact_window_attn_forward)
AttentionMaskInterface.register(NAME, sequence_mask)
