"""The configuration of LaCT language models."""

from typing import Any

from transformers import PretrainedConfig

from lact_kernels.ops import checks


class LaCTSWIGLUConfig(PretrainedConfig):
    """The configuration of a LaCT language model, with the LaCT authors' fields and defaults.

    Args:
        hidden_size: channels of a token.
        num_hidden_layers: blocks.
        num_attn_heads, num_lact_heads, inter_multi, qkv_bias, attn_qk_norm, lact_chunk_size, use_muon,
            lr_dim, qkv_silu, no_v_silu, lr_parameterization, learnable_ttt_scale, use_momentum,
            ttt_loss_type, ttt_prenorm, ttt_nope, w0_w2_low_rank, window_size, rope_theta,
            max_position_embeddings, fw_init_gain, use_fused_kernel, fp32_states: as in `LaCTLayer`; a model
            that predicts the next token takes no `window_size` with later ones in it.
        hidden_ratio: width of the MLP: two thirds of `hidden_ratio * hidden_size`, rounded up to 256.
        intermediate_size: the width itself, instead.
        hidden_act: "swish", the MLP's activation.
        initializer_range: standard deviation of initial weights.
        norm_eps: of the RMS norms between the layers.
        use_cache: whether the model returns a `LaCTCache` when it is not trained.
        vocab_size: tokens of the vocabulary.
        pad_token_id, bos_token_id, eos_token_id, tie_word_embeddings, kwargs: as in transformers.
        elementwise_affine, fuse_norm, last_layer_fuse_norm, fuse_swiglu, fuse_cross_entropy: have no
            effect.

    Source: `LaCTSWIGLUConfig` in github.com/a1600012888/LaCT at 1f84d47.
    """

    model_type = "lact_swiglu"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attn_heads: int = 32,
        num_lact_heads: int = 4,
        inter_multi: float = 1,
        qkv_bias: bool = False,
        attn_qk_norm: bool = False,
        lact_chunk_size: int = 2048,
        use_muon: bool = False,
        lr_dim: int = 1,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        lr_parameterization: str = "mamba",
        learnable_ttt_scale: bool = True,
        use_momentum: bool = True,
        ttt_loss_type: str = "dot_product",
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        w0_w2_low_rank: int = -1,
        window_size: int | None = 2048,
        rope_theta: float = 10000.0,
        max_position_embeddings: int | None = 2048,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        initializer_range: float = 0.006,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        fuse_norm: bool = True,
        last_layer_fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        vocab_size: int = 32000,
        fw_init_gain: float = 0.5,
        use_fused_kernel: bool = False,
        fp32_states: bool = False,
        **kwargs: Any,
    ):
        for name, value in list(locals().items()):
            if name not in ("self", "kwargs", "__class__"):
                setattr(self, name, checks.plain(value))  # JSON has no numbers of NumPy
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
