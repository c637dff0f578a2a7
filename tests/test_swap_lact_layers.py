"""`swap_lact_layers`: our layers in the place of the LaCT authors', of which it needs the names alone."""

import pytest
import torch
from torch import nn

import lact_kernels
from examples.authors_layer import LaCTSWIGLULayer
from lact_kernels import LaCTCache, LaCTLayer
from lact_kernels.compat import swap_lact_layers


def make_model(**options):
    """Two layers, of which the second stands in two places."""
    shared = LaCTSWIGLULayer(1, **options)
    model = nn.ModuleDict(
        {
            "embed": nn.Linear(8, 64),
            "blocks": nn.ModuleList([nn.ModuleDict({"attn": LaCTSWIGLULayer(0, **options)})]),
            "a": shared,
            "b": shared,
        }
    ).double()
    with torch.no_grad():
        for layer in (model["blocks"][0]["attn"], shared):
            layer.lr_proj.bias.add_(5)
    return model


def run(model, x):
    for layer in (model["blocks"][0]["attn"], model["a"], model["b"]):
        x = x + layer(hidden_states=x, use_cache=False, output_attentions=False)[0]
    return x


def test_every_layer_is_replaced_once_and_keeps_its_parameters():
    model = make_model(ttt_prenorm=True, no_v_silu=True, window_size=None).eval()
    model["a"].w1.requires_grad_(False)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    names = list(state)
    x = torch.randn(2, 40, 64, dtype=torch.float64)
    expected = run(model, x)

    first, shared = model["blocks"][0]["attn"], model["a"]
    replaced = swap_lact_layers(model, backend="eager")
    assert replaced == {"blocks.0.attn": first, "a": shared, "b": shared}
    assert model["a"] is model["b"] and isinstance(model["a"], LaCTLayer)
    assert model["a"].backend == "eager" and not model["a"].training and model["a"].layer_idx == 1
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[n] is p for n, p in parameters.items())
    assert not model["a"].w1.requires_grad and model["a"].w0.w_left.requires_grad
    assert list(model.state_dict()) == names
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(run(model, x), expected)
    (actual,) = torch.autograd.grad(run(model, x).sum(), parameters["a.qkv.weight"])
    for name, old in replaced.items():
        model.set_submodule(name, old)  # and back
    (exact,) = torch.autograd.grad(run(model, x).sum(), parameters["a.qkv.weight"])
    torch.testing.assert_close(actual, exact)


def test_a_second_call_changes_nothing():
    model = make_model()
    swap_lact_layers(model)
    modules = list(model.modules())
    assert swap_lact_layers(model) == {}
    assert list(map(id, model.modules())) == list(map(id, modules))
    ours = nn.Sequential(LaCTLayer(32, 4, 2))
    assert swap_lact_layers(ours) == {} and type(ours[0]) is LaCTLayer
    assert swap_lact_layers(nn.Sequential(nn.Linear(2, 2))) == {}


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(ttt_loss_type="l2"), NotImplementedError, "a: ttt_loss_type must be 'dot_product'"),
        (dict(lr_parameterization="x"), NotImplementedError, "a: lr_parameterization must be"),
        (dict(use_momentum=False), ValueError, "a must have the parameters of LaCTLayer"),
        (dict(window_size=0), ValueError, "a: window_size must be at least 1, got 0"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_nothing_is_replaced_where_one_layer_is_not_supported(options, error, message):
    model = make_model()
    vars(model["a"]).update(options)
    before = list(map(id, model.modules()))
    with pytest.raises(error, match=message):
        swap_lact_layers(model)
    assert list(map(id, model.modules())) == before


def test_rates_per_channel_are_an_error():
    model = make_model()
    model["a"].lr_proj = nn.Linear(64, 2 * 3 * 32)
    with pytest.raises(NotImplementedError, match="a: lr_dim must be 1, got 32"):
        swap_lact_layers(model)


class Adapter(nn.Module):
    """Something of low rank beside a projection, as PEFT's LoRA has it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        sizes = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, **sizes)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, **sizes)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self):
        return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight


PROJECTIONS = ["qkv", "o_proj", "lr_proj", "ttt_scale_proj", "momentum_proj.0"]


@pytest.mark.parametrize("path", PROJECTIONS)
def test_layers_with_adapters_are_named_and_nothing_is_replaced(path):
    model = make_model()
    model["a"].set_submodule(path, Adapter(model["a"].get_submodule(path)))
    before = list(map(id, model.modules()))
    with pytest.raises(
        ValueError, match=rf"a\.{path} must be a torch.nn.Linear, got .*Adapter: swap"
    ):
        swap_lact_layers(model)
    assert list(map(id, model.modules())) == before


def test_adapters_are_added_to_layers_that_were_swapped():
    """All projections are called as modules, and so are fast weights of low rank."""
    model, x = make_model(), torch.randn(1, 40, 64, dtype=torch.float64)
    swap_lact_layers(model)
    layer, before = model["a"], model["a"](x)[0]
    for path in PROJECTIONS:
        layer.set_submodule(path, Adapter(layer.get_submodule(path)))
    layer.w0 = nn.Sequential(layer.w0)  # as PEFT's modules_to_save wraps a module
    adapted = layer(x)[0]
    assert not torch.allclose(adapted, before)
    for name, gradient in zip(
        dict(layer.named_parameters()),
        torch.autograd.grad(adapted.sum(), list(layer.parameters())),
    ):
        assert gradient.any(), name
    for path in PROJECTIONS:
        adapter = layer.get_submodule(path)
        adapter.base_layer.weight.data = adapter.merged().detach()
        layer.set_submodule(path, adapter.base_layer)
    torch.testing.assert_close(layer(x)[0], adapted)


def test_a_look_alike_without_the_options_is_an_error():
    model = make_model()
    del model["a"].rope_theta
    with pytest.raises(ValueError, match=r"a has .* but not its attributes \['rope_theta'\]"):
        swap_lact_layers(model)


def test_models_that_cannot_be_changed():
    with pytest.raises(ValueError, match="model is a LaCT layer itself"):
        swap_lact_layers(LaCTSWIGLULayer(0))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        swap_lact_layers({})
    with pytest.raises(ValueError, match="backend must be"):
        swap_lact_layers(make_model(), backend="gpu")


def test_norms_keep_their_epsilon():
    model = make_model()
    for norm in (model["a"].q_norm, model["a"].k_norm, model["a"].ttt_norm):
        norm.eps = 0.25
    swap_lact_layers(model)
    assert model["a"].q_norm.eps == model["a"].k_norm.eps == model["a"].ttt_norm.eps == 0.25
    assert model["blocks"][0]["attn"].q_norm.eps == 1e-5


def test_muon_of_the_fused_kernel_warns():
    with pytest.warns(UserWarning, match="stacked into one matrix"):
        swap_lact_layers(make_model(use_muon=True, use_fused_kernel=True))


def test_calls_as_the_authors_model_makes_them():
    """A mask of all tokens so far, `cu_seqlens` among other arguments, a cache that goes on."""
    model = make_model()
    layer = swap_lact_layers(model) and model["a"]
    x = torch.randn(2, 40, 64, dtype=torch.float64)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    expected, attentions, cache = layer(x, mask, None)
    assert attentions is None and cache is None
    torch.testing.assert_close(expected[:1, 7:], layer(x[:1, 7:])[0])

    cache = LaCTCache()
    first, _, same = layer(x[:, :30], mask[:, :30], cache, use_cache=True)
    second = layer(x[:, 30:], attention_mask=mask, past_key_values=cache)[0]
    assert same is cache
    with pytest.raises(
        ValueError, match=r"\[B, T\] with T = 1, or \[B, 40 \+ T\] .* got \(2, 40\)"
    ):
        layer(x[:, :1], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected)

    borders = torch.tensor([0, 15, 40], dtype=torch.int32)
    packed = layer(x[:1], cu_seqlens=borders, seq_idx=None)[0]
    torch.testing.assert_close(packed[:, 15:], layer(x[:1, 15:])[0])
    with pytest.raises(NotImplementedError, match="output_attentions"):
        layer(x, output_attentions=True)
    with pytest.raises(
        TypeError, match="LaCTCache or None, got dict: call the model with use_cache"
    ):
        layer(x, past_key_values={})
    assert lact_kernels.compat.lact.swap_lact_layers is swap_lact_layers
