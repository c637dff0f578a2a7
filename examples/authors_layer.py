"""A layer with the attributes and parameters of the LaCT authors' layer, computed by the reference.

It takes the place of theirs in examples and tests, so that their package, FLA and flash-attn are not needed.
"""

import torch
from torch import Tensor, nn

import reference


class LowRankFastWeight(nn.Module):
    def __init__(self, heads: int, out_features: int, in_features: int, rank: int):
        super().__init__()
        self.w_left = nn.Parameter(torch.randn(heads, out_features, rank) * 0.5 * rank**-0.5)
        self.w_right = nn.Parameter(torch.randn(heads, rank, in_features) * 0.5 * in_features**-0.5)


class LaCTSWIGLULayer(nn.Module):
    """Options are attributes with the names of the authors' layer."""

    def __init__(self, layer_idx: int, **options):
        super().__init__()
        C, heads = 64, 2
        D = C // heads
        self.hidden_size, self.num_heads, self.num_fw_heads = C, 4, heads
        self.inter_multi, self.window_size, self.lact_chunk_size = 1, 16, 16
        self.attn_qk_norm = self.qkv_silu = self.use_momentum = self.learnable_ttt_scale = True
        self.no_v_silu = self.use_muon = self.ttt_prenorm = self.ttt_nope = False
        self.rope_theta, self.max_position_embeddings, self.layer_idx = 10000.0, 2048, layer_idx
        self.lr_parameterization, self.ttt_loss_type = "mamba", "dot_product"
        self.w0_w2_low_rank, self.fw_init_gain = 8, 0.5
        self.use_fused_kernel = self.fp32_states = False
        vars(self).update(options)

        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(C, 1e-5), nn.RMSNorm(C, 1e-5)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.w0, self.w2 = (LowRankFastWeight(heads, D, D, self.w0_w2_low_rank) for _ in range(2))
        self.w1 = nn.Parameter(torch.randn(heads, D, D) * D**-0.5)
        self.lr_proj = nn.Linear(C, 3 * heads)
        self.qk_scale = nn.Parameter(torch.ones(C, 2))
        self.qk_offset = nn.Parameter(torch.zeros(C, 2))
        self.ttt_scale_proj = nn.Linear(C, heads)
        self.ttt_norm = nn.RMSNorm(D, 1e-5)
        self.momentum_proj = nn.Sequential(nn.Linear(C, heads), nn.Sigmoid())

    def forward(
        self, hidden_states: Tensor, attention_mask=None, past_key_values=None, **kwargs
    ) -> tuple[Tensor, None, None]:
        same = (
            "window_size",
            "lact_chunk_size",
            "qkv_silu",
            "no_v_silu",
            "use_muon",
            "ttt_prenorm",
        )
        options = {name: getattr(self, name) for name in (*same, "ttt_nope", "rope_theta")}
        heads = {"num_attn_heads": self.num_heads, "num_lact_heads": self.num_fw_heads}
        parameters = dict(self.named_parameters())
        rows = [reference.lact_layer(x, parameters, **heads, **options) for x in hidden_states]
        return torch.stack(rows), None, None
