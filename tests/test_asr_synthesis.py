"""Synthetic corpora: what is planned, what is made with espeak-ng, and the one in examples/data."""

import functools
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from examples import asr_corpus
from examples import synthesize as synthesis
from examples.asr_corpus import COMMAND_WORDS, DIGIT_WORDS, GRAMMARS, VOICES, plan
from examples.synthesize import synthesize
from lact_kernels.asr.audio import read_audio
from lact_kernels.asr.manifest import read_manifest

SHIPPED = Path(__file__).parents[1] / "examples/data/spoken_digits"
SETS = ("train", "dev", "test_seen", "test_voice", "test_accent", "test_noise", "test_flite")
SMALL = {"num_train": 5, "num_dev": 2, "num_test": 2, "progress": False}
planned = functools.cache(plan)
needs_espeak = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_a_program(monkeypatch, name):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda program: None if program == name else which(program)
    )


def sentences(symbol, grammar):
    for choice in grammar[symbol]:
        words = ([w] if w not in grammar else list(sentences(w, grammar)) for w in choice.split())
        yield from map(" ".join, itertools.product(*words))


# What is planned


def test_commands_have_70_words_and_each_is_frequent():
    assert len(set(COMMAND_WORDS)) == len(COMMAND_WORDS) == 70
    texts = [speech.text for speech in planned("commands")["train"]]
    counts = Counter(word for text in texts for word in text.split())
    assert counts.keys() == set(COMMAND_WORDS)
    assert min(counts.values()) >= 25
    assert {len(text.split()) for text in texts} <= set(range(4, 11))


def test_digits_are_strings_of_three_to_seven():
    texts = [speech.text.split() for speech in planned("digits")["train"]]
    assert {word for text in texts for word in text} == set(DIGIT_WORDS)
    assert len(DIGIT_WORDS) == 10
    assert {len(text) for text in texts} == {3, 4, 5, 6, 7}


def test_no_sentence_comes_about_in_two_ways():
    listed = list(sentences("SENTENCE", GRAMMARS["commands"]))
    assert len(set(listed)) == len(listed) == asr_corpus._count("SENTENCE", GRAMMARS["commands"])


@pytest.mark.parametrize("task", asr_corpus.TASKS)
def test_no_sentence_is_in_two_sets(task):
    sets = planned(task)
    assert sets.keys() == set(SETS)
    assert {name: len(sets[name]) for name in SETS} == dict.fromkeys(SETS, 200) | {"train": 2500}
    texts = [speech.text for name in SETS if name != "test_noise" for speech in sets[name]]
    assert len(set(texts)) == len(texts)


def test_voices_are_those_that_a_set_is_for():
    voices = {name: {speech.voice for speech in planned("digits")[name]} for name in SETS}
    counts = {name: len(voices[name]) for name in ("train", "dev", "test_voice", "test_flite")}
    assert counts == {"train": 24, "dev": 4, "test_voice": 6, "test_flite": 4}
    assert voices["test_seen"] == voices["train"]
    assert voices["test_noise"] == voices["test_voice"]
    others = ("train", "dev", "test_voice", "test_accent", "test_flite")
    for a, b in itertools.combinations(others, 2):
        assert not voices[a] & voices[b], (a, b)


def test_no_sentence_is_in_two_sets_of_different_seeds_and_sizes():
    a, b = planned("commands"), plan("commands", num_train=1000, num_test=100, seed=1)
    for train, other in ((a, b), (b, a)):
        texts = {speech.text for speech in train["train"]}
        assert not any(s.text in texts for name in SETS[1:] for s in other[name])
    assert a["dev"] == plan("commands", num_train=10, num_test=0)["dev"]


@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_command_is_in_every_set(name):
    words = Counter(word for speech in planned("commands")[name] for word in speech.text.split())
    assert words.keys() >= {"remind", "volume", "timer", "play", "stop", "send", "weather", "rain"}


def test_another_seed_draws_others():
    a, b = planned("digits"), plan("digits", seed=1)
    assert a == plan("digits", seed=0)
    assert all(a[name] != b[name] for name in SETS)


@pytest.mark.parametrize(
    "error, arguments",
    [
        (ValueError, {"task": "poems"}),
        (ValueError, {"num_train": -1}),
        (TypeError, {"num_dev": 2.0}),
        (TypeError, {"num_test": True}),
        (TypeError, {"seed": "0"}),
        (TypeError, {"workers": 1.5}),
        (ValueError, {"workers": 0}),
        (ValueError, {"audio_format": "mp3"}),
        (TypeError, {"progress": 1}),
        (TypeError, {"one_file_per_set": "yes"}),
        (ValueError, {"task": "commands", "num_dev": 1000}),  # of 13618 sentences in 16 shares
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_made(error, arguments, tmp_path):
    with pytest.raises(error, match=list(arguments)[-1] if len(arguments) == 1 else "sentences"):
        synthesize(tmp_path / "out", **({"task": "digits"} | SMALL | arguments))
    assert not (tmp_path / "out").exists()


def test_missing_espeak_says_how_to_install_it(tmp_path, monkeypatch):
    without_a_program(monkeypatch, "espeak-ng")
    with pytest.raises(FileNotFoundError, match="apt install espeak-ng.*brew install espeak-ng"):
        synthesize(tmp_path / "out", "digits", **SMALL)
    assert not (tmp_path / "out").exists()


def test_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert synthesis.main([str(tmp_path / "out"), "--train", "-1"]) == 1
    assert capsys.readouterr().err == "synthesize: num_train must not be negative, got -1\n"
    with pytest.raises(SystemExit) as error:
        synthesis.main([str(tmp_path / "out"), "--task", "poems"])
    assert error.value.code == 2 and "invalid choice: 'poems'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_command_is_status_130(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "synthesize", interrupted)
    assert synthesis.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nsynthesize: interrupted\n"


# What is made


@needs_espeak
def test_two_calls_make_the_same_files(tmp_path):
    one = synthesize(tmp_path / "one", "commands", workers=1, **SMALL)
    synthesize(tmp_path / "two", "commands", workers=3, **SMALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    expected = plan("commands", num_train=5, num_dev=2, num_test=2)
    assert set(one) >= set(SETS) - {"test_flite"}
    for name, path in one.items():
        utterances = read_manifest(path)
        assert [(u.text, u.speaker) for u in utterances] == [
            (s.text, s.voice) for s in expected[name]
        ]
        for line, u in zip(path.read_text().splitlines(), utterances):
            x = read_audio(u.path, 16000)
            assert len(x) == round(16000 * u.duration)
            assert 0.05 < x.abs().max() < 0.99  # neither silent nor clipped
            assert not Path(json.loads(line)["audio_filepath"]).is_absolute()


@needs_espeak
def test_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    sound, made = synthesis._sound, []

    def fails_after_seven(speech):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(speech)
        return sound(speech)

    monkeypatch.setattr(synthesis, "_sound", fails_after_seven)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", "digits", workers=1, **SMALL)
    assert torch.get_num_threads() == threads
    left = contents(tmp_path / "out")
    assert len(left) == 7 and all(name.endswith(".flac") for name in left)  # and no manifest

    monkeypatch.setattr(synthesis, "_sound", lambda speech: made.append(speech) or sound(speech))
    manifests = synthesize(tmp_path / "out", "digits", **SMALL)
    assert len(made) == len(set(made)) == sum(len(read_manifest(m)) for m in manifests.values())
    monkeypatch.undo()
    synthesize(tmp_path / "new", "digits", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_file_has_its_name_only_when_it_is_whole(tmp_path):
    def waveforms():
        yield torch.zeros(16000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesis._write(tmp_path / "x.flac", waveforms(), "flac")
    assert not (tmp_path / "x.flac").exists()


@needs_espeak
def test_noise_is_10_db_below_the_same_speech(tmp_path):
    manifests = synthesize(tmp_path, "digits", **SMALL)
    pairs = list(zip(*(read_manifest(manifests[name]) for name in ("test_voice", "test_noise"))))
    assert len(pairs) == 2
    for clean, noisy in pairs:
        x, y = read_audio(clean.path), read_audio(noisy.path)
        snr = 10 * (x.square().mean() / (y - x).square().mean()).log10()
        assert abs(snr - 10) < 0.05
    a, b = [(read_audio(y.path) - read_audio(x.path))[:8000] for x, y in pairs]
    assert torch.cosine_similarity(a, b, dim=0).abs() < 0.1  # each has a noise of its own


@needs_espeak
@pytest.mark.parametrize("audio_format", synthesis.FORMATS)
def test_joined_sets_have_the_same_utterances(audio_format, tmp_path, monkeypatch):
    options = SMALL | {"num_train": 20}
    manifests = synthesize(
        tmp_path / "out", "digits", audio_format=audio_format, one_file_per_set=True, **options
    )
    assert len(contents(tmp_path / "out")) == 2 * len(manifests)
    for name, path in synthesize(tmp_path / "separate", "digits", **options).items():
        for u, part in zip(read_manifest(path), read_manifest(manifests[name]), strict=True):
            assert (u.text, u.speaker, u.duration) == (part.text, part.speaker, part.duration)
            x, y = read_audio(u.path), read_audio(part.path, 16000, part.offset, part.duration)
            difference = (x - y).square().mean() / x.square().mean()
            assert difference == 0 if audio_format == "flac" else difference < 0.2

    monkeypatch.setattr(synthesis, "_sound", None)  # a second call makes nothing
    again = synthesize(
        tmp_path / "out", "digits", audio_format=audio_format, one_file_per_set=True, **options
    )
    assert again == manifests


@needs_espeak
def test_without_flite_its_set_is_left_out(tmp_path, monkeypatch, caplog):
    without_a_program(monkeypatch, "flite")
    manifests = synthesize(tmp_path, "digits", **SMALL | {"num_train": 0, "num_dev": 0})
    assert set(manifests) == set(SETS) - {"test_flite"}
    assert "test_flite is left out" in caplog.text
    assert manifests["train"].read_text() == ""


@needs_espeak
def test_voice_that_espeak_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(VOICES, "dev", ("nowhere+f1",))
    with pytest.raises(OSError, match="-v nowhere[+]f1.*voice does not exist"):
        synthesize(tmp_path, "digits", **SMALL)


@needs_espeak
def test_voice_that_espeak_would_replace(tmp_path, monkeypatch):
    monkeypatch.setitem(VOICES, "dev", ("en-us+nobody",))
    with pytest.raises(FileNotFoundError, match="without the voices nobody"):
        synthesize(tmp_path / "out", "digits", **SMALL)
    assert not (tmp_path / "out").exists()


# What is shipped


def test_shipped_set_is_small_and_held_out_sentences_are_not_trained_on():
    assert sum(len(content) for content in contents(SHIPPED).values()) < 9e6
    texts = {name: [u.text for u in read_manifest(SHIPPED / f"{name}.jsonl")] for name in SETS}
    assert set(" ".join(sum(texts.values(), [])).split()) == set(DIGIT_WORDS)
    assert texts.pop("test_noise") == texts["test_voice"]
    every = sum(texts.values(), [])
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", SETS)
def test_shipped_utterances_are_the_same_from_any_offset(name):
    utterances = read_manifest(SHIPPED / f"{name}.jsonl")
    assert len({u.path for u in utterances}) == 1
    whole, start = read_audio(utterances[0].path, 16000), 0
    for i, u in enumerate(utterances):
        stop = start + round(16000 * u.duration)
        assert round(16000 * u.offset) == start and whole[start:stop].abs().max() > 0.02
        if i % 8 == 0 or i > len(utterances) - 5:
            x = read_audio(u.path, 16000, u.offset, u.duration)
            torch.testing.assert_close(x, whole[start:stop], rtol=0, atol=0)
        start = stop
    assert len(whole) == start + synthesis.TAIL
