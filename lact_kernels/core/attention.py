"""What attention computes of its tensors."""

from typing import NamedTuple


class AttentionOptions(NamedTuple):
    """The window and the scores of a call.

    A query at position p sees the keys from `p - left` to `p + right`; None is no limit.
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
        left, right = max(Tk - 1, 0), max(Tq - 1, 0)
        if self.left is not None:
            left = min(self.left, left)
        if self.right is not None:
            right = min(self.right, right)
        return AttentionOptions(left, right, self.softmax_scale, self.softcap)
