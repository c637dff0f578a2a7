"""Read sound files as mono waveforms at the model's sampling rate: whole, in part, or block by block."""

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
BLOCK = 1 << 20  # samples of each channel that are decoded at a time


def read_audio(
    path: str | Path,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
) -> Tensor:
    """Read a file, or `duration` seconds of it from `offset` on, as float32 `[samples]`.

    Channels are averaged. Nothing outside the requested part is decoded.

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
        blocks = list(_decoded(file, BLOCK, wanted))
    x = torch.cat(blocks) if blocks else torch.empty(0)
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
    """Read a file of any length in blocks of about `seconds`. Memory does not grow with the file.

    Args:
        source: a path, or a seekable binary file object.
        sampling_rate: of the blocks. Concatenated, they are what `read_audio` returns.
        seconds: how much of the file is decoded at a time.

    Raises:
        OSError: the file is missing or broken. It is raised at the first block that cannot be read.
    """
    with _opened(source) as file:
        stream = StreamResampler(file.samplerate, sampling_rate)
        for samples in _decoded(file, max(1, round(seconds * file.samplerate))):
            block = stream.push(samples)
            if len(block):
                yield block
        rest = stream.finish()
        if len(rest):
            yield rest


class StreamResampler:
    """Resample a signal that arrives in blocks of any size, with the result for the whole signal.

    Samples are resampled in groups: `orig / gcd` of them become `new / gcd`. The filter reaches into the
    groups around its own, so that a group is resampled when those after it have arrived, too: from 44.1 to
    16 kHz, 20 ms after its first sample.

    Args:
        orig: sampling rate of the signal, Hz.
        new: sampling rate of the result, Hz.
    """

    def __init__(self, orig: int, new: int):
        self._resample = resampler(orig, new)
        self._orig, self._new = orig // self._resample.gcd, new // self._resample.gcd
        width = 0 if orig == new else self._resample.width
        self._groups = -(-width // self._orig)  # that the filter reaches into, on each side
        self._context = self._groups * self._orig
        self._begin()

    def _begin(self) -> None:
        self._pending = torch.zeros(self._context)  # as `Resample` pads a whole signal

    def push(self, x: Tensor) -> Tensor:
        """Add samples, float32 `[n]`; return the resampled ones that are now known, `[m]`."""
        self._pending = torch.cat((self._pending, x))
        groups = (len(self._pending) - 2 * self._context) // self._orig
        if groups < 1:
            return x.new_empty(0)
        used = groups * self._orig
        y = self._resample(self._pending[: used + 2 * self._context])
        self._pending = self._pending[used:].clone()  # a view would keep the whole block in memory
        return y[self._groups * self._new :][: groups * self._new]

    def finish(self) -> Tensor:
        """End the signal and return its last samples. What is pushed next begins another signal."""
        y = self._resample(self._pending)[self._groups * self._new :]
        self._begin()
        return y


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # its filter is shared by callers in and outside of inference mode
def resampler(orig: int, new: int) -> Resample:
    """`torchaudio.functional.resample`, with a filter that is computed once per process."""
    return Resample(orig, new)


def _decoded(file: soundfile.SoundFile, size: int, frames: int | None = None) -> Iterator[Tensor]:
    """The next `frames` samples of a file, or all that are left, in mono blocks of at most `size`."""
    left = sys.maxsize if frames is None else frames
    while left > 0:
        x = torch.from_numpy(file.read(min(size, left), dtype="float32", always_2d=True))
        if len(x) == 0:
            return
        left -= len(x)
        yield x.mean(1)


@contextlib.contextmanager
def _opened(source) -> Iterator[soundfile.SoundFile]:
    """Open a sound file. Whatever fails raises an OSError that names it."""
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        with soundfile.SoundFile(source) as file:
            yield file
    except soundfile.SoundFileError as error:
        raise OSError(f"{source} cannot be read as audio: {error}") from error
