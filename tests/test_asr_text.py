"""Texts as labels and back: normalisation, tokenizers of characters and words, times of words."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutomaticSpeechRecognitionPipeline, Wav2Vec2CTCTokenizer

from lact_kernels.asr.text import (
    WordCTCTokenizer,
    build_tokenizer,
    normalize_text,
    tokenizer_from_vocabulary,
    words_of,
    write_lexicon,
)

TEXTS = ["hello world", "cat cats", "it's one"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,\tWORLD! \n", "hello world"),
        ("it’s DON´T rock ' n ' roll", "it's don't rock n roll"),
        ("ﬁve ½ №5", "five 1 2 no5"),
        ("Cafe\N{COMBINING ACUTE ACCENT}, हिन्दी", "café हिन्दी"),
        ("well-known_word|<pad>", "well known word pad"),
        ("ŉ", "'n"),
        (" — ", ""),
    ],
    ids=[
        "case and spaces",
        "apostrophes",
        "NFKC",
        "marks",
        "symbols",
        "apostrophe by NFKC",
        "none",
    ],
)
def test_normalized_text(text, expected):
    assert normalize_text(text) == expected
    assert normalize_text(expected) == expected


def test_vocabularies_begin_with_the_blank():
    characters, words = build_tokenizer(TEXTS), build_tokenizer(TEXTS, "word")
    by_id = sorted(characters.get_vocab(), key=characters.get_vocab().get)
    assert by_id == ["<pad>", "<unk>", "|", *"'acdehilnorstw"]
    by_id = sorted(words.get_vocab(), key=words.get_vocab().get)
    assert by_id == ["<pad>", "<unk>", "cat", "cats", "hello", "it's", "one", "world"]
    for tokenizer in (characters, words):
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
        assert tokenizer.bos_token is None and tokenizer.eos_token is None
        assert len(tokenizer) == len(tokenizer.get_vocab()) == tokenizer.vocab_size


@pytest.mark.parametrize("unit", ["char", "word"])
def test_labels_are_the_text(unit):
    tokenizer = build_tokenizer(TEXTS, unit)
    for text in [*TEXTS, "one one cats cat"]:
        labels = tokenizer(text).input_ids
        assert len(labels) == len(text if unit == "char" else text.split())
        assert tokenizer.decode(labels, group_tokens=False) == text
    assert tokenizer("").input_ids == []
    unknown = tokenizer("qqq").input_ids
    assert unknown == [tokenizer.unk_token_id] * (3 if unit == "char" else 1)


def test_words_inside_of_words_are_not_found():
    tokenizer = build_tokenizer(TEXTS, "word")
    cat, unknown = tokenizer.convert_tokens_to_ids("cat"), tokenizer.unk_token_id
    assert tokenizer("concat cat catnip").input_ids == [unknown, cat, unknown]


@pytest.mark.parametrize("unit", ["char", "word"])
def test_repeats_need_a_blank(unit):
    tokenizer = build_tokenizer(TEXTS, unit)
    text = "hello world" if unit == "char" else "hello hello world"
    labels = tokenizer(text).input_ids
    merged = {"char": "helo world", "word": "hello world"}[unit]
    assert tokenizer.decode(labels) == merged
    blanks = [i for label in labels for i in (0, label, label)]
    assert tokenizer.decode(blanks) == text
    assert tokenizer.batch_decode(torch.tensor([blanks, blanks[::-1]]))[0] == text


def frames(tokenizer, text):
    """Two blanks, then each label for two frames with a blank after it."""
    return [0, 0] + [i for label in tokenizer(text).input_ids for i in (label, label, 0)]


@pytest.mark.parametrize("unit", ["char", "word"])
def test_offsets_of_words(unit):
    tokenizer = build_tokenizer(TEXTS, unit)
    output = tokenizer.decode(frames(tokenizer, "cat cat hello"), output_word_offsets=True)
    assert output.text == "cat cat hello"
    spans = [(o["word"], int(o["start_offset"]), int(o["end_offset"])) for o in output.word_offsets]
    characters = [("cat", 2, 10), ("cat", 14, 22), ("hello", 26, 40)]
    words = [("cat", 2, 4), ("cat", 5, 7), ("hello", 8, 10)]
    assert spans == (characters if unit == "char" else words)


@pytest.mark.parametrize("unit", ["char", "word"])
@pytest.mark.parametrize("timestamps", ["word", "char"])
def test_times_of_the_pipeline(unit, timestamps):
    tokenizer = build_tokenizer(TEXTS, unit)
    pipeline = object.__new__(AutomaticSpeechRecognitionPipeline)  # without a model
    pipeline.type, pipeline.tokenizer = "ctc", tokenizer
    pipeline.feature_extractor = SimpleNamespace(sampling_rate=16000)
    config = SimpleNamespace(model_type="any", inputs_to_logits_ratio=1600)
    pipeline.model = SimpleNamespace(config=config)
    tokens = torch.tensor([frames(tokenizer, "one cat")])
    result = pipeline.postprocess([{"tokens": tokens}], return_timestamps=timestamps)
    assert result["text"] == "one cat"
    chunks = [(c["text"], *c["timestamp"]) for c in result["chunks"]]
    if unit == "word":
        assert chunks == [("one", 0.2, 0.4), ("cat", 0.5, 0.7)]
    elif timestamps == "word":
        assert chunks == [("one", 0.2, 1.0), ("cat", 1.4, 2.2)]
    else:
        assert [text for text, *_ in chunks] == list("one cat")


@pytest.mark.parametrize("unit", ["char", "word"])
def test_saved_tokenizer_is_the_same(unit, tmp_path):
    tokenizer = build_tokenizer(TEXTS, unit)
    kind = Wav2Vec2CTCTokenizer if unit == "char" else WordCTCTokenizer
    assert type(tokenizer) is kind
    tokenizer.save_pretrained(tmp_path)
    for other in (
        kind.from_pretrained(tmp_path),
        tokenizer_from_vocabulary(tmp_path / "vocab.json"),
    ):
        assert type(other) is kind
        assert other.get_vocab() == tokenizer.get_vocab()
        assert len(other) == len(tokenizer)
        assert other("cats qq one").input_ids == tokenizer("cats qq one").input_ids
        assert other.decode(frames(other, "cats one")) == "cats one"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("[", "not JSON"),
        (["<pad>"], "must be an object"),
        ({"<unk>": 0, "<pad>": 1, "a": 2}, "<pad> = 0"),
        ({"<pad>": 0, "a": 1}, "<unk>"),
        ({"<pad>": 0, "<unk>": 1, "a": 3}, "0 to 2"),
        ({"<pad>": 0, "<unk>": 1, "a": "2"}, "0 to 2"),
        ({"<pad>": 0, "<unk>": 1, "|": 2}, "special tokens only"),
    ],
    ids=["text", "list", "other blank", "no unknown", "gap", "id of another type", "empty"],
)
def test_bad_vocabulary(vocabulary, message, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary))
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_vocabulary(path)
    assert str(path) in str(error.value)


def test_nothing_to_build_from(tmp_path):
    with pytest.raises(ValueError, match="no words"):
        build_tokenizer(["", "  "])
    with pytest.raises(ValueError, match="unit"):
        build_tokenizer(TEXTS, "letter")
    with pytest.raises(FileNotFoundError):
        tokenizer_from_vocabulary(tmp_path / "missing.json")


def test_lexicon(tmp_path):
    assert words_of(TEXTS) == ["cat", "cats", "hello", "it's", "one", "world"]
    write_lexicon(tmp_path / "lexicon.txt", ["cat", "it's"])
    assert (tmp_path / "lexicon.txt").read_text() == "cat\tc a t |\nit's\ti t ' s |\n"
