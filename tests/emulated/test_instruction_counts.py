"""Counts of kernels small enough to work out by hand, and the command that sums them up."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.instruction_counts import peers, points, rates
from benchmarks.instruction_counts.__main__ import main
from benchmarks.instruction_counts.counting import TorchProducts, count
from benchmarks.measure import DIFFERENCE_LIMITS, difference_of
from benchmarks.peers import Unavailable
from ptx_emulator import Options, counts, emulate
from ptx_emulator.counts import count_banks

ARCHS = [
    pytest.param(arch, id=f"sm_{arch}", marks=pytest.mark.xdist_group(f"sm_{arch}-bfloat16"))
    for arch in (80, 90)
]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


@triton.jit
def _copy_tile_kernel(x_desc, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    tile = x_desc.load([tl.program_id(0) * ROWS, 0])
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(y_ptr + rows * COLS + tl.arange(0, COLS)[None, :], tile)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k)
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(c_ptr + m[:, None] * N + n, tl.dot(a, b))


@triton.jit
def _exponentials_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.exp2(tl.load(x_ptr + i)))


def counts_of(arch: int, kernel, grid: tuple[int, ...], *args, **options) -> dict[str, int]:
    with emulate(arch, options=Options(memory_counts=True)) as emulation:
        kernel[grid](*args, **options)
    return emulation.launches[0].counts


@pytest.mark.parametrize(
    ("stride", "sectors"),
    [
        pytest.param(1, 512 // 8, id="8 floats a sector"),
        pytest.param(2, 512 // 4, id="4 floats a sector"),
        pytest.param(8, 512, id="a sector for each float"),
        pytest.param(100, 512, id="sectors far apart"),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_copy(arch, stride, sectors):
    x, y = torch.randn(512 * stride), torch.empty(512)
    found = counts_of(arch, _copy_kernel, (4,), x, y, stride, BLOCK=128)
    assert torch.equal(y, x[::stride])
    assert found["bytes_read"] == found["bytes_written"] == 4 * 512
    assert found["sectors_read"] == found["distinct_sectors_read"] == sectors
    assert found["sectors_written"] == found["distinct_sectors_written"] == 512 // 8


@pytest.mark.xdist_group("sm_90-bfloat16")
def test_copy_of_tiles_by_descriptor():
    """Two tiles of 16 rows of 128 bytes; 20 rows exist, each every 256 bytes."""
    x, y = torch.zeros(20, 64), torch.zeros(32, 32)
    descriptor = TensorDescriptor(x, [20, 32], [64, 1], [16, 32])
    found = counts_of(90, _copy_tile_kernel, (2,), descriptor, y, 16, 32)
    assert found["bytes_read"] == 20 * 128 and found["bulk_shared_bytes"] == 32 * 128
    assert found["sectors_read"] == found["distinct_sectors_read"] == 20 * 4


@pytest.mark.parametrize("threads_per_batch", [128, 512], ids=["one by one", "together"])
def test_sectors_read_again_count_once_a_launch(threads_per_batch):
    """All threads of four programs read one float."""
    x, y = torch.randn(1), torch.empty(512)
    with emulate(90, options=Options(threads_per_batch, memory_counts=True)) as emulation:
        for _ in range(2):
            _copy_kernel[(4,)](x, y, 0, BLOCK=128)
    found, again = (launch.counts for launch in emulation.launches)
    assert found == again
    assert found["bytes_read"] == 4 * 512 and found["sectors_read"] == 4 * 4
    assert found["distinct_sectors_read"] == 1
    assert found["distinct_sectors_written"] == 512 // 8


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matrix_flops(arch, dtype):
    M, N, K = 64, 32, 32
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N)
    found = counts_of(arch, _matmul_kernel, (1,), a, b, c, M, N, K, num_warps=4)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=0.05, rtol=0.01)
    kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
    assert found[f"matrix_flops_{kind}"] == rates.matrix_flops(found) == 2 * M * N * K
    # mma m16n8k16 and wgmma m64n32k16, or half the k with tf32; each of four warps executes a wgmma.
    depth = 8 if kind == "tf32" else 16
    single = 2 * 16 * 8 * depth if arch == 80 else 2 * 64 * 32 * depth / 4
    assert found["matrix"] == 2 * M * N * K / single


def test_products_of_torch_are_told_from_those_of_the_emulator():
    """The emulator itself multiplies matrices with torch."""
    M = N = K = 64
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16(), torch.empty(M, N)
    products = TorchProducts()
    with products.outside_of_launches():
        found = counts_of(80, _matmul_kernel, (1,), a, b, c, M, N, K)
        torch.bmm(c[None, :8], c[None])
    assert products.flops == 2 * 8 * N * N
    assert rates.matrix_flops(found) == 2 * M * N * K


@pytest.mark.parametrize("arch", ARCHS)
def test_special_functions(arch):
    x, y = torch.zeros(1024), torch.empty(1024)
    found = counts_of(arch, _exponentials_kernel, (1,), x, y, BLOCK=1024)
    assert found["special"] == 1024 // 32
    assert found["global_load"] == found["global_store"] == 1024 // 32 // 4  # four floats a thread
    assert rates.instructions(found) == sum(found[unit] for unit in counts.UNITS)


@pytest.mark.parametrize(
    ("stride", "size", "wavefronts", "least"),
    [
        pytest.param(1, 4, 1, 1, id="a bank each"),
        pytest.param(2, 4, 2, 1, id="every other bank"),
        pytest.param(32, 4, 32, 1, id="all in one bank"),
        pytest.param(33, 4, 1, 1, id="one further each"),
        pytest.param(0, 4, 1, 1, id="one word for all"),
        pytest.param(4, 16, 4, 4, id="quarters of a warp"),
    ],
)
def test_bank_conflicts(stride, size, wavefronts, least):
    """Of one warp, whose threads are so many words apart."""
    found = dict.fromkeys(("wavefronts_x", "least_wavefronts_x"), 0)
    strand = SimpleNamespace(
        options=Options(memory_counts=True),
        batch=SimpleNamespace(launch=SimpleNamespace(counts=found)),
        all_threads=lambda x: x,
    )
    count_banks(strand, "x", 4 * stride * np.arange(32)[None], size, None)
    assert found == {"wavefronts_x": wavefronts, "least_wavefronts_x": least}


def test_bounds():
    """Each unit has work for another number of microseconds on one multiprocessor at 1 GHz."""
    gpu = rates.GPU(
        name="",
        multiprocessors=1,
        clock=1e9,
        matrix_clock=2e9,
        matrix_flops={"bf16": 1000, "tf32": 500},
        fp32=64,
        integer=32,
        special=16,
        shuffle=8,
        load_store=32,
        issued=4,
        shared_bytes=128,
        memory=32e9,
    )
    found = {
        "matrix_flops_bf16": 2_000_000,  # 1 us
        "matrix_flops_tf32": 2_000_000,  # 2 us
        "fp32": 2000,  # 1 us
        "integer": 500,  # 0.5 us
        "special": 100,  # 0.2 us
        "shuffle": 100,  # 0.4 us
        "global_load": 30,
        "global_store": 20,
        "async_copy": 50,  # 0.1 us with these two
        "wavefronts_ld_shared": 100,
        "wavefronts_cp_async": 100,
        "wgmma_shared_bytes": 128 * 100,  # 0.3 us with these two
        "distinct_sectors_read": 500,
        "distinct_sectors_written": 100,  # 0.6 us with these
        "sectors_read": 10_000,  # from a cache
        "barrier": 1200,  # 4,000 instructions in all, 1 us
    }
    seconds = rates.unit_seconds(found, gpu)
    assert {unit: round(1e6 * x, 9) for unit, x in seconds.items()} == {
        "matrix": 3.0,
        "fp32": 1.0,
        "integer": 0.5,
        "special": 0.2,
        "shared": 0.3,
        "load/store": 0.1,
        "shuffle": 0.4,
        "issue": 1.0,
        "memory": 0.6,
    }
    assert rates.overlapped_seconds(seconds) == pytest.approx(3e-6)
    assert rates.serial_seconds(seconds) == pytest.approx(6.1e-6)
    twice = rates.GPU(**vars(gpu) | {"multiprocessors": 2})
    assert rates.unit_seconds(found, twice)["fp32"] == pytest.approx(0.5e-6)
    assert rates.unit_seconds(found, twice)["memory"] == pytest.approx(0.6e-6)
    assert rates.needed_seconds(2_000_000, 32_000, "bf16", gpu) == pytest.approx(1e-6)
    assert rates.needed_seconds(2_000_000, 64_000, "bf16", gpu) == pytest.approx(2e-6)


@pytest.mark.parametrize(("arch", "peak", "fp32"), [(80, 312e12, 19.5e12), (90, 989e12, 67e12)])
def test_rates_are_those_published(arch, peak, fp32):
    """Of a whole GPU, dense, in 16 bits and in float32 outside of matrix instructions."""
    gpu = rates.GPUS[arch]
    assert gpu.matrix_flops["bf16"] * gpu.matrix_clock * gpu.multiprocessors == pytest.approx(
        peak, rel=1e-3
    )
    assert 2 * gpu.fp32 * gpu.clock * gpu.multiprocessors == pytest.approx(fp32, rel=5e-3)


@pytest.mark.xdist_group("sm_90-bfloat16")
def test_command(tmp_path, capsys, monkeypatch):
    def not_here(work, arch):
        raise Unavailable("it would take long")

    monkeypatch.setattr(peers, "_flex", not_here)
    file = tmp_path / "counts.jsonl"
    ops = ["window_attn", "window_attn_with_kvcache", "rms_norm_scale_add"]
    assert main(["--arch", "90", "--quick", "--op", *ops, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "Bounds computed from counts" in text and "measured" not in text
    assert "FLA" in text  # its counts, or how to get it
    assert "FlexAttention" in text and "unavailable: it would take long" in text

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["variant"] == "lact_kernels"]
    kernels = {(row["op"], row["part"]): [] for row in rows}
    for row in rows:
        assert (
            row["serial_bound_us"]
            >= row["overlapped_bound_us"]
            >= max(row["bound_us"].values())
            > 0
        )
        kernels[row["op"], row["part"]].append(row)
    assert list(kernels) == [
        ("window_attn", "forward"),
        ("window_attn", "backward"),
        ("window_attn_with_kvcache", "forward"),
        ("rms_norm_scale_add", "forward"),
        ("rms_norm_scale_add", "backward"),
    ]
    for *parts, total in kernels.values():
        assert total["kernel"] == "total"
        for name in ("launches", "programs", "warps", "instructions", "matrix_flops"):
            assert total[name] == sum(row[name] for row in parts), name
        for name, number in total["counts"].items():
            assert number == sum(row["counts"].get(name, 0) for row in parts), name
    assert [row["kernel"] for row in kernels["window_attn", "backward"]] == [
        "_window_attn_bwd_dq_kernel",
        "_window_attn_bwd_dkv_kernel",
        "total",
    ]

    forward, backward = (kernels["window_attn", part][-1] for part in ("forward", "backward"))
    T, W, D = (forward["shape"][name] for name in ("T", "window_size", "D"))
    pairs = sum(min(i + 1, W) for i in range(T))
    assert forward["needed_flops"] == 4 * pairs * D
    assert backward["needed_flops"] == 10 * pairs * D
    tokens, statistics = 2 * T * D, 4 * T  # bytes of one of q, k, v, o; those of the lse
    assert forward["least_bytes"] == 4 * tokens + statistics
    assert backward["least_bytes"] == 8 * tokens + statistics
    for row in (forward, backward):
        assert row["matrix_flops"] >= row["needed_flops"]
        assert row["counts"]["sectors_read"] > row["counts"]["distinct_sectors_read"]
    # Whatever is needed is touched once: q, k and v of the forward exactly so, by its only launch.
    assert 32 * forward["counts"]["distinct_sectors_read"] == 3 * tokens
    assert forward["counts"]["bytes_written"] == tokens + statistics


@pytest.mark.xdist_group("sm_80-bfloat16")
def test_flex_attention():
    """What Inductor makes for a GPU that is not there computes what the eager path does."""
    work, arch = points.attention(16, 130, 20), 80  # shorter ones it decodes, with other kernels
    flex = peers.implementations(work)[-1]
    try:
        function = flex.build(work, arch)
        counted = list(count(work, flex.name, function, arch, lambda: flex.setting(arch)))
    except Unavailable as error:
        pytest.skip(str(error))
    expected = work.passes(functools.partial(work.point.run, "eager"))
    for (rows, results), part in zip(counted, expected, strict=True):
        assert difference_of(results, part.run()) <= DIFFERENCE_LIMITS[points.DTYPE]
        assert rows[-1].matrix_flops >= part.needed_flops and not rows[-1].torch_matrix_flops
    assert [len(rows) for rows, _ in counted] == [2, 3]  # the sum of o * do is a kernel of its own


def test_command_refuses_to_count_what_is_interpreted():
    command = [sys.executable, "-m", "benchmarks.instruction_counts", "--quick"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr and not result.stdout
