"""A recogniser as a folder: model, tokenizer, feature extractor and the words of the training text."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizer, Wav2Vec2FeatureExtractor

from lact_kernels.asr.model import LaCTForCTC

WORDS = "words.txt"


class Recogniser(NamedTuple):
    """A model, and what turns its outputs into text.

    Attributes:
        model: in evaluation mode.
        tokenizer: converts between text and tokens. Its pad token is the CTC blank.
        words: the words of the training text, for the lexicon of a beam search; empty if unknown.
    """

    model: LaCTForCTC
    tokenizer: PreTrainedTokenizer
    words: tuple[str, ...]


def save_recogniser(
    folder: str | Path, model: LaCTForCTC, tokenizer: PreTrainedTokenizer, words: Sequence[str]
) -> None:
    """Write a folder that `load_recogniser` and `pipeline("automatic-speech-recognition")` read."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        sampling_rate=model.config.sampling_rate, do_normalize=False, return_attention_mask=True
    ).save_pretrained(folder)
    Path(folder, WORDS).write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def load_recogniser(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Recogniser:
    """Read the folder of a recogniser.

    Raises:
        FileNotFoundError: there is no model in it.
        ValueError, OSError: its files cannot be read, or do not belong together.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: it is not the folder of a recogniser"
        )
    model, info = LaCTForCTC.from_pretrained(
        folder, dtype=dtype or torch.float32, output_loading_info=True
    )
    if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{folder} has weights of another model: {', '.join(wrong[:4])} are missing or unknown"
        )
    words = folder / WORDS
    return Recogniser(
        model.to(device).eval(),
        AutoTokenizer.from_pretrained(folder),
        tuple(words.read_text(encoding="utf-8").split()) if words.is_file() else (),
    )
