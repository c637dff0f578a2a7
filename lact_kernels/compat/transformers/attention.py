"""Attention of Hugging Face `transformers` models, computed by `lact_kernels`.

Importing this module registers the name "lact_window_attn":

    import lact_kernels.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lact_window_attn")

Models hand a mask from one place to the next: once per forward pass it is made (`_mask`), and every
layer gets it along with its queries (`lact_window_attn_forward`). Here a mask is None where all rows are
full and hold one sequence each, or `[B, S]`, which numbers the sequences of a row: token t of row b is
of sequence `mask[b, t]`, and 0 is padding. A boolean padding mask is one already.
"""

import functools
import inspect
from collections.abc import Callable, Hashable
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from lact_kernels.core.offsets import on_host
from lact_kernels.layers.padding import borders, sequences_of
from lact_kernels.ops import checks
from lact_kernels.ops.window_attn import check_attention, run_window_attn, window_attn

NAME = "lact_window_attn"

# The options of some models that have no counterpart here, and what they are.
UNSUPPORTED = {
    "softcap": "a soft cap on the scores (attn_logit_softcapping of a config)",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the scores",
    "indices": "attention to selected keys",
    "block_indices": "attention to selected blocks of keys",
    "block_table": "a paged cache",
}
ELSE = "use another attn_implementation, such as 'eager'"


def lact_window_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None | EllipsisType = ...,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`lact_kernels.window_attn`, called as the layers of a `transformers` model call their attention.

    Args:
        module: the layer that calls. Its `is_causal`, if it has one, must be True.
        query: `[B, Hq, Tq, D]`; float16, bfloat16, float32, or float64. Read in place, as all three are.
        key: `[B, Hkv, Tk, D]`, cached ones included; `Hkv` divides `Hq`. The queries are those of the
            last Tq tokens.
        value: `[B, Hkv, Tk, Dv]`.
        attention_mask: None, or `[B, S]` with `Tq <= S <= Tk`: 0 for padding, elsewhere the number of
            the sequence that a token belongs to, which does not descend along the row; True or 1 for
            all is one sequence. Keys from S on are free slots of a static cache. The values are read
            once per forward pass, not once per layer, to lay the sequences end to end without the padding.
        scaling: factor on the scores, `D ** -0.5` by default.
        sliding_window: tokens that a query sees, itself included, which `window_attn` calls
            `window_size`. None is full causal attention.
        dropout: 0.0.
        is_causal: True, or None for what `module` says.
        position_ids: `[B, Tq]` or `[1, Tq]`. Without a mask, and with as many keys as queries, a position
            that does not ascend begins another sequence of the row.
        cu_seq_lens_q: int32 `[N+1]`, the borders of packed sequences in the queries, rows laid end to
            end; given with `cu_seq_lens_k` or not at all. Read as masks are.
        cu_seq_lens_k: int32 `[N+1]`, the borders in keys and values. In each sequence the last query
            stands at the last key.
        kwargs: whatever else models pass, such as `max_length_q`, has no effect on attention, save for
            `UNSUPPORTED` options, which must be None.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of query, 0 at padding, and None in place of the
        probabilities. Gradients flow to query, key and value.

    Raises:
        NotImplementedError: attention that is not causal, dropout, a mask of every query and key, an
            option of `UNSUPPORTED`, a row of tokens with padding between them in a window that is
            shorter than the row, or a model that has a window but does not tell its attention.
        TypeError: a tensor of the wrong dtype.
        ValueError: a wrong shape or value. All three name the argument.
    """
    _check_supported(module, attention_mask, sliding_window, dropout, is_causal, kwargs)
    window = None if sliding_window is ... else sliding_window
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = check_attention(q, k, v, window, scaling)
    B, Tq, Tk = q.shape[0], q.shape[1], k.shape[1]

    packing = None
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        packing = _given_packing(module, q, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    elif attention_mask is not None:
        S = attention_mask.shape[1]
        if attention_mask.shape[0] != B or not Tq <= S <= Tk:
            raise ValueError(
                f"attention_mask must have the shape [B, S] with B = {B} and S from Tq = {Tq} to"
                f" Tk = {Tk}, got {tuple(attention_mask.shape)}"
            )
        # No query sees a key before this one, so a step of decoding packs a window, not the cache.
        first = 0 if window is None else max(0, S - Tq - window + 1)
        k, v = k[:, first:S], v[:, first:S]
        packing = _packing(module, attention_mask, B, Tq, first)
        if packing is not None and packing.has_gaps and window is not None and window < S - first:
            raise NotImplementedError(
                "attention_mask has padding between the tokens of a row, over which a"
                f" sliding_window of {window} is not supported: pad on the left or on the right"
            )
    elif position_ids is not None and position_ids.ndim == 2 and Tq == Tk == position_ids.shape[1]:
        packing = _packing(module, position_ids, B, Tq, are_positions=True)

    if packing is None:
        return window_attn(q, k, v, window, softmax_scale=scaling), None
    q = _pack(q, packing.queries)
    k, v = (_pack(x, packing.keys) for x in (k, v))
    borders = packing.cu_seqlens_q, packing.cu_seqlens_k
    o, _ = run_window_attn(q, k, v, window, scaling, *borders, "auto")
    return _unpack(o, packing.queries, B, Tq), None


class _Packing(NamedTuple):
    """Where the tokens of a batch of rows are, and the borders of sequences when these are packed.

    The borders are on the host.
    """

    queries: tuple[Tensor, Tensor] | None  # row and place in it of each, None: all of all rows
    keys: tuple[Tensor, Tensor] | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    has_gaps: bool  # whether padding stands between two tokens of a row


def _given_packing(module, q, attention_mask, cu_seq_lens_q, cu_seq_lens_k) -> _Packing:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # A mask of another dtype is what `_mask` read in position_ids, which say the same.
        raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other")
    row = q.flatten(0, 1)[None]
    checks.check_cu_seqlens(cu_seq_lens_q, row, "cu_seq_lens_q")
    checks.check_cu_seqlens(cu_seq_lens_k, row, "cu_seq_lens_k")
    if cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise ValueError(
            f"cu_seq_lens_q has the borders of {len(cu_seq_lens_q) - 1} sequences and cu_seq_lens_k of"
            f" {len(cu_seq_lens_k) - 1}: they must be the same sequences"
        )
    read = functools.partial(on_host, cu_seq_lens_q)
    borders_q = borders_k = _PASS.remember(module, cu_seq_lens_q, None, read)
    if cu_seq_lens_k is not cu_seq_lens_q:
        read = functools.partial(on_host, cu_seq_lens_k)
        borders_k = _PASS.remember(module, cu_seq_lens_k, None, read)
    return _Packing(None, None, borders_q, borders_k, has_gaps=False)


@torch.compiler.disable  # its shapes depend on values
def _packing(
    module, source: Tensor, B: int, Tq: int, first: int = 0, are_positions: bool = False
) -> _Packing | None:
    """How to pack the last Tq queries, and the keys from `first` on, of a mask `[B, S]`, or of positions.

    None where each row is one sequence without padding. To read the values waits for the device.
    """

    def read() -> _Packing | None:
        sequences = sequences_of(source).expand(B, -1) if are_positions else source[:, first:]
        return _packing_of(sequences.long(), Tq)

    return _PASS.remember(module, source, (B, Tq, first), read)


class _Pass:
    """What the present forward pass of a model has read of tensors, for the layers that share them.

    A pass begins when a model makes its masks, or when a layer asks for the second time. Between two passes
    NumPy, `.data` and the kernels of others may change a tensor without a trace, so nothing outlives its
    pass, and layers of another configuration than the masks were made for read every time.
    """

    def __init__(self):
        self._config = None
        self._results = WeakTensorKeyDictionary()

    def begin(self, config) -> None:
        self._config, self._results = config, WeakTensorKeyDictionary()

    def remember(self, module, x: Tensor, call: Hashable, read: Callable[[], Any]) -> Any:
        """`read()` for this `x` and `call`, or what another layer was given in this pass."""
        is_known = self._config is not None and getattr(module, "config", None) is self._config
        if not is_known or torch.compiler.is_compiling():
            return read()
        version = None if x.is_inference() else x._version
        call = call, version, torch.is_inference_mode_enabled()
        known, layers, result = self._results.get(x, (None, (), None))
        if known != call or id(module) in layers:
            layers, result = set(), read()
            self._results[x] = call, layers, result
        layers.add(id(module))
        return result


_PASS = _Pass()


def _packing_of(sequences: Tensor, Tq: int) -> _Packing | None:
    B, S = sequences.shape
    if bool((sequences == 1).all()):
        return None
    N = int(sequences.max()) + 1 if sequences.numel() else 1
    numbers = sequences + N * torch.arange(B, device=sequences.device)[:, None]

    def pack(start: int) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        tokens = sequences[:, start:].nonzero(as_tuple=True)
        lengths = torch.bincount(numbers[:, start:][tokens], minlength=B * N)
        return None if len(tokens[0]) == B * (S - start) else tokens, borders(lengths).cpu()

    keys, cu_seqlens_k = pack(0)
    queries, cu_seqlens_q = (keys, cu_seqlens_k) if Tq == S else pack(S - Tq)
    is_token = sequences > 0
    before, after = (x.cumsum(1) > 0 for x in (is_token, is_token.flip(1)))
    has_gaps = bool((before & after.flip(1) & ~is_token).any())
    return _Packing(queries, keys, cu_seqlens_q, cu_seqlens_k, has_gaps)


def _pack(x: Tensor, tokens: tuple[Tensor, Tensor] | None) -> Tensor:
    """`[B, T, H, D]` as one row `[1, n, H, D]` of its tokens."""
    return (x.flatten(0, 1) if tokens is None else x[tokens])[None]


def _unpack(x: Tensor, tokens: tuple[Tensor, Tensor] | None, B: int, T: int) -> Tensor:
    """The inverse of `_pack`, with 0 at padding."""
    if tokens is None:
        return x[0].unflatten(0, (B, T))
    rows = x.new_zeros(B, T, *x.shape[2:])
    rows[tokens] = x[0]
    return rows


def _check_supported(module, attention_mask, sliding_window, dropout, is_causal, kwargs) -> None:
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
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(
            f"is_causal=False is not supported by {NAME}: {ELSE}, for parts of a model by a dict"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            "attention_mask must be None or have the shape [B, S]: a mask of queries and keys, such as"
            f" {tuple(attention_mask.shape)}, is not supported by {NAME}"
        )
    config_window = getattr(getattr(module, "config", None), "sliding_window", None)
    if sliding_window is ... and config_window is not None:
        raise NotImplementedError(
            f"sliding_window is {config_window} in the config, but {type(module).__name__} does not"
            f" pass it to its attention, so that {NAME} cannot know which layers have it: {ELSE}"
        )


@torch.compiler.disable  # reads values
def _mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask of one forward pass, or of its layers with a window: None or `[B, S]`.

    Args:
        batch_size: B.
        q_length: the number of queries, Tq.
        kv_length: the number of keys, Tk.
        q_offset: the position of the first query.
        kv_offset: the position of the first key.
        mask_function: who sees whom, made of functions of `transformers.masking_utils`.
        attention_mask: boolean padding mask `[B, T]` of the tokens so far, True for tokens.
        cache_position: the positions of the queries, in place of `q_length` and `q_offset`
            (transformers 4).

    Raises:
        NotImplementedError: a mask function other than causal attention, in a window or not, of rows
            or of packed sequences.
        ValueError: an attention mask of fewer tokens than there are keys.
    """
    _PASS.begin(kwargs.get("config"))
    packed = _packed_sequences(mask_function)
    if packed is not None:  # there is no padding, and no cache
        return (packed + 1).expand(batch_size, -1)
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    position = int(q_offset) + q_length  # of the token after the last
    S = position - kv_offset  # the slots of the cache behind these are free
    if attention_mask is None:
        full = S == kv_length
        return None if full else torch.ones(batch_size, S, dtype=torch.bool, device=device)
    # `generate` makes masks in advance for static caches, and some models pass them here again.
    mask = attention_mask[:, :position][:, -S:]
    if mask.shape[1] < S:
        raise ValueError(
            f"attention_mask must cover the {position} tokens so far, cached ones included, got"
            f" {tuple(attention_mask.shape)}"
        )
    # A copy: a checkpoint computes layers again when the caller's buffer may hold the next batch.
    return None if S == kv_length and bool(mask.all()) else mask.clone()


def _packed_sequences(mask_function: Callable) -> Tensor | None:
    """The sequences `[B, T]` that a mask function of supported parts keeps apart, if it keeps any."""
    if mask_function is causal_mask_function:
        return None
    if getattr(mask_function, "__module__", None) == causal_mask_function.__module__:
        parts = inspect.getclosurevars(mask_function).nonlocals
        match mask_function.__qualname__.split(".")[0]:
            case "sliding_window_overlay":  # layers say their window themselves
                return None
            case "packed_sequence_mask_function":
                return parts["packed_sequence_mask"]
            case "remap_positions_for_packed_sequence":
                return _packed_sequences(parts["mask_function"])
            case "and_masks":
                packed = [_packed_sequences(part) for part in parts["mask_functions"]]
                return next((x for x in packed if x is not None), None)
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    raise NotImplementedError(
        f"the mask function {name} is not supported by {NAME}, which knows causal attention, in a sliding"
        f" window or not, of padded rows or packed sequences, and nothing beside it: {ELSE}"
    )


AttentionInterface.register(NAME, lact_window_attn_forward)
AttentionMaskInterface.register(NAME, _mask)
