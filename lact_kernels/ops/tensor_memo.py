"""What was read of tensors on the host, so that the layers of a model that share one wait once for it."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class TensorMemo:
    """One result for each tensor that still exists, for as long as nobody writes to it.

    `torch.compile` cannot trace it.
    """

    def __init__(self):
        self._results = WeakTensorKeyDictionary()  # ((version, call), result)

    def __len__(self) -> int:
        return len(self._results)

    def get(self, x: Tensor, call: Hashable, read: Callable[[], T]) -> T:
        """`read()`, or what it gave the last time for this `x` and `call`.

        Inference tensors have no version by which a change would show, and are read every time.
        """
        if x.is_inference():
            return read()
        known, result = self._results.get(x, (None, None))
        if known != (x._version, call):
            result = read()
            self._results[x] = (x._version, call), result
        return result
