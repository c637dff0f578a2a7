"""The layer, its cache and language models on a GPU, at sizes that fill tiles."""

import copy

import pytest
import torch

from lact_kernels import LaCTCache
from tests.lact_layer_cases import gradients, make_layer, oracle
from tests.tolerance import assert_close_to_float64

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32_products")]
DEVICE = "cuda"
SIZES = dict(hidden_size=256, inter_multi=1, window_size=100, lact_chunk_size=128, num_attn_heads=4)
T = 300


def make(case="paper", dtype=torch.float32, **options):
    return make_layer(case, dtype, **SIZES | options).to(DEVICE)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, 256).to(DEVICE, dtype)


# In float16 the oracle overflows at this size: plain PyTorch divides by the square of a small norm.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["paper", "prenorm", "qk-norm-bias"])
def test_layer_is_as_exact_as_plain_pytorch(case, dtype):
    layer = make(case, dtype, backend="triton")
    mask = torch.ones(2, T, dtype=torch.bool, device=DEVICE)
    mask[0, :77] = False
    x, dy = tokens(2, T, dtype=dtype), tokens(2, T, dtype=dtype) * mask[..., None]

    def results(layer, x, plain):
        x = x.detach().requires_grad_()
        y = layer(x, mask)
        if plain:
            y = torch.zeros_like(y)
            for n in range(2):
                y[n, mask[n]] = oracle(layer, x[n, mask[n]])
        return {"y": y.detach()} | gradients(layer, x, y, dy.to(x.dtype))

    exact_layer = copy.deepcopy(layer).double()
    exact_layer.backend = "eager"
    actual, same_dtype = results(layer, x, False), results(layer, x, True)
    exact = results(exact_layer, x.double(), True)
    for name, value in actual.items():
        assert_close_to_float64(value, same_dtype[name], exact[name], name)


def test_pieces_equal_the_whole_and_a_cache_moves_between_devices():
    layer, x = make(), tokens(2, T)
    cache = LaCTCache()
    with torch.no_grad():
        expected = layer(x)
        on_cpu = copy.deepcopy(layer).cpu()
        first = on_cpu(x[:, :150].cpu(), cache=cache).to(DEVICE)
        cache.to(DEVICE)
        rest = [layer(part, cache=cache) for part in x[:, 150:].split([100] + [1] * 50, dim=1)]
    actual = torch.cat([first, *rest], dim=1)
    assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


def test_layer_compiles_with_inductor():
    torch._dynamo.reset()
    layer, x = make(dtype=torch.bfloat16), tokens(2, T, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=3e-2, atol=3e-2)


@pytest.fixture
def no_waiting():
    """A switch: from its call to the end of the test, to wait for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_layer_waits_for_nothing_with_borders_on_the_host(packed, no_waiting):
    layer, x = make(dtype=torch.bfloat16), tokens(1, T, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 77, T], dtype=torch.int32) if packed else None
    layer(x, cu_seqlens=cu_seqlens).sum().backward()  # compiles
    no_waiting()
    layer(x, cu_seqlens=cu_seqlens).sum().backward()


@torch.no_grad()
def test_decoding_waits_for_nothing(no_waiting):
    layer, x, cache = make(), tokens(2, T), LaCTCache()
    layer(x[:, :120], cache=cache)
    layer(x[:, 120:121], cache=cache)
    no_waiting()
    for part in x[:, 121:140].split(1, dim=1):  # a chunk ends among them
        layer(part, cache=cache)


def test_sliding_window_model_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="4.57")
    pytest.importorskip("lact_kernels.compat.transformers")
    config = transformers.MistralConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=70,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.MistralForCausalLM(config).to(DEVICE).eval()
    ids = torch.randint(1, 100, (2, T), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    logits, generated = {}, {}
    for attention in ("eager", "lact_window_attn"):
        model.set_attn_implementation(attention)
        logits[attention] = model(ids, attention_mask=mask).logits[mask.bool()]
        generated[attention] = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False
        )
    torch.testing.assert_close(logits["lact_window_attn"], logits["eager"], rtol=1e-2, atol=1e-2)
    same = generated["lact_window_attn"] == generated["eager"]
    assert same[:, : T + 5].all()  # later ones may follow from a tie


def test_language_model_generates_with_its_cache():
    pytest.importorskip("transformers", minversion="4.57")
    compat = pytest.importorskip("lact_kernels.compat.transformers")
    config = compat.LaCTSWIGLUConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attn_heads=4,
        num_lact_heads=2,
        window_size=64,
        lact_chunk_size=64,
        vocab_size=100,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = compat.LaCTForCausalLM(config).to(DEVICE).eval()
    ids = torch.randint(100, (2, T), device=DEVICE)
    with torch.no_grad():
        expected, cache = model(ids, use_cache=False).logits, LaCTCache()
        parts = ids.split([200] + [1] * 100, dim=1)
        actual = torch.cat([model(part, cache=cache).logits for part in parts], dim=1)
    assert (actual - expected).abs().max() < 1e-2 * expected.abs().max()
    assert model.generate(ids, max_new_tokens=70, do_sample=False).shape == (2, T + 70)
