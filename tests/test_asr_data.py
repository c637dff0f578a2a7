"""Speech data: sound files, resampling of streams, manifests, augmentation, examples, batches."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional as AF
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

from lact_kernels.asr.audio import StreamResampler, audio_blocks, read_audio
from lact_kernels.asr.dataset import (
    POOL,
    Augmentation,
    LengthBucketSampler,
    SpeechDataset,
    collate,
    keep_usable,
)
from lact_kernels.asr.manifest import (
    Utterance,
    read_librispeech,
    read_manifest,
    read_utterances,
    write_manifest,
)
from lact_kernels.asr.text import build_tokenizer

RATE = 16000
TOKENIZER = build_tokenizer(["hello", "abcdefghijkl"])
CLOSE = {"rtol": 0, "atol": 1e-5}


def noise(seconds, rate=RATE, channels=1, seed=0):
    shape = (round(seconds * rate), channels)
    x = np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype("float32")
    return x if channels > 1 else x[:, 0]


def save(path, x, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return str(path)


# Sound files


def test_channels_are_averaged(tmp_path):
    x = noise(0.5, channels=2)
    y = read_audio(save(tmp_path / "stereo.wav", x))
    assert y.dtype == torch.float32 and y.shape == (RATE // 2,)
    torch.testing.assert_close(y, torch.from_numpy(x.mean(1)), **CLOSE)


def test_part_of_a_file_is_resampled(tmp_path):
    x = noise(2.0, rate=8000)
    path = save(tmp_path / "a.wav", x, 8000)
    y = read_audio(path, RATE, offset=0.5, duration=0.25)
    expected = AF.resample(torch.from_numpy(x[4000:6000]), 8000, RATE)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert len(read_audio(path, RATE, offset=1.5)) == RATE // 2


def test_durations_are_rounded(tmp_path):
    path = save(tmp_path / "a.wav", noise(1.0))
    assert len(read_audio(path, duration=1.04)) == RATE
    with pytest.raises(OSError, match=r"a.wav has 0.50 s from 0.5 s on, 0.60 s were expected"):
        read_audio(path, offset=0.5, duration=0.6)
    with pytest.raises(OSError, match=r"a.wav ends at 1.00 s, before the offset 1.0 s"):
        read_audio(path, offset=1.0)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "no samples", "cut", "NaN"])
def test_unreadable_file(kind, tmp_path):
    path = tmp_path / "bad.flac"
    if kind == "text":
        path.write_text("not a sound")
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        save(path, noise(1.0))
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "no samples":
        path = tmp_path / "bad.wav"
        save(path, noise(0))
    elif kind == "NaN":
        path = tmp_path / "bad.wav"
        save(path, noise(1.0) * np.float32("nan"))
    with pytest.raises(FileNotFoundError if kind == "missing" else OSError, match=path.name):
        read_audio(path)
    if kind not in ("no samples", "NaN"):
        with pytest.raises(OSError, match=path.name):
            list(audio_blocks(path))


@pytest.mark.parametrize("rate", [44100, 22050, 8000, 16000, 48000])
def test_blocks_are_the_resampled_file(rate, tmp_path):
    path = save(tmp_path / "long.wav", noise(2.7, rate, channels=2), rate)
    blocks = list(audio_blocks(path, RATE, seconds=0.3))
    assert len(blocks) >= 9 and max(map(len, blocks)) <= 0.3 * RATE + 200
    whole = AF.resample(torch.from_numpy(soundfile.read(path)[0].mean(1)).float(), rate, RATE)
    torch.testing.assert_close(torch.cat(blocks), whole, **CLOSE)
    torch.testing.assert_close(read_audio(path), whole, **CLOSE)


@pytest.mark.parametrize("rate", [44100, 22050, 8000, 16000])
def test_stream_of_any_pieces(rate):
    x = torch.from_numpy(noise(0.4, rate))[:-3]  # not whole groups
    stream = StreamResampler(rate, RATE)
    for sizes in ([1] * 50 + [0, 1000, 7, 2000], [len(x)], [441 * 3, 441 * 4]):
        pieces = x.split([*sizes, len(x) - sum(sizes)])
        y = torch.cat([stream.push(piece) for piece in pieces] + [stream.finish()])
        torch.testing.assert_close(y, AF.resample(x, rate, RATE), **CLOSE)
    assert len(stream.finish()) == 0


def test_stream_comes_as_soon_as_it_can():
    stream = StreamResampler(8000, RATE)
    assert len(stream.push(torch.ones(800))) >= 2 * (800 - 7)


# Lists of utterances


def lines(tmp_path, *entries):
    path = tmp_path / "manifest.json"
    path.write_text("".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in entries))
    return path


GOOD = {"audio_filepath": "a.wav", "duration": 1, "text": "hello"}


def test_manifest_of_others(tmp_path):
    full = {"audio_filepath": "/b.wav", "duration": 2.5, "text": "x", "offset": 1, "speaker": 7}
    path = lines(tmp_path, "\ufeff", GOOD, "\n", full | {"pred_text": "y"})
    first, second = read_utterances(path)
    assert first == Utterance(str(tmp_path / "a.wav"), "hello", 1.0)
    assert second == Utterance("/b.wav", "x", 2.5, 1.0, "7")


def test_manifest_is_written_whole_or_not(tmp_path):
    utterances = [
        Utterance(str(tmp_path / "clips" / "a.wav"), "grüße", 1.25, 0.5, "anna"),
        Utterance("/elsewhere/b.wav", "b", 2.0),
    ]
    path = tmp_path / "manifest.json"
    write_manifest(path, utterances)
    assert read_manifest(path) == utterances
    written = path.read_text(encoding="utf-8")
    assert '"clips/a.wav"' in written and '"grüße"' in written
    with pytest.raises(AttributeError):
        write_manifest(path, [utterances[1], None])
    assert read_manifest(path) == utterances


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{oops\n", "Expecting property name"),
        ("[1]\n", "JSON object"),
        (
            {"audio_filepath": "a.wav", "text": "x"},
            "duration must be a number of seconds, got None",
        ),
        (GOOD | {"text": 3}, "text must be a string, got 3"),
        (GOOD | {"audio_filepath": ""}, "audio_filepath must not be empty"),
        (GOOD | {"duration": "1.0"}, "duration must be a number of seconds, got '1.0'"),
        (GOOD | {"duration": 0}, "duration must be positive"),
        (GOOD | {"duration": float("nan")}, "finite"),
        (GOOD | {"duration": float("inf")}, "finite"),
        (GOOD | {"offset": -1}, "offset must be finite and not negative, got -1"),
        (GOOD | {"speaker": ["x"]}, "speaker must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_line_is_named(entry, message, tmp_path):
    path = lines(tmp_path, GOOD, "\n", entry)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(path)
    assert f"{path}, line 3: " in str(error.value) and "; got b'" in str(error.value)


def test_no_utterances(tmp_path):
    with pytest.raises(ValueError, match="no utterances"):
        read_utterances(lines(tmp_path, "\n"))
    with pytest.raises(ValueError, match="no utterances"):
        read_utterances(tmp_path)
    for path in (tmp_path / "missing.json", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="missing"):
            read_utterances(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_librispeech(tmp_path / "missing")


def test_librispeech(tmp_path, caplog):
    chapter = tmp_path / "dev-clean" / "84" / "121"
    save(chapter / "84-121-0000.flac", noise(0.5))
    save(chapter / "84-121-0002.flac", noise(0.75, 8000), 8000)
    (chapter / "84-121-0003.flac").write_text("broken")
    names = ("0000 HELLO THERE", "0001 MISSING", "0002 AGAIN", "0003 BROKEN")
    (chapter / "84-121.trans.txt").write_text("\n".join(f"84-121-{name}" for name in names))
    other = tmp_path / "test" / "9" / "1"
    save(other / "9-1-0000.flac", noise(0.1))
    (other / "9-1.trans.txt").write_text("9-1-0000 LAST\n")
    utterances = read_utterances(tmp_path)
    assert utterances == [
        Utterance(str(chapter / "84-121-0000.flac"), "HELLO THERE", 0.5, speaker="84"),
        Utterance(str(chapter / "84-121-0002.flac"), "AGAIN", 0.75, speaker="84"),
        Utterance(str(other / "9-1-0000.flac"), "LAST", 0.1, speaker="9"),
    ]
    assert len(caplog.records) == 2
    assert "84-121-0001.flac" in caplog.text and "84-121-0003.flac" in caplog.text
    assert read_utterances(chapter.parent)[:2] == utterances[:2]


def test_usable_utterances():
    def of(text, duration):
        return Utterance("x", text, duration)

    kept = [of("hello", 0.6), of("abc", 0.3), of("az", 30)]
    left_out = [of("hello", 0.59), of("a", 0.05), of("a", 31), of("", 1)]
    found, counts = keep_usable([*kept, *left_out], TOKENIZER, 0.1)
    assert found == kept
    assert counts == {
        "more labels than frames": 1,
        "shorter than 0.1 s": 1,
        "longer than 30 s": 1,
        "without text": 1,
        "unknown tokens (kept)": 1,
    }


# Augmentation

OFF = dict.fromkeys(("speeds", "gain_db", "lead_seconds", "tail_seconds", "snr_db"))


def augmented(x, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return Augmentation(**(OFF | changes))(x, RATE, generator)


def test_each_augmentation():
    x = torch.from_numpy(noise(1.0))
    assert torch.equal(augmented(x), x)
    assert {len(augmented(x, seed, speeds=(0.9, 1.0, 1.1))) for seed in range(20)} == {
        14546,
        16000,
        17778,
    }
    gains = [(augmented(x, seed, gain_db=(-6, 6)).norm() / x.norm()).item() for seed in range(50)]
    assert 0.501 < min(gains) < 0.6 and 1.7 < max(gains) < 1.996
    padded = augmented(x, lead_seconds=(0.1, 0.1), tail_seconds=(0.2, 0.2))
    assert len(padded) == 1.3 * RATE
    assert torch.equal(padded[1600:-3200], x) and padded.count_nonzero() == x.count_nonzero()


def test_noise_covers_the_silence_too():
    x = torch.from_numpy(noise(1.0))
    y = augmented(x, lead_seconds=(0.5, 0.5), snr_db=(20, 20))
    for part in (y[:8000], y[8000:] - x):
        assert 20 * torch.log10(x.std() / part.std()).item() == pytest.approx(20, abs=0.3)


def test_silence_stays_silent():
    y = augmented(torch.zeros(100), gain_db=(-6, 6), snr_db=(10, 35), lead_seconds=(0.1, 0.1))
    assert len(y) == 1700 and not y.any()


# Examples


def corpus(tmp_path, count=6, speakers=2, seconds=0.2):
    return [
        Utterance(
            save(tmp_path / f"{i}.wav", noise(seconds, seed=i)),
            "abcdefghijkl"[i],
            seconds,
            speaker=str(i % speakers),
        )
        for i in range(count)
    ]


def draws(dataset, draws, workers=0):
    loader = DataLoader(
        dataset, batch_size=2, sampler=draws, num_workers=workers, collate_fn=collate
    )
    return list(loader)


def test_plain_examples(tmp_path):
    utterances = corpus(tmp_path)
    examples = list(SpeechDataset(utterances, TOKENIZER))
    assert len(examples) == 6
    for utterance, example in zip(utterances, examples):
        assert torch.equal(example["input_values"], read_audio(utterance.path))
        assert example["labels"].dtype == torch.int64
        assert TOKENIZER.decode(example["labels"]) == utterance.text


def test_part_of_a_recording(tmp_path):
    x = noise(1.0)
    utterance = Utterance(save(tmp_path / "a.wav", x), "a", 0.25, 0.5)
    (example,) = SpeechDataset([utterance], TOKENIZER)
    torch.testing.assert_close(example["input_values"], torch.from_numpy(x[8000:12000]), **CLOSE)


def test_examples_depend_on_seed_and_draw_alone(tmp_path):
    utterances = corpus(tmp_path)

    def dataset(seed=0):
        options = {"augmentation": Augmentation(), "join_seconds": 1.0, "seed": seed}
        return SpeechDataset(utterances, TOKENIZER, **options)

    here, there = draws(dataset(), range(12)), draws(dataset(), range(12), workers=2)
    for a, b in zip(here, there):
        assert all(torch.equal(a[key], b[key]) for key in a)
    resumed = dataset()[9]["input_values"]
    assert torch.equal(resumed, dataset()[9]["input_values"])
    assert not torch.equal(here[0]["input_values"], here[3]["input_values"])  # epochs 0 and 1
    assert not torch.equal(dataset(1)[9]["input_values"][:99], resumed[:99])


def test_utterances_of_a_speaker_are_joined(tmp_path):
    utterances = corpus(tmp_path, count=12)
    dataset = SpeechDataset(utterances, TOKENIZER, join_seconds=1.5)
    counts, followers = set(), set()
    for draw in range(36):
        example = dataset[draw]
        texts = TOKENIZER.decode(example["labels"]).split()
        indices = ["abcdefghijkl".index(text) for text in texts]
        counts.add(len(texts))
        followers.add(tuple(indices[1:2]))
        assert indices[0] == draw % 12
        assert len(set(indices)) == len(indices) and len({i % 2 for i in indices}) == 1
        x = example["input_values"]
        assert len(x) < 1.5 * RATE
        gaps = (len(x) / RATE - 0.2 * len(texts)) / max(1, len(texts) - 1)
        assert len(texts) == 1 or 0.1 <= gaps <= 0.5
        assert torch.equal(x[-3200:], read_audio(utterances[indices[-1]].path))
    assert len(counts) > 1 and max(counts) >= 4 and len(followers) > 6


def test_speakers_that_are_not_known_are_not_joined(tmp_path):
    known, unknown = corpus(tmp_path, count=1)[0], Utterance(str(tmp_path / "0.wav"), "b", 0.2)
    dataset = SpeechDataset([unknown, unknown, known], TOKENIZER, join_seconds=5.0)
    assert [len(example["input_values"]) for example in dataset] == [3200] * 3
    with pytest.raises(ValueError, match="speaker"):
        SpeechDataset([unknown], TOKENIZER, join_seconds=5.0)
    with pytest.raises(ValueError, match="at least one"):
        SpeechDataset([], TOKENIZER)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_recordings_are_replaced_and_counted_once(workers, tmp_path, caplog):
    utterances = corpus(tmp_path)
    (tmp_path / "2.wav").write_text("broken")
    (tmp_path / "3.wav").unlink()
    (tmp_path / "5.wav").write_bytes(b"")
    dataset = SpeechDataset(utterances, TOKENIZER)
    assert dataset.num_broken == 0
    batches = draws(dataset, list(range(6)) * 3, workers)
    texts = [TOKENIZER.decode(row[row >= 0]) for batch in batches for row in batch["labels"]]
    assert "".join(texts) == "abeeea" * 3
    assert dataset.num_broken == 3
    if workers == 0:  # what workers log is not seen here
        assert len(caplog.records) == 3
        assert all(f"{i}.wav" in caplog.text for i in (2, 3, 5))
        assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_broken_recordings_are_not_joined(tmp_path):
    utterances = corpus(tmp_path, count=4, speakers=1)
    (tmp_path / "1.wav").unlink()
    example = SpeechDataset(utterances, TOKENIZER, join_seconds=9.0)[0]
    assert sorted(TOKENIZER.decode(example["labels"]).split()) == ["a", "c", "d"]


def test_no_recording_works(tmp_path):
    dataset = SpeechDataset([Utterance(str(tmp_path / "x.wav"), "a", 1.0)] * 3, TOKENIZER)
    with pytest.raises(OSError, match="none of the 3 recordings"):
        dataset[1]


def test_collated_batch():
    examples = [
        {"input_values": torch.ones(n), "labels": torch.arange(1, m + 1)}
        for n, m in ((3, 2), (5, 1), (1, 0))
    ]
    batch = collate(examples)
    assert batch["input_values"].tolist() == batch["attention_mask"].tolist()
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2], [1, -100], [-100, -100]]
    dtypes = [batch[key].dtype for key in ("input_values", "attention_mask", "labels")]
    assert dtypes == [torch.float32, torch.int64, torch.int64]


# Batches


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1003])
def test_every_utterance_once_per_epoch(count):
    sampler = LengthBucketSampler(torch.rand(count).tolist(), batch_size=4)
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(epoch * count, (epoch + 1) * count))
    assert len(sampler) == count


def test_batches_are_of_similar_length_and_random():
    lengths = (torch.rand(1003) * 20).tolist()
    sampler = LengthBucketSampler(lengths, batch_size=8, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        orders.append([draw - epoch * 1003 for draw in sampler])
    for order in orders:
        batches = torch.tensor(lengths)[torch.tensor(order[:1000])].view(-1, 8)
        spread = batches.amax(1) - batches.amin(1)
        assert spread.mean() < 2 * 20 / POOL and spread.max() < 5
        rank = batches.mean(1).argsort().argsort()
        assert (rank.diff() > 0).float().mean() < 0.7  # batches come in no order of length
    assert len({tuple(order) for order in orders}) == 3
    assert list(LengthBucketSampler(lengths, 8, seed=2)) != orders[0]


def test_epochs_and_resume_of_accelerate(tmp_path):
    """The loader that transformers.Trainer makes, and how it resumes inside an epoch."""
    dataset = list(range(40))
    sampler = LengthBucketSampler(torch.rand(20).tolist(), batch_size=4)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=torch.tensor)
    )
    loader.set_epoch(1)
    whole = [batch.tolist() for batch in loader]
    assert sorted(sum(whole, [])) == list(range(20, 40))
    resumed = skip_first_batches(loader, 2)
    resumed.set_epoch(1)
    assert [batch.tolist() for batch in resumed] == whole[2:]
    with pytest.raises(ValueError, match="batch_size"):
        LengthBucketSampler([1.0], 0)
