"""Initial fast weights of few parameters."""

import torch
from torch import Tensor, nn


class LowRankFastWeight(nn.Module):
    """`w_left @ w_right + I / 2` for each head: a slow parameter of rank `rank` beside half the identity.

    Args:
        num_heads: heads H.
        out_features: rows of a weight.
        in_features: columns of a weight.
        rank: of the product, at least 1.
        init_gain: factor on the initial standard deviations, `rank^-0.5` and `in_features^-0.5`.
        device, dtype: of the parameters.

    Attributes:
        w_left: `[H, out_features, rank]`.
        w_right: `[H, rank, in_features]`.
    """

    def __init__(
        self,
        num_heads: int,
        out_features: int,
        in_features: int,
        rank: int,
        init_gain: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.rank = rank
        self.init_gain = init_gain
        self.w_left = nn.Parameter(torch.empty(num_heads, out_features, rank, **factory))
        self.w_right = nn.Parameter(torch.empty(num_heads, rank, in_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_left, std=self.rank**-0.5 * self.init_gain)
        nn.init.normal_(self.w_right, std=self.w_right.shape[2] ** -0.5 * self.init_gain)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weights `[H, out_features, in_features]`, multiplied in `dtype` whatever autocast says."""
        with torch.autocast(self.w_left.device.type, enabled=False):
            product = self.w_left.to(dtype) @ self.w_right.to(dtype)
        return product + torch.eye(*product.shape[1:], dtype=dtype, device=product.device) / 2
