"""`RingKVCache`: the keys and values that a window can still see, in memory that does not grow."""

from typing import Literal, overload

import torch
from torch import Tensor

from lact_kernels.ops import checks
from lact_kernels.ops.autocast import matching_dtype
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import attention_options, check_scores
from lact_kernels.ops.window_attn_with_kvcache import (
    NAMES,
    check_no_gradient,
    run_window_attn_with_kvcache,
)


class RingKVCache:
    """A ring buffer of the last keys and values of each of B rows, which may have different lengths.

    The token at position p of a row is in slot `p % S`, where the next round overwrites it. There are
    `S = window_size + max_queries - 1` slots: all that `max_queries` new tokens see between them. For a pair
    of sides that is `left + max_queries`: later tokens are among the new ones.

        cache = RingKVCache(B, window_size, Hkv, D, dtype=torch.bfloat16, device="cuda")
        cache.append(k, v)                   # of new tokens, [B, t, Hkv, D]
        o = cache.window_attn(q)             # of the last of them, [B, 1, Hq, D]

    Nothing here waits for a GPU, and both calls can be recorded in a CUDA graph (with the Triton backend:
    the eager one reads lengths on the host).

    Args:
        batch_size: rows B.
        window_size: as in `window_attn`: tokens that a query sees, itself and those before it, or a pair
            `(left, right)`, whose left side needs a limit.
        num_kv_heads: heads Hkv of keys and values.
        head_dim: channels D of a key.
        head_dim_v: channels Dv of a value, D by default.
        max_queries: the most queries of a later `window_attn` call, at least 1. Any number of tokens can
            be appended at once.
        dtype, device: of keys and values; PyTorch's defaults by default.

    Attributes:
        k: keys `[B, S, Hkv, D]`, 0 in slots that were never written.
        v: values `[B, S, Hkv, Dv]`.
        seqlens: int32 `[B]`, how many tokens each row has had.
        max_seqlen: an int that no element of `seqlens` exceeds. It is counted on the host: the replay of
            a CUDA graph changes `seqlens` and leaves it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value. Both name the argument.
    """

    def __init__(
        self,
        batch_size: int,
        window_size: int | tuple[int, int],
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        max_queries: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        batch_size = checks.check_positive_int("batch_size", batch_size)
        num_kv_heads = checks.check_positive_int("num_kv_heads", num_kv_heads)
        head_dim = checks.check_positive_int("head_dim", head_dim)
        if head_dim_v is None:
            head_dim_v = head_dim
        head_dim_v = checks.check_positive_int("head_dim_v", head_dim_v)
        left, right = checks.check_window("window_size", window_size)
        if left is None:
            raise TypeError(
                "window_size must be an int or a pair with a limit on the left side, got"
                f" {window_size!r}"
            )
        self.window_size = checks.given_window(left, right)
        self.max_queries = checks.check_positive_int("max_queries", max_queries)
        shape = (batch_size, left + self.max_queries, num_kv_heads)
        self.k: Tensor = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.v: Tensor = torch.zeros(*shape, head_dim_v, dtype=dtype, device=device)
        self.seqlens: Tensor = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.max_seqlen = 0

    def __repr__(self) -> str:
        return (
            f"RingKVCache(k {list(self.k.shape)}, v {list(self.v.shape)}, {self.k.dtype} on"
            f" {self.k.device}, window_size={self.window_size}, max_queries={self.max_queries}, at most"
            f" {self.max_seqlen} tokens in a row)"
        )

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Write the next tokens of each row, over those that are no longer seen.

        Args:
            k: keys `[B, t, Hkv, D]` in the dtype and on the device of the cache.
            v: values `[B, t, Hkv, Dv]`.
            lengths: int32 `[B]`, how many of the t tokens row b has, the first ones; all by default.
                Values outside 0 .. t are an error on the CPU, and are not read on other devices.
        """
        self._check(k, v, lengths)
        if checks.left_inference_mode(self.k):
            self.k, self.v, self.seqlens = (x.clone() for x in (self.k, self.v, self.seqlens))
        t, S = k.shape[1], self.k.shape[1]
        n = min(t, S)  # of more tokens than slots the last ones count
        known = checks.known_values(self.seqlens) if lengths is None else []
        if len(set(known)) == 1:
            first = (known[0] + t - n) % S
            for cache, new in ((self.k, k), (self.v, v)):
                _write_round(cache, first, new if n == t else new[:, t - n :])
        else:
            self._scatter(k, v, lengths)
        self.seqlens += t if lengths is None else lengths
        self.max_seqlen += t

    def _scatter(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        """Write to slots that are computed where the lengths are, without reading them on the host."""
        t, S = k.shape[1], self.k.shape[1]
        n = min(t, S)
        if lengths is None:
            tokens, exists = torch.arange(t - n, t, device=k.device), None
            rows_k, rows_v = k[:, t - n :], v[:, t - n :]
        else:
            first = (lengths - S).clamp(min=0)[:, None]
            tokens = first + torch.arange(n, device=k.device)  # [B, n]
            exists = (tokens < lengths[:, None]).flatten()[:, None, None]
            places = _places(tokens.clamp(max=max(t - 1, 0)), t)
            rows_k, rows_v = (x.flatten(0, 1).index_select(0, places) for x in (k, v))
        slots = _places((self.seqlens[:, None] + tokens).remainder(S), S)
        for cache, new in ((self.k, rows_k), (self.v, rows_v)):
            cache, new = cache.view(-1, *cache.shape[2:]), new.reshape(-1, *cache.shape[2:])
            if exists is not None:
                new = torch.where(exists, new, cache.index_select(0, slots))
            cache.index_copy_(0, slots, new)

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys `[B, n, Hkv, D]` and values `[B, n, Hkv, Dv]` in the order of their tokens, as copies.

        The last token of each row stands at the end; a row of fewer than `n = min(max_seqlen, S)` tokens
        has zeros before them. Where all rows are equally long these are what `window_attn` takes, with
        the keys and values of the next tokens behind them.
        """
        B, S = self.k.shape[:2]
        n = min(self.max_seqlen, S)
        positions = self.seqlens[:, None] - n + torch.arange(n, device=self.k.device)
        exists = (positions >= 0)[..., None, None]
        slots = _places(positions.remainder(S), S)
        caches = (
            x.flatten(0, 1).index_select(0, slots).unflatten(0, (B, n)) for x in (self.k, self.v)
        )
        k, v = (torch.where(exists, x, 0) for x in caches)
        return k, v

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of these numbers, int64 `[B']`, in this order: for beam search."""
        self.k, self.v, self.seqlens = (
            x.index_select(0, rows) for x in (self.k, self.v, self.seqlens)
        )

    def to(self, device: torch.device | str) -> "RingKVCache":
        """Move it to a device."""
        self.k, self.v, self.seqlens = (x.to(device) for x in (self.k, self.v, self.seqlens))
        return self

    @overload
    def window_attn(
        self, q: Tensor, *, softmax_scale: float | None = None, softcap: float | None = None,
        sinks: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def window_attn(
        self, q: Tensor, *, softmax_scale: float | None = None, softcap: float | None = None,
        sinks: Tensor | None = None, backend: Backend = "auto", return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def window_attn(
        self, q: Tensor, *, softmax_scale: float | None = None, softcap: float | None = None,
        sinks: Tensor | None = None, backend: Backend = "auto", return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
    def window_attn(
        self,
        q: Tensor,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        backend: Backend = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`window_attn_with_kvcache` of the last `Tq <= max_queries` tokens, q `[B, Tq, Hq, D]`."""
        layout = "[B, Tq, Hq, D]"
        checks.check_floating("q", q, layout)
        B, _, Hkv, D = self.k.shape
        shape, dtype = (B, q.shape[1], q.shape[2], D), matching_dtype(q, self.k)
        checks.check_tensor("q", q, shape, layout, dtype, self.k.device, "this cache")
        if q.shape[1] > self.max_queries:
            raise ValueError(
                f"q has {q.shape[1]} tokens, more than max_queries = {self.max_queries}, for which this"
                " cache has slots"
            )
        check_scores(q, Hkv, softmax_scale, softcap, sinks, NAMES)
        checks.check_flag("return_lse", return_lse)
        check_no_gradient(q, self.k, self.v, sinks)
        window = self.window_size
        if isinstance(window, int):
            sides = window - 1, 0
        else:
            sides = checks.check_window("window_size", window)
        options = attention_options(q, sides, softmax_scale, softcap)
        o, lse = run_window_attn_with_kvcache(
            q, self.k, self.v, options, sinks, self.seqlens, backend
        )
        return (o, lse) if return_lse else o

    def _check(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        B, _, Hkv, D = self.k.shape
        checks.check_floating("k", k, "[B, t, Hkv, D]")
        t = k.shape[1]
        layouts = {"k": (k, D, "[B, t, Hkv, D]"), "v": (v, self.v.shape[3], "[B, t, Hkv, Dv]")}
        for name, (x, channels, layout) in layouts.items():
            shape = (B, t, Hkv, channels)
            checks.check_tensor(name, x, shape, layout, self.k.dtype, self.k.device)
        if lengths is None:
            return
        checks.check_tensor("lengths", lengths, (B,), "[B]", torch.int32, self.k.device)
        for length in checks.known_values(lengths):
            if not 0 <= length <= t:
                raise ValueError(f"lengths must be between 0 and t = {t}, got {length}")


def _write_round(cache: Tensor, first: int, new: Tensor) -> None:
    """Write to the slots from `first` on, and where they end from 0 on."""
    n, ahead = new.shape[1], cache.shape[1] - first
    if n <= ahead:
        cache.narrow(1, first, n).copy_(new)
        return
    cache[:, first:] = new[:, :ahead]
    cache[:, : n - ahead] = new[:, ahead:]


def _places(indices: Tensor, size: int) -> Tensor:
    """Of elements `indices [B, n]` of each of B rows, where they are when the rows lie end to end.

    Indexing both axes at once is 50 times slower on a CPU.
    """
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return (rows * size + indices).flatten()
