"""What else computes the same function on the same inputs: the baselines of every benchmark.

A `Variant` is built for one point and gives a function of that point's inputs. Building may fail: a
peer that is not installed or cannot do what is asked raises `Unavailable` with the reason, which
becomes the row's status.
"""

import dataclasses
import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_ttt import plain_apply, plain_ttt
from benchmarks.registry import (
    NEWTON_SCHULZ,
    ORDERS,
    TTT,
    BlockCausalTTT,
    Point,
    TTTApply,
    WindowAttn,
    WindowAttnWithKVCache,
)


class Unavailable(Exception):
    """This variant cannot run here, for the reason given."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of tensors that is not ours. Converting to it and back is not timed.

    `theirs(point, name, x)` gives a tensor of ours as the variant takes it, `ours(point, name, x)`
    the way back. Names are those of the inputs, and "o" for the output and where a backward starts.
    """

    theirs: Callable[[Point, str, Tensor], Tensor]
    ours: Callable[[Point, str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation: `build(point, mode)` returns `function(**inputs) -> o`."""

    name: str
    build: Callable[[Point, str], Callable[..., Tensor]]
    ours: bool = False
    layout: Layout | None = None


def variants(
    op: str, device: torch.device, lact_checkout: str | Path | None = None
) -> list[Variant]:
    """Ours first, then the peers on this kind of device; the first peer is the baseline.

    The LaCT authors' functions come from `lact_checkout`, and are unavailable without it.
    """
    ours = [_ours(backend) for backend in BACKENDS[op, device.type]]
    peers = _PEERS[op, device.type]
    return ours + peers + ([_lact(lact_checkout, device)] if op == "block_causal_ttt" else [])


def _ours(backend: str) -> Variant:
    def build(point: Point, mode: str) -> Callable[..., Tensor]:
        return lambda **inputs: point.run(backend, **inputs)

    return Variant(f"lact_kernels {backend}", build, ours=True)


def _sees(window_size: int, cu_seqlens: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether the query at i sees the key at j, for index tensors i and j."""

    def near(i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window_size)

    if cu_seqlens is None:
        return near
    lengths = cu_seqlens.diff()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [T]
    return lambda i, j: near(i, j) & (sequence[i] == sequence[j])


def _on_device(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(q.device)


def _dense_sdpa(point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` with a T x T boolean mask, made beforehand on the first call."""
    masks = []

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if not masks:
            i = torch.arange(point.T, device=q.device)
            masks.append(_sees(point.swept_value, _on_device(cu_seqlens, q))(i[:, None], i))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=masks[0], enable_gqa=point.Hq != point.Hkv
        )
        return o.transpose(1, 2)

    return run


def _causal_sdpa(point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` without a window, which has no mask to read: its fastest kernels."""
    if point.swept_value < point.T or point.sequences > 1:
        raise Unavailable("SDPA's causal kernels have no window and no packed sequences")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=point.Hq != point.Hkv
        )
        return o.transpose(1, 2)

    return run


def _flex_attention(point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    """Compiled FlexAttention; its BlockMask, sliding in each sequence, is made on the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks = []

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if q.device.type == "cpu" and mode != "fwd":
            raise Unavailable("FlexAttention has no backward on the CPU")
        if not masks:
            # Compiled, because the uncompiled mask of T x T does not fit at long lengths.
            make = torch.compile(create_block_mask) if q.is_cuda else create_block_mask
            sees = _sees(point.swept_value, _on_device(cu_seqlens, q))
            lengths = (point.T, point.T)
            mask = make(lambda b, h, i, j: sees(i, j), None, None, *lengths, device=q.device)
            masks.append(mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = compiled(q, k, v, block_mask=masks[0], enable_gqa=point.Hq != point.Hkv)
        return o.transpose(1, 2)

    return run


def _varlen_attn(point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    """FlashAttention-2 as PyTorch carries it: the batch laid end to end, a left window of W - 1."""
    varlen_attn = _find("torch.nn.attention.varlen", "varlen_attn")
    longest = max(point.lengths)
    left = -1 if point.swept_value >= longest else point.swept_value - 1
    borders = []

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if not borders:
            rows = torch.arange(point.B + 1, dtype=torch.int32, device=q.device) * point.T
            borders.append(rows if cu_seqlens is None else _on_device(cu_seqlens, q))
        lengths = (borders[0], borders[0], longest, longest)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*packed, *lengths, window_size=(left, 0)).unflatten(0, q.shape[:2])

    return run


def _parallel_attn(point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    """flash-linear-attention's softmax attention, whose `window_size` counts the query as ours does."""
    parallel_attn = _find("fla.ops.attn", "parallel_attn")
    window_size = None if point.swept_value >= point.T else point.swept_value
    borders = []

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if not borders:  # one int64 tensor, by which it recognises what it made of it
            borders.append(None if cu_seqlens is None else _on_device(cu_seqlens, q).long())
        return parallel_attn(q, k, v, window_size=window_size, cu_seqlens=borders[0])

    return run


def _cache_sdpa(slots: Callable[[WindowAttnWithKVCache], int]) -> Callable:
    """`scaled_dot_product_attention` over the last `slots(point)` slots of the cache, read in place.

    What a query does not see of them is masked by `[Tq, slots]`, made beforehand on the first call.
    """

    def build(point: WindowAttnWithKVCache, mode: str) -> Callable[..., Tensor]:
        first = point.S - slots(point)
        masks = []

        def run(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            if not masks:
                position = torch.arange(point.S, device=q.device)
                sees = _sees(point.S if point.window_size is None else point.window_size)
                mask = sees(position[-point.Tq :, None], position[first:])
                masks.append(None if mask.all() else mask)  # without one, more kernels can run
            q, k, v = (x.transpose(1, 2) for x in (q, k_cache[:, first:], v_cache[:, first:]))
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=masks[0], enable_gqa=point.Hq != point.Hkv
            )
            return o.transpose(1, 2)

        return run

    return build


def _reference_loop(point: BlockCausalTTT, mode: str) -> Callable[..., Tensor]:
    return point.reference


def _compiled_reference_loop(point: BlockCausalTTT, mode: str) -> Callable[..., Tensor]:
    """The chunk loop of the reference, unrolled and compiled as one graph."""
    return torch.compile(point.reference, dynamic=False)


def _plain_function(point: TTT | TTTApply, mode: str) -> Callable[..., Tensor]:
    if isinstance(point, TTTApply):
        return plain_apply
    order = ORDERS[point.plan]
    coefficients = NEWTON_SCHULZ if order.muon else None
    options = {"coefficients": coefficients, "detach_norms": order.detach_norms}
    return functools.partial(plain_ttt, steps=point.steps, **options)


def _compiled_plain_function(point: TTT | TTTApply, mode: str) -> Callable[..., Tensor]:
    """All steps of the plan, unrolled and compiled as one graph."""
    return torch.compile(_plain_function(point, mode), dynamic=False)


def _to_plain(point: TTT | TTTApply, name: str, x: Tensor) -> Tensor:
    """As `_to_lact`, with weights that tokens are multiplied with from the left."""
    x = _to_lact(point, name, x)
    return x.mT.contiguous() if name in ("w0", "w1", "w2") else x


def _from_plain(point: TTT | TTTApply, name: str, x: Tensor) -> Tensor:
    return _from_lact(point, name, x.mT if name in ("w0", "w1", "w2") else x)


def _lact(checkout: str | Path | None, device: torch.device) -> Variant:
    """The LaCT authors' own functions: their fused kernels on a GPU, their compiled PyTorch on a CPU."""
    if device.type == "cuda":
        names = ("postnorm_block_causal_lact_swiglu", "prenorm_block_causal_lact_swiglu")
        file, suffix, name = "ttt_operation_fused_kernel", "_fused_kernel_triton", "fused kernels"
    else:
        names = ("block_causal_lact_swiglu", "prenorm_block_causal_lact_swiglu")
        file, suffix, name = "ttt_operation", "", "compiled PyTorch"

    def build(point: BlockCausalTTT, mode: str) -> Callable[..., Tensor]:
        if point.muon and device.type == "cuda":
            raise Unavailable(
                "with Muon it is another function: the steps of w0 and w2 are orthogonalised as one"
            )
        function = getattr(lact_module(checkout, file), names[point.prenorm] + suffix)
        return functools.partial(function, chunk_size=point.chunk_size, use_muon=point.muon)

    return Variant(f"LaCT authors' {name}", build, layout=Layout(_to_lact, _from_lact))


def _to_lact(point: BlockCausalTTT | TTT | TTTApply, name: str, x: Tensor) -> Tensor:
    """Batch and heads as one axis: tokens `[b*h, l, d]`, rates `[b*h, l, 1]`, weights `[b*h, ..]`."""
    if name in ("w0", "w1", "w2"):
        return x.repeat(point.B, 1, 1)
    x = x[..., None] if x.ndim == 3 else x
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _from_lact(point: BlockCausalTTT | TTT | TTTApply, name: str, x: Tensor) -> Tensor:
    """Back again. Gradients of the weights add up over the batch."""
    x = x.unflatten(0, (point.B, point.H))
    if name in ("w0", "w1", "w2"):
        return x.sum(dim=0)
    x = x.transpose(1, 2)
    return x if name in ("q", "k", "v", "o") else x[..., 0]


def lact_module(checkout: str | Path | None, name: str) -> types.ModuleType:
    """A module of the LaCT authors' package, from a checkout of github.com/a1600012888/LaCT.

    The package itself, which would import its models and all that they need, is not run.
    """
    if not checkout:
        raise Unavailable("no checkout of the authors' repository was given")
    folder = Path(checkout) / "lact_llm" / "lact_model"
    if not (folder / f"{name}.py").is_file():
        raise Unavailable(f"{folder} has no {name}.py")
    package = types.ModuleType("lact_authors")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except Exception as error:  # whatever importing somebody else's code raises
        raise Unavailable(f"{name}.py cannot be imported ({error})") from None


def lact_script(checkout: str | Path | None, folder: str, name: str) -> types.ModuleType:
    """A module of the LaCT authors, imported from a folder of their repository as their scripts do it."""
    if not checkout:
        raise Unavailable("no checkout of the authors' repository was given")
    path = Path(checkout).resolve() / folder
    if not path.joinpath(*name.split(".")).with_suffix(".py").is_file():
        raise Unavailable(f"{path} has no {name}")
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever importing somebody else's code raises
        raise Unavailable(f"{name} cannot be imported ({error})") from None
    finally:
        sys.path.remove(str(path))


def _find(module: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module}.{name} is not installed ({error})") from None


DENSE_SDPA = Variant("dense-mask SDPA", _dense_sdpa)
CAUSAL_SDPA = Variant("SDPA, full causal", _causal_sdpa)
VARLEN_ATTN = Variant("FlashAttention-2 varlen_attn", _varlen_attn)
CACHE_SDPA = [
    Variant("SDPA over the window", _cache_sdpa(lambda point: point.span)),
    Variant("SDPA over the whole cache", _cache_sdpa(lambda point: point.S)),
]
PLAIN_LAYOUT = Layout(_to_plain, _from_plain)
PLAIN_FUNCTION = Variant("plain function", _plain_function, layout=PLAIN_LAYOUT)
PLAIN = [
    Variant("compiled plain function", _compiled_plain_function, layout=PLAIN_LAYOUT),
    PLAIN_FUNCTION,
]
BACKENDS = {
    ("window_attn", "cpu"): ("eager",),
    ("window_attn", "cuda"): ("triton", "eager"),
    ("window_attn_with_kvcache", "cpu"): ("eager",),
    ("window_attn_with_kvcache", "cuda"): ("triton", "eager"),
    ("block_causal_ttt", "cpu"): ("eager",),
    ("block_causal_ttt", "cuda"): ("triton", "eager"),
    ("ttt", "cpu"): ("eager",),
    ("ttt", "cuda"): ("triton", "eager"),
    ("ttt_apply", "cpu"): ("eager",),
    ("ttt_apply", "cuda"): ("triton", "eager"),
}
_PEERS = {
    ("window_attn", "cpu"): [
        DENSE_SDPA,
        Variant("FlexAttention", _flex_attention),
        CAUSAL_SDPA,
    ],
    ("window_attn", "cuda"): [
        Variant("FlexAttention", _flex_attention),
        VARLEN_ATTN,
        Variant("FLA parallel_attn", _parallel_attn),
        CAUSAL_SDPA,
    ],
    ("window_attn_with_kvcache", "cpu"): CACHE_SDPA,
    ("window_attn_with_kvcache", "cuda"): CACHE_SDPA,
    ("block_causal_ttt", "cpu"): [Variant("reference loop", _reference_loop)],
    ("block_causal_ttt", "cuda"): [
        Variant("compiled reference loop", _compiled_reference_loop),
        Variant("reference loop", _reference_loop),
    ],
    ("ttt", "cpu"): [PLAIN_FUNCTION],  # compiling takes a minute for each point
    ("ttt", "cuda"): PLAIN,
    ("ttt_apply", "cpu"): [PLAIN_FUNCTION],
    ("ttt_apply", "cuda"): PLAIN,
}
