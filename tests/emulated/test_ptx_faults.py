"""What kernels may not do, each found and named, with the line of PTX and, where there is one, the source."""

import contextlib
import threading

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ptx_emulator import (
    Deadlock,
    Divergence,
    EmulatorError,
    InvalidAccess,
    Options,
    Reported,
    StepLimit,
    StoppedAtReport,
    TensorMapArgument,
    UnsupportedInstruction,
    emulate,
    reports,
)
from ptx_emulator.order import Clocks
from ptx_emulator.shared_memory import SharedMemory
from tests.emulated import kernels
from tests.emulated.ptx import kernel
from tests.emulated.test_ptx_kernels import specialised_matmul


def run(body, *arguments, num_threads=64, grid=(1,), shared_bytes=4096, **options):
    """Run hand-written PTX; `Reported` if it did what it may not."""
    with emulate(90, **options) as emulation:
        ptx = kernel(body, len(arguments), num_threads)
        emulation.run_ptx(ptx, list(arguments), grid, shared_bytes)
    return emulation


def kinds_of(error):
    return {report.kind for report in error.value.reports}


# --- global memory --------------------------------------------------------------------------------------


def test_store_beyond_a_tensor():
    x, y = torch.zeros(512), torch.zeros(400)
    with pytest.raises(Reported) as error, emulate(90):
        kernels.copy_without_mask[(4,)](x, y, BLOCK=128)
    (report,) = error.value.reports
    assert report.kind == reports.OUT_OF_BOUNDS and report.kernel == "copy_without_mask"
    assert report.instruction.startswith("st.global") and report.source.startswith("kernels.py:")
    assert "program 3" in report.example
    assert f"line {report.line} ({report.source})" in str(error.value)


def test_who_asks_for_one_report_gets_no_more():
    x, y = torch.ones(512), torch.zeros(400)
    one_at_a_time = Options(stop_at_report=True, threads_per_batch=1)
    with pytest.raises(StoppedAtReport, match=reports.OUT_OF_BOUNDS):
        with emulate(90, options=one_at_a_time) as emulation:
            kernels.copy_without_mask[(5,)](x[:128], y, BLOCK=128)
    (report,) = emulation.reports
    assert report.instruction.startswith("ld.global") and "program 1" in report.example
    assert torch.equal(y, (torch.arange(400) < 128).float())


def test_load_from_between_the_rows_of_a_slice():
    """In memory that the tensor's storage has, and the argument does not."""
    x, y = torch.zeros(512)[::2], torch.zeros(256)
    with pytest.raises(Reported) as error, emulate(90):
        kernels.copy_without_mask[(2,)](x, y, BLOCK=128)
    assert kinds_of(error) == {reports.OUTSIDE_ARGUMENT}


IN_TURN = Options(threads_per_batch=64)  # programs one after the other


@triton.jit
def _shift(x_ptr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """Each program reads one element of its neighbour's, and overwrites its own."""
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    i = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + 1, mask=i + 1 < tl.num_programs(0) * BLOCK, other=0.0)
    tl.debug_barrier()
    tl.store(x_ptr + i, x)


@pytest.mark.parametrize("options", [IN_TURN, Options()], ids=["in_turn", "together"])
@pytest.mark.parametrize("backwards", [False, True], ids=["reads_first", "writes_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_programs_that_shift_each_others_elements(dtype, backwards, options):
    x = torch.arange(1, 65).to(dtype)
    with pytest.raises(Reported) as error, emulate(90, options=options):
        _shift[(2,)](x, BLOCK=32, BACKWARDS=backwards, num_warps=1)
    assert kinds_of(error) <= {reports.FOREIGN_READ, reports.FOREIGN_WRITE}


@triton.jit
def _halve(x_ptr, n, BLOCK: tl.constexpr):
    """In place, in segments of n, which need not be a word's end."""
    i = tl.arange(0, BLOCK)
    place = x_ptr + tl.program_id(0) * n + i
    tl.store(place, tl.load(place, mask=i < n) // 2, mask=i < n)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
def test_programs_whose_elements_share_a_word(dtype):
    x = torch.arange(0, 70, 2).to(dtype)
    with emulate(90, options=IN_TURN):
        _halve[(5,)](x, 7, BLOCK=8, num_warps=1)
    assert torch.equal(x, torch.arange(35).to(dtype))


@triton.jit
def _sum_of_what_others_write(x_ptr, y_ptr, BLOCK: tl.constexpr, N: tl.constexpr):
    """The first program writes x; the second one reads it, in a loop whose loads are asynchronous copies."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(x_ptr + i, i.to(tl.float32))
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, N, BLOCK, num_stages=3):
            total += tl.load(x_ptr + first + i)
        tl.store(y_ptr + i, total)


def test_copies_of_what_another_program_wrote():
    with pytest.raises(Reported) as error, emulate(90):
        _sum_of_what_others_write[(2,)](torch.ones(512), torch.ones(128), BLOCK=128, N=512)
    assert kinds_of(error) <= {reports.FOREIGN_READ, reports.FOREIGN_WRITE}


def test_programs_that_write_one_place():
    body = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %ctaid.x;
        st.global.{type} [%rd1], {value};
    """
    run(
        body.format(type="b32", value=7), torch.zeros(4), grid=(2,)
    )  # the same: nothing is undefined
    for type, value in (("b32", "%r1"), ("b16", "%rs1")):
        convert = "cvt.u16.u32 %rs1, %r1;\n st.global"
        different = body.format(type=type, value=value).replace("st.global", convert)
        with pytest.raises(Reported) as error:
            run(different, torch.zeros(4), grid=(2,), options=IN_TURN)
        assert kinds_of(error) == {reports.FOREIGN_WRITE}


@triton.jit
def _reverse_twice(x_ptr, scratch_ptr, y_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(scratch_ptr + i, tl.load(x_ptr + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(scratch_ptr + (N - 1 - i)))


def test_warps_that_read_global_memory_too_early():
    x = torch.randn(512)
    scratch, y = torch.zeros(512), torch.zeros(512)
    with emulate(90):
        _reverse_twice[(1,)](x, scratch, y, N=512, BARRIER=True)
    assert torch.equal(y, x.flip(0))
    with pytest.raises(Reported) as error, emulate(90):
        _reverse_twice[(1,)](x, scratch, y, N=512, BARRIER=False)
    assert kinds_of(error) == {reports.GLOBAL_READ_AFTER_WRITE}


def test_threads_that_store_different_values_to_one_place():
    body = "ld.param.b64 %rd1, [k_param_0];\nmov.u32 %r1, %tid.x;\nst.global.b32 [%rd1], %r1;"
    with pytest.raises(Reported) as error:
        run(body, torch.zeros(4))
    assert kinds_of(error) == {reports.LANES_DIFFER}


@pytest.mark.parametrize("address", [0, 64, 2**40, 12345])
def test_an_address_that_no_tensor_backs(address):
    """As where a kernel gets a number, or None, for a pointer."""
    body = "ld.param.b64 %rd1, [k_param_0];\nld.global.b32 %r1, [%rd1];"
    with pytest.raises(InvalidAccess, match=rf"k, line \d+: ld.global.b32 .*0x{address:x}"):
        run(body, address)


def test_a_misaligned_address():
    body = "ld.param.b64 %rd1, [k_param_0];\nld.global.b32 %r1, [%rd1+2];"
    with pytest.raises(InvalidAccess, match="that 4 bytes do not divide"):
        run(body, torch.zeros(4))


def test_a_register_that_was_never_written():
    """Holds an address that no tensor has, or NaN."""
    with pytest.raises(InvalidAccess):
        run("ld.global.b32 %r1, [%rd1];", torch.zeros(4))
    x = torch.zeros(64)
    run(
        """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        add.f32 %r2, %r3, 0f3F800000;
        st.global.b32 [%rd3], %r2;
        """,
        x,
    )
    assert x.isnan().all()


# --- shared memory --------------------------------------------------------------------------------------

OWN_WORD = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;
    xor.b32 %r5, %r2, 128;
    add.s32 %r6, %r3, %r5;  // the same lane's word of the other warp
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
"""


@pytest.mark.parametrize(
    "body, kind",
    [
        ("st.shared.b32 [%r4], %r1; {} ld.shared.b32 %r7, [%r6];", reports.READ_AFTER_WRITE),
        (
            "st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r7, [%r6]; {} st.shared.b32 [%r4], %r1;",
            reports.WRITE_AFTER_READ,
        ),
        ("st.shared.b32 [%r4], %r1; {} st.shared.b32 [%r6], %r1;", reports.WRITE_AFTER_WRITE),
    ],
    ids=["read_after_write", "write_after_read", "write_after_write"],
)
def test_races_of_warps(body, kind):
    run(OWN_WORD + body.format("bar.sync 0;"), torch.zeros(64))
    with pytest.raises(Reported) as error:
        run(OWN_WORD + body.format(""), torch.zeros(64))
    assert kinds_of(error) == {kind}


def test_barriers_of_a_part_of_the_warps_order_no_others():
    """Warps 0 and 1 meet at a barrier of 64 threads, of which warp 2, that reads, knows nothing."""
    body = (
        OWN_WORD.replace("128", "{}")
        + """
        setp.lt.u32 %p1, %r1, 64;
        @%p1 bra $L_pair;
        {}
        ld.shared.b32 %r7, [%r6];
        ret;
        $L_pair:
        st.shared.b32 [%r4], %r1;
        bar.sync 1, 64;
        {}
    """
    )
    run(body.format(256, "bar.sync 2, 96;", "bar.arrive 2, 96;"), torch.zeros(64), num_threads=96)
    with pytest.raises(Reported) as error:
        run(body.format(256, "", ""), torch.zeros(64), num_threads=96)
    assert not kinds_of(error) - {
        reports.READ_AFTER_WRITE,
        reports.READ_NEVER_WRITTEN,
        reports.WRITE_AFTER_READ,
    }


def test_who_arrives_and_does_not_wait_comes_after_nobody():
    """The reader waits for the writer's arrival, not the writer for the reader's."""
    body = """
        mov.u32 %r1, %tid.x;
        mov.b32 %r3, global_smem;
        setp.ge.u32 %p2, %r1, 32;
        @%p2 bra $L_other;
        ld.shared.b32 %r7, [%r3];
        bar.sync 1, 64;
        ret;
        $L_other:
        bar.arrive 1, 64;
        st.shared.b32 [%r3], 2;
    """
    with pytest.raises(Reported) as error:
        run(body, torch.zeros(4))
    assert reports.WRITE_AFTER_READ in kinds_of(error)


def test_memory_that_was_never_written():
    with pytest.raises(Reported) as error:
        run(OWN_WORD + "ld.shared.b32 %r7, [%r4];", torch.zeros(64))
    assert kinds_of(error) == {reports.READ_NEVER_WRITTEN}


def test_beyond_shared_memory():
    with pytest.raises(InvalidAccess, match="of shared memory, which has 64"):
        run(OWN_WORD + "st.shared.b32 [%r4], %r1;", torch.zeros(64), shared_bytes=64)


COPY = (
    OWN_WORD
    + "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; {} {} ld.shared.b32 %r7, [{}];"
)


@pytest.mark.parametrize(
    "wait, barrier, address, kind",
    [
        ("cp.async.wait_group 0;", "", "%r4", None),
        ("cp.async.wait_group 1;", "bar.sync 0;", "%r4", reports.READ_TOO_EARLY),
        ("", "bar.sync 0;", "%r4", reports.READ_TOO_EARLY),
        ("cp.async.wait_group 0;", "bar.sync 0;", "%r6", None),
        ("cp.async.wait_group 0;", "", "%r6", reports.READ_AFTER_WRITE),
    ],
    ids=["own", "waits_for_too_few", "no_wait", "others", "others_without_barrier"],
)
def test_asynchronous_copies(wait, barrier, address, kind):
    body = COPY.format(wait, barrier, address)
    if kind is None:
        run(body, torch.zeros(64))
        return
    with pytest.raises(Reported) as error:
        run(body, torch.zeros(64))
    assert kinds_of(error) == {kind}


def test_a_copy_that_is_overtaken():
    """By a store, and by another copy, while it is in flight."""
    for second in ("st.shared.b32 [%r4], %r1;", "cp.async.ca.shared.global [%r4], [%rd3], 4;"):
        with pytest.raises(Reported) as error:
            run(COPY.format(second, "cp.async.wait_all;", "%r4"), torch.zeros(64))
        assert reports.WRITE_IN_FLIGHT in kinds_of(error)


# --- what does not end ----------------------------------------------------------------------------------


@triton.jit
def _endless(x_ptr):
    while tl.load(x_ptr) == 0:
        tl.store(x_ptr + 1, tl.load(x_ptr + 1) + 1)


def test_a_loop_without_an_end():
    with pytest.raises(
        StepLimit, match=r"_endless, line \d+ .*more than 50 jumps back .Options.max_iterations."
    ):
        with emulate(80, options=Options(max_iterations=50)):
            _endless[(1,)](torch.zeros(4, dtype=torch.int32))


def test_a_barrier_that_not_all_warps_reach():
    body = """
        mov.u32 %r1, %tid.x;
        setp.lt.u32 %p1, %r1, 32;
        @%p1 bra $L_end;
        bar.sync 0;
        $L_end:
    """
    with pytest.raises(Deadlock, match=r"warp 1 at line \d+ for barrier 0"):
        run(body, torch.zeros(4))


def test_threads_of_one_warp_that_part():
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7; @%p1 bra $L_end; bar.sync 0;\n$L_end:"
    with pytest.raises(Divergence, match="the threads of a warp go different ways"):
        run(body, torch.zeros(4))


def test_threads_of_one_warp_that_store_on_their_own():
    body = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        setp.lt.u32 %p1, %r1, 7;
        @%p1 bra $L_end;
        st.global.b32 [%rd1], 1;
    $L_end:
        """
    with pytest.raises(Divergence, match="line .*@%p1 bra"):
        run(body, torch.zeros(4))


def test_a_trap():
    with pytest.raises(EmulatorError, match="called trap"):
        run("trap;", torch.zeros(4))


# --- tiles ------------------------------------------------------------------------------------------------

LOADS = (
    OWN_WORD
    + """
    add.s32 %r11, %r3, 1024;
    add.s32 %r12, %r3, 2048;
    add.s32 %r13, %r3, 2056;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r14, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r12], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r13], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r12], 256;
    @%p1 {load} [%r3], [%rd1, {{%r14, %r14}}], [%r12];
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r13], {second};
    @%p1 {load} [%r11], [%rd1, {{%r14, %r14}}], [%r13];
    {before}
    ld.shared.b32 %r7, [%r4];
    {after}
"""
)
LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def waits(*barriers):
    """The usual loop around a wait, with names of its own."""
    return "".join(
        f"""
        {{
        .reg .pred done;
        wait:
        mbarrier.try_wait.parity.shared.b64 done, [{barrier}], 0;
        @!done bra.uni wait;
        }}
        """
        for barrier in barriers
    )


@pytest.mark.parametrize(
    "before, after, kinds",
    [
        (["%r12"], ["%r13"], set()),
        (["%r13"], ["%r12"], {reports.READ_AFTER_WRITE}),
        ([], ["%r12", "%r13"], {reports.READ_AFTER_WRITE}),
        (["%r12"], [], {reports.LOAD_IN_FLIGHT}),
    ],
    ids=["right", "waits_for_another_load", "waits_afterwards", "does_not_wait_for_the_other"],
)
def test_loads_of_tiles(before, after, kinds):
    """One mbarrier for each of two loads of 8 x 8 numbers, of which the first is read."""
    body = LOADS.format(load=LOAD, second=256, before=waits(*before), after=waits(*after))
    tile = TensorMapArgument(torch.randn(8, 8), (8, 8), (8, 1), (8, 8), element_type=7, swizzle=0)
    if not kinds:
        run(body, tile)
        return
    with pytest.raises(Reported) as error:
        run(body, tile)
    assert kinds_of(error) == kinds


@pytest.mark.parametrize(
    "elected, kinds", [("@%p1", {reports.NO_PROXY_FENCE}), ("", set())], ids=["one_thread", "all"]
)
def test_a_fence_is_for_the_threads_that_execute_it(elected, kinds):
    """All threads store, one fences, then a barrier, and another warp's thread has the tile stored."""
    body = (
        OWN_WORD
        + f"""
        st.shared.b32 [%r4], %r1;
        setp.eq.b32 %p1, %r1, 0;
        setp.eq.b32 %p2, %r1, 32;
        {elected} fence.proxy.async.shared::cta;
        bar.sync 0;
        mov.b32 %r14, 0;
        @%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {{%r14, %r14}}], [%r3];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
    """
    )
    x = torch.zeros(8, 8, dtype=torch.int32)
    tile = TensorMapArgument(x, (8, 8), (8, 1), (8, 8), element_type=3, swizzle=0)
    if not kinds:
        run(body, tile)
        assert torch.equal(x.view(-1), torch.arange(64, dtype=torch.int32))
        return
    with pytest.raises(Reported) as error:
        run(body, tile)
    assert kinds_of(error) == kinds


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    "reuse",
    [
        "@%p1 st.shared.b32 [%r12], 0;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r12], 1;",
        f"""
        @%p1 mbarrier.init.shared::cta.b64 [%r15], 1;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r15], 256;
        fence.proxy.async.shared::cta;
        @%p1 {LOAD} [%r12], [%rd1, {{%r14, %r14}}], [%r15];
        bar.sync 0;
        {waits("%r15")}
        """,
    ],
    ids=["store", "init", "load"],
)
def test_an_mbarrier_that_is_overwritten(reuse, ended):
    """Its memory serves for nothing else before it has ended, not even for another mbarrier."""
    body = LOADS.format(load=LOAD, second=256, before=waits("%r12", "%r13"), after="bar.sync 0;")
    if ended:
        body += "".join(f"@%p1 mbarrier.inval.shared::cta.b64 [{x}];" for x in ("%r12", "%r13"))
    body += "add.s32 %r15, %r3, 3072;" + reuse
    tile = TensorMapArgument(torch.randn(8, 8), (8, 8), (8, 1), (8, 8), element_type=7, swizzle=0)
    if ended:
        run(body, tile)
        return
    with pytest.raises(Reported) as error:
        run(body, tile)
    assert kinds_of(error) == {reports.MBARRIER_OVERWRITTEN}


@pytest.mark.parametrize(
    "strides, box, shift, swizzle",
    [
        ((9, 1), (8, 8), 0, 0),
        ((8, 1), (8, 8), 1, 0),
        ((8, 1), (8, 6), 0, 0),
        ((8, 1), (8, 8), 0, 3 - 3),
    ],
    ids=["stride", "address", "box", "right"],
)
def test_tensor_maps_that_no_gpu_takes(strides, box, shift, swizzle):
    body = LOADS.format(load=LOAD, second=256, before=waits("%r12", "%r13"), after="")
    memory = torch.randn(100)
    x = memory[shift:].as_strided((8, 8), strides)
    tile = TensorMapArgument(x, (8, 8), strides, box, element_type=7, swizzle=swizzle)
    if (strides, box, shift) == ((8, 1), (8, 8), 0):
        run(body, tile)
        return
    with pytest.raises(InvalidAccess, match="a tensor map"):
        run(body, tile)


def test_a_load_that_announces_other_bytes():
    body = LOADS.format(load=LOAD, second=512, before=waits("%r12", "%r13"), after="")
    tile = TensorMapArgument(torch.randn(8, 8), (8, 8), (8, 1), (8, 8), element_type=7, swizzle=0)
    with pytest.raises(Deadlock, match="for an mbarrier that lacks 0 arrivals and 256 bytes"):
        run(body, tile)


# --- mbarriers, tiles and products, in a kernel whose warps have jobs of their own ------------------------


def without(text):
    """An `edit` that leaves out the last line of the kernel that has `text`."""

    def edit(name, ptx):
        lines = ptx.splitlines()
        place = max(i for i, line in enumerate(lines) if text in line)
        return "\n".join(lines[:place] + lines[place + 1 :])

    return edit


SPECIALISED = {
    "fence.proxy.async": reports.NO_PROXY_FENCE,
    "cp.async.bulk.wait_group.read": reports.STORE_AT_END,
    "wgmma.fence": reports.NO_WGMMA_FENCE,
    "mbarrier.arrive.shared": Deadlock,  # the one who loads waits for ever
    "mbarrier.arrive.expect_tx": Deadlock,
    "mbarrier.init": UnsupportedInstruction,  # a wait for what is no mbarrier
    "setmaxnreg.dec": None,  # says how registers are shared out, which is not emulated
}


@pytest.mark.parametrize("text", SPECIALISED)
def test_specialised_warps_that_lack_something(text):
    expected = SPECIALISED[text]
    if expected is None:
        context = contextlib.nullcontext()
    else:
        context = pytest.raises(Reported if isinstance(expected, str) else expected)
    with context as error:
        with emulate(90, edit=without(text)):
            specialised_matmul(64, 64, 256, 64, 64, 32, 3)
    if isinstance(expected, str):
        assert kinds_of(error) == {expected}


# --- the emulator itself --------------------------------------------------------------------------------


def test_what_groups_of_warps_read_is_what_each_of_their_warps_reads():
    """Of products: operands of each group's own, and one that the groups share."""
    by_group, by_warp = (
        SharedMemory(num_programs=3, num_bytes=256, unit=4, num_warps=12) for _ in range(2)
    )
    clocks = Clocks(12)
    clocks.now[:12] = 1 + torch.randperm(12).numpy()
    groups = np.arange(4, 12).reshape(2, 1, 4)  # not the first one
    for units in (np.arange(8).reshape(1, 2, 4), np.arange(20, 180, 40).reshape(2, 1, 2)):
        by_group.mark_read(units[..., None], groups, clocks)
        for warp in range(4):
            by_warp.mark_read(units, groups[..., warp], clocks)
    assert by_group.read.any()
    assert np.array_equal(by_group.read, by_warp.read)
    assert np.array_equal(by_group.last_read, by_warp.last_read)


def test_reports_are_not_lost_behind_an_error_of_the_caller():
    with pytest.raises(ZeroDivisionError) as error, emulate(90):
        kernels.copy_without_mask[(4,)](torch.zeros(512), torch.zeros(400), BLOCK=128)
        raise ZeroDivisionError
    assert any(reports.OUT_OF_BOUNDS in note for note in error.value.__notes__)


def test_what_was_written_before_an_error_stays():
    x = torch.zeros(64)
    body = OWN_WORD + "st.global.b32 [%rd3], %r1; ld.global.b32 %r2, [%rd9];"
    with pytest.raises(InvalidAccess):
        run(body, x)
    assert torch.equal(x.view(torch.int32), torch.arange(64, dtype=torch.int32))


def test_wrong_number_of_arguments():
    with (
        pytest.raises(EmulatorError, match="k has 1 parameters and got 2 arguments"),
        emulate(90) as e,
    ):
        e.run_ptx(kernel(""), [torch.zeros(1), 3], (1,))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"grid": (1, 70000)}, "a grid is at most"),
        ({"grid": (1, 1, 1, 1)}, "one to three numbers"),
        (
            {"shared_bytes": 300 * 1024},
            "300.* bytes of shared memory, and sm_90 has 232448|307200 bytes",
        ),
        ({"num_threads": 2048}, "reqntid 2048 is not 1 to 32 whole warps"),
    ],
    ids=["long_grid", "axes", "shared_memory", "threads"],
)
def test_launches_that_no_gpu_takes(arguments, match):
    with pytest.raises(EmulatorError, match=match):
        run("", torch.zeros(4), **arguments)


@pytest.mark.parametrize("arch", [33, 70, 100])
def test_architectures_that_are_not_emulated(arch):
    with pytest.raises(ValueError, match=f"arch must be one of 80, .* got {arch}"), emulate(arch):
        pass


@triton.jit
def _fill(x_ptr, value: tl.float32, half: tl.float16, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, value + half.to(tl.float32) + tl.zeros([BLOCK], tl.float32))


def test_numbers_become_what_parameters_are():
    x = torch.zeros(32)
    with emulate(90):
        _fill[(1,)](x, 2, 0.25, BLOCK=32)
    assert (x == 2.25).all()


def test_tensors_that_share_memory():
    """Also where torch sees storages of their own."""
    memory = np.zeros(256, np.float32)
    x, y = torch.from_numpy(memory), torch.from_numpy(memory[128:])
    with emulate(90):
        kernels.copy[(1,)](torch.ones(64), x, 64, BLOCK=64)
        kernels.copy[(1,)](torch.full((64,), 2.0), y, 64, BLOCK=64)

    @triton.jit
    def both(x_ptr, y_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(x_ptr + 64 + i, i * 0.0 + 3)
        tl.store(y_ptr + 64 + i, i * 0.0 + 4)

    with emulate(90):
        both[(1,)](x, y, BLOCK=64)
    assert memory.reshape(4, 64)[:, 0].tolist() == [1, 3, 2, 4]


def test_one_thread_at_a_time():
    errors = []

    def other():
        try:
            with emulate(90):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with emulate(80), emulate(90):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == ["another thread emulates: one at a time may"]
    other()
    assert len(errors) == 1


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), emulate(90):
        pass


def test_launches_are_real_again_after_it():
    run_method = triton.runtime.jit.JITFunction.run
    with emulate(90):
        assert triton.runtime.jit.JITFunction.run is not run_method
    assert triton.runtime.jit.JITFunction.run is run_method


def test_no_programs_and_no_elements():
    with emulate(90) as emulation:
        kernels.copy[(0,)](torch.zeros(4), torch.zeros(4), 4, BLOCK=128)
        kernels.copy[(1,)](torch.zeros(0), torch.zeros(0), 0, BLOCK=128)
    assert [launch.counts.total() > 0 for launch in emulation.launches] == [False, True]
