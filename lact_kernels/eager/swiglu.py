"""The fast network f(x) = w1 (silu(w0 x) * (w2 x)) over tokens: its values, its gradients, and theirs.

Tokens are `[B, T, H, D]`, weights `[B, H, Dh, Dk]` (w0, w2) and `[B, H, Dv, Dh]` (w1). The operands of
matrix products are rounded to the tokens' dtype, the products accumulated and returned in
float32 (float64 for float64 tokens), and all between two products is float32. What an update and its
backward round keeps float32's range: Muon divides a step by its norm, however small, and the gradient of
that is beyond float16. Products run over blocks of the tokens, small enough that what lies between them
stays in a CPU's cache, and from block to block it lies in the same memory (`_Scratch`).

Names, for a key k and a value v: gate = w0 k, up = w2 k, hidden = silu(gate) * up, dhidden = w1^T v.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lact_kernels.core.fast_weights import Triple
from lact_kernels.core.tokens import Tokens

silu_out = torch.ops.aten.silu.out  # (x, out)
silu_backward_out = torch.ops.aten.silu_backward.grad_input  # (grad, x, out): grad * silu'(x)

CPU_BLOCK, DEVICE_BLOCK = 1 << 17, 1 << 26  # hidden activations of one block, over all its heads
MIN_BLOCK_TOKENS = 128  # with fewer a product is mostly the reading of its weights


class _Block(NamedTuple):
    """`count` chunks whole, or a part of one, from token `first` and chunk `chunk` on."""

    first: int
    chunk: int
    count: int
    length: int

    def view(self, x: Tensor) -> Tensor:
        """These tokens of `[B, T, H, D]`, as `[count, B, H, length, D]`."""
        tokens = x[:, self.first : self.first + self.count * self.length]
        return tokens.unflatten(1, (self.count, self.length)).permute(1, 0, 3, 2, 4)

    def tokens(self, x: Tensor) -> Tensor:
        """These tokens of `[B, T, H, D]`, as a batch `[count * B * H, length, D]`."""
        return _rounded(self.view(x), x.dtype).flatten(0, 2)

    def scalars(self, x: Tensor) -> Tensor:
        """These tokens of `[B, T, H]`, as `[count * B * H, length, 1]`."""
        return self.view(x[..., None]).flatten(0, 2)

    def weights(self, w: Tensor) -> Tensor:
        """Their chunks of `[chunks, B, H, rows, columns]`, as a view `[count * B * H, rows, columns]`."""
        return w[self.chunk : self.chunk + self.count].flatten(0, 2)

    def write(self, x: Tensor, result: Tensor) -> None:
        """Store the batch `[count * B * H, length, D]` as these tokens of `[B, T, H, D]`."""
        view = self.view(x)
        view.copy_(result.view(view.shape))

    def write_sums(self, x: Tensor, terms: Tensor) -> None:
        """Store the sums of `[count * B * H, length, D]` over D as these tokens of `[B, T, H]`."""
        self.write(x[..., None], terms.sum(dim=-1, keepdim=True))


class _Scratch:
    """Memory for what lies between two products, the same in every block.

    New memory costs more than the arithmetic on it: the system clears its pages, and no cache has them.
    """

    def __init__(self, like: Tensor, number: int):
        self._memory = like.new_empty(number, 0)

    def take(self, *shape: int) -> tuple[Tensor, ...]:
        """Uninitialised tensors of this shape, in the place of those of the block before."""
        size = math.prod(shape)
        if size > self._memory.shape[1]:
            self._memory = self._memory.new_empty(len(self._memory), size)
        return self._memory[:, :size].unflatten(1, shape).unbind()


def apply(q: Tensor, borders: Sequence[int], weights: Triple, out: Tensor) -> None:
    """f(q) into `out`, each token through the weights of its chunk, which are `[chunks, B, H, ...]`.

    Chunk c has the queries `borders[c]:borders[c+1]`.
    """
    weights = [_rounded(w, q.dtype) for w in weights]
    scratch = _Scratch(weights[0], 2)
    for block in _blocks(q, weights[0].shape[-2], borders):
        w0, w1, w2 = (block.weights(w) for w in weights)
        x = block.tokens(q)
        gate, up = scratch.take(*x.shape[:2], w0.shape[1])
        torch.bmm(x, w0.mT, out=gate)
        torch.bmm(x, w2.mT, out=up)
        hidden = F.silu(gate, inplace=True).mul_(up)
        block.write(out, _rounded(hidden, q.dtype) @ w1.mT)


def apply_bwd(
    do: Tensor, q: Tensor, borders: Sequence[int], weights: Triple, out: Tensor
) -> Triple:
    """Gradients of `apply`: that of q into `out`, those of each chunk's weights returned."""
    dtype = q.dtype
    dweights = _zeros_like(weights)
    weights = [_rounded(w, dtype) for w in weights]
    scratch = _Scratch(weights[0], 5)
    for block in _blocks(q, weights[0].shape[-2], borders):
        w0, w1, w2 = (block.weights(w) for w in weights)
        dw0, dw1, dw2 = (block.weights(dw) for dw in dweights)
        x, dy = block.tokens(q), block.tokens(do)
        gate, up, dhidden, silu, dup = scratch.take(*x.shape[:2], w0.shape[1])
        torch.bmm(x, w0.mT, out=gate)
        torch.bmm(x, w2.mT, out=up)
        torch.bmm(dy, w1, out=dhidden)
        silu_out(gate, out=silu)
        dup = _rounded(torch.mul(silu, dhidden, out=dup), dtype)
        dgate = silu_backward_out(dhidden.mul_(up), gate, grad_input=gate)
        dgate = _rounded(dgate, dtype)
        dw0.baddbmm_(dgate.mT, x)
        dw1.baddbmm_(dy.mT, _rounded(silu.mul_(up), dtype))
        dw2.baddbmm_(dup.mT, x)
        block.write(out, (dgate @ w0).baddbmm_(dup, w2))
    return dweights


def gradients(tokens: Tokens, weights: Triple) -> tuple[Tensor | None, ...]:
    """Gradients of `sum_t <f(k_t), v_t>` with respect to w0, w1 and w2, one chunk's tokens.

    Each token's share is weighted by its learning rate for that matrix; where that is None, so is the
    gradient. The weights and the result are `[B, H, ...]`.
    """
    k, v, *rates, _ = tokens
    dtype = k.dtype
    trained = (w if lr is not None else None for lr, w in zip(rates, weights))
    sums = _zeros_like(trained)
    weights = [_rounded(w, dtype)[None] for w in weights]
    g0, g1, g2 = (None if g is None else g.flatten(0, 1) for g in sums)
    scratch = _Scratch(weights[0], 5)
    for block in _blocks(k, weights[0].shape[-2]):
        w0, w1, w2 = (block.weights(w) for w in weights)
        lr0, lr1, lr2 = (None if lr is None else block.scalars(lr) for lr in rates)
        x, y = block.tokens(k), block.tokens(v)
        gate, up, dhidden, silu, dup = scratch.take(*x.shape[:2], w0.shape[1])
        silu_out(torch.bmm(x, w0.mT, out=gate), out=silu)
        if g0 is not None or g1 is not None:
            torch.bmm(x, w2.mT, out=up)
        if g0 is not None or g2 is not None:
            torch.bmm(y, w1, out=dhidden)
        if g2 is not None:
            torch.mul(silu, dhidden, out=dup).mul_(lr2)
            g2.baddbmm_(_rounded_gradient(dup, dtype).mT, x)
        if g0 is not None:
            dgate = silu_backward_out(dhidden.mul_(up), gate, grad_input=gate).mul_(lr0)
            g0.baddbmm_(_rounded_gradient(dgate, dtype).mT, x)
        if g1 is not None:
            lr1_v, hidden = y * lr1, silu.mul_(up)
            g1.baddbmm_(_rounded_gradient(lr1_v, dtype).mT, _rounded_gradient(hidden, dtype))
    return sums


def gradients_bwd(
    dsums: tuple[Tensor | None, ...], tokens: Tokens, weights: Triple, out: Tokens
) -> Triple:
    """Gradients of `gradients`: those of k, v and the rates into `out`, those of the weights returned.

    The products with the incoming gradients give what the three factors of each outer product get:

        dgate_k = lr0 * (dg0 k)      dup_k = lr2 * (dg2 k)      hidden_v = lr1 * (dg1^T v)

    and the rest is the chain rule through hidden = silu(gate) up, dup = dhidden silu(gate) and
    dgate = dhidden up silu'(gate). A weight that is not trained has no gradient, and no share in this.
    """
    k, v, *rates, _ = tokens
    dk, dv, *drates, _ = out
    dtype = k.dtype
    dweights = _zeros_like(weights)
    weights = [_rounded(w, dtype)[None] for w in weights]
    cotangents = [None if g is None else _rounded_gradient(g, dtype)[None] for g in dsums]
    dw0, dw1, dw2 = (dw.flatten(0, 1) for dw in dweights)
    scratch = _Scratch(weights[0], 11)
    for block in _blocks(k, weights[0].shape[-2]):
        w0, w1, w2 = (block.weights(w) for w in weights)
        dg0, dg1, dg2 = (None if g is None else block.weights(g) for g in cotangents)
        lr0, lr1, lr2 = (None if lr is None else block.scalars(lr) for lr in rates)
        x, y = block.tokens(k), block.tokens(v)
        dx, dy = x.new_zeros(x.shape), y.new_zeros(y.shape)
        gate, up, dhidden, silu, slope, *rest = scratch.take(*x.shape[:2], w0.shape[1])
        factor, reached, product, *through = rest
        through_silu, through_up, through_dhidden = (t.zero_() for t in through)

        torch.bmm(x, w0.mT, out=gate)
        torch.bmm(x, w2.mT, out=up)
        torch.bmm(y, w1, out=dhidden)
        sigmoid = torch.sigmoid(gate, out=product)
        torch.mul(gate, sigmoid, out=silu)
        fall = torch.sub(sigmoid, 1, out=factor)
        torch.addcmul(sigmoid, silu, fall, value=-1, out=slope)  # silu'
        bend = torch.sub(silu, slope, alpha=2, out=gate).mul_(fall)  # silu''

        # Each of the three: a factor of an outer product, what reaches it, and what that passes on.
        if dg0 is not None:
            dgate_k = torch.bmm(x, dg0.mT, out=reached)
            torch.mul(dhidden, up, out=factor)
            torch.mul(dgate_k, factor, out=product)
            bend.mul_(product).mul_(lr0)
            block.write_sums(drates[0], product.mul_(slope))
            dx.baddbmm_(_rounded_gradient(factor.mul_(slope).mul_(lr0), dtype), dg0)
            dgate_k.mul_(lr0).mul_(slope)
            through_up.addcmul_(dgate_k, dhidden)
            through_dhidden.addcmul_(dgate_k, up)
        if dg2 is not None:
            dup_k = torch.bmm(x, dg2.mT, out=reached)
            torch.mul(dhidden, silu, out=factor)
            block.write_sums(drates[2], torch.mul(dup_k, factor, out=product))
            dx.baddbmm_(_rounded_gradient(factor.mul_(lr2), dtype), dg2)
            dup_k.mul_(lr2)
            through_silu.addcmul_(dup_k, dhidden)
            through_dhidden.addcmul_(dup_k, silu)
        if dg1 is not None:
            hidden_v = torch.bmm(y, dg1, out=reached)
            torch.mul(silu, up, out=factor)
            block.write_sums(drates[1], torch.mul(hidden_v, factor, out=product))
            dy.baddbmm_(_rounded_gradient(factor.mul_(lr1), dtype), dg1.mT)
            hidden_v.mul_(lr1)
            through_silu.addcmul_(hidden_v, up)
            through_up.addcmul_(hidden_v, silu)
        through_gate = through_silu.mul_(slope)
        if dg0 is not None:
            through_gate.add_(bend)

        through_gate = _rounded_gradient(through_gate, dtype)
        dw0.baddbmm_(through_gate.mT, x)
        dx.baddbmm_(through_gate, w0)
        if dg0 is not None or dg1 is not None:
            through_up = _rounded_gradient(through_up, dtype)
            dw2.baddbmm_(through_up.mT, x)
            dx.baddbmm_(through_up, w2)
        if dg0 is not None or dg2 is not None:
            through_dhidden = _rounded_gradient(through_dhidden, dtype)
            dw1.baddbmm_(y.mT, through_dhidden)
            dy.baddbmm_(through_dhidden, w1.mT)
        block.write(dk, dx)
        block.write(dv, dy)
    return dweights


def _blocks(x: Tensor, hidden_dim: int, borders: Sequence[int] | None = None) -> Iterator[_Block]:
    """Cut the tokens of `[B, T, H, D]` at chunk borders, and further or less far by the block's size."""
    B, T, H, _ = x.shape
    borders = [0, T] if borders is None else borders
    size = CPU_BLOCK if x.is_cpu else DEVICE_BLOCK
    most = size // max(1, B * H * hidden_dim)
    most = max(
        most - most % MIN_BLOCK_TOKENS, MIN_BLOCK_TOKENS
    )  # chunks are often a multiple of it
    chunk, chunks = 0, len(borders) - 1 if B else 0
    while chunk < chunks:
        first, length, count = borders[chunk], borders[chunk + 1] - borders[chunk], 1
        while chunk + count < chunks and (count + 1) * length <= most:
            if borders[chunk + count + 1] - borders[chunk + count] != length:
                break
            count += 1
        if length:
            parts = -(-length // most)  # of nearly equal length, of a chunk that is too large
            part = -(-length // parts)
            for start in range(0, length, part):
                yield _Block(first + start, chunk, count, min(part, length - start))
        chunk += count


def _zeros_like(weights: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    def zeros(w: Tensor) -> Tensor:
        return torch.zeros_like(w, memory_format=torch.contiguous_format)

    return tuple(None if w is None else zeros(w) for w in weights)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of `dtype`, in the float32 (or float64) that products are computed in."""
    return x if x.dtype == dtype and dtype.itemsize > 2 else x.to(dtype).to(torch.float32)


def _rounded_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As `_rounded`, but to the precision of float16 alone, not to its range: a gradient has any scale."""
    if dtype != torch.float16:
        return _rounded(x, dtype)
    shifted = x * (1 + 2**13)  # Veltkamp's splitting rounds the last 13 of 23 bits away, to even
    return shifted.sub_(shifted - x)
