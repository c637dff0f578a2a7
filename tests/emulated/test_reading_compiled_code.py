"""What the compile report reads: ptxas' warnings, loops with matrix products, products computed twice.

Kernels are compiled, not emulated. Those with a fault have it on purpose.
"""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.compile_report.case import CompileCase
from benchmarks.compile_report.compiling import Source, compile_source
from benchmarks.compile_report.kept import Kept
from benchmarks.compile_report.loops import MatrixLoop, matrix_loops
from benchmarks.compile_report.machine_code import Instruction, disassemble, spilled_bytes
from benchmarks.compile_report.products import product_repeats
from lact_kernels.triton.configs import TTTConfig

pytestmark = pytest.mark.xdist_group("reading_compiled_code")


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, length, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ASSUME: tl.constexpr,
):  # fmt: skip
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    if ASSUME:
        tl.assume(length > 0)
    for start in range(0, length, K):
        a = tl.load(a_ptr + rows[:, None] * length + (start + inner)[None, :])
        b = tl.load(b_ptr + columns[:, None] * length + (start + inner)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], tl.exp(acc))


def compiled(arch, num_warps=8, num_stages=3, M=128, N=128, K=64, assume=True):
    case = CompileCase(
        name="product",
        kernel=_product_kernel,
        arch=arch,
        dtype=torch.bfloat16,
        shape="",
        config=TTTConfig(M, N, K, num_warps, num_stages),
        pointers={"a_ptr": torch.bfloat16, "b_ptr": torch.bfloat16, "out_ptr": torch.float32},
        constexprs={"M": M, "N": N, "K": K, "ASSUME": assume},
    )
    binary = compile_source(Source.of(case))
    return binary, disassemble([binary.cubin], arch)[0]


def test_a_loop_that_may_be_skipped_is_warned_of():
    binary, code = compiled(90, assume=False)
    (warning,) = binary.warnings
    assert warning.startswith("(C7515) Potential Performance Loss: wgmma.mma_async")
    (loop,) = matrix_loops(code)
    assert loop.products == 1 and loop.waits == 4  # one for each instruction

    binary, code = compiled(90)
    assert binary.warnings == []
    (loop,) = matrix_loops(code)
    assert loop.products == loop.waits == 1


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_stages_are_copies_in_flight(arch):
    """Two tiles for each stage but the one that is read and the one that has just been waited for."""
    for num_stages, copies in ((2, 0), (3, 2), (4, 4)):
        _, code = compiled(arch, num_stages=num_stages, N=64)
        (loop,) = matrix_loops(code)
        assert loop.copies_in_flight == copies


def test_few_rows_for_many_warps_are_computed_more_than_once():
    for rows, columns, repeats in ((64, 64, 1), (16, 32, 2), (16, 16, 4)):
        binary, _ = compiled(80, M=rows, N=columns)
        assert product_repeats(binary.ttgir, binary.ptx, 8) == repeats
    binary, _ = compiled(90)
    assert product_repeats(binary.ttgir, binary.ptx, 8) == 1
    binary, _ = compiled(100)
    assert product_repeats(binary.ttgir, binary.ptx, 8) is None  # one thread issues for all


def test_kernels_are_disassembled_together_as_one_by_one():
    first, alone = compiled(80, num_warps=4, M=16, N=32)
    second, other = compiled(80, num_warps=4)
    together = disassemble([second.cubin, first.cubin], 80)
    assert [x.name for x in together[1]] == [x.name for x in alone]
    assert matrix_loops(together[1]) == matrix_loops(alone)
    assert matrix_loops(together[0]) == matrix_loops(other)
    assert first.registers < second.registers and spilled_bytes(other) == 0


def code(*lines):
    """A line is `name operands`, perhaps after a predicate. Branches name the place to which they lead."""
    result = []
    for place, line in enumerate(lines):
        predicate, _, rest = line.rpartition("! ")
        name, _, operands = rest.partition(" ")
        if name == "BRA":
            operands = f"0x{16 * int(operands):x}"
        result.append(Instruction(16 * place, predicate, name, operands))
    return result


def test_special_functions_beside_products_are_counted():
    """What is issued at the loop's end is on its way at its beginning, until the wait."""
    instructions = code(
        "MOV R0, R1",
        "MUFU.EX2 R1, R1",
        "DEPBAR.LE SB0, 0x3",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "MUFU.EX2 R2, R2",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "MUFU.RCP R3, R3",
        "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0",
        "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
        "ISETP.GE.AND P0, PT, R0, R1, PT",
        "FSEL R5, R5, RZ, P0",
        "@P0! BRA 1",
        "EXIT",
    )
    assert matrix_loops(instructions) == [
        MatrixLoop(
            compares=1, selects=1, copies_in_flight=3, products=2, waits=1, overlapped=2,
            special_functions=3, least_compares=1, least_selects=1,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("waits, num_stages, copies", [(2, 2, 1), (2, 3, 3), (1, 2, 0), (1, 3, 2)])
def test_copies_by_descriptors_are_on_their_way(waits, num_stages, copies):
    """Of two tiles, asked for last: each waited for before its product, or both before the first."""
    second_wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16+0x10], R2" if waits == 2 else "NOP"
    (loop,) = matrix_loops(
        code(
            "MOV R0, R1",
            "MOV R2, R1",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R2",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, gsb0",
            second_wait,
            "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0",
            "UTMALDG.4D [UR8], [UR6]",
            "UTMALDG.4D [UR10], [UR6]",
            "@P0! BRA 1",
            "EXIT",
        ),
        num_stages,
    )
    assert loop.copies_in_flight == copies


def test_a_branch_around_a_mask_is_found():
    """With a wait out of line, which leads back into the loop and not to its beginning."""
    (loop,) = matrix_loops(
        code(
            "MOV R0, R1",
            "ISETP.GE.AND P0, PT, R0, R1, PT",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
            "@!P2! BRA 11",
            "@P0! BRA 7",
            "ISETP.GE.U32.AND P1, PT, R2, R3, PT",
            "FSEL R5, R5, RZ, P1",
            "@P3! BRA 9",
            "FSEL R6, R6, RZ, P4",
            "@P0! BRA 1",
            "EXIT",
            "ISETP.GE.AND P2, PT, R0, R1, PT",
            "BRA 4",
        )
    )
    assert (loop.compares, loop.selects) == (3, 2)
    assert (loop.least_compares, loop.least_selects) == (1, 0)


def test_spilled_bytes_are_those_of_every_access():
    instructions = code("STL.64 [R1], R12", "LDL.LU.128 R10, [R1]", "LDL R1, [R1]", "LDG.E R1, R2")
    assert spilled_bytes(instructions) == 8 + 16 + 4


def test_rows_are_kept_until_something_changes(tmp_path):
    kept = Kept(tmp_path / "rows")
    assert kept.get("a") is None
    kept.put("a", {"registers": 7})
    assert Kept(tmp_path / "rows").get("a") == {"registers": 7} and kept.get("b") is None
    for path in kept.folder.iterdir():
        path.write_text("cut off {")
    assert kept.get("a") is None
    (tmp_path / "file").write_text("")
    Kept(tmp_path / "file").put("a", {})  # nothing can be written there
