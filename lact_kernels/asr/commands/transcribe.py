"""Transcribe recordings of any length, as text, JSON with the times of words, or subtitles."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import soundfile
from tqdm import tqdm

from lact_kernels.asr.commands.recogniser import add_decoder_arguments, load
from lact_kernels.asr.files import written_whole
from lact_kernels.asr.formats import as_json, as_srt, as_text, as_vtt
from lact_kernels.asr.pretrained import Recogniser
from lact_kernels.asr.transcription import Decoder, transcribe_file

HELP = "transcribe recordings"
EXTENSIONS = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}
SUFFIXES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .w64".split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the recogniser")
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="recordings, and folders of them at any depth"
    )
    parser.add_argument("--format", choices=tuple(EXTENSIONS), default="text")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="write a file for each recording, instead of to standard output",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist in DIR")
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    recordings = _recordings(args.paths)
    outputs = _outputs(recordings, args)
    recogniser, decoder = load(args)
    failed = 0
    for path, output in zip(recordings, outputs):
        if output and output.exists() and not args.overwrite:
            print(f"{path}: {output} exists and is kept", file=sys.stderr)
            continue
        if not output and len(recordings) > 1 and args.format == "text":
            print(f"==> {path} <==")
        try:
            with _opened(output) as out:
                _transcribe(recogniser, decoder, path, args.format, out)
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            failed += 1
            named = str(path) in str(error)
            print(f"lact-asr: {error}" if named else f"lact-asr: {path}: {error}", file=sys.stderr)
    if failed:
        print(f"lact-asr: {failed} of {len(recordings)} recordings failed", file=sys.stderr)
    return 1 if failed else 0


def _recordings(paths: list[str]) -> dict[Path, Path]:
    """Recordings, and the path of each below the output folder."""
    recordings = {}
    for path in map(Path, paths):
        if not path.is_dir():
            recordings[path] = Path(path.name)
            continue
        found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not found:
            raise FileNotFoundError(f"there is no recording in {path}")
        recordings |= {p: p.relative_to(path) for p in found}
    return recordings


def _outputs(recordings: dict[Path, Path], args: argparse.Namespace) -> list[Path | None]:
    """The file of each transcript; None for standard output."""
    if not args.output_dir:
        if len(recordings) > 1 and args.format in ("srt", "vtt"):
            raise ValueError(f"{args.format} of several recordings needs --output-dir")
        return [None] * len(recordings)
    owners: dict[Path, Path] = {}
    for path, name in recordings.items():
        output = Path(args.output_dir, name.with_suffix(EXTENSIONS[args.format]))
        if output in owners:
            raise ValueError(f"{owners[output]} and {path} would both be written to {output}")
        owners[output] = path
    return list(owners)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """A file that appears when it is complete, or standard output."""
    if output is None:
        yield sys.stdout
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as file:
        yield file


def _transcribe(
    recogniser: Recogniser, decoder: Decoder, path: Path, format: str, out: TextIO
) -> None:
    heard = []
    # Text on a terminal shows the progress itself. None: tqdm hides the bar if standard error is no terminal.
    hidden = True if out.isatty() else None
    with tqdm(desc=path.name, total=_duration(path), unit="s", disable=hidden) as bar:

        def progress(seconds: float) -> None:
            heard.append(seconds)
            bar.update(round(sum(heard)) - bar.n)

        segments = transcribe_file(recogniser, path, decoder, progress=progress)
        if format == "json":
            segments = list(segments)
            out.write(as_json(segments, str(path), sum(heard)))
        else:
            for text in {"text": as_text, "srt": as_srt, "vtt": as_vtt}[format](segments):
                out.write(text)
                out.flush()
    out.flush()


def _duration(path: Path) -> int | None:
    """Whole seconds, for the progress bar; None for a file that cannot be read."""
    try:
        return round(soundfile.info(path).duration)
    except soundfile.SoundFileError:
        return None
