"""Small kernels of which the emulator's tests know every result: none of them is the package's."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def copy_without_mask(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def transpose(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    """Through shared memory: rows are read, columns are written."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(y_ptr + n[:, None] * M + m[None, :], tl.trans(x))


@triton.jit
def reduce_rows(x_ptr, sum_ptr, max_ptr, argmax_ptr, N: tl.constexpr):
    """One row of N a program; N spans warps, so that partial results meet in shared memory."""
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * N + tl.arange(0, N))
    tl.store(sum_ptr + row, tl.sum(x, 0))
    tl.store(max_ptr + row, tl.max(x, 0))
    tl.store(argmax_ptr + row, tl.argmax(x, 0))


@triton.jit
def cumulative_sum(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def softmax(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + i, mask=i < n, other=float("-inf"))
    x = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * stride + i, x / tl.sum(x, 0), mask=i < n)


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [K, N], with loads that Triton turns into asynchronous copies."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask = (m[:, None] < M) & (k[None, :] < K)
        b_mask = (k[:, None] < K) & (n[None, :] < N)
        a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(
        c_ptr + m[:, None] * N + n[None, :],
        acc.to(c_ptr.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
def two_products(a_ptr, b_ptr, c_ptr, d_ptr, N: tl.constexpr):
    """d = (a b) c, of N x N matrices: the second product takes its first operand from registers."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b, c = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at)
    ab = tl.dot(a, b, input_precision="ieee").to(c.dtype)
    tl.store(d_ptr + at, tl.dot(ab, c, input_precision="ieee"))


@triton.jit
def matmul_device_descriptors(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b^T, b [N, K], by the tensor memory accelerator; descriptors are made here."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    _matmul_of_descriptors(a, b, c, K, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def matmul_host_descriptors(
    a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    _matmul_of_descriptors(a, b, c, K, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def _matmul_of_descriptors(
    a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def ragged_sums(x_ptr, lengths_ptr, y_ptr, BLOCK: tl.constexpr):
    """Programs whose loops run differently often: y[i] is the sum of the first lengths[i] rows of BLOCK."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(0, tl.load(lengths_ptr + program)):
        total += tl.load(x_ptr + row * BLOCK + i)
    tl.store(y_ptr + program * BLOCK + i, total)


@gluon.jit
def _load_tiles(
    a, b, a_tiles, b_tiles, ready, free, K, m, n, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):
    for k in range(0, K, BLOCK_K):
        step = k // BLOCK_K
        slot = step % STAGES
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), a.block_type.nbytes + b.block_type.nbytes)
        tma.async_copy_global_to_shared(a, [m, k], ready.index(slot), a_tiles.index(slot))
        tma.async_copy_global_to_shared(b, [k, n], ready.index(slot), b_tiles.index(slot))


@gluon.jit
def _multiply_tiles(
    c, a_tiles, b_tiles, ready, free, K, m, n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    for k in range(0, K, BLOCK_K):
        step = k // BLOCK_K
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(free.index(slot), count=1)
    tile = gl.allocate_shared_memory(c.dtype, [BLOCK_M, BLOCK_N], c.layout)
    tile.store(acc.to(c.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c, [m, n], tile)
    tma.store_wait(0)


@gluon.jit
def matmul_of_specialised_warps(
    a, b, c, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """c = a b: one warp loads tiles into a ring of STAGES, four others multiply them."""
    m, n = gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, BLOCK_K], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_K, BLOCK_N], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (c, a_tiles, b_tiles, ready, free, K, m, n, BLOCK_M, BLOCK_N, BLOCK_K, STAGES),
            ),
            (_load_tiles, (a, b, a_tiles, b_tiles, ready, free, K, m, n, BLOCK_K, STAGES)),
        ],
        [1],
        [24],
    )
