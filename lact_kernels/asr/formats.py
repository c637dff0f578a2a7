"""Write segments as text, JSON or subtitles.

Text and subtitles are generators: each segment is written as soon as it arrives. JSON needs them all.
"""

import html
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lact_kernels.asr.transcription import Segment, Word

SUBTITLE_LENGTH = 84  # characters of a subtitle, two lines on most screens


def as_text(segments: Iterable[Segment]) -> Iterator[str]:
    """A line for each segment."""
    for segment in segments:
        yield f"{segment.text}\n"


def as_json(segments: Iterable[Segment], file: str, duration: float) -> str:
    """A JSON object on one line: the file, its duration and text, and segments and words with their times."""
    segments = list(segments)
    result = {
        "file": file,
        "duration": round(duration, 3),
        "text": " ".join(segment.text for segment in segments),
        "segments": [
            _rounded(segment) | {"words": [_rounded(word) for word in segment.words]}
            for segment in segments
        ],
    }
    return json.dumps(result, ensure_ascii=False) + "\n"


def as_srt(segments: Iterable[Segment]) -> Iterator[str]:
    """SubRip subtitles."""
    for number, subtitle in enumerate(_subtitles(segments), 1):
        start, end = (_timestamp(t, ",") for t in (subtitle.start, subtitle.end))
        yield f"{number}\n{start} --> {end}\n{subtitle.text}\n\n"


def as_vtt(segments: Iterable[Segment]) -> Iterator[str]:
    """WebVTT subtitles."""
    yield "WEBVTT\n\n"
    for subtitle in _subtitles(segments):
        start, end = (_timestamp(t, ".") for t in (subtitle.start, subtitle.end))
        yield f"{start} --> {end}\n{html.escape(subtitle.text, quote=False)}\n\n"


class _Subtitle(NamedTuple):
    start: float
    end: float
    text: str


def _subtitles(segments: Iterable[Segment]) -> Iterator[_Subtitle]:
    """A subtitle for each segment, and several for a long one."""
    for segment in segments:
        words: list[Word] = []
        for word in segment.words:
            if words and len(_text(words)) + 1 + len(word.text) > SUBTITLE_LENGTH:
                yield _Subtitle(words[0].start, words[-1].end, _text(words))
                words = []
            words.append(word)
        yield _Subtitle(words[0].start, words[-1].end, _text(words))


def _text(words: list[Word]) -> str:
    return " ".join(word.text for word in words)


def _rounded(item: Word | Segment) -> dict:
    """The fields as a dict, numbers rounded to three decimals."""
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in item._asdict().items()
    }


def _timestamp(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    seconds, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"
