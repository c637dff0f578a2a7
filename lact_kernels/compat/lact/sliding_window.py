"""The causal layer of LaCT's minimal implementations, `causal_lact_with_sliding_window_attn.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lact_kernels.compat.lact.minimal import MinimalLayer
from lact_kernels.compat.lact.projections import NORM_EPS, check_sizes, silu_heads
from lact_kernels.core.fast_weights import wide_dtype
from lact_kernels.layers.branch_norm import BranchNorm
from lact_kernels.ops import checks
from lact_kernels.ops.block_causal_ttt import block_causal_ttt
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.window_attn import window_attn


class CausalLaCTSwiGLUWithSlidingWindowAttn(MinimalLayer):
    """The layer of LaCT's minimal implementation of a language model, with the names of its parameters.

        q, k, v      = to_qkv(x)
        attention    = window_attn(q * scale + offset, k * scale + offset, v)
        fast q, k, v = silu(q), silu(k), silu(v);  fast q, k divided by their norms + 1e-5, for each head
        rates        = softplus(lr_proj(x) + softplus^-1(base_lr));  momentum = sigmoid(momentum_proj(x))
        ttt          = rms_norm(block_causal_ttt(fast q, k, v, w0, w1, w2, rates, momentum))
        y            = o_proj(attention + ttt * silu(ttt_scale_proj(x)))

    It has no position embedding, and scales the queries and keys of the attention, where
    `lact_kernels.LaCTLayer` has one and scales those of the fast weights.

    Args:
        dim: channels C of a token.
        head_dim: channels of a fast head, a divisor of `dim`.
        attn_head_dim: channels of an attention head, a divisor of `dim`.
        lact_chunk_size: tokens from one update of the fast weights to the next. A sequence that is not
            longer never updates them.
        window_size: tokens that a query sees, itself included; None is full causal attention.
        inter_multi: hidden width of the fast network, relative to `head_dim`.
        use_o_norm: the RMS norm of each fast head's output.
        use_momentum: keep a share of the last update, chosen by each token.
        use_muon: orthogonalise each update by five Newton-Schulz iterations.
        base_lr: learning rate of every token before training.
        ttt_scale_before_sum: the factor `silu(ttt_scale_proj(x))`, one for each head; without it 1 (theirs
            fails).
        backend: as in `block_causal_ttt` and `window_attn`.
        device, dtype: of the parameters.

    Attributes:
        w0, w2: initial fast weights `[H, dh, head_dim]`.
        w1: `[H, head_dim, dh]`.
        qk_scale, qk_offset: `[C, 2]`, of queries and of keys.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, which the message names.

    Source: arXiv 2505.23884, section 3.3; names as in github.com/a1600012888/LaCT at 1f84d47.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        attn_head_dim: int,
        lact_chunk_size: int = 2048,
        window_size: int | None = 2048,
        inter_multi: float = 1,
        use_o_norm: bool = True,
        use_momentum: bool = True,
        use_muon: bool = True,
        base_lr: float = 1e-2,
        ttt_scale_before_sum: bool = True,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(dim, inter_multi, head_dim=head_dim, attn_head_dim=attn_head_dim)
        checks.check_flags(
            use_o_norm=use_o_norm,
            use_momentum=use_momentum,
            use_muon=use_muon,
            ttt_scale_before_sum=ttt_scale_before_sum,
        )
        lact_chunk_size = checks.check_count("lact_chunk_size", lact_chunk_size)
        window_size = checks.check_causal_window("window_size", window_size)
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, head_dim, inter_multi, base_lr, backend, factory)
        self.attn_head_dim = attn_head_dim
        self.lact_chunk_size = lact_chunk_size
        self.window_size = window_size
        self.num_ttt_heads = H = dim // head_dim
        self.num_attn_heads = dim // attn_head_dim
        self.use_o_norm = use_o_norm
        self.use_momentum = use_momentum
        self.use_muon = use_muon
        self.momentum_proj = None
        if use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(dim, H, **factory), nn.Sigmoid())
        self.o_norm = BranchNorm(head_dim, NORM_EPS, **factory) if use_o_norm else nn.Identity()
        self.qk_scale = nn.Parameter(torch.ones(dim, 2, **factory))
        self.qk_offset = nn.Parameter(torch.zeros(dim, 2, **factory))
        self.ttt_scale_proj = nn.Linear(dim, H, **factory) if ttt_scale_before_sum else None
        self.reset_fast_weights()

    def reset_fast_weights(self) -> None:
        """Draw the initial fast weights anew, and undo the scale and shift of the attention's q and k."""
        super().reset_fast_weights()
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, head_dim={self.head_dim}, attn_head_dim={self.attn_head_dim},"
            f" lact_chunk_size={self.lact_chunk_size}, window_size={self.window_size}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each row, `[B, T, dim]` to `[B, T, dim]`.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape or device.
        """
        self._check_input(x)
        qkv = self.to_qkv(x)
        attn, ttt = self._attend(qkv), self._train_fast_weights(x, qkv)
        scale = None
        if self.ttt_scale_proj is not None:
            scale = F.silu(self.ttt_scale_proj(x)).to(attn.dtype)
        if self.use_o_norm:
            return self.o_proj(self.o_norm(ttt, attn, scale, self.backend))
        if scale is not None:
            ttt = ttt * scale[..., None]
        return self.o_proj(attn.flatten(2) + ttt.flatten(2))

    def _attend(self, qkv: Tensor) -> Tensor:
        """`[B, T, Hq, D]`."""
        q, k, v = qkv.chunk(3, dim=-1)
        scale, offset = self.qk_scale.unbind(1), self.qk_offset.unbind(1)
        q, k = ((x * s + b).to(v.dtype) for x, s, b in zip((q, k), scale, offset))
        q, k, v = (x.unflatten(-1, (self.num_attn_heads, self.attn_head_dim)) for x in (q, k, v))
        return window_attn(q, k, v, self.window_size, backend=self.backend)

    def _train_fast_weights(self, x: Tensor, qkv: Tensor) -> Tensor:
        """`[B, T, H, D]`."""
        q, k, v = silu_heads(qkv, self.num_ttt_heads, l2_norm=True)
        weights, rates = self._weights_and_rates(x, v)
        momentum = None
        if self.momentum_proj is not None:
            momentum = self.momentum_proj[0](x).to(wide_dtype(v)).sigmoid()
        return block_causal_ttt(
            q,
            k,
            v,
            *weights,
            *rates,
            chunk_size=self.lact_chunk_size,
            momentum=momentum,
            muon=self.use_muon,
            backend=self.backend,
        )
