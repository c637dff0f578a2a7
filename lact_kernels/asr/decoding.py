"""From log-probabilities to tokens, from tokens to words, and back to the frames they were said in."""

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

IMPOSSIBLE = -1e4  # a log-probability that nothing outweighs, and that can be added up


class GreedyDecoder:
    """The most likely token of every frame, without repeats and blanks.

    Args:
        tokenizer: its pad token is the blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer):
        self._blank = tokenizer.pad_token_id

    def __call__(self, log_probs: Tensor) -> list[int]:
        """Tokens of a segment, `[T, V]`."""
        return collapse(log_probs.argmax(dim=1).tolist(), self._blank)


class BeamDecoder:
    """The best sequence of given words, found by the beam search of flashlight-text.

    Args:
        tokenizer: of characters, or of whole words.
        words: all that may be said.
        beam_size: hypotheses that are kept from frame to frame.
        lm: a language model over words: a file of KenLM, or torchaudio's `CTCDecoderLM`.
        lm_weight: what its logarithms count.
        word_score: added for each word of several tokens; positive against words left out.

    Raises:
        ImportError: flashlight-text is missing.
        FileNotFoundError: there is no such language model.
        ValueError: no words, words that the tokens cannot spell, or a language model that cannot be read.
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
            # A search for words of one token each is one without a lexicon, in which other tokens cannot be.
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
        """Tokens of a segment, `[T, V]`, between words the delimiter."""
        log_probs = log_probs.to("cpu", torch.float32)
        if self._delimiter is None:
            log_probs = log_probs.masked_fill(self._forbidden, IMPOSSIBLE)
            return self._best(log_probs).tokens.tolist()
        # The search knows a word at the delimiter behind it, also the last one, which mostly has none.
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
                # Without it the language model would number the words in an order of its own.
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
    """Frames `start` to `end - 1` of a token, and the mean of its probabilities in them."""

    start: int
    end: int
    score: float


def align(log_probs: Tensor, tokens: Sequence[int], blank: int = 0) -> list[TokenSpan]:
    """The most likely frames of each token.

    Args:
        log_probs: `[T, V]`.
        tokens: what was said, without blanks.
        blank: the token of CTC.

    Raises:
        ValueError: there are not as many frames as tokens and blanks between equal ones.
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
    """What a path of one token for each frame says: each run of a token once, without blanks."""
    return [token for token, _ in groupby(tokens) if token != blank]


def delimiter_of(tokenizer: PreTrainedTokenizer) -> int | None:
    """The token between words; None if every token is a word."""
    token = tokenizer.word_delimiter_token
    return None if token is None else tokenizer.convert_tokens_to_ids(token)


def word_places(tokenizer: PreTrainedTokenizer, tokens: Sequence[int]) -> list[slice]:
    """Where each word is among the tokens."""
    delimiter = delimiter_of(tokenizer)
    if delimiter is None:
        return [slice(i, i + 1) for i in range(len(tokens))]
    groups = groupby(range(len(tokens)), key=lambda i: tokens[i] != delimiter)
    runs = [list(places) for is_word, places in groups if is_word]
    return [slice(run[0], run[-1] + 1) for run in runs]


def text_of(tokenizer: PreTrainedTokenizer, tokens: Sequence[int]) -> str:
    """Decoded tokens as words with one space between them.

    Equal neighbours are two tokens here; `tokenizer.decode` would take them for one.
    """
    words = (tokens[place] for place in word_places(tokenizer, tokens))
    return " ".join(tokenizer.decode(word, group_tokens=False) for word in words)
