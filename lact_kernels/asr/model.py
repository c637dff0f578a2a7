"""`LaCTForCTC`: a CTC model of LaCT layers, from waveforms to logits."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCTC, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.encoder import ConvEncoder
from lact_kernels.asr.features import LogMel, SpecAugment
from lact_kernels.asr.text import WordCTCTokenizer
from lact_kernels.distributed import SequencePieces
from lact_kernels.layers import LaCTCache, LaCTLayer
from lact_kernels.layers.lact import BASE_LR
from lact_kernels.layers.mlp import SwiGLUMLP
from lact_kernels.layers.padding import Padding

# The options of a configuration that `LaCTLayer` has under the same name.
LAYER_OPTIONS = set(signature(LaCTLayer).parameters) & set(signature(LaCTASRConfig).parameters)
IMPOSSIBLE = -1e4  # logit of all tokens but the blank in frames of padding


class EncoderState(NamedTuple):
    """What is carried from one part of a recording to the next: convolutions, windows, fast weights."""

    conv: list[Tensor]
    cache: LaCTCache


class LaCTASRBlock(GradientCheckpointingLayer):
    """A LaCT layer and an MLP, each with a norm before it, dropout after it and a residual connection."""

    def __init__(self, config: LaCTASRConfig, layer_idx: int):
        super().__init__()
        options = {name: getattr(config, name) for name in LAYER_OPTIONS}
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = LaCTLayer(**options, layer_idx=layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLUMLP(config.hidden_size, config.intermediate_size, config.hidden_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cache: LaCTCache | None = None,
        cu_seqlens: Tensor | None = None,
        pieces: SequencePieces | None = None,
    ) -> Tensor:
        mixed = self.attn(self.attn_norm(x), cache=cache, cu_seqlens=cu_seqlens, pieces=pieces)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class LaCTForCTC(PreTrainedModel):
    """A speech recogniser: log-mel, SpecAugment in training, convolutions, LaCT blocks, CTC.

    Its inputs are waveforms, so that it works in `pipeline("automatic-speech-recognition")` with a
    `Wav2Vec2FeatureExtractor` that only pads. Padding never changes a result. The model is causal but for a
    look-ahead of `look_ahead` frames, and `FrameStream` computes the same frames from blocks of any size.

    With windows that have later frames in them (`config.looks_ahead`) it is an encoder of whole recordings.
    Convolutions and fast weights are causal then, too.

    It warns if a chunk is longer than `max_utterance_seconds`: no utterance would reach an update of the fast
    weights.

    Attributes:
        sequence_mesh: a 1-D `DeviceMesh`, or None. With one, all its ranks are given the same recordings.
            Each computes features and convolutions of all of them, and the blocks for its part of every
            sequence. All ranks return all logits, and the same loss.
    """

    sequence_mesh: DeviceMesh | None = None
    config: LaCTASRConfig
    config_class = LaCTASRConfig
    main_input_name = "input_values"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LaCTASRBlock"]
    _skip_keys_device_placement = ["cache"]  # each layer's cache stays on the layer's device

    def __init__(self, config: LaCTASRConfig):
        super().__init__(config)
        self.features = LogMel(config)
        self.spec_augment = SpecAugment(config)
        self.encoder = ConvEncoder(
            config.n_mels,
            config.hidden_size,
            config.conv_kernel_sizes,
            config.conv_strides,
            config.dropout,
        )
        self.layers = nn.ModuleList(
            LaCTASRBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        warn_if_never_updated(config, config.max_utterance_seconds)

    @property
    def device(self) -> torch.device:
        """Where the model computes. Accelerate may keep its parameters elsewhere until they are needed."""
        hook = getattr(self.ctc_head, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return super().device if device is None else torch.device(device)

    def get_input_embeddings(self) -> None:
        """None: the inputs are waveforms."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LaCTLayer):
            module.reset_fast_weights()
            shift = _inverse_softplus(self.config.fast_weight_lr) - _inverse_softplus(BASE_LR)
            nn.init.constant_(module.lr_proj.bias, shift)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Compute whole utterances.

        Args:
            input_values: `[B, samples]`, waveforms in -1 .. 1.
            attention_mask: `[B, samples]`, bool or integers, 0 for the padding at the end of a row; None if
                there is none.
            labels: int64 `[B, n]`, the tokens of each row, followed by padding of -100. With labels, the CTC
                `loss` is returned: per token, averaged over rows.
            output_hidden_states: return the inputs of all blocks, and the output of the last norm; with a
                `sequence_mesh`, those of this rank's part, of rows end to end if windows look ahead.

        Returns:
            `logits [B, ceil(samples / inputs_to_logits_ratio), vocab_size]`. In frames of padding, the blank
            has the probability 1. Hidden states are not shifted by the look-ahead: the logits of frame i are
            computed from hidden state i + look_ahead.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
        """
        lengths = _lengths(input_values, attention_mask)
        ratio, shift = self.config.inputs_to_logits_ratio, self.config.look_ahead
        num_frames = (lengths + ratio - 1) // ratio  # [B]
        T = -(-input_values.shape[1] // ratio)

        samples = torch.arange(input_values.shape[1], device=lengths.device)
        waveform = torch.where(samples < lengths[:, None], input_values, 0)
        waveform = F.pad(waveform, (0, T * ratio - waveform.shape[1]))
        states = [] if output_hidden_states else None
        with _same_draws(self.sequence_mesh if self.training else None, waveform.device):
            x, _ = self._convolve(self.spec_augment(self.features(waveform)), num_frames)
        padding = pieces = cu_seqlens = None
        if self.config.looks_ahead and attention_mask is not None:
            padding = self._padding(x, num_frames)
        if padding is not None:
            x, cu_seqlens = padding.remove(x), padding.cu_seqlens
        if self.sequence_mesh is not None:
            group, T_packed = self.config.temporal_reduction, x.shape[1]
            pieces = SequencePieces.even(
                self.sequence_mesh, T_packed, cu_seqlens, multiple_of=group
            )
            x, cu_seqlens = pieces.take(x), None
        logits = self.ctc_head(self._mix(x, None, states, cu_seqlens, pieces))
        if pieces is not None:
            logits = pieces.gather(logits)
        if padding is not None:
            logits = padding.restore(logits)
            if output_hidden_states and pieces is None:
                states = map(padding.restore, states)
        logits = logits[:, shift : shift + T]

        exists = torch.arange(T, device=lengths.device) < num_frames[:, None]  # [B, T]
        blank = torch.full_like(logits[0, :1], IMPOSSIBLE)
        blank[:, self.config.pad_token_id] = 0
        logits = torch.where(exists[..., None], logits, blank)
        loss = None if labels is None else self._loss(logits, num_frames, labels)
        states = tuple(states) if output_hidden_states else None
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=states)

    def encode(
        self, frames: Tensor, state: EncoderState | None = None, *, ends: bool = True
    ) -> tuple[Tensor, EncoderState | None]:
        """Convolutions and blocks, on normalised log-mel frames of recordings of one length.

        Args:
            frames: `[B, T * mel_frames_per_frame, n_mels]`.
            state: of the part of the recording before this one; None for whole recordings.
            ends: the recording ends here. Silence (mean features) is appended: `look_ahead` frames, and what
                completes a group of `temporal_reduction`.

        Returns:
            `[B, T (+ silence), C]`, and the `state` for the next part.
        """
        past, cache = (None, None) if state is None else state
        x, past = self._convolve(frames, None, past, ends)
        x = self._mix(x, cache)
        return x, None if cache is None else EncoderState(past, cache)

    def _convolve(
        self,
        frames: Tensor,
        num_frames: Tensor | None,
        past: list[Tensor] | None = None,
        ends: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        config, T = self.config, frames.shape[1] // self.config.mel_frames_per_frame
        if num_frames is not None:
            places = torch.arange(frames.shape[1], device=frames.device)
            exists = places < num_frames[:, None] * config.mel_frames_per_frame
            frames = frames.masked_fill(~exists[..., None], 0)
            num_frames = num_frames + config.look_ahead
        if ends:
            silence = config.look_ahead + -(T + config.look_ahead) % config.temporal_reduction
            frames = F.pad(frames, (0, 0, 0, silence * config.mel_frames_per_frame))
        return self.encoder(frames.to(self.ctc_head.weight.dtype), num_frames, past)

    def _padding(self, x: Tensor, num_frames: Tensor) -> Padding | None:
        """What of `x [B, T, C]` is behind the ends of rows, and the silence that is appended to them.

        Where all is causal it may stay, as what is computed there reaches no frame before it.
        """
        heard = num_frames + self.config.look_ahead
        heard = heard + -heard % self.config.temporal_reduction
        return Padding.of(torch.arange(x.shape[1], device=x.device) < heard[:, None], x.device)

    def _mix(
        self,
        x: Tensor,
        cache: LaCTCache | None,
        hidden_states: list[Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        pieces: SequencePieces | None = None,
    ) -> Tensor:
        """Blocks and last norm. Their inputs and the last output are appended to `hidden_states`."""
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, cache=cache, cu_seqlens=cu_seqlens, pieces=pieces)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def _loss(self, logits: Tensor, num_frames: Tensor, labels: Tensor) -> Tensor:
        blank, size, exists = self.config.pad_token_id, self.config.vocab_size, labels >= 0
        wrong = labels[(labels >= size) | (labels == blank)]
        if wrong.numel():
            raise ValueError(
                f"labels must be below vocab_size = {size}, not the blank ({blank}), and -100 behind the"
                f" end of a row, got {wrong[0]}"
            )
        log_probs = logits.float().log_softmax(dim=-1).transpose(0, 1)  # [T, B, V]
        with torch.backends.cudnn.flags(enabled=False):  # whose CTC loss is not deterministic
            return F.ctc_loss(
                log_probs,
                labels.masked_select(exists),
                num_frames,
                exists.sum(dim=1),
                blank=blank,
                zero_infinity=True,
            )


def warn_if_never_updated(config: LaCTASRConfig, seconds: float) -> None:
    """Warn if an utterance of this length is too short for an update of the fast weights."""
    if config.seconds_per_update >= seconds:
        warnings.warn(
            f"the fast weights never learn: they are updated every {config.seconds_per_update:.2f} s"
            f" (lact_chunk_size={config.lact_chunk_size} x temporal_reduction={config.temporal_reduction}"
            f" frames of {1000 * config.seconds_per_frame:.0f} ms), and no utterance is longer than"
            f" {seconds:.2f} s; a lower lact_chunk_size lets them adapt",
            stacklevel=3,
        )


def _lengths(input_values: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The number of samples in each row, int64 `[B]`."""
    if not isinstance(input_values, Tensor) or not input_values.is_floating_point():
        raise TypeError("input_values must be a floating-point tensor [B, samples]")
    if input_values.ndim != 2:
        raise ValueError(
            f"input_values must have the shape [B, samples], got {tuple(input_values.shape)}"
        )
    B, S = input_values.shape
    if attention_mask is None:
        return torch.full((B,), S, device=input_values.device)
    if attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_values {(B, S)}, got"
            f" {tuple(attention_mask.shape)}"
        )
    exists = attention_mask != 0
    if (exists[:, 1:] > exists[:, :-1]).any():
        raise ValueError("attention_mask must be 0 at the end of a row only, got a hole")
    return exists.sum(dim=1)


@contextlib.contextmanager
def _same_draws(mesh: DeviceMesh | None, device: torch.device) -> Iterator[None]:
    """Within it, all ranks of the mesh draw the same random numbers: the first rank chooses the seed."""
    if mesh is None:
        yield
        return
    seed = [int(torch.randint(2**31, ()))]
    dist.broadcast_object_list(seed, group=mesh.get_group(), group_src=0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed[0])
        yield


def _inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


AutoConfig.register(LaCTASRConfig.model_type, LaCTASRConfig, exist_ok=True)
AutoModelForCTC.register(LaCTASRConfig, LaCTForCTC, exist_ok=True)
AutoTokenizer.register(LaCTASRConfig, slow_tokenizer_class=WordCTCTokenizer, exist_ok=True)
