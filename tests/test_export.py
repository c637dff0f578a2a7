"""`torch.export` with a length that is open: one program gives the outputs of the module for each."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from lact_kernels import (
    Apply,
    TTTPlan,
    Update,
    block_causal_ttt,
    ttt,
    ttt_apply,
    window_attn,
    window_attn_with_kvcache,
)
from lact_kernels.asr import features
from lact_kernels.compat.transformers import LaCTForCausalLM, LaCTSWIGLUConfig
from tests.lact_layer_cases import make_layer
from tests.test_asr_model import noise, small_model

LENGTHS = (
    1,
    2,
    3,
    4,
    5,
    8,
    9,
    137,
)  # of chunks and windows of 4 tokens: in one, full, and 34 and a rest
NAMED, OPEN = Dim("T", max=4096), Dim.DYNAMIC


class Function(nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, x: list[torch.Tensor]):
        return self.function(*x, **self.options)


def attend(T):
    return list(torch.randn(3, 2, T, 2, 8).unbind())


def attend_cache(T):
    lengths = torch.full((2,), T, dtype=torch.int32)
    return [torch.randn(2, 1, 2, 8), *torch.randn(2, 2, T, 2, 8), lengths]


def learn(T):
    q, k, v = attend(T)
    weights, rates = torch.randn(3, 2, 8, 8).unbind(), torch.full((3, 2, T, 2), 0.1).unbind()
    return [q, k, v, *weights, *rates]


def decode(q, k_cache, v_cache, lengths):
    return window_attn_with_kvcache(q, k_cache, v_cache, 4, cache_seqlens=lengths)


def learn_with_momentum(*x, **options):
    return block_causal_ttt(*x[:-1], momentum=x[-1], **options)


def inputs_with_momentum(T):
    return [*learn(T), torch.full((2, T, 2), 0.5)]


def queries_and_weights(T):
    return [attend(T)[0], *torch.randn(3, 2, 8, 8).unbind()]


# A module, its inputs of T tokens, and which of them have T at axis 1.
PROGRAMS = {
    "window_attn": (Function(window_attn, window_size=4), attend, (0, 1, 2)),
    "window_attn_with_kvcache": (
        Function(decode), attend_cache, (1, 2)
    ),
    "block_causal_ttt": (
        Function(block_causal_ttt, chunk_size=4), learn, (0, 1, 2, 6, 7, 8)
    ),
    "block_causal_ttt, every option": (
        Function(learn_with_momentum, chunk_size=4, muon=True, prenorm=True),
        inputs_with_momentum,
        (0, 1, 2, 6, 7, 8, 9),
    ),
    "ttt_apply": (Function(ttt_apply), queries_and_weights, (0,)),
}  # fmt: skip


@pytest.mark.parametrize("dim", [NAMED, OPEN], ids=["named", "open"])
@pytest.mark.parametrize("module, make_inputs, open_", PROGRAMS.values(), ids=PROGRAMS)
def test_operations(module, make_inputs, open_, dim):
    x = make_inputs(20)
    shapes = [{1: dim} if i in open_ else None for i in range(len(x))]
    program = torch.export.export(module, (x,), dynamic_shapes=(shapes,)).module()
    for T in LENGTHS:
        x = make_inputs(T)
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize(
    "make_plan",
    [
        lambda T: TTTPlan.update_first(T, 8),
        lambda T: TTTPlan([Update(0), Apply(4), Apply(0, 10)]),
    ],
    ids=["of the length", "queries twice"],
)
def test_lengths_are_constants_of_a_plan_in_a_program(make_plan):
    """The batch may stay open."""

    def call(*x):
        return ttt(*x, make_plan(x[0].shape[1]))

    x = learn(20)
    open_ = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = [None if i in (3, 4, 5) else open_ for i in range(len(x))]
    program = torch.export.export(Function(call), (x,), dynamic_shapes=(shapes,)).module()
    twice = [y if i in (3, 4, 5) else torch.cat([y, y]) for i, y in enumerate(x)]
    assert torch.equal(program(twice), call(*twice))


def exported(module, x, dim, **options):
    return torch.export.export(module, (x,), dynamic_shapes=({1: dim},), **options)


def test_layer_and_its_gradients():
    """Also of the program whose ops are decomposed. What the backward needs depends on the length."""
    layer = make_layer("paper-muon", window_size=4, lact_chunk_size=4, ttt_prenorm=True)
    program = exported(layer, torch.randn(2, 20, 32, dtype=torch.float64), NAMED)
    programs = [program.module(), program.run_decompositions({}).module()]
    for T in LENGTHS:
        x = torch.randn(2, T, 32, dtype=torch.float64)
        assert all(torch.equal(program(x), layer(x)) for program in programs)
    ours, theirs = dict(programs[0].named_parameters()), dict(layer.named_parameters())
    actual = torch.autograd.grad(programs[0](x).sum(), [ours[name] for name in theirs])
    expected = torch.autograd.grad(layer(x).sum(), list(theirs.values()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_without_gradients_a_program_keeps_nothing_for_a_backward(strict):
    layer = make_layer("defaults", window_size=4, lact_chunk_size=4)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    with torch.no_grad():
        program = exported(layer, x, OPEN, strict=strict).module()
    for T in LENGTHS:
        x = torch.randn(2, T, 32, dtype=torch.float64)
        assert torch.equal(program(x), layer(x))
    with pytest.raises(
        RuntimeError, match="kept nothing for a backward: where it was called, or ex"
    ):
        program(x).sum().backward()


def test_reduced_frames_are_open_in_whole_groups():
    """Of three frames each, and two groups at least."""
    layer = make_layer("reduction", window_size=4)
    program = exported(layer, torch.randn(2, 21, 32).double(), 3 * Dim("groups", min=2, max=999))
    for T in (6, 9, 12, 30, 99):
        x = torch.randn(2, T, 32, dtype=torch.float64)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("windows", [{}, {"window_size": (3, 2)}], ids=["causal", "two-sided"])
def test_speech_model(windows):
    """Of any number of samples in two frames at least; no call has come before."""
    features._mel_spectrogram.cache_clear()
    model = small_model(num_hidden_layers=1, **windows)
    ratio = model.config.inputs_to_logits_ratio
    program = exported(model, noise(2, 9 * ratio), OPEN).module()
    for samples in (ratio + 1, 5 * ratio, 7 * ratio - 3):
        x = noise(2, samples)
        assert torch.equal(program(x).logits, model(x).logits)


RUN = """
import torch, lact_kernels
program = torch.export.load("program.pt2").module()
inputs, outputs = torch.load("cases.pt")
assert all(torch.allclose(program(x), o) for x, o in zip(inputs, outputs))
"""


def test_language_model_runs_in_another_process(tmp_path):
    """Which knows the ops by `import lact_kernels`, and nothing else of the model."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attn_heads": 4, "num_lact_heads": 2}
    config = LaCTSWIGLUConfig(
        **sizes, vocab_size=31, window_size=4, lact_chunk_size=4, use_muon=True, use_cache=False
    )
    model = LaCTForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens).logits

    program = exported(Logits(), torch.randint(31, (2, 20)), NAMED)
    torch.export.save(program, tmp_path / "program.pt2")
    inputs = [torch.randint(31, (2, T)) for T in LENGTHS]
    with torch.no_grad():
        torch.save((inputs, [model(x).logits for x in inputs]), tmp_path / "cases.pt")
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, check=True)
