"""Attention of Hugging Face `transformers` models, computed by `lact_kernels`.

Importing this module registers the name "lact_window_attn":

    import lact_kernels.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lact_window_attn")

A model makes a mask once per forward pass (`_mask`), and passes it to the attention of every layer
(`lact_window_attn_forward`). Here the mask is None if each row is one sequence without padding. Otherwise it
is `[B, S]` and numbers the sequences of a row: token t of row b belongs to sequence `mask[b, t]`, and 0 is
padding. A boolean padding mask is a special case.
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

# Options of some models that are not supported, and what they are.
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
    """`lact_kernels.window_attn` with the signature of attention functions in `transformers`.

    Args:
        module: the layer that calls. Its `is_causal`, if it has one, must be True.
        query: `[B, Hq, Tq, D]`; float16, bfloat16, float32, or float64. None of the three is copied.
        key: `[B, Hkv, Tk, D]`, cached keys included; `Hkv` divides `Hq`. The queries are those of the
            last Tq tokens.
        value: `[B, Hkv, Tk, Dv]`.
        attention_mask: None, or `[B, S]` with `Tq <= S <= Tk`: 0 for padding, else the number of the
            sequence that the token belongs to. Numbers do not descend along a row; with a single sequence
            all of them are 1, or True. Keys from S on are free slots of a static cache. The values are read
            once per forward pass, not in each layer, to pack the sequences end to end without the padding.
        scaling: factor on the scores, `D ** -0.5` by default.
        sliding_window: how many tokens a query sees, itself included: the `window_size` of `window_attn`.
            None is full causal attention.
        dropout: 0.0.
        is_causal: True, or None for what `module` says.
        position_ids: `[B, Tq]` or `[1, Tq]`. Used if there is no mask and as many keys as queries: where a
            position does not ascend, another sequence of the row begins.
        cu_seq_lens_q: int32 `[N+1]`, the borders of packed sequences in the queries of all rows, one row
            after the other. Given with `cu_seq_lens_k` or not at all, and read once per forward pass.
        cu_seq_lens_k: int32 `[N+1]`, the borders in keys and values. In each sequence the last query is
            aligned with the last key.
        kwargs: other arguments that models pass, such as `max_length_q`, have no effect. Options in
            `UNSUPPORTED` must be None.

    Returns:
        The outputs `[B, Tq, Hq, Dv]` in the dtype of query, 0 at padding, and None in place of the
        probabilities. Gradients flow to query, key and value.

    Raises:
        NotImplementedError: attention that is not causal, dropout, a mask of every query and key, an
            option of `UNSUPPORTED`, padding between the tokens of a row that is longer than the window, or
            a model that has a window but does not pass it to its attention.
        TypeError: a tensor has the wrong dtype.
        ValueError: a wrong shape or value. The messages of all three name the argument.
    """
    _check_supported(module, attention_mask, sliding_window, dropout, is_causal, kwargs)
    window = None if sliding_window is ... else sliding_window
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = check_attention(q, k, v, window, scaling)
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
        # No query sees a key before this one: a decoding step packs a window, and not the whole cache.
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
    o, _ = run_window_attn(q, k, v, options, None, borders)
    return _unpack(o, packing.queries, B, Tq), None


class _Packing(NamedTuple):
    """Where the tokens of a batch are, and the borders of its sequences once they are packed.

    The borders are on the host.
    """

    queries: tuple[Tensor, Tensor] | None  # row and position in the row of each token; None for all
    keys: tuple[Tensor, Tensor] | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    has_gaps: bool  # whether there is padding between two tokens of a row


def _given_packing(module, q, attention_mask, cu_seq_lens_q, cu_seq_lens_k) -> _Packing:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # A mask of integers was made by `_mask` from position_ids, and describes the same sequences.
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
    """How to pack the last Tq queries, and the keys from `first` on, by a mask `[B, S]` or by positions.

    None if each row is one sequence without padding. Reading the values waits for the device.
    """

    def read() -> _Packing | None:
        sequences = sequences_of(source).expand(B, -1) if are_positions else source[:, first:]
        return _packing_of(sequences.long(), Tq)

    return _PASS.remember(module, source, (B, Tq, first), read)


class _Pass:
    """What has been read of tensors in the present forward pass, for the layers that share these tensors.

    A pass begins when a model makes its masks, or when the same layer asks a second time. Nothing is
    remembered for longer, as NumPy, `.data` and other kernels can change a tensor without changing its
    version. Layers whose configuration is not the one that the masks were made for read every time.
    """

    def __init__(self):
        self._config = None
        self._results = WeakTensorKeyDictionary()

    def begin(self, config) -> None:
        self._config, self._results = config, WeakTensorKeyDictionary()

    def remember(self, module, x: Tensor, call: Hashable, read: Callable[[], Any]) -> Any:
        """The result of `read()` for `x` and `call`, remembered if another layer has read it in this pass."""
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
    """The tokens of `[B, T, H, D]` as one row `[1, n, H, D]`."""
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
    device: torch.device | str | None = None,
    **others,
) -> Tensor | None:
    """Make the mask of a forward pass, or of its layers with a window: None or `[B, S]`.

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

    Raises:
        NotImplementedError: the mask function is anything but causal attention, with or without a window,
            of rows or packed sequences.
        ValueError: the attention mask has fewer tokens than there are keys.
    """
    _PASS.begin(others.get("config"))
    packed = _packed_sequences(mask_function)
    if packed is not None:  # there is no padding, and no cache
        return (packed + 1).expand(batch_size, -1)
    cache_position = others.get("cache_position")
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    position = int(q_offset) + q_length  # of the next token
    S = position - kv_offset  # slots of the cache from S on are free
    if attention_mask is None:
        full = S == kv_length
        return None if full else torch.ones(batch_size, S, dtype=torch.bool, device=device)
    # For static caches `generate` makes masks in advance, which are longer. Some models pass them here again.
    mask = attention_mask[:, :position][:, -S:]
    if mask.shape[1] < S:
        raise ValueError(
            f"attention_mask must cover the {position} tokens so far, cached ones included, got"
            f" {tuple(attention_mask.shape)}"
        )
    # A copy: checkpointed layers read it again in the backward, when the buffer may hold the next batch.
    return None if S == kv_length and bool(mask.all()) else mask.clone()


def _packed_sequences(mask_function: Callable) -> Tensor | None:
    """The numbers `[B, T]` of packed sequences in a mask function; None if it has none."""
    if mask_function is causal_mask_function:
        return None
    if getattr(mask_function, "__module__", None) == causal_mask_function.__module__:
        parts = inspect.getclosurevars(mask_function).nonlocals
        match mask_function.__qualname__.split(".")[0]:
            case "sliding_window_overlay":  # layers pass their window themselves
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
