"""Descriptors of what the fast-weight kernels copy in blocks.

All are of four axes: tokens `[B, T, H, D]`, seen as [B, H, T, D]; activations `[planes, H, rows, Dh]`;
matrices of weights [places, H, rows, columns]. A block knows only where its tensor ends:
`Chunks.are_in_blocks` says when that is enough.

Who launches kernels over the same tokens decides once for all of them: what reads activations by descriptors
reads whole blocks, which only what stores them by descriptors has written.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.triton.descriptors import aligned_strides, descriptor
from lact_kernels.triton.fast_weights.layout import Dims

Block = tuple[int, int]  # rows and columns


def can_be_described(*tokens: Tensor | None, weights: Triple = ()) -> bool:
    """Whether all of the tensors `[B, T, H, D]` and `[chunks, H, rows, columns]` can have descriptors."""
    tensors = (*(x for x in tokens if x is not None), *(w.transpose(1, 2) for w in weights))
    return all(aligned_strides(x) is not None for x in tensors)


def of_tokens(x: Tensor | None, block: Block) -> TensorDescriptor | None:
    return None if x is None else descriptor(x, aligned_strides(x), *block)


def of_activations(acts: Tensor | None, block: Block) -> TensorDescriptor | None:
    return None if acts is None else of_tokens(acts.transpose(1, 2), block)


def of_weights(
    weights: Tensor | Triple | None, dims: Dims, block0: Block, block1: Block
) -> tuple[TensorDescriptor | None, ...]:
    """Of packed matrices `[places, H, SIZE]`, or three: blocks of w0 and w2, and of w1."""
    if weights is None:
        return (None,) * 3
    matrices = dims.unpack(weights) if isinstance(weights, Tensor) else weights
    return tuple(map(of_activations, matrices, (block0, block1, block0)))


def of_weights_in_pairs(
    weights: Tensor, dims: Dims, block0: Block, block1: Block
) -> tuple[TensorDescriptor | None, ...]:
    """Of packed matrices: the same block of w0 and w2 at once, by one descriptor, and blocks of w1."""
    w0, w1, _ = dims.unpack(weights)
    pair = TensorDescriptor(
        weights,
        [*w0.shape[:2], 2, *w0.shape[2:]],
        [*w0.stride()[:2], dims.offsets[2], *w0.stride()[2:]],
        [1, 1, 2, *block0],
    )
    return pair, of_activations(w1, block1), None
