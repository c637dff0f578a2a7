"""flash-attn's functions: their signatures, the options that are not here, and bad input."""

import inspect

import pytest
import torch

import lact_kernels.compat
from lact_kernels.compat import flash_attn, flash_attn_varlen_func
from tests.flash_attn_cases import FUNCTIONS, SIGNATURES, base, int32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_theirs(name):
    fn = FUNCTIONS[name]
    *parameters, backend = inspect.signature(fn).parameters.values()
    assert [(p.name, p.default) for p in parameters] == list(SIGNATURES[fn].items())
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert (backend.name, backend.default, backend.kind) == (
        "backend",
        "auto",
        inspect.Parameter.KEYWORD_ONLY,
    )


def test_all_of_their_functions_are_exported():
    assert flash_attn.__all__ == sorted(FUNCTIONS)
    assert set(FUNCTIONS) <= set(lact_kernels.compat.__all__)


UNSUPPORTED = {
    "dropout_p": 0.1,
    "alibi_slopes": torch.ones(4),
    "block_table": int32(0)[None],
    "rotary_cos": torch.ones(7, 4),
    "rotary_sin": torch.ones(7, 4),
    "cache_batch_idx": int32(1, 0),
    "cache_leftpad": int32(1, 0),
}


@pytest.mark.parametrize(
    "name, option",
    [(name, x) for name, fn in FUNCTIONS.items() for x in UNSUPPORTED if x in SIGNATURES[fn]],
)
def test_unsupported_options_are_not_implemented(name, option):
    inputs = base(name)
    before = {key: x.clone() for key, x in inputs.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(NotImplementedError, match=f"{option} is not supported: "):
        FUNCTIONS[name](**inputs, **{option: UNSUPPORTED[option]})
    assert all(torch.equal(inputs[key], x) for key, x in before.items())


# Options that change nothing, with the values that flash-attn accepts for them.
WITHOUT_EFFECT = {
    "softcap": -1.0,
    "deterministic": True,
    "num_splits": 4,
    "rotary_interleaved": False,
}


@pytest.mark.parametrize(
    "name, option",
    [(name, x) for name, fn in FUNCTIONS.items() for x in WITHOUT_EFFECT if x in SIGNATURES[fn]],
)
def test_options_without_effect(name, option):
    inputs = base(name)
    expected = FUNCTIONS[name](**inputs)
    ours = FUNCTIONS[name](**inputs, **{option: WITHOUT_EFFECT[option]})
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backend_is_chosen_by_name(name):
    inputs = {k: x.double() if getattr(x, "ndim", 0) > 2 else x for k, x in base(name).items()}
    with pytest.raises(ValueError, match="backend='triton' cannot run: .*float64"):
        FUNCTIONS[name](**inputs, backend="triton")
    FUNCTIONS[name](**inputs, backend="eager")


def test_lengths_are_read_only_where_they_decide():
    """Tensors without values, as those on a GPU would be waited for: reading one is an error."""
    unread = torch.empty((), dtype=torch.int32, device="meta")
    inputs = base("flash_attn_varlen_func") | {"max_seqlen_q": unread, "max_seqlen_k": unread}
    window = {"causal": False, "window_size": (2, 1)}
    flash_attn_varlen_func(**inputs | {"window_size": (2, 1)})
    flash_attn_varlen_func(**inputs | {"causal": False})
    flash_attn_varlen_func(**inputs | window | {"max_seqlen_k": torch.tensor(8)})
    with pytest.raises(RuntimeError, match="meta"):
        flash_attn_varlen_func(**inputs | window)
    flash_attn_varlen_func(*[inputs["q"]] * 3, *[int32(0, 4, 10)] * 2, unread, unread, **window)


R = torch.randn
SHARED = [
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got None"),
    ({"deterministic": 1}, TypeError, "deterministic must be True or False, got 1"),
    ({"return_attn_probs": None}, TypeError, "return_attn_probs must be True or False"),
]
EVERYWHERE = [
    ({"softcap": "off"}, TypeError, "softcap must be a number, got 'off'"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"window_size": 3}, TypeError, r"window_size must be a pair of ints .*, got 3"),
    ({"window_size": (3,)}, TypeError, r"window_size must be a pair of ints .*, got \(3,\)"),
    ({"window_size": (3, 0.0)}, TypeError, r"window_size .*, got \(3, 0.0\)"),
    ({"window_size": (None, 0)}, TypeError, r"window_size .*, got \(None, 0\)"),
    ({"window_size": (True, 0)}, TypeError, r"window_size .*, got \(True, 0\)"),
    ({"backend": "fast"}, ValueError, "backend must be"),
]
BAD = {
    "flash_attn_func": [
        ({"q": R(5, 4, 8)}, ValueError, r"q must have the shape .*\(5, 4, 8\)"),
        ({"k": R(2, 7, 2, 6)}, ValueError, r"k .*\(2, 7, 2, 8\), got \(2, 7, 2, 6\)"),
        ({"v": R(2, 6, 2, 8)}, ValueError, "v must have the shape"),
        ({"v": R(2, 7, 2, 8).half()}, TypeError, "v .*float32.*float16"),
        ({"q": R(2, 5, 3, 8)}, ValueError, "3 heads of q .* multiple of the 2 heads of k and v"),
    ],
    "flash_attn_kvpacked_func": [
        ({"q": R(5, 4, 8)}, ValueError, r"q must have the shape .*\(5, 4, 8\)"),
        ({"kv": R(2, 7, 3, 2, 8)}, ValueError, r"kv .*\(2, 7, 2, 2, 8\), got \(2, 7, 3, 2, 8\)"),
        ({"kv": R(2, 7, 2, 2, 6)}, ValueError, r"kv .*\(2, 7, 2, 2, 8\), got \(2, 7, 2, 2, 6\)"),
        ({"kv": R(2, 7, 2, 2, 8).half()}, TypeError, "kv .*float32.*float16"),
        ({"q": R(2, 5, 3, 8)}, ValueError, "3 heads of q .* multiple of the 2 heads of k and v"),
        ({"kv": None}, TypeError, r"kv must be a tensor \[B, Tk, 2, Hkv, D\], got NoneType"),
    ],
    "flash_attn_qkvpacked_func": [
        ({"qkv": R(2, 5, 4, 8)}, ValueError, r"qkv must have the shape \[B, T, 3, H, D\]"),
        ({"qkv": R(2, 5, 4, 3, 8)}, ValueError, r"qkv .*\[B, T, 3, H, D\], got \(2, 5, 4, 3, 8\)"),
        ({"qkv": torch.ones(2, 5, 3, 4, 8, dtype=torch.int32)}, TypeError, "qkv .*int32"),
    ],
    "flash_attn_varlen_func": [
        ({"q": R(2, 5, 4, 8)}, ValueError, r"q must have the shape \[total_q, Hq, D\]"),
        ({"k": R(2, 7, 2, 8)}, ValueError, r"k must have the shape \[total_k, Hkv, D\]"),
        ({"v": None}, TypeError, r"v must be a tensor \[total_k, Hkv, Dv\], got NoneType"),
        ({"v": R(13, 2, 8)}, ValueError, "v must have the shape"),
        ({"cu_seqlens_q": [0, 10]}, TypeError, "cu_seqlens_q must be an int32 tensor"),
        ({"cu_seqlens_k": int32(0, 14).long()}, TypeError, "cu_seqlens_k .*int32.*int64"),
        ({"cu_seqlens_k": int32(0, 14)}, ValueError, "cu_seqlens_q .* 2 .* cu_seqlens_k .* 1"),
        ({"cu_seqlens_q": int32(0, 4, 9)}, ValueError, "cu_seqlens_q must end at T = 10, got 9"),
        ({"cu_seqlens_k": int32(0, 15, 14)}, ValueError, "cu_seqlens_k descends from 15 to 14"),
        ({"max_seqlen_q": 6.0}, TypeError, "max_seqlen_q must be an int, got 6.0"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k must be an int, got None"),
    ],
    "flash_attn_varlen_kvpacked_func": [
        ({"kv": R(14, 3, 2, 8)}, ValueError, r"kv .*\(14, 2, 2, 8\), got \(14, 3, 2, 8\)"),
        ({"kv": R(14, 2, 8)}, ValueError, r"kv must have the shape \[total_k, 2, Hkv, D\]"),
        ({"kv": R(14, 2, 2, 8).half()}, TypeError, "kv .*float32.*float16"),
        ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k must be an int32 tensor"),
        ({"cu_seqlens_k": int32(0, 9, 13)}, ValueError, "cu_seqlens_k must end at T = 14, got 13"),
        ({"max_seqlen_k": 8.0}, TypeError, "max_seqlen_k must be an int, got 8.0"),
    ],
    "flash_attn_varlen_qkvpacked_func": [
        ({"qkv": R(10, 2, 4, 8)}, ValueError, r"qkv must have the shape \[total, 3, H, D\]"),
        ({"cu_seqlens": [0, 10]}, TypeError, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": int32(0, 4, 9)}, ValueError, "cu_seqlens must end at T = 10, got 9"),
        ({"max_seqlen": None}, TypeError, "max_seqlen must be an int, got None"),
    ],
    "flash_attn_with_kvcache": [
        ({"k_cache": R(3, 7, 2, 8)}, ValueError, r"k_cache .*\(2, 7, 2, 8\), got \(3, 7, 2, 8\)"),
        ({"v_cache": R(2, 7, 2, 8).half()}, TypeError, "v_cache .*float32.*float16"),
        ({"q": R(2, 5, 3, 8)}, ValueError, "heads of q .* multiple .* k_cache and v_cache"),
        ({"k": None}, TypeError, "k must be a tensor .*, got NoneType"),
        ({"v": None}, TypeError, "v must be a tensor .*, got NoneType"),
        ({"k": R(2, 3, 2, 8).half()}, TypeError, "k .*float32.*float16"),
        ({"k": R(2, 3, 1, 8)}, ValueError, r"k .*\(2, 3, 2, 8\), got \(2, 3, 1, 8\)"),
        ({"v": R(2, 2, 2, 8)}, ValueError, r"v .*\(2, 3, 2, 8\), got \(2, 2, 2, 8\)"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens must say where k and v go"),
        ({"cache_seqlens": [4, 2]}, TypeError, r"cache_seqlens .*\[B\] or an int, got \[4, 2\]"),
        ({"cache_seqlens": int32(4, 2).long()}, TypeError, "cache_seqlens .*int32.*int64"),
        ({"cache_seqlens": int32(4)}, ValueError, r"cache_seqlens .*\(2,\), got \(1,\)"),
        ({"cache_seqlens": int32(4, 5)}, ValueError, "cache_seqlens is 5 and k has 3 tokens"),
        ({"cache_seqlens": 5}, ValueError, "cache_seqlens is 5 and k has 3 tokens"),
        ({"cache_seqlens": int32(-1, 2)}, ValueError, "cache_seqlens must not be negative, got -1"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must not be negative, got -1"),
        ({"cache_seqlens": 8, "k": None, "v": None}, ValueError, "cache_seqlens is 8 and k has 0"),
        ({"num_splits": 1.0}, TypeError, "num_splits must be an int, got 1.0"),
        ({"rotary_interleaved": 0}, TypeError, "rotary_interleaved must be True or False"),
        ({"return_softmax_lse": 1}, TypeError, "return_softmax_lse must be True or False"),
    ],
}
BAD = [
    (name, *case)
    for name, cases in BAD.items()
    for case in cases + EVERYWHERE + (SHARED if name != "flash_attn_with_kvcache" else [])
]


@pytest.mark.parametrize(
    "name, changed, error, message", BAD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(name, changed, error, message):
    inputs = base(name) | changed
    before = {key: x.clone() for key, x in inputs.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error, match=message):
        FUNCTIONS[name](**inputs)
    assert all(torch.equal(inputs[key], x) for key, x in before.items())
