"""Models of `transformers` on "lact_window_attn", against the library's own attention.

In float64 that is "sdpa": "eager" takes softmax in float32, where the library's float64 mask of padding
overflows to NaN. (Gemma 2 has nothing but eager attention.) Norms are in float32 in either, so results
agree to about 1e-7. One key more or less in a window changes them by more than 1e-2. Every family of models,
in float32, is in `test_compat_transformers_families.py`.
"""

import copy
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

import lact_kernels  # noqa: E402
from lact_kernels.compat.transformers import attention as compat  # noqa: E402
from lact_kernels.compat.transformers import packing  # noqa: E402
from lact_kernels.ops import checks  # noqa: E402
from tests.cases import WRITES, write_with_numpy  # noqa: E402

WINDOW = 8
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"]
CONFIGS = {
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "gemma": (transformers.GemmaConfig, {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": 1.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 32, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "phimoe": (  # its layers do not pass on their window
        transformers.PhimoeConfig,
        {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "modernbert": (
        transformers.ModernBertConfig,
        {
            "local_attention": WINDOW,
            "layer_types": ALTERNATING,
            "cls_token_id": 0,
            "sep_token_id": 0,
        },
    ),
}
CACHE = (
    "cache"
    if "cache" in inspect.signature(transformers.MistralForCausalLM.forward).parameters
    else "past_key_values"
)
PHIMOE = pytest.param(
    "phimoe",
    marks=pytest.mark.skipif(
        transformers.__version__ < "5", reason="has attention classes of its own there"
    ),
)
PADDING = {
    "nothing padded": [[1] * 21] * 3,
    "left": [[0] * 6 + [1] * 15, [1] * 21, [0] * 17 + [1] * 4],
    "right": [[1] * 15 + [0] * 6, [1] * 21, [1] * 4 + [0] * 17],
    "both, and an empty row": [[0] * 2 + [1] * 14 + [0] * 5, [0] * 21, [1] * 21],
}


def build(name, dtype=torch.float64, attn_implementation="sdpa", **changes):
    """A random model."""
    config_class, options = CONFIGS[name]
    config = config_class(**SIZES | options | changes)
    auto = "AutoModelForMaskedLM" if name == "modernbert" else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(config, attn_implementation=attn_implementation)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no float64
    return model.to(dtype).eval()


def on_ours(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("lact_window_attn")
    return model


def make(name, **changes):
    """A random model twice: with the library's attention, and with ours."""
    model = build(name, **changes)
    return model, on_ours(model)


def tokens(*shape):
    return torch.randint(1, VOCAB, shape)


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def numbered(mask):
    """The position of each token among those of its row, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["mistral", "gemma2", PHIMOE])
def test_eager_attention_agrees_in_float32(name, padding):
    model = build(name, torch.float32, "lact_window_attn")
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    mask = torch.tensor(PADDING[padding])
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    with torch.no_grad():
        results = [m(**inputs).logits[mask.bool()] for m in (model, plain)]
    close(*results, tol=1e-4)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", [*sorted(CONFIGS.keys() - {"gemma2", "phimoe"}), PHIMOE])
def test_logits_and_gradients(name, padding):
    plain, ours = make(name)
    mask = torch.tensor(PADDING[padding])
    ids = tokens(*mask.shape)
    weights = torch.randn(int(mask.sum()), VOCAB, dtype=torch.float64)
    results = []
    for model in (plain, ours):
        inputs = {"attention_mask": mask, "position_ids": numbered(mask)}
        inputs |= {} if name == "modernbert" else {"use_cache": False}
        logits = model(ids, **inputs).logits[mask.bool()]
        results.append((logits, *gradients(model, (logits * weights).mean())))
    close(*results)


def packed_inputs(how, lengths):
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders)
    given |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    return {
        "positions": {"position_ids": positions, "use_cache": False},
        "positions, with a cache": {"position_ids": positions, "use_cache": True},
        "borders": {"position_ids": positions, "use_cache": False} | given,
        "borders, with a cache": {"position_ids": positions, "use_cache": True} | given,
    }[how]


@pytest.mark.parametrize(
    "how", ["positions", "positions, with a cache", "borders", "borders, with a cache"]
)
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_packed_row_is_its_sequences_one_by_one(name, how):
    plain, ours = make(name)
    lengths = [5, 1, 17, 9]
    ids = tokens(1, sum(lengths))
    weights = torch.randn(sum(lengths), VOCAB, dtype=torch.float64)
    logits = ours(ids, **packed_inputs(how, lengths)).logits[0]
    alone = torch.cat([plain(x, use_cache=False).logits[0] for x in ids.split(lengths, dim=1)])
    results = [
        (x, *gradients(model, (x * weights).mean()))
        for model, x in ((ours, logits), (plain, alone))
    ]
    close(*results)


def test_packed_row_of_layers_that_get_no_positions(monkeypatch):
    def forward(*args, position_ids=None, **kwargs):
        return compat.lact_window_attn_forward(*args, **kwargs)

    monkeypatch.setitem(compat.AttentionInterface._global_mapping, "lact_window_attn", forward)
    plain, ours = make("gemma3")
    ids = tokens(1, 20)
    with torch.no_grad():
        logits = ours(ids, **packed_inputs("positions", [12, 8])).logits[0]
        alone = [plain(x).logits[0] for x in ids.split([12, 8], dim=1)]
    close(logits, torch.cat(alone))


@pytest.mark.parametrize("rows", [1, 2])
def test_borders_alone(rows):
    """Of queries and keys, which are as many in one sequence, and fewer in the others."""
    q, k, v = (
        torch.randn(rows, H, T // rows, 16, dtype=torch.float64)
        for H, T in ((4, 14), (2, 24), (2, 24))
    )
    queries, keys = [6, 1, 7, 0], [9, 5, 7, 3]
    borders = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)]
    o, _ = compat.lact_window_attn_forward(
        torch.nn.Module(),
        *(q, k, v, None),
        sliding_window=4,
        cu_seq_lens_q=borders[0],
        cu_seq_lens_k=borders[1],
    )
    packed = [
        x.transpose(1, 2).flatten(0, 1)[None].split(n, dim=1)
        for x, n in ((q, queries), (k, keys), (v, keys))
    ]
    alone = [lact_kernels.window_attn(*qkv, 4) for qkv in zip(*packed)]
    close(o.flatten(0, 1)[None], torch.cat(alone, dim=1), tol=1e-12)


def test_packed_rows_of_a_batch():
    plain, ours = make("mistral")
    ids = tokens(2, 20)
    positions = torch.tensor([[*range(12), *range(8)], [*range(3), *range(17)]])
    with torch.no_grad():
        logits = ours(ids, position_ids=positions, use_cache=False).logits
        alone = [plain(x[None]).logits[0] for x in (*ids[0].split([12, 8]), *ids[1].split([3, 17]))]
    close(logits.flatten(0, 1), torch.cat(alone))


def test_collator_without_padding():
    plain, ours = make("mistral")
    samples = [{"input_ids": tokens(n).tolist()} for n in (4, 13, 9)]
    collator = transformers.DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=True
    )
    batch = collator(samples)
    losses = [
        plain(torch.tensor([x["input_ids"]]), labels=torch.tensor([x["input_ids"]])).loss
        * (len(x["input_ids"]) - 1)
        for x in samples
    ]
    close(ours(**batch).loss * (26 - len(samples)), sum(losses))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3", PHIMOE])
def test_generate(name, padded, cache):
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    outputs = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=14,  # beyond the window
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            cache_implementation="static" if cache == "static" else None,
        )
        for model in make(name)
    ]
    plain, ours = outputs
    assert torch.equal(ours.sequences, plain.sequences)
    close(torch.stack(ours.logits), torch.stack(plain.logits), tol=1e-4)


CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "dynamic, all kept": lambda config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=40),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", ["full", "left-padded", "right-padded last piece"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", PHIMOE])
def test_prefill_in_pieces(name, padding, cache):
    plain, ours = make(name)
    ids = tokens(2, 26)
    mask = torch.ones_like(ids)
    if padding == "left-padded":
        mask[0, :9] = 0  # more than the first piece
    elif padding == "right-padded last piece":
        mask[0, 23:] = 0
    positions = numbered(mask)
    kept = CACHES[cache](ours.config)
    logits, start = [], 0
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for stop in (4, 9, 10, 20, 26):  # short of the window, at it, one token, beyond it
            inputs = {"attention_mask": mask[:, :stop] if padding != "full" else None}
            inputs |= {"position_ids": positions[:, start:stop], CACHE: kept}
            logits.append(ours(ids[:, start:stop], **inputs).logits)
            start = stop
    close(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("cache", CACHES)
def test_mask_of_tokens_to_come(cache):
    plain, ours = make("mistral")
    ids = tokens(2, 12)
    mask = torch.zeros(2, 40, dtype=torch.int64)
    mask[:, :12] = 1
    mask[0, :3] = 0
    kept = CACHES[cache](ours.config)
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask[:, :12], use_cache=False).logits
        logits = [ours(x, attention_mask=mask, **{CACHE: kept}).logits for x in ids.split(6, dim=1)]
    close(torch.cat(logits, dim=1)[0, 3:], expected[0, 3:])
    close(torch.cat(logits, dim=1)[1], expected[1])


def attention_of(model):
    return next(m for m in model.modules() if hasattr(m, "q_proj"))


def direct_inputs(Tq=5, Tk=5, dtype=torch.float64):
    shapes = [(2, 4, Tq, 16), (2, 2, Tk, 16), (2, 2, Tk, 16)]
    return [torch.randn(*s, dtype=dtype) for s in shapes]


def test_padding_queries_are_zero():
    _, ours = make("mistral")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    o, weights = compat.lact_window_attn_forward(
        attention_of(ours), *direct_inputs(), mask, sliding_window=3
    )
    assert weights is None
    assert o.shape == (2, 5, 4, 16)
    assert torch.equal(o.abs().amax((2, 3)) > 0, mask.bool())


@pytest.fixture
def reads(monkeypatch):
    """How often values were read."""
    reads = []
    for name in ("_packing", "on_host"):
        original = getattr(packing, name)
        monkeypatch.setattr(packing, name, lambda *x, f=original: reads.append(x) or f(*x))
    return reads


READ = {  # of a row, and what is written to it, where
    "attention_mask": (torch.ones(1, 12, dtype=torch.long).index_fill(1, torch.arange(3), 0), 3),
    "position_ids": (torch.arange(12)[None], 7),
    "cu_seq_lens_q": (torch.tensor([0, 4, 12], dtype=torch.int32), 1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("argument", READ)
def test_values_are_read_once_per_forward_pass(argument, write, reads):
    """All layers of one share what was read, and no other pass does."""
    _, ours = make("mistral")
    buffer, place = READ[argument]
    buffer, ids = buffer.clone(), tokens(1, 12)

    def run(buffer):
        reads.clear()
        inputs = {argument: buffer}
        if argument == "cu_seq_lens_q":
            inputs |= {"cu_seq_lens_k": buffer}
        logits = ours(ids, **inputs, use_cache=False).logits
        assert len(reads) == 1
        return logits

    with torch.inference_mode():
        before = run(buffer)
    write(buffer, (..., place), 3 if argument == "cu_seq_lens_q" else 0)
    after = run(buffer)
    assert torch.equal(after, run(buffer.clone()))
    assert not torch.equal(after, before)
    after.sum().backward()


@pytest.mark.parametrize("write", WRITES)
def test_a_mask_in_a_buffer_that_is_used_again_before_the_backward(write):
    """In which a checkpoint computes the layers again."""
    _, ours = make("mistral")
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask, gradients = tokens(2, 12), torch.ones(2, 12, dtype=torch.bool), []
    mask[0, :4] = False
    for changes in (False, True):
        loss = ours(ids, attention_mask=mask, use_cache=False).logits[:, 4:].sin().sum()
        if changes:
            write(mask, (1, slice(4)), False)
        gradients.append(torch.autograd.grad(loss, ours.model.embed_tokens.weight)[0])
    assert torch.equal(*gradients)


def test_layers_by_hand_read_every_time():
    """Of another configuration than that of the model which has made masks last."""
    _, ours = make("mistral")
    ours(tokens(1, 12), position_ids=torch.arange(12)[None], use_cache=False)
    buffer, outputs = torch.tensor([[0, 1, 2, 0, 1]]), []
    q, k, v = (x[:1] for x in direct_inputs())
    for layer in [copy.deepcopy(attention_of(ours)) for _ in range(2)]:
        outputs.append(
            compat.lact_window_attn_forward(
                layer, q, k, v, None, sliding_window=3, position_ids=buffer
            )[0]
        )
        write_with_numpy(buffer, ..., np.arange(5))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("write", WRITES)
def test_a_mask_that_changed_between_two_calls_of_a_layer(write):
    _, ours = make("mistral")
    inputs = direct_inputs()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])

    def run(mask):
        layer = attention_of(ours)
        return compat.lact_window_attn_forward(layer, *inputs, mask, sliding_window=3)[0]

    before = run(mask)
    write(mask, (0, slice(3)), 0)
    changed = run(mask)
    assert torch.equal(changed, run(mask.clone()))
    assert not torch.equal(changed, before)


def test_inference_mode():
    plain, ours = make("mistral")
    mask = torch.tensor(PADDING["left"])
    with torch.inference_mode():
        ids = tokens(*mask.shape)
        results = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (ours, plain)]
    close(*results)


def test_triton_kernels(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there
    models = [m.to(device) for m in make("mistral", dtype=torch.float32)]
    mask = torch.tensor(PADDING["left"], device=device)
    ids = tokens(*mask.shape).to(device)
    monkeypatch.setattr(checks, "choose_backend", lambda *_: "triton")
    with torch.no_grad():
        plain, ours = [m(ids, attention_mask=mask).logits[mask.bool()] for m in models]
    close(ours, plain, tol=1e-3)


def test_registering_again_is_harmless():
    compat.AttentionInterface.register("lact_window_attn", compat.lact_window_attn_forward)
    assert transformers.AttentionInterface()["lact_window_attn"] is compat.lact_window_attn_forward


def test_import_needs_transformers_and_only_this_module_does():
    code = """
import sys
import lact_kernels.compat
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
import lact_kernels.compat.transformers
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip().splitlines()[-1] == (
        "ImportError: lact_kernels.compat.transformers needs transformers 4.57 or newer:"
        ' pip install "lact-kernels[transformers]"'
    )


def model_error(name, message, inputs=None, training=False, **changes):
    ours = build(name, attn_implementation="lact_window_attn", **changes).train(training)
    with pytest.raises(NotImplementedError, match=message):
        ours(tokens(2, 12), **(inputs or {}))


def test_dropout_in_training_is_an_error():
    model_error("mistral", "dropout .*0.1", training=True, attention_dropout=0.1)
    on_ours(build("mistral", attention_dropout=0.1))(tokens(2, 12))  # has none in evaluation


def test_mask_of_queries_and_keys_is_an_error():
    mask = torch.ones(2, 1, 12, 12, dtype=torch.float64)
    model_error("mistral", r"attention_mask .*\(2, 1, 12, 12\)", {"attention_mask": mask})


def test_padding_between_tokens_is_an_error_in_a_window_only():
    mask = torch.tensor([[1] * 12, [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    model_error("mistral", "attention_mask has padding between", {"attention_mask": mask})
    plain, ours = make("gemma")
    ids = tokens(2, 12)
    with torch.no_grad():
        results = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (ours, plain)]
    close(*results)


def test_chunked_attention_is_an_error():
    config = transformers.Llama4TextConfig(
        **SIZES
        | {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "moe_layers": []}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotImplementedError, match="mask function chunked_overlay"):
        on_ours(model)(tokens(2, 12))


@pytest.mark.skipif(transformers.__version__ < "5", reason="has attention classes of its own there")
def test_window_that_neither_layer_nor_mask_says_is_an_error():
    model = build("phimoe", attn_implementation="lact_window_attn")
    with pytest.raises(NotImplementedError, match="window of 8, but PhimoeAttention does not pass"):
        compat.lact_window_attn_forward(attention_of(model), *direct_inputs(), None)


BORDERS = torch.tensor([0, 4, 10], dtype=torch.int32)
BOTH = {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS}
BAD = {
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
    "sinks": ({"s_aux": torch.zeros(3)}, ValueError, r"sinks must have the shape \[Hq\]"),
    "bias": ({"position_bias": torch.zeros(4)}, NotImplementedError, "position_bias"),
    "probabilities": ({"output_attentions": True}, NotImplementedError, "output_attentions"),
    "dropout": ({"dropout": 0.1}, NotImplementedError, "dropout"),
    "shape of mask": ({"attention_mask": torch.ones(2, 6)}, ValueError, "attention_mask .*Tk = 5"),
    "short mask": ({"attention_mask": torch.ones(2, 4)}, ValueError, "attention_mask .*Tq = 5"),
    "batch of mask": ({"attention_mask": torch.ones(1, 5)}, ValueError, "attention_mask .*B = 2"),
    "one border": ({"cu_seq_lens_q": BORDERS}, ValueError, "cu_seq_lens_q and cu_seq_lens_k must"),
    "wide borders": (BOTH | {"cu_seq_lens_k": BORDERS.long()}, TypeError, "cu_seq_lens_k .*int32"),
    "other borders": (BOTH | {"cu_seq_lens_k": BORDERS[:2]}, ValueError, "2 sequences and .* of 1"),
    "borders of less": (
        dict.fromkeys(BOTH, BORDERS - BORDERS // 10),
        ValueError,
        "must end at T = 10, got 9",
    ),
    "borders and padding": (
        BOTH | {"attention_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        "exclude each other",
    ),
    "window": ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
    "scaling": ({"scaling": float("inf")}, ValueError, "softmax_scale must be finite"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input(changed, error, message):
    inputs = {"attention_mask": None, "sliding_window": 3} | changed
    with pytest.raises(error, match=message):
        compat.lact_window_attn_forward(torch.nn.Module(), *direct_inputs(), **inputs)


def test_mask_of_too_few_tokens_is_an_error():
    _, ours = make("mistral")
    cache = transformers.DynamicCache(config=ours.config)
    with torch.no_grad():
        ours(tokens(2, 6), **{CACHE: cache})
        with pytest.raises(ValueError, match=r"attention_mask must cover the 9 tokens .*\(2, 3\)"):
            ours(tokens(2, 3), attention_mask=torch.ones(2, 3), **{CACHE: cache})
