"""Numbers are taken as they come: of NumPy, in a tensor without axes, or more than any sequence has."""

import json

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from lact_kernels import (
    LaCTLayer,
    RingKVCache,
    block_causal_ttt,
    window_attn,
    window_attn_with_kvcache,
)
from lact_kernels.compat import (
    block_causal_lact_swiglu,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from lact_kernels.ops.rms_norm_scale_add import rms_norm_scale_add
from tests.cases import TTTCase

HUGE = 2**63  # more than the registered ops take


def attention_inputs(Tq=7, Tk=7):
    return torch.randn(2, Tq, 4, 8), torch.randn(2, Tk, 2, 8), torch.randn(2, Tk, 2, 8)


@pytest.mark.parametrize(
    "options, plain",
    [
        (dict(window_size=np.int64(3)), dict(window_size=3)),
        (dict(window_size=np.uint8(3)), dict(window_size=3)),
        (dict(softmax_scale=np.float32(0.5)), dict(softmax_scale=0.5)),
        (dict(softmax_scale=np.int32(2)), dict(softmax_scale=2.0)),
        (dict(window_size=HUGE), {}),
        (dict(window_size=(2, 0)), dict(window_size=3)),
        (dict(window_size=[np.int64(2), 0]), dict(window_size=3)),
        (dict(window_size=(HUGE, 0)), {}),
        (dict(window_size=(-1, 0)), {}),
        (dict(softcap=np.float32(2), softmax_scale=1), dict(softcap=2.0, softmax_scale=1.0)),
        (dict(window_size=(np.int64(2), HUGE)), dict(window_size=(2, -1))),
    ],
    ids=str,
)
def test_windows_and_scales(options, plain):
    q, k, v = attention_inputs()
    assert torch.equal(window_attn(q, k, v, **options), window_attn(q, k, v, **plain))
    expected = window_attn_with_kvcache(q, k, v, **plain)
    assert torch.equal(window_attn_with_kvcache(q, k, v, **options), expected)


@pytest.mark.parametrize(
    "window_size, error, message",
    [
        ((-2, 0), ValueError, r"sides of at least 0, or -1 for no limit, got \(-2, 0\)"),
        ((0, -2), ValueError, r"sides of at least 0, or -1 for no limit, got \(0, -2\)"),
        ((1, 2, 3), ValueError, r"a pair \(left, right\) or None, got \(1, 2, 3\)"),
        ((True, 0), TypeError, r"a pair \(left, right\) or None, got \(True, 0\)"),
        (np.float64(3), TypeError, r"a pair \(left, right\) or None, got np.float64"),
        (np.bool_(True), TypeError, "window_size must be an int"),
    ],
    ids=str,
)
def test_windows_that_are_none(window_size, error, message):
    q, k, v = attention_inputs()
    for call in (
        lambda: window_attn(q, k, v, window_size),
        lambda: window_attn_with_kvcache(q, k, v, window_size),
        lambda: RingKVCache(1, window_size, 2, 8),
        lambda: LaCTLayer(32, 4, 2, window_size=window_size),
    ):
        with pytest.raises(error, match=message):
            call()


def test_sizes_of_a_ring():
    cache = RingKVCache(
        np.int64(2), (np.int64(2), 0), np.int32(2), np.int64(8), max_queries=np.int8(2)
    )
    assert cache.k.shape == cache.v.shape == (2, 4, 2, 8)
    assert type(cache.window_size) is type(cache.max_queries) is int
    with pytest.raises(TypeError, match=r"a limit on the left side, got \(-1, 0\)"):
        RingKVCache(2, (-1, 0), 2, 8)


@pytest.mark.parametrize("number", [np.int64, lambda n: HUGE], ids=["numpy", "huge"])
def test_chunks_intervals_and_the_state_between_calls(number):
    inputs = TTTCase("", B=1, T=6).inputs(torch.float32)
    plain = 4 if number is np.int64 else 10**6
    expected = block_causal_ttt(**inputs, chunk_size=plain, checkpoint_interval=plain)
    options = dict(chunk_size=number(4), checkpoint_interval=number(4))
    o, state = block_causal_ttt(**inputs, **options, return_state=True)
    assert torch.equal(o, expected) and type(state.chunk_size) is int
    block_causal_ttt(**inputs, **options, initial_state=state)  # its options are those of the call
    o.sum().backward()


def test_the_authors_function_and_norms():
    w, tokens, rates = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 6, 4), torch.rand(3, 2, 6, 1)
    expected = block_causal_lact_swiglu(*w, *tokens, *rates, chunk_size=4)
    assert torch.equal(block_causal_lact_swiglu(*w, *tokens, *rates, np.int64(4)), expected)
    x, weight = torch.randn(1, 6, 2, 4), torch.rand(4)
    expected = rms_norm_scale_add(x, x, weight, None, eps=0.5)
    assert torch.equal(rms_norm_scale_add(x, x, weight, None, eps=np.float32(0.5)), expected)


@pytest.mark.parametrize(
    "number", [torch.tensor, np.int64, lambda n: torch.tensor(n, dtype=torch.int32)]
)
def test_lengths_of_flash_attn(number):
    q, k, v = (x.flatten(0, 1) for x in attention_inputs())
    cu = torch.tensor([0, 3, 14], dtype=torch.int32)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 11, 11, causal=True)
    longest = number(11)
    actual = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    assert torch.equal(actual, expected)
    window = dict(window_size=(2, 3))
    expected = flash_attn_varlen_func(q, k, v, cu, cu.clone(), 11, 11, **window)
    actual = flash_attn_varlen_func(q, k, v, cu, cu.clone(), longest, longest, **window)
    assert torch.equal(actual, expected)

    q, k, v = attention_inputs(2, 9)
    options = dict(causal=True, window_size=(4, 0))
    expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=5, **options)
    actual = flash_attn_with_kvcache(q, k, v, cache_seqlens=number(5), **options)
    assert torch.equal(actual, expected)
    assert torch.equal(window_attn_with_kvcache(q, k, v, 5, cache_seqlens=number(5)), expected)
    with pytest.raises(ValueError, match="cache_seqlens is 10"):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=number(10), **options)
    flash_attn_with_kvcache(q, k, v, q[:, :, :2], q[:, :, :2], cache_seqlens=number(7), **options)


def test_windows_and_numbers_of_flash_attn():
    q, k, v = attention_inputs()
    expected = flash_attn_func(q, k, v, causal=True, window_size=(2, 0))
    options = dict(softmax_scale=np.float64(8**-0.5), dropout_p=np.float32(0))
    window_size = np.array([2, 0])
    flags = dict(causal=np.True_, deterministic=np.False_, return_attn_probs=np.False_)
    actual = flash_attn_func(q, k, v, window_size=tuple(window_size), **options, **flags)
    assert torch.equal(actual, expected)
    options = dict(window_size=(2, 1), softcap=0.5)
    numbers = dict(
        causal=np.False_, window_size=(np.int64(2), np.int32(1)), softcap=np.float32(0.5)
    )
    assert torch.equal(flash_attn_func(q, k, v, **numbers), flash_attn_func(q, k, v, **options))
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(HUGE, HUGE)), expected)


@pytest.mark.parametrize("bad", [torch.tensor(7.0), torch.tensor([7]), 7.0, True, np.float32(7)])
def test_lengths_that_are_none(bad):
    q, k, v = (x.flatten(0, 1) for x in attention_inputs())
    cu = torch.tensor([0, 3, 14], dtype=torch.int32)
    for lengths in ((bad, 11), (11, bad)):
        with pytest.raises(TypeError, match="max_seqlen_[qk] must be an int"):
            flash_attn_varlen_func(q, k, v, cu, cu, *lengths, causal=True)


def test_options_of_a_layer():
    i = np.int64
    options = dict(window_size=i(6), lact_chunk_size=i(8), w0_w2_low_rank=i(4), layer_idx=i(0))
    options |= dict(rope_theta=np.float32(1e4), inter_multi=np.float32(1), fw_init_gain=i(1))
    layer = LaCTLayer(i(32), i(4), i(2), **options)
    for name, value in vars(layer).items():
        assert not isinstance(value, np.generic), name
    x = torch.randn(1, 20, 32)
    endless = LaCTLayer(32, 4, 2, window_size=HUGE, lact_chunk_size=HUGE)
    whole = LaCTLayer(32, 4, 2, window_size=(-1, 0), lact_chunk_size=20)
    whole.load_state_dict(endless.state_dict())
    assert torch.equal(endless(x), whole(x))


def test_configurations_can_be_written():
    transformers = pytest.importorskip("transformers", minversion="4.57")
    from lact_kernels.asr import LaCTASRConfig
    from lact_kernels.compat.transformers import LaCTSWIGLUConfig

    speech = LaCTASRConfig(window_size=np.int64(32), conv_strides=np.array([2, 2]), norm_eps=1e-6)
    for config in (speech, LaCTSWIGLUConfig(hidden_size=np.int64(32), window_size=(15, 0))):
        assert isinstance(config, transformers.PretrainedConfig)
        json.loads(config.to_json_string())


def test_numbers_in_compiled_code():
    """A number that changes becomes a symbol, which no check turns back into a number."""
    q, k, v = attention_inputs()
    counter = CompileCounter()
    compiled = torch.compile(lambda n: window_attn(q, k, v, n), backend=counter, fullgraph=True)
    for n in (2, 3, 4, 5):
        assert torch.equal(compiled(n), window_attn(q, k, v, n))
    assert counter.frame_count == 2
    numpy = torch.compile(lambda n: window_attn(q, k, v, n), backend="eager")
    assert torch.equal(numpy(np.int64(3)), window_attn(q, k, v, 3))


def test_lengths_without_values():
    """Of a fake tensor nothing is read, though it says that it is on the CPU."""
    with FakeTensorMode():
        q, k, v = attention_inputs(1)
        for lengths in (torch.randint(9, (2,), dtype=torch.int32), torch.randint(9, ())):
            assert window_attn_with_kvcache(q, k, v, 3, cache_seqlens=lengths).shape == q.shape
