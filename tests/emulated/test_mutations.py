"""The emulator's own oracle: compiled PTX broken in one place at a time, and what it says of that.

A mutant is caught if its output differs in a bit, if something is reported, or if it fails. Whoever survives
is in the list of its kernel, with why: it computes the same on every GPU, or on the shapes here. The list is
exact, so that a hole in the emulator is a test that fails, and so is a reason that no longer holds. It is
for one version of Triton: other compilers number barriers in other ways.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.emulation import emulated_device
from lact_kernels.core.attention import AttentionOptions
from lact_kernels.triton.fast_weights.layout import Dims, Run
from lact_kernels.triton.fast_weights.products import ttt_outer
from lact_kernels.triton.window_attn.fwd import window_attn_fwd
from ptx_emulator import EmulatorError, Options, UnsupportedInstruction
from tests.cases import filled_with_nan
from tests.emulated.mutations import Mutant, mutants, without

TRITON = "3.6.0"

# --- kernels --------------------------------------------------------------------------------------------


def attention(*cases: tuple[int, ...]) -> Iterator[tuple[Tensor, ...]]:
    """A launch for each (B, Tq, Tk, H, W)."""
    for B, Tq, Tk, H, W in cases:
        shapes = (B, Tq, H, 64), (B, Tk, H, 64), (B, Tk, H, 64)
        q, k, v = (torch.randn(shape, dtype=torch.float64).to(torch.bfloat16) for shape in shapes)
        yield window_attn_fwd(q, k, v, AttentionOptions(W - 1, 0, 0.125))


def outer() -> Iterator[tuple[Tensor, ...]]:
    """Less than one step over tokens, then six with a ragged end. Integers, of which sums are exact."""
    dims = Dims(Dk=128, Dv=48, Dh=208)
    for T, H in ((7, 2), (310, 1)):
        x, y, acts = (
            torch.randint(-8, 9, shape).to(torch.bfloat16)
            for shape in ((1, T, H, dims.Dk), (1, T, H, dims.Dv), (3, H, T, dims.Dh))
        )
        out = torch.empty(1, 1, H, dims.size)
        run = Run(
            num_chunks=1, table=None, place=0, first_chunk=0, first_row=0,
            B=1, T=T, shift=0, chunk_size=T, width=T,
        )  # fmt: skip
        ttt_outer(x, y, acts, out, dims)(run)
        yield (out,)


@triton.jit
def _tma_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m = tl.program_id(0) * BLOCK_M
    for n in range(0, N, BLOCK_N):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=3):
            acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
        c.store([m, n], acc.to(tl.bfloat16))


def tma_matmul() -> Iterator[tuple[Tensor, ...]]:
    """One step for one tile; then six on three buffers for each of three, which leave through one buffer."""
    for M, N, K in ((64, 64, 64), (96, 136, 328)):
        a, b = (torch.randint(-8, 9, shape).to(torch.bfloat16) for shape in ((M, K), (K, N)))
        c = torch.empty(M, N, dtype=torch.bfloat16)
        _tma_matmul_kernel[(triton.cdiv(M, 64),)](
            a, b, c, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4
        )
        yield (c,)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kernel to break: `steps` has the kinds of mutations, of which every so manieth place is broken."""

    arch: int
    launch: Callable[[], Iterator[tuple[Tensor, ...]]]  # the outputs of one launch after the other
    at_least: int  # mutants
    steps: dict[str, int]
    # Why, and the places of each kind.
    survivors: tuple[tuple[str, dict[str, tuple[int, ...]]], ...]

    def surviving(self, kind: str) -> dict[int, str]:
        return {place: why for why, kinds in self.survivors for place in kinds.get(kind, ())}


# Why a mutant survives.
FIRST_USE = "before a buffer is used, or between copies to different ones, after an earlier barrier"
DRAINED = (
    "the loop's last barrier came after its last reads, and each warp writes where only it copied"
)
MERGED = "the group becomes one with the next one, for which every wait waits that waits for it"
UNREAD = "what is in flight fills buffers that nobody touches again"
ONE_PITCH = "64 rows or columns are one pitch of the swizzle: there is no second to be led to"
UNIFORM = "all lanes of a warp have the number of the warp"
ONE_WARP = "all that is done on both sides is done by warp 0"
NOT_ALONE = "other barriers stand between what both sides do: see test_barriers_that_stand_in"
ONE_PHASE = "the mbarrier has one phase, whose parity is 0"
UNUSED_AFTERWARDS = "nothing else is put where the mbarrier was"
NO_GROUP = "there is no bulk copy from shared memory in this group, or in flight"
ORDER = dict.fromkeys(
    (
        "no bar.sync", "no cp.async.wait_group", "cp.async.wait_group of one more",
        "no cp.async.commit_group", "no wgmma.wait_group", "wgmma.wait_group of one more",
        "no wgmma.commit_group", "no wgmma.fence", "no fence.proxy.async",
    ),
    1,
) | {"no cp.async.commit_group": 2}  # fmt: skip
MEMORY = {
    "load without its mask": 3, "store without its mask": 3, "copy without its mask": 11,
    "shared address off by 16": 5, "ldmatrix off by 16 from 0": 9, "swizzle of an address": 11,
    "ldmatrix transposes the other way": 45, "shuffle distance": 11,
}  # fmt: skip
VALUES = {
    "comparison with or without equality": 49, "number added off by one": 18,
    "shift by one more": 31, "bit lost from a mask": 19, "no ex2": 90, "min for max": 90,
    "conversion truncates": 61, "conversion exchanges halves": 80, "selection exchanged": 61,
    "shuffle from the next lane": 1, "branch negated": 3,
}  # fmt: skip
WGMMA = {
    "descriptor with 64 bytes of swizzle": 1, "descriptor stride off by 128": 1,
    "descriptor leading offset off by 128": 1, "descriptor start off by 16": 1,
    "wgmma transposes the other way": 1, "wgmma descriptors exchanged": 1, "wgmma scale-d": 1,
}  # fmt: skip
MBARRIERS = {
    "no wait for an mbarrier": 1, "parity always 0": 3, "parity always 1": 1,
    "wait for the next mbarrier": 1, "no mbarrier.init": 3, "mbarrier of two arrivals": 4,
    "no mbarrier.inval": 4, "no expect_tx": 2, "half the bytes expected": 4,
    "more bytes expected": 4, "no bulk load": 4, "outer coordinates exchanged": 3,
    "bulk load from the next row": 2, "bulk load to the next row": 3,
    "bulk load announced at the next mbarrier": 3,
}  # fmt: skip
SUBJECTS = {
    "attention_sm_90": Subject(
        # A single tile, which both limits of the window cross. Then loops that come back to buffers: there
        # one limit crosses the second tile, the other the last but one, and the first window of a tile
        # begins at the last key of one.
        90, functools.partial(attention, (2, 128, 125, 2, 3), (1, 133, 648, 2, 389)), 120,
        {k: step for k, step in ORDER.items() if "cp.async" not in k} | VALUES | MBARRIERS
        | dict.fromkeys(WGMMA, 9) | {
            "descriptor leading offset off by 128": 17, "descriptor stride off by 128": 17,
            "descriptor with 64 bytes of swizzle": 17, "wgmma registers exchanged": 9,
            "store without its mask": 4, "shared address off by 16": 1, "ldmatrix off by 16 from 0": 1,
            "ldmatrix transposes the other way": 3, "swizzle of an address": 1, "shuffle distance": 11,
            "comparison with or without equality": 37, "selection exchanged": 53, "branch negated": 2,
        },
        (
            (ONE_WARP, {"no bar.sync": (4,)}),
            (NOT_ALONE, {"no bar.sync": (0, 1, 2, 5, 6, 7, *range(9, 28))}),
            (ONE_PHASE, {"parity always 0": (0,)}),
            (UNUSED_AFTERWARDS, {"no mbarrier.inval": (4, 8)}),
            (ONE_PITCH, {"descriptor leading offset off by 128": (0, 17)}),
            (UNIFORM, {"shuffle from the next lane": (0,)}),
        ),
    ),
    "attention_sm_80": Subject(
        # Few keys; then loops that come back to each buffer, and tiles cut by T, by W and by the diagonal,
        # as above.
        80, functools.partial(attention, (2, 128, 4, 2, 3), (1, 133, 650, 1, 391)), 60,
        {k: step for k, step in ORDER.items() if "wgmma" not in k and "proxy" not in k} | MEMORY | {
            "ldmatrix off by 16": 37, "mma rows and columns of a exchanged": 131,
            "mma halves of b exchanged": 131, "comparison with or without equality": 61,
            "selection exchanged": 101,
        },
        (
            (FIRST_USE, {"no bar.sync": (0, 4)}),
            (DRAINED, {"no bar.sync": (3, 7)}),
            (
                UNREAD,
                {"no cp.async.wait_group": (3,), "cp.async.wait_group of one more": (3,)},
            ),
            (MERGED, {"no cp.async.commit_group": (0, 6)}),
        ),
    ),
    "outer_sm_90": Subject(
        90, outer, 80,
        {k: step for k, step in ORDER.items() if "proxy" not in k} | dict.fromkeys(WGMMA, 3) | {
            "store without its mask": 5, "copy without its mask": 5,
            "comparison with or without equality": 4, "number added off by one": 5,
            "shared address off by 16": 9, "swizzle of an address": 2, "shift by one more": 7,
            "bit lost from a mask": 5, "shuffle from the next lane": 1, "selection exchanged": 19,
            "branch negated": 1,
        },
        (
            (FIRST_USE, {"no bar.sync": (0,)}),
            (MERGED, {"no cp.async.commit_group": (0,)}),
            (ONE_PITCH, {"descriptor leading offset off by 128": (0, 6)}),
            (UNIFORM, {"shuffle from the next lane": (0,)}),
            (
                "the first token of the first step, which is 0 where a sum is not in parts",
                {"shift by one more": (14,)},
            ),
            (
                "another step, over no tokens, where their number is a multiple of 64: none is here",
                {"comparison with or without equality": (8, 20)},
            ),
            (
                "of rows 48 to 63 of the second step, or 0 to 15 of a later one: no T here ends there",
                {"comparison with or without equality": (12, 16)},
            ),
            (
                "of rows 32 to 48 of a later step, which all exist wherever one does",
                {"number added off by one": (25,)},
            ),
            (
                "of rows 112 to 119 of a tile: neither Dv nor Dh ends there",
                {"comparison with or without equality": (28,)},
            ),
            ("divides by 64 bits instead of 32", {"branch negated": (0,)}),
        ),
    ),
    "tma_matmul_sm_90": Subject(
        90, tma_matmul, 120,
        {k: step for k, step in ORDER.items() if "cp.async" not in k} | dict.fromkeys(WGMMA, 3) | {
            "stmatrix off by 16 from 0": 3, "stmatrix transposes": 3, "stmatrix registers exchanged": 3,
            "swizzle of an address": 2, "conversion truncates": 9, "conversion exchanges halves": 9,
            "selection exchanged": 1, "comparison with or without equality": 3, "branch negated": 1,
            "no wait for an mbarrier": 1, "parity always 0": 1, "parity always 1": 1,
            "no mbarrier.init": 1, "mbarrier of two arrivals": 1, "no expect_tx": 1,
            "half the bytes expected": 1, "more bytes expected": 1, "no bulk load": 2,
            "no bulk store": 1, "no cp.async.bulk.commit_group": 1, "no cp.async.bulk.wait_group": 1,
            "coordinates exchanged": 3, "box of half the size": 2, "swizzle of the tensor map": 1,
            "elements of four bytes": 2, "no extent of the tensor": 1, "no stride of the tensor": 1,
            "no address of the tensor": 2, "tensor map not published": 1,
            "no fence.proxy.tensormap": 1,
        },
        (
            (ONE_WARP, {"no bar.sync": (0, 1, 2, 3, 4, 6, 7)}),
            (
                NOT_ALONE,
                {"no bar.sync": (5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)},
            ),
            ("nothing comes after it", {"no bar.sync": (22,)}),
            (ONE_PITCH, {"descriptor leading offset off by 128": (0, 3, 6)}),
            (
                NO_GROUP,
                {
                    "no cp.async.bulk.commit_group": (0, 1, 2),
                    "no cp.async.bulk.wait_group": (0, 1, 2),
                },
            ),
            (
                "K is no multiple of 64 here, or too short",
                {"comparison with or without equality": (6,)},
            ),
        ),
    ),
}  # fmt: skip

# --- running them ---------------------------------------------------------------------------------------


@functools.cache
def unbroken(name: str) -> tuple[list[list[Tensor]], str]:
    """What each launch of the kernel computes, and its PTX."""
    assert triton.__version__ == TRITON, (
        f"the survivors are listed for Triton {TRITON}, and this is {triton.__version__}"
    )
    seen = set()
    outputs = []
    for launched, reports in run(name, lambda ptx: seen.add(ptx) or ptx):
        assert not reports, "\n".join(map(str, reports))
        outputs.append(launched)
    (ptx,) = seen
    return outputs, ptx


def run(name: str, edit: Callable[[str], str]) -> Iterator[tuple[list[Tensor], list]]:
    """After each launch the bits of its outputs, of which what is not written is NaN, and all reports."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    options = Options(max_iterations=30, stop_at_report=True)
    with (
        filled_with_nan(),
        emulated_device(
            subject.arch, check=False, edit=lambda _, ptx: edit(ptx), options=options
        ) as emulation,
    ):
        try:
            for outputs in subject.launch():
                yield [bits(x) for x in outputs], emulation.reports
        except EmulatorError as error:
            if not emulation.launches:
                raise  # this was no kernel
            yield [], [error]


def bits(x: Tensor) -> Tensor:
    """All NaN are the same."""
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32}[x.itemsize])


def is_caught(name: str, ptx: str) -> bool:
    """By the first launch, which is the cheapest, or else by a later one: after it nothing need be run."""
    with contextlib.closing(run(name, lambda _: ptx)) as launches:
        return any(
            reports or not all(map(torch.equal, outputs, expected))
            for (outputs, reports), expected in zip(launches, unbroken(name)[0])
        )


def mutants_of(name: str, kind: str) -> list[Mutant]:
    return list(mutants(unbroken(name)[1], kind, SUBJECTS[name].steps[kind]))


def in_its_group(name: str, *values):
    """One worker breaks one kernel: it compiles it, and runs it unbroken, once."""
    return pytest.param(
        name, *values, marks=pytest.mark.xdist_group(name), id="-".join((name, *map(str, values)))
    )


def spared_together(name: str, barriers: list[int]) -> set[int]:
    """Which of these the kernel does without when every second one is gone, and so when one alone is.

    Barriers only add order. Two launches then stand for as many as there are barriers.
    """
    ptx = unbroken(name)[1]
    halves = (barriers[::2], barriers[1::2])
    return {
        place
        for half in halves
        if not is_caught(name, without(ptx, "no bar.sync", tuple(half)))
        for place in half
    }


@pytest.mark.parametrize(
    "name, kind", [in_its_group(name, kind) for name in SUBJECTS for kind in SUBJECTS[name].steps]
)
def test_mutants_are_caught_or_cannot_be(name, kind):
    surviving = SUBJECTS[name].surviving(kind)
    broken = mutants_of(name, kind)
    spared = spared_together(name, sorted(surviving)) if kind == "no bar.sync" else set()
    caught = {x for x in broken if x.place not in spared and is_caught(name, x.ptx)}
    missed = [str(x) for x in broken if x not in caught and x.place not in surviving]
    stale = [f"{x}: {surviving[x.place]}" for x in caught if x.place in surviving]
    assert not missed, "not caught:\n" + "\n".join(missed)
    assert not stale, "caught, though listed as survivors:\n" + "\n".join(stale)
    assert surviving.keys() <= {x.place for x in broken}, "listed, but not broken"


@pytest.mark.parametrize("name", [in_its_group(name) for name in SUBJECTS])
def test_there_are_enough_mutants(name):
    """Of each kind one, and so many in all that the three kernels have far more than a hundred."""
    numbers = {kind: len(mutants_of(name, kind)) for kind in SUBJECTS[name].steps}
    assert all(numbers.values()), numbers
    assert sum(numbers.values()) >= SUBJECTS[name].at_least, numbers


@pytest.mark.parametrize(
    "name, places",
    [
        # From the making of an mbarrier up to the first wait for it.
        in_its_group("attention_sm_90", (0, 1, 2)),
        in_its_group("attention_sm_90", (5, 6, 7)),
        in_its_group("attention_sm_90", tuple(range(9, 17))),
        in_its_group("attention_sm_90", (25, 26, 27)),
        # From the last read of a buffer up to the next copy to it.
        in_its_group("attention_sm_90", (17, 18, 19)),
        # From the last wait for an mbarrier up to its end.
        in_its_group("attention_sm_90", tuple(range(18, 25))),
        # From the making of an mbarrier up to the first wait for it.
        in_its_group("tma_matmul_sm_90", tuple(range(10, 19))),
        # From the last read of a buffer up to the next copy to it.
        in_its_group("tma_matmul_sm_90", (19, 20, 21)),
    ],
)
def test_barriers_that_stand_in(name, places):
    """Of several barriers each can be spared, but not all."""
    assert is_caught(name, without(unbroken(name)[1], "no bar.sync", places))


@pytest.mark.parametrize("name", [in_its_group("tma_matmul_sm_90")])
def test_a_mutant_that_is_no_kernel_is_an_error(name):
    """So that nothing counts as caught that the emulator has only not understood."""
    with pytest.raises(UnsupportedInstruction, match="does not know this instruction"):
        is_caught(name, unbroken(name)[1].replace("cvt.rn.bf16x2", "cvt.rz.bf16x2"))
