"""`block_causal_ttt` on its Triton kernels, through the public function, against the reference.

Without a GPU they run in Triton's interpreter in float32, with blocks so small that few tokens straddle
every edge. 16-bit dtypes, the blocks of the table, sums in parts and the sets of options that are in
`emulated/test_block_causal_ttt.py` are left to it: it runs what is compiled and takes less time. The tests
marked `gpu` run with the blocks of the table, too. The interpreter takes its time for each program: where
heads are no point of a case there are few.
"""

import dataclasses
import functools

import pytest
import torch

import reference
from benchmarks.compile_report import fast_weight_cases
from benchmarks.launches import count_launches
from lact_kernels import block_causal_ttt, ttt_update
from lact_kernels.core import call as core_call
from lact_kernels.triton import configs, launch
from lact_kernels.triton.configs import TTTConfig
from lact_kernels.triton.fast_weights import scan
from tests.cases import (
    FLOAT16_MUON,
    PACKED,
    TTT_OPTIONS,
    TTT_SHAPES,
    TTTCase,
    check_block_causal_ttt,
    check_float16_muon,
    filled_with_nan,
    laid_out,
)
from tests.ttt_pieces import in_pieces

ON_CPU = not torch.cuda.is_available()
DEVICE = "cpu" if ON_CPU else "cuda"
needs_interpreter = pytest.mark.skipif(not ON_CPU, reason="runs in the interpreter only")

triton_block_causal_ttt = functools.partial(block_causal_ttt, backend="triton")


def sized(case, **sizes):
    return dataclasses.replace(case, **sizes)


def name(case):
    return f"{case}-packed" if case.cu_seqlens else str(case)


def medium(case):
    """At a size where rounding has its usual statistics: three updates and a rest, several heads.

    The gradient of momentum is one number for each head and update but the first, so it takes heads to
    have statistics. In the interpreter two are enough for everything else.
    """
    H = 2 if ON_CPU and not case.momentum else 6
    return sized(case, B=1, T=200, chunk_size=64, H=H, Dk=24, Dv=20, Dh=32)


MEDIUM = [medium(case) for case in TTT_OPTIONS]
MEDIUM_PACKED = [sized(case, T=300, cu_seqlens=(0, 0, 30, 94, 94, 300)) for case in MEDIUM]


def of_options(cases, *names):
    """Those with these sets of options."""
    return [case for case in cases if case.reason in names]


# Both ways to normalise. Momentum, Muon and both are emulated; with pre-norm and a state they are below.
WITHOUT_A_STATE = of_options(MEDIUM, "plain", "prenorm")
# With momentum alone, states are emulated. Muon knows nothing of them, but the number of its matrices changes
# where sequences end.
WITH_A_STATE = WITHOUT_A_STATE + of_options(
    MEDIUM_PACKED, "plain", "momentum prenorm", "muon prenorm"
)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the blocks of every pass."""

    def use(block_m, block_n=None, block_k=None):
        config = TTTConfig(block_m, block_n or block_m, block_k or block_m, 4, 1)
        monkeypatch.setattr(configs, "_TTT_TABLE", dict.fromkeys(configs._TTT_TABLE, config))

    return use


def check(case, dtype=torch.float32, fn=triton_block_causal_ttt):
    with filled_with_nan():
        check_block_causal_ttt(fn, case, dtype, DEVICE)


def run(inputs, **options):
    """The output, and all gradients of a fixed cotangent."""
    o = triton_block_causal_ttt(**inputs, **options)
    torch.manual_seed(1)
    do = torch.randn_like(o)
    return [o, *torch.autograd.grad(o, list(inputs.values()), do, materialize_grads=True)]


def checked_in_pieces(case):
    """Cut inside a chunk and at a border, with an update after it; gradients flow back through the states."""
    check(
        case, fn=lambda **arguments: in_pieces(triton_block_causal_ttt, (40, 128), **arguments)[0]
    )


@needs_interpreter
@pytest.mark.parametrize("case", WITHOUT_A_STATE, ids=str)
def test_options(case, blocks):
    blocks(64)
    check(case)


@needs_interpreter
@pytest.mark.parametrize("case", WITH_A_STATE, ids=name)
def test_options_with_a_state(case, blocks):
    blocks(64)
    checked_in_pieces(case)


# With Muon and fewer tokens than channels, steps have singular values of 0, whose rounding noise the
# iteration amplifies 490 times forward and once more backward: float32 says nothing there.
SHAPES = [
    sized(case, H=4 if case.prenorm else 2)  # of a few tokens with pre-norm two have no statistics
    for case in TTT_SHAPES
    if not case.muon and case.reason != "larger"
]


@needs_interpreter
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, blocks):
    blocks(16)
    check(case)


UNEQUAL_DIMS = [
    TTTCase("keys widest", B=1, H=1, T=20, chunk_size=18, Dk=35, Dv=20, Dh=17, muon=True),
    TTTCase("hidden layer widest", B=1, H=1, T=20, chunk_size=18, Dk=20, Dv=17, Dh=35, muon=True),
    TTTCase("values widest", B=1, H=1, T=20, chunk_size=18, Dk=17, Dv=35, Dh=20, muon=True),
]


@needs_interpreter
def test_matrices_of_several_tiles(blocks):
    """w0 and w2 wide, w1 tall, no dim a multiple of anything. The other way round they are emulated."""
    blocks(16)
    check(UNEQUAL_DIMS[0])


@needs_interpreter
@pytest.mark.parametrize("sizes", [(16, 32, 16), (32, 16, 16), (16, 16, 32)], ids=str)
def test_unequal_blocks(sizes, blocks):
    blocks(*sizes)
    check(TTTCase("", B=1, H=1, T=60, chunk_size=40, Dk=20, Dv=36, Dh=33, momentum=True))


@needs_interpreter
@pytest.mark.parametrize("cut", [None, 448], ids=["last", "first"])
def test_sums_in_parts_of_a_chunk_with_few_queries(cut, monkeypatch):
    """Of which the second part has none, in the last chunk or, behind a state, in the first."""
    monkeypatch.setattr(launch, "CPU_MULTIPROCESSORS", 132)
    case = TTTCase("", B=1, H=1, T=600, chunk_size=512, Dk=16, Dv=16, Dh=16)

    def fn(**arguments):
        cuts = () if cut is None else (cut,)
        return in_pieces(triton_block_causal_ttt, cuts, **arguments)[0]

    check(case, torch.float16, fn)


@needs_interpreter
@pytest.mark.parametrize("name", ["k", "v"])
def test_one_of_keys_and_values_by_descriptors(name):
    """The other is not aligned, and the last block of tokens not full."""
    case = TTTCase("", T=100, Dk=16, Dv=24, Dh=16)
    inputs = {n: x.detach() for n, x in case.inputs(torch.float16).items() if n != "q"}
    with filled_with_nan():
        weights = ttt_update(**inputs, backend="triton")
        inputs[name] = laid_out(inputs[name], "padded channels")
        again = ttt_update(**inputs, backend="triton")
    for w, same in zip(weights, again):
        torch.testing.assert_close(w, same)


@needs_interpreter
@pytest.mark.parametrize("muon", [False, True], ids=["plain", "muon"])
def test_cuts(muon, blocks):
    """Any way of cutting gives the uncut outputs: one token at a time, at borders, across chunks."""
    blocks(32)
    case = TTTCase("", B=1, T=40, chunk_size=16, H=1, Dk=16, Dv=16, Dh=16, momentum=True, muon=muon)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32, DEVICE).items()}
    whole = triton_block_causal_ttt(**inputs, **case.options())
    for cuts in ((16, 32), (5, 37), tuple(range(1, 40, 3))):
        pieces, _ = in_pieces(triton_block_causal_ttt, cuts, **inputs, **case.options())
        bound = 2e-2 if muon else 1e-4
        assert (pieces - whole).abs().max() <= bound * whole.abs().max()


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_state_is_that_of_the_eager_backend(packed, blocks):
    """Weights, norms, masters and momentum, of sequences with no update, too."""
    blocks(16)
    case = TTTCase(
        "", T=24, momentum=True, prenorm=True, **({"B": 1, "cu_seqlens": PACKED} if packed else {})
    )
    inputs = case.inputs(torch.float32)
    (_, ours), (_, theirs) = (
        block_causal_ttt(**inputs, **case.options(), return_state=True, backend=backend)
        for backend in ("triton", "eager")
    )
    assert ours.pending_lengths == theirs.pending_lengths
    for a, b in zip(ours[:4], theirs[:4]):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y)
    for n, (start, stop) in enumerate(case.spans if packed else []):
        if stop - start < case.chunk_size:  # not even renormalised
            assert torch.equal(ours.weights[0][n], inputs["w0"])


@needs_interpreter
@pytest.mark.parametrize(
    "case, intervals",
    [
        (TTTCase("dense", T=24, momentum=True, prenorm=True), (2, 3, 100)),
        (TTTCase("packed", T=24, momentum=True, prenorm=True, cu_seqlens=PACKED), (2, 3, 100)),
        (TTTCase("packed with muon", T=16, momentum=True, muon=True, cu_seqlens=(0, 3, 16)), (2,)),
    ],
    ids=str,
)
def test_checkpoints_change_nothing(case, intervals, blocks):
    """The scan from a checkpoint gives the same bits. There are three updates at least."""
    blocks(16)
    case = sized(case, B=1, H=1)
    inputs = case.inputs(torch.float32, DEVICE)
    with filled_with_nan():
        expected = run(inputs, **case.options())
        for interval in intervals:
            actual = run(inputs, **case.options(), checkpoint_interval=interval)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected)), interval


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_segments_without_a_backward_change_nothing(packed, blocks, monkeypatch):
    """Two updates at a time, of which nothing is kept. There are three at least."""
    blocks(16)
    monkeypatch.setattr(core_call, "INFERENCE_SEGMENT", 2)
    shape = {"T": 16, "cu_seqlens": (0, 3, 16)} if packed else {"T": 14}
    case = TTTCase("", B=1, H=1, momentum=True, **shape)
    inputs = case.inputs(torch.float32, DEVICE)
    results = []
    with filled_with_nan():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                o, state = triton_block_causal_ttt(**inputs, **case.options(), return_state=True)
                results.append((o, *state.weights, *state.buffers))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_steps_in_batches_change_nothing(packed, blocks, monkeypatch):
    """Where not all activations are held at once: sums are the same, in another order."""
    blocks(16)
    case = TTTCase("", H=1, momentum=True,
                   **({"T": 24, "B": 1, "cu_seqlens": PACKED} if packed else {"T": 16, "B": 2}))  # fmt: skip
    inputs = case.inputs(torch.float32, DEVICE)
    expected = run(inputs, **case.options())
    for size in (1, 1500):
        monkeypatch.setattr(scan, "ACTIVATION_BYTES", size)
        with filled_with_nan():
            actual = run(inputs, **case.options())
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strided_inputs_are_read_in_place(blocks, monkeypatch):
    """Slices of one projection, heads before time."""
    blocks(16)
    case = TTTCase("", B=2, H=2, T=11, Dk=6, Dv=6)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32, DEVICE).items()}
    expected = triton_block_causal_ttt(**inputs, chunk_size=4)
    q, k, v = torch.stack([inputs[name] for name in "qkv"], dim=2).unbind(dim=2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: copied.append(x.shape) or contiguous(x)
    )
    strided = {**inputs, "q": q, "k": k, "v": v}
    assert torch.equal(triton_block_causal_ttt(**strided, chunk_size=4), expected)
    assert not copied


def test_offsets_beyond_32_bits(blocks):
    """Views over memory that is never touched between the tokens, so only a few pages are real."""
    blocks(16)
    T, D = 9, 16
    inputs = TTTCase("", B=2, H=1, T=T, Dk=D, Dv=D, Dh=D).inputs(torch.float32, DEVICE)
    expected = run(inputs, chunk_size=4)
    far = dict(inputs)
    for name in ("q", "k", "v"):
        size = 2**31 + 64 + T * D
        memory = torch.empty(size, dtype=torch.float32, device=DEVICE)
        view = memory.as_strided((2, T, 1, D), (2**31 + 64, D, D, 1))
        far[name] = view.copy_(inputs[name].detach()).requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(run(far, chunk_size=4), expected))


@pytest.fixture
def nothing_computed(monkeypatch):
    """Launched kernels do nothing: no value decides how many there are, as nobody waits for one."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, **options: None)


@needs_interpreter
@pytest.mark.parametrize(
    "muon, packed", [(False, False), (True, False), (False, True)], ids=["plain", "muon", "packed"]
)
def test_few_launches_per_chunk_and_no_synchronisation(muon, packed, blocks, nothing_computed):
    blocks(16)
    counts, (few, many) = [], (3, 6)
    for chunks in (few, many):
        T = 2 * chunks
        cu_seqlens = (0, T) if packed else None
        case = TTTCase("", B=1, H=1, T=T, chunk_size=2, Dk=4, Dv=4, Dh=4,
                       momentum=True, muon=muon, cu_seqlens=cu_seqlens)  # fmt: skip
        inputs = case.inputs(torch.float32, DEVICE)
        outputs = []
        forward = count_launches(
            lambda i=inputs, c=case, o=outputs: o.append(
                triton_block_causal_ttt(**i, **c.options())
            )
        )
        (o,) = outputs
        backward = count_launches(lambda o=o: o.sum().backward())
        if not packed:
            assert not forward.syncs and not backward.syncs, (forward, backward)
        counts.append((forward.total, backward.total))
    (few_forward, few_backward), (many_forward, many_backward) = counts
    forward = (many_forward - few_forward) / (many - few)
    backward = (many_backward - few_backward) / (many - few)
    assert 0 < forward <= (20 if muon else 4)
    assert 0 < backward <= (50 if muon else 8)


@needs_interpreter
def test_packed_sequences_are_scanned_side_by_side(blocks, nothing_computed):
    """Thirty sequences make as many launches as one of their length."""
    blocks(16)

    def launches(sequences):
        case = TTTCase("", B=1, H=1, T=6 * sequences, chunk_size=4, Dk=4, Dv=4, Dh=4,
                       cu_seqlens=tuple(range(0, 6 * sequences + 1, 6)))  # fmt: skip
        inputs = {name: x.detach() for name, x in case.inputs(torch.float32, DEVICE).items()}
        return count_launches(lambda: triton_block_causal_ttt(**inputs, **case.options())).total

    assert launches(30) == launches(2) > 0


@needs_interpreter
def test_second_backward_gives_the_same_and_nothing_is_mutated(blocks):
    blocks(16)
    case = TTTCase("", B=1, T=9, H=1, momentum=True, muon=True, prenorm=True)
    inputs = case.inputs(torch.float32, DEVICE)
    before = [x.detach().clone() for x in inputs.values()]
    o = triton_block_causal_ttt(**inputs, **case.options())
    do = torch.randn_like(o)
    leaves = list(inputs.values())
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    second = torch.autograd.grad(o, leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves))


@needs_interpreter
@pytest.mark.parametrize("dims", [(2048, 16, 16), (16, 2048, 16)], ids=["keys", "values"])
def test_longest_rows(dims, blocks):
    """2048 is the most there is, here with 16 beside them. Hidden units take many programs: emulated."""
    blocks(128)
    check(TTTCase("", B=1, H=1, T=11, chunk_size=10, **dict(zip(("Dk", "Dv", "Dh"), dims))))


def muon_error_in_float16(D, chunk_size):
    """Relative error of the output, at three chunks."""
    T = 3 * chunk_size
    inputs = {name: torch.randn(1, T, 1, D, device=DEVICE) for name in "qkv"}
    for name in "qk":
        inputs[name] = torch.nn.functional.normalize(inputs[name], dim=-1)
    inputs = {name: x.half() for name, x in inputs.items()}
    for name in ("0", "1", "2"):
        inputs["w" + name] = torch.randn(1, D, D, device=DEVICE) / D**0.5
        inputs["lr" + name] = 0.02 * torch.rand(1, T, 1, device=DEVICE)
    options = {"chunk_size": chunk_size, "muon": True}
    exact = reference.block_causal_ttt(**{n: x.double() for n, x in inputs.items()}, **options)
    error = triton_block_causal_ttt(**inputs, **options).double() - exact
    return (error.norm() / exact.norm()).item()


@needs_interpreter
def test_muon_in_float16_with_few_tokens_and_a_chunk_of_zeros(blocks):
    """In float16 and at a scale of the loss that leaves little room."""
    blocks(32)
    case = sized(FLOAT16_MUON, T=9, H=1)
    with filled_with_nan():
        check_float16_muon(triton_block_causal_ttt, case, 2.0**6, zeros=range(4, 8))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_muon_in_float16_with_small_rates(blocks, backend):
    """A step is divided by its norm, so its gradients may be as small as they like: below float16's range."""
    blocks(16)
    errors = []
    for factor in (1.0, 2.0**-14):
        case = TTTCase("", B=1, T=20, chunk_size=8, Dk=12, Dv=12, Dh=16, muon=True)
        torch.manual_seed(0)
        inputs = {name: x.detach() for name, x in case.inputs(torch.float16, DEVICE).items()}
        for name in ("lr0", "lr1", "lr2"):
            inputs[name] *= factor
        o = block_causal_ttt(**inputs, **case.options(), backend=backend)
        exact = {name: x.double() for name, x in inputs.items()}
        expected = reference.block_causal_ttt(**exact, **case.options())
        errors.append(((o - expected).norm() / expected.norm()).item())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_muon_of_steps_whose_squares_underflow(blocks, backend):
    """The direction of such a step is next to nothing in its gradient, and not to be made up."""
    blocks(16)
    case = TTTCase("", B=1, T=8, H=1, Dk=6, Dv=6, Dh=8, muon=True)
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = {
        name: (3e-23 * x if name.startswith("lr") else x).detach().requires_grad_()
        for name, x in inputs.items()
    }
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    options = {"chunk_size": 4, "muon": True}
    o = block_causal_ttt(**leaves, **options, backend=backend)
    expected = reference.block_causal_ttt(**exact, **options)
    do = torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape)
    actual = torch.autograd.grad(o, list(leaves.values()), do)
    for name, a, e in zip(
        leaves, actual, torch.autograd.grad(expected, list(exact.values()), do.double())
    ):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


@pytest.mark.parametrize("shape", [{"B": 2, "T": 0}, {"B": 0, "T": 9}], ids=["tokens", "rows"])
def test_muon_in_float16_without(shape):
    inputs = sized(FLOAT16_MUON, **shape, batched_weights=True).inputs(torch.float16, DEVICE)
    o, *grads = run(inputs, chunk_size=4, muon=True)
    assert o.shape[:2] == (shape["B"], shape["T"]) and not any(x.any() for x in grads)


@needs_interpreter
def test_muon_in_float16_is_accurate():
    """The error is 2.1e-3. Iterations rounded to bfloat16 would give 1.7e-2."""
    assert muon_error_in_float16(72, 256) <= 3e-3  # matrices too large for float32


@pytest.mark.gpu
def test_muon_in_float16_is_accurate_on_gpu():
    assert muon_error_in_float16(192, 2048) <= 3e-3


def test_rows_of_zeros_stay_finite(blocks):
    """A dead row of an initial weight has a target norm of 0; values of zero make steps of zero."""
    blocks(16)
    case = TTTCase("", B=1, T=9, H=1, momentum=True, muon=True)
    inputs = case.inputs(torch.float32, DEVICE)
    with torch.no_grad():
        inputs["w0"][:, 2] = 0
        inputs["v"].zero_()
    assert all(x.isfinite().all() for x in run(inputs, **case.options()))


def test_gradients_of_zeros_stay_zeros(blocks):
    """There is nothing to normalise them by."""
    blocks(16)
    case = TTTCase("", B=1, T=9, H=1, muon=True)
    inputs = case.inputs(torch.float32, DEVICE)
    o = triton_block_causal_ttt(**inputs, **case.options())
    grads = torch.autograd.grad(o, list(inputs.values()), torch.zeros_like(o))
    assert not any(x.any() for x in grads)  # NaN is something


def test_same_kernel_for_every_length():
    """Lengths, batch sizes, head counts and strides are runtime values, never compile-time ones."""
    for case in fast_weight_cases.compile_cases(90):
        constants = {name for name, value in case.constexprs.items() if value is not None}
        assert not {"B", "T", "H", "chunk_size", "num_chunks", "num_rows"} & constants
        assert not any("stride" in name for name in constants)


LARGE = [
    TTTCase("D64", B=2, T=1000, chunk_size=256, H=3, Dk=64, Dv=64, Dh=64, momentum=True),
    TTTCase("D192 muon", T=1500, chunk_size=500, H=2, Dk=192, Dv=192, Dh=192, muon=True),
    TTTCase("unequal dims", T=900, chunk_size=300, H=2, Dk=96, Dv=160, Dh=272, prenorm=True),
    TTTCase("D768", B=1, T=1300, chunk_size=512, H=1, Dk=768, Dv=768, Dh=768),
    TTTCase("large packed", B=1, T=2000, chunk_size=128, H=2, Dk=96, Dv=96, Dh=96,
            cu_seqlens=(0, 1, 130, 1500, 1500, 2000), prenorm=True),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MEDIUM, ids=str)
def test_all_options_on_gpu(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES + UNEQUAL_DIMS + MEDIUM_PACKED, ids=name)
def test_shapes_on_gpu(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_on_gpu(case):
    check(case, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEDIUM + MEDIUM_PACKED, ids=name)
def test_with_a_state_on_gpu(case):
    checked_in_pieces(case)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    """Nothing waits for the device, forward or backward, so a graph can hold both."""
    case = sized(LARGE[0], muon=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    options = case.options(DEVICE)
    expected = run(inputs, **options)
    torch.manual_seed(1)
    do = torch.randn_like(expected[0])

    def both():
        o = triton_block_causal_ttt(**inputs, **options)
        return [o, *torch.autograd.grad(o, list(inputs.values()), do)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))
