"""The counts of `benchmarks.scaling` equal counting one by one; its times obey what they are made of.

What is sent is counted where it is sent, in test_distributed_costs.py.
"""

import dataclasses
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import __main__ as command
from benchmarks.scaling import counts, hardware, models, times
from lact_kernels.layers import LaCTLayer
from lact_kernels.layers.mlp import SwiGLUMLP

ROOT = Path(__file__).parent.parent
HARDWARE = hardware.Hardware()
MODEL = models.MODELS["760M"]

# Pieces of equal and of different lengths, over which windows reach; a whole and a partial last chunk.
LAYOUTS = {
    "one rank": ([0], 10),
    "even": ([0, 8, 16, 24], 32),
    "uneven": ([0, 7, 9, 20], 29),
    "one token each": ([0, 1, 2, 3, 4], 5),
    "partial last chunk": ([0, 11, 22], 35),
}
layouts = pytest.mark.parametrize("starts, T", LAYOUTS.values(), ids=LAYOUTS)


def owners(starts, T):
    return [max(r for r, start in enumerate(starts) if start <= t) for t in range(T)]


# Counts.


@layouts
@pytest.mark.parametrize("W", (1, 2, 8, 9, 100))
def test_window_halo_is_the_keys_of_others_that_a_piece_sees(starts, T, W):
    owner, pairs, n = owners(starts, T), [0] * len(starts), len(starts)
    seen = set()
    for i, j in itertools.product(range(T), range(T)):
        if i - W < j <= i:
            pairs[owner[i]] += 1
            seen |= {(owner[i], j)} if owner[i] != owner[j] else set()
    received = [{s: 0 for s in range(n)} for _ in range(n)]
    for rank, j in seen:
        received[rank][owner[j]] += 1
    received = [{s: count for s, count in by.items() if count} for by in received]
    assert counts.halo_tokens(starts, [W - 1] * n) == received
    elements = [counts.window_halo_elements(start, W, 2, 3, 5, 7) for start in starts]
    assert elements == [sum(by.values()) * 2 * 3 * (5 + 7) for by in received]
    stops = [*starts[1:], T]
    assert [counts.window_pairs(*span, W) for span in zip(starts, stops)] == pairs


def test_window_attn_flops_are_those_of_its_products():
    P, Hq, D, Dv = 11, 3, 5, 7  # scores, output; scores, dP, dQ, dK, dV
    expected = 2 * P * Hq * (D + Dv), 2 * P * Hq * (D + Dv + D + D + Dv)
    assert counts.window_attn_flops(P, Hq, D, Dv) == expected


@layouts
def test_each_chunk_is_scanned_where_it_ends(starts, T):
    C, owner, scanned = 8, owners(starts, T), [0] * len(starts)
    updating = [range(c, c + C) for c in range(0, T - C, C)]  # all chunks but the last
    for chunk in updating:
        scanned[owner[chunk[-1]]] += 1
    stops = [*starts[1:], T]
    assert [counts.chunks_scanned(*span, T, C) for span in zip(starts, stops)] == scanned
    assert counts.num_updates(T, C) == len(updating)


@pytest.mark.parametrize("n", (1, 2, 5))
def test_collectives_move_what_a_ring_moves(n):
    size, sent = 10 * n, [0] * n  # bytes of the buffer, in n segments of ten
    summed = [[{r} for _ in range(n)] for r in range(n)]  # of whom, by rank and segment
    for step in range(n - 1):  # reduce-scatter
        for r in range(n):
            segment = (r - step) % n
            summed[(r + 1) % n][segment] |= summed[r][segment]
            sent[r] += 10
    assert all(len(summed[r][(r + 1) % n]) == n for r in range(n))
    half = list(sent)
    for _ in range(n - 1):  # all-gather
        sent = [x + 10 for x in sent]
    assert sent == [2 * counts.ring_bytes(size, n)] * n
    assert half == [counts.ring_bytes(size, n)] * n


def test_ttt_flops_are_those_of_the_products():
    """Of each phase in docs/block_causal_ttt.md, run as matrix products and counted by PyTorch."""
    T, Dk, Dv, Dh = 9, 5, 7, 11
    with torch.device("meta"):
        w0 = w2 = dw0 = dw2 = torch.empty(Dh, Dk)
        w1 = dw1 = torch.empty(Dv, Dh)
        x = torch.empty(Dk, T)  # q, k
        y = torch.empty(Dv, T)  # v, δo
        h = torch.empty(Dh, T)  # any hidden plane
    phases = {
        "apply": lambda: (w0 @ x, w2 @ x, w1 @ h),
        "update": lambda: (w0 @ x, w2 @ x, w1.T @ y, h @ x.T, y @ h.T, h @ x.T),
        "apply_backward": lambda: (
            *(w0 @ x, w2 @ x, w1.T @ y),
            *(h @ x.T, y @ h.T, h @ x.T),
            *(w0.T @ h, w2.T @ h),
        ),
        "reverse_scan": lambda: (
            *(w0 @ x, w2 @ x, w1.T @ y),
            *(dw0 @ x, dw1.T @ y, dw2 @ x),
            *(h @ x.T, y @ h.T, h @ x.T),
        ),
        "deferred": lambda: (
            *(dw0.T @ h, dw2.T @ h, w0.T @ h, w2.T @ h),
            *(dw1 @ h, w1 @ h),
        ),
    }
    counted = {}
    for phase, products in phases.items():
        with FlopCounterMode(display=False) as counter:
            products()
        counted[phase] = counter.get_total_flops() / T
    assert dataclasses.asdict(counts.ttt_flops(Dk, Dv, Dh)) == counted
    units = dataclasses.astuple(counts.ttt_flops(8, 8, 16))
    assert [x / (8 * 16) for x in units] == [6, 12, 16, 18, 12]


@pytest.mark.parametrize("shape", ((64, 64), (64, 96), (96, 64)), ids=str)
def test_muon_flops_are_those_of_the_iteration(shape):
    """Symmetric products by their elements on and below the diagonal; the formula takes half of all."""
    m, n = min(shape), max(shape)
    lower = sum(j <= i for i in range(m) for j in range(m))
    forward = 5 * (2 * n * lower + 2 * m * lower + 2 * m * m * n)  # S, B, X
    again, D, R = forward, 5 * 2 * 2 * n * lower, 5 * 2 * 2 * m * lower
    backward = again + D + R + 5 * (2 * m * m * n + 2 * m * m * n)  # and B δX, R X
    assert counts.muon_flops(*shape) == pytest.approx((forward, backward), rel=1 / m)


@pytest.mark.parametrize("name", models.MODELS)
def test_parameters_are_those_of_the_layers(name):
    model = models.MODELS[name]
    with torch.device("meta"):
        layer = LaCTLayer(
            model.hidden_size,
            model.attn_heads,
            model.lact_heads,
            w0_w2_low_rank=model.low_rank,
            attn_qk_norm=False,
            learnable_ttt_scale=True,
            use_momentum=True,
            use_muon=True,
        )
        mlp = SwiGLUMLP(model.hidden_size)
    assert mlp.up_proj.out_features == model.intermediate_size
    count = sum(p.numel() for module in (layer, mlp) for p in module.parameters())
    norms, tables = (2 * model.layers + 1) * model.hidden_size, 2 * model.vocab_size
    expected = model.layers * count + norms + tables * model.hidden_size
    assert models.model_parameters(model) == expected
    linears = [m for net in (layer, mlp) for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(models.layer_weights(model)) == sum(m.weight.numel() for m in linears)
    assert layer.w0.w_left.shape[1:] == (model.fast_shape[-1], model.low_rank)


# Times.


def brute_force(work, links, layers, rows, gather, reduce):
    """The end of the step: every event as late as each event it waits for asks, until nothing changes."""
    n, steps = len(work), layers * rows
    waits = []  # (event, event it waits for, seconds between); every event comes after "start"

    def after(event, other, seconds):
        waits.append((event, other, seconds))

    for j, r in itertools.product(range(steps), range(n)):
        w = work[r]
        # Forward of layer j, and backward of the same.
        for event in ("begin", "projected", "own", "attended", "handed", "done"):
            after((event, j, r), "start", 0)
        after(("begin", j, r), ("head", j - 1, r) if j else "start", 0)
        after(("projected", j, r), ("begin", j, r), w.project)
        after(("own", j, r), ("projected", j, r), w.attend)
        after(("attended", j, r), ("own", j, r), w.attend_halo)
        for s, seconds in links.window[r].items():
            for this in (r, s) if links.held else (r,):
                for other in (r, s) if links.held else (s,):
                    wait = seconds + work[this].attend_halo
                    after(("attended", j, this), ("projected", j, other), wait)
        after(("handed", j, r), ("attended", j, r), w.scan)
        for s, seconds in links.chunk[r].items():
            after(("handed", j, r), ("projected", j, s), seconds + w.scan)
        if r:
            after(("handed", j, r), ("handed", j, r - 1), links.chain[r] + w.scan)
        after(("done", j, r), ("handed", j, r), w.finish)
        after(("head", j, r), ("done", j, r), w.head if (j + 1) % layers == 0 else 0)

        later = ("finished", j + 1, r) if j + 1 < steps else ("head", j, r)
        after(("again", j, r), later, 0)
        after(("begun", j, r), ("again", j, r), w.begin_backward)
        after(("back", j, r), ("begun", j, r), w.reverse_scan)
        if r + 1 < n:
            after(("back", j, r), ("back", j, r + 1), links.chain[r + 1] + w.reverse_scan)
        after(("deferred", j, r), ("back", j, r), w.deferred)
        after(("finished", j, r), ("deferred", j, r), w.project_backward)
        for s, seconds in links.window[r].items():
            for this in (r, s) if links.held else (s,):
                for other in (r, s) if links.held else (r,):
                    wait = seconds + work[this].project_backward
                    after(("finished", j, this), ("begun", j, other), wait)
        for s, seconds in links.chunk[r].items():
            after(("finished", j, s), ("deferred", j, r), seconds + work[s].project_backward)
        if gather:  # of layer j forward, of layer j backward
            after(("begin", j, r), ("gather", j), 0)
            after(("again", j, r), ("regather", j), 0)
            if j:
                after(("gather", j), ("begin", j - 1, r), gather)
            below = ("again", j + 1, r) if j + 1 < steps else ("begin", j, r)
            after(("regather", j), below, gather + reduce * (j + 1 < steps))
    if gather:
        after(("gather", 0), "start", gather)
    ends = {"start": 0.0} | {event: 0.0 for event, _, _ in waits}
    changed = True
    while changed:
        changed = False
        for event, other, seconds in waits:
            if ends[other] + seconds > ends[event]:
                ends[event], changed = ends[other] + seconds, True
    return max(ends["finished", 0, r] for r in range(n)) + reduce


def random_work(rng):
    return times.Work(*(rng.randint(0, 9) for _ in dataclasses.fields(times.Work)))


@pytest.mark.parametrize("gather, reduce", ((0, 0), (7, 4), (90, 40)), ids=str)
@pytest.mark.parametrize("held", (False, True))
@pytest.mark.parametrize("n", (1, 2, 5))
def test_waves_equal_brute_force(n, held, gather, reduce):
    rng = random.Random(n)
    for rows, layers in ((1, 1), (1, 4), (3, 2)):
        work = [random_work(rng) for _ in range(n)]
        links = times.Links(
            [rng.randint(0, 5) for _ in range(n)],
            [{s: rng.randint(0, 40) for s in range(max(0, r - 2), r)} for r in range(n)],
            [{r - 1: rng.randint(0, 40)} if r else {} for r in range(n)],
            held,
        )
        options = work, links, layers, rows, gather, reduce
        assert times.across_seconds(*options) == brute_force(*options)


def test_equal_scans_alone_take_ranks_plus_layers_less_one():
    scan = times.Work(0, 0, 0, 3, 0, 0, 0, 0, 0, 0)
    reverse = times.Work(0, 0, 0, 0, 0, 0, 0, 5, 0, 0)
    for n, L in ((1, 1), (4, 6), (6, 4)):
        assert times.across_seconds([scan] * n, times.free_links(n), L) == 3 * (n + L - 1)
        assert times.across_seconds([reverse] * n, times.free_links(n), L) == 5 * (n + L - 1)


def test_a_message_between_nodes_takes_the_network():
    size = 10**7
    inside, outside = (hardware.message_seconds(size, 7, r, HARDWARE) for r in (0, 8))
    assert inside == pytest.approx(8.4e-6 + 3.4e-6 + size / 360e9)
    assert outside == pytest.approx(8.4e-6 + 9.6e-6 + size / 40e9)


def test_collectives_take_the_hops_and_bytes_of_their_formulas():
    assert hardware.allreduce_seconds(10**7, 1, HARDWARE) == 0
    ring = 8.4e-6 + 2 * 7 * 3.4e-6 + 2 * 7 / 8 * 10**9 / 360e9
    assert hardware.allreduce_seconds(10**9, 8, HARDWARE) == pytest.approx(ring)
    tree = 8.4e-6 + 2 * (7 * 3.4e-6 + 6 * 9.6e-6) + 2 * 10**6 / 320e9
    assert hardware.allreduce_seconds(10**6, 512, HARDWARE) == pytest.approx(tree)
    gather = 8.4e-6 + 7 * 9.6e-6 + 56 * 3.4e-6 + 63 / 64 * 10**9 / 320e9
    assert hardware.gather_seconds(10**9, 64, HARDWARE) == pytest.approx(gather)


def test_a_step_of_the_scan_takes_its_launches_at_least():
    few, many = (times.chunk_seconds(t, MODEL, HARDWARE) for t in (1, 2**16))
    plain = times.chunk_seconds(1, dataclasses.replace(MODEL, muon=False), HARDWARE)
    assert plain == pytest.approx((3 * 3e-6, 3 * 3e-6))
    assert few[0] > plain[0] and few[1] > plain[1]
    assert many[0] == pytest.approx(
        4 * (2**16 * 12 * 384**2 + 3 * 5 * 4 * 384**3) / HARDWARE.scan_rate
    )


SMALL = dataclasses.replace(MODEL, layers=3)


def test_one_gpu_takes_the_ideal_time():
    for predict in (times.predict_across, times.predict_slices):
        step = predict(SMALL, 2**15, 1, HARDWARE)
        assert step.seconds == pytest.approx(step.ideal)


def test_more_gpus_are_less_efficient_and_no_faster_than_one_scan():
    T, sizes = 2**17, (1, 2, 4, 8, 16, 32, 64)
    steps = [times.predict_across(SMALL, T, n, HARDWARE) for n in sizes]
    assert all(a.efficiency > b.efficiency for a, b in zip(steps, steps[1:]))
    assert all(a.ideal == pytest.approx(2 * b.ideal) for a, b in zip(steps, steps[1:]))
    (one,) = times.across_work(SMALL, T, 1, HARDWARE)
    assert all(step.seconds > one.scan + one.reverse_scan for step in steps)
    assert all(min(step.losses.values()) >= -1e-9 * step.seconds for step in steps)
    with pytest.raises(ValueError, match="less than 2048"):
        times.predict_across(SMALL, T, 65, HARDWARE)


def test_ranks_divide_the_work_of_one():
    T, n = 2**17 + 5000, 5
    (one,) = times.across_work(MODEL, T, 1, HARDWARE)
    ranks = times.across_work(MODEL, T, n, HARDWARE)
    for phase in (
        "project",
        "scan",
        "finish",
        "head",
        "begin_backward",
        "reverse_scan",
        "deferred",
    ):
        assert sum(getattr(w, phase) for w in ranks) == pytest.approx(getattr(one, phase)), phase
    assert sum(w.attend + w.attend_halo for w in ranks) == pytest.approx(one.attend)


def test_the_simple_formula_of_the_page_is_close_to_the_wave():
    for (name, model), n, rows in itertools.product(models.MODELS.items(), (8, 64), (1, 4)):
        share = times.scan_share(model, 2**23, HARDWARE)
        wave = times.predict_across(model, 2**23, n, HARDWARE, rows=rows)
        simple = 1 / (1 + (n - 1) * share / (model.layers * rows))
        filled = wave.ideal / (wave.ideal + wave.losses[times.CHAIN])
        assert filled == pytest.approx(simple, rel=0.02), (name, n, rows)


def test_what_should_help_helps():
    options = SMALL, 2**17, 16
    before = times.predict_across(*options, HARDWARE)
    faster = {"scan_rate": 1e15, "nvlink": 1e12, "infiniband": 1e12, "linear_rate": 1e15}
    for name, value in faster.items():
        better = dataclasses.replace(HARDWARE, **{name: value})
        assert times.predict_across(*options, better).seconds < before.seconds
    rows = [times.predict_across(*options, HARDWARE, rows=n).efficiency for n in (1, 2, 4)]
    assert rows[0] < rows[1] < rows[2]
    for worse in ({"by_layer": True}, {"held": True}, {"group": 512}):
        assert times.predict_across(*options, HARDWARE, **worse).seconds > before.seconds


def test_slices_gain_from_larger_chunks():
    sizes = [dataclasses.replace(SMALL, chunk_size=C) for C in (2**11, 2**13, 2**15)]
    efficiency = [times.predict_slices(m, 2**18, 8, HARDWARE).efficiency for m in sizes]
    assert efficiency[0] < efficiency[1] < efficiency[2]


# The command and its page.


def titled_tables(text):
    return [t.strip() for t in re.findall(r"^\*\*.+\*\*\n\n(?:\|.*\n?)+", text, flags=re.MULTILINE)]


def test_the_page_has_the_tables_of_the_command_and_the_assumptions(capsys):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert command.main([]) == 0
    printed = titled_tables(capsys.readouterr().out)
    assert len(printed) == 5 and titled_tables(page) == printed
    for table in printed:
        assert re.match(r"\*\*.*(counted|Predicted)", table)
    for name in dataclasses.asdict(HARDWARE):
        assert re.search(rf"^\| `{name}` \|", page, flags=re.MULTILINE), name


@pytest.mark.parametrize(
    "arguments, message",
    (
        ("--gpus 0", "'0' is not a positive number"),
        ("--tokens 1.5M", "'1.5M' is not"),
        ("--tokens M", "'M' is not"),
        ("--model 7B", "invalid choice"),
        ("--gpus 8192 --tokens 64M", "at most 4096 GPUs"),
        ("--gpus 8 --tokens 16383", "--gpus 8 leaves pieces of --tokens 16383 shorter than 2048"),
    ),
)
def test_nonsense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_runs_without_torch_for_other_sizes():
    program = (
        "import runpy, sys; sys.modules['torch'] = None;"
        "runpy.run_module('benchmarks.scaling', run_name='__main__')"
    )
    arguments = "--model 3B --gpus 4 2 --tokens 48K 30000".split()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "| 3B, 48K, 4 |" in done.stdout and "| 3B, 30,000, 2 |" in done.stdout
    assert "760M" not in done.stdout
