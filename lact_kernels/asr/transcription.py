"""A recording of any length as segments of words with their times."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lact_kernels.asr.audio import audio_blocks
from lact_kernels.asr.decoding import (
    GreedyDecoder,
    align,
    collapse,
    delimiter_of,
    text_of,
    word_places,
)
from lact_kernels.asr.pretrained import Recogniser
from lact_kernels.asr.streaming import FrameStream

Decoder = Callable[[Tensor], list[int]]


class Word(NamedTuple):
    """A word, its seconds from the start of the recording, and its mean probability."""

    text: str
    start: float
    end: float
    score: float


class Segment(NamedTuple):
    """Words without a long pause, from the first one's start to the last one's end, in seconds."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]


class Transcriber:
    """Samples of one recording in, segments out as soon as they are final.

        transcriber = Transcriber(recogniser)
        for samples in microphone:
            segments = transcriber.push(samples)
            print(transcriber.partial)              # what the unfinished segment reads so far
        segments = transcriber.finish()

    A segment ends at a pause, or, when it gets too long, in the longest silence of its second half.
    Silence is where the most likely token is the blank or the word delimiter. Only the log-probabilities
    of the unfinished segment are kept, and of the silence before it no more than a pause: memory does not
    grow, and the size of pieces changes nothing.

    Args:
        recogniser: model and tokenizer.
        decoder: from log-probabilities `[T, V]` to tokens; greedy if there is none.
        pause_seconds: silence that ends a segment.
        max_segment_seconds: the longest segment.

    Raises:
        ValueError: a pause that is not positive, or segments that are not longer.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        decoder: Decoder | None = None,
        *,
        pause_seconds: float = 0.6,
        max_segment_seconds: float = 30.0,
    ):
        if not 0 < pause_seconds < max_segment_seconds:
            raise ValueError(
                "pause_seconds must be positive and less than max_segment_seconds, got"
                f" {pause_seconds} and {max_segment_seconds}"
            )
        self._tokenizer = recogniser.tokenizer
        self._decoder = decoder or GreedyDecoder(recogniser.tokenizer)
        self._stream = FrameStream(recogniser.model)
        self._blank = recogniser.tokenizer.pad_token_id
        self._silent = {self._blank, delimiter_of(recogniser.tokenizer)}
        self._seconds_per_frame = recogniser.model.config.seconds_per_frame
        self._pause = max(round(pause_seconds / self._seconds_per_frame), 1)
        self._longest = max(round(max_segment_seconds / self._seconds_per_frame), 2)
        # Of the unfinished segment:
        self._first = 0  # its first frame, counted from the start of the recording
        self._frames: list[Tensor] = []  # log-probabilities, each [V]
        self._likely: list[int] = []  # the most likely token of each frame
        self._silence = 0  # frames at its end

    @property
    def partial(self) -> str:
        """What the unfinished segment reads so far, whatever the decoder will make of it."""
        return text_of(self._tokenizer, collapse(self._likely, self._blank))

    def push(self, samples: Tensor) -> list[Segment]:
        """Hear `samples`, a float tensor `[n]` in -1 .. 1, n >= 0; returns segments that are final now.

        Raises:
            TypeError, ValueError: no such tensor.
            RuntimeError: the recording was finished.
        """
        return self._hear(self._stream.push(samples))

    def finish(self) -> list[Segment]:
        """The recording ends: the last segments."""
        segments = self._hear(self._stream.finish())
        return segments + self._take(len(self._frames))

    def _hear(self, log_probs: Tensor) -> list[Segment]:
        log_probs = log_probs.cpu()
        segments = []
        for frame, token in zip(log_probs, log_probs.argmax(dim=1).tolist()):
            self._frames.append(frame.clone())  # a view would keep the whole piece alive
            self._likely.append(token)
            self._silence = self._silence + 1 if token in self._silent else 0
            if self._silence == len(self._frames):
                self._drop(len(self._frames) - self._pause)
            elif self._silence >= self._pause:
                segments += self._take(len(self._frames))
            elif len(self._frames) >= self._longest:
                segments += self._take(self._best_cut())
        return segments

    def _best_cut(self) -> int:
        """The middle of the longest silence in the second half; the end if there is none."""
        half = len(self._likely) // 2
        groups = groupby(
            range(half, len(self._likely)), key=lambda i: self._likely[i] in self._silent
        )
        silences = [list(places) for is_silent, places in groups if is_silent]
        if not silences:
            return len(self._likely)
        longest = max(silences, key=len)
        return longest[len(longest) // 2]

    def _take(self, n: int) -> list[Segment]:
        """The first n frames as a segment, if anything was said in them."""
        segments = self._segments(torch.stack(self._frames[:n])) if n else []
        self._drop(n)
        return segments

    def _segments(self, log_probs: Tensor) -> list[Segment]:
        tokens = self._decoder(log_probs)
        spans = align(log_probs, tokens, self._blank)
        words = []
        for place in word_places(self._tokenizer, tokens):
            text = self._tokenizer.decode(tokens[place], group_tokens=False)
            start, end = spans[place][0].start, spans[place][-1].end
            score = sum(s.score * (s.end - s.start) for s in spans[place])
            score /= sum(s.end - s.start for s in spans[place])
            words.append(Word(text, self._seconds(start), self._seconds(end), score))
        if not words:
            return []
        text = " ".join(word.text for word in words)
        return [Segment(words[0].start, words[-1].end, text, tuple(words))]

    def _seconds(self, frame: int) -> float:
        return (self._first + frame) * self._seconds_per_frame

    def _drop(self, n: int) -> None:
        if n > 0:
            del self._frames[:n], self._likely[:n]
            self._first += n
            self._silence = min(self._silence, len(self._frames))


def transcribe_file(
    recogniser: Recogniser,
    path: str | Path,
    decoder: Decoder | None = None,
    *,
    progress: Callable[[float], object] | None = None,
) -> Iterator[Segment]:
    """Segments of a sound file of any length, as soon as they are final.

    Args:
        recogniser, decoder: as for a `Transcriber`.
        path: of the file.
        progress: called with the seconds of each block that was heard; all together are the file's.

    Raises:
        OSError: the file is missing or broken, from the block on that cannot be read.
    """
    transcriber = Transcriber(recogniser, decoder)
    rate = recogniser.model.config.sampling_rate
    for block in audio_blocks(path, rate):
        yield from transcriber.push(block)
        if progress is not None:
            progress(len(block) / rate)
    yield from transcriber.finish()
