"""The language models of the paper: their shapes, parameters, and the work of their linear layers."""

import dataclasses

from benchmarks.scaling.counts import HALF


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LaCT language model. Heads of attention have as many key/value heads; Dk = Dv = Dh."""

    name: str
    hidden_size: int
    layers: int
    attn_heads: int
    lact_heads: int
    intermediate_size: int
    vocab_size: int = 32000
    window_size: int = 2048
    chunk_size: int = 2048
    low_rank: int = 32  # of the initial w0 and w2
    muon: bool = True
    momentum: bool = True
    prenorm: bool = False
    attention: bool = True  # False: the same model without its windowed attention

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.attn_heads

    @property
    def fast_shape(self) -> tuple[int, int, int, int]:
        """H, Dk, Dv, Dh."""
        return self.lact_heads, *[self.hidden_size // self.lact_heads] * 3


# lact_llm/configs of the LaCT authors' repository at 1f84d47, in order 760M_ and 3B_, both
# lact_swiglu_nh4_fwlow_rank_momentum_muon.json. The width of the MLP is the default of their model.
MODELS = {
    "760M": ModelConfig("760M", 1536, 24, 24, 4, 4096),
    "3B": ModelConfig("3B", 3072, 24, 24, 4, 8192),
}


def layer_weights(model: ModelConfig) -> tuple[int, int]:
    """Elements that multiply a token before the branches, (3 C + 5 H) C, and behind them, C² + 3 C I.

    The 5 H are rates, momentum (without it 4 H) and the scale of the TTT output.
    """
    C, H = model.hidden_size, model.lact_heads
    return (3 * C + (4 + model.momentum) * H) * C, C * C + 3 * C * model.intermediate_size


def model_parameters(model: ModelConfig) -> int:
    """2 V C + C, and per layer: the weights above, (4 + momentum) H biases, 6 C + Dv, fast weights.

    These are H Dv Dh for w1, and for w0 and w2, of rank r, 2 H r (Dh + Dk). The 6 C + Dv are two norms,
    qk_scale, qk_offset and ttt_norm.
    """
    C, (H, Dk, Dv, Dh) = model.hidden_size, model.fast_shape
    small = (4 + model.momentum) * H + 6 * C + Dv
    fast = H * Dv * Dh + 2 * H * model.low_rank * (Dh + Dk)
    layer = sum(layer_weights(model)) + small + fast
    return model.layers * layer + 2 * model.vocab_size * C + C


def linear_flops(model: ModelConfig) -> tuple[int, int]:
    """Of one token in all projections, MLPs and the head: 2 per weight forward, 4 backward."""
    weights = model.layers * sum(layer_weights(model)) + model.vocab_size * model.hidden_size
    return 2 * weights, 4 * weights


def layer_input_bytes(model: ModelConfig, tokens: int) -> int:
    """L p C 2: what a rank keeps at the least, if everything else of a layer is computed again."""
    return model.layers * tokens * model.hidden_size * HALF
