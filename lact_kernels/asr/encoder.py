"""The convolutional encoder, from log-mel frames to the frames of the model."""

import torch
from torch import Tensor, nn

from lact_kernels.layers.padding import Padding


class ConvLayer(nn.Module):
    """Causal convolution, batch norm, ReLU and dropout.

    Each group of `stride` frames becomes one frame, which depends on its group and the `kernel_size - stride`
    frames before it. Batch statistics leave padding out.

    Args:
        in_channels, out_channels: of a frame.
        kernel_size, stride: in frames.
        dropout: probability.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, dropout: float
    ):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.context = kernel_size - stride

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute whole groups of frames.

        Args:
            x: `[B, T, in_channels]`; the stride divides T.
            lengths: int64 `[B]`, the number of outputs in each row that are not padding; None for all.
            past: `[B, kernel_size - stride, in_channels]`, the frames before x; None for zeros.

        Returns:
            `[B, T / stride, out_channels]`, and the last frames of x: `past` of the next call.
        """
        if past is None:
            past = x.new_zeros(x.shape[0], self.context, x.shape[2])
        x = torch.cat([past, x], dim=1)
        past = x[:, x.shape[1] - self.context :]
        if x.shape[1] < self.conv.kernel_size[0]:
            return x.new_zeros(x.shape[0], 0, self.conv.out_channels), past
        x = self._normalized(self.conv(x.transpose(1, 2)).transpose(1, 2), lengths)
        return self.dropout(x.relu()), past

    def _normalized(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        padding = None
        if self.training and lengths is not None:
            padding = Padding.of(
                torch.arange(x.shape[1], device=x.device) < lengths[:, None], x.device
            )
        if padding is None:
            return self.norm(x.flatten(0, 1)).view_as(x)
        return padding.restore(self.norm(padding.remove(x)[0])[None])


class ConvEncoder(nn.Module):
    """A stack of `ConvLayer`s."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: list[int],
        strides: list[int],
        dropout: float,
    ):
        super().__init__()
        channels = [in_channels] + [out_channels] * len(kernel_sizes)
        self.layers = nn.ModuleList(
            ConvLayer(*sizes, dropout)
            for sizes in zip(channels, channels[1:], kernel_sizes, strides)
        )

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, past: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute whole groups of log-mel frames.

        Args:
            x: `[B, T, in_channels]`; the product of the strides divides T.
            lengths: int64 `[B]`, the number of the encoder's frames in each row that are not padding; None
                for all.
            past: what the last call returned; None at the start of a recording.

        Returns:
            `[B, T / product of strides, out_channels]`, and the `past` of the next call.
        """
        pasts = past or [None] * len(self.layers)
        frames_per_frame = 1
        for layer in self.layers:
            frames_per_frame *= layer.conv.stride[0]
        new = []
        for layer, before in zip(self.layers, pasts):
            frames_per_frame //= layer.conv.stride[0]
            exist = None if lengths is None else lengths * frames_per_frame
            x, after = layer(x, exist, before)
            new.append(after)
        return x, new
