"""FrameStream: pieces of any size give the frames of one pass, in time and in constant memory."""

import math

import pytest
import torch

from lact_kernels.asr import streaming
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.features import _mel_spectrogram
from lact_kernels.asr.streaming import FrameStream, WholeRecording
from tests.test_asr_model import LOOKING_AHEAD, OPTIONS, noise, small_model

LENGTH = 30_000  # no multiple of anything


def in_one_pass(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x[None]).logits[0].log_softmax(dim=-1)


def in_pieces(stream: FrameStream | WholeRecording, pieces) -> torch.Tensor:
    return torch.cat([*(stream.push(piece) for piece in pieces), stream.finish()])


@pytest.mark.parametrize("piece", [171, 1280, 9999, LENGTH])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pieces_give_the_frames_of_one_pass(options, piece):
    model, x = small_model(**options), noise(LENGTH)
    stream = FrameStream(model)
    frames = in_pieces(stream, x.split(piece))
    expected = in_one_pass(model, x)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-5)
    assert stream.num_frames == len(expected)
    assert stream.seconds == pytest.approx(len(expected) * model.config.seconds_per_frame)


@pytest.mark.parametrize("length", [0, 1, 639, 640, 641, 1280, 2000])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_short_recordings(options, length):
    model, x = small_model(**options), noise(length)
    frames = in_pieces(FrameStream(model), [x])
    torch.testing.assert_close(frames, in_one_pass(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", LOOKING_AHEAD.values(), ids=LOOKING_AHEAD)
def test_a_window_with_later_frames_is_for_whole_recordings(options):
    model, x, buffer = small_model(**options), noise(LENGTH), torch.empty(9999)
    with pytest.raises(ValueError, match=r"window_size without a right side, .* got \("):
        FrameStream(model)
    recording = WholeRecording(model)
    for piece in x.split(9999):  # through a buffer that is used again
        assert recording.push(buffer[: len(piece)].copy_(piece)).shape == (0, 7)
    torch.testing.assert_close(recording.finish(), in_one_pass(model, x))
    assert len(recording.finish()) == 0
    assert len(WholeRecording(model).finish()) == 0


def test_training_after_a_stream():
    """Which hears in inference mode, and has made the filters."""
    _mel_spectrogram.cache_clear()
    model, x = small_model(), noise(LENGTH)
    FrameStream(model).push(x)
    waveform = x[None].requires_grad_()
    model(waveform).logits.sum().backward()
    assert waveform.grad.abs().sum() > 0


def test_a_long_piece_is_computed_in_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_SECONDS", 0.5)
    model, x, sizes = small_model(), noise(LENGTH), []
    expected, forward = in_one_pass(model, x), model.features.forward
    monkeypatch.setattr(
        model.features, "forward", lambda x, *c: (sizes.append(x.shape[1]), forward(x, *c))[1]
    )
    frames = in_pieces(FrameStream(model), [x])
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-5)
    assert len(sizes) > 3 and max(sizes) <= 8000


@pytest.mark.parametrize("name", ["tiny", "stream"])
def test_latency_is_what_the_configuration_says(name):
    """From the first sample of a frame to the sample with which its output comes, in pieces of 10 ms."""
    config = LaCTASRConfig.named(name, num_hidden_layers=1)
    model = small_model(**config.to_diff_dict())
    stream, x, delays = FrameStream(model), noise(32_000), []
    for number, piece in enumerate(x.split(160), 1):
        before = stream.num_frames
        stream.push(piece)
        for frame in range(before, stream.num_frames):
            delays.append(number * 0.01 - frame * config.seconds_per_frame)
    assert max(delays) == pytest.approx(config.latency_seconds)
    assert max(delays) <= 0.32


@pytest.mark.parametrize("options", [{}, *LOOKING_AHEAD.values()][:3], ids=str)
def test_a_frame_hears_its_look_ahead_and_no_more(options):
    model, x = small_model(**options), noise(LENGTH)
    expected, frame = in_one_pass(model, x), 20
    frame += (
        -(frame + model.config.look_ahead) % model.config.temporal_reduction
    )  # first of its group
    start = frame * model.config.inputs_to_logits_ratio
    end = start + round(model.config.latency_seconds * 16000)
    changed = x.clone()
    changed[end:] = noise(LENGTH - end, seed=5)
    torch.testing.assert_close(
        in_one_pass(model, changed)[: frame + 1], expected[: frame + 1], atol=1e-6, rtol=1e-6
    )
    changed[end - 200 :] = 10 * noise(LENGTH - end + 200, seed=6)  # the last spectrum's middle
    difference = (in_one_pass(model, changed) - expected).abs().amax(dim=1)
    assert difference[:frame].max() < 1e-6 < 1e-4 < difference[frame]


def test_memory_does_not_grow():
    model = small_model()

    def numbers(x) -> int:
        if isinstance(x, torch.Tensor):
            return x.numel()
        if isinstance(x, dict):
            return sum(map(numbers, x.values()))
        return sum(map(numbers, x)) if isinstance(x, (list, tuple)) else 0

    stream, sizes = FrameStream(model), []
    for piece in noise(40 * 640 * 4).split(640 * 4):  # a chunk each
        stream.push(piece)
        conv, cache = stream._state
        kept = [conv, cache.state_dict(), stream._waiting, stream._context]
        sizes.append(numbers(kept))
    assert len(set(sizes[4:])) == 1


def test_a_window_without_an_end_has_no_latency():
    assert LaCTASRConfig(window_size=(7, -1)).latency_seconds == math.inf


@pytest.mark.parametrize("kind", [FrameStream, WholeRecording])
def test_bad_use(kind):
    model = small_model()
    with pytest.raises(ValueError, match="evaluation mode"):
        kind(model.train())
    stream = kind(model.eval())
    with pytest.raises(TypeError, match="floating-point"):
        stream.push(torch.zeros(4, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"shape \[n\], got \(1, 4\)"):
        stream.push(torch.zeros(1, 4))
    stream.push(torch.zeros(1000))
    assert len(stream.finish()) == 2 and len(stream.finish()) == 0
    with pytest.raises(RuntimeError, match=f"a new one needs a new {kind.__name__}"):
        stream.push(torch.zeros(4))
