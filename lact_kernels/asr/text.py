"""Texts as CTC labels: normalisation, and tokenizers of characters or of whole words.

Token 0 is always `<pad>`, and serves as the CTC blank.
"""

import json
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from transformers import Wav2Vec2CTCTokenizer

PAD, UNKNOWN, DELIMITER = "<pad>", "<unk>", "|"
APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ´`"), "'")


def normalize_text(text: str) -> str:
    """Reduce a text to words of lower-case letters, combining marks, digits and apostrophes.

    The text is brought into Unicode's form NFKC, apostrophes are made straight, and every other character
    becomes a space. Words are separated by one space.
    """
    text = text.translate(APOSTROPHES)  # before NFKC, which makes ´ a space and a combining mark,
    text = unicodedata.normalize("NFKC", text).lower().translate(APOSTROPHES)  # and after, for ŉ
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    words = "".join(kept).split()
    return " ".join(word for word in words if any(map(str.isalnum, word)))  # no lone apostrophe


def words_of(texts: Iterable[str]) -> list[str]:
    """The different words of the texts, sorted."""
    return sorted({word for text in texts for word in text.split()})


def write_lexicon(path: str | Path, words: Iterable[str]) -> None:
    """Write words with their spelling in character tokens, for torchaudio's `ctc_decoder`."""
    lines = (f"{word}\t{' '.join(word)} {DELIMITER}\n" for word in words)
    Path(path).write_text("".join(lines), encoding="utf-8")


class WordCTCTokenizer(Wav2Vec2CTCTokenizer):
    """Whole words as CTC tokens, where `Wav2Vec2CTCTokenizer` has characters and a delimiter.

    Where transformers speaks of the offsets of characters, these are offsets of words.

    Args:
        vocab_file: JSON object that maps words and special tokens to ids.
    """

    def __init__(
        self,
        vocab_file: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        **kwargs: Any,
    ):
        kwargs["word_delimiter_token"] = None
        super().__init__(vocab_file, bos_token=bos_token, eos_token=eos_token, **kwargs)

    @property
    def word_delimiter_token(self) -> None:
        """None; the property of the base class would log an error."""
        return None

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        # The base class registers tokens of several characters as added tokens, which are found anywhere in a
        # text. Words must be found between spaces only, not inside of longer words.
        if not special_tokens:
            new_tokens = [token for token in new_tokens if str(token) not in self.encoder]
        return super()._add_tokens(new_tokens, special_tokens) if new_tokens else 0

    def _tokenize(self, text, **kwargs) -> list[str]:
        return text.split()

    def convert_tokens_to_string(self, tokens, *args, **kwargs) -> dict:
        kwargs["spaces_between_special_tokens"] = True  # which puts spaces between all tokens
        return super().convert_tokens_to_string(tokens, *args, **kwargs)

    @staticmethod
    def _get_word_offsets(offsets, word_delimiter_char: str = " ") -> list[dict]:
        return [
            {"word": o["char"], "start_offset": o["start_offset"], "end_offset": o["end_offset"]}
            for o in offsets
        ]


def build_tokenizer(
    texts: Iterable[str], unit: Literal["char", "word"] = "char"
) -> Wav2Vec2CTCTokenizer:
    """Make a tokenizer of the characters ("char") or words ("word") that occur in the texts.

    Texts are taken as they are. Normalise them before, here and wherever they are tokenized.

    Raises:
        ValueError: another unit, or there is no word in the texts.
    """
    if unit not in ("char", "word"):
        raise ValueError(f"unit must be 'char' or 'word', got {unit!r}")
    words = words_of(texts)
    if not words:
        raise ValueError("the texts have no words to build a vocabulary of")
    tokens = [DELIMITER, *sorted(set("".join(words)) - {DELIMITER})] if unit == "char" else words
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, *tokens])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps(vocabulary), encoding="utf-8")
        return tokenizer_from_vocabulary(path)


def tokenizer_from_vocabulary(path: str | Path) -> Wav2Vec2CTCTokenizer:
    """Make a tokenizer from a JSON object of tokens and ids: of characters if it has `|`, else of words.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `<pad>` is not 0, there is no `<unk>` or no other token, or the ids are not 0, 1, 2, ...
    """
    try:
        vocabulary = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(vocabulary, dict) or vocabulary.get(PAD) != 0 or UNKNOWN not in vocabulary:
        raise ValueError(
            f"{path} must be an object from tokens to ids with {PAD} = 0 and {UNKNOWN}"
        )
    ids = list(vocabulary.values())
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{path} must have the ids 0 to {len(ids) - 1}, each once")
    if not vocabulary.keys() - {PAD, UNKNOWN, DELIMITER}:
        raise ValueError(f"{path} has special tokens only")
    kind = Wav2Vec2CTCTokenizer if DELIMITER in vocabulary else WordCTCTokenizer
    return kind(str(path), bos_token=None, eos_token=None)
