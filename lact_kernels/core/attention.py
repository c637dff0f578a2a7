"""What attention computes of its tensors."""

from typing import NamedTuple


class AttentionOptions(NamedTuple):
    """The window and the scores of a call.

    A query at position p sees the keys from `p - left` to `p + right`; None is no limit. Within the package
    `right` may be negative, as long as a key is left: then the query sees keys that end before its own.
    """

    left: int | None
    right: int | None
    softmax_scale: float
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)

    @property
    def width(self) -> int:
        """How many keys a query sees, where both sides have a limit."""
        assert self.left is not None and self.right is not None
        return self.left + self.right + 1

    def within(self, Tq: int, Tk: int) -> "AttentionOptions":
        """The same with limits on both sides, which see all of so many keys where there were none."""
        right = max(Tq - 1, 0)
        if self.right is not None:
            right = min(self.right, right)
        left = max(Tk - 1, -right, 0)
        if self.left is not None:
            left = min(self.left, left)
        return self._replace(left=left, right=right)
