"""The values of `cu_seqlens`, on the host."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Offsets(NamedTuple):
    """Borders of packed sequences in the one row of queries, and of keys, `B = 1`.

    Sequence n has the queries `queries[n]:queries[n+1]` and the keys `keys[n]:keys[n+1]`; its
    queries are those of its last tokens.
    """

    queries: list[int]
    keys: list[int]


def is_transformed() -> bool:
    """Whether this runs within `torch.func.grad`, `vmap` or their kin, whose tensors have no values."""
    return torch._C._are_functorch_transforms_active()


def cu_seqlens_of(lengths: Iterable[int]) -> Tensor:
    """The int32 `[N+1]` borders of N sequences of these lengths, on the host."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_offsets(cu_seqlens: Tensor, T: int, name: str = "cu_seqlens") -> list[int]:
    """`cu_seqlens` as a list, after checking that it cuts T tokens. Reading it waits for its device."""
    offsets = read_borders(cu_seqlens, name)
    if offsets[-1] != T:
        raise ValueError(f"{name} must end at T = {T}, got {offsets[-1]}")
    return offsets


def read_borders(cu_seqlens: Tensor, name: str = "cu_seqlens") -> list[int]:
    """`packed_offsets` whose end the caller compares with the number of its tokens.

    What was read is not remembered: NumPy, `.data` and the kernels of others change a tensor without a trace.
    """
    if not is_transformed():
        offsets = cu_seqlens.tolist()
    else:
        cu_seqlens = _unwrapped(cu_seqlens, name)
        with torch._C._DisableFuncTorch():
            offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    for n, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        if stop < start:
            raise ValueError(f"{name} descends from {start} to {stop} at index {n + 1}")
    return offsets


def on_host(cu_seqlens: Tensor) -> Tensor:
    """A copy of `cu_seqlens` in the memory of the host, which waits for its device if it is on another."""
    return cu_seqlens.clone() if cu_seqlens.is_cpu else cu_seqlens.cpu()


def kept(cu_seqlens: Tensor | None) -> Tensor | None:
    """What a backward may keep of `cu_seqlens`: of a tensor on the host a copy, as its buffer may be reused.

    Writing to one on a GPU is an error in the backward, as with all that is kept there.
    """
    return cu_seqlens.clone() if cu_seqlens is not None and cu_seqlens.is_cpu else cu_seqlens


def _unwrapped(cu_seqlens: Tensor, name: str) -> Tensor:
    """What transforms of `torch.func` have wrapped: all but `vmap` keep its values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(cu_seqlens):
        if torch._C._functorch.is_batchedtensor(cu_seqlens):
            raise NotImplementedError(
                f"{name} is vmapped, and lact_kernels reads its values here: call it for each entry"
            )
        cu_seqlens = torch._C._functorch.get_unwrapped(cu_seqlens)
    return cu_seqlens
