"""Atomics, and programs of a launch that wait for each other: values, races, endless waits, counts."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from ptx_emulator import (
    Deadlock,
    Options,
    Reported,
    StepLimit,
    UnsupportedInstruction,
    emulate,
    reports,
)
from ptx_emulator.program_order import MAX_CLOCKS, Ordered
from tests.emulated.ptx import kernel

both = pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
ORDERS = ["relaxed", "acquire", "release", "acq_rel"]
TOGETHER, IN_TURN = Options(), Options(threads_per_batch=64)


def run(body, *arguments, num_threads=64, grid=(1,), options=TOGETHER):
    """Run hand-written PTX; `Reported` if it did what it may not."""
    with emulate(90, options=options) as emulation:
        ptx = kernel(body, len(arguments), num_threads)
        emulation.run_ptx(ptx, list(arguments), grid, 4096)
    return emulation


def kinds_of(error):
    return {report.kind for report in error.value.reports}


# --- values ---------------------------------------------------------------------------------------------

# Of 64 threads, each at place `thread % 8` with the operand `thread - 20`.
INTEGERS = {
    "add.u32": lambda old, x: old + x,
    "add.s32": lambda old, x: old + x,
    "min.s32": min,
    "max.s32": max,
    "min.u32": lambda old, x: min(old, x, key=lambda n: n % 2**32),
    "max.u32": lambda old, x: max(old, x, key=lambda n: n % 2**32),
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
}


@pytest.mark.parametrize("order", ["", "acq_rel.gpu.", "relaxed.sys."])
@pytest.mark.parametrize("operation", INTEGERS)
def test_integers(operation, order):
    memory, found = torch.arange(8, dtype=torch.int32) - 3, torch.zeros(64, dtype=torch.int32)
    run(
        f"""
        ld.param.b64 %rd1, [k_param_0];
        ld.param.b64 %rd2, [k_param_1];
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 7;
        mad.wide.u32 %rd3, %r2, 4, %rd1;
        sub.s32 %r3, %r1, 20;
        atom.{order}global.{operation} %r4, [%rd3], %r3;
        mad.wide.u32 %rd4, %r1, 4, %rd2;
        st.global.b32 [%rd4], %r4;
        """,
        memory,
        found,
    )
    expected, before = [x - 3 for x in range(8)], []
    for thread in range(64):
        before.append(expected[thread % 8])
        expected[thread % 8] = INTEGERS[operation](expected[thread % 8], thread - 20)
    assert memory.tolist() == expected and found.tolist() == before


@pytest.mark.parametrize("bits, register", [(32, "%r"), (64, "%rd")])
def test_compare_and_swap(bits, register):
    """Each thread gives place 0 its successor's number if its own stands there; every third is idle."""
    memory = torch.tensor([0, 7], dtype=torch.int32 if bits == 32 else torch.int64)
    found = torch.full((64,), -1, dtype=memory.dtype)
    run(
        f"""
        ld.param.b64 %rd1, [k_param_0];
        ld.param.b64 %rd2, [k_param_1];
        mov.u32 %r1, %tid.x;
        rem.u32 %r2, %r1, 3;
        setp.ne.s32 %p1, %r2, 2;
        cvt.u64.u32 %rd3, %r1;
        mov.b{bits} {register}10, {"%r1" if bits == 32 else "%rd3"};
        add.s{bits} {register}11, {register}10, 1;
        mov.b{bits} {register}12, -1;
        @%p1 atom.global.cas.b{bits} {register}12, [%rd1], {register}10, {register}11;
        mad.wide.u32 %rd4, %r1, {bits // 8}, %rd2;
        st.global.b{bits} [%rd4], {register}12;
        """,
        memory,
        found,
    )
    assert memory.tolist() == [2, 7]
    assert found.tolist() == [0, 1] + [-1 if thread % 3 == 2 else 2 for thread in range(2, 64)]


def test_reductions_and_wide_numbers():
    memory = torch.tensor([2**40], dtype=torch.int64)
    body = """
        ld.param.b64 %rd1, [k_param_0];
        mov.b64 %rd2, 4294967296;
        red.release.gpu.global.add.u64 [%rd1], %rd2;
        """
    run(body, memory, grid=(3,))
    assert memory.item() == 2**40 + 3 * 64 * 2**32


def test_subnormal_sums_are_zero():
    tiny, normal = 2.0**-130, 2.0**-126
    memory = torch.tensor([tiny, normal, 1.5 * normal])
    operands = torch.tensor([tiny, tiny, -normal])
    body = """
        ld.param.b64 %rd1, [k_param_0];
        ld.param.b64 %rd2, [k_param_1];
        mov.u32 %r1, %tid.x;
        setp.lt.u32 %p1, %r1, 3;
        mad.wide.u32 %rd3, %r1, 4, %rd1;
        mad.wide.u32 %rd4, %r1, 4, %rd2;
        @%p1 ld.global.b32 %r2, [%rd4];
        @%p1 red.global.add.f32 [%rd3], %r2;
        """
    run(body, memory, operands, num_threads=32)
    assert memory.tolist() == [0.0, normal, 0.0]


def test_sums_of_halves_that_share_a_word():
    """Each program reads its own element, and adds to it."""
    x = torch.arange(6).half()
    body = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %ctaid.x;
        mad.wide.u32 %rd2, %r1, 2, %rd1;
        ld.global.b16 %rs1, [%rd2];
        bar.sync 0;
        mov.u32 %r2, %tid.x;
        setp.eq.s32 %p1, %r2, 0;
        @%p1 red.global.add.noftz.f16 [%rd2], %rs1;
        """
    run(body, x, grid=(6,))
    assert x.tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "instruction",
    [
        "atom.global.add.f64 %rd9, [%rd1], %rd2;",
        "atom.shared.add.u32 %r9, [%r1], %r2;",
        "atom.cta.global.add.u32 %r9, [%rd1], %r2;",
        "atom.global.inc.u32 %r9, [%rd1], %r2;",
        "atom.add.u32 %r9, [%rd1], %r2;",
        "red.global.exch.b32 [%rd1], %r2;",
    ],
)
def test_other_atomics_are_one_clear_error(instruction):
    with pytest.raises(UnsupportedInstruction, match="does not know this instruction"):
        run(instruction, torch.zeros(1))


@triton.jit
def _add_kernel(x_ptr, y_ptr, before_ptr, n, SEM: tl.constexpr, BLOCK: tl.constexpr):
    """Every program adds y to x; the first one's results say what was there before."""
    i = tl.arange(0, BLOCK)
    y = tl.load(y_ptr + i, mask=i < n)
    before = tl.atomic_add(x_ptr + i, y, mask=i < n, sem=SEM)
    tl.store(before_ptr + tl.program_id(0) * BLOCK + i, before, mask=i < n)


@both
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [500, 512])
def test_sums_of_programs(arch, dtype, order, n):
    """Vectors of several numbers, where the architecture has them."""
    x, y = torch.arange(512).to(dtype), (torch.arange(512) % 7).to(dtype)
    expected, before = x.clone(), torch.zeros(3, 512, dtype=dtype)
    expected[:n] += 3 * y[:n]
    sums = torch.stack([x + k * y for k in range(3)])
    with emulate(arch):
        _add_kernel[(3,)](x, y, before, n, SEM=order, BLOCK=512, num_warps=2)
    assert torch.equal(x, expected) and torch.equal(before[:, :n], sums[:, :n])


def test_sums_of_bfloat16():
    x, y = torch.arange(512).bfloat16(), (torch.arange(512) % 7).bfloat16()
    expected = (x.float() + y.float()).bfloat16()
    with emulate(90):
        _add_kernel[(1,)](
            x, y, torch.zeros(512).bfloat16(), 512, SEM="relaxed", BLOCK=512, num_warps=2
        )
    assert torch.equal(x, expected)


@triton.jit
def _exchange_kernel(x_ptr, found_ptr, SEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    scalar = tl.atomic_cas(x_ptr, 0, 10, sem=SEM)
    scalar = scalar * 100 + tl.atomic_xchg(x_ptr, 3, sem=SEM)
    tl.store(found_ptr, scalar)
    found = tl.atomic_cas(x_ptr + i, i + 1, -i, sem=SEM)
    found = found * 100 + tl.atomic_xchg(x_ptr + i, i, mask=i < 100, sem=SEM)
    tl.store(found_ptr + 1 + i, found)


@both
@pytest.mark.parametrize("order", ORDERS)
def test_exchanges(arch, order):
    x, found = torch.tensor([0, *range(2, 129)]).int(), torch.zeros(129, dtype=torch.int32)
    with emulate(arch):
        _exchange_kernel[(1,)](x, found, SEM=order, BLOCK=128, num_warps=4)
    i = torch.arange(128)
    now = torch.where(i == 0, 3, -i)  # a 3 is not the 1 that place 0 expects
    before = torch.where(i == 0, 3, i + 1) * 100 + now
    assert found.tolist()[:101] == [10, *before[:100].tolist()]
    assert torch.equal(x, torch.where(i < 100, i, now).int())


# --- programs that wait ---------------------------------------------------------------------------------


@triton.jit
def _chain_kernel(counters_ptr, x_ptr, n, BLOCK: tl.constexpr, N: tl.constexpr):
    """In the order of their tickets programs add 1 to the row of the program before, and store it."""
    i = tl.arange(0, BLOCK)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < ticket:
        pass
    x = tl.load(x_ptr + ticket * BLOCK + i)
    tl.store(x_ptr + (ticket + 1) * BLOCK + i, x + 1)
    tl.debug_barrier()
    tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel")


@both
def test_tickets(arch):
    """Counts are the same however many programs run at once."""
    found = []
    for options in (
        Options(memory_counts=True),
        Options(threads_per_batch=256, memory_counts=True),
        Options(resident_programs=1, memory_counts=True),
    ):
        counters, x = torch.zeros(2, dtype=torch.int32), torch.zeros(11, 128)
        with emulate(arch, options=options) as emulation:
            _chain_kernel[(10,)](counters, x, 10, BLOCK=128, N=10, num_warps=4)
        assert counters.tolist() == [10, 10]
        assert torch.equal(x, torch.arange(11.0)[:, None].expand(11, 128))
        found.append(emulation.launches[0].counts)
    assert found[0] == found[1] == found[2]
    # A ticket, a look at the counter, and an addition to it; the rows.
    assert found[0]["bytes_read"] == 10 * (4 + 4 * 128)
    assert found[0]["bytes_written"] == 10 * (4 + 4 + 4 * 128)


@triton.jit
def _rounds_kernel(counters_ptr, x_ptr, y_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program's row becomes the sum of all, round after round, in two buffers that change places."""
    i = tl.arange(0, BLOCK)
    row, rows = tl.program_id(0), tl.num_programs(0)
    for step in range(ROUNDS):
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(rows):
            total += tl.load(x_ptr + other * BLOCK + i)
        tl.store(y_ptr + row * BLOCK + i, total)
        tl.debug_barrier()
        tl.atomic_add(counters_ptr, 1, sem="acq_rel")
        while tl.atomic_add(counters_ptr, 0, sem="acquire") < (step + 1) * rows:
            pass
        x_ptr, y_ptr = y_ptr, x_ptr


def without_waits(_, ptx):
    """Whatever a loop waits for, it goes on at once."""
    lines = ptx.splitlines()
    end = [i for i, line in enumerate(lines) if "setp.lt.s32" in line and "bra" in lines[i + 1]]
    assert end, ptx
    return "\n".join(x for i, x in enumerate(lines) if i - 1 not in end)


@both
@pytest.mark.parametrize(
    "threads, waits",
    # Without waiting, programs that run in lockstep find the counter as high as they need it.
    [(128, True), (8192, True), (128, False)],
)
def test_buffers_that_programs_read_and_write_in_turn(arch, threads, waits):
    counters, x, y = torch.zeros(1, dtype=torch.int32), torch.ones(5, 128), torch.zeros(5, 128)
    options, edit = Options(threads_per_batch=threads), None if waits else without_waits
    with emulate(arch, options=options, check=False, edit=edit) as emulation:
        _rounds_kernel[(5,)](counters, x, y, ROUNDS=3, BLOCK=128, num_warps=4)
    if waits:
        assert not emulation.reports and (y == 125).all() and (x == 25).all()
    else:
        kinds = {report.kind for report in emulation.reports}
        assert kinds == {reports.FOREIGN_READ, reports.FOREIGN_WRITE}


@triton.jit
def _sum_under_lock(lock_ptr, x_ptr, RELEASE: tl.constexpr):
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
        pass
    tl.store(x_ptr, tl.load(x_ptr) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0, sem=RELEASE)


@both
@pytest.mark.parametrize("release", ["release", "relaxed"])
def test_a_lock(arch, release):
    lock, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with emulate(arch, check=False) as emulation:
        _sum_under_lock[(20,)](lock, x, RELEASE=release, num_warps=1)
    assert lock.item() == 0 and x.item() == 20
    kinds = {report.kind for report in emulation.reports}
    assert kinds == (
        set() if release == "release" else {reports.FOREIGN_READ, reports.FOREIGN_WRITE}
    )


@triton.jit
def _hand_over(
    flag_ptr, x_ptr, y_ptr,
    FLAG: tl.constexpr, WAIT: tl.constexpr, BARRIER: tl.constexpr, PRODUCER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes x, the other one reads it when a flag says so."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == PRODUCER:
        tl.store(x_ptr + i, i.to(tl.float32))
        if BARRIER:
            tl.debug_barrier()
        if FLAG == "store":
            tl.store(flag_ptr, 1)
        else:
            tl.atomic_xchg(flag_ptr, 1, sem=FLAG)
    else:
        if WAIT == "volatile":
            while tl.load(flag_ptr, volatile=True) == 0:
                pass
        else:
            while tl.atomic_or(flag_ptr, 0, sem=WAIT) == 0:
                pass
        tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize("options", [IN_TURN, TOGETHER], ids=["in_turn", "together"])
@pytest.mark.parametrize("producer", [0, 1])
@pytest.mark.parametrize(
    "flag, wait, barrier, faulty",
    [
        ("release", "acquire", True, False),
        ("acq_rel", "acq_rel", True, False),
        ("release", "acquire", False, True),  # of one warp's part of x
        ("relaxed", "acquire", True, True),
        ("release", "relaxed", True, True),
        ("release", "volatile", True, True),
        ("store", "acquire", True, True),
    ],
)
@both
def test_a_program_hands_over(arch, flag, wait, barrier, faulty, producer, options):
    flags, x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(128), torch.zeros(128)
    with emulate(arch, options=options, check=False) as emulation:
        _hand_over[(2,)](
            flags, x, y, FLAG=flag, WAIT=wait, BARRIER=barrier, PRODUCER=producer, BLOCK=128, num_warps=4
        )  # fmt: skip
    assert torch.equal(y, torch.arange(128.0))  # here, where nothing is reordered
    assert {report.kind for report in emulation.reports} == (
        {reports.FOREIGN_READ} if faulty else set()
    )


# Program 0 stores 5 at x[thread], then raises a flag; program 1 waits for that, and reads x[63 - thread].
FENCED = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    sub.s32 %r3, 63, %r1;
    mad.wide.u32 %rd4, %r3, 4, %rd2;
    mov.b32 %r4, 1;
    setp.eq.s32 %p1, %r1, 0;
    setp.eq.s32 %p2, %r2, 1;
    @%p2 bra $WAIT;
    st.global.b32 [%rd3], 5;
    bar.sync 0;
    {raise_flag}
    bra $END;
$WAIT:
    {wait}
    setp.eq.s32 %p3, %r5, 0;
    @%p3 bra $WAIT;
    {after}
    ld.global.b32 %r6, [%rd4];
    st.global.b32 [%rd4+256], %r6;
$END:
"""
RELEASES = {
    "release": "@%p1 st.release.gpu.global.b32 [%rd1], %r4;",
    "fence": "fence.acq_rel.gpu; @%p1 st.relaxed.gpu.global.b32 [%rd1], %r4;",
    "membar": "membar.gl; @%p1 st.volatile.global.b32 [%rd1], %r4;",
    "atomic": "fence.acq_rel.sys; @%p1 red.relaxed.gpu.global.add.u32 [%rd1], %r4;",
    "none": "@%p1 st.relaxed.gpu.global.b32 [%rd1], %r4;",
    "of the program": "fence.acq_rel.cta; @%p1 st.relaxed.gpu.global.b32 [%rd1], %r4;",
}
ACQUIRES = {
    "acquire": ("ld.acquire.gpu.global.b32 %r5, [%rd1];", ""),
    "fence": ("ld.relaxed.gpu.global.b32 %r5, [%rd1];", "fence.acq_rel.gpu;"),
    "membar": ("ld.volatile.global.b32 %r5, [%rd1];", "membar.gl;"),
    "none": ("ld.relaxed.gpu.global.b32 %r5, [%rd1];", ""),
}


@pytest.mark.parametrize("options", [IN_TURN, TOGETHER], ids=["in_turn", "together"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("acquire", ACQUIRES)
def test_fences(release, acquire, options):
    wait, after = ACQUIRES[acquire]
    body = FENCED.format(raise_flag=RELEASES[release], wait=wait, after=after)
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    faulty = release in ("none", "of the program") or acquire == "none"
    with pytest.raises(Reported) if faulty else contextlib.nullcontext() as error:
        run(body, flag, x, grid=(2,), options=options)
    assert not faulty or kinds_of(error) == {reports.FOREIGN_READ}
    assert x.tolist() == [5] * 128


@pytest.mark.parametrize(
    "wait", ["ld.global.b32 %r5, [%rd1];", "ld.acquire.cta.global.b32 %r5, [%rd1];"]
)
def test_loads_that_order_no_programs(wait):
    """The flag is up already, so that the loop is none."""
    body = FENCED.format(raise_flag=RELEASES["release"], wait=wait, after="")
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    with pytest.raises(Reported) as error:
        run(body, flag, x, grid=(2,), options=IN_TURN)
    assert kinds_of(error) == {reports.FOREIGN_READ}
    assert len(error.value.reports) == 2  # of the flag and of x


@pytest.mark.parametrize("again", ["", "@%p4 ld.acquire.gpu.global.b32 %r5, [%rd1];"])
@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_the_warps_beside_the_one_that_acquires(barrier, again):
    """Of program 1 all warps see the flag, and the first one alone acquires what comes with it."""
    wait = """
        setp.lt.u32 %p4, %r1, 32;
        @%p4 ld.acquire.gpu.global.b32 %r5, [%rd1];
        @!%p4 ld.relaxed.gpu.global.b32 %r5, [%rd1];
        """
    body = FENCED.format(raise_flag=RELEASES["release"], wait=wait, after=again + barrier)
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    with contextlib.nullcontext() if barrier else pytest.raises(Reported) as error:
        run(body, flag, x, grid=(2,))
    assert barrier or kinds_of(error) == {reports.FOREIGN_READ}


@pytest.mark.parametrize("told", [True, False])
def test_what_a_program_was_told_it_tells_on(told):
    """Program 0 writes x and tells program 1, which tells program 2, which reads x.

    A store replaces what another one has released, so that program 1 must know of x itself.
    """
    body = f"""
        ld.param.b64 %rd1, [k_param_0];
        ld.param.b64 %rd2, [k_param_1];
        mov.u32 %r1, %ctaid.x;
        add.s32 %r2, %r1, 1;
        setp.ne.s32 %p1, %r1, 0;
        @%p1 bra $WAIT;
        st.global.b32 [%rd2], 5;
    $WAIT:
        ld.{"acquire" if told else "relaxed"}.gpu.global.b32 %r3, [%rd1];
        setp.lt.s32 %p2, %r3, %r1;
        @%p2 bra $WAIT;
        setp.ne.s32 %p3, %r1, 2;
        @%p3 bra $TELL;
        ld.acquire.gpu.global.b32 %r3, [%rd1];
        ld.global.b32 %r4, [%rd2];
        st.global.b32 [%rd2+4], %r4;
    $TELL:
        mov.u32 %r5, %tid.x;
        setp.eq.s32 %p4, %r5, 0;
        @%p4 st.release.gpu.global.b32 [%rd1], %r2;
        """
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with contextlib.nullcontext() if told else pytest.raises(Reported) as error:
        run(body, flag, x, grid=(3,), num_threads=32)
    assert told or kinds_of(error) == {reports.FOREIGN_READ}
    assert x.tolist() == [5, 5]


WITH_READERS = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %tid.x;
    setp.eq.s32 %p2, %r1, 2;
    @%p2 bra $WAIT;
    ld.global.b32 %r3, [%rd2];
    setp.{tells}.s32 %p4, %r1, {reader};
    setp.eq.s32 %p1, %r2, 0;
    and.pred %p4, %p4, %p1;
    @%p4 red.{order}.gpu.global.add.u32 [%rd1], 1;
    {then}
    bra $END;
$WAIT:
    ld.acquire.gpu.global.b32 %r4, [%rd1];
    setp.lt.s32 %p3, %r4, {needed};
    @%p3 bra $WAIT;
    st.global.b32 [%rd2], 7;
$END:
"""


@pytest.mark.parametrize(
    "order, tells, reader, needed, then, faulty",
    [
        pytest.param("release", "le", 1, 2, "", False, id="both tell"),
        pytest.param("relaxed", "le", 1, 2, "", True, id="without release"),
        pytest.param("release", "eq", 0, 1, "", True, id="only the first"),
        pytest.param("release", "eq", 1, 1, "", True, id="only the second"),
        pytest.param("release", "le", 1, 2, "ld.global.b32 %r3, [%rd2];", True, id="read again"),
    ],
)
@pytest.mark.parametrize(
    "options", [Options(threads_per_batch=32), TOGETHER], ids=["in_turn", "together"]
)
def test_a_program_that_overwrites_what_others_have_read(
    order, tells, reader, needed, then, faulty, options
):
    body = WITH_READERS.format(order=order, tells=tells, reader=reader, needed=needed, then=then)
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Reported) if faulty else contextlib.nullcontext() as error:
        run(body, flag, x, grid=(3,), num_threads=32, options=options)
    assert not faulty or kinds_of(error) <= {reports.FOREIGN_READ, reports.FOREIGN_WRITE}
    assert x.item() == 7


# --- waits without an end -------------------------------------------------------------------------------


@triton.jit
def _wait_for(counter_ptr, x_ptr, number, LATER: tl.constexpr):
    """Until the counter has a number; if LATER only the last program raises it."""
    if LATER and tl.program_id(0) == tl.num_programs(0) - 1:
        tl.atomic_add(counter_ptr, number, sem="release")
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < number:
            pass
        tl.store(x_ptr + tl.program_id(0), 1)


@both
def test_a_wait_that_never_ends(arch):
    counter, x = torch.tensor([3], dtype=torch.int32), torch.zeros(4)
    with pytest.raises(
        Deadlock, match="line .*test_ptx_atomics.py:.*another program to write"
    ) as error:
        with emulate(arch, options=Options(max_iterations=10)):
            _wait_for[(4,)](counter, x, 4, LATER=False)
    assert "no program goes on" in str(error.value) and "program 0" in str(error.value)
    with emulate(arch):
        _wait_for[(4,)](counter, x, 3, LATER=False)
    assert x.tolist() == [1, 1, 1, 1]


def test_a_lock_that_nobody_opens():
    """The attempts write, but nothing new."""
    lock, x = torch.ones(1, dtype=torch.int32), torch.zeros(1)
    with pytest.raises(Deadlock, match="atom.global"), emulate(90):
        _sum_under_lock[(2,)](lock, x, RELEASE="release", num_warps=1)


@pytest.mark.parametrize("threads", [128, 8192])
def test_programs_that_must_run_at_once(threads):
    """A device that holds five programs has no room for the one that the others wait for."""
    for resident in (6, None, 5):
        counter, x = torch.zeros(1, dtype=torch.int32), torch.zeros(6)
        options = Options(threads_per_batch=threads, resident_programs=resident)
        if resident == 5:
            with (
                pytest.raises(Deadlock, match="no program begins beside 5"),
                emulate(90, options=options),
            ):
                _wait_for[(6,)](counter, x, 4, LATER=True)
        else:
            with emulate(90, options=options):
                _wait_for[(6,)](counter, x, 4, LATER=True)
            assert x.tolist() == [1, 1, 1, 1, 1, 0]


@triton.jit
def _try_a_while(counter_ptr, x_ptr, N: tl.constexpr):
    tries = 0
    while (tl.load(counter_ptr, volatile=True) == 0) & (tries < N):
        tries += 1
    tl.store(x_ptr, tries)


def test_who_counts_tries_does_not_wait():
    counter, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with emulate(90) as emulation:
        _try_a_while[(1,)](counter, x, N=50, num_warps=1)
    assert x.item() == 50 and emulation.launches[0].counts["bytes_read"] == 51 * 32 * 4


@triton.jit
def _count_on(counter_ptr):
    while tl.atomic_add(counter_ptr, 1, sem="relaxed") >= 0:
        pass


def test_a_loop_that_writes_does_not_wait():
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(StepLimit), emulate(90, options=Options(max_iterations=100)):
        _count_on[(1,)](counter, num_warps=1)
    assert counter.item() > 100


def test_so_many_programs_are_refused():
    programs = int((MAX_CLOCKS / 5) ** 0.5)
    Ordered(16, programs - 1, 4)
    with pytest.raises(UnsupportedInstruction, match=f"launch of {programs + 1} programs"):
        Ordered(16, programs + 1, 4)
