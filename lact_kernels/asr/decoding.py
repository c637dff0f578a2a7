"""From log-probabilities to tokens and words, and from tokens to the frames in which they were said."""

import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens
from transformers import PreTrainedTokenizer

from lact_kernels.asr.text import write_lexicon

if TYPE_CHECKING:
    from torchaudio.models.decoder import CTCDecoderLM

IMPOSSIBLE = -1e4  # log-probability of what must not be; finite, so that sums of it have no NaN


class GreedyDecoder:
    """Greedy decoding: the most likely token of each frame, without repetitions and blanks.

    Args:
        tokenizer: its pad token is the blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer):
        self._blank = tokenizer.pad_token_id

    def __call__(self, log_probs: Tensor) -> list[int]:
        """Tokens of a segment, `[T, V]`."""
        return collapse(log_probs.argmax(dim=1).tolist(), self._blank)


class BeamDecoder:
    """Beam search for the most likely sequence of given words, by flashlight-text.

    Args:
        tokenizer: of characters, or of whole words.
        words: the lexicon. No other word is recognised.
        beam_size: number of hypotheses that are kept from frame to frame.
        lm: a language model over words: a KenLM file, or torchaudio's `CTCDecoderLM`.
        lm_weight: factor on its log-probabilities.
        word_score: added to the score for each word, with a tokenizer of characters; raise it if words are
            missing from the results.

    Raises:
        ImportError: flashlight-text is missing.
        FileNotFoundError: there is no such language model.
        ValueError: there are no words, tokens cannot spell one, or the language model cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        words: Iterable[str],
        beam_size: int = 50,
        lm: "str | Path | CTCDecoderLM | None" = None,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ):
        self._tokenizer = tokenizer
        self._delimiter = delimiter_of(tokenizer)
        self._words = list(dict.fromkeys(words))
        self._check_words()
        if isinstance(lm, (str, Path)) and not Path(lm).is_file():
            raise FileNotFoundError(f"there is no language model {lm}")
        if self._delimiter is None:
            # Where each word is a token, the search needs no lexicon: other tokens are made impossible.
            said = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, *self._words])
            self._forbidden = torch.ones(len(tokenizer), dtype=torch.bool)
            self._forbidden[said] = False
        self._search = self._make_search(
            beam_size=beam_size,
            lm=str(lm) if isinstance(lm, Path) else lm,
            lm_weight=lm_weight,
            word_score=word_score,
        )

    def __call__(self, log_probs: Tensor) -> list[int]:
        """Tokens of a segment, `[T, V]`, with the delimiter between words."""
        log_probs = log_probs.to("cpu", torch.float32)
        if self._delimiter is None:
            log_probs = log_probs.masked_fill(self._forbidden, IMPOSSIBLE)
            return self._best(log_probs).tokens.tolist()
        # A word is complete at the delimiter after it. The last word mostly has none: add a frame with one.
        end = torch.full_like(log_probs[:1], IMPOSSIBLE)
        end[:, self._delimiter] = 0
        words = self._best(torch.cat([log_probs, end])).words
        letters = self._tokenizer.word_delimiter_token.join(words)
        return self._tokenizer.convert_tokens_to_ids(list(letters))

    def _best(self, log_probs: Tensor):
        return self._search(log_probs[None].contiguous())[0][0]

    def _check_words(self) -> None:
        if not self._words:
            raise ValueError("a beam search needs words, and there are none")
        tokenizer = self._tokenizer
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        whole = self._delimiter is None
        bad = [w for w in self._words if not w or not {w if whole else c for c in w} <= known]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ValueError(
                f"the tokens of the recogniser cannot spell these words: {', '.join(bad[:5])}{more}"
            )

    def _make_search(self, **options):
        try:
            from torchaudio.models.decoder import ctc_decoder
        except RuntimeError as error:
            raise ImportError("a beam search needs: pip install flashlight-text") from error
        tokenizer = self._tokenizer
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        options |= {
            "tokens": tokens,
            "blank_token": tokenizer.pad_token,
            "sil_token": tokenizer.word_delimiter_token or tokenizer.pad_token,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "words.txt")
            if self._delimiter is None:
                # With this file the language model numbers words as the tokenizer does.
                path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
                options |= {"lexicon": None, "lm_dict": str(path)}
            else:
                write_lexicon(path, self._words)
                options |= {"lexicon": str(path)}
            try:
                return ctc_decoder(**options)
            except RuntimeError as error:
                raise ValueError(
                    f"the language model {options['lm']} cannot be used: {error}"
                ) from error


class TokenSpan(NamedTuple):
    """A token is in frames `start` to `end - 1`; `score` is its mean probability in them."""

    start: int
    end: int
    score: float


def align(log_probs: Tensor, tokens: Sequence[int], blank: int = 0) -> list[TokenSpan]:
    """Forced alignment: the most likely frames of each token.

    Args:
        log_probs: `[T, V]`.
        tokens: what was said, without blanks.
        blank: the CTC blank.

    Raises:
        ValueError: there are fewer frames than tokens, with a blank between any two equal ones.
    """
    if not tokens:
        return []
    needed = len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:]))
    if len(log_probs) < needed:
        raise ValueError(f"{len(tokens)} tokens need {needed} frames, got {len(log_probs)}")
    log_probs = log_probs.to("cpu", torch.float32)
    path, scores = forced_align(log_probs[None], torch.tensor([list(tokens)]), blank=blank)
    spans = merge_tokens(path[0], scores[0].exp(), blank)
    return [TokenSpan(span.start, span.end, span.score) for span in spans]


def collapse(tokens: Iterable[int], blank: int) -> list[int]:
    """The CTC collapse of a path of one token per frame: each run of a token once, without blanks."""
    return [token for token, _ in groupby(tokens) if token != blank]


def delimiter_of(tokenizer: PreTrainedTokenizer) -> int | None:
    """The token between words; None if each token is a word."""
    token = tokenizer.word_delimiter_token
    return None if token is None else tokenizer.convert_tokens_to_ids(token)


def word_places(tokenizer: PreTrainedTokenizer, tokens: Sequence[int]) -> list[slice]:
    """The slice of the tokens that each word has."""
    delimiter = delimiter_of(tokenizer)
    if delimiter is None:
        return [slice(i, i + 1) for i in range(len(tokens))]
    groups = groupby(range(len(tokens)), key=lambda i: tokens[i] != delimiter)
    runs = [list(places) for is_word, places in groups if is_word]
    return [slice(run[0], run[-1] + 1) for run in runs]


def text_of(tokenizer: PreTrainedTokenizer, tokens: Sequence[int]) -> str:
    """The words of decoded tokens, with a space between them.

    `tokenizer.decode(tokens)` would collapse equal neighbours, which are two tokens here.
    """
    words = (tokens[place] for place in word_places(tokenizer, tokens))
    return " ".join(tokenizer.decode(word, group_tokens=False) for word in words)
