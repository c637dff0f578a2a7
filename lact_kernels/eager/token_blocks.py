"""How the elementwise operations of a layer run on any device: block by block of tokens, in float32.

Blocks are so small that what lies between reading and writing stays in a CPU's cache: beside the results
little memory is needed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK, DEVICE_BLOCK = 1 << 17, 1 << 24  # elements of one tensor


def token_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the tokens of `[B, T, C]`."""
    B, T, C = x.shape
    block = max(1, (CPU_BLOCK if x.is_cpu else DEVICE_BLOCK) // max(1, B * C))
    for start in range(0, T, block):
        yield slice(start, start + block)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
