"""Small kernels, as Triton compiles them, against PyTorch."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx_emulator import emulate
from tests.emulated import kernels
from tests.emulated.ptx import kernel

ARCHITECTURES = (80, 90)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int16,
    torch.int64,
    torch.int8,
)
both = pytest.mark.parametrize("arch", ARCHITECTURES)


def empty_like(x, shape=None):
    """What no kernel has written: NaN, or a number that no test expects."""
    return torch.full(
        shape or x.shape, float("nan") if x.is_floating_point() else 77, dtype=x.dtype
    )


def integers(*shape, dtype):
    """Products of which float32 sums exactly, so that results have one right value."""
    return torch.randint(-4, 5, shape).to(dtype)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "odd_pointer"])
def test_copy(arch, dtype, shift):
    """Wide accesses where the pointer allows, narrow ones where not; a ragged end."""
    x = torch.randint(-100, 100, (1000 + shift,)).to(dtype)[shift:]
    y = empty_like(x)
    with emulate(arch):
        kernels.copy[(4,)](x, y, 999, BLOCK=256)
    assert torch.equal(y[:999], x[:999])
    assert torch.equal(y[999:].isnan(), x[999:] != 0) or y[999] == 77


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("M, N", [(16, 64), (128, 32), (64, 64)], ids=str)
def test_transpose(arch, dtype, M, N):
    x = torch.randn(M, N).to(dtype)
    y = empty_like(x, (N, M))
    with emulate(arch):
        kernels.transpose[(1,)](x, y, M=M, N=N)
    assert torch.equal(y, x.T)


@both
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_reductions(arch, num_warps):
    x = torch.randint(-1000, 1000, (5, 512)).float()
    sums, largest, places = torch.empty(5), torch.empty(5), torch.empty(5, dtype=torch.int32)
    with emulate(arch):
        kernels.reduce_rows[(5,)](x, sums, largest, places, N=512, num_warps=num_warps)
    assert torch.equal(sums, x.sum(1)) and torch.equal(largest, x.amax(1))
    assert torch.equal(places.long(), x.argmax(1))


@both
def test_scan(arch):
    x = torch.randint(-9, 9, (256,)).float()
    y = empty_like(x)
    with emulate(arch):
        kernels.cumulative_sum[(1,)](x, y, N=256, num_warps=4)
    assert torch.equal(y, x.cumsum(0))


@both
def test_softmax(arch):
    x = torch.randn(37, 200)
    y = empty_like(x)
    with emulate(arch):
        kernels.softmax[(37,)](x, y, 200, 200, BLOCK=256)
    torch.testing.assert_close(y, x.softmax(-1), rtol=1e-6, atol=1e-8)


@both
def test_programs_that_part(arch):
    """In one batch of the emulator, loops of different lengths, one of them empty."""
    lengths = torch.tensor([3, 0, 5, 3, 1], dtype=torch.int32)
    x = torch.randint(-9, 9, (5, 128)).float()
    y = empty_like(x)
    with emulate(arch):
        kernels.ragged_sums[(5,)](x, lengths, y, BLOCK=128)
    assert torch.equal(y, torch.stack([x[:n].sum(0) for n in lengths]))


BLOCKS = [  # M, N, K, warps, stages: what Triton makes of them differs
    (64, 64, 32, 4, 3),
    (64, 32, 16, 4, 2),
    (16, 64, 32, 4, 1),  # too few rows for wgmma
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 2),
]
# Of the two 16-bit dtypes only the instructions' names and the way to read a number differ.
PRODUCTS = [
    *itertools.product([(torch.bfloat16, "ieee")], BLOCKS),
    *itertools.product([(torch.float16, "ieee")], BLOCKS[:1]),
    *itertools.product([(torch.float32, "tf32")], BLOCKS[:3]),
    *itertools.product([(torch.float32, "ieee")], BLOCKS[1:2]),  # no matrix instructions
]


@both
@pytest.mark.parametrize("product, block", PRODUCTS, ids=str)
def test_products_of_every_operand_layout(arch, product, block):
    """Rows or columns of either operand dense in memory; no size a multiple of a block."""
    M, N, K = 136, 72, 104
    dtype, precision = product
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = block
    for a_transposed, b_transposed in ((False, True), (True, False)):
        a = integers(K, M, dtype=dtype).T if a_transposed else integers(M, K, dtype=dtype)
        b = integers(N, K, dtype=dtype).T if b_transposed else integers(K, N, dtype=dtype)
        c = empty_like(a, (M, N)).float()
        with emulate(arch) as emulation:
            kernels.matmul[(-(-M // BLOCK_M), -(-N // BLOCK_N))](
                a, b, c, M, N, K, *a.stride(), *b.stride(), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K, PRECISION=precision, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        assert torch.equal(c.double(), a.double() @ b.double())
        assert bool(emulation.launches[0].counts["matrix"]) == (
            precision == "tf32" or dtype.itemsize == 2
        )


@both
@pytest.mark.parametrize(
    "dtype, N",
    [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64)],
)
def test_a_product_of_a_product(arch, dtype, N):
    a, b, c = (torch.randint(-2, 3, (N, N)).to(dtype) for _ in range(3))
    a[:, 8:] = 0  # a b is exact in 16 bits
    d = torch.full((N, N), float("nan"))
    with emulate(arch):
        kernels.two_products[(1,)](a, b, c, d, N=N)
    assert torch.equal(d.double(), a.double() @ b.double() @ c.double())


TILES = [(128, 128, 64, 8, 3), (64, 64, 32, 4, 2), (64, 128, 64, 4, 4)]


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_products_of_tensor_descriptors(tile, dtype, on_host):
    """Tiles that reach beyond the tensors: what lies there reads as 0 and is not written."""
    M, N, K = 160, 136, 200
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = tile
    BLOCK_K //= dtype.itemsize // 2  # so much fits into shared memory
    a, b = integers(M, K, dtype=dtype), integers(N, K, dtype=dtype)
    a, b = (a % 3 - 1).to(dtype), (b % 3 - 1).to(dtype)  # small sums, exact in bfloat16
    c = empty_like(a, (M, N))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    grid = -(-M // BLOCK_M), -(-N // BLOCK_N)
    with emulate(90):
        if on_host:
            tiles = (a, [BLOCK_M, BLOCK_K]), (b, [BLOCK_N, BLOCK_K]), (c, [BLOCK_M, BLOCK_N])
            descriptors = [TensorDescriptor.from_tensor(*x) for x in tiles]
            kernels.matmul_host_descriptors[grid](
                *descriptors, K, BLOCK_M, BLOCK_N, BLOCK_K, **options
            )
        else:
            kernels.matmul_device_descriptors[grid](
                a, b, c, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, **options
            )
    assert torch.equal(c.double(), a.double() @ b.double().T)


def specialised_matmul(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES):
    """The inputs and the result of `matmul_of_specialised_warps`."""
    a, b = (torch.randint(-1, 2, shape).bfloat16() for shape in ((M, K), (K, N)))
    c = empty_like(a, (M, N))

    def descriptor(x, block):
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return GluonTensorDescriptor.from_tensor(x, block, layout)

    kernels.matmul_of_specialised_warps[(-(-M // BLOCK_M), -(-N // BLOCK_N))](
        descriptor(a, [BLOCK_M, BLOCK_K]),
        descriptor(b, [BLOCK_K, BLOCK_N]),
        descriptor(c, [BLOCK_M, BLOCK_N]),
        K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, num_warps=4,
    )  # fmt: skip
    return a, b, c


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_warps_with_jobs_of_their_own(stages):
    """A program counter per warp: named barriers, mbarriers, a jump table, registers handed over."""
    with emulate(90) as emulation:
        a, b, c = specialised_matmul(100, 72, 256, 64, 64, 32, stages)
    assert torch.equal(c.double(), a.double() @ b.double())
    assert emulation.launches[0].num_warps == 8  # four that multiply, one that loads, and its group


# --- threads of one warp that part ----------------------------------------------------------------------


@triton.jit
def _functions_kernel(x_ptr, n_ptr, y_ptr, q_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, n = tl.load(x_ptr + i), tl.load(n_ptr + i)
    tl.store(y_ptr + i, tl.log(x))
    tl.store(y_ptr + tl.num_programs(0) * BLOCK + i, tl.erf(x))
    tl.store(q_ptr + i, n // (i.to(tl.int64) + 1))


@both
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_functions_that_take_ways_of_their_own(arch, share):
    """Logarithms of what is not finite, large and small arguments, quotients of 64 and of 32 bits."""
    special = torch.tensor([math.nan, math.inf, 0.0, -1.0, 20.0])
    choose = torch.arange(512) % 10 < 10 * share
    x = torch.where(choose, special[torch.arange(512) % 5], torch.rand(512) + 0.01)
    n = torch.where(choose, 2**40, 1000) + torch.arange(512)
    y, q = torch.zeros(2, 512), torch.zeros(512, dtype=torch.int64)
    with emulate(arch):
        _functions_kernel[(2,)](x, n, y, q, BLOCK=256, num_warps=4)
    expected = torch.stack((x.log(), x.erf()))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert torch.equal(q, n // (torch.arange(512) + 1))


def test_a_warp_counts_what_some_of_its_threads_execute():
    """Of two warps the second skips the addition, and one thread of the first does not."""
    body = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mov.b32 %r2, 0;
        setp.ne.s32 %p1, %r1, 5;
        @%p1 bra $JOIN;
        add.s32 %r2, %r2, 1;
    $JOIN:
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [%rd2], %r2;
        """
    found = torch.zeros(64, dtype=torch.int32)
    with emulate(90) as emulation:
        emulation.run_ptx(kernel(body, 1, 64), [found], (3,))
    assert found.tolist() == [int(i == 5) for i in range(64)]
    assert emulation.launches[0].counts["integer"] == 3 * (2 * 2 + 1)
