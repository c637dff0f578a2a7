"""The model families of the installed `transformers` that have a sliding window, as tiny random models.

`python -m tests.transformers_families` prints what becomes of each on "lact_window_attn", as a table.
"""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from lact_kernels.compat.transformers import attention
from lact_kernels.core.attention import AttentionOptions

WINDOW = 5
TOKENS = 14
NEW_TOKENS = 20
TOLERANCE = 1e-4
# What configurations call the window of a sequence. (Windows of images are called `window_size` elsewhere.)
WINDOW_NAMES = (
    "sliding_window",
    "sliding_windows",
    "sliding_window_size",
    "attention_window",
    "attention_window_size",
    "local_attention",
)
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,
}

# What is made small or set, where a configuration has it, other than None.
SMALL = {
    "vocab_size": 67,
    "vocab_size_per_layer_input": 67,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "attn_logit_softcapping": 1.0,  # so that it changes something
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_sliding_window": True,
}
LAYERS = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROPES = {kind: ROPE for kind in LAYERS}
# What single families need beside it.
CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": LAYERS, "rope_parameters": ROPES},
    "deepseek_v4": {"layer_types": ["sliding_attention"] * 2},
    "dory": {"layer_types": LAYERS, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["sliding_attention"] * 2,
        "num_key_value_heads": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    }
    | {
        f"swa_{name}": SMALL[name]
        for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "head_dim")
    }
    | {"swa_num_key_value_heads": 4, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["local", "global"], 1]]},
    "kyutai_speech_to_text": {"audio_pad_token_id": 1},
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    "ministral": {"layer_types": LAYERS, "head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "mlp", "full_attention"],
        "num_hidden_layers": 3,
    },
    "qwen2_5_vl_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "qwen2_vl_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "zaya": {"num_experts_per_tok": 1},
}


class Family(NamedTuple):
    name: str  # the model type, and what is special
    kind: str
    model_class: str
    changes: dict[str, Any] = {}

    @property
    def model_type(self) -> str:
        return self.name.split(",")[0]


TWO_SIDED = "use_bidirectional_attention"
COMPRESSED = ["sliding_attention", "compressed_sparse_attention"]
INDEXED = ["sliding_attention", "indexed_attention"]
VARIANTS = [
    Family("gemma3_text, two-sided", "base", "Gemma3TextModel", {TWO_SIDED: True}),
    Family("gemma4_text, two-sided", "base", "Gemma4TextModel", {TWO_SIDED: "all"}),
    Family("t5gemma, encoder", "base", "T5GemmaEncoderModel", {"is_encoder_decoder": False}),
    Family(
        "deepseek_v4, compressed", "causal", "DeepseekV4ForCausalLM", {"layer_types": COMPRESSED}
    ),
    Family("dots3_note_text, indexed", "causal", "Dots3NoteForCausalLM", {"layer_types": INDEXED}),
]


def families() -> list[Family]:
    """Of causal language models, and of other models of text whose own configuration has a window."""
    found: dict[str, Family] = {}
    for kind, names in KINDS.items():
        for model_type, model_class in names.items():
            if model_type not in found and _has_window(model_type, kind):
                found[model_type] = Family(model_type, kind, model_class)
    return [*found.values(), *VARIANTS]


def _has_window(model_type: str, kind: str) -> bool:
    """Told by the source where that is enough: importing takes longer."""
    module = configuration_auto.model_type_to_module_name(model_type)
    folder = Path(transformers.__file__).parent / "models" / module
    source = "".join(path.read_text() for path in folder.glob("configuration_*.py"))
    names = (*WINDOW_NAMES, "window_size") if kind == "causal" else WINDOW_NAMES
    declared = re.search(rf"\b({'|'.join(names)})\b", source)
    if not declared and not (kind == "causal" and "text_config" in source):
        return False
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    fields = set(dir(config_class))
    if kind == "causal" and "text_config" in config_class.sub_configs:
        try:
            fields |= set(dir(type(config_class().text_config)))
        except Exception:  # what its defaults lack, building it will say
            return True
    return not fields.isdisjoint(names)


def shrunk(config_class: type, changes: dict[str, Any]) -> transformers.PretrainedConfig:
    """A small configuration with a window, and one layer of each kind that the default has."""
    values = config_class().to_dict()
    fields = set(values) | set(dir(config_class)) | set(config_class.attribute_map)
    small = {k: v for k, v in SMALL.items() if k in fields and values.get(k, v) is not None}
    small |= dict.fromkeys(fields.intersection(WINDOW_NAMES), WINDOW)
    parts = {
        name: shrunk(_class_of(values[name], part), {})
        for name, part in config_class.sub_configs.items()
        if values.get(name) is not None
    }
    kinds = sorted(
        dict.fromkeys(values.get("layer_types") or ()), key=lambda kind: "sliding" not in kind
    )
    if kinds and not parts:
        if not any("sliding" in kind for kind in kinds):
            kinds = ["hybrid_sliding" if "hybrid" in kinds else "sliding_attention", *kinds]
        small |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    own = CHANGES.get(config_class.model_type, {})
    if "layer_types" in own:
        small["num_hidden_layers"] = len(own["layer_types"])
    return config_class(**small | parts | own | changes)


def _class_of(values: dict, part: type) -> type:
    mapping = configuration_auto.CONFIG_MAPPING
    return mapping[values["model_type"]] if values.get("model_type") in mapping else part


def build(family: Family) -> nn.Module:
    """A random model with eager attention."""
    config_class = configuration_auto.CONFIG_MAPPING[family.model_type]
    model_class = getattr(transformers, family.model_class)
    if model_class.main_input_name != "input_ids":
        raise TypeError(f"it takes {model_class.main_input_name}, not tokens")
    config = shrunk(config_class, family.changes)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # of which some are 0 at first
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if "sink" in name else 0.1)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model


def on_ours(model: nn.Module) -> nn.Module:
    config = copy.deepcopy(model.config)
    ours = type(model)._from_config(config, attn_implementation=attention.NAME).eval()
    ours.load_state_dict(model.state_dict())
    ours.generation_config = getattr(model, "generation_config", None)
    return ours


class Calls:
    """What models on "lact_window_attn" compute, seen and changed on the way."""

    def __init__(self, run: Callable):
        self.run = run
        self.options: list[AttentionOptions] = []
        self.has_sinks = False
        self.change: Callable = lambda options, sinks: (options, sinks)

    def __call__(self, q, k, v, options, sinks=None, borders=None):
        self.options.append(options)
        self.has_sinks |= sinks is not None
        return self.run(q, k, v, *self.change(options, sinks), borders)

    def mistakes(self) -> dict[str, Callable]:
        """Changes that must make a difference."""
        mistakes = {}
        if any(x.left is not None for x in self.options):
            mistakes["a window of one key more"] = lambda options, sinks: (_wider(options), sinks)
        if any(x.softcap is not None for x in self.options):
            mistakes["no soft cap"] = lambda options, sinks: (options._replace(softcap=None), sinks)
        if self.has_sinks:
            mistakes["no sinks"] = lambda options, sinks: (options, None)
        return mistakes


def _wider(options: AttentionOptions) -> AttentionOptions:
    left = None if options.left is None else options.left + 1
    return options._replace(left=left, right=options.right and options.right + 1)


def outcome(family: Family, monkeypatch) -> str:
    """What becomes of a family: "agrees" with eager attention, or what else, and why."""
    torch.manual_seed(0)
    try:
        eager = build(family)
        ids = torch.randint(1, SMALL["vocab_size"], (2, TOKENS))
        expected = [logits(eager, ids, mask) for mask in PADDING[family.kind].values()]
    except Exception as error:
        return f"not built: {last_line(error)}"
    calls = Calls(attention.run_window_attn)
    monkeypatch.setattr(attention, "run_window_attn", calls)
    try:
        ours = on_ours(eager)
        results = [logits(ours, ids, mask) for mask in PADDING[family.kind].values()]
        tokens = [generated(model, ids) for model in (eager, ours) if family.kind == "causal"]
    except NotImplementedError as error:
        return f"refused: {last_line(error)}"
    except Exception as error:
        if not eager._supports_attention_backend:
            return f"own attention: {last_line(error)}"
        raise
    if not calls.options:
        return "own attention: another is ignored"
    error = largest_difference(results, expected)
    if not error < TOLERANCE:
        return f"WRONG by {error:.1e}"
    if tokens and not torch.equal(*tokens):
        return "WRONG: other tokens"
    for mistake, change in calls.mistakes().items():
        calls.change = change
        results = [logits(ours, ids, mask) for mask in PADDING[family.kind].values()]
        if not largest_difference(results, expected) > 10 * TOLERANCE:
            return f"UNTESTED: {mistake} makes no difference"
    has_window = any(x.left is not None for x in calls.options)
    return "agrees" if has_window else "agrees without a window"


def padding(row: list[int]) -> Tensor:
    return torch.tensor([row, [1] * TOKENS])


LEFT, RIGHT = padding([0] * 4 + [1] * (TOKENS - 4)), padding([1] * (TOKENS - 4) + [0] * 4)
PADDING = {
    "causal": {"none": None, "left": LEFT},
    "masked": {"none": None, "left": LEFT, "right": RIGHT},
}
PADDING["base"] = PADDING["masked"]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Of the tokens, or hidden states where a model has no head."""
    outputs = model(ids, attention_mask=mask)
    values = outputs[0] if getattr(outputs, "logits", None) is None else outputs.logits
    return values.flatten(0, 1) if mask is None else values[mask.bool()]


def generated(model: nn.Module, ids: Tensor) -> Tensor:
    return model.generate(
        ids, attention_mask=LEFT, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(actual, expected))


def verdict(result: str) -> str:
    return result.split(":")[0]


def last_line(error: Exception) -> str:
    return f"{type(error).__name__}, {str(error).strip().splitlines()[-1].strip()}"


def table(outcomes: dict[str, str]) -> str:
    """The families of each outcome, as documentation shows it."""
    rows: dict[str, list[str]] = {}
    for name, result in outcomes.items():
        rows.setdefault(result, []).append(name)
    lines = [
        f"| {', '.join(f'`{x}`' for x in names)} | {result} |" for result, names in rows.items()
    ]
    return "\n".join(["| model type | |", "|---|---|", *lines])


if __name__ == "__main__":
    import pytest

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = {}
    for one in families():
        with pytest.MonkeyPatch.context() as patch:
            outcomes[one.name] = outcome(one, patch)
    print(table(outcomes))
