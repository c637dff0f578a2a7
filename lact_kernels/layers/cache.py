"""`LaCTCache`: what the LaCT layers of a model carry from one call to the next, as a sequence goes on."""

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lact_kernels.ops.autocast import autocast_dtype
from lact_kernels.ops.block_causal_ttt import TTTState, TTTTokens
from lact_kernels.ops.ring_kv_cache import RingKVCache

INITIAL_CAPACITY = 256  # tokens of a layer without a window, doubled as needed
LONG_WINDOW = 2**16  # a ring of more slots begins like this, too


class LayerOptions(NamedTuple):
    """What all calls of a layer with one cache share; the rest is in its `TTTState`."""

    num_attn_heads: int
    head_dim: int
    window_size: int | None
    lact_chunk_size: int
    temporal_reduction: int

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items())


class LaCTCache:
    """For each layer, the keys and values that its window still sees, and its fast weights.

        cache = LaCTCache()
        layer(prompt, cache=cache)                  # [B, T, C]
        for _ in range(n):
            y = layer(next_token, cache=cache)      # [B, 1, C]

    Cutting a sequence anywhere, any number of times, gives the outputs of one call. The cache fills as
    the layers are called, each under its `layer_idx`, and serves one batch of B rows, which may have
    different lengths. Its memory does not grow with the length, but for layers without a window. No
    gradient flows through it from one call into an earlier one. A layer whose window has later tokens in
    it takes no cache.

    A call that was interrupted may have advanced some of the layers: go on from a copy
    (`copy.deepcopy(cache)`, or a saved `state_dict()`).

    Attributes:
        layers: the `LayerCache` of each `layer_idx` that was called.
    """

    is_compileable, is_linear = False, (False,)  # what transformers asks of a cache

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}

    def __repr__(self) -> str:
        said = [f"{len(self.layers)} layers", f"{self.get_seq_length()} tokens"]
        layers = list(self.layers.values())
        if layers:
            windows = dict.fromkeys(str(layer.options.window_size) for layer in layers)
            said += [f"{len(layers[0].lengths)} rows", f"window_size={' and '.join(windows)}"]
        if layers and layers[0].kv is not None:
            said.append(f"{layers[0].kv.k.dtype} on {layers[0].kv.k.device}")
        return f"LaCTCache({', '.join(said)})"

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """How many places of a row were read, padding included, by one layer or the foremost."""
        layers = self.layers.values() if layer_idx is None else [self.layers.get(layer_idx)]
        return max([0, *(layer.places for layer in layers if layer is not None)])

    def check_complete(self, num_layers: int | None = None) -> None:
        """Raise RuntimeError where a call was interrupted, within a layer or between `num_layers` of them."""
        uneven = False
        if num_layers is not None and self.layers:
            lengths = {layer.lengths for layer in self.layers.values()}
            uneven = len(lengths) > 1 or len(self.layers) != num_layers
        if uneven or any(layer.interrupted for layer in self.layers.values()):
            raise RuntimeError(
                "cache was left half-way by a call that did not come to its end: reset() it, or go on from"
                " an earlier copy"
            )

    def set_seq_length(self, places: int) -> None:
        """Count also the padding that a model has taken out before its layers, up to so many places."""
        for layer in self.layers.values():
            layer.places = places

    def layer(
        self, layer_idx: int | None, options: LayerOptions, lengths: Sequence[int], x: Tensor
    ) -> "LayerCache":
        """What is cached of the layer `layer_idx`, which is about to read `lengths[b]` more frames of row b.

        It is made if there is none. The device and dtype of the frames are those of x.
        """
        if layer_idx is None:
            raise ValueError("a cache keeps each layer under its layer_idx: give the layer one")
        if not lengths:
            raise ValueError("hidden_states must have a row for a cache to go on with, got B = 0")
        self.check_complete()
        layer = self.layers.get(layer_idx) or LayerCache(len(lengths), options)
        layer.check(options, lengths, x)
        self.layers[layer_idx] = layer
        return layer

    def reorder_cache(self, beam_idx: Tensor) -> "LaCTCache":
        """Keep the rows of these numbers in this order, as beam search does after each step.

        Args:
            beam_idx: int32 or int64 `[B']`, numbers of rows below B; a row may be named any number of
                times, or not at all.

        Raises:
            TypeError: `beam_idx` is no tensor of these dtypes.
            ValueError: it has another shape, or names a row that does not exist.
        """
        if not isinstance(beam_idx, Tensor) or beam_idx.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"beam_idx must be an int32 or int64 tensor [B'], got {beam_idx!r}")
        if beam_idx.ndim != 1 or not len(beam_idx):
            raise ValueError(f"beam_idx must have the shape [B'], got {tuple(beam_idx.shape)}")
        numbers = beam_idx.tolist()
        self.check_complete()
        for layer in self.layers.values():
            B = len(layer.lengths)
            if not all(0 <= n < B for n in numbers):
                raise ValueError(f"beam_idx must name rows of 0 .. {B - 1}, got {numbers}")
        for layer in self.layers.values():
            layer.select_rows(beam_idx.long())
        return self

    def crop(self, max_length: int) -> None:
        """Forget everything (`max_length=0`). Fast weights do not go back to an earlier token.

        Raises:
            ValueError: `max_length` lies between 1 and the present length.
        """
        if max_length == 0:
            self.reset()
        elif not 0 < self.get_seq_length() <= max_length:
            raise ValueError(
                "a LaCTCache can be cropped to 0 tokens only, as fast weights cannot be taken back; got"
                f" max_length={max_length} of {self.get_seq_length()}: copy the cache before going on"
            )

    def reset(self) -> None:
        """Forget everything: the next call starts a sequence, of any batch size."""
        self.layers.clear()

    def to(self, device: torch.device | str) -> "LaCTCache":
        """Move everything to a device, and return the cache itself."""
        self.check_complete()
        for layer in self.layers.values():
            layer.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, tuples and copies of tensors.

        `torch.save` writes it and `torch.load` reads it with `weights_only=True`.
        """
        self.check_complete()
        return {str(idx): layer.state_dict() for idx, layer in self.layers.items()}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> "LaCTCache":
        """The cache that gave this `state_dict()`. Its tensors are copied."""
        cache = cls()
        cache.layers = {int(i): LayerCache.from_state_dict(x) for i, x in state_dict.items()}
        return cache


class LayerCache:
    """What one layer carries on: a ring of keys and values, fast weights, and how far each row is.

    Attributes:
        kv: the keys and values; None before the first call.
        ttt: the fast weights; None before the first call.
        lengths: how many frames each of B rows has had, known on the host. A frame is a token, but in
            layers with `temporal_reduction`, where so many frames make one.
        places: how long the rows are with the padding in them.
        options: of the layer.
        interrupted: whether a call began to change this and did not come to its end.
    """

    def __init__(self, batch_size: int, options: LayerOptions):
        self.kv: RingKVCache | None = None
        self.ttt: TTTState | None = None
        self.lengths: tuple[int, ...] = (0,) * batch_size
        self.places = 0
        self.options = options
        self.interrupted = False

    @contextmanager
    def advance(self, lengths: Sequence[int], places: int) -> Iterator[None]:
        """Around a call that reads `lengths[b]` more frames of row b, of `places` with the padding.

        One that does not come to its end leaves `interrupted`.
        """
        self.interrupted = True
        yield
        self.lengths = tuple(map(operator.add, self.lengths, lengths))
        self.places += places
        self.interrupted = False

    @property
    def num_tokens(self) -> list[int]:
        """How many tokens each row has had."""
        return [-(-length // self.options.temporal_reduction) for length in self.lengths]

    def check(self, options: LayerOptions, lengths: Sequence[int], x: Tensor) -> None:
        """Raise where a layer of these options cannot read on: `lengths[b]` more frames of row b, like x."""
        if options != self.options:
            raise ValueError(f"cache is of a layer of {self.options}, this one has {options}")
        if len(lengths) != len(self.lengths):
            raise ValueError(
                f"cache has {len(self.lengths)} rows, and hidden_states have {len(lengths)}"
            )
        if self.kv is not None and self.kv.k.device != x.device:
            raise ValueError(f"cache is on {self.kv.k.device}, and hidden_states on {x.device}")
        if self.kv is not None and self.kv.k.dtype != autocast_dtype(x):
            raise TypeError(
                f"cache has keys of {self.kv.k.dtype}, and those of hidden_states are {autocast_dtype(x)}"
            )
        r = options.temporal_reduction
        for n, (before, length) in enumerate(zip(self.lengths, lengths)):
            if length and before % r:
                raise ValueError(
                    f"row {n} of cache has had {before} frames, no multiple of temporal_reduction = {r}:"
                    " only its last piece may end within a group"
                )

    def make_room(self, k: Tensor, v: Tensor) -> None:
        """See to it that `kv` has slots for keys `[B, t, H, D]` and values behind those that it has.

        A ring of the size of the window; slots for all tokens where there is none, or up to a long one.
        """
        window_size = size = self.options.window_size
        if window_size is None or window_size > LONG_WINDOW:
            needed = k.shape[1] + (self.kv.max_seqlen if self.kv else 0)
            size = INITIAL_CAPACITY
            while size < needed:
                size *= 2
            size = size if window_size is None else min(size, window_size)
        if self.kv is not None and self.kv.k.shape[1] >= size:
            return
        B, _, H, D = k.shape
        kv = RingKVCache(B, size, H, D, head_dim_v=v.shape[3], dtype=k.dtype, device=k.device)
        if self.kv is not None:  # every token is in the slot of its position still
            for new, old in ((kv.k, self.kv.k), (kv.v, self.kv.v)):
                new[:, : old.shape[1]] = old
            kv.seqlens, kv.max_seqlen = self.kv.seqlens, self.kv.max_seqlen
        self.kv = kv

    def select_rows(self, rows: Tensor) -> None:
        self.kv.select_rows(rows)
        self.ttt = self.ttt.select(rows)
        self.lengths = tuple(self.lengths[n] for n in rows.tolist())

    def to(self, device: torch.device | str) -> None:
        self.kv.to(device)
        self.ttt = self.ttt.map(lambda x: x.to(device))

    def state_dict(self) -> dict[str, Any]:
        pending = tuple(tokens._asdict() for tokens in self.ttt.pending)
        return copy.deepcopy(
            {
                "lengths": self.lengths,
                "places": self.places,
                "options": self.options._asdict(),
                "kv": vars(self.kv),
                "ttt": self.ttt._asdict() | {"pending": pending},
            }
        )

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> "LayerCache":
        state_dict = copy.deepcopy(state_dict)
        lengths, ttt = state_dict["lengths"], state_dict["ttt"]
        layer = cls(len(lengths), LayerOptions(**state_dict["options"]))
        layer.lengths, layer.places = lengths, state_dict["places"]
        layer.kv = RingKVCache.__new__(RingKVCache)
        vars(layer.kv).update(state_dict["kv"])
        pending = tuple(TTTTokens(**tokens) for tokens in ttt["pending"])
        layer.ttt = TTTState(**ttt | {"pending": pending})
        return layer
