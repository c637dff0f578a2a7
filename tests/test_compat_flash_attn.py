"""flash-attn's functions: their values, against the reference and against flash-attn's own rules."""

import itertools

import pytest
import torch

import reference
from lact_kernels.compat import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from lact_kernels.ops.window_attn import run_window_attn
from tests.flash_attn_cases import (
    CALLS,
    FUNCTIONS,
    SELF_ATTENTION,
    WITHOUT_BACKWARD,
    attention,
    base,
    int32,
    limits,
)


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def assert_same_function(ours, expected, inputs):
    """Outputs, lse and the gradients through both; `expected` has a leading axis B = 1 where packed."""
    ours = ours[:2]
    expected = [e.reshape(a.shape) for a, e in zip(ours, expected)]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


DENSE = {  # Tq, Tk, Hq, Hkv, causal, window, softcap
    "a window": (9, 9, 2, 2, True, (3, 0), 0.0),
    "grouped heads": (9, 9, 6, 2, True, (3, 0), 0.0),
    "no limit": (9, 9, 2, 1, True, (-1, 0), 0.0),
    "itself alone": (9, 9, 2, 1, True, (0, 0), 0.0),
    "a window beyond the keys": (9, 9, 2, 1, True, (50, 0), 0.0),
    "fewer queries than keys": (4, 9, 4, 2, True, (3, 0), 0.0),
    "one query": (1, 9, 4, 2, True, (3, 0), 0.0),
    "more queries than keys": (9, 4, 4, 2, True, (2, 0), 0.0),
    "more queries than keys, no limit": (9, 4, 4, 2, True, (-1, 0), 0.0),
    "no keys": (3, 0, 2, 2, True, (2, 0), 0.0),
    "no queries": (0, 4, 2, 2, True, (2, 0), 0.0),
    "a soft cap": (9, 9, 4, 2, True, (3, 0), 0.5),
    "both sides": (9, 9, 4, 2, False, (3, 2), 0.0),
    "both sides, capped": (4, 9, 4, 2, False, (3, 2), 0.5),
    "right alone": (4, 9, 2, 2, False, (-1, 2), 0.0),
    "left alone": (4, 9, 2, 2, False, (3, -1), 0.0),
    "everything": (4, 9, 4, 2, False, (-1, -1), 0.5),
    "both sides of more queries than keys": (9, 4, 4, 2, False, (1, 2), 0.5),
    "everything, of more queries than keys": (9, 4, 2, 2, False, (-1, -1), 0.0),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_is_the_reference(case):
    Tq, Tk, Hq, Hkv, causal, window, softcap = DENSE[case]
    inputs = make(2, Tq, Hq, 6), make(2, Tk, Hkv, 6), make(2, Tk, Hkv, 5)
    options = {"softmax_scale": 0.3, "softcap": softcap or None, "return_lse": True}
    expected = reference.window_attn(*inputs, window, **options)
    # Positional, in their order.
    ours = flash_attn_func(*inputs, 0.0, 0.3, causal, window, softcap, None, False, True)
    assert_same_function(ours, expected, inputs)
    if causal:
        blind = max(0, Tq - Tk)
        assert (ours[0][:, :blind] == 0).all() and (ours[1][..., :blind] == -torch.inf).all()


# Borders in q and in k: no tokens, no queries, no keys, more queries, more keys, as many, one query.
CU_Q = (0, 0, 0, 2, 7, 10, 14, 15)
CU_K = (0, 0, 3, 3, 6, 14, 18, 23)
PACKED = {  # causal, window, softcap
    "no limit": (True, (-1, 0), 0.0),
    "itself alone": (True, (0, 0), 0.0),
    "a window, capped": (True, (3, 0), 0.5),
    "both sides, capped": (False, (1, 2), 0.5),
    "everything": (False, (-1, -1), 0.0),
}


@pytest.mark.parametrize("case", PACKED)
def test_varlen_is_the_reference(case):
    causal, window, softcap = PACKED[case]
    inputs = make(15, 4, 6), make(23, 2, 6), make(23, 2, 5)
    borders = int32(*CU_Q), int32(*CU_K)
    expected = reference.window_attn(
        *(x[None] for x in inputs),
        window,
        softmax_scale=0.3,
        softcap=softcap or None,
        cu_seqlens=borders[0],
        cu_seqlens_k=borders[1],
        return_lse=True,
    )
    options = (0.0, 0.3, causal, window, softcap, None, False, True)
    ours = flash_attn_varlen_func(*inputs, *borders, 5, 8, *options, None)
    assert ours[0].shape == (15, 4, 5) and ours[1].shape == (4, 15)
    assert_same_function(ours, expected, inputs)

    q, kv = make(15, 4, 6), make(23, 2, 2, 6)
    ours = flash_attn_varlen_kvpacked_func(q, kv, *borders, 5, 8, *options)
    expected = flash_attn_varlen_func(q, *kv.unbind(1), *borders, 5, 8, *options)
    assert_same_function(ours, expected, [q, kv])

    qkv, borders = make(15, 3, 4, 6), borders[0]
    ours = flash_attn_varlen_qkvpacked_func(qkv, borders, 5, *options)
    expected = flash_attn_varlen_func(*qkv.unbind(1), borders, borders, 5, 5, *options)
    assert_same_function(ours, expected, [qkv])


@pytest.mark.parametrize("case", PACKED)
def test_packed_tensors_are_the_reference(case):
    causal, window, softcap = PACKED[case]
    options = {"softmax_scale": 0.3, "softcap": softcap or None, "return_lse": True}
    positional = (0.0, 0.3, causal, window, softcap, None, False, True)
    qkv = make(2, 9, 3, 4, 6)
    expected = reference.window_attn(*qkv.unbind(2), window, **options)
    assert_same_function(flash_attn_qkvpacked_func(qkv, *positional), expected, [qkv])
    q, kv = make(2, 4, 4, 6), make(2, 9, 2, 2, 6)
    expected = reference.window_attn(q, *kv.unbind(2), window, **options)
    assert_same_function(flash_attn_kvpacked_func(q, kv, *positional), expected, [q, kv])


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "packed" in name])
def test_packed_tensors_are_read_in_place(name, monkeypatch):
    given = []

    def watch(*args):
        given.extend(args[:3])
        return run_window_attn(*args)

    file = "varlen" if "varlen" in name else "dense"
    monkeypatch.setattr(f"lact_kernels.compat.flash_attn.{file}.run_window_attn", watch)
    inputs = base(name)
    FUNCTIONS[name](**inputs)
    tensors = inputs["qkv"].unbind(-3) if "qkv" in inputs else inputs["kv"].unbind(-3)
    assert [x.data_ptr() for x in given[-len(tensors) :]] == [x.data_ptr() for x in tensors]


# Keys: 8. The sides are beside every border of the rules: no limit, as many as there are keys, more.
LEFT = (-3, 0, 2, 7, 8)
RIGHT = (-1, 0, 3, 8, 11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_window_has_their_edges(name, causal):
    """Each weight of each key, in windows of which some see all, some nothing, and some either end."""
    for Tq in (8,) if name in SELF_ATTENTION else (1, 3, 8, 11, 20):
        q, k = (torch.randn(1, T, 2, 8, dtype=torch.float64) for T in (Tq, 8))
        v = torch.eye(8, dtype=torch.float64)[None, :, None].expand(1, 8, 2, 8)
        for window_size in itertools.product(LEFT, RIGHT):
            options = {"causal": causal, "window_size": window_size}
            expected = attention(q, k, v, *limits(causal, window_size, Tq, 8))
            ours = CALLS[name](q, k, v, **options)
            for actual, exact in zip(ours, expected):
                assert torch.allclose(actual, exact, rtol=1e-10, atol=1e-10), (Tq, window_size)


def test_the_longest_sequence_has_the_edges_of_all():
    """Where queries stand before the first key, a side counts as one that has no limit by `max_seqlen_k`."""
    q, k, v = make(20, 2, 4), make(5, 2, 4), make(5, 2, 4)
    borders = int32(0, 9, 20), int32(0, 2, 5)
    for most, window_size in itertools.product((3, 6), ((-1, 3), (2, -1), (4, 4), (2, 7))):
        o, lse, _ = flash_attn_varlen_func(
            q, k, v, *borders, 11, most, window_size=window_size, return_attn_probs=True
        )
        for queries, keys in ((slice(0, 9), slice(0, 2)), (slice(9, 20), slice(2, 5))):
            sequence = q[None, queries], k[None, keys], v[None, keys]
            expected = attention(*sequence, *limits(False, window_size, 11, most))
            torch.testing.assert_close((o[None, queries], lse[None, :, queries]), expected)


CAPPED = {  # causal, window, softcap, softmax_scale
    "causal": (True, (3, 7), 0.5, None),
    "both sides": (False, (2, 3), 0.5, 0.7),
    "right": (False, (-1, 2), 2.0, None),
    "everything": (False, (-1, -1), 0.0, 0.7),
}


@pytest.mark.parametrize("case", CAPPED)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in WITHOUT_BACKWARD])
def test_gradients_of_capped_windows(name, case):
    causal, window_size, softcap, scale = CAPPED[case]
    Tq, Tk, heads = (7, 7, 4) if name in SELF_ATTENTION else (5, 7, 2)
    inputs = make(2, Tq, 4, 6), make(2, Tk, heads, 6), make(2, Tk, heads, 6)
    sides = limits(causal, window_size, Tq, Tk)
    expected = attention(*inputs, *sides, softcap, scale)
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    ours = CALLS[name](*inputs, **options, softmax_scale=scale)
    assert_same_function(ours, expected, inputs)


@pytest.mark.parametrize("T", [0, 1])
def test_without_other_keys_the_values_come_back(T):
    qkv = torch.randn(2, T, 3, 2, 4)
    torch.testing.assert_close(flash_attn_qkvpacked_func(qkv), qkv[:, :, 2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name):
    """Outputs in the dtype of q, the lse in float32, and nothing where probabilities would be."""
    inputs = base(name) | {"causal": False, "window_size": (3, 1), "softcap": 2.0}
    half = {k: x.half() if getattr(x, "ndim", 0) > 2 else x for k, x in inputs.items()}
    flag = "return_softmax_lse" if "k_cache" in inputs else "return_attn_probs"
    o, lse, *probs = FUNCTIONS[name](**half, **{flag: True})
    exact, exact_lse, *_ = FUNCTIONS[name](**inputs, **{flag: True})
    assert o.dtype == torch.float16 and lse.dtype == torch.float32
    assert [(x.shape, x.dtype) for x in probs] == ([] if "k_cache" in inputs else [((0,), o.dtype)])
    torch.testing.assert_close(o.float(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=1e-2)


COMPILED = (  # and what these call: each way in which tensors are packed, dense and end to end
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    fn = FUNCTIONS[name]
    options = {"causal": False, "window_size": (2, 2), "softcap": 2.0}
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    inputs = base(name) | options
    copies = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    if name == "flash_attn_with_kvcache":
        torch.testing.assert_close(compiled(**inputs), fn(**copies))
        assert torch.equal(inputs["k_cache"], copies["k_cache"])
        return
    results = []
    for call, arguments in ((compiled, inputs), (fn, copies)):
        leaves = [x.requires_grad_() for x in arguments.values() if getattr(x, "ndim", 0) > 2]
        o, lse, _ = call(**arguments, return_attn_probs=True)
        results.append((o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)))
    torch.testing.assert_close(*results)
