"""What the two layers of LaCT's minimal implementations have in common."""

import torch
from torch import Tensor, nn

from lact_kernels.compat.lact.projections import check_base_lr, inv_softplus, learning_rates
from lact_kernels.core.fast_weights import Triple, wide_dtype
from lact_kernels.layers.inputs import check_input
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend


class MinimalLayer(nn.Module):
    """Projections without biases, and fast weights `[H, out, in]`. Sizes have been checked."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inter_multi: float,
        base_lr: float,
        backend: Backend,
        factory: dict,
    ):
        super().__init__()
        checks.check_backend(backend)
        self.dim = dim
        self.head_dim = head_dim
        self.inter_multi = inter_multi
        self.base_lr = check_base_lr(base_lr)
        self.base_lr_inv = inv_softplus(self.base_lr)
        self.backend: Backend = backend

        H, dh = dim // head_dim, int(head_dim * inter_multi)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.lr_proj = nn.Linear(dim, 3 * H, bias=False, **factory)
        self.w0 = nn.Parameter(torch.empty(H, dh, head_dim, **factory))
        self.w1 = nn.Parameter(torch.empty(H, head_dim, dh, **factory))
        self.w2 = nn.Parameter(torch.empty(H, dh, head_dim, **factory))

    def reset_fast_weights(self) -> None:
        """Draw the initial fast weights anew."""
        for w in (self.w0, self.w1, self.w2):
            nn.init.normal_(w, std=w.shape[2] ** -0.5)

    def _check_input(self, x: Tensor) -> None:
        check_input("x", x, "[B, T, dim]", self.dim, self.to_qkv)

    def _weights_and_rates(self, x: Tensor, v: Tensor) -> tuple[Triple, Triple]:
        """w0, w1, w2, and their rates `[B, T, H]` at tokens x, in the dtype that they have beside v."""
        weights = tuple(w.to(wide_dtype(v)) for w in (self.w0, self.w1, self.w2))
        rates = learning_rates(self.lr_proj, x, self.base_lr_inv)
        return weights, rates.unflatten(-1, (len(self.w0), 3)).unbind(-1)
