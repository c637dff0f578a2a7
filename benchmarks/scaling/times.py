"""How long a training step takes on n GPUs that share one sequence: predictions from counts and `Hardware`.

Across chunks the steps of all ranks and layers are laid out event by event, the *wave*; slices of every chunk
need no more than sums.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from benchmarks.scaling import counts
from benchmarks.scaling.counts import FLOAT32, HALF
from benchmarks.scaling.hardware import Hardware, allreduce_seconds, gather_seconds, message_seconds
from benchmarks.scaling.models import ModelConfig, layer_weights, model_parameters

# Work of one rank.


@dataclasses.dataclass(frozen=True)
class Work:
    """Seconds of one rank in one layer, in order; `head` is once per row."""

    project: float
    attend: float  # queries that see no other rank's tokens
    attend_halo: float  # those that do
    scan: float
    finish: float  # apply, output projection, MLP
    head: float  # forward and backward
    begin_backward: float  # MLP, output projection, apply, attention
    reverse_scan: float
    deferred: float
    project_backward: float

    @property
    def forward(self) -> float:
        return self.project + self.attend + self.attend_halo + self.scan + self.finish

    @property
    def backward(self) -> float:
        return self.begin_backward + self.reverse_scan + self.deferred + self.project_backward


def chunk_seconds(tokens: int, model: ModelConfig, hardware: Hardware) -> tuple[float, float]:
    """One step of the scan, forward and backward: FLOPs / rate, at least launches · seconds of one.

    Launches: 3 in each direction, with Muon 5.
    """
    H, *dims = model.fast_shape
    f, muon = counts.ttt_flops(*dims), counts.chunk_muon_flops(*dims) if model.muon else (0, 0)
    work = H * (tokens * f.update + muon[0]), H * (tokens * f.reverse_scan + muon[1])
    launches = (5, 5) if model.muon else (3, 3)
    forward, backward = (
        max(flops / hardware.scan_rate, count * hardware.launch_seconds)
        for flops, count in zip(work, launches)
    )
    return forward, backward


def _work(
    model: ModelConfig,
    hardware: Hardware,
    tokens: int,
    pairs: tuple[int, int],
    steps: int,
    step_tokens: int,
) -> Work:
    """Of `tokens`, whose queries see these pairs without and with a halo, and so many steps of the scan."""
    H, *dims = model.fast_shape
    f, (before, behind), D = counts.ttt_flops(*dims), layer_weights(model), model.head_dim
    attention = [counts.window_attn_flops(p, model.attn_heads, D, D) for p in pairs]
    own, halo = (forward / hardware.attention_rate for forward, _ in attention)
    attention_backward = sum(backward for _, backward in attention) / hardware.attention_rate
    scan, reverse_scan = chunk_seconds(step_tokens, model, hardware)
    linear, ttt = tokens / hardware.linear_rate, H / hardware.ttt_rate
    return Work(
        project=2 * before * linear,
        attend=own,
        attend_halo=halo,
        scan=steps * scan,
        finish=2 * behind * linear + tokens * f.apply * ttt,
        head=6 * model.vocab_size * model.hidden_size * linear,
        begin_backward=4 * behind * linear + tokens * f.apply_backward * ttt + attention_backward,
        reverse_scan=steps * reverse_scan,
        deferred=steps * step_tokens * f.deferred * ttt,
        project_backward=4 * before * linear,
    )


@functools.cache
def across_work(model: ModelConfig, T: int, n: int, hardware: Hardware) -> tuple[Work, ...]:
    """Of each rank across chunks."""
    starts, C, W = counts.piece_starts(T, n), model.chunk_size, model.window_size
    work = []
    for start, stop in zip(starts, [*starts[1:], T]):
        pairs = (0, 0)
        if model.attention:
            border = min(stop, start + W - 1) if start else start
            pairs = counts.window_pairs(border, stop, W), counts.window_pairs(start, border, W)
        chunks = counts.chunks_scanned(start, stop, T, C)
        work.append(_work(model, hardware, stop - start, pairs, chunks, C))
    return tuple(work)


def ideal_seconds(model: ModelConfig, T: int, n: int, hardware: Hardware) -> float:
    """Work of one GPU with the whole sequence, divided by n."""
    (work,) = across_work(model, T, 1, hardware)
    return (model.layers * (work.forward + work.backward) + work.head) / n


def scan_share(model: ModelConfig, T: int, hardware: Hardware) -> float:
    """σ: of the time that one GPU would take, what the scans take."""
    (work,) = across_work(model, T, 1, hardware)
    return model.layers * (work.scan + work.reverse_scan) / ideal_seconds(model, T, 1, hardware)


# The wave.


@dataclasses.dataclass(frozen=True)
class Links:
    """Seconds of the messages that a layer sends across chunks. Backward they go the other way."""

    chain: list[float]  # to rank r from r − 1; the first entry is not used
    window: list[dict[int, float]]  # to rank r, by sender
    chunk: list[dict[int, float]]
    held: bool = False  # an exchange of the window's halo ends for both when both take part in it


def layer_links(model: ModelConfig, T: int, n: int, hardware: Hardware, held: bool) -> Links:
    """The counts as messages."""
    starts, C, (H, Dk, Dv, Dh) = counts.piece_starts(T, n), model.chunk_size, model.fast_shape
    weights = FLOAT32 * counts.chain_elements(1, H, Dk, Dv, Dh, model.prenorm, model.momentum)
    per_key = HALF * model.attn_heads * 2 * model.head_dim
    per_token = H * (HALF * (Dk + Dv) + FLOAT32 * (3 + model.momentum))

    def seconds(reach: list[int], size: int) -> list[dict[int, float]]:
        return [
            {s: message_seconds(count * size, s, r, hardware) for s, count in tokens.items()}
            for r, tokens in enumerate(counts.halo_tokens(starts, reach))
        ]

    return Links(
        [0.0, *(message_seconds(weights, r - 1, r, hardware) for r in range(1, n))],
        seconds([model.window_size - 1] * n, per_key),
        seconds([start % C for start in starts], per_token),
        held,
    )


def free_links(n: int) -> Links:
    """Messages that take no time."""
    return Links([0.0] * n, [{}] * n, [{}] * n)


def _exchanged(ready: Sequence[float], links: Links, home: bool = False) -> list[float]:
    """When each rank is through with the halo, or if `home` with its gradients, sent at `ready`."""
    through = [-math.inf] * len(ready)
    for r, messages in enumerate(links.window):
        for s, seconds in messages.items():
            source, target = (r, s) if home else (s, r)
            end = ready[source] + seconds
            if links.held:
                end = max(end, ready[target] + seconds)
                through[source] = max(through[source], end)
            through[target] = max(through[target], end)
    return through


def forward_wave(ready: Sequence[float], work: Sequence[Work], links: Links) -> list[float]:
    """When each rank is done with a layer that it can begin at `ready`.

    start(r) = max(attended(r), halo(r), handed(r − 1) + message);  handed(r) = start(r) + scan;
    done(r) = handed(r) + finish. Attention waits for its halo, which is sent as soon as it is projected.
    """
    projected = [t + w.project for t, w in zip(ready, work)]
    through = _exchanged(projected, links)
    done, handed = [], -math.inf
    for r, w in enumerate(work):
        start = max(projected[r] + w.attend, through[r]) + w.attend_halo
        for sender, seconds in links.chunk[r].items():
            start = max(start, projected[sender] + seconds)
        handed = max(start, handed + links.chain[r]) + w.scan
        done.append(handed + w.finish)
    return done


def backward_wave(ready: Sequence[float], work: Sequence[Work], links: Links) -> list[float]:
    """The mirror image: from the last rank to the first.

    start(r) = max(begun(r), handed(r + 1) + message);  handed(r) = start(r) + reverse scan. Then come the
    deferred gradients; the projections' backward waits for the gradients of keys and values from other ranks.
    """
    begun = [t + w.begin_backward for t, w in zip(ready, work)]
    home = _exchanged(begun, links, home=True)
    done, arrived = [0.0] * len(work), -math.inf
    for r in reversed(range(len(work))):
        handed = max(begun[r], arrived) + work[r].reverse_scan
        arrived = handed + links.chain[r]
        deferred = handed + work[r].deferred
        for sender, seconds in links.chunk[r].items():
            home[sender] = max(home[sender], deferred + seconds)
        done[r] = max(deferred, home[r]) + work[r].project_backward
    return done


def across_seconds(
    work: Sequence[Work],
    links: Links,
    layers: int,
    rows: int = 1,
    gather: float = 0.0,
    reduce: float = 0.0,
) -> float:
    """A step across chunks: all layers of one row after the other forward, then all of them backward.

    With `gather` (seconds), the parameters of a layer are collected for it alone, by all ranks together, no
    earlier than when all have begun the layer before; so are the gradients that `reduce` sends.
    """
    ready, collected = [0.0] * len(work), gather
    for wave, seconds in ((forward_wave, gather), (backward_wave, gather + reduce)):
        for layer in range(layers * rows):
            begins = [max(t, collected) for t in ready]
            ready = wave(begins, work, links)
            if seconds:
                collected = max(collected, max(begins)) + seconds
            if wave is forward_wave and (layer + 1) % layers == 0:
                ready = [t + w.head for t, w in zip(ready, work)]
    return max(ready) + reduce


# Predictions.

ACROSS, SLICES = "across chunks", "slices of every chunk"
CHAIN, MESSAGES, GATHERS = "waiting for the scan", "messages", "parameters"
ALIKE, ALL_REDUCE = "work not divided", "all-reduces"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one step. Every figure is predicted; `losses` are the seconds beyond `ideal`, by reason."""

    scheme: str
    ideal: float
    losses: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.ideal + sum(self.losses.values())

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds


def parameter_seconds(parameters: float, group: int, hardware: Hardware) -> tuple[float, float]:
    """Gathered in bfloat16, and their gradients reduced in float32, once over `group` GPUs."""
    gather, reduce = (gather_seconds(x * parameters, group, hardware) for x in (HALF, FLOAT32))
    return gather, reduce


def predict_across(
    model: ModelConfig,
    T: int,
    n: int,
    hardware: Hardware,
    rows: int = 1,
    group: int | None = None,
    by_layer: bool = False,
    held: bool = False,
) -> Prediction:
    """Across chunks. `group` GPUs share the parameters; `rows` sequences follow one another.

    Parameters are gathered before the step, or, `by_layer`, again for each layer in each direction. `held` is
    that of `Links`.
    """
    if T // n < model.chunk_size:
        raise ValueError(f"{T} tokens on {n} GPUs are less than {model.chunk_size} on each")
    work, links = across_work(model, T, n, hardware), layer_links(model, T, n, hardware, held)
    layers, group, count = model.layers, group or n, model_parameters(model)
    ideal = rows * ideal_seconds(model, T, n, hardware)
    unhindered = across_seconds(work, free_links(n), layers, rows)
    linked = across_seconds(work, links, layers, rows)
    parameters = sum(parameter_seconds(count, group, hardware))
    if by_layer:
        one = parameter_seconds(count / layers, group, hardware)
        parameters = across_seconds(work, links, layers, rows, *one) - linked
    losses = {CHAIN: unhindered - ideal, MESSAGES: linked - unhindered, GATHERS: parameters}
    return Prediction(ACROSS, ideal, losses)


def predict_slices(model: ModelConfig, T: int, n: int, hardware: Hardware) -> Prediction:
    """The same model without attention, whose ranks have a slice of every chunk and do each chunk together.

    A layer then begins and ends on all ranks at once.
    """
    model = dataclasses.replace(model, attention=False)
    C, layers, fast = model.chunk_size, model.layers, model.fast_shape
    slice_tokens = math.ceil(C / n)
    work = _work(model, hardware, math.ceil(T / n), (0, 0), counts.num_updates(T, C), slice_tokens)
    elements, updates = counts.chunk_allreduce_elements(T, C, 1, *fast)
    reduces = 2 * updates * allreduce_seconds(FLOAT32 * elements, n, hardware)
    if model.momentum:
        for means in counts.momentum_allreduce_elements(T, C, 1, model.lact_heads):
            reduces += allreduce_seconds(FLOAT32 * means, n, hardware) if means else 0
    ideal = ideal_seconds(model, T, n, hardware)
    losses = {
        ALIKE: layers * (work.forward + work.backward) + work.head - ideal,
        ALL_REDUCE: layers * reduces,
        GATHERS: sum(parameter_seconds(model_parameters(model), n, hardware)),
    }
    return Prediction(SLICES, ideal, losses)
