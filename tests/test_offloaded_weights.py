"""Weights that accelerate keeps on the host or a disk until the module that has them is called."""

import copy

import pytest
import torch
from torch import nn

from examples.authors_layer import LaCTSWIGLULayer
from lact_kernels import LaCTCache, LaCTLayer
from lact_kernels.compat import swap_lact_layers

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="4.57")

from lact_kernels.asr import FrameStream, LaCTASRConfig, LaCTForCTC  # noqa: E402
from lact_kernels.compat.transformers import LaCTForCausalLM, LaCTSWIGLUConfig  # noqa: E402

CPU = torch.device("cpu")
EVERYTHING = dict(qkv_bias=True, learnable_ttt_scale=True, use_momentum=True, w0_w2_low_rank=4)


def offloaded(model: nn.Module) -> nn.Module:
    """A copy whose weights and buffers are on no device but while a module that has them is called."""
    model = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert all(x.is_meta for x in model.parameters())
    return model


def called_one_by_one(model: nn.Module) -> nn.Module:
    """The model, in which offloading changes no product: it keeps small projections from being joined."""
    for layer in model.modules():
        if isinstance(layer, LaCTLayer):
            layer.lr_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, dict(attn_qk_norm=False, temporal_reduction=2)], ids=str
)
def test_a_layer(options):
    layer = LaCTLayer(32, 4, 2, window_size=6, lact_chunk_size=8, layer_idx=0, **options)
    x, mask = torch.randn(2, 21, 32), torch.ones(2, 21, dtype=torch.bool)
    mask[0, :5] = False
    with torch.no_grad():
        other, cache = offloaded(layer), LaCTCache()
        torch.testing.assert_close(other(x), layer(x))
        called_one_by_one(layer)
        assert torch.equal(other(x), layer(x)) and torch.equal(other(x, mask), layer(x, mask))
        pieces = [other(x[:, :10], cache=cache), other(x[:, 10:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x))


def test_a_language_model_partly_on_a_disk(tmp_path):
    config = LaCTSWIGLUConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attn_heads=2, num_lact_heads=2,
        window_size=6, lact_chunk_size=8, attn_qk_norm=True, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2, **EVERYTHING,
    )  # fmt: skip
    model, ids = LaCTForCausalLM(config).eval(), torch.randint(50, (2, 11))
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embeddings", "model.layers.1", "model.norm"), "disk")
    places |= dict.fromkeys(("model.layers.0", "lm_head"), "cpu")
    other = LaCTForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert other.model.layers[1].attn.ttt_norm.weight.is_meta
    options = dict(max_new_tokens=12, do_sample=False)
    called_one_by_one(model)
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))


def test_a_recogniser_and_its_stream():
    model, wave = LaCTForCTC(LaCTASRConfig.named("tiny")).eval(), torch.randn(1, 4000) / 10
    other = offloaded(model)
    called_one_by_one(model)
    with torch.no_grad():
        assert torch.equal(other(wave).logits, model(wave).logits)
    heard = [stream.push(wave[0]) for stream in (FrameStream(model), FrameStream(other))]
    assert torch.equal(*heard) and other.device == CPU


def test_layers_that_were_swapped():
    model = nn.ModuleDict({"a": LaCTSWIGLULayer(0)})
    first = offloaded(model)
    with pytest.raises(ValueError, match="a has weights that accelerate keeps elsewhere"):
        swap_lact_layers(first)
    swap_lact_layers(model)
    x = torch.randn(1, 20, 64)
    with torch.no_grad():
        other = offloaded(model)
        called_one_by_one(model)
        assert torch.equal(other["a"](x)[0], model["a"](x)[0])
