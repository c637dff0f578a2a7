"""`position_ids` in a LaCT model. It counts positions itself; from these it learns where sequences begin."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lact_kernels.layers.padding import Padding, borders, position_in_sequence
from lact_kernels.ops import checks


def check_position_ids(position_ids: Tensor, x: Tensor) -> None:
    """Check that they are integers `[B, T]`, or `[1, T]` for all rows of `x [B, T, ...]`."""
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids must be a tensor [B, T], got {type(position_ids).__name__}")
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    if position_ids.device != x.device and not position_ids.is_cpu:
        where = checks.or_on_the_cpu(x, "input_ids")
        raise ValueError(f"position_ids must be on {where}, got {position_ids.device}")
    B, T = x.shape[:2]
    if tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(
            f"position_ids must have the shape [B, T] = {(B, T)}, or [1, T], got"
            f" {tuple(position_ids.shape)}"
        )


@torch.compiler.disable  # its shapes depend on values
def packed_rows(
    position_ids: Tensor, mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Padding | None:
    """How to pack the sequences of a batch `[B, T]` end to end; None if each row is one sequence.

    A position that does not ascend begins another sequence. Reading tensors on a device waits for it.

    Args:
        position_ids: `[B, T]` or `[1, T]`.
        mask: `[B, T]`, 0 for padding; None if there is none.
        device: of the tokens.

    Raises:
        ValueError: positions do not count from 0 in each sequence.
    """
    B, T = shape
    positions, places = position_ids.cpu().expand(B, T).flatten(), torch.arange(B * T)
    if mask is not None:
        places = mask.cpu().flatten().nonzero()[:, 0]
        positions = positions[places]
    rows = places // max(T, 1)
    begins = torch.ones(len(places), dtype=torch.bool)
    begins[1:] = (positions[1:] <= positions[:-1]) | (rows[1:] != rows[:-1])
    starts = begins.nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([len(places)]))
    counted = torch.arange(len(places)) - starts.repeat_interleave(lengths)
    _check_equal(positions, counted, places, T)
    if len(starts) == len(rows.unique()):
        return None
    return Padding((B, T), places.to(device), borders(lengths))


def check_counted(
    position_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, before: Sequence[int]
) -> None:
    """Check that positions are those that the model counts.

    Args:
        position_ids: `[B, T]` or `[1, T]`.
        mask: `[B, T]`, 0 for padding; None if there is none.
        cu_seqlens: the borders of packed sequences, or None.
        before: the number of earlier tokens of each row, or of each packed sequence.

    Raises:
        ValueError: a position differs.
    """
    T, before = position_ids.shape[1], torch.tensor(before)[:, None]
    exists = torch.ones(len(before), T, dtype=torch.bool) if mask is None else mask != 0
    counted = before + exists.cumsum(1) - 1
    if cu_seqlens is not None:
        counted = position_in_sequence(cu_seqlens, T, before[:, 0])
        exists = torch.ones(1, T, dtype=torch.bool)
    places = exists.flatten().nonzero()[:, 0]
    positions = position_ids.expand_as(exists).flatten()[places]
    _check_equal(positions, counted.flatten()[places], places, T)


def _check_equal(positions: Tensor, counted: Tensor, places: Tensor, T: int) -> None:
    wrong = (positions != counted).nonzero()[:, 0]
    if len(wrong):
        row, place = divmod(int(places[wrong[0]]), T)
        raise ValueError(
            "position_ids must count the tokens of each sequence from 0, as the model does itself, got"
            f" {positions[wrong[0]]} at place {place} of row {row}, which is number {counted[wrong[0]]}:"
            " leave them out, or let them begin anew where a sequence does"
        )
