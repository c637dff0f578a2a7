"""Causal log-mel frames of a waveform, and their masks in training."""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lact_kernels.asr.config import LaCTASRConfig

FLOOR = 1e-6  # added to the power of a band


class LogMel(nn.Module):
    """`log(power of each mel band + 1e-6)`, normalised with the statistics of the training speech.

    Frame t is computed from the `n_fft` samples up to sample `hop_length * (t + 1)`, with zeros before the
    recording, so that no frame waits for later samples. The dtype is float32, whatever the model's is.

    Buffers:
        mean, std: `[n_mels]`, of the logarithms. 0 and 1 until training measures them.
    """

    def __init__(self, config: LaCTASRConfig):
        super().__init__()
        self.hop_length, self.n_mels = config.hop_length, config.n_mels
        self.context = config.n_fft - config.hop_length
        self._sizes = (
            config.sampling_rate,
            config.n_fft,
            config.win_length,
            config.hop_length,
            config.n_mels,
        )
        self.register_buffer("mean", torch.zeros(config.n_mels))
        self.register_buffer("std", torch.ones(config.n_mels))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    def forward(self, waveform: Tensor, context: Tensor | None = None) -> Tensor:
        """Normalised frames of a waveform of whole hops.

        Args:
            waveform: `[B, T * hop_length]`, in -1 .. 1.
            context: `[B, n_fft - hop_length]`, the samples before it; None for zeros.

        Returns:
            float32 `[B, T, n_mels]`.
        """
        return (self.log_mel(waveform, context) - self.mean.float()) / self.std.float()

    def log_mel(self, waveform: Tensor, context: Tensor | None = None) -> Tensor:
        """As `forward`, without the normalisation."""
        if not waveform.shape[1]:
            return waveform.new_zeros(waveform.shape[0], 0, self.n_mels, dtype=torch.float32)
        waveform = waveform.float()
        if context is None:
            waveform = F.pad(waveform, (self.context, 0))
        else:
            waveform = torch.cat([context, waveform], dim=1)
        with torch.autocast(waveform.device.type, enabled=False):
            power = _mel_spectrogram(*self._sizes, waveform.device)(waveform)  # [B, n_mels, T]
        return (power + FLOOR).log().transpose(1, 2)

    @property
    def is_measured(self) -> bool:
        return bool((self.mean != 0).any())

    @torch.no_grad()
    def measure(self, waveforms: Iterable[Tensor]) -> None:
        """Set mean and standard deviation to those of these waveforms, tensors `[samples]`.

        Raises:
            ValueError: no waveform is as long as a hop.
        """
        count, total, squares = 0, 0, 0
        for waveform in waveforms:
            whole = len(waveform) // self.hop_length * self.hop_length
            frames = self.log_mel(waveform[None, :whole].to(self.mean.device))[0].double()
            count, total = count + len(frames), total + frames.sum(dim=0)
            squares = squares + frames.square().sum(dim=0)
        if not count:
            raise ValueError("the statistics of the features need at least one frame of speech")
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp(min=1e-4).sqrt())


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # cached tensors may be used in a training later
def _mel_spectrogram(sampling_rate, n_fft, win_length, hop_length, n_mels, device):
    """The transform. It is no part of the model, as `model.to(bfloat16)` would round its window and filters.

    It is made outside of dispatch modes: while a program is traced, its tensors would be fake.
    """
    with _disable_current_modes():
        transform = torchaudio.transforms.MelSpectrogram(
            sampling_rate, n_fft, win_length, hop_length, n_mels=n_mels, center=False
        )
        return transform.to(device)


class SpecAugment(nn.Module):
    """SpecAugment (arXiv 1904.08779) in training: random bands and spans of frames are set to 0, their mean.

    Each row of `[B, T, n_mels]` has its own masks, drawn from PyTorch's global generator.
    """

    def __init__(self, config: LaCTASRConfig):
        super().__init__()
        self.masks = torchaudio.transforms.SpecAugment(
            config.num_time_masks,
            config.time_mask_width,
            config.num_freq_masks,
            config.freq_mask_width,
            iid_masks=True,
            zero_masking=True,
        )

    def forward(self, frames: Tensor) -> Tensor:
        if not self.training or not frames.shape[1]:
            return frames
        masked = self.masks(frames.transpose(1, 2)[:, None])  # [B, 1, n_mels, T]
        return masked[:, 0].transpose(1, 2)
