"""What the kernels of the layer share: programs that walk over rows, and the sizes that are compiled.

Sums over all rows are taken in two steps, so that they come out the same each time: a fixed number of
programs walk over the rows, and PyTorch adds up what they found.
"""

import torch
import triton
import triton.language as tl

from lact_kernels.triton.launch import num_multiprocessors

# Programs walk over blocks of tokens: each reads scales and offsets once, and in the backward writes sums
# once, so it should have some blocks to do. Only the forward's programs can be so many that they even out.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 32, 8  # per multiprocessor
MIN_BLOCKS = 4  # per program


@triton.jit
def row_offsets(rows, T, strides):
    """Where the tokens `rows` of `[B * T]` begin, int64; the first strides are of batch row and token."""
    return (rows // T).to(tl.int64) * strides[0] + (rows % T).to(tl.int64) * strides[1]


def num_splits(rows: int, block: int, heads: int, device: torch.device, programs: int) -> int:
    """How many programs per head walk over the rows: `programs` in all per multiprocessor, or fewer."""
    wanted = triton.cdiv(num_multiprocessors(device) * programs, heads)
    return min(wanted, triton.cdiv(rows, block * MIN_BLOCKS))
