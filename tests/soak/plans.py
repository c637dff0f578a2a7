"""`ttt` with any plan, whole or in two calls."""

import dataclasses

import torch

from lact_kernels import Apply, NewtonSchulz, TTTPlan, Update
from tests.soak.bar import hold_gradients
from tests.soak.draw import Draw, kind
from tests.ttt_plans import PUBLISHED, PlanCase, state_tensors

MUON = (False, False, True, PUBLISHED, NewtonSchulz([]), NewtonSchulz([(2, -1.5, 0.5)] * 2))
TRAINED = ((True, True, True),) * 3 + (
    (False, True, False),
    (True, False, True),
    (True, False, False),
)


def draw_range(draw: Draw, length: int) -> tuple[int, int | None]:
    start, stop = sorted(draw.sample(range(length + 1), 2))
    return start, None if stop == length and draw.chance(0.5) else stop


def draw_plan(draw: Draw, queries: int, keys: int, most: int) -> TTTPlan:
    """Repeated and overlapping ranges of a few tokens, in any order."""
    steps = []
    for _ in range(draw.randint(0, most)):
        if keys and draw.chance(0.5):
            steps.append(Update([draw_range(draw, keys) for _ in range(draw.choice((1, 1, 1, 2)))]))
        elif queries:
            steps.append(Apply(*draw_range(draw, queries)))
    return TTTPlan(steps)


def draw_plan_case(draw: Draw, triton: bool) -> PlanCase:
    muon, momentum = draw.choice(MUON), draw.chance(0.5)
    rows = draw.choice((0, 0, 1, 1, 2))
    longest = 12 if triton else 30
    number = 1 if rows else draw.randint(1, 3)
    lengths = tuple((draw.length(longest), draw.length(longest)) for _ in range(number))
    options = {
        "muon": muon,
        "prenorm": draw.chance(0.4),
        "weight_norm": draw.chance(0.7),
        "detach_norms": draw.chance(0.3),
        "momentum_after_muon": momentum and muon is not False and draw.chance(0.5),
    }
    most = (
        3 if muon is not False or not options["weight_norm"] else 6
    )  # noise grows with every update
    dims = (1, 5, 16, 17) if triton else range(1, 13)
    return PlanCase(
        tuple(draw_plan(draw, *length, most) for length in lengths),
        lengths,
        tuple(options.items()),
        draw.choice(TRAINED),
        momentum,
        rows,
        (draw.randint(1, 2), *(draw.choice(dims) for _ in range(3))),
    )


@kind(20)
def ttt_plan(draw: Draw) -> None:
    """Outputs, weights, masters and momentum of any plan and options, forward and backward."""
    backend, dtype = draw.backend(0.1)
    case = draw_plan_case(draw, backend == "triton")
    interval = draw.choice((1, 1, 2, 3))
    cut = draw.choice((None, None, 1, 2)) if len(case.lengths) == 1 else None
    inputs = {name: x.detach() for name, x in case.tensors(dtype).items()}
    inputs = {name: draw.laid_out(x) if name in "qkv" else x for name, x in inputs.items()}
    draw.note(case=repr(case), dtype=dtype, backend=backend, interval=interval, cut=cut)
    more = {"backend": backend, "checkpoint_interval": interval, "return_state": True}

    def named(results):
        return {f"result {i}": x for i, x in enumerate(results)}

    def ours(x):
        if cut is None:
            o, state = case.call(**more)(**x)
            return named([o, *state_tensors(state)])
        outputs, state = [], None
        for part in (slice(cut), slice(cut, None)):
            plans = tuple(TTTPlan(plan.steps[part]) for plan in case.plans)
            call = dataclasses.replace(case, plans=plans).call(**more, initial_state=state)
            o, state = call(**x)
            outputs.append(o)
        return named([torch.cat(outputs, dim=1), *state_tensors(state)])

    def plain(x):
        return named(case.reference(**x))

    with draw.tiles():
        hold_gradients(ours, plain, draw.gradients(dtype, inputs), inputs)
