"""Padded batches and packed rows as sequences end to end: where their tokens and borders are."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.compat.transformers.forward_pass import PASS
from lact_kernels.compat.transformers.masks import values_of
from lact_kernels.core.offsets import on_host
from lact_kernels.layers.padding import borders, sequences_of
from lact_kernels.ops import checks

Tokens = tuple[Tensor, Tensor]  # row and position in the row of each


class Packing(NamedTuple):
    """Where the tokens of a batch are, and the borders of its sequences once they are packed.

    The borders are on the host.
    """

    queries: Tokens | None  # None for all
    keys: Tokens | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    has_gaps: bool = False  # whether there is padding between two tokens of a row

    @property
    def borders(self) -> tuple[Tensor, Tensor]:
        return self.cu_seqlens_q, self.cu_seqlens_k


def given_packing(module, q: Tensor, cu_seq_lens_q, cu_seq_lens_k) -> Packing:
    """By borders of packed sequences in the queries `[B, T, H, D]` and in the keys of all rows."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
    row = q.flatten(0, 1)[None]
    checks.check_cu_seqlens(cu_seq_lens_q, row, "cu_seq_lens_q")
    checks.check_cu_seqlens(cu_seq_lens_k, row, "cu_seq_lens_k")
    if cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise ValueError(
            f"cu_seq_lens_q has the borders of {len(cu_seq_lens_q) - 1} sequences and cu_seq_lens_k of"
            f" {len(cu_seq_lens_k) - 1}: they must be the same sequences"
        )
    read = functools.partial(on_host, cu_seq_lens_q)
    borders_q = borders_k = PASS.remember(module, cu_seq_lens_q, None, read)
    if cu_seq_lens_k is not cu_seq_lens_q:
        read = functools.partial(on_host, cu_seq_lens_k)
        borders_k = PASS.remember(module, cu_seq_lens_k, None, read)
    return Packing(None, None, borders_q, borders_k)


@torch.compiler.disable  # its shapes depend on values
def packing_of_mask(module, mask: Tensor, Tq: int, first: int = 0) -> Packing | None:
    """How to pack the last Tq queries, and the keys from `first` on, by a mask `[B, S]`.

    None if each row is one sequence without padding. Reading the values waits for the device.
    """

    def read() -> Packing | None:
        return _packing(values_of(mask)[:, first:].long(), Tq)

    return PASS.remember(module, mask, ("mask", Tq, first), read)


@torch.compiler.disable
def packing_of_keys(module, mask: Tensor, Tq: int) -> Packing | None:
    """How to pack keys by a mask `[B, S]` that the Tq queries of a row need not be tokens of.

    Each row is one sequence; all of its queries see all of its keys.
    """

    def read() -> Packing | None:
        is_token = values_of(mask) != 0
        if bool(is_token.all()):
            return None
        queries = torch.full((len(mask),), Tq)
        keys = is_token.sum(1).cpu()
        return Packing(None, is_token.nonzero(as_tuple=True), borders(queries), borders(keys))

    return PASS.remember(module, mask, ("keys", Tq), read)


@torch.compiler.disable
def packing_of_positions(module, position_ids: Tensor, B: int, Tq: int) -> Packing | None:
    """By positions `[B, Tq]` or `[1, Tq]`: where they do not ascend, another sequence begins."""

    def read() -> Packing | None:
        return _packing(sequences_of(position_ids).expand(B, -1), Tq)

    return PASS.remember(module, position_ids, ("positions", B, Tq), read)


def _packing(sequences: Tensor, Tq: int) -> Packing | None:
    B, S = sequences.shape
    if bool((sequences == 1).all()):
        return None
    N = int(sequences.max()) + 1 if sequences.numel() else 1
    is_token = sequences > 0
    if N > 2 and bool((is_token & (sequences < sequences.cummax(1).values)).any()):
        raise ValueError(
            "attention_mask must number the sequences of a row so that they do not descend"
        )
    numbers = sequences + N * torch.arange(B, device=sequences.device)[:, None]

    def part(start: int) -> tuple[Tokens | None, Tensor]:
        tokens = sequences[:, start:].nonzero(as_tuple=True)
        lengths = torch.bincount(numbers[:, start:][tokens], minlength=B * N)
        return None if len(tokens[0]) == B * (S - start) else tokens, borders(lengths).cpu()

    keys, cu_seqlens_k = part(0)
    queries, cu_seqlens_q = (keys, cu_seqlens_k) if Tq == S else part(S - Tq)
    before, after = (x.cumsum(1) > 0 for x in (is_token, is_token.flip(1)))
    has_gaps = bool((before & after.flip(1) & ~is_token).any())
    return Packing(queries, keys, cu_seqlens_q, cu_seqlens_k, has_gaps)


def pack(x: Tensor, tokens: Tokens | None) -> Tensor:
    """The tokens of `[B, T, H, D]` as one row `[1, n, H, D]`."""
    return (x.flatten(0, 1) if tokens is None else x[tokens])[None]


def unpack(x: Tensor, tokens: Tokens | None, B: int, T: int) -> Tensor:
    """The inverse of `pack`, with 0 at padding."""
    if tokens is None:
        return x[0].unflatten(0, (B, T))
    rows = x.new_zeros(B, T, *x.shape[2:])
    rows[tokens] = x[0]
    return rows
