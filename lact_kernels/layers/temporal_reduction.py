"""Fewer tokens inside a layer: groups of r frames become one token, whose output all r frames get."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lact_kernels.core.offsets import packed_offsets
from lact_kernels.layers.padding import borders, position_in_sequence, sequence_of_token


class TemporalReduction(nn.Conv1d):
    """A depthwise convolution over groups of `factor` frames, and the way back.

    Each sequence is cut into groups from its first frame on; the last group is filled up with zeros. The
    frames of a group see one another, so a group's output is known after its last frame.

    Args:
        channels: C.
        factor: frames r of a group, at least 1.
        device, dtype: of the parameters, `weight [C, 1, r]` and `bias [C]`.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels, channels, factor, factor, groups=channels, device=device, dtype=dtype
        )

    @property
    def factor(self) -> int:
        return self.stride[0]

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Frames `[B, T, C]`, packed if there are `cu_seqlens`, as tokens `[B, T', C]` and their borders."""
        r, T = self.factor, x.shape[1]
        if cu_seqlens is None:
            groups = F.pad(x, (0, 0, 0, -T % r))
        else:
            offsets = packed_offsets(cu_seqlens, T)
            total = sum(-(-(stop - start) // r) for start, stop in zip(offsets, offsets[1:]))
            groups = x.new_zeros(1, total * r, x.shape[2]).index_copy(
                1, self._slots(cu_seqlens, T, x.device), x
            )
            cu_seqlens = self._borders(cu_seqlens)
        if not groups.shape[1]:
            # A convolution of nothing is an error. An empty piece of a sequence must have gradients, though.
            return groups * self.weight[:, 0, 0] + self.bias, cu_seqlens
        return super().forward(groups.transpose(1, 2)).transpose(1, 2), cu_seqlens

    def expand(self, x: Tensor, T: int, cu_seqlens: Tensor | None) -> Tensor:
        """Tokens `[B, T', C]` as frames `[B, T, C]`; `cu_seqlens` are the borders of the frames."""
        if cu_seqlens is None:
            return x.repeat_interleave(self.factor, dim=1)[:, :T]
        return x.index_select(1, self._slots(cu_seqlens, T, x.device) // self.factor)

    def _borders(self, cu_seqlens: Tensor) -> Tensor:
        return borders((cu_seqlens.diff() + self.factor - 1) // self.factor)

    def _slots(self, cu_seqlens: Tensor, T: int, device: torch.device) -> Tensor:
        """Where each frame is among groups that are filled up, int64 `[T]`."""
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        first = self._borders(cu_seqlens)[sequence_of_token(cu_seqlens, T)] * self.factor
        return first + position_in_sequence(cu_seqlens, T)
