"""Fewer tokens inside a layer: groups of r frames become one token, whose output all r frames get."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lact_kernels.layers.contexts import Context
from lact_kernels.layers.padding import position_in_sequence


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

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context, Tensor | None]:
        """Frames `[B, T, C]` as tokens `[B, T', C]`, one for each group.

        Returns:
            The tokens, their context, and for `expand` where each packed frame is among groups that are
            filled up, int64 `[T]`; None of rows, where every place has its own.
        """
        r, T = self.factor, x.shape[1]
        context_of_tokens, slots = context.of_groups(r), None
        if context.cu_seqlens is None:
            groups = F.pad(x, (0, 0, 0, -T % r))
        else:
            starts = context_of_tokens.cu_seqlens * r
            borders = context.cu_seqlens.to(x.device, non_blocking=True)
            before = starts.to(x.device, non_blocking=True)
            slots = position_in_sequence(borders, T, before)
            groups = x.new_zeros(1, context_of_tokens.T * r, x.shape[2]).index_copy(1, slots, x)
        if groups.shape[1]:
            tokens = super().forward(groups.transpose(1, 2)).transpose(1, 2)
        else:  # A convolution of nothing is an error. A rank without tokens must have gradients, though.
            tokens = groups * self.weight[:, 0, 0] + self.bias
        return tokens, context_of_tokens, slots

    def expand(self, x: Tensor, T: int, slots: Tensor | None) -> Tensor:
        """Tokens `[B, T', C]` as frames `[B, T, C]`, all those of a group alike. `slots` are of `forward`."""
        if slots is None:
            return x.repeat_interleave(self.factor, dim=1)[:, :T]
        return x.index_select(1, slots // self.factor)
