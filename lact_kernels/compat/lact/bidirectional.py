"""The bidirectional function and layer of LaCT's minimal implementations, `bidirectional_lact_layer.py`."""

import warnings

import torch
from torch import Tensor, nn

from lact_kernels.compat.lact.minimal import MinimalLayer
from lact_kernels.compat.lact.projections import (
    NORM_EPS,
    check_sizes,
    head_norm,
    silu_heads,
)
from lact_kernels.compat.lact.rows import Rows
from lact_kernels.core.ttt_plan import TTTPlan
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.ttt import ttt


def bidirectional_lact_swiglu(
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr0: Tensor,
    lr1: Tensor,
    lr2: Tensor,
    use_muon: bool = True,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """One update on all keys, then all queries: `lact_kernels.ttt` with the plan `TTTPlan.bidirectional()`.

    Args:
        w0, w1, w2, q, k, v, lr0, lr1, lr2: as in `block_causal_lact_swiglu`; q may have another number of
            tokens than the others.
        use_muon: orthogonalise the update of each weight by five Newton-Schulz iterations.
        backend: as in `ttt`.

    Returns:
        The outputs `[b*h, lq, dv]` in the dtype of v. Gradients flow to every tensor.

    What differs from the authors' function:
        With `use_muon` theirs replaces the weights by the orthogonalised update plus the gradient, and loses
        what they were. Here the orthogonalised update is added to them, as in all other functions of theirs;
        a warning says so. Precision, rates and errors are as in `block_causal_lact_swiglu`.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype.
        ValueError: a wrong shape, device or value. Both name the argument.

    Source: arXiv 2505.23884, section 3; the signature is that of github.com/a1600012888/LaCT at 1f84d47.
    """
    checks.check_flag("use_muon", use_muon)
    if use_muon:
        _warn_of_muon()
    rows = Rows.of((w0, w1, w2), (q, k, v), (lr0, lr1, lr2), any_queries=True)
    plan = TTTPlan.bidirectional()
    o = ttt(*rows.tokens, *rows.weights, *rows.rates, plan, muon=use_muon, backend=backend)
    return o[:, :, 0]


def _warn_of_muon() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "use_muon: the orthogonalised update is added to the fast weights here. The authors'"
            " bidirectional function loses the weights, so that what was trained with it gives other outputs",
            stacklevel=3,
        )


class BidirectionalLaCTSwiGLU(MinimalLayer):
    """The bidirectional layer of LaCT's minimal implementations, with the names and shapes of its parameters.

        q, k, v = silu(to_qkv(x));  q, k divided by their norms + 1e-5, for each head           (qk_l2_norm)
        rates   = softplus(lr_proj(x) + softplus^-1(base_lr))
        y       = o_proj(rms_norm(bidirectional_lact_swiglu(w0, w1, w2, q, k, v, rates)))       (use_o_norm)

    Args:
        dim: channels of a token.
        head_dim: channels of a head, a divisor of `dim`.
        inter_multi: hidden width of the fast network, relative to `head_dim`.
        use_o_norm: the RMS norm of each head's output.
        qk_l2_norm: the norms of queries and keys.
        use_muon: orthogonalise the update of each weight by five Newton-Schulz iterations. The authors' layer
            loses the weights then, see `bidirectional_lact_swiglu`: a layer with it warns when it is made.
        base_lr: learning rate of every token before training.
        backend: as in `ttt`.
        device, dtype: of the parameters.

    Attributes:
        w0, w2: initial fast weights `[H, dh, head_dim]`.
        w1: `[H, head_dim, dh]`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, which the message names.

    Source: arXiv 2505.23884, section 3; names as in github.com/a1600012888/LaCT at 1f84d47.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inter_multi: float = 1,
        use_o_norm: bool = True,
        qk_l2_norm: bool = True,
        use_muon: bool = True,
        base_lr: float = 1e-2,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(dim, inter_multi, head_dim=head_dim)
        checks.check_flags(use_o_norm=use_o_norm, qk_l2_norm=qk_l2_norm, use_muon=use_muon)
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, head_dim, inter_multi, base_lr, backend, factory)
        if use_muon:
            _warn_of_muon()
        self.num_heads = dim // head_dim
        self.use_o_norm = use_o_norm
        self.qk_l2_norm = qk_l2_norm
        self.use_muon = use_muon
        self.o_norm = nn.Identity()
        if use_o_norm:
            self.o_norm = nn.RMSNorm(head_dim, eps=NORM_EPS, **factory)
        self.reset_fast_weights()

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, head_dim={self.head_dim}, inter_multi={self.inter_multi},"
            f" use_muon={self.use_muon}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each row, `[B, T, dim]` to `[B, T, dim]`.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape or device.
        """
        self._check_input(x)
        q, k, v = silu_heads(self.to_qkv(x), self.num_heads, self.qk_l2_norm)
        weights, rates = self._weights_and_rates(x, v)
        plan = TTTPlan.bidirectional()
        o = ttt(q, k, v, *weights, *rates, plan, muon=self.use_muon, backend=self.backend)
        return self.o_proj(head_norm(self.o_norm, o).flatten(2))
