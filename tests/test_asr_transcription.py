"""Segments of a recording: where they end, when their words are, how they are written; the commands."""

import argparse
import copy
import io
import json
import os
import signal
import sys
import wave
from types import SimpleNamespace

import pytest
import soundfile
import torch

from lact_kernels.asr import transcription
from lact_kernels.asr.audio import read_audio
from lact_kernels.asr.commands import stream, transcribe
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.decoding import BeamDecoder, GreedyDecoder, text_of
from lact_kernels.asr.formats import as_json, as_srt, as_text, as_vtt
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import Recogniser, save_recogniser
from lact_kernels.asr.streaming import FrameStream
from lact_kernels.asr.transcription import Segment, Transcriber, Word, transcribe_file
from tests.test_asr_decoding import CHARACTERS, WORDS, log_probs, path

SPEECH = "examples/data/speech.flac"


class Script:
    """A `FrameStream` whose samples are the tokens of its frames, of 0.1 s."""

    def __init__(self, model):
        self.config = model.config

    def push(self, samples):
        tokens = self.config.tokenizer.convert_ids_to_tokens(samples.long().tolist())
        return log_probs(["-" if token == "<pad>" else token for token in tokens])

    def finish(self):
        return log_probs([])


@pytest.fixture
def scripted(monkeypatch):
    """A transcriber of frames that are written down, 6 of them a pause."""
    monkeypatch.setattr(transcription, "FrameStream", Script)

    def make(decoder=None, tokenizer=CHARACTERS, **options):
        config = SimpleNamespace(seconds_per_frame=0.1, sampling_rate=10, tokenizer=tokenizer)
        recogniser = Recogniser(SimpleNamespace(config=config), tokenizer, ())
        return Transcriber(recogniser, decoder, **options)

    return make


def samples(frames):
    return torch.tensor(path(frames), dtype=torch.float32)


def in_pieces(transcriber, x, size):
    segments = [s for piece in x.split(size) for s in transcriber.push(piece)]
    return segments + transcriber.finish()


def rounded(segment):
    return [(w.text, round(w.start, 3), round(w.end, 3)) for w in segment.words]


@pytest.mark.parametrize("beam", [False, True], ids=["greedy", "beam"])
def test_a_pause_ends_a_segment(scripted, beam):
    transcriber = scripted(BeamDecoder(CHARACTERS, ["cat", "dog"]) if beam else None)
    assert transcriber.push(samples("---------ccat||-do-g" + 5 * "-")) == []
    assert transcriber.partial == "cat dog"
    (segment,) = transcriber.push(samples("-"))  # the sixth frame of silence
    assert transcriber.partial == ""
    assert segment.text == "cat dog" and (segment.start, segment.end) == pytest.approx((0.9, 2.0))
    assert rounded(segment) == [("cat", 0.9, 1.3), ("dog", 1.6, 2.0)]
    assert segment.words[0].score == pytest.approx(0.9)
    assert transcriber.push(samples(20 * "-" + "dog")) == []
    (segment,) = transcriber.finish()
    assert rounded(segment) == [("dog", 4.6, 4.9)]


def test_a_delimiter_is_silence_and_a_shorter_pause_is_none(scripted):
    transcriber = scripted()
    text = "cat|||||dog" + "|-|-|-" + "cat"
    assert [s.text for s in in_pieces(transcriber, samples(text), 100)] == ["cat dog", "cat"]


def test_silence_alone_and_nothing_at_all_are_no_segments(scripted):
    assert in_pieces(scripted(), samples(100 * "-|"), 7) == []
    assert scripted().finish() == []


def test_the_decoder_gets_each_frame_of_speech_once(scripted):
    """Segments with their pauses, the long one cut in the middle of its silence, and the rest."""
    lengths = []

    def decoder(x):
        lengths.append(len(x))
        return GreedyDecoder(CHARACTERS)(x)

    x = samples(9 * "-" + "cat" + 50 * "-" + "catcatcatcat-----catcat")
    in_pieces(scripted(decoder, max_segment_seconds=2.6), x, 100)
    assert lengths == [6 + 3 + 6, 6 + 12 + 2, 3 + 6]


def test_a_segment_without_words_of_the_lexicon_is_none(scripted):
    transcriber = scripted(BeamDecoder(CHARACTERS, ["hello"]))
    x = samples("c" + 10 * "-" + "hel-lo")
    assert [s.text for s in in_pieces(transcriber, x, 100)] == ["hello"]


def test_a_long_segment_ends_in_the_longest_silence_of_its_second_half(scripted):
    frames = "cat|---dog|cat|dog|--cat|dog"  # cut before frame 20, in the middle of "|--"
    first, second = in_pieces(scripted(max_segment_seconds=2.2), samples(frames), 100)
    assert first.text == "cat dog cat dog" and second.text == "cat dog"
    assert rounded(second) == [("cat", 2.1, 2.4), ("dog", 2.5, 2.8)]


def test_a_long_segment_without_silence_ends_where_it_is_too_long(scripted):
    segments = in_pieces(scripted(max_segment_seconds=0.8), samples("catdogcatdog"), 100)
    assert [s.text for s in segments] == ["catdogca", "tdog"]
    assert segments[1].start == pytest.approx(0.8)


SPOKEN = 3 * ("cat|dog--cat" + 9 * "-") + 5 * "hel-lo|" + 30 * "-" + "dog|"


@pytest.mark.parametrize("size", [1, 3, 50])
def test_pieces_of_any_size_give_the_same_segments(scripted, size):
    options = {"max_segment_seconds": 2.0}
    whole = in_pieces(scripted(**options), samples(SPOKEN), 1000)
    assert len(whole) > 5
    assert in_pieces(scripted(**options), samples(SPOKEN), size) == whole


@pytest.mark.parametrize("frames, kept", [("-", 6), ("c-", 20), ("c", 20)])
def test_memory_does_not_grow(scripted, frames, kept):
    transcriber = scripted(max_segment_seconds=2.0)
    for _ in range(10):
        transcriber.push(samples(500 * frames))
        assert len(transcriber._frames) == len(transcriber._likely) <= kept
        storage = sum(frame.untyped_storage().nbytes() for frame in transcriber._frames)
        assert storage <= kept * len(CHARACTERS) * 4


@pytest.mark.parametrize("pause, longest", [(0, 30), (-1, 30), (1, 1), (2, 1)])
def test_bad_lengths(scripted, pause, longest):
    with pytest.raises(ValueError, match=f"got {pause} and {longest}"):
        scripted(pause_seconds=pause, max_segment_seconds=longest)


def test_whole_words_have_times(monkeypatch, scripted):
    frames = log_probs(["-", "one", "one", "-", "two", "-"], WORDS)
    monkeypatch.setattr(Script, "push", lambda self, x: frames)
    transcriber = scripted(tokenizer=WORDS)
    transcriber.push(None)
    assert transcriber.partial == "one two"
    assert rounded(*transcriber.finish()) == [("one", 0.1, 0.3), ("two", 0.4, 0.5)]


# A model with random weights: it understands nothing, but everything has to go through it.


@pytest.fixture(scope="module")
def recogniser():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LaCTASRConfig.named("tiny", vocab_size=len(CHARACTERS), **options)
    model = LaCTForCTC(config).eval()
    with torch.no_grad():  # some silence, and ends of words
        model.ctc_head.bias[:3] += torch.tensor([1.0, 0.0, 0.5])
    return Recogniser(model, CHARACTERS, ("a", "al", "cat", "e"))


@pytest.fixture(scope="module")
def model(recogniser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recogniser")
    save_recogniser(folder, *recogniser)
    return folder


@pytest.fixture(scope="module")
def speech():
    return read_audio(SPEECH, duration=8.0)


@pytest.fixture(scope="module")
def expected(recogniser, speech):
    """The segments of the recording, which the tests below need more than one of."""
    segments = in_pieces(Transcriber(recogniser), speech, len(speech))
    assert len(segments) > 1 and any(len(s.words) > 1 for s in segments)
    return segments


@pytest.fixture
def recording(speech, tmp_path):
    folder = tmp_path / "recordings" / "inner"
    folder.mkdir(parents=True)
    soundfile.write(folder / "speech.wav", speech.numpy(), 16000, "FLOAT")
    return folder / "speech.wav"


def test_without_pauses_the_text_is_that_of_all_frames(recogniser, speech):
    options = {"pause_seconds": 20.0, "max_segment_seconds": 60.0}
    (segment,) = in_pieces(Transcriber(recogniser, **options), speech, 3333)
    frames = FrameStream(recogniser.model)
    frames = torch.cat([frames.push(speech), frames.finish()])
    assert segment.text == text_of(CHARACTERS, GreedyDecoder(CHARACTERS)(frames))
    assert 0 <= segment.start < segment.end <= len(frames) * 0.04


@pytest.mark.parametrize("size", [641, 16000])
def test_pieces_of_a_recording_give_the_same_segments(recogniser, speech, expected, size):
    segments = in_pieces(Transcriber(recogniser), speech, size)
    assert [rounded(s) for s in segments] == [rounded(s) for s in expected]


@pytest.fixture(scope="module")
def two_sided(recogniser):
    """The same weights with windows that look ahead."""
    config = copy.deepcopy(recogniser.model.config)
    config.window_size = (16, 15)
    model = LaCTForCTC(config).eval()
    model.load_state_dict(recogniser.model.state_dict())
    return recogniser._replace(model=model)


def test_a_file_is_transcribed_as_a_whole_where_windows_look_ahead(
    two_sided, speech, expected, recording, tmp_path, capsys
):
    save_recogniser(tmp_path, *two_sided)
    assert run(transcribe, tmp_path, recording) == 0
    said = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        frames = two_sided.model(speech[None]).logits[0].log_softmax(dim=-1)
    given = SimpleNamespace(push=lambda x: x, finish=lambda: frames[:0])
    segments = in_pieces(Transcriber(two_sided, stream=given), frames, 50)
    assert said == [s.text for s in segments] and said != [s.text for s in expected]
    with pytest.raises(ValueError, match=r"window_size without a right side, .* \(16, 15\)"):
        run(stream, tmp_path, recording)
    with pytest.raises(ValueError, match="window_size without a right side"):
        Transcriber(two_sided)


def test_a_file_is_transcribed_and_its_seconds_are_told(recogniser, expected, recording):
    seconds = []
    segments = list(transcribe_file(recogniser, recording, progress=seconds.append))
    assert [rounded(s) for s in segments] == [rounded(s) for s in expected]
    assert sum(seconds) == pytest.approx(8.0)


# Formats

HOUR = 3600.0
SEGMENTS = [
    Segment(0.04, 1.2, "the cat", (Word("the", 0.04, 0.2, 0.98765), Word("cat", 0.5, 1.2, 0.5))),
    Segment(HOUR, HOUR + 61.9996, "<unk>", (Word("<unk>", HOUR, HOUR + 61.9996, 1.0),)),
]
LONG = Segment(
    0.0, 20.0, " ".join(20 * ["seven"]), tuple(Word("seven", i, i + 0.5, 1.0) for i in range(20))
)


def test_text():
    assert "".join(as_text(SEGMENTS)) == "the cat\n<unk>\n"


def test_json():
    assert as_json(SEGMENTS, "ä.wav", 3700.00049) == (
        '{"file": "ä.wav", "duration": 3700.0, "text": "the cat <unk>", "segments": ['
        '{"start": 0.04, "end": 1.2, "text": "the cat", "words": ['
        '{"text": "the", "start": 0.04, "end": 0.2, "score": 0.988}, '
        '{"text": "cat", "start": 0.5, "end": 1.2, "score": 0.5}]}, '
        '{"start": 3600.0, "end": 3662.0, "text": "<unk>", "words": ['
        '{"text": "<unk>", "start": 3600.0, "end": 3662.0, "score": 1.0}]}]}\n'
    )


def test_srt():
    assert "".join(as_srt(SEGMENTS)) == (
        "1\n00:00:00,040 --> 00:00:01,200\nthe cat\n\n2\n01:00:00,000 --> 01:01:02,000\n<unk>\n\n"
    )


def test_vtt():
    assert "".join(as_vtt(SEGMENTS)) == (
        "WEBVTT\n\n"
        "00:00:00.040 --> 00:00:01.200\nthe cat\n\n"
        "01:00:00.000 --> 01:01:02.000\n&lt;unk&gt;\n\n"
    )


def test_subtitles_are_short_enough_to_read():
    first, second = "".join(as_srt([LONG])).split("\n\n")[:2]
    assert first == f"1\n00:00:00,000 --> 00:00:13,500\n{' '.join(14 * ['seven'])}"
    assert second == f"2\n00:00:14,000 --> 00:00:19,500\n{' '.join(6 * ['seven'])}"


def test_nothing_was_said():
    assert [*as_text([]), *as_srt([]), *as_vtt([])] == ["WEBVTT\n\n"]
    assert json.loads(as_json([], "a.wav", 0.0)) == {
        "file": "a.wav",
        "duration": 0.0,
        "text": "",
        "segments": [],
    }


# Commands


def run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def lines_of(segments):
    return "".join(f"{segment.text}\n" for segment in segments)


def test_transcribe_writes_text_to_standard_output(model, recording, expected, capsys):
    assert run(transcribe, model, recording) == 0
    assert capsys.readouterr().out == lines_of(expected)


@pytest.mark.parametrize("format", ["text", "json", "srt", "vtt"])
def test_transcribe_writes_a_file_for_each_recording(model, recording, expected, tmp_path, format):
    folder, out = recording.parent.parent, tmp_path / "out"
    soundfile.write(folder / "silence.FLAC", torch.zeros(8000).numpy(), 8000)
    (folder / "notes.txt").write_text("no recording")
    assert run(transcribe, model, folder, "--format", format, "--output-dir", out) == 0
    suffix = transcribe.EXTENSIONS[format]
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {f"silence{suffix}", f"inner/speech{suffix}"}
    text = (out / f"inner/speech{suffix}").read_text()
    if format == "json":
        result = json.loads(text)
        assert (result["file"], result["duration"]) == (str(recording), 8.0)
        assert [s["text"] for s in result["segments"]] == [s.text for s in expected]
    else:
        assert text == "".join({"text": as_text, "srt": as_srt, "vtt": as_vtt}[format](expected))


def test_transcripts_that_exist_are_kept(model, recording, expected, tmp_path, capsys):
    out = tmp_path / "speech.txt"
    out.write_text("mine")
    assert run(transcribe, model, recording, "--output-dir", tmp_path) == 0
    assert out.read_text() == "mine" and f"{out} exists" in capsys.readouterr().err
    assert run(transcribe, model, recording, "--output-dir", tmp_path, "--overwrite") == 0
    assert out.read_text() == lines_of(expected)


@pytest.mark.parametrize("to_files", [False, True], ids=["stdout", "files"])
def test_a_broken_recording_is_reported_and_the_others_go_on(
    model, recording, expected, tmp_path, capsys, to_files
):
    broken, missing = tmp_path / "broken.wav", tmp_path / "missing.wav"
    broken.write_bytes(b"RIFF and nothing more")
    out = tmp_path / "out"
    options = ["--output-dir", out] if to_files else []
    assert run(transcribe, model, broken, missing, recording, *options) == 1
    printed = capsys.readouterr()
    assert (
        f"{broken} cannot be read" in printed.err and f"there is no file {missing}" in printed.err
    )
    assert "2 of 3 recordings failed" in printed.err
    if to_files:
        assert [p.name for p in out.iterdir()] == ["speech.txt"]
    else:
        assert printed.out.endswith(f"==> {recording} <==\n{lines_of(expected)}")


def test_a_transcript_that_is_interrupted_leaves_nothing(model, recording, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        yield SEGMENTS[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "transcribe_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(transcribe, model, recording, "--output-dir", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_closed_output_ends_the_command(model, recording, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        for command, options in ((transcribe, []), (stream, ["--fast"])):
            with pytest.raises(BrokenPipeError):
                run(command, model, recording, *options)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is buffered goes there


def test_beam_with_words_of_the_training_or_of_a_file(model, recording, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("hue h u e |\n\nu\n")
    for options, words in (
        ([], {"a", "al", "cat", "e"}),
        (["--lexicon", tmp_path / "words.txt"], {"hue", "u"}),
    ):
        assert run(transcribe, model, recording, "--beam", 20, *options) == 0
        said = set(capsys.readouterr().out.split())
        assert said and said <= words


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["a.wav", "b.wav", "--format", "srt"], ValueError, "srt of several recordings"),
        (
            ["x/a.wav", "y/a.flac", "--output-dir", "o"],
            ValueError,
            "x/a.wav and y/a.flac would both",
        ),
        (["a.wav", "--lexicon", "words.txt"], ValueError, "need --beam"),
        (["a.wav", "--beam", "5", "--lm", "none.arpa"], FileNotFoundError, "no file none.arpa"),
        (["docs"], FileNotFoundError, "no recording in docs"),
        (["a.wav"], FileNotFoundError, "nowhere has no config.json"),
        (["a.wav", "--beam", "0"], SystemExit, "2"),
        (["a.wav", "--format", "doc"], SystemExit, "2"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_transcribe_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        run(transcribe, "nowhere", *arguments)


def lines_with_times(segments):
    lines = ["\t".join(f"{w.start:.2f}-{w.end:.2f} {w.text}" for w in s.words) for s in segments]
    return "".join(f"{line}\n" for line in lines)


class Input(io.BytesIO):
    """Standard input that cannot be sought, and may be interrupted behind its end."""

    def __init__(self, data, interrupted=False):
        super().__init__(data)
        self.buffer, self.interrupted = self, interrupted

    def read(self, n=-1):
        data = super().read(n)
        if not data and self.interrupted:
            raise KeyboardInterrupt
        return data

    def seek(self, *_):
        raise OSError("cannot seek")

    tell = seek


def pcm(x):
    return (x * 32768).clamp(-32768, 32767).to(torch.int16).numpy().tobytes()


def wav(x, rate=16000, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(pcm(x))
    return file.getvalue()


INPUTS = {
    "raw": lambda x: (pcm(x), []),
    "an odd byte at the end": lambda x: (pcm(x) + b"\x01", []),
    "floats": lambda x: (x.numpy().tobytes() + b"\0\0\0", ["--sample-format", "f32le"]),
    "large pieces": lambda x: (pcm(x), ["--piece-ms", "700"]),
    "WAV": lambda x: (wav(x), ["--rate", "8000"]),
    "stereo WAV": lambda x: (wav(x.repeat_interleave(2), channels=2), []),
    "endless WAV": lambda x: (wav(x[:1])[:40] + b"\xff\xff\xff\xff" + pcm(x), []),
}


@pytest.mark.parametrize("case", INPUTS)
def test_stream_reads_standard_input(model, speech, recogniser, monkeypatch, capsys, case):
    # What 16 bits make of the speech is what was heard.
    x = torch.frombuffer(bytearray(pcm(speech[:64000])), dtype=torch.int16).float() / 32768
    data, options = INPUTS[case](x)
    if case == "endless WAV":
        data = data[:4] + b"\xff\xff\xff\xff" + data[8:]
    monkeypatch.setattr(sys, "stdin", Input(data))
    assert run(stream, model, *options) == 0
    printed = capsys.readouterr()
    heard = in_pieces(Transcriber(recogniser), x, len(x))
    assert heard and printed.out == lines_with_times(heard)
    assert printed.err.startswith("4.0 s of speech; latency by design 200 ms; delay")
    assert "(median)" in printed.err and "real-time factor" in printed.err


def test_stream_resamples(model, monkeypatch, capsys, speech):
    for data, options in ((pcm(speech[:32000]), ["--rate", 8000]), (wav(speech[:32000], 8000), [])):
        monkeypatch.setattr(sys, "stdin", Input(data))
        assert run(stream, model, *options) == 0
        assert capsys.readouterr().err.startswith("4.0 s")


def test_stream_of_nothing(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Input(b""))
    assert run(stream, model) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("0.0 s of speech")


NAN = torch.full((1000,), torch.nan).numpy().tobytes()
BAD_INPUTS = {
    "header only": (b"RIFF", [], "WAV on standard input cannot be read"),
    "8 bits": (wav(torch.zeros(100), width=1), [], "8 bits a sample"),
    "not finite": (NAN, ["--sample-format", "f32le"], "not finite"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_stream_refuses_an_input(model, monkeypatch, case):
    data, options, message = BAD_INPUTS[case]
    monkeypatch.setattr(sys, "stdin", Input(data))
    with pytest.raises(OSError, match=message):
        run(stream, model, *options)


def test_stream_does_not_wait_for_typing(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ValueError, match="standard input is a terminal"):
        run(stream, "nowhere")


def test_stream_plays_a_file(model, recording, expected, monkeypatch, capsys):
    """In its own time: the waits add up to its length; they are none with --fast."""
    clock = [0.0]
    monkeypatch.setattr(stream.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        stream.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    assert run(stream, model, recording) == 0
    printed = capsys.readouterr()
    assert printed.out == lines_with_times(expected) and clock[0] == pytest.approx(8.0)
    assert "0.0 ms (largest)" in printed.err
    assert run(stream, model, recording, "--fast") == 0
    assert capsys.readouterr().out == lines_with_times(expected)
    assert clock[0] == pytest.approx(8.0)


def test_delay_counts_pieces_that_wait(model, recording, monkeypatch, capsys):
    """Work that takes 10 ms longer than a piece of 40 ms falls behind by them, piece after piece."""
    clock, push = [0.0], Transcriber.push

    def slow(self, x):
        clock[0] += 0.05
        return push(self, x)

    monkeypatch.setattr(stream.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        stream.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    monkeypatch.setattr(Transcriber, "push", slow)
    assert run(stream, model, recording) == 0
    # 200 pieces: the last one is 199 times 10 ms late, and takes 50 ms.
    assert "2040.0 ms (largest); real-time factor 1.250" in capsys.readouterr().err


def test_stream_rewrites_a_line_of_a_terminal(model, recording, expected, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(stream.shutil, "get_terminal_size", lambda: os.terminal_size((12, 24)))
    assert run(stream, model, recording, "--fast") == 0
    *lines, rest = terminal.getvalue().split("\n")
    assert [line.split(stream.CLEAR_LINE)[-1] for line in lines] == [s.text for s in expected]
    assert rest.split(stream.CLEAR_LINE)[-1] == ""
    partial = [text for line in lines for text in line.split(stream.CLEAR_LINE)[:-1]]
    assert any(partial) and max(map(len, partial)) <= 11


@pytest.mark.parametrize("when", ["waiting", "working"])
def test_ctrl_c_finishes_the_recording(model, speech, recogniser, monkeypatch, capsys, when):
    before = signal.getsignal(signal.SIGINT)
    heard, push = [], Transcriber.push

    def interrupted(self, x):
        heard.append(x)
        if when == "working" and len(heard) == 100:
            signal.raise_signal(signal.SIGINT)
        return push(self, x)

    monkeypatch.setattr(Transcriber, "push", interrupted)
    monkeypatch.setattr(sys, "stdin", Input(pcm(speech), interrupted=when == "waiting"))
    assert run(stream, model) == 130
    monkeypatch.undo()
    assert len(heard) == (200 if when == "waiting" else 100)
    segments = in_pieces(Transcriber(recogniser), torch.cat(heard), 10**6)
    assert segments and capsys.readouterr().out == lines_with_times(segments)
    assert signal.getsignal(signal.SIGINT) is before
