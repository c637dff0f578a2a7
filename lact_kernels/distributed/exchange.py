"""`TokenExchange`: tokens that a rank needs of others, and their gradients on the way home."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lact_kernels.autograd.derivatives import FirstOrderFunction
from lact_kernels.core.tokens import Tokens
from lact_kernels.distributed.pieces import Range, SequencePieces, intersections


class TokenExchange:
    """For each rank the positions of the whole row that it wants, as one all-to-all.

    Nothing travels but what is wanted: between ranks that have nothing for each other the messages are empty.

    Args:
        pieces: who holds what.
        wanted: for each rank, ascending ranges of positions.

    Attributes:
        num_tokens: how many tokens this rank gets.
    """

    def __init__(self, pieces: SequencePieces, wanted: Sequence[Sequence[Range]]):
        self.group = pieces.group
        self.is_empty = not any(start < stop for rank in wanted for start, stop in rank)
        mine = pieces.ranges[pieces.rank]
        # Slices of this rank's own tokens that go to each rank, and of those it gets that come from each.
        self.outgoing = [
            [
                slice(pieces.local_index(start), pieces.local_index(start) + stop - start)
                for start, stop in intersections(mine, ranges)
            ]
            for ranges in wanted
        ]
        self.incoming: list[list[slice]] = [[] for _ in wanted]
        self.num_tokens = 0
        for start, stop in wanted[pieces.rank]:
            for rank, ranges in enumerate(pieces.ranges):
                for first, last in intersections(ranges, [(start, stop)]):
                    place = self.num_tokens + first - start
                    self.incoming[rank].append(slice(place, place + last - first))
            self.num_tokens += stop - start

    def start(self, tensors: Sequence[Tensor]) -> "Transfer":
        """Send what others want of these tensors `[B, t, ...]`, which hold this rank's tokens."""
        return Transfer.start(self.group, tensors, self.outgoing, self.incoming)

    def finish(self, transfer: "Transfer") -> list[Tensor]:
        """What this rank wanted, `[B, num_tokens, ...]`."""
        received = [x.new_empty(x.shape[0], self.num_tokens, *x.shape[2:]) for x in transfer.like]
        transfer.finish(received, add=False)
        return received

    def start_home(self, gradients: Sequence[Tensor]) -> "Transfer":
        """Send the gradients of what `finish` returned to the ranks that hold the tokens."""
        return Transfer.start(self.group, gradients, self.incoming, self.outgoing)

    def finish_home(self, transfer: "Transfer", gradients: Sequence[Tensor]) -> None:
        """Add what other ranks have to the gradients of this rank's own tokens `[B, t, ...]`."""
        transfer.finish(gradients, add=True)


class Transfer(NamedTuple):
    """An all-to-all under way: one for each dtype among the tensors."""

    like: list[Tensor]
    parts: list[list[slice]]  # of what arrives, by rank
    messages: list[tuple[list[int], dist.Work, Tensor, Tensor]]

    @classmethod
    def start(
        cls,
        group: dist.ProcessGroup,
        tensors: Sequence[Tensor],
        outgoing: list[list[slice]],
        incoming: list[list[slice]],
    ) -> "Transfer":
        messages = []
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            numbers = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            xs = [tensors[i] for i in numbers]
            sent = [[x[:, part].reshape(-1) for x in xs for part in parts] for parts in outgoing]
            sizes = [sum(x.numel() for x in message) for message in sent]
            token = sum(x.shape[0] * math.prod(x.shape[2:]) for x in xs)
            sizes_back = [
                token * sum(part.stop - part.start for part in parts) for parts in incoming
            ]
            buffer = torch.cat([xs[0].new_empty(0), *(x for message in sent for x in message)])
            received = buffer.new_empty(sum(sizes_back))
            work = dist.all_to_all_single(
                received, buffer, sizes_back, sizes, group=group, async_op=True
            )
            messages.append((numbers, work, received, buffer))
        return cls(list(tensors), incoming, messages)

    def finish(self, out: Sequence[Tensor], add: bool) -> None:
        """Wait, and write what has arrived into `out`, or add it."""
        for numbers, work, received, _ in self.messages:
            work.wait()
            place = 0
            for parts in self.parts:
                for i in numbers:
                    for part in parts:
                        target = out[i][:, part]
                        x = received[place : place + target.numel()].view(target.shape)
                        place += target.numel()
                        target.add_(x) if add else target.copy_(x)


class _Exchanged(FirstOrderFunction):
    op = "lact_kernels.distributed.block_causal_ttt"

    @staticmethod
    def forward(ctx, exchange: TokenExchange, *tensors: Tensor):
        ctx.exchange = exchange
        ctx.shapes = [(x.shape, x.dtype) for x in tensors]
        return tuple(exchange.finish(exchange.start(tensors)))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        transfer = ctx.exchange.start_home(gradients)
        home = [g.new_zeros(shape, dtype=dtype) for g, (shape, dtype) in zip(gradients, ctx.shapes)]
        ctx.exchange.finish_home(transfer, home)
        return None, *home


def exchanged(exchange: TokenExchange, tokens: Tokens) -> Tokens:
    """What this rank wants of the tokens `[B, t, ...]`, `[B, num_tokens, ...]`.

    The backward is collective, too: results must have a part in what every rank derives. Where no rank wants
    anything there is nothing to do.
    """
    if exchange.is_empty:
        return tokens.at(slice(0))
    results = iter(_Exchanged.apply(exchange, *(x for x in tokens if x is not None)))
    return tokens.map(lambda _: next(results))
