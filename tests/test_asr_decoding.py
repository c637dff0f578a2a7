"""Decoders and alignment on log-probabilities with known answers."""

import sys

import pytest
import torch

from lact_kernels.asr.decoding import BeamDecoder, GreedyDecoder, align, text_of, word_places
from lact_kernels.asr.text import build_tokenizer

CHARACTERS = build_tokenizer(["hello cat cut dog"])
WORDS = build_tokenizer(["one two three"], "word")


def path(frames, tokenizer=CHARACTERS):
    """Tokens of frames: letters or words, "-" for the blank."""
    return [0 if f == "-" else tokenizer.convert_tokens_to_ids(f) for f in frames]


def log_probs(frames, tokenizer=CHARACTERS, p=0.9):
    """`[T, V]` with the probability p for each frame's token and the rest for all others alike."""
    tokens, V = path(frames, tokenizer), len(tokenizer)
    x = torch.full((len(tokens), V), (1 - p) / (V - 1))
    x[range(len(tokens)), tokens] = p
    return x.log()


SAID = {
    "repeated letters": ("hheel-llo", "hello"),
    "words": ("cat||-do-g", "cat dog"),
    "delimiters at the ends": ("|-cat|-|", "cat"),
    "last letter in several frames": ("cattt", "cat"),
    "blanks only": ("-----", ""),
    "delimiters only": ("|-|", ""),
    "nothing": ("", ""),
    "one frame": ("-", ""),
}


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("kind", [GreedyDecoder, BeamDecoder])
def test_what_was_said(kind, case):
    frames, text = SAID[case]
    words = ["hello", "cat", "dog"]
    decoder = kind(CHARACTERS) if kind is GreedyDecoder else kind(CHARACTERS, words)
    tokens = decoder(log_probs(frames))
    assert 0 not in tokens and text_of(CHARACTERS, tokens) == text
    assert len(align(log_probs(frames), tokens)) == len(tokens)


@pytest.mark.parametrize("kind", [GreedyDecoder, BeamDecoder])
def test_whole_words_as_tokens(kind):
    """A word said twice is two words, in several frames it is one."""
    frames = ["one", "one", "-", "one", "two", "two", "-"]
    options = [] if kind is GreedyDecoder else [["one", "two", "three"]]
    tokens = kind(WORDS, *options)(log_probs(frames, WORDS))
    assert tokens == path(["one", "one", "two"], WORDS)
    assert text_of(WORDS, tokens) == "one one two"
    assert word_places(WORDS, tokens) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize(
    "said, understood", [("cc-t", "cat"), ("cat|dig", "cat dog"), ("cat-tdog", "cat dog")]
)
def test_beam_finds_words_of_the_lexicon_only(said, understood):
    tokens = BeamDecoder(CHARACTERS, ["cat", "dog"])(log_probs(said, p=0.6))
    assert text_of(CHARACTERS, tokens) == understood
    tokens = GreedyDecoder(CHARACTERS)(log_probs(said, p=0.6))
    assert text_of(CHARACTERS, tokens) != understood


def test_beam_leaves_out_a_word_that_is_not_complete():
    frames = log_probs("cat|do", p=0.6)
    assert (
        text_of(CHARACTERS, BeamDecoder(CHARACTERS, ["cat", "dog"], beam_size=1)(frames)) == "cat"
    )


def test_beam_of_whole_words_hears_no_others():
    decoder = BeamDecoder(WORDS, ["two", "three"])
    frames = log_probs(["one", "-", "two"], WORDS)
    frames[0, path(["three"], WORDS)] = torch.tensor(0.05).log()
    assert decoder(frames) == path(["three", "two"], WORDS)


ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-2.0\t<unk>\t0
-99\t<s>\t0
-0.5\t</s>\t0
-3.0\t{}\t0
-0.1\t{}\t0

\\2-grams:
-0.5\t<s> </s>

\\end\\
"""


@pytest.mark.parametrize("unit", ["char", "word"])
def test_language_model_decides_between_words(tmp_path, unit):
    """The word that sounds likelier and the one that the language model expects."""
    tokenizer = build_tokenizer(["cat cut cot"], unit)
    frames = log_probs("-c-at-" if unit == "char" else ["-", "cat", "-"], tokenizer)
    heard, other = ("a", "u") if unit == "char" else ("cat", "cut")
    frame = 3 if unit == "char" else 1
    frames[frame, path([heard], tokenizer)] = torch.tensor(0.5).log()
    frames[frame, path([other], tokenizer)] = torch.tensor(0.4).log()
    for expected in ("cut", "cat"):
        lm = tmp_path / f"{expected}.arpa"
        lm.write_text(ARPA.format(*sorted(["cat", "cut"], key=lambda word: word == expected)))
        decoder = BeamDecoder(tokenizer, ["cot", "cat", "cut"], lm=lm)
        assert text_of(tokenizer, decoder(frames)) == expected
    assert text_of(tokenizer, BeamDecoder(tokenizer, ["cat", "cut"])(frames)) == "cat"


def test_word_score_favours_more_words():
    tokenizer = build_tokenizer(["ab"])
    frames = log_probs("a|b", tokenizer, p=0.4)
    frames[1, 0] = torch.tensor(0.41).log()  # "ab" is a little likelier than "a b"
    texts = [
        text_of(tokenizer, BeamDecoder(tokenizer, ["a", "b", "ab"], word_score=score)(frames))
        for score in (0.0, 2.0)
    ]
    assert texts == ["ab", "a b"]


@pytest.mark.parametrize(
    "tokenizer, words, options, error, message",
    [
        (CHARACTERS, [], {}, ValueError, "needs words"),
        (CHARACTERS, ["cat", "fox", "zoo"], {}, ValueError, "cannot spell these words: fox, zoo$"),
        (CHARACTERS, list("12345678"), {}, ValueError, "1, 2, 3, 4, 5 and 3 more"),
        (CHARACTERS, ["cat|dog"], {}, ValueError, "cat|dog"),
        (WORDS, ["one", "four"], {}, ValueError, "words: four"),
        (WORDS, ["<pad>"], {}, ValueError, "words: <pad>"),
        (CHARACTERS, ["cat"], {"lm": "none.arpa"}, FileNotFoundError, "none.arpa"),
        (CHARACTERS, ["cat"], {"lm": __file__}, ValueError, "test_asr_decoding.py cannot be used"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_lexicon_or_language_model(tokenizer, words, options, error, message):
    with pytest.raises(error, match=message):
        BeamDecoder(tokenizer, words, **options)


def test_flashlight_text_is_asked_for_by_name(monkeypatch):
    import torchaudio.models.decoder as decoder

    monkeypatch.delitem(vars(decoder), "ctc_decoder", raising=False)
    monkeypatch.delattr(decoder, "_ctc_decoder", raising=False)
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", None)
    with pytest.raises(ImportError, match="pip install flashlight-text"):
        BeamDecoder(CHARACTERS, ["cat"])


def test_alignment_finds_the_frames_of_each_token():
    frames = "--cc-a|t--t"
    spans = align(log_probs(frames), path("ca|tt"))
    assert [(s.start, s.end) for s in spans] == [(2, 4), (5, 6), (6, 7), (7, 8), (10, 11)]
    assert [s.score for s in spans] == pytest.approx([0.9] * 5)


def test_score_is_the_mean_probability():
    x = log_probs("cc")
    x[1, path("c")] = torch.tensor(0.5).log()
    assert align(x, path("c"))[0].score == pytest.approx(0.7)


def test_alignment_of_other_tokens_than_the_likeliest():
    span = align(log_probs("-ca-t", p=0.6), path("cut"))[1]
    assert (span.start, span.end) == (2, 3) and span.score < 0.1


def test_alignment_with_another_blank():
    x = log_probs("-c-").roll(-1, dims=1)  # the blank is the last token now
    assert align(x, [path("c")[0] - 1], blank=x.shape[1] - 1)[0][:2] == (1, 2)


def test_alignment_needs_a_frame_for_each_token_and_between_equal_ones():
    assert align(log_probs("-"), []) == align(log_probs(""), []) == []
    assert len(align(log_probs("c-c"), path("cc"))) == 2
    with pytest.raises(ValueError, match="2 tokens need 3 frames, got 2"):
        align(log_probs("cc"), path("cc"))


def test_words_are_between_delimiters():
    tokens = path("|ca|||t|")
    assert word_places(CHARACTERS, tokens) == [slice(1, 3), slice(6, 7)]
    assert text_of(CHARACTERS, tokens) == "ca t"
    assert text_of(CHARACTERS, []) == ""
