"""`LaCTASRConfig`: sizes and options of a speech recogniser, and named configurations."""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

from transformers import PretrainedConfig

from lact_kernels.layers.inputs import Window, check_layer_window
from lact_kernels.ops import checks


class LaCTASRConfig(PretrainedConfig):
    """The configuration of `LaCTForCTC`.

    The encoder makes one frame of `prod(conv_strides)` log-mel frames. Look-ahead, window and chunk are
    counted in these frames (with `temporal_reduction` r, window and chunk in groups of r frames). With the
    defaults a frame is 40 ms, the window is 10.24 s, and the fast weights are updated every 2.56 s.

    A window `(left, right)` that has later frames in it makes a recogniser of whole recordings, which cannot
    stream.

    Args:
        vocab_size: number of tokens. The CTC blank, `pad_token_id`, is one of them.
        hidden_size: channels of a frame.
        num_hidden_layers: number of blocks (LaCT layer and MLP).
        num_attn_heads, num_lact_heads, inter_multi, window_size, lact_chunk_size, qkv_bias, attn_qk_norm,
            qkv_silu, no_v_silu, use_muon, use_momentum, learnable_ttt_scale, ttt_prenorm, ttt_nope,
            w0_w2_low_rank, rope_theta, fw_init_gain, temporal_reduction: as in `LaCTLayer`.
        fast_weight_lr: learning rate of the fast weights before training, which learns one for each frame.
        hidden_ratio, intermediate_size: width of the MLPs, as in `SwiGLUMLP`.
        dropout: after each convolution, each LaCT layer and each MLP.
        norm_eps: of the RMS norms.
        conv_kernel_sizes, conv_strides: of the encoder's convolutions, one number for each. A kernel is at
            least as long as its stride.
        look_ahead: the output for a frame is computed when so many more frames have been heard. Give it at
            least a few: at the first frame a causal model has heard nothing, and outputs its prior.
        sampling_rate: samples per second of the waveform.
        n_fft, win_length, hop_length: of the log-mel spectrogram, in samples.
        n_mels: number of mel bands.
        num_freq_masks, freq_mask_width: of SpecAugment: the number of masks, and the most bands of one.
        num_time_masks, time_mask_width: likewise, and the most log-mel frames of one.
        max_utterance_seconds: longer utterances are left out of the training.
        pad_token_id, kwargs: as in transformers.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, which the message names.
    """

    model_type = "lact_asr"

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 256,
        num_hidden_layers: int = 8,
        num_attn_heads: int = 4,
        num_lact_heads: int = 4,
        inter_multi: float = 1,
        window_size: Window = 256,
        lact_chunk_size: int = 64,
        qkv_bias: bool = False,
        attn_qk_norm: bool = True,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        use_muon: bool = False,
        use_momentum: bool = True,
        learnable_ttt_scale: bool = True,
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        w0_w2_low_rank: int = -1,
        rope_theta: float = 10000.0,
        fw_init_gain: float = 0.5,
        temporal_reduction: int = 1,
        fast_weight_lr: float = 0.01,
        hidden_ratio: float = 4,
        intermediate_size: int | None = None,
        dropout: float = 0.1,
        norm_eps: float = 1e-6,
        conv_kernel_sizes: Sequence[int] = (5, 5),
        conv_strides: Sequence[int] = (2, 2),
        look_ahead: int = 4,
        sampling_rate: int = 16000,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        n_mels: int = 80,
        num_freq_masks: int = 2,
        freq_mask_width: int = 13,
        num_time_masks: int = 2,
        time_mask_width: int = 15,
        max_utterance_seconds: float = 30.0,
        pad_token_id: int = 0,
        **kwargs: Any,
    ):
        for name, value in list(locals().items()):
            if name not in ("self", "kwargs", "__class__"):
                setattr(self, name, checks.plain(value))  # JSON cannot hold NumPy's numbers
        self.conv_kernel_sizes = list(map(checks.plain, conv_kernel_sizes))
        self.conv_strides = list(map(checks.plain, conv_strides))
        self.window_size = check_layer_window(window_size)
        self._check()
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    def _check(self) -> None:
        kernels, strides = self.conv_kernel_sizes, self.conv_strides
        if len(kernels) != len(strides) or not kernels:
            raise ValueError(
                "conv_kernel_sizes and conv_strides must have one number for each convolution, got"
                f" {kernels} and {strides}"
            )
        if any(stride < 1 or kernel < stride for kernel, stride in zip(kernels, strides)):
            raise ValueError(
                "conv_strides must be at least 1 and conv_kernel_sizes no less than them, got"
                f" {kernels} and {strides}"
            )
        if self.look_ahead < 0:
            raise ValueError(f"look_ahead must be at least 0, got {self.look_ahead}")
        if not self.hop_length <= self.win_length <= self.n_fft:
            raise ValueError(
                "hop_length, win_length and n_fft must ascend, got"
                f" {self.hop_length}, {self.win_length} and {self.n_fft}"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id, the CTC blank, must be below vocab_size = {self.vocab_size}, got"
                f" {self.pad_token_id}"
            )
        if not self.fast_weight_lr > 0:
            raise ValueError(f"fast_weight_lr must be positive, got {self.fast_weight_lr}")

    @property
    def mel_frames_per_frame(self) -> int:
        return math.prod(self.conv_strides)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples in a frame."""
        return self.hop_length * self.mel_frames_per_frame

    @property
    def seconds_per_frame(self) -> float:
        return self.inputs_to_logits_ratio / self.sampling_rate

    @property
    def seconds_per_update(self) -> float:
        """Seconds of speech from one update of the fast weights to the next."""
        return self.lact_chunk_size * self.temporal_reduction * self.seconds_per_frame

    @property
    def looks_ahead(self) -> bool:
        """Whether windows have later frames in them, so that a recording is computed as a whole."""
        return isinstance(check_layer_window(self.window_size), tuple)

    @property
    def latency_seconds(self) -> float:
        """The time from the first sample of a frame to the last sample that its output depends on.

        Every layer with a window `(left, right)` adds `right` to it, without a limit if that is -1.
        """
        right = self.window_size[1] if self.looks_ahead else 0
        if right == -1:
            return math.inf
        groups = 1 + self.num_hidden_layers * right
        return (self.look_ahead + self.temporal_reduction * groups) * self.seconds_per_frame

    @classmethod
    def named(
        cls,
        name: Literal["tiny", "stream", "base", "improved", "regularized", "large"],
        **overrides: Any,
    ) -> "LaCTASRConfig":
        """The configuration of this name, with some options overridden.

        - `tiny`: half a million parameters, trained on the CPU of a laptop in minutes.
        - `stream`: 16 million parameters, and a latency of 200 ms.
        - `base`, `improved`, `regularized`, `large`: frames of 10 ms, window and chunk of 4096 frames. A
          chunk is 40.96 s: on shorter utterances the fast weights are never updated, and the model warns.

        Raises:
            ValueError: there is no such name, or no such option.
        """
        if name not in NAMED:
            raise ValueError(
                f"there is no configuration {name!r}, choose one of {', '.join(NAMED)}"
            )
        unknown = set(overrides) - set(signature(cls).parameters)
        if unknown:
            raise ValueError(f"LaCTASRConfig has no option {', '.join(sorted(unknown))}")
        return cls(**NAMED[name] | overrides)


def _without_subsampling(conv_layers: int, **options: Any) -> dict[str, Any]:
    """Options of a model whose frames are those of the log-mel spectrogram, 10 ms."""
    defaults = {
        "window_size": 4096,
        "lact_chunk_size": 4096,
        "use_muon": True,
        "fast_weight_lr": 0.001,
        "look_ahead": 16,
        "conv_kernel_sizes": (3,) * conv_layers,
        "conv_strides": (1,) * conv_layers,
    }
    return defaults | options


# Options that differ from the defaults of `LaCTASRConfig`.
NAMED = {
    "tiny": dict(
        hidden_size=96, num_hidden_layers=3, num_attn_heads=2, num_lact_heads=2, inter_multi=2,
        window_size=32, lact_chunk_size=32, use_momentum=False, attn_qk_norm=False,
        intermediate_size=256,
    ),
    "stream": dict(
        hidden_size=384, num_hidden_layers=8, num_attn_heads=6, num_lact_heads=6,
        window_size=128, lact_chunk_size=64,
    ),
    "base": _without_subsampling(
        conv_layers=2, hidden_size=768, num_hidden_layers=12, num_attn_heads=12, num_lact_heads=4,
        w0_w2_low_rank=32, attn_qk_norm=False, rope_theta=1e6,
    ),
    "improved": _without_subsampling(
        conv_layers=3, hidden_size=1024, num_hidden_layers=18, num_attn_heads=16, num_lact_heads=8,
        rope_theta=5e5, dropout=0.15,
    ),
    "regularized": _without_subsampling(
        conv_layers=3, hidden_size=640, num_hidden_layers=12, num_attn_heads=8, num_lact_heads=4,
        rope_theta=5e5, dropout=0.25, vocab_size=29,
    ),
    "large": _without_subsampling(
        conv_layers=3, hidden_size=1024, num_hidden_layers=24, num_attn_heads=16, num_lact_heads=8,
        w0_w2_low_rank=32, attn_qk_norm=False, rope_theta=1e6,
    ),
}  # fmt: skip
