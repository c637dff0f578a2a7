"""Samples of one recording in, frames out: `FrameStream` as it arrives, `WholeRecording` at its end."""

import torch
from torch import Tensor

from lact_kernels.asr.model import EncoderState, LaCTForCTC
from lact_kernels.layers import LaCTCache

BLOCK_SECONDS = 20  # longer blocks are computed in parts of this length, to bound the memory


class _Recording:
    """What both have: a model that evaluates, samples that are checked, and an end."""

    def __init__(self, model: LaCTForCTC):
        if model.training:
            raise ValueError("a stream needs a model in evaluation mode: call model.eval()")
        self.model = model
        self._finished = False

    def _checked(self, samples: Tensor) -> Tensor:
        """The samples in float32 on the CPU."""
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            raise TypeError("samples must be a floating-point tensor [n]")
        if samples.ndim != 1:
            raise ValueError(f"samples must have the shape [n], got {tuple(samples.shape)}")
        if self._finished:
            raise RuntimeError(
                f"the recording is finished: a new one needs a new {type(self).__name__}"
            )
        return samples.to("cpu", torch.float32)

    def _empty(self) -> Tensor:
        return torch.zeros(0, self.model.config.vocab_size, device=self.model.device)


class FrameStream(_Recording):
    """Samples in, log-probabilities of the tokens out, frame by frame.

        stream = FrameStream(model)
        for samples in microphone:
            log_probs = stream.push(samples)        # [frames, vocab_size], the frames that are now known
        log_probs = stream.finish()

    With blocks of any size, these are the frames that one pass over the whole recording gives. The stream
    keeps the samples that do not fill a frame, the last frames of the convolutions, the attention windows and
    the fast weights. Its memory does not grow.

    Args:
        model: in evaluation mode, and without later frames in its windows.

    Attributes:
        num_frames: number of frames that have been returned.

    Raises:
        ValueError: the model is in training mode, or its windows have later frames in them.
    """

    def __init__(self, model: LaCTForCTC):
        super().__init__(model)
        config = model.config
        if config.looks_ahead:
            raise ValueError(
                "a stream needs a window_size without a right side, whose frames need not wait for later"
                f" ones: got {config.window_size}, of a model that transcribes whole recordings"
            )
        self.num_frames = 0
        self._group = config.inputs_to_logits_ratio * config.temporal_reduction
        groups = int(BLOCK_SECONDS * config.sampling_rate) // self._group
        self._longest = max(groups, 1) * self._group  # samples that are computed at once
        self._waiting = torch.zeros(0)  # samples of an incomplete group
        self._context = torch.zeros(1, model.features.context)  # the samples before them
        self._state = EncoderState(None, LaCTCache())
        self._num_heard = 0  # frames whose samples have been computed
        self._to_drop = config.look_ahead  # outputs that precede that of the first frame

    @property
    def seconds(self) -> float:
        """Seconds of speech whose frames have been returned."""
        return self.num_frames * self.model.config.seconds_per_frame

    def push(self, samples: Tensor) -> Tensor:
        """Add `samples`, a float tensor `[n]` in -1 .. 1, n >= 0.

        Returns:
            float32 `[frames, vocab_size]`, on the model's device.

        Raises:
            TypeError, ValueError: another type, dtype or shape.
            RuntimeError: the recording has been finished.
        """
        waiting = torch.cat([self._waiting, self._checked(samples)])
        whole = len(waiting) // self._group * self._group
        self._waiting = waiting[whole:].clone()
        parts = waiting[:whole].split(self._longest)
        return torch.cat([self._empty(), *(self._hear(x, ends=False) for x in parts if len(x))])

    def finish(self) -> Tensor:
        """End the recording, and return its last frames, `[frames, vocab_size]`."""
        if self._finished:
            return self._empty()
        if not self._num_heard and not len(self._waiting):
            self._finished = True
            return self._empty()
        ratio = self.model.config.inputs_to_logits_ratio
        fill = -len(self._waiting) % ratio
        log_probs = self._hear(torch.nn.functional.pad(self._waiting, (0, fill)), ends=True)
        self._finished = True
        return log_probs

    @torch.inference_mode()
    def _hear(self, samples: Tensor, ends: bool) -> Tensor:
        model = self.model
        samples = samples[None].to(model.device)
        context = self._context.to(model.device)
        frames = model.features(samples, context)
        self._context = torch.cat([context, samples], dim=1)[:, -context.shape[1] or None :]
        frames, self._state = model.encode(frames, state=self._state, ends=ends)
        self._num_heard += samples.shape[1] // model.config.inputs_to_logits_ratio
        x = frames[0, self._to_drop :]
        self._to_drop -= frames.shape[1] - x.shape[0]
        x = x[: self._num_heard - self.num_frames]  # at the end a group is filled up with silence
        self.num_frames += x.shape[0]
        return model.ctc_head(x).float().log_softmax(dim=-1)


class WholeRecording(_Recording):
    """Called as a `FrameStream`, and has all frames at the end, whatever the windows of the model.

    It keeps the samples: its memory grows with the recording.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model: LaCTForCTC):
        super().__init__(model)
        self._blocks = [torch.zeros(0)]

    def push(self, samples: Tensor) -> Tensor:
        """Add `samples`, a float tensor `[n]` in -1 .. 1, n >= 0; no frames, `[0, vocab_size]`, are known.

        Raises:
            TypeError, ValueError: another type, dtype or shape.
            RuntimeError: the recording has been finished.
        """
        self._blocks.append(self._checked(samples).clone())
        return self._empty()

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """End the recording, and return its frames, float32 `[frames, vocab_size]`, on the model's device."""
        if self._finished:
            return self._empty()
        samples = torch.cat(self._blocks)
        logits = self.model(samples[None].to(self.model.device)).logits[0]
        self._blocks, self._finished = [], True
        return logits.float().log_softmax(dim=-1)
