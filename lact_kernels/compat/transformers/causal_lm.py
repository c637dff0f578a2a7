"""LaCT language models: they load the paper's, and generate with a cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from lact_kernels.compat.lact.swap import AUTHORS_OPTIONS
from lact_kernels.compat.transformers.config import LaCTSWIGLUConfig
from lact_kernels.compat.transformers.positions import (
    check_counted,
    check_position_ids,
    packed_rows,
)
from lact_kernels.core.offsets import on_host
from lact_kernels.distributed import SequencePieces
from lact_kernels.layers import LaCTCache, LaCTLayer
from lact_kernels.layers.mlp import SwiGLUMLP
from lact_kernels.layers.padding import Padding, mask_of_last
from lact_kernels.ops import checks

# Later versions of transformers call `past_key_values` the `cache`.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in _FIELDS else "past_key_values"

# Arguments of `LaCTLayer` that a configuration has under the same name.
LAYER_OPTIONS = AUTHORS_OPTIONS - {"layer_idx"}


@dataclasses.dataclass
class LaCTModelOutput(BaseModelOutputWithPast):
    """And with a `sequence_mesh` the places of this rank's tokens in the flattened batch, int64 `[.., t]`."""

    places: Tensor | None = None


@dataclasses.dataclass
class LaCTCausalLMOutput(CausalLMOutputWithPast):
    """And with a `sequence_mesh` the places of this rank's tokens in the flattened batch, int64 `[.., t]`."""

    places: Tensor | None = None


class LaCTBlock(GradientCheckpointingLayer):
    """A LaCT layer and an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LaCTSWIGLUConfig, layer_idx: int):
        super().__init__()
        options = {name: getattr(config, name) for name in LAYER_OPTIONS}
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = LaCTLayer(**options, layer_idx=layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLUMLP(
            config.hidden_size,
            config.intermediate_size,
            4 if config.hidden_ratio is None else config.hidden_ratio,
        )

    def forward(
        self,
        x: Tensor,
        cache: LaCTCache | None = None,
        cu_seqlens: Tensor | None = None,
        pieces: SequencePieces | None = None,
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cache=cache, cu_seqlens=cu_seqlens, pieces=pieces)
        return x + self.mlp(self.mlp_norm(x))


class LaCTPreTrainedModel(PreTrainedModel):
    config: LaCTSWIGLUConfig
    config_class = LaCTSWIGLUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LaCTBlock"]
    _skip_keys_device_placement = [
        "cache",
        "past_key_values",
    ]  # each layer finds its part where it left it
    _is_stateful = True  # no token can be taken back

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LaCTLayer):
            module.reset_fast_weights()


class LaCTModel(LaCTPreTrainedModel):
    """Embeddings, blocks and a final norm.

    Attributes:
        sequence_mesh: a 1-D `DeviceMesh`, or None. With one, its ranks are all given the same whole batch,
            and each computes a shard of every sequence: outputs are those of its own tokens, at `places`.
    """

    sequence_mesh: DeviceMesh | None = None

    def __init__(self, config: LaCTSWIGLUConfig):
        if config.hidden_act not in ("swish", "silu"):
            raise NotImplementedError(f"hidden_act must be 'swish', got {config.hidden_act!r}")
        checks.check_causal_window("window_size", config.window_size)
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LaCTBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LaCTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: LaCTCache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> LaCTModelOutput:
        """Read tokens, or their embeddings.

        Args:
            input_ids: `[B, T]`, or
            inputs_embeds: `[B, T, C]`.
            attention_mask: `[B, T]`, or with the tokens of earlier calls before them as `generate` has it;
                0 where there is no token. Padding is not computed, and its outputs are 0.
            position_ids: `[B, T]`, or `[1, T]` for all rows. A position that does not ascend begins another
                of several sequences that are packed into a row. Positions are counted, from 0 in each
                sequence, and others are an error; with `cu_seqlens`, or behind the tokens of a cache, those
                on a GPU are not read.
            cache: a `LaCTCache` to go on with, behind whose tokens those of `input_ids` come; one is made
                with `use_cache`. Also `past_key_values`.
            use_cache: whether to return the cache; by default as the configuration says, and not in
                training.
            output_hidden_states: return the inputs of all blocks, and the output.
            cu_seqlens: int32 `[N+1]`, the borders of packed sequences, `B = 1`. Also `cu_seq_lens_q`.

        Raises:
            NotImplementedError: `output_attentions`.
            TypeError, ValueError: an argument of a wrong type, dtype, shape or value.
            RuntimeError: a cache that an earlier call left half-way.
        """
        self._check_inputs(input_ids, inputs_embeds)
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions is not supported: no probabilities exist")
        x = input_ids if inputs_embeds is None else inputs_embeds  # embedded when few are left
        cache = _one_cache(cache, past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and self.sequence_mesh is None
        if self.sequence_mesh is not None and (use_cache or cache is not None):
            raise ValueError(
                "a sequence_mesh computes whole sequences: pass no cache, and use_cache=False"
            )
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            raise ValueError("gradient checkpointing computes a call twice: pass use_cache=False")
        if cache is None and use_cache:
            cache = LaCTCache()
        if cache is not None:
            cache.check_complete(len(self.layers))
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            checks.check_cu_seqlens(cu_seqlens, x)
            cu_seqlens = on_host(cu_seqlens)  # once for all layers
        shape, past = x.shape[:2], 0 if cache is None else cache.get_seq_length()
        mask = padding = packing = None
        if attention_mask is not None:
            mask = mask_of_last(attention_mask, x, past)
            padding = Padding.of(mask, x.device)
        if padding is not None and cu_seqlens is not None:
            raise ValueError(
                "attention_mask with padding and cu_seqlens exclude each other, got both"
            )
        if position_ids is not None:
            check_position_ids(position_ids, x)
            if cu_seqlens is None and not past:
                packing = packed_rows(position_ids, mask, shape, x.device)
            elif all(checks.has_known_values(y) for y in (position_ids, mask) if y is not None):
                check_counted(position_ids, mask, cu_seqlens, _lengths(cache, shape, cu_seqlens))
        if packing is not None and padding is None and shape[0] == 1:
            cu_seqlens = packing.cu_seqlens
        elif packing is not None:
            padding = packing
        if padding is not None:
            x, cu_seqlens = padding.remove(x), padding.cu_seqlens
        pieces = places = None
        if self.sequence_mesh is not None:
            pieces = SequencePieces.even(self.sequence_mesh, x.shape[1], cu_seqlens)
            everywhere = torch.arange(shape.numel(), device=x.device).view(shape)
            places = pieces.take(everywhere if padding is None else padding.indices[None])
            x, cu_seqlens, padding = pieces.take(x), None, None
        if inputs_embeds is None:
            x = self.embeddings(x)
        states = []
        for layer in self.layers:
            states.append(x)
            x = layer(x, cache=cache, cu_seqlens=cu_seqlens, pieces=pieces)
        x = self.norm(x)
        states = [*states, x] if output_hidden_states else []
        if padding is not None:
            x, *states = (padding.restore(state) for state in (x, *states))
            if cache is not None and packing is None:
                cache.set_seq_length(past + shape[1])
        return LaCTModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) or None,
            places=places,
            **{CACHE_FIELD: cache if use_cache else None},
        )

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is not None:
            checks.check_float_dtype("inputs_embeds", inputs_embeds, "[B, T, C]")
            C = self.config.hidden_size
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != C:
                raise ValueError(
                    f"inputs_embeds must have the shape [B, T, C] with C = {C}, got"
                    f" {tuple(inputs_embeds.shape)}"
                )
            return
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids must be an int32 or int64 tensor [B, T], got {got}")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have the shape [B, T], got {tuple(input_ids.shape)}")


class LaCTForCausalLM(LaCTPreTrainedModel, GenerationMixin):
    """A LaCT language model with its head. It loads the LaCT authors' checkpoints, and `generate`s.

    Generation carries the windows and the fast weights of all blocks along: a token costs the same at any
    position. Sampling, beam search and padded batches work; taking tokens back (assisted generation)
    does not.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: LaCTSWIGLUConfig):
        super().__init__(config)
        self.model = LaCTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def sequence_mesh(self) -> DeviceMesh | None:
        """As that of `LaCTModel`; with one, the mean of `loss` over all ranks is the loss of the batch."""
        return self.model.sequence_mesh

    @sequence_mesh.setter
    def sequence_mesh(self, mesh: DeviceMesh | None) -> None:
        self.model.sequence_mesh = mesh

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As in transformers. With a `LaCTCache`, `inputs` repeat its tokens and have more behind them.

        Raises:
            ValueError: they do not, so that none are left to go on with.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        cache = _one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        if past and isinstance(ids, Tensor) and ids.shape[-1] <= past:
            raise ValueError(
                f"input_ids must have the {past} tokens of the cache and more behind them, got"
                f" {tuple(ids.shape)}: a cache goes on only at its end"
            )
        return super().generate(inputs, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LaCTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: LaCTCache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> LaCTCausalLMOutput:
        """`LaCTModel.forward`, and the logits of the next tokens.

        Args:
            labels: `[B, T]`, the tokens themselves (they are shifted here), -100 where none counts: adds
                the mean cross entropy, `loss`.
            logits_to_keep: compute the logits of so many last tokens only; 0 is all. Or those of the places
                `[n]`, int32 or int64.

        The other arguments, and the errors, are those of `LaCTModel`.
        """
        kept = _kept(logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            **{k: x for k, x in kwargs.items() if k in ("cu_seq_lens_q", "output_attentions")},
        )
        if outputs.places is not None:
            if isinstance(kept, Tensor) or kept != slice(None):
                raise ValueError(
                    "logits_to_keep must be 0 with a sequence_mesh: each rank has others"
                )
            if labels is not None:
                shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
                if attention_mask is not None:  # what is computed nowhere predicts nothing
                    shifted = shifted.masked_fill(attention_mask == 0, -100)
                kwargs |= self._labels_of_shard(shifted, outputs.places, kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return LaCTCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            places=outputs.places,
            **{CACHE_FIELD: outputs[CACHE_FIELD] if CACHE_FIELD in outputs else None},
        )

    def _labels_of_shard(self, shifted: Tensor, places: Tensor, kwargs: dict) -> dict:
        """Arguments of the loss function: this rank's sum, by its share of the batch's labels.

        DDP and FSDP take the mean of gradients over all ranks, of which those of a mesh give parts of a sum.
        """
        count = kwargs.get("num_items_in_batch")
        if count is None:
            count = (shifted != -100).sum()
        return {
            "shift_labels": shifted.flatten()[places],
            "num_items_in_batch": count / self.sequence_mesh.size(),
        }


def _one_cache(cache: LaCTCache | None, past_key_values: LaCTCache | None) -> LaCTCache | None:
    """The cache, by whichever of its names it is given."""
    for name, given in (("cache", cache), ("past_key_values", past_key_values)):
        if given is not None and not isinstance(given, LaCTCache):
            raise TypeError(f"{name} must be a LaCTCache, got {type(given).__name__}")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are the same argument, got two")
    return past_key_values if cache is None else cache


def _lengths(
    cache: LaCTCache | None, shape: torch.Size, cu_seqlens: Tensor | None
) -> Sequence[int]:
    """How many tokens each row, or packed sequence, has had."""
    if cache is not None and cache.layers:
        return next(iter(cache.layers.values())).lengths
    return [0] * (shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The places whose logits are computed."""
    if not isinstance(logits_to_keep, Tensor):
        number = checks.check_int("logits_to_keep", logits_to_keep)
        if number < 0:
            raise ValueError(f"logits_to_keep must not be negative, got {number}")
        return slice(-number, None) if number else slice(None)
    if logits_to_keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"logits_to_keep must be int32 or int64, got {logits_to_keep.dtype}")
    if logits_to_keep.ndim != 1:
        raise ValueError(
            f"logits_to_keep must be an int or have the shape [n], got {tuple(logits_to_keep.shape)}"
        )
    return logits_to_keep


# `AutoModelForCausalLM` finds these models, unless the LaCT authors' package has registered its own before.
if LaCTSWIGLUConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(LaCTSWIGLUConfig.model_type, LaCTSWIGLUConfig)
    AutoModel.register(LaCTSWIGLUConfig, LaCTModel)
    AutoModelForCausalLM.register(LaCTSWIGLUConfig, LaCTForCausalLM)
