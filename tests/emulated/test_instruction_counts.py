"""Counts of kernels small enough to work out by hand, and the command that sums them up."""

import dataclasses
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
from benchmarks.instruction_counts.__main__ import _works, main, parse, table
from benchmarks.instruction_counts.counting import CountRow, count
from benchmarks.instruction_counts.torch_work import Kept, TorchWork
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


@triton.jit
def _square_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * 512 + i)
    tl.store(y_ptr + i[:, None] * N + i, tl.dot(x, x))


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
    work = TorchWork()
    with work.outside_of_launches():
        found = counts_of(80, _matmul_kernel, (1,), a, b, c, M, N, K)
        torch.bmm(c[None, :8], c[None])
    assert work.flops == 2 * 8 * N * N and work.bytes == 4 * (8 * N + N * N + 8 * N)
    assert rates.matrix_flops(found) == 2 * M * N * K


X = torch.ones(8, 4)


@pytest.mark.parametrize(
    ("operation", "elements"),
    [
        pytest.param(lambda x: x + x[0], 32 + 4 + 32, id="a sum"),
        pytest.param(lambda x: x.T[1:].unflatten(1, (2, 4)).detach(), 0, id="views"),
        pytest.param(lambda x: x.expand(10, 8, 4).sum(0), 32 + 32, id="what stands for several"),
        pytest.param(lambda x: x.mul_(X[0]), 32 + 4 + 32, id="in place"),
        pytest.param(lambda x: x.zero_(), 32, id="overwritten"),
        pytest.param(lambda x: x.copy_(X[0]), 4 + 32, id="a copy"),
        pytest.param(lambda x: torch.cat([x, x[:1]]), 2 * 36, id="a list"),
        pytest.param(lambda x: x.half(), 32 + 16, id="half as wide"),
        pytest.param(lambda x: torch.empty_like(x), 0, id="without values"),
        pytest.param(lambda x: torch.zeros_like(x), 32, id="zeros"),
    ],
)
def test_bytes_of_operations_of_torch(operation, elements):
    x, work = X.clone(), TorchWork()
    with work.outside_of_launches():
        operation(x)
    assert work.bytes == 4 * elements


@torch.library.custom_op("lact_kernels_tests::doubled_twice", mutates_args=())
def doubled_twice(x: torch.Tensor) -> torch.Tensor:
    return (x * 2) * 2


def test_a_registered_operation_moves_what_it_does_inside():
    work = TorchWork()
    with work.outside_of_launches():
        doubled_twice(X)
    assert work.bytes == 4 * 2 * (32 + 32)


def test_what_is_kept_for_a_backward():
    x, w = X.clone().requires_grad_(), X[:, :1].clone()
    kept = Kept([x, w])
    with kept.counting():
        y = (x * w).exp()  # the inputs of the product, the result of exp
        y.sin().sum()  # and that again
    assert kept.bytes == 4 * 32


def test_the_configuration_that_a_peer_would_take():
    """Of three the largest does not fit, and the next one spills: it is taken where there is no other."""
    small, spilling, large = (
        triton.Config({"N": n}, num_warps=warps) for n, warps in ((64, 4), (128, 1), (512, 32))
    )
    x, y = torch.randint(-4, 4, (512, 512)).bfloat16(), torch.zeros(64, 64)
    with peers._lact_setting(90) as chosen, emulate(90):
        triton.autotune([small, spilling, large], key=[])(_square_kernel)[(1,)](x, y)
    assert chosen == {"_square_kernel": ["N=64, num_warps=4, num_stages=3"]}
    assert torch.equal(y, x[:64, :64].float() @ x[:64, :64].float())
    y = torch.zeros(128, 128)
    with peers._lact_setting(90) as chosen, emulate(90):
        triton.autotune([spilling], key=[])(_square_kernel)[(1,)](x, y)
    (text,) = chosen["_square_kernel"]
    assert text.startswith("N=128, num_warps=1, num_stages=3 (spills ")
    with pytest.raises(Unavailable, match="fits"), peers._lact_setting(90), emulate(90):
        triton.autotune([large], key=[])(_square_kernel)[(1,)](x, y)


def test_works_of_given_sizes():
    options = parse("--attention 64 96 32 --fast-weights 32 96 48 --fast-weights 64 8 4".split())
    attention, *fast_weights = _works(options)
    assert (attention.op, attention.point.D, attention.point.T, attention.point.window_size) == (
        "window_attn", 64, 96, 32,
    )  # fmt: skip
    assert [work.op for work in fast_weights] == ["block_causal_ttt"] * 2
    sizes = [
        (w.point.Dk, w.point.Dv, w.point.Dh, w.point.T, w.point.chunk_size) for w in fast_weights
    ]
    assert sizes == [(32, 32, 32, 96, 48), (64, 64, 64, 8, 4)]
    assert all(work.point.momentum for work in fast_weights)


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


def test_lines_below_a_table():
    """In round numbers: 4 MFLOP in kernels, 6 in torch, of 5 that are needed."""
    found = {"matrix": 6_000, "integer": 2_000, "bytes_read": 3_000_000, "bytes_written": 1_000_000}
    common = dict.fromkeys(
        ("op", "variant", "shape", "dtype", "gpu", "launches", "programs", "warps"), 1
    )
    row = CountRow(
        **common,
        arch=90, part="forward", kernel="k", counts=found, matrix_flops=4_000_000, instructions=8_000,
        bound_us={"matrix": 1.0}, overlapped_bound_us=1.0, serial_bound_us=2.0,
        configurations=["N=64", "N=32"],
    )  # fmt: skip
    total = dataclasses.replace(
        row, kernel="total", configurations=None, torch_matrix_flops=6_000_000, torch_bytes=5_000_000,
        kept_bytes=7_000_000, needed_flops=5_000_000, least_bytes=2_000_000, needed_bound_us=0.5,
    )  # fmt: skip
    assert table([row, total])[4:] == [
        "  k: N=64; N=32",
        "  executed: 2000 warp-instructions per MFLOP of the rows above; besides by torch's own operations"
        " 6.0 MFLOP and 5.000 MB",
        "  needed: 2.000 MB (2.00 times that requested, 4.50 with torch's own operations) and 5.0 MFLOP"
        " (2.00 times that executed); bound of that alone 0.500 us",
        "  kept for the backward besides the inputs: 7.000 MB",
    ]
    alone = dataclasses.replace(total, torch_matrix_flops=0, torch_bytes=0, kept_bytes=None)
    assert "(0.80 times that executed, 1600 warp-instructions per MFLOP)" in table([row, alone])[-1]


def test_command_refuses_to_count_what_is_interpreted():
    command = [sys.executable, "-m", "benchmarks.instruction_counts", "--quick"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr and not result.stdout
