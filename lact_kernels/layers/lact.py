"""`LaCTLayer`: attention in a sliding window and test-time training over one projection."""

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lact_kernels.core.fast_weights import wide_dtype
from lact_kernels.core.offsets import on_host
from lact_kernels.layers.branch_norm import BranchNorm
from lact_kernels.layers.cache import LaCTCache, LayerOptions
from lact_kernels.layers.contexts import (
    BatchContext,
    CachedContext,
    Context,
    PackedContext,
    Pieces,
    context_of_pieces,
)
from lact_kernels.layers.fast_weight import LowRankFastWeight
from lact_kernels.layers.inputs import Window, check_input, check_layer_window
from lact_kernels.layers.joint_linear import joint_linear
from lact_kernels.layers.padding import Padding, checked_mask
from lact_kernels.layers.rotary import rotary_tables
from lact_kernels.layers.temporal_reduction import TemporalReduction
from lact_kernels.ops import checks
from lact_kernels.ops.checks import Backend
from lact_kernels.ops.silu_l2norm_rope import silu_l2norm_rope

BASE_LR = 0.001  # of every token before training
NORM_EPS = 1e-5


class LaCTLayer(nn.Module):
    """The hybrid layer of "Test-Time Training Done Right": sees a window exactly, and learns the rest.

    One projection gives queries, keys and values of two branches, whose outputs are added: attention in a
    sliding window (`window_attn`), and a SwiGLU network per head whose weights are trained on keys and
    values chunk by chunk (`block_causal_ttt`).

        q, k, v = qkv(x);  q, k = rms_norm(q), rms_norm(k)                                (attn_qk_norm)
        attention = window_attn(rope(q), rope(k), v)
        fast q, k = rope(l2_norm(silu(q * scale + offset))), likewise k;  fast v = silu(v)
        rates     = softplus(lr_proj(x) + softplus^-1(0.001));  momentum = sigmoid(momentum_proj(x))
        ttt       = rms_norm(block_causal_ttt(fast q, k, v, w0, w1, w2, rates, momentum))
        y         = o_proj(attention + ttt * silu(ttt_scale_proj(x)))

    Parameters have the names and shapes of the LaCT authors' `LaCTSWIGLULayer`: its checkpoints load
    with `strict=True`, and it loads ours.

    Args:
        hidden_size: channels C of a token.
        num_attn_heads: heads of the attention. They divide C into an even number of channels each.
        num_lact_heads: heads of the fast weights. They divide C.
        inter_multi: hidden width of the fast network, relative to its head's `C / num_lact_heads`.
        window_size: tokens that a query sees, itself and those before it; None is full causal attention.
            Or a pair `(left, right)` as in `window_attn`: with `right` later tokens (-1: all) the layer is
            one of an encoder, and takes no cache. Fast weights stay causal: those of earlier chunks.
        lact_chunk_size: tokens from one update of the fast weights to the next. A sequence that is not
            longer never updates them.
        qkv_bias: whether the projection has a bias.
        attn_qk_norm: RMS norms of queries and keys, over all C channels.
        qkv_silu: SiLU of fast queries, keys and values.
        no_v_silu: not of the values.
        lr_dim: learning rates of each token, head and fast weight; 1 is supported.
        use_muon: orthogonalise each update by five Newton-Schulz iterations.
        lr_parameterization: "mamba" (the softplus above) is supported.
        learnable_ttt_scale: the factor `silu(ttt_scale_proj(x))`, one for each head.
        ttt_prenorm: accumulate updates in weights that are not normalised.
        ttt_nope: no position embedding of fast queries and keys.
        rope_theta: base of the position embedding.
        layer_idx: number of this layer in its model, under which a `LaCTCache` keeps its state.
        max_position_embeddings: has no effect; angles are computed for any position.
        w0_w2_low_rank: rank of the initial w0 and w2, if at least 1: see `LowRankFastWeight`.
        use_momentum: keep a share of the last update, chosen by each token.
        ttt_loss_type: "dot_product" is supported.
        fw_init_gain: factor on the initial standard deviations of low-rank fast weights.
        use_fused_kernel: has no effect; fused kernels run where they can. The authors' fused kernel with
            Muon orthogonalises the updates of w0 and w2 stacked, another function than theirs without
            it, which is the one computed here: this pair of options warns.
        fp32_states: has no effect; fast weights and their updates are float32 always.
        temporal_reduction: frames r that a depthwise convolution makes one token of before everything
            else. All r frames get its output, so that they see up to r - 1 frames ahead.
        backend: `"auto"`, `"triton"` or `"eager"`, for all operations.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, which the message names.
        NotImplementedError: an `lr_dim`, `lr_parameterization` or `ttt_loss_type` that is not supported.

    Source: arXiv 2505.23884, section 3; names as in github.com/a1600012888/LaCT at 1f84d47.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attn_heads: int,
        num_lact_heads: int,
        inter_multi: float = 1.0,
        window_size: Window = 2048,
        lact_chunk_size: int = 2048,
        qkv_bias: bool = False,
        attn_qk_norm: bool = True,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        lr_dim: int = 1,
        use_muon: bool = False,
        lr_parameterization: Literal["mamba"] = "mamba",
        learnable_ttt_scale: bool = False,
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        rope_theta: float = 500000.0,
        layer_idx: int | None = None,
        max_position_embeddings: int | None = 2048,
        w0_w2_low_rank: int = -1,
        use_momentum: bool = False,
        ttt_loss_type: Literal["dot_product"] = "dot_product",
        fw_init_gain: float = 0.5,
        use_fused_kernel: bool = False,
        fp32_states: bool = False,
        temporal_reduction: int = 1,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden_size = checks.check_positive_int("hidden_size", hidden_size)
        num_attn_heads = checks.check_positive_int("num_attn_heads", num_attn_heads)
        num_lact_heads = checks.check_positive_int("num_lact_heads", num_lact_heads)
        inter_multi = checks.check_finite_number("inter_multi", inter_multi)
        w0_w2_low_rank = checks.check_int("w0_w2_low_rank", w0_w2_low_rank)
        _check_sizes(hidden_size, num_attn_heads, num_lact_heads, inter_multi)
        _check_supported(lr_dim, lr_parameterization, ttt_loss_type)
        lact_chunk_size = checks.check_count("lact_chunk_size", lact_chunk_size)
        temporal_reduction = checks.check_positive_int("temporal_reduction", temporal_reduction)
        window_size = check_layer_window(window_size)
        checks.check_flags(
            qkv_bias=qkv_bias,
            attn_qk_norm=attn_qk_norm,
            qkv_silu=qkv_silu,
            no_v_silu=no_v_silu,
            use_muon=use_muon,
            learnable_ttt_scale=learnable_ttt_scale,
            ttt_prenorm=ttt_prenorm,
            ttt_nope=ttt_nope,
            use_momentum=use_momentum,
        )
        rope_theta = checks.check_finite_number("rope_theta", rope_theta)
        if rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        fw_init_gain = checks.check_finite_number("fw_init_gain", fw_init_gain)
        if layer_idx is not None:
            layer_idx = checks.check_int("layer_idx", layer_idx)
        checks.check_backend(backend)
        if use_fused_kernel and use_muon:
            warnings.warn(
                "use_fused_kernel and use_muon: the authors' fused kernel orthogonalises the updates of w0"
                " and w2 stacked into one matrix, while each is orthogonalised on its own here, as without"
                " it; weights trained with it give other outputs",
                stacklevel=2,
            )
        C, factory = hidden_size, {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.num_attn_heads = num_attn_heads
        self.num_lact_heads = num_lact_heads
        self.head_dim = C // num_attn_heads
        self.fw_head_dim = C // num_lact_heads
        self.window_size = window_size
        self.lact_chunk_size = lact_chunk_size
        self.qkv_silu = qkv_silu
        self.no_v_silu = no_v_silu
        self.use_muon = use_muon
        self.ttt_prenorm = ttt_prenorm
        self.ttt_nope = ttt_nope
        self.rope_theta = rope_theta
        self.layer_idx = layer_idx
        self.temporal_reduction = temporal_reduction
        self.backend: Backend = backend

        # In the order of the authors' layer, by which the state of an optimizer finds its parameters.
        H, D, Dh = num_lact_heads, self.fw_head_dim, int(inter_multi * self.fw_head_dim)
        self.qkv = nn.Linear(C, 3 * C, bias=qkv_bias, **factory)
        self.q_norm = self.k_norm = None
        if attn_qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(C, NORM_EPS, **factory) for _ in range(2))
        self.o_proj = nn.Linear(C, C, bias=False, **factory)
        self.w0: nn.Parameter | LowRankFastWeight
        self.w2: nn.Parameter | LowRankFastWeight
        if w0_w2_low_rank > 0:
            self.w0, self.w2 = (
                LowRankFastWeight(H, Dh, D, w0_w2_low_rank, fw_init_gain, **factory)
                for _ in range(2)
            )
        else:
            self.w0, self.w2 = (nn.Parameter(torch.empty(H, Dh, D, **factory)) for _ in range(2))
        self.w1 = nn.Parameter(torch.empty(H, D, Dh, **factory))
        self.lr_proj = nn.Linear(C, 3 * H, **factory)
        self.qk_scale = nn.Parameter(torch.ones(C, 2, **factory))  # of queries, of keys
        self.qk_offset = nn.Parameter(torch.zeros(C, 2, **factory))
        self.ttt_scale_proj = nn.Linear(C, H, **factory) if learnable_ttt_scale else None
        self.ttt_norm = BranchNorm(D, NORM_EPS, **factory)
        self.momentum_proj = None
        if use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(C, H, **factory), nn.Sigmoid())
        self.temporal_conv = None
        if temporal_reduction > 1:
            self.temporal_conv = TemporalReduction(C, temporal_reduction, **factory)
        self.reset_fast_weights()

    def reset_fast_weights(self) -> None:
        """Draw the initial fast weights anew, and undo the scale and shift of their queries and keys."""
        for w in (self.w0, self.w1, self.w2):
            if isinstance(w, LowRankFastWeight):
                w.reset_parameters()
            else:
                nn.init.normal_(w, std=w.shape[2] ** -0.5)
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)

    @property
    def looks_ahead(self) -> bool:
        """Whether queries see later tokens, so that no output is known before they are."""
        return isinstance(self.window_size, tuple)

    @property
    def _options(self) -> LayerOptions:
        return LayerOptions(
            self.num_attn_heads,
            self.head_dim,
            self.window_size,
            self.lact_chunk_size,
            self.temporal_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_attn_heads={self.num_attn_heads},"
            f" num_lact_heads={self.num_lact_heads}, window_size={self.window_size},"
            f" lact_chunk_size={self.lact_chunk_size}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LaCTCache | None = None,
        cu_seqlens: Tensor | None = None,
        pieces: Pieces | DeviceMesh | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            hidden_states: `[B, T, C]`.
            attention_mask: `[B, T]`, bool or integers, 0 where there is no token: on the left, on the
                right or in between. Neither branch sees such a place, positions do not count it, and
                its output is 0. Each call waits for its device to read it; one on the CPU spares the wait.
            cache: go on behind the tokens of earlier calls with this cache, and keep in it what later
                calls need. With `temporal_reduction`, only the last call of a row may have a number of
                frames that the reduction does not divide. None where the window has later tokens in it.
            cu_seqlens: int32 `[N+1]`, the borders of N sequences laid end to end in one row (`B = 1`),
                none of which sees another; with a cache they are its rows. On the device of
                `hidden_states`, where each call waits to read it, or on the CPU, where nothing waits.
            pieces: the tokens are this rank's share of sequences that the ranks of a mesh hold in contiguous
                pieces: `lact_kernels.distributed.SequencePieces`, made once for all layers, or the 1-D mesh
                itself, whose ranks then tell each other in this call how many tokens they have. With
                `temporal_reduction` each piece begins at a multiple of it.

        Returns:
            `[B, T, C]`. Gradients flow to `hidden_states` and all parameters, not into earlier calls. With
            `pieces` those of the parameters are a part, whose sum over the ranks is the whole.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or value, or a cache that does not fit.
            RuntimeError: a cache that an earlier call left half-way.
        """
        check_input("hidden_states", hidden_states, "[B, T, C]", self.hidden_size, self.qkv)
        if cache is not None and not isinstance(cache, LaCTCache):
            raise TypeError(f"cache must be a LaCTCache, got {type(cache).__name__}")
        if cache is not None and self.looks_ahead:
            raise ValueError(
                "cache must be None in a layer whose queries see tokens that come later: window_size ="
                f" {self.window_size} has a right side"
            )
        if pieces is not None:
            for name, value in (("attention_mask", attention_mask), ("cache", cache)):
                if value is not None:
                    raise ValueError(
                        f"{name} and pieces exclude each other, got both: pack what has padding"
                    )
            return self._mix(hidden_states, context_of_pieces(pieces, hidden_states, cu_seqlens))
        x, padding = hidden_states, None
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("attention_mask and cu_seqlens exclude each other, got both")
            padding = Padding.of(checked_mask(attention_mask, x), x.device)
        elif cu_seqlens is not None:
            checks.check_cu_seqlens(cu_seqlens, x)
            cu_seqlens = on_host(cu_seqlens)
        if padding is not None:
            x, cu_seqlens = padding.remove(x), padding.cu_seqlens
        B, T = x.shape[:2]
        context = BatchContext(B, T) if cu_seqlens is None else PackedContext(cu_seqlens, T)
        if cache is None:
            y = self._mix(x, context)
        else:
            y = self._mix_behind(cache, x, context, padding)
        return y if padding is None else padding.restore(y)

    def _mix_behind(
        self,
        cache: LaCTCache,
        x: Tensor,
        context: BatchContext | PackedContext,
        padding: Padding | None,
    ) -> Tensor:
        """`_mix`, of the next tokens of each row of a cache, which counts the padding that they had."""
        lengths = context.lengths
        if context.cu_seqlens is not None and len(set(lengths)) == 1:
            # Rows of one length are a batch. Single tokens then read the cache in place.
            rows = x.unflatten(1, (len(lengths), lengths[0]))[0]
            y = self._mix_behind(cache, rows, BatchContext(*rows.shape[:2]), padding)
            return y.flatten(0, 1)[None]
        past = cache.layer(self.layer_idx, self._options, lengths, x)
        with past.advance(lengths, max(lengths) if padding is None else padding.shape[1]):
            return self._mix(x, CachedContext(past, context, lengths))

    def _mix(self, x: Tensor, context: Context) -> Tensor:
        """The layer, on tokens `[B, T, C]` without padding."""
        T = x.shape[1]
        if self.temporal_conv is not None:
            x, context, slots = self.temporal_conv(x, context)

        qkv = self.qkv(x)
        dtype, wide = qkv.dtype, wide_dtype(qkv)
        q, k, v, fast_q, fast_k, fast_v = silu_l2norm_rope(
            qkv if self.q_norm is None else self._norm_queries_and_keys(qkv),
            self.qk_scale,
            self.qk_offset,
            *rotary_tables(context.positions(x), self.head_dim, self.rope_theta, wide),
            num_attn_heads=self.num_attn_heads,
            num_lact_heads=self.num_lact_heads,
            silu=self.qkv_silu,
            silu_v=self.qkv_silu and not self.no_v_silu,
            rotate_fast=not self.ttt_nope,
            backend=self.backend,
        )
        attn = context.window_attn(q, k, v, self.window_size, backend=self.backend)
        rates, momentum, scale = self._choices_of_tokens(x, wide)
        weights = self._initial_fast_weights(wide)
        ttt = context.block_causal_ttt(
            fast_q,
            fast_k,
            fast_v,
            *weights,
            *rates,
            chunk_size=self.lact_chunk_size,
            momentum=momentum,
            muon=self.use_muon,
            prenorm=self.ttt_prenorm,
            backend=self.backend,
        )
        if scale is not None:
            scale = scale.to(dtype)
        o = self.o_proj(self.ttt_norm(ttt, attn, scale, self.backend))
        return o if self.temporal_conv is None else self.temporal_conv.expand(o, T, slots)

    def _norm_queries_and_keys(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of `[B, T, 3C]`."""
        q, k, v = qkv.chunk(3, dim=-1)
        dtype = self.q_norm.weight.dtype  # wider than that of q under autocast
        return self.q_norm(q.to(dtype)).to(v.dtype), self.k_norm(k.to(dtype)).to(v.dtype), v

    def _initial_fast_weights(self, wide: torch.dtype) -> list[Tensor]:
        """w0, w1 and w2, `[H, out, in]`."""
        return [
            w.to(wide)
            if isinstance(w, Tensor)
            else w(wide)  # of a module, perhaps with another around it
            for w in (self.w0, self.w1, self.w2)
        ]

    def _choices_of_tokens(
        self, x: Tensor, wide: torch.dtype
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """What tokens x choose for each fast head, `[B, T, H]` each: three rates, momentum, scale."""
        momentum_proj = None if self.momentum_proj is None else self.momentum_proj[0]
        modules = (self.lr_proj, momentum_proj, self.ttt_scale_proj)
        given = iter(joint_linear(x, *(m for m in modules if m is not None)))
        rates, momentum, scale = (None if m is None else next(given) for m in modules)
        rates = F.softplus(rates.to(wide) + math.log(math.expm1(BASE_LR)))
        return (
            rates.unflatten(-1, (self.num_lact_heads, 3)).unbind(-1),
            None if momentum is None else momentum.to(wide).sigmoid(),
            None if scale is None else F.silu(scale),
        )


def _check_sizes(hidden_size, num_attn_heads, num_lact_heads, inter_multi) -> None:
    for name, heads in (("num_attn_heads", num_attn_heads), ("num_lact_heads", num_lact_heads)):
        if hidden_size % heads:
            raise ValueError(f"{name} must divide hidden_size = {hidden_size}, got {heads}")
    if hidden_size // num_attn_heads % 2:
        raise ValueError(
            f"hidden_size = {hidden_size} and num_attn_heads = {num_attn_heads} give heads of"
            f" {hidden_size // num_attn_heads} channels, and position embeddings need an even number"
        )
    if int(inter_multi * (hidden_size // num_lact_heads)) < 1:
        raise ValueError(f"inter_multi must leave at least one hidden channel, got {inter_multi}")


def _check_supported(lr_dim, lr_parameterization, ttt_loss_type) -> None:
    supported = {"lr_dim": 1, "lr_parameterization": "mamba", "ttt_loss_type": "dot_product"}
    values = (lr_dim, lr_parameterization, ttt_loss_type)
    for (name, expected), value in zip(supported.items(), values):
        if value != expected:
            raise NotImplementedError(f"{name} must be {expected!r}, got {value!r}")
