"""The feed-forward network beside a LaCT layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUMLP(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`, without biases.

    Args:
        hidden_size: channels C of a token.
        intermediate_size: the width; None for two thirds of `ratio * hidden_size`, rounded up to 256.
        ratio: of a plain MLP with as many parameters.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None, ratio: float = 4):
        super().__init__()
        width = intermediate_size
        if width is None:
            width = 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
