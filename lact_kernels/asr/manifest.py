"""Lists of recordings with their texts: JSON-lines manifests, and folders in the layout of LibriSpeech."""

import json
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from lact_kernels.asr.files import written_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """A part of a sound file, and what is said in it in the spelling of the corpus."""

    path: str
    text: str
    duration: float  # seconds
    offset: float = 0.0  # seconds
    speaker: str | None = None


def read_utterances(path: str | Path) -> list[Utterance]:
    """Read a manifest if `path` is a file, or a folder in the layout of LibriSpeech."""
    return read_librispeech(path) if Path(path).is_dir() else read_manifest(path)


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read the utterances of a JSON-lines manifest, the format of NeMo, in their order.

    Each line is an object with `audio_filepath` (absolute, or relative to the manifest), `duration` in
    seconds and `text`, and optionally `offset` in seconds and `speaker`. Other keys and blank lines are
    ignored.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a line is not such an object (the message has its number), or there is no utterance.
    """
    path = Path(path)
    utterances = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                utterances.append(_utterance(json.loads(line), path.parent))
            except ValueError as error:  # invalid JSON or UTF-8 included
                raise ValueError(f"{path}, line {number}: {error}; got {line!r:.200}") from error
    if not utterances:
        raise ValueError(f"{path} has no utterances")
    return utterances


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest for `read_manifest`. It appears under its name when it is complete.

    Paths in the manifest's folder or below are written relative to it, so that the folder can be moved.
    """
    path = Path(path).absolute()
    with written_whole(path) as file:
        for utterance in utterances:
            file.write(json.dumps(_entry(utterance, path.parent), ensure_ascii=False) + "\n")


def read_librispeech(folder: str | Path) -> list[Utterance]:
    """Read the utterances of `speaker/chapter/*.trans.txt` at any depth below `folder`, sorted by path.

    Each line of a transcript is "ID TEXT", and its recording is `ID.flac` beside it. Durations are read from
    the recordings. A recording that is missing or broken is logged and left out.

    Raises:
        FileNotFoundError: there is no folder.
        ValueError: no utterance was found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    lines = [
        (transcript, line)
        for transcript in sorted(folder.rglob("*.trans.txt"))
        for line in transcript.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    with ThreadPoolExecutor() as pool:
        utterances = [u for u in pool.map(_librispeech_utterance, lines) if u is not None]
    if not utterances:
        raise ValueError(
            f"{folder} has no utterances: expected speaker/chapter/*.trans.txt and .flac files"
        )
    return utterances


def _librispeech_utterance(line: tuple[Path, str]) -> Utterance | None:
    transcript, (name, _, text) = line[0], line[1].strip().partition(" ")
    path = transcript.with_name(name + ".flac")
    try:
        duration = soundfile.info(path).duration
    except soundfile.SoundFileError as error:
        logger.warning("%s is left out: %s", path, error)
        return None
    return Utterance(str(path), text.strip(), duration, speaker=transcript.parent.parent.name)


def _utterance(entry: object, folder: Path) -> Utterance:
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    path, text = _string(entry, "audio_filepath"), _string(entry, "text")
    if not path:
        raise ValueError("audio_filepath must not be empty")
    duration, offset = _seconds(entry, "duration"), _seconds(entry, "offset", 0.0)
    if duration == 0:
        raise ValueError("duration must be positive")
    speaker = entry.get("speaker")
    if isinstance(speaker, bool) or not isinstance(speaker, (str, int, type(None))):
        raise ValueError(f"speaker must be a string or a whole number, got {speaker!r}")
    speaker = None if speaker is None else str(speaker)
    return Utterance(str(folder / path), text, duration, offset, speaker)


def _string(entry: dict, key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, got {value!r}")
    return value


def _seconds(entry: dict, key: str, default: float | None = None) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number of seconds, got {value!r}")
    if not 0 <= value < math.inf:  # NaN, which Python's JSON reads, fails too
        raise ValueError(f"{key} must be finite and not negative, got {value!r}")
    return float(value)


def _entry(utterance: Utterance, folder: Path) -> dict:
    path = Path(utterance.path).absolute()
    if path.is_relative_to(folder):
        path = path.relative_to(folder)
    entry = {
        "audio_filepath": str(path),
        "duration": utterance.duration,
        "text": utterance.text,
        "offset": utterance.offset,
    }
    return entry if utterance.speaker is None else entry | {"speaker": utterance.speaker}
