"""`LaCTCache`: what the LaCT layers of a model carry from one piece of a sequence to the next."""

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lact_kernels.core.offsets import cu_seqlens_of
from lact_kernels.ops import checks
from lact_kernels.ops.autocast import autocast_dtype
from lact_kernels.ops.block_causal_ttt import TTTState, TTTTokens
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.ring_kv_cache import RingKVCache
from lact_kernels.ops.window_attn import run_window_attn, window_attn

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
    gradient flows through it from one call into an earlier one.

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
        """What is cached of the layer `layer_idx`, which reads so many more frames of each row, like x."""
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
        """The time in which a layer reads so many more frames of each row, among so many places."""
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
        """Whether a layer of these options can read so many more frames of each row, like those of x."""
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

    def window_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        lengths: Sequence[int],
        backend: Backend,
    ) -> Tensor:
        """Attention of new tokens to those before them and to one another. Their keys are kept.

        q, k and v are `[B, t, H, D]`, or packed `[1, total, H, D]` with the borders `cu_seqlens`; row b
        has `lengths[b]` new tokens.
        """
        if (
            any(self.lengths)
            and cu_seqlens is None
            and q.shape[1] == 1
            and not checks.needs_gradient(q, k, v)
        ):
            self._append(k, v, cu_seqlens, lengths)
            return self.kv.window_attn(q, backend=backend)
        if any(self.lengths):
            o = self._window_attn_behind_cached(q, k, v, cu_seqlens, lengths, backend)
        else:
            window_size = self.options.window_size
            o = window_attn(q, k, v, window_size, cu_seqlens=cu_seqlens, backend=backend)
        self._append(k, v, cu_seqlens, lengths)
        return o

    def _window_attn_behind_cached(self, q, k, v, cu_seqlens, lengths, backend):
        """Attention over copies of the cached keys with the new ones behind them, row by row."""
        window_size = self.options.window_size
        n = min(self.kv.max_seqlen, self.kv.k.shape[1])
        most = n if window_size is None else window_size - 1
        cached = [min(length, most) for length in self.num_tokens]

        def joined(old, new):
            rows = zip(old, cached, new.flatten(0, 1).split(lengths))
            return torch.cat([x for row, c, more in rows for x in (row[n - c :], more)])[None]

        k, v = map(joined, self.kv.view(), (k, v))
        if cu_seqlens is None:
            cu_seqlens = cu_seqlens_of(lengths)
        cu_seqlens_k = cu_seqlens_of(map(operator.add, cached, lengths))
        packed = q.flatten(0, 1)[None]
        o, _ = run_window_attn(packed, k, v, window_size, None, cu_seqlens, cu_seqlens_k, backend)
        return o.view(*q.shape[:3], v.shape[3])

    def _append(self, k, v, cu_seqlens, lengths) -> None:
        k, v = k.detach(), v.detach()
        counts = None
        if cu_seqlens is not None:
            k, v = (pad_sequence(x[0].split(lengths), batch_first=True) for x in (k, v))
            counts = torch.tensor(lengths, dtype=torch.int32, device=k.device)
        self._make_room(k, v)
        self.kv.append(k, v, counts)

    def _make_room(self, k, v) -> None:
        """A ring of the size of the window; slots for all tokens where there is none, or up to a long one."""
        window_size = size = self.options.window_size
        if window_size is None or window_size > LONG_WINDOW:
            needed = k.shape[1] + (self.kv.max_seqlen if self.kv else 0)
            size = INITIAL_CAPACITY
            while size < needed:
                size *= 2
            size = size if window_size is None else min(size, window_size)
        if self.kv is not None and self.kv.window_size >= size:
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
        pending = tuple(piece._asdict() for piece in self.ttt.pending)
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
        pending = tuple(TTTTokens(**piece) for piece in ttt["pending"])
        layer.ttt = TTTState(**ttt | {"pending": pending})
        return layer
