"""Transcribe a recording of any length: segments of words with their times."""

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
from lact_kernels.asr.streaming import FrameStream, WholeRecording

Decoder = Callable[[Tensor], list[int]]


class Word(NamedTuple):
    """A word, its times in seconds from the start of the recording, and its mean probability."""

    text: str
    start: float
    end: float
    score: float


class Segment(NamedTuple):
    """Words without a long pause between them. Times, in seconds, are those of the first and last word."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]


class Transcriber:
    """Transcribe one recording as it arrives: push samples, get the segments that are final.

        transcriber = Transcriber(recogniser)
        for samples in microphone:
            segments = transcriber.push(samples)
            print(transcriber.partial)              # the text of the unfinished segment so far
        segments = transcriber.finish()

    A segment ends at a pause or, when it gets too long, in the longest silence of its second half. Silence is
    where the most likely token is the blank or the word delimiter. The transcriber keeps the
    log-probabilities of the unfinished segment and at most a pause of the silence before it, so that memory
    does not grow. The result does not depend on how the recording is cut into blocks.

    Args:
        recogniser: model and tokenizer.
        decoder: maps log-probabilities `[T, V]` to tokens; None for a `GreedyDecoder`.
        stream: what makes frames of samples; None for a `FrameStream`, which needs a causal model.
        pause_seconds: a silence of this length ends a segment.
        max_segment_seconds: the longest segment.

    Raises:
        ValueError: `pause_seconds` is not positive, or not less than `max_segment_seconds`, or the model is
            none for a `FrameStream`.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        decoder: Decoder | None = None,
        *,
        stream: FrameStream | WholeRecording | None = None,
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
        self._stream = FrameStream(recogniser.model) if stream is None else stream
        self._blank = recogniser.tokenizer.pad_token_id
        self._silent = {self._blank, delimiter_of(recogniser.tokenizer)}
        self._seconds_per_frame = recogniser.model.config.seconds_per_frame
        self._pause = max(round(pause_seconds / self._seconds_per_frame), 1)
        self._longest = max(round(max_segment_seconds / self._seconds_per_frame), 2)
        # Of the unfinished segment:
        self._first = 0  # its first frame, counted from the start of the recording
        self._frames: list[Tensor] = []  # log-probabilities, each [V]
        self._likely: list[int] = []  # the most likely token of each frame
        self._silence = 0  # silent frames at its end

    @property
    def partial(self) -> str:
        """The text of the unfinished segment so far, decoded greedily. The final one may differ."""
        return text_of(self._tokenizer, collapse(self._likely, self._blank))

    def push(self, samples: Tensor) -> list[Segment]:
        """Add `samples`, a float tensor `[n]` in -1 .. 1, n >= 0; return the segments that are final now.

        Raises:
            TypeError, ValueError: another type, dtype or shape.
            RuntimeError: the recording has been finished.
        """
        return self._hear(self._stream.push(samples))

    def finish(self) -> list[Segment]:
        """End the recording, and return its last segments."""
        segments = self._hear(self._stream.finish())
        return segments + self._take(len(self._frames))

    def _hear(self, log_probs: Tensor) -> list[Segment]:
        log_probs = log_probs.cpu()
        segments = []
        for frame, token in zip(log_probs, log_probs.argmax(dim=1).tolist()):
            self._frames.append(frame.clone())  # a view would keep the whole block in memory
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
        """Where to cut: the middle of the longest silence in the second half, or the end if there is none."""
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
        """Remove the first n frames, and return them as a segment if there are words in them."""
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
    """Transcribe a sound file of any length; segments are yielded as soon as they are final.

    They all are at the end of the file, and memory grows with its length, if the model's windows look ahead.

    Args:
        recogniser, decoder: as for a `Transcriber`.
        path: of the file.
        progress: called with the duration of each block that has been heard, in seconds.

    Raises:
        OSError: the file is missing or broken. It is raised at the first block that cannot be read.
    """
    model, rate = recogniser.model, recogniser.model.config.sampling_rate
    stream = WholeRecording(model) if model.config.looks_ahead else FrameStream(model)
    transcriber = Transcriber(recogniser, decoder, stream=stream)
    for block in audio_blocks(path, rate):
        yield from transcriber.push(block)
        if progress is not None:
            progress(len(block) / rate)
    yield from transcriber.finish()
