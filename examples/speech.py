"""From a recording to the inputs of both operations."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from benchmarks.registry import BlockCausalTTT, WindowAttn

RECORDING = Path(__file__).parent / "data" / "speech.flac"
SAMPLE_RATE = 16000
HOP = 160
FRAMES_PER_SECOND = SAMPLE_RATE // HOP
MELS = 80


def read_audio(path: Path) -> Tensor:
    """Read a recording of any rate and number of channels, as one channel at 16 kHz, `[samples]`.

    Raises OSError if the file is missing or cannot be read.
    """
    try:
        import soundfile
    except ImportError:
        raise OSError("reading a recording needs the package soundfile") from None
    if not path.is_file():
        raise FileNotFoundError(f"there is no recording {path}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise OSError(f"{path} is not a recording that soundfile reads: {error}") from None
    mono = torch.from_numpy(samples).mean(dim=1)
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE)


def log_mel(audio: Tensor) -> Tensor:
    """Log-mel frames `[T, 80]`, one every 10 ms, each band with mean 0 and variance 1."""
    transform = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=512, win_length=400, hop_length=HOP, n_mels=MELS
    )
    frames = (transform(audio) + 1e-6).log().T
    return (frames - frames.mean(dim=0)) / (frames.std(dim=0) + 1e-5)


def attention_inputs(
    frames: Tensor, point: WindowAttn, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """q, k, v `[1, T, H, D]`: three random projections of the frames, from a fixed seed."""
    project = _projection(frames, seed=0)
    sizes = {"q": (point.Hq, point.D), "k": (point.Hkv, point.D), "v": (point.Hkv, point.Dv)}
    return _leaves({name: project(*size).to(dtype) for name, size in sizes.items()}, device)


def ttt_inputs(
    frames: Tensor, point: BlockCausalTTT, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """All inputs of `block_causal_ttt` as a LaCT layer would make them, from random projections.

    q and k are normalised after a SiLU; learning rates are about 0.001, the momentum about 0.5.
    """
    project = _projection(frames, seed=1)
    generator = torch.Generator().manual_seed(2)
    H, Dk, Dv, Dh = point.H, point.Dk, point.Dv, point.Dh
    shift = math.log(math.expm1(0.001))  # softplus(shift) = 0.001
    inputs = {
        "q": F.normalize(F.silu(project(H, Dk)), dim=-1).to(dtype),
        "k": F.normalize(F.silu(project(H, Dk)), dim=-1).to(dtype),
        "v": F.silu(project(H, Dv)).to(dtype),
        "w0": torch.randn(H, Dh, Dk, generator=generator) / Dk**0.5,
        "w1": torch.randn(H, Dv, Dh, generator=generator) / Dh**0.5,
        "w2": torch.randn(H, Dh, Dk, generator=generator) / Dk**0.5,
        **{f"lr{i}": F.softplus(project(H, 1)[..., 0] + shift) for i in range(3)},
    }
    if point.momentum:
        inputs["momentum"] = project(H, 1)[..., 0].sigmoid()
    return _leaves(inputs, device)


def _projection(frames: Tensor, seed: int):
    """A function `project(H, D)`: the frames times the next random matrix, `[1, T, H, D]`."""
    generator = torch.Generator().manual_seed(seed)

    def project(H: int, D: int) -> Tensor:
        matrix = torch.randn(MELS, H * D, generator=generator) / MELS**0.5
        return (frames @ matrix).unflatten(-1, (H, D))[None]

    return project


def _leaves(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device).detach().requires_grad_() for name, x in inputs.items()}
