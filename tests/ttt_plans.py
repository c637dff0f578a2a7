"""Calls of `ttt` to draw and to check: plans, options and tensors."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

import reference
from benchmarks.registry import NEWTON_SCHULZ
from lact_kernels import Apply, NewtonSchulz, TTTPlan, Update, ttt
from lact_kernels.core.newton_schulz import LACT
from tests.tolerance import assert_close_to_float64

PUBLISHED = NewtonSchulz(NEWTON_SCHULZ)  # of LaCT's code for views
LEAVES = ("q", "k", "v", "w0", "w1", "w2", "lr0", "lr1", "lr2", "momentum")


@dataclasses.dataclass(frozen=True)
class PlanCase:
    """One call: sequences of so many queries and keys, a plan for each, sizes and options."""

    plans: tuple[TTTPlan, ...]
    lengths: tuple[tuple[int, int], ...]  # queries and keys of each sequence
    options: tuple[tuple[str, object], ...] = ()
    trained: tuple[bool, bool, bool] = (True, True, True)
    momentum: bool = False
    rows: int = 0  # of a batch, which has one sequence; 0: packed
    sizes: tuple[int, int, int, int] = (2, 5, 6, 7)  # H, Dk, Dv, Dh

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """All with gradients; rates of weights that are not trained are left out."""
        H, Dk, Dv, Dh = self.sizes
        N, B = len(self.lengths), max(self.rows, 1)
        Tq, Tk = (sum(column) for column in zip(*self.lengths))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = {"q": (B, Tq, H, Dk), "k": (B, Tk, H, Dk), "v": (B, Tk, H, Dv)}
        x = {name: torch.randn(*s, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
        for name, (r, c) in {"w0": (Dh, Dk), "w1": (Dv, Dh), "w2": (Dh, Dk)}.items():
            w = torch.randn(self.rows or N, H, r, c, dtype=torch.float64)
            x[name] = w.mul_(c**-0.5).to(wide)
        scalars = torch.rand(4, B, Tk, H, dtype=torch.float64)
        # Muon divides by the norm of a step, and so do its gradients: small rates leave few digits of them.
        rate = 1.0 if dict(self.options).get("muon", False) else 0.1
        for i, is_given in enumerate(self.trained):
            if is_given:
                x[f"lr{i}"] = (rate * scalars[i]).to(wide)
        if self.momentum:
            x["momentum"] = scalars[3].to(wide)
        return {name: t.to(device).requires_grad_() for name, t in x.items()}

    def call(self, fn=ttt, **more):
        """`fn` with the plan, the options and the borders of this case."""
        if self.rows:
            return lambda **x: fn(
                **_with_rates(x), plan=self.plans[0], **dict(self.options), **more
            )
        columns = zip(*self.lengths)
        borders = [torch.tensor([0, *c], dtype=torch.int32).cumsum(0).int() for c in columns]
        more |= {"cu_seqlens": tuple(borders)}
        return lambda **x: fn(**_with_rates(x), plan=list(self.plans), **dict(self.options), **more)

    def reference(self, **x: Tensor) -> list[Tensor]:
        """Outputs, and weights and where there are any masters and momentum of all sequences."""
        options = dict(self.options)
        muon = options.pop("muon", False)
        muon = LACT if muon is True else muon
        options["coefficients"] = muon.coefficients if muon else None
        x = _with_rates(x)
        if self.rows:
            (steps,) = map(plain_steps, self.plans, self.lengths)
            return self.kept(reference.ttt(**x, steps=steps, **options))
        first = {"q": 0, "k": 0}
        results = []
        for n, (plan, (Tq, Tk)) in enumerate(zip(self.plans, self.lengths)):
            part = {}
            for name, t in x.items():
                if name[0] == "w":
                    part[name] = t[n : n + 1]
                elif t is not None:
                    place = "q" if name == "q" else "k"
                    stop = first[place] + (Tq if name == "q" else Tk)
                    part[name] = t[:, first[place] : stop]
                else:
                    part[name] = None
            first = {"q": first["q"] + Tq, "k": first["k"] + Tk}
            steps = plain_steps(plan, (Tq, Tk))
            results.append(self.kept(reference.ttt(**part, steps=steps, **options)))
        columns = list(zip(*results))
        return [torch.cat(columns[0], dim=1), *map(torch.cat, columns[1:])]

    def kept(self, result) -> list[Tensor]:
        """What of the reference's result is in a state, too."""
        o, w, masters, buffers = result
        prenorm = dict(self.options).get("prenorm", False)
        return [o, *w, *(masters if prenorm else ()), *(buffers if self.momentum else ())]


def state_tensors(state) -> list[Tensor]:
    return [*state.weights, *state.masters, *state.buffers]


def plain_steps(plan: TTTPlan, lengths: tuple[int, int]) -> list[tuple[str, list]]:
    """A plan as the reference takes it."""
    Tq, Tk = lengths
    steps = []
    for step in plan.steps:
        if isinstance(step, Apply):
            steps.append(("apply", [(step.start, Tq if step.stop is None else step.stop)]))
        else:
            ranges = [(start, Tk if stop is None else stop) for start, stop in step.ranges]
            steps.append(("update", ranges))
    return steps


def outputs_and_gradients(fn, x: dict[str, Tensor], cotangents: list[Tensor]):
    """What `fn` gives of these tensors, and the gradients of all that need one."""
    outputs = fn(**x)
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
    leaves = [t for t in x.values() if t.requires_grad]
    if not pairs:
        return outputs, [torch.zeros_like(t) for t in leaves]
    how = {"allow_unused": True, "materialize_grads": True}
    outs, grads = zip(*pairs)
    return outputs, torch.autograd.grad(outs, leaves, grads, **how)


def check_case(case: PlanCase, dtype: torch.dtype, device: str = "cpu", **more) -> None:
    """Outputs, weights and all gradients of `ttt` against float64."""
    x = case.tensors(dtype, device)
    exact_x = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    cotangents = [torch.randn_like(o) for o in case.reference(**exact_x)]
    fn = case.call(return_state=True, **more)

    def ours(**x):
        o, state = fn(**x)
        return [o, *state_tensors(state)]

    results = [
        outputs_and_gradients(f, x, cotangents)
        for f, x in ((ours, x), (case.reference, x), (case.reference, exact_x))
    ]
    names = [f"output {i}" for i in range(len(cotangents))], [f"d{name}" for name in x]
    for part, group in zip(zip(*results), names):
        for name, a, s, e in zip(group, *part, strict=True):
            assert_close_to_float64(a, s, e, name)


def _with_rates(x: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {"lr0": None, "lr1": None, "lr2": None} | x


def ranges(length: int):
    """A range of at least one of so many tokens."""
    borders = st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True)
    return borders.map(lambda x: tuple(sorted(x)))


@st.composite
def plans(draw, lengths: tuple[int, int]):
    Tq, Tk = lengths
    steps = []
    for is_update in draw(st.lists(st.booleans(), max_size=6)):
        if is_update and Tk:
            steps.append(Update(draw(st.lists(ranges(Tk), min_size=1, max_size=2))))
        elif not is_update and Tq:
            steps.append(Apply(*draw(ranges(Tq))))
    return TTTPlan(steps)


@st.composite
def cases(draw, momentum=None):
    rows = draw(st.integers(0, 2))
    number = 1 if rows else draw(st.integers(1, 3))
    lengths = tuple(draw(st.tuples(st.integers(0, 8), st.integers(0, 8))) for _ in range(number))
    momentum = draw(st.booleans())
    muon = draw(
        st.sampled_from([False, True, NewtonSchulz([]), PUBLISHED, NewtonSchulz([(2, -1.5, 0.5)])])
    )
    options = {
        "muon": muon,
        "prenorm": draw(st.booleans()),
        "weight_norm": draw(st.booleans()),
        "detach_norms": draw(st.booleans()),
        "momentum_after_muon": momentum and muon is not False and draw(st.booleans()),
    }
    trained = draw(
        st.sampled_from([(1, 1, 1), (1, 1, 1), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 1)])
    )
    return PlanCase(
        tuple(draw(plans(length)) for length in lengths),
        lengths,
        tuple(options.items()),
        tuple(map(bool, trained)),
        momentum,
        rows,
        draw(st.sampled_from([(2, 5, 6, 7), (1, 3, 2, 9), (1, 4, 4, 2)])),
    )
