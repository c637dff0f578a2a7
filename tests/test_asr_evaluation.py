"""Error rates against counts by hand, their intervals, and `lact-asr evaluate` from end to end."""

import json
import logging

import pytest
import soundfile
import torch

from examples import asr_picture
from lact_kernels.asr import cli
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.evaluation import (
    error_rate,
    evaluate,
    evaluate_set,
    table,
    transcribe_utterances,
)
from lact_kernels.asr.manifest import Utterance, write_manifest
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import Recogniser, save_recogniser
from lact_kernels.asr.text import build_tokenizer

RATE = 16000
WORDS = ("one", "two", "three")


@pytest.fixture(scope="module")
def recogniser():
    """Random weights, that nevertheless say something other than blanks."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS)
    config = LaCTASRConfig.named(
        "tiny", vocab_size=len(tokenizer), num_hidden_layers=1, max_utterance_seconds=30
    )
    model = LaCTForCTC(config).eval()
    with torch.no_grad():
        model.ctc_head.weight.mul_(20)
    return Recogniser(model, tokenizer, WORDS)


@pytest.fixture
def utterances(tmp_path):
    """Noise of different lengths, not in their order, none a whole number of frames."""
    made = []
    for i, seconds in enumerate((0.73, 2.01, 0.31, 1.417, 0.9)):
        path = tmp_path / f"{i}.wav"
        level = torch.rand(int(seconds * RATE) // 800 + 1).repeat_interleave(800)
        x = (0.3 * level * torch.randn(len(level)))[: int(seconds * RATE)]
        soundfile.write(path, x.numpy(), RATE)
        made.append(Utterance(str(path), "One, TWO three", int(seconds * RATE) / RATE))
    return made


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.wav"
    path.write_bytes(b"RIFF, and then nothing")
    return Utterance(str(path), "two", 1.0)


# Word errors of each pair: (substitutions, deletions, insertions, reference words).
@pytest.mark.parametrize(
    "reference, hypothesis, counts",
    [
        ("one two three", "one two three", (0, 0, 0, 3)),
        ("one two three", "one three three two", (1, 0, 1, 3)),
        ("one two three", "two", (0, 2, 0, 3)),
        ("one", "", (0, 1, 0, 1)),
        ("one", "two two three", (1, 0, 2, 1)),
    ],
)
def test_word_errors_are_those_by_hand(reference, hypothesis, counts):
    result = error_rate([reference, "three"], [hypothesis, "three"])
    substitutions, deletions, insertions, words = counts
    assert (result.substitutions, result.deletions, result.insertions) == counts[:3]
    assert result.errors == substitutions + deletions + insertions
    assert (result.units, result.utterances) == (words + 1, 2)
    assert result.rate == result.errors / (words + 1)


def test_spaces_are_characters():
    result = error_rate(["ab c"], ["abd"], unit="char")
    assert (result.substitutions, result.deletions, result.insertions) == (1, 1, 0)
    assert result.rate == 2 / 4


def test_insertions_into_an_empty_reference_count():
    result = error_rate(["", "one"], ["two two", "one"])
    assert (result.rate, result.insertions, result.units) == (2.0, 2, 1)


def test_one_utterance_and_one_group_have_no_interval():
    assert error_rate(["one"], ["two"])[:3] == (1.0, None, None)
    assert error_rate(["one"] * 3, ["two"] * 3, groups=["a"] * 3).low is None
    assert error_rate(["one"] * 3, ["two"] * 3, resamples=0).low is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["", " "], ["one", ""]), "no words"),
        (([], []), "no words"),
        ((["one"], []), "equally many, got 1, 0"),
        ((["one"], ["one"], "letter"), "unit must be"),
    ],
)
def test_what_has_no_error_rate_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        error_rate(*arguments)


def noisy(n, share):
    """Utterances of ten words, some of which were heard as another one."""
    references = ["one " * 10] * n
    heard = (torch.rand(n, 10) < share).tolist()
    return references, [" ".join("two" if x else "one" for x in row) for row in heard]


def test_interval_covers_the_rate_in_most_data_sets_and_shrinks_with_their_size():
    covered, widths = 0, {25: 0.0, 400: 0.0}
    for _ in range(40):
        for n in widths:
            result = error_rate(*noisy(n, 0.2), resamples=200)
            assert result.low < result.rate < result.high
            covered += result.low <= 0.2 <= result.high
            widths[n] += (result.high - result.low) / 40
    assert 68 <= covered < 80  # of 80; 76 are expected
    assert widths[25] / widths[400] == pytest.approx(4, rel=0.15)  # the root of 16
    assert widths[400] == pytest.approx(2 * 1.96 * (0.2 * 0.8 / 4000) ** 0.5, rel=0.15)


def test_interval_is_the_same_for_the_same_seed():
    texts = noisy(30, 0.2)
    assert error_rate(*texts, seed=1) == error_rate(*texts, seed=1) != error_rate(*texts, seed=2)


def test_interval_over_speakers_is_wider_when_their_errors_go_together():
    references, good = noisy(100, 0.05)
    bad = noisy(100, 0.5)[1]
    hypotheses = [bad[i] if i // 10 % 3 == 0 else good[i] for i in range(100)]
    speakers = [f"speaker {i // 10}" for i in range(100)]
    utterance, speaker = (
        error_rate(references, hypotheses, groups=groups) for groups in (None, speakers)
    )
    assert speaker.rate == utterance.rate
    assert speaker.high - speaker.low > 2 * (utterance.high - utterance.low)


def test_padded_batches_say_what_each_recording_says_alone(recogniser, utterances):
    alone = [transcribe_utterances(recogniser, [u], progress=False)[0] for u in utterances]
    assert len(set(alone)) == len(alone) and all(alone)  # or a wrong order would not show
    for batch_size in (2, 16):
        assert (
            transcribe_utterances(recogniser, utterances, batch_size=batch_size, progress=False)
            == alone
        )


def two_sided(recogniser):
    """The same weights with windows that look ahead."""
    config = LaCTASRConfig(**recogniser.model.config.to_diff_dict() | {"window_size": (16, 15)})
    model = LaCTForCTC(config).eval()
    model.load_state_dict(recogniser.model.state_dict())
    return recogniser._replace(model=model)


@pytest.mark.parametrize("windows", ["causal", "two-sided"])
def test_a_recording_too_long_for_a_batch_is_heard_alone(
    recogniser, utterances, monkeypatch, windows
):
    """In pieces, if it can be."""
    if windows == "two-sided":
        recogniser = two_sided(recogniser)
    expected = transcribe_utterances(recogniser, utterances, progress=False)
    monkeypatch.setattr("lact_kernels.asr.evaluation.BATCH_SECONDS", 1)
    assert transcribe_utterances(recogniser, utterances, progress=False) == expected


def test_batches_are_smaller_where_recordings_are_long(recogniser, utterances, monkeypatch):
    sizes = []
    hook = recogniser.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr("lact_kernels.asr.evaluation.BATCH_SECONDS", 4)
    transcribe_utterances(recogniser, utterances, progress=False)
    hook.remove()
    assert sizes == [1, 2, 2]  # of 2.01 s; 1.417 and 0.9 s; 0.73 and 0.31 s


def test_decoder_sees_the_frames_of_the_recording_only_and_the_longest_first(
    recogniser, utterances
):
    frames = []

    def decoder(log_probs):
        frames.append(len(log_probs))
        assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(len(log_probs)))
        return [3]

    heard = transcribe_utterances(recogniser, utterances, decoder, progress=False)
    assert heard == [recogniser.tokenizer.decode([3])] * 5
    expected = (-(-round(u.duration * RATE) // 640) for u in utterances)
    assert frames == sorted(expected, reverse=True)


def test_broken_recordings_are_named_skipped_and_counted(recogniser, utterances, broken, caplog):
    mixed = [utterances[0], broken, *utterances[1:]]
    with caplog.at_level(logging.WARNING):
        result, heard = evaluate_set(recogniser, mixed, progress=False)
    assert f"{broken.path} is skipped" in caplog.text
    assert heard[1] is None and None not in heard[:1] + heard[2:]
    assert (result["skipped"], result["wer"]["utterances"], result["wer"]["units"]) == (1, 5, 15)
    assert result["seconds"] == pytest.approx(sum(u.duration for u in utterances), abs=1e-3)
    with pytest.raises(ValueError, match="no recording"):
        evaluate_set(recogniser, [broken], progress=False)


def test_texts_are_normalised_and_speakers_resampled_if_there_are_enough(recogniser, utterances):
    def decoder(log_probs):
        return recogniser.tokenizer("one two three").input_ids

    sets = {
        "few": [Utterance(u.path, u.text, u.duration, speaker=u.path) for u in utterances],
        "many": [
            Utterance(u.path, u.text, u.duration, speaker=f"{i}, {j}")
            for j in range(2)
            for i, u in enumerate(utterances)
        ],
    }
    results = evaluate(recogniser, sets, decoder, progress=False)
    assert [r["wer"]["rate"] for r in results.values()] == [0, 0]
    assert [r["resampled"] for r in results.values()] == ["utterances", "speakers"]
    head, *lines = table(results).splitlines()
    assert [line.split()[:2] for line in lines] == [["few", "5"], ["many", "10"]]
    assert len({len(line) for line in (head, *lines)}) == 1


@pytest.fixture
def folder(recogniser, tmp_path):
    save_recogniser(tmp_path / "model", *recogniser)
    return tmp_path


def test_command_writes_results_and_hypotheses(recogniser, folder, utterances, broken, capsys):
    write_manifest(folder / "noise.json", [*utterances, broken])
    out, heard = folder / "results.json", folder / "heard.jsonl"
    arguments = [f"{folder}/model", f"{folder}/noise.json", f"again={folder}/noise.json"]
    options = [
        "--json",
        f"{out}",
        "--hypotheses",
        f"{heard}",
        "--device",
        "cpu",
        "--batch-size",
        "2",
    ]
    assert cli.main(["evaluate", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "noise" in printed and "again" in printed

    report = json.loads(out.read_text())
    expected, hypotheses = evaluate_set(recogniser, [*utterances, broken], progress=False)
    assert list(report["sets"]) == ["noise", "again"]
    assert report["model"] == f"{folder}/model"
    assert report["torch"] == torch.__version__ and report["lact_kernels"]
    for result in report["sets"].values():
        assert result["wer"] == expected["wer"] and result["skipped"] == 1
    lines = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [line["hypothesis"] for line in lines] == 2 * hypotheses
    assert lines[0]["reference"] == "one two three" and lines[6]["set"] == "again"
    assert not list(folder.glob("*.partial"))


def test_a_set_that_fails_leaves_the_results_before_it(folder, utterances, broken):
    write_manifest(folder / "noise.json", utterances)
    write_manifest(folder / "broken.json", [broken])
    out = folder / "results.json"
    arguments = [f"{folder}/model", f"{folder}/noise.json", f"{folder}/broken.json"]
    assert cli.main(["evaluate", *arguments, "--json", f"{out}"]) == 1
    assert list(json.loads(out.read_text())["sets"]) == ["noise"]


def test_limit_is_spread_over_the_set(folder, utterances):
    write_manifest(folder / "noise.json", utterances)
    heard = folder / "heard.jsonl"
    arguments = ["evaluate", f"{folder}/model", f"{folder}/noise.json"]
    assert cli.main([*arguments, "--limit", "2", "--hypotheses", f"{heard}"]) == 0
    paths = [json.loads(line)["audio_filepath"] for line in heard.read_text().splitlines()]
    assert paths == [utterances[0].path, utterances[2].path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model", "nothing.json"], "there is no set"),
        (["model", "noise.json", "empty.json"], "has no utterances"),
        (["model", "noise.json", "noise.json"], "two sets are called noise"),
        (["nowhere", "noise.json"], "nowhere is not the folder of a recogniser"),
        (["model", "noise.json", "--json", "no/where.json"], "cannot be written"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments, message, folder, utterances, capsys, monkeypatch
):
    write_manifest(folder / "noise.json", utterances)
    (folder / "empty.json").write_text("\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(LaCTForCTC, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["evaluate", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_confusions_are_those_by_hand():
    pairs = [
        ("two one", "one one"),
        ("ten one one two", "ten two"),
        ("one", "one two two"),
        ("", ""),
    ]
    words, counts = asr_picture.confusions(pairs)
    assert words == ["one", "two", "ten"]
    assert counts == [
        [2, 0, 0, 2],  # one, twice deleted
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 2, 0, 0],  # inserted
    ]


def test_picture_is_a_png(tmp_path):
    path = tmp_path / "picture.png"
    pairs = [("one two", "one three"), ("three", "three")]
    posteriors = torch.randn(25, 5).softmax(dim=1)
    tokens = ["<pad>", "<unk>", *WORDS]
    words = [("one", 0.1, 0.4), ("two", 0.5, 0.9)]
    assert asr_picture.draw(
        path, pairs, torch.randn(100, 80), 0.01, posteriors, 0.04, tokens, words
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no words"):
        asr_picture.confusions([("", "")])
