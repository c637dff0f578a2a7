"""Between padded batches, of which a mask says what exists, and packed sequences."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lact_kernels.ops import checks


class Padding(NamedTuple):
    """Where the tokens of a padded batch `[B, T]` are.

    Attributes:
        shape: B and T.
        indices: int64 `[total]`, the places of the tokens in the flattened batch, in order.
        cu_seqlens: int32 `[B+1]`, the borders of the rows once they are packed, on the host.
    """

    shape: tuple[int, int]
    indices: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> "Padding | None":
        """Of a mask `[B, T]` that is not 0 where there is a token; None if no place is empty.

        It waits for the device of the mask, as the number of tokens is a shape. `device` is the tokens'.
        """
        exists = mask.flatten() != 0
        indices = exists.nonzero()[:, 0]
        if len(indices) == len(exists):
            return None
        lengths = exists.view_as(mask).sum(dim=1, dtype=torch.int32)
        indices = indices.to(device, non_blocking=True)
        return cls(tuple(mask.shape), indices, borders(lengths.cpu()))

    def remove(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` as packed `[1, total, ...]`."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def restore(self, x: Tensor) -> Tensor:
        """Packed `[1, total, ...]` as `[B, T, ...]`, 0 where there is no token."""
        B, T = self.shape
        padded = x.new_zeros(B * T, *x.shape[2:]).index_copy(0, self.indices, x[0])
        return padded.unflatten(0, (B, T))


def borders(lengths: Tensor) -> Tensor:
    """The int32 `cu_seqlens [N+1]` of sequences of these lengths `[N]`."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def sequence_of_token(cu_seqlens: Tensor, T: int) -> Tensor:
    """The number of the sequence that each of T packed tokens is in, int64 `[T]`."""
    tokens = torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def position_in_sequence(cu_seqlens: Tensor, T: int, before: Tensor | None = None) -> Tensor:
    """The position of each of T packed tokens in its sequence, behind `before [N]` others; int64 `[T]`."""
    sequence = sequence_of_token(cu_seqlens, T)
    positions = torch.arange(T, device=cu_seqlens.device) - cu_seqlens[sequence]
    return positions if before is None else positions + before[sequence]


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A padding mask `[B, T]` of `x [B, T, C]`, if it is one."""
    shape = tuple(x.shape[:2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, T], got {type(mask).__name__}")
    checks.check_dense("attention_mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integers, 0 where there is no token, got {mask.dtype}"
        )
    if mask.device != x.device and not mask.is_cpu:
        raise ValueError(
            f"attention_mask must be on {checks.or_on_the_cpu(x, 'hidden_states')}, got {mask.device}"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask must have the shape [B, T] = {shape}, got {tuple(mask.shape)}"
        )
    return mask


def mask_of_last(attention_mask: Tensor, x: Tensor, past: int) -> Tensor:
    """The padding mask of the tokens `x [B, T, C]`, of one that may cover the `past` ones before them."""
    T = x.shape[1]
    if past and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        if attention_mask.shape[1] not in (T, past + T):
            raise ValueError(
                f"attention_mask must have the shape [B, T] with T = {T}, or [B, {past} + T] with the"
                f" tokens before them, got {tuple(attention_mask.shape)}"
            )
        attention_mask = attention_mask[:, attention_mask.shape[1] - T :]
    return checked_mask(attention_mask, x)


def sequences_of(position_ids: Tensor) -> Tensor:
    """The sequence, counted from 1, of each of the tokens `[B, T]`: it ends where positions do not ascend."""
    begins = position_ids[:, 1:] <= position_ids[:, :-1]
    return F.pad(begins.cumsum(1), (1, 0)) + 1
