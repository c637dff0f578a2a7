"""`ttt_apply` in Triton: two launches forward, three backward, on weights that are read where they lie.

What lies between the launches, one number for each token and hidden unit (backward three), is bounded: tokens
take turns, as many at a time as have their activations within ACTIVATION_BYTES.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.fast_weights.activations import ttt_hidden
from lact_kernels.triton.fast_weights.blocks import can_be_described
from lact_kernels.triton.fast_weights.layout import (
    DESCRIBED_TOKENS,
    SUMMED_TOKENS,
    Dims,
    Run,
    have_descriptors,
    round_up,
)
from lact_kernels.triton.fast_weights.products import num_outer_splits, ttt_outer, ttt_project
from lact_kernels.triton.fast_weights.scan import ACTIVATION_BYTES
from lact_kernels.triton.launch import on_device, readable_in_place


def ttt_apply_fwd(q: Tensor, weights: Triple) -> Tensor:
    """f(q), `[B, T, H, Dv]`, for weights `[B or 1, H, ...]`; with 1 all rows share them."""
    dims = Dims.of(weights)
    o = q.new_empty(*q.shape[:3], dims.Dv)
    weights = _readable(weights, q.dtype)
    with on_device(q):
        for tokens, outputs in _slices(*_rows(weights, q, o), planes=1, Dh=dims.Dh):
            described = _are_described(tokens, None, weights, dims)
            run = _run(tokens, described)
            acts = _activations(1, tokens, run, dims)
            ttt_hidden(tokens, None, None, weights, acts, dims, described)(run)
            ttt_project(acts, weights, outputs, dims, to_values=True, described=described)(run)
    return o


def ttt_apply_bwd(do: Tensor, q: Tensor, weights: Triple) -> tuple[Tensor, Triple]:
    """Gradients of q and the weights, which are summed over the rows that share them."""
    dims, H = Dims.of(weights), q.shape[2]
    dq = q.new_empty(q.shape)
    shared = len(weights[0]) != len(q)
    total = None
    readable = _readable(weights, q.dtype)
    with on_device(q):
        for tokens, dtokens, doutputs in _slices(*_rows(readable, q, dq, do), planes=3, Dh=dims.Dh):
            described = _are_described(tokens, doutputs, readable, dims)
            run = _run(tokens, described)
            acts = _activations(3, tokens, run, dims)
            ttt_hidden(tokens, doutputs, None, readable, acts, dims, described)(run)
            splits = num_outer_splits(tokens, run.num_chunks, run.width, dims, described)
            parts = q.new_empty(splits, run.num_chunks, H, dims.size, dtype=torch.float32)
            ttt_outer(tokens, doutputs, acts, parts, dims, described=described)(run)
            part = parts.sum(dim=(0, 1), keepdim=True)[0] if shared else parts.sum(dim=0)
            total = part if total is None else total.add_(part)
            ttt_project(acts, readable, dtokens, dims, to_values=False, described=described)(run)
    if total is None:
        return dq, tuple(w.new_zeros(w.shape) for w in weights)
    dweights = zip(dims.unpack(total), weights)
    return dq, tuple(
        dw.to(w.dtype, memory_format=torch.contiguous_format, copy=True) for dw, w in dweights
    )


def _readable(weights: Triple, dtype: torch.dtype) -> Triple:
    """The weights in the dtype of the products, each head's matrix contiguous: mostly as they are."""
    return tuple(_readable_one(w, dtype) for w in weights)


def _readable_one(w: Tensor, dtype: torch.dtype) -> Tensor:
    if w.dtype != dtype:
        return w.to(dtype, memory_format=torch.contiguous_format)
    return w if w[:1, :1].is_contiguous() else w.contiguous()


def _rows(weights: Triple, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors `[B, T, H, D]`, where all rows share weights in one row, if that takes no copies.

    Programs are for one row's tokens alone: many short rows would leave most of their tiles empty.
    """
    tensors = readable_in_place(*tensors)
    if len(weights[0]) == 1 and all(map(_is_one_row, tensors)):
        tensors = readable_in_place(*(x.flatten(0, 1)[None] for x in tensors))
    return tensors


def _is_one_row(x: Tensor) -> bool:
    B, T = x.shape[:2]
    return B == 1 or T == 1 or x.stride(0) == T * x.stride(1)


def _slices(*tensors: Tensor, planes: int, Dh: int) -> Iterator[tuple[Tensor, ...]]:
    """Of all the same tokens, as many as have `planes` activations for each hidden unit in the bytes."""
    B, T, H, _ = tensors[0].shape
    token_bytes = planes * B * H * Dh * tensors[0].element_size()
    most = max(1, ACTIVATION_BYTES // max(token_bytes, 1))
    for first in range(0, T if B else 0, most):
        yield tuple(x[:, first : first + most] for x in tensors)


def _run(tokens: Tensor, described: bool) -> Run:
    """Each row is one chunk."""
    B, T = tokens.shape[:2]
    width = round_up(T, DESCRIBED_TOKENS) if described else T
    return Run(B, None, 0, 0, 0, B, T, 0, chunk_size=T, width=width)


def _are_described(tokens: Tensor, doutputs: Tensor | None, weights: Triple, dims: Dims) -> bool:
    """Whether descriptors copy these, of which each row needs weights of its own."""
    B, T = tokens.shape[:2]
    if T < SUMMED_TOKENS or len(weights[0]) != B:
        return False
    return have_descriptors(dims, tokens) and can_be_described(tokens, doutputs, weights=weights)


def _activations(planes: int, tokens: Tensor, run: Run, dims: Dims) -> Tensor:
    H = tokens.shape[2]
    return tokens.new_empty(planes, H, round_up(run.num_chunks * run.width), dims.Dh)
