"""Recognise speech while it arrives, from standard input or from a file as if it were spoken now.

    arecord -f S16_LE -r 16000 -t raw | lact-asr stream MODEL
    ffmpeg -i URL -f wav - | lact-asr stream MODEL

On a terminal, the last line shows the unfinished segment so far. Elsewhere each line is a finished segment,
with the times of its words.
"""

import argparse
import io
import shutil
import signal
import sys
import time
import wave
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from lact_kernels.asr.audio import StreamResampler, audio_blocks
from lact_kernels.asr.commands.recogniser import add_decoder_arguments, load, positive
from lact_kernels.asr.transcription import Transcriber

HELP = "recognise speech while it arrives"
SAMPLES = {"s16le": ("<i2", 1 / 32768), "f32le": ("<f4", 1.0)}  # NumPy's dtype, and the scale
CLEAR_LINE = "\r\x1b[K"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="folder of the recogniser")
    parser.add_argument(
        "source",
        nargs="?",
        default="-",
        metavar="FILE",
        help="a recording; - (default): raw samples of one channel, or WAV, on standard input",
    )
    parser.add_argument(
        "--rate", type=positive, default=16000, metavar="HZ", help="of raw samples (16000)"
    )
    parser.add_argument(
        "--sample-format", choices=tuple(SAMPLES), default="s16le", help="of raw samples"
    )
    parser.add_argument(
        "--piece-ms",
        type=positive,
        default=40,
        metavar="MS",
        help="length of the blocks that are read (40)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="read a file as fast as it is recognised"
    )
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.source == "-" and sys.stdin.isatty():
        raise ValueError(
            "standard input is a terminal: name a file, or pipe audio into this command"
        )
    args.threads = args.threads or 1  # a frame is too little work for several threads
    recogniser, decoder = load(args)
    config = recogniser.model.config
    transcriber = Transcriber(recogniser, decoder)
    show = _show_on_terminal if sys.stdout.isatty() else _show_lines
    blocks = _from_stdin if args.source == "-" else _from_file
    heard, busy, delays = 0, 0.0, array("d")
    with _Interrupts() as interrupts:
        for arrival, samples in interrupts.until(blocks(args, config.sampling_rate)):
            begin = time.perf_counter()
            show(transcriber.push(samples), transcriber.partial)
            end = time.perf_counter()
            heard, busy = heard + len(samples), busy + end - begin
            delays.append(end - arrival)
    begin = time.perf_counter()
    show(transcriber.finish(), "")
    busy += time.perf_counter() - begin
    print(_summary(heard / config.sampling_rate, busy, delays, config), file=sys.stderr)
    return 130 if interrupts.happened else 0


class _Interrupts:
    """Ctrl-C ends the input, but not the work on a block, so that the recording can be finished.

    Attributes:
        happened: whether Ctrl-C was pressed.
    """

    def __init__(self):
        self.happened = self._waiting = False

    def __enter__(self) -> "_Interrupts":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def until(self, blocks: Iterable) -> Iterator:
        """The blocks that arrive before Ctrl-C."""
        blocks = iter(blocks)
        while not self.happened:
            try:
                self._waiting = True
                block = next(blocks, None)
            except KeyboardInterrupt:
                self.happened = True
                return
            finally:
                self._waiting = False
            if block is None:
                return
            yield block

    def _handle(self, *_) -> None:
        self.happened = True
        if self._waiting:
            raise KeyboardInterrupt


def _from_file(args: argparse.Namespace, rate: int) -> Iterator[tuple]:
    """The time at which each block has been spoken, and its samples."""
    begin, heard = time.perf_counter(), 0
    for samples in audio_blocks(args.source, rate, args.piece_ms / 1000):
        heard += len(samples)
        arrival = time.perf_counter()
        if not args.fast:
            # A block that is read late has been waiting. The delay counts from when it was spoken.
            ahead = begin + heard / rate - arrival
            arrival += ahead
            time.sleep(max(ahead, 0))
        yield arrival, samples


def _from_stdin(args: argparse.Namespace, rate: int) -> Iterator[tuple]:
    """The time at which each block was read, and its samples."""
    read, channels, orig, (dtype, scale) = _opened(args)
    resampler = StreamResampler(orig, rate)
    frame_size = channels * np.dtype(dtype).itemsize
    while data := read(max(orig * args.piece_ms // 1000, 1) * frame_size):
        arrival = time.perf_counter()
        whole = len(data) // frame_size * frame_size  # the input may end in the middle of a sample
        x = np.frombuffer(data[:whole], dtype).reshape(-1, channels).astype(np.float32) * scale
        if not np.isfinite(x).all():
            raise OSError(
                "the input has samples that are not finite: are --sample-format and source right?"
            )
        yield arrival, resampler.push(torch.from_numpy(x).mean(dim=1))
    yield time.perf_counter(), resampler.finish()


def _opened(args: argparse.Namespace):
    """Standard input: a function that reads n bytes, channels, sampling rate, dtype and scale."""
    source = sys.stdin.buffer
    head = source.read(4)
    source = _Rejoined(head, source)
    if head != b"RIFF":
        return source.read, 1, args.rate, SAMPLES[args.sample_format]
    try:
        wav = wave.open(source)
    except (wave.Error, EOFError) as error:
        raise OSError(f"the WAV on standard input cannot be read: {error}") from error
    if wav.getsampwidth() != 2:
        raise OSError(
            f"the WAV on standard input has {8 * wav.getsampwidth()} bits a sample, not 16"
        )
    frame_size = 2 * wav.getnchannels()
    read = lambda n: wav.readframes(n // frame_size)  # noqa: E731
    return read, wav.getnchannels(), wav.getframerate(), SAMPLES["s16le"]


class _Rejoined:
    """A stream that cannot seek, with the bytes that have been read from it put back."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase):
        self._head, self._rest = head, rest

    def read(self, n: int) -> bytes:
        head, self._head = self._head[:n], self._head[n:]
        return head + self._rest.read(n - len(head)) if len(head) < n else head


def _show_lines(segments: list, partial: str) -> None:
    for segment in segments:
        words = (f"{word.start:.2f}-{word.end:.2f} {word.text}" for word in segment.words)
        print("\t".join(words), flush=True)


def _show_on_terminal(segments: list, partial: str) -> None:
    """Finished segments, and below them the end of the unfinished one, on a line that is overwritten."""
    lines = "".join(f"{segment.text}\n" for segment in segments)
    width = shutil.get_terminal_size().columns - 1
    print(f"{CLEAR_LINE}{lines}{partial[-width:]}", end="", flush=True)


def _summary(seconds: float, busy: float, delays: array, config) -> str:
    parts = [
        f"{seconds:.1f} s of speech",
        f"latency by design {1000 * config.latency_seconds:.0f} ms",
    ]
    if delays:
        ordered = sorted(delays)
        middle, most = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
        parts.append(
            f"delay from a piece to its output {1000 * middle:.1f} ms (median),"
            f" {1000 * most:.1f} ms (95%), {1000 * ordered[-1]:.1f} ms (largest)"
        )
    if seconds:
        parts.append(f"real-time factor {busy / seconds:.3f}")
    return "; ".join(parts)
