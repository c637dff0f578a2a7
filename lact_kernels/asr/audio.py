"""Sound files as mono waveforms at the model's sampling rate: whole, in part, or block by block."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

SAMPLING_RATE = 16000
TOLERANCE = 0.05  # seconds that a file may be shorter than its manifest says: durations are rounded
PIECE = 1 << 20  # frames that are decoded at a time


def read_audio(
    path: str | Path,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
) -> Tensor:
    """A file, or `duration` seconds of it from `offset` on, as float32 `[samples]`.

    Channels are averaged. Only the part asked for is decoded.

    Raises:
        OSError: the file is missing (FileNotFoundError), broken or empty, or ends more than 50 ms
            before what was asked for. The message names the path.
        ValueError: a negative offset, or a duration that is not positive.
    """
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(
            f"offset must not be negative and duration must be positive, got {offset}, {duration}"
        )
    with _opened(path) as file:
        rate = file.samplerate
        start = round(offset * rate)
        if offset and start >= file.frames:
            raise OSError(
                f"{path} ends at {file.frames / rate:.2f} s, before the offset {offset} s"
            )
        file.seek(start)
        wanted = None if duration is None else round(duration * rate)
        pieces = list(_pieces(file, PIECE, wanted))
    x = torch.cat(pieces) if pieces else torch.empty(0)
    if len(x) == 0:
        raise OSError(f"{path} holds no samples")
    if wanted is not None and len(x) < wanted - TOLERANCE * rate:
        raise OSError(
            f"{path} has {len(x) / rate:.2f} s from {offset} s on, {wanted / rate:.2f} s were expected"
        )
    if not x.isfinite().all():
        raise OSError(f"{path} holds samples that are not finite")
    return resampler(rate, sampling_rate)(x)


def audio_blocks(
    source: str | Path, sampling_rate: int = SAMPLING_RATE, seconds: float = 10.0
) -> Iterator[Tensor]:
    """A file of any length in blocks of about `seconds`, in memory that does not grow with it.

    Args:
        source: a path, or a seekable binary file object.
        sampling_rate: of the blocks, which together are what `read_audio` returns.
        seconds: of the file that are decoded at a time.

    Raises:
        OSError: the file is missing or broken, from the block on that cannot be read.
    """
    with _opened(source) as file:
        stream = StreamResampler(file.samplerate, sampling_rate)
        for piece in _pieces(file, max(1, round(seconds * file.samplerate))):
            block = stream.push(piece)
            if len(block):
                yield block
        rest = stream.finish()
        if len(rest):
            yield rest


class StreamResampler:
    """Resamples a signal that arrives in pieces of any size, exactly as if it were whole.

    A group of `orig / gcd` samples becomes `new / gcd` samples once the whole groups that the filter
    reaches into have arrived: from 44.1 to 16 kHz that is 20 ms after its first sample.

    Args:
        orig: sampling rate of the pieces, Hz.
        new: sampling rate of the result, Hz.
    """

    def __init__(self, orig: int, new: int):
        self._resample = resampler(orig, new)
        self._orig, self._new = orig // self._resample.gcd, new // self._resample.gcd
        width = 0 if orig == new else self._resample.width
        self._groups = -(-width // self._orig)  # context on either side
        self._context = self._groups * self._orig
        self._begin()

    def _begin(self) -> None:
        self._pending = torch.zeros(self._context)  # a whole signal is padded with zeros, too

    def push(self, x: Tensor) -> Tensor:
        """The next samples, float32 `[n]`, of any number; returns those that are final, `[m]`."""
        self._pending = torch.cat((self._pending, x))
        groups = (len(self._pending) - 2 * self._context) // self._orig
        if groups < 1:
            return x.new_empty(0)
        used = groups * self._orig
        y = self._resample(self._pending[: used + 2 * self._context])
        self._pending = self._pending[used:].clone()  # a view would keep all of it alive
        return y[self._groups * self._new :][: groups * self._new]

    def finish(self) -> Tensor:
        """The last samples; what is pushed after it is another signal."""
        y = self._resample(self._pending)[self._groups * self._new :]
        self._begin()
        return y


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # for callers with and without it
def resampler(orig: int, new: int) -> Resample:
    """`torchaudio.functional.resample` with a filter that is computed once per process."""
    return Resample(orig, new)


def _pieces(file: soundfile.SoundFile, size: int, frames: int | None = None) -> Iterator[Tensor]:
    """The next `frames` of a file, or all that it has, as mono pieces of at most `size`."""
    left = sys.maxsize if frames is None else frames
    while left > 0:
        x = torch.from_numpy(file.read(min(size, left), dtype="float32", always_2d=True))
        if len(x) == 0:
            return
        left -= len(x)
        yield x.mean(1)


@contextlib.contextmanager
def _opened(source) -> Iterator[soundfile.SoundFile]:
    """A sound file whose every failure is an OSError that names it."""
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        with soundfile.SoundFile(source) as file:
            yield file
    except soundfile.SoundFileError as error:
        raise OSError(f"{source} cannot be read as audio: {error}") from error
