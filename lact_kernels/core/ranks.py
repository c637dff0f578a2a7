"""`Ranks`: where a scan of fast weights meets those of other processes."""

from torch import Tensor

from lact_kernels.core.fast_weights import FastWeights


class Ranks:
    """The processes among which one scan is split, as a backend sees them. This class stands for one alone.

    A way to split sequences is a class of its own (`lact_kernels.distributed`): ranks that share each chunk
    sum gradients over all of them, ranks that have the chunks in turn send weights to the next one, and
    gradients back.
    """

    name = ""
    receives = False  # whether the fast weights to start from come from the rank before
    share_chunks = False  # whether each rank has a part of every chunk's tokens

    def receive(self, start: FastWeights) -> FastWeights:
        """The fast weights to start from: those given, or what the rank before sends."""
        return start

    def send(self, end: FastWeights) -> None:
        """The fast weights after the last update, before any query of the last sequence is applied."""

    def receive_gradients(self, dend: FastWeights) -> FastWeights:
        """The gradients of `end`: this rank's own, and what the next rank sends, for which it waits."""
        return dend

    def send_gradients(self, dstart: FastWeights) -> None:
        """The gradients of the fast weights before the first update, as soon as they are known."""

    def sum_(self, *tensors: Tensor) -> None:
        """Sum each tensor over the ranks that share chunks, in place."""

    def sum_gradients(self, dend: FastWeights) -> FastWeights:
        """The gradients of `end`, of which each of the ranks that share chunks has a part."""
        return dend

    def part(self, x: Tensor) -> Tensor:
        """A gradient that ranks which share chunks know alike, as this rank's part of a sum over them."""
        return x


_NAMED: dict[str, Ranks] = {"": Ranks()}


def remember(ranks: Ranks) -> str:
    """The name under which `named` finds these ranks: a registered op takes no objects, but strings.

    Ranks of one name do the same, and so one entry is enough for all calls.
    """
    _NAMED[ranks.name] = ranks
    return ranks.name


def named(name: str) -> Ranks:
    return _NAMED[name]
