"""`block_causal_ttt`, whole and cut into any calls that pass a state on; `ttt_apply`."""

import copy
import dataclasses

import torch
from torch import Tensor

import reference
from lact_kernels import TTTState, block_causal_ttt, ttt_apply
from tests.cases import ApplyCase, TTTCase
from tests.soak.bar import hold, hold_gradients
from tests.soak.draw import Draw, borders_of, kind
from tests.ttt_pieces import TOKENS

WEIGHTS = ("w0", "w1", "w2")


def draw_case(draw: Draw, longest: int, **fixed) -> tuple[TTTCase, dict[str, Tensor], torch.dtype]:
    """Sizes, options and inputs."""
    dtype = fixed.pop("dtype")
    chance = draw.chance
    case = TTTCase(
        "",
        **{
            "T": draw.length(longest),
            "chunk_size": draw.choice((1, 2, 2, 4, 4, 7, 7, 2**40)),
            "B": draw.choice((0, 1, 1, 1, 2, 2, 3)),
            "H": draw.randint(1, 3),
            "Dk": draw.randint(1, 12),
            "Dv": draw.randint(1, 12),
            "Dh": draw.randint(1, 12),
            "momentum": chance(0.5),
            "muon": chance(0.3),
            "prenorm": chance(0.5),
            "batched_weights": chance(0.4),
        }
        | fixed,
    )
    if case.cu_seqlens is None and case.muon:  # its noise grows with every update
        case = dataclasses.replace(case, T=min(case.T, 6 * case.chunk_size))
    inputs = {name: x.detach() for name, x in case.inputs(dtype).items()}
    for name in ("q", "k", "v"):
        inputs[name] *= draw.choice((1.0, 1.0, 1.0, 0.1, 3.0))
    rates = draw.choice(("usual", "usual", "none", "some", "large"))
    for name in ("lr0", "lr1", "lr2"):
        if rates == "none":
            inputs[name] *= 0
        elif rates == "some":
            inputs[name] *= torch.rand_like(inputs[name]) < 0.5
        elif rates == "large":
            inputs[name] *= 20
    if case.T and chance(0.2):  # silence
        start = draw.randrange(case.T)
        for name in draw.choice(("k", "v", "kv")):
            inputs[name][:, start : start + draw.randint(1, 2 * case.chunk_size)] = 0
    return case, inputs, dtype


@kind(20)
def ttt(draw: Draw) -> None:
    """One call with any options, forward and backward."""
    backend, dtype = draw.backend(0.12)
    fixed = {"dtype": dtype}
    if draw.chance(0.4):
        borders = draw.borders(12 if backend == "triton" else 30)
        fixed |= {"B": 1, "T": borders[-1], "cu_seqlens": tuple(borders)}
    if backend == "triton":
        fixed |= {"H": draw.randint(1, 2), "chunk_size": draw.choice((2, 5, 16))}
        fixed |= {name: draw.choice((1, 5, 16, 17)) for name in ("Dk", "Dv", "Dh")}
    case, inputs, _ = draw_case(draw, 20 if backend == "triton" else 50, **fixed)
    inputs = {name: draw.laid_out(x) if name in "qkv" else x for name, x in inputs.items()}
    gradients = draw.gradients(dtype, inputs)
    interval = draw.choice((1, 1, 2, 3, 100))
    draw.note(case=repr(case), dtype=dtype, backend=backend, interval=interval)

    def ours(x):
        o = block_causal_ttt(**x, **case.options(), checkpoint_interval=interval, backend=backend)
        return {"o": o}

    def plain(x):
        return {"o": reference.block_causal_ttt(**x, **case.options())}

    with draw.tiles():
        hold_gradients(ours, plain, gradients, inputs)


@kind(5)
def apply(draw: Draw) -> None:
    """Given weights, shared or not, of another memory layout or dtype."""
    backend, dtype = draw.backend(0.2)
    case = ApplyCase(
        "",
        T=draw.length(30),
        B=draw.choice((0, 1, 2, 3)),
        H=draw.randint(1, 3),
        **{name: draw.choice((1, 5, 12, 16, 17)) for name in ("Dk", "Dv", "Dh")},
        batched="".join(number for number in "012" if draw.chance(0.4)),
        float32_weights=dtype.itemsize == 2 and draw.chance(0.5),
    )
    inputs = dict(zip(("q", *WEIGHTS), (x.detach() for x in case.inputs(dtype))))
    inputs = {name: draw.laid_out(x) if x.ndim == 4 else x for name, x in inputs.items()}
    gradients = draw.gradients(dtype, inputs)
    draw.note(case=repr(case), dtype=dtype, backend=backend)
    with draw.tiles():
        hold_gradients(
            lambda x: {"o": ttt_apply(**x, backend=backend)},
            lambda x: {"o": reference.ttt_apply(**x)},
            gradients,
            inputs,
        )


class Rows:
    """Sequences in the middle of being read, each a row of the inputs and how far it is."""

    def __init__(self, case: TTTCase, x: dict[str, Tensor], backend: str):
        self.case, self.x, self.backend = case, x, backend
        self.numbers, self.places = list(range(case.B)), [0] * case.B
        self.outputs: list[list[Tensor]] = [[] for _ in range(case.B)]
        self.state: TTTState | None = None

    def weights(self, numbers: list[int]) -> dict[str, Tensor]:
        return {w: self.x[w][numbers] if self.case.batched_weights else self.x[w] for w in WEIGHTS}

    def tokens(self, numbers, places, lengths) -> dict[str, list[Tensor]]:
        spans = list(zip(numbers, places, lengths))
        return {
            name: [self.x[name][n, p : p + t] for n, p, t in spans]
            for name in TOKENS
            if name in self.x
        }

    def call(self, rows: list[int], lengths: list[int], how: str, state, interval: int):
        """Read on in some rows; the state after it."""
        numbers, places = ([x[r] for r in rows] for x in (self.numbers, self.places))
        tokens = self.tokens(numbers, places, lengths)
        options = {"chunk_size": self.case.chunk_size, "checkpoint_interval": interval}
        options |= {"muon": self.case.muon, "prenorm": self.case.prenorm, "backend": self.backend}
        if how == "batch":
            tokens = {name: torch.stack(x) for name, x in tokens.items()}
        else:
            tokens = {name: torch.cat(x)[None] for name, x in tokens.items()}
            options["cu_seqlens"] = borders_of(lengths)
        o, state = block_causal_ttt(
            **tokens,
            **self.weights(numbers),
            **options,
            initial_state=state,
            return_state=True,
        )
        for r, part in zip(rows, o.flatten(0, 1).split(lengths)):
            self.outputs[r].append(part)
            self.places[r] += len(part)
        return state

    def step(self, how: str, lengths: list[int], interval: int) -> None:
        """All rows: in one call, or each in one of its own."""
        rows = list(range(len(self.numbers)))
        if how != "alone":
            self.state = self.call(rows, lengths, how, self.state, interval)
            return
        states = [
            self.call([r], [lengths[r]], "batch", self.state and self.state.entry(r), interval)
            for r in rows
        ]
        self.state = TTTState.stack(states)

    def select(self, order: list[int]) -> None:
        self.numbers, self.places = ([x[r] for r in order] for x in (self.numbers, self.places))
        self.outputs = [list(self.outputs[r]) for r in order]
        if self.state is not None:
            self.state = self.state.select(torch.tensor(order))


def draw_program(draw: Draw, case: TTTCase, gradients: bool) -> list[tuple]:
    """Calls until every row is read, and what is done to the state in between."""
    program, places = [], [0] * case.B
    while min(places) < case.T:
        action = draw.choice(("call", "call", "call", "call", "state"))
        if action == "state":
            action = draw.choice(("select", "stack") if gradients else ("select", "stack", "cut"))
            order = list(range(len(places)))
            if action == "select":
                order = [draw.randrange(len(places)) for _ in range(draw.randint(1, 3))]
                places = [places[r] for r in order]
            program.append((action, order))
            continue
        most = draw.choice((1, 2, 2, 3, case.chunk_size, case.T))
        lengths = [draw.randint(0, min(most, case.T - p)) for p in places]
        how = draw.choice(("batch", "packed", "alone"))
        if how == "batch":
            lengths = [min(most, case.T - max(places))] * len(places)
        if any(lengths) or draw.chance(0.2):
            program.append((how, lengths, draw.choice((1, 1, 2))))
            places = [p + t for p, t in zip(places, lengths)]
    return program


def run_program(program: list[tuple], case: TTTCase, x: dict[str, Tensor], backend: str) -> Rows:
    rows = Rows(case, x, backend)
    for action, *arguments in program:
        if action == "select":
            rows.select(*arguments)
        elif rows.state is None and action in ("stack", "cut"):
            continue
        elif action == "stack":
            n = rows.state.num_sequences
            rows.state = TTTState.stack([rows.state.entry(r) for r in range(n)])
        elif action == "cut":
            rows.state = copy.deepcopy(rows.state.map(Tensor.detach))
        else:
            rows.step(action, *arguments)
    return rows


@kind(30)
def ttt_state(draw: Draw) -> None:
    """Rows read in any calls and kept in any states are those of one call, with gradients through states."""
    backend, dtype = draw.backend(0.04)
    if backend == "eager" and draw.chance(0.7):
        dtype = torch.float64
    fixed = {"dtype": dtype, "B": draw.randint(1, 3)}
    fixed |= {"T": draw.randint(1, 12 if backend == "triton" else 20), "H": draw.randint(1, 2)}
    fixed |= {name: draw.randint(1, 6) for name in ("Dk", "Dv", "Dh")}
    case, inputs, _ = draw_case(draw, 0, **fixed, chunk_size=draw.choice((1, 2, 3, 4, 7)))
    gradients = draw.chance(0.4)
    program = draw_program(draw, case, gradients)
    draw.note(case=repr(case), dtype=dtype, backend=backend, program=program)
    order = []  # of the rows at the end

    def ours(x):
        rows = run_program(program, case, x, backend)
        order[:] = rows.numbers
        assert rows.state.pending_lengths == tuple(case.T % case.chunk_size for _ in order)
        o = torch.stack([torch.cat(parts) for parts in rows.outputs])
        return {"o": o}

    def plain(x):
        return {"o": reference.block_causal_ttt(**x, **case.options())[order]}

    with draw.tiles():
        if gradients:
            hold_gradients(ours, plain, draw.gradients(dtype, inputs), inputs)
        else:
            hold(ours, plain, inputs, dtype)
