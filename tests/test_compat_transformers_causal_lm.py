"""`LaCTForCausalLM`: the paper's language models load, train, and generate with their fast weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", minversion="4.57")

from lact_kernels import LaCTCache  # noqa: E402
from lact_kernels.compat.transformers import (  # noqa: E402
    LaCTForCausalLM,
    LaCTModel,
    LaCTSWIGLUConfig,
)
from lact_kernels.compat.transformers.causal_lm import CACHE_FIELD  # noqa: E402
from tests.lact_layer_cases import oracle  # noqa: E402

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attn_heads=4,
    num_lact_heads=2,
    window_size=6,
    lact_chunk_size=8,
    vocab_size=50,
    w0_w2_low_rank=4,
    intermediate_size=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
LENGTH = 21


def make_model(dtype=torch.float64, **options) -> LaCTForCausalLM:
    model = LaCTForCausalLM(LaCTSWIGLUConfig(**SIZES | options)).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.lr_proj.bias.add_(5)  # updates that change the next tokens
    return model.eval()


def make_ids(*shape):
    return torch.randint(1, 50, shape)


def expected_logits(model, ids):
    """Of one sequence `[T]`, written out with the layer's oracle."""
    rms_norm = lambda x, norm: F.rms_norm(x, x.shape[-1:], norm.weight, 1e-6)  # noqa: E731
    x = model.model.embeddings.weight[ids]
    for layer in model.model.layers:
        x = x + oracle(layer.attn, rms_norm(x, layer.attn_norm))
        h = rms_norm(x, layer.mlp_norm)
        h = F.silu(F.linear(h, layer.mlp.gate_proj.weight)) * F.linear(h, layer.mlp.up_proj.weight)
        x = x + F.linear(h, layer.mlp.down_proj.weight)
    return F.linear(rms_norm(x, model.model.norm), model.lm_head.weight)


@pytest.mark.parametrize("muon", [False, True], ids=["", "muon"])
def test_logits_loss_and_gradients(muon):
    model, ids = make_model(use_muon=muon), make_ids(2, LENGTH)
    out = model(ids, labels=ids)
    logits = torch.stack([expected_logits(model, row) for row in ids])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(
        out.loss.double(), loss, rtol=1e-6, atol=0
    )  # the library's is float32
    dlogits = torch.randn_like(logits)
    parameters = list(model.parameters())
    for (name, _), actual, expected in zip(
        model.named_parameters(),
        torch.autograd.grad(out.logits, parameters, dlogits),
        torch.autograd.grad(logits, parameters, dlogits),
    ):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-6, name


def test_padded_rows_equal_single_sequences():
    model, ids = make_model(), make_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :8], mask[1, 15:] = 0, 0
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    for n, exists in enumerate(mask.bool()):
        torch.testing.assert_close(out.logits[n, exists], expected_logits(model, ids[n, exists]))
    assert [tuple(x.shape) for x in out.hidden_states] == [(3, LENGTH, 32)] * 3
    assert not any(x[mask == 0].any() for x in out.hidden_states)


@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens", "cu_seq_lens_q"])
def test_packed_sequences_equal_single_ones(how):
    model, ids, lengths = make_model(), make_ids(1, LENGTH), [5, 1, 11, 4]
    packing = torch.tensor([0, 5, 6, 17, 21], dtype=torch.int32)
    if how == "position_ids":
        packing = torch.cat([torch.arange(n) for n in lengths])[None]
    actual = model(ids, **{how: packing}, use_cache=False).logits
    expected = torch.cat([expected_logits(model, part) for part in ids[0].split(lengths)])
    torch.testing.assert_close(actual[0], expected)
    whole = torch.arange(LENGTH)[None]
    torch.testing.assert_close(model(ids, position_ids=whole).logits, model(ids).logits)


def test_rows_of_packed_sequences_equal_single_ones():
    """With padding in every place, in which positions mean nothing."""
    model, ids = make_model(), make_ids(2, LENGTH)
    positions = torch.stack(
        [
            torch.cat([torch.arange(n) for n in (5, 1, 15)]),
            torch.cat([torch.arange(n) for n in (13, 8)]),
        ]
    )
    parts = [ids[0, :5], ids[0, 5:6], ids[0, 6:], ids[1, :13], ids[1, 13:]]
    expected = torch.cat([expected_logits(model, part) for part in parts]).view(2, LENGTH, -1)
    out = model(ids, position_ids=positions, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected)
    assert out.hidden_states[1].shape == (2, LENGTH, 32)
    cache = model(ids, position_ids=positions)[CACHE_FIELD]
    assert cache.layers[1].lengths == (5, 1, 15, 13, 8)

    places = torch.tensor([[0] * 3 + [1] * 9 + [0] * 2 + [1] * 12, [1] * 21 + [0] * 5]).bool()
    padded = [x.new_full((2, 26), 3) for x in (ids, positions)]
    for x, whole in zip((ids, positions), padded):
        whole[0, places[0]], whole[1, places[1]] = x[0], x[1]
    actual = model(padded[0], places, padded[1], use_cache=False).logits
    torch.testing.assert_close(actual[places].view(2, LENGTH, -1), expected)
    assert not actual[~places].any()


def test_positions_that_are_counted_change_nothing():
    model, ids = make_model(), make_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = model(ids, mask).logits
    torch.testing.assert_close(model(ids, mask, positions).logits, expected)
    cache = LaCTCache()
    pieces = [
        model(ids[:, part], mask[:, : part.stop], positions[:, part], cache).logits
        for part in (slice(0, 13), slice(13, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    borders = torch.tensor([0, 8, 21], dtype=torch.int32)
    restart = torch.cat([torch.arange(8), torch.arange(13)])[None]
    packed = model(ids[:1], position_ids=restart, cu_seqlens=borders).logits
    torch.testing.assert_close(packed[:, 8:], expected[:1, 8:])


def generate(model, ids, n=14, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
@pytest.mark.parametrize("muon", [False, True], ids=["", "muon"])
def test_generation_with_the_cache_equals_generation_without(muon, options):
    model, ids = make_model(use_muon=muon), make_ids(2, 11)
    torch.testing.assert_close(
        generate(model, ids, **options), generate(model, ids, use_cache=False, **options)
    )


def test_a_prompt_padded_on_the_left_generates_what_it_does_alone():
    model, ids = make_model(), make_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    actual = generate(model, ids, attention_mask=mask)
    assert torch.equal(actual[0, 5:], generate(model, ids[:1, 5:])[0])
    assert torch.equal(actual[1], generate(model, ids[1:])[0])


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generation_goes_on_with_a_cache(padded):
    model, ids = make_model(), make_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded], mask[1, : 2 * padded] = 0, 0
    first = generate(model, ids, 4, attention_mask=mask, return_dict_in_generate=True)
    cache = first[CACHE_FIELD]
    assert isinstance(cache, LaCTCache) and cache.get_seq_length() == 14
    mask = F.pad(mask, (0, 4), value=1)
    second = generate(model, first.sequences, 10, attention_mask=mask, **{CACHE_FIELD: cache})
    assert torch.equal(second, generate(model, ids, 14, attention_mask=mask[:, :11]))


def test_generation_from_embeddings():
    model, ids = make_model(), make_ids(2, 11)
    actual = model.generate(
        inputs_embeds=model.model.embeddings(ids), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(actual, generate(model, ids, 5)[:, 11:])


def test_a_model_in_pieces_equals_the_whole():
    model, ids, cache = make_model(), make_ids(2, LENGTH), LaCTCache()
    with torch.no_grad():
        pieces = [model(part, cache=cache).logits for part in ids.split([13, 1, 7], dim=1)]
        other = model(ids[:, :13], past_key_values=LaCTCache(), use_cache=True)[CACHE_FIELD]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits)
    assert other.layers[1].lengths == (13, 13)
    assert model(ids, use_cache=False).get(CACHE_FIELD) is None
    assert model.train()(ids).get(CACHE_FIELD) is None


def test_an_interrupted_forward_leaves_a_cache_that_says_so(monkeypatch):
    model, ids, cache = make_model(), make_ids(1, 9), LaCTCache()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model.layers[0].mlp, "forward", interrupt)
        model(ids, cache=cache)
    with pytest.raises(RuntimeError, match="left half-way"):
        model(ids, cache=cache)


def test_parameters_are_those_of_the_authors_model():
    """Their names, in order, read off their code at 1f84d47."""
    names = list(make_model(num_hidden_layers=1, attn_qk_norm=True).state_dict())
    layer = [n.removeprefix("model.layers.0.") for n in names if ".layers." in n]
    others = [n for n in names if ".layers." not in n]
    assert others == ["model.embeddings.weight", "model.norm.weight", "lm_head.weight"]
    assert [n for n in layer if not n.startswith("attn.")] == [
        "attn_norm.weight",
        "mlp_norm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert len(layer) == 5 + 18


def test_width_of_the_mlp():
    config = LaCTSWIGLUConfig(**SIZES | dict(intermediate_size=None, num_hidden_layers=1))
    assert LaCTModel(config).layers[0].mlp.gate_proj.out_features == 256
    with torch.device("meta"):  # the paper's 760M
        config = LaCTSWIGLUConfig(hidden_size=1536, num_attn_heads=24, num_hidden_layers=1)
        assert LaCTModel(config).layers[0].mlp.gate_proj.out_features == 4096


def test_initial_parameters():
    options = dict(hidden_size=256, initializer_range=0.03, num_hidden_layers=1, w0_w2_low_rank=-1)
    model = LaCTForCausalLM(LaCTSWIGLUConfig(**SIZES | options))
    attn = model.model.layers[0].attn
    assert 0.028 < attn.qkv.weight.std() < 0.032 and 0.028 < model.lm_head.weight.std() < 0.032
    assert 0.95 < attn.w0.std() * 128**0.5 < 1.05 and 0.95 < attn.w1.std() * 128**0.5 < 1.05
    assert not attn.lr_proj.bias.any() and torch.equal(attn.qk_scale, torch.ones(256, 2))
    assert not model.model.embeddings.weight[0].any()  # padding


def test_saved_models_load_by_their_type(tmp_path):
    model, ids = make_model(torch.float32), make_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LaCTForCausalLM
    for name in SIZES:
        assert getattr(loaded.config, name) == SIZES[name], name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert (half(ids).logits - model(ids).logits).norm() < 0.1 * model(ids).logits.norm()


def test_tied_and_resized_embeddings(tmp_path):
    model = make_model(torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    model = LaCTForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.resize_token_embeddings(60)
    assert model(make_ids(1, 3)).logits.shape == (1, 3, 60)


def test_gradient_checkpointing():
    model, ids = make_model().train(), make_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    expected = copy.deepcopy([p.grad for p in model.parameters()])
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(ids, use_cache=True)


def test_labels_logits_to_keep_and_tuples():
    model, ids = make_model(), make_ids(2, LENGTH)
    kept = model(ids, logits_to_keep=3).logits
    torch.testing.assert_close(kept, model(ids).logits[:, -3:])
    places = torch.tensor([4, 0, 19])
    kept = model(ids, logits_to_keep=places).logits
    torch.testing.assert_close(kept, model(ids).logits[:, places])
    uniform = make_model(initializer_range=0.0)(ids, labels=ids).loss
    assert abs(uniform.item() - math.log(50)) < 1e-6
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            dict(input_ids=make_ids(1, 4), output_attentions=True),
            NotImplementedError,
            "output_attentions is not supported",
        ),
        (dict(), ValueError, "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=make_ids(1, 4), cache=object()), TypeError, "cache must be a LaCTCache"),
        (
            dict(input_ids=make_ids(1, 4), attention_mask=torch.ones(1, 3).long()),
            ValueError,
            "attention_mask must have the shape",
        ),
        (
            dict(input_ids=make_ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4)),
            TypeError,
            "attention_mask must be bool or integers",
        ),
        (
            dict(input_ids=make_ids(1, 4), past_key_values={}),
            TypeError,
            "past_key_values must be a LaCTCache, got dict",
        ),
        (
            dict(input_ids=make_ids(1, 4), past_key_values=LaCTCache(), cache=LaCTCache()),
            ValueError,
            "cache and past_key_values are the same argument",
        ),
        (dict(input_ids=make_ids(4)), ValueError, r"input_ids must .* \[B, T\], got \(4,\)"),
        (dict(input_ids=[[1, 2]]), TypeError, "input_ids must be an int32 or int64 .* got list"),
        (dict(input_ids=torch.ones(1, 4)), TypeError, "input_ids must .* got torch.float32"),
        (
            dict(inputs_embeds=torch.ones(4, 32)),
            ValueError,
            r"inputs_embeds must .* \[B, T, C\] with C = 32, got \(4, 32\)",
        ),
        (
            dict(input_ids=make_ids(1, 4), logits_to_keep=-1),
            ValueError,
            "logits_to_keep must not be negative, got -1",
        ),
        (
            dict(input_ids=make_ids(1, 4), logits_to_keep=torch.zeros(1, 2).long()),
            ValueError,
            r"logits_to_keep must be an int or have the shape \[n\], got \(1, 2\)",
        ),
        (
            dict(
                input_ids=make_ids(1, 4),
                attention_mask=torch.tensor([[0, 1, 1, 1]]),
                cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
            ),
            ValueError,
            "attention_mask with padding and cu_seqlens exclude each other",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_model()(**arguments)


@pytest.mark.parametrize(
    "positions, error, message",
    [
        (torch.arange(1, 7)[None], ValueError, "from 0, .* got 1 at place 0 of row 0, .* number 0"),
        (torch.tensor([[0, 1, 3, 4, 5, 6]]), ValueError, "got 3 at place 2 of row 0, .* number 2"),
        (torch.arange(12).view(2, 6), ValueError, "got 6 at place 0 of row 1, .* number 0"),
        (torch.arange(6), ValueError, r"must have the shape \[B, T\] = \(2, 6\), or \[1, T\]"),
        (torch.zeros(3, 2, 6).long(), ValueError, r"must have the shape .* got \(3, 2, 6\)"),
        (torch.arange(6.0)[None], TypeError, "must be int32 or int64, got torch.float32"),
        (range(6), TypeError, r"must be a tensor \[B, T\], got range"),
        (torch.arange(6, device="meta")[None], ValueError, "must be on cpu like input_ids"),
    ],
    ids=str,
)
def test_positions_that_are_not_counted(positions, error, message):
    with pytest.raises(error, match=f"position_ids .*{message}"):
        make_model()(make_ids(2, 6), position_ids=positions)


def test_positions_and_masks_behind_a_cache():
    """Whoever repeats the tokens of a cache says so by them."""
    model, ids, cache = make_model(), make_ids(2, 9), LaCTCache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="got 0 at place 0 of row 0, which is number 9"):
        model(ids, position_ids=torch.arange(9)[None], cache=cache)
    for length in (4, 11, 15):
        with pytest.raises(ValueError, match=r"\[B, T\] with T = 5, or \[B, 9 \+ T\]"):
            model(ids[:, :5], torch.ones(2, length, dtype=torch.bool), cache=cache)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="got 4 at place 4 of row 0, which is number 0"):
        model(ids[:1], position_ids=torch.arange(9)[None], cu_seqlens=borders)


@pytest.mark.parametrize("length", [1, 8, 14])
def test_generation_needs_more_tokens_than_the_cache_has(length):
    model, ids = make_model(), make_ids(2, 11)
    first = generate(model, ids, 4, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="input_ids must have the 14 tokens of the cache and more"):
        generate(model, first.sequences[:, :length], **{CACHE_FIELD: first[CACHE_FIELD]})


def test_unsupported_options():
    with pytest.raises(NotImplementedError, match="hidden_act must be 'swish', got 'gelu'"):
        LaCTModel(LaCTSWIGLUConfig(**SIZES, hidden_act="gelu"))
    with pytest.raises(NotImplementedError, match=r"window_size .* later ones, as in \(8, 2\)"):
        LaCTForCausalLM(LaCTSWIGLUConfig(**SIZES | {"window_size": (8, 2)}))
