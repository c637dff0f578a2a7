"""flash-attn's signatures: against the reference, and at every border of what they accept."""

import inspect

import pytest
import torch

import reference
from lact_kernels.compat import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from lact_kernels.ops.window_attn import run_window_attn

REQUIRED = inspect.Parameter.empty
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
QKV = dict.fromkeys(("q", "k", "v"), REQUIRED)
BORDERS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SIGNATURES = {  # those of flash-attn 2.8.3
    flash_attn_func: QKV | OPTIONS,
    flash_attn_qkvpacked_func: {"qkv": REQUIRED} | OPTIONS,
    flash_attn_varlen_func: QKV
    | dict.fromkeys(BORDERS, REQUIRED)
    | OPTIONS
    | {"block_table": None},
    flash_attn_with_kvcache: {
        "q": REQUIRED,
        "k_cache": REQUIRED,
        "v_cache": REQUIRED,
        "k": None,
        "v": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}
FUNCTIONS = {fn.__name__: fn for fn in SIGNATURES}


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


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same_function(ours, expected, inputs):
    """Outputs, lse and the gradients through both; `expected` has a leading axis B = 1 where packed."""
    *ours, probs = ours
    assert probs.shape == (0,) and probs.dtype == ours[0].dtype
    expected = [e.reshape(a.shape) for a, e in zip(ours, expected)]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


DENSE = {  # Tq, Tk, Hq, Hkv, left
    "a window": (9, 9, 2, 2, 3),
    "grouped heads": (9, 9, 6, 2, 3),
    "no limit": (9, 9, 2, 1, -1),
    "itself alone": (9, 9, 2, 1, 0),
    "a window beyond the keys": (9, 9, 2, 1, 50),
    "fewer queries than keys": (4, 9, 4, 2, 3),
    "one query": (1, 9, 4, 2, 3),
    "more queries than keys": (9, 4, 4, 2, 2),
    "more queries than keys, no limit": (9, 4, 4, 2, -1),
    "no keys": (3, 0, 2, 2, 2),
    "no queries": (0, 4, 2, 2, 2),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_is_the_reference(case):
    Tq, Tk, Hq, Hkv, left = DENSE[case]
    inputs = make(2, Tq, Hq, 6), make(2, Tk, Hkv, 6), make(2, Tk, Hkv, 5)
    window = left + 1 if left >= 0 else None
    expected = reference.window_attn(*inputs, window, softmax_scale=0.3, return_lse=True)
    # Positional, in their order.
    ours = flash_attn_func(*inputs, 0.0, 0.3, True, (left, 0), 0.0, None, False, True)
    assert_same_function(ours, expected, inputs)
    blind = max(0, Tq - Tk)
    assert (ours[0][:, :blind] == 0).all() and (ours[1][..., :blind] == -torch.inf).all()


@pytest.mark.parametrize("left", [-1, 0, 3])
def test_qkvpacked_is_the_reference(left):
    qkv = make(2, 9, 3, 4, 6)
    window = left + 1 if left >= 0 else None
    expected = reference.window_attn(*qkv.unbind(2), window, softmax_scale=0.3, return_lse=True)
    ours = flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True, (left, 0), 0.0, None, False, True)
    assert_same_function(ours, expected, [qkv])


def test_qkvpacked_is_read_in_place(monkeypatch):
    given = []

    def watch(*args):
        given.extend(args[:3])
        return run_window_attn(*args)

    monkeypatch.setattr("lact_kernels.compat.flash_attn.dense.run_window_attn", watch)
    qkv = make(2, 9, 3, 4, 6)
    flash_attn_qkvpacked_func(qkv, causal=True)
    assert [x.data_ptr() for x in given] == [qkv[:, :, i].data_ptr() for i in range(3)]


# Borders in q and in k: no tokens, no queries, no keys, more queries, more keys, as many, one query.
CU_Q = (0, 0, 0, 2, 7, 10, 14, 15)
CU_K = (0, 0, 3, 3, 6, 14, 18, 23)


@pytest.mark.parametrize("left", [-1, 0, 3])
def test_varlen_is_the_reference(left):
    inputs = make(15, 4, 6), make(23, 2, 6), make(23, 2, 5)
    cu_q, cu_k = int32(*CU_Q), int32(*CU_K)
    window = left + 1 if left >= 0 else None
    expected = reference.window_attn(
        *(x[None] for x in inputs),
        window,
        softmax_scale=0.3,
        cu_seqlens=cu_q,
        cu_seqlens_k=cu_k,
        return_lse=True,
    )
    ours = flash_attn_varlen_func(
        *inputs, cu_q, cu_k, 5, 8, 0.0, 0.3, True, (left, 0), 0.0, None, False, True, None
    )
    assert ours[0].shape == (15, 4, 5) and ours[1].shape == (4, 15)
    assert_same_function(ours, expected, inputs)


def dense(q, k, v, **options):
    return flash_attn_func(q, k, v, **options)


def qkvpacked(q, k, v, **options):
    return flash_attn_qkvpacked_func(torch.stack((q, k, v), dim=2), **options)


def varlen(q, k, v, **options):
    lengths = q.shape[1], k.shape[1]
    borders = [int32(*(n * length for n in range(len(q) + 1))) for length in lengths]
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*tokens, *borders, *lengths, **options).view_as(q)


def kvcache(q, k, v, **options):
    return flash_attn_with_kvcache(q, k, v, **options)


def kvcache_of_new_tokens(q, k, v, **options):
    caches = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    return flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=0, **options)


CALLS = (dense, qkvpacked, varlen, kvcache, kvcache_of_new_tokens)
CROSS_CALLS = (dense, varlen, kvcache, kvcache_of_new_tokens)


def visible(call, Tq, Tk, **options):
    """Which keys a query reads, `[Tq, Tk]`: those whose value changes its output."""
    q, k, v = (torch.randn(1, T, 2, 4, dtype=torch.float64) for T in (Tq, Tk, Tk))
    key = torch.arange(Tk)
    changed = v.repeat(Tk, 1, 1, 1)
    changed[key, key] += 1  # in batch row j that of key j
    before = call(q, k, v, **options)
    after = call(q.repeat(Tk, 1, 1, 1), k.repeat(Tk, 1, 1, 1), changed, **options)
    return ((after - before).abs().amax(dim=(2, 3)) > 1e-6).T


def inclusive_window(Tq, Tk, left):
    position = torch.arange(Tk - Tq, Tk)[:, None]
    key = torch.arange(Tk)
    return (key <= position) & (key >= position - (left if left >= 0 else Tk))


ACCEPTED = [  # causal, right
    (True, 0),
    (True, -1),
    (True, 2),  # transformers passes both sides alike
    (False, 0),  # the same function under another name
]


@pytest.mark.parametrize("causal, right", ACCEPTED)
@pytest.mark.parametrize("left", [-1, 0, 2, 6, 7])
@pytest.mark.parametrize("call", CALLS)
def test_edges_of_the_window(call, left, causal, right):
    """The key `left` tokens back is read and the one before it is not, and none after the query."""
    seen = visible(call, 8, 8, causal=causal, window_size=(left, right))
    assert torch.equal(seen, inclusive_window(8, 8, left))


@pytest.mark.parametrize("Tq", [1, 3, 11])
@pytest.mark.parametrize("call", CROSS_CALLS)
def test_edges_of_the_window_count_from_the_last_key(call, Tq):
    seen = visible(call, Tq, 8, causal=True, window_size=(2, 0))
    assert torch.equal(seen, inclusive_window(Tq, 8, 2))


@pytest.mark.parametrize("right", [-1, 0, 3])
@pytest.mark.parametrize("left", [-1, 2])
@pytest.mark.parametrize("call", CROSS_CALLS)
def test_one_query_is_causal_by_itself(call, left, right):
    seen = visible(call, 1, 8, causal=False, window_size=(left, right))
    assert torch.equal(seen, inclusive_window(1, 8, left))


@pytest.mark.parametrize("window_size", [(-1, -1), (2, -1), (2, 1)])
@pytest.mark.parametrize("call", CALLS)
def test_attention_to_later_keys_is_not_implemented(call, window_size):
    q = torch.randn(1, 2, 2, 4)
    with pytest.raises(NotImplementedError, match=r"causal=False with window_size=.* causal=True"):
        call(q, q, q.clone(), window_size=window_size)


def test_a_maximum_of_one_query_does_not_hide_two():
    q = torch.randn(2, 2, 4)
    with pytest.raises(NotImplementedError, match="causal=False"):
        flash_attn_varlen_func(q, q, q, int32(0, 2), int32(0, 2), 1, 2)


@pytest.mark.parametrize("T", [0, 1])
def test_without_later_keys_the_defaults_run(T):
    qkv = torch.randn(2, T, 3, 2, 4)
    torch.testing.assert_close(flash_attn_qkvpacked_func(qkv), qkv[:, :, 2])


def base(name):
    """A call of each function that works, in float32."""
    q = torch.randn(2, 5, 4, 8)
    kv = torch.randn(2, 2, 7, 2, 8)
    if name == "flash_attn_func":
        return {"q": q, "k": kv[0], "v": kv[1], "causal": True}
    if name == "flash_attn_qkvpacked_func":
        return {"qkv": torch.randn(2, 5, 3, 4, 8), "causal": True}
    if name == "flash_attn_varlen_func":
        return {
            "q": q.flatten(0, 1),
            "k": kv[0].flatten(0, 1),
            "v": kv[1].flatten(0, 1),
            "cu_seqlens_q": int32(0, 4, 10),
            "cu_seqlens_k": int32(0, 8, 14),
            "max_seqlen_q": 6,
            "max_seqlen_k": 8,
            "causal": True,
        }
    return {
        "q": q,
        "k_cache": kv[0],
        "v_cache": kv[1],
        "k": torch.randn(2, 3, 2, 8),
        "v": torch.randn(2, 3, 2, 8),
        "cache_seqlens": int32(4, 2),
        "causal": True,
    }


SLOPES = torch.ones(4)
UNSUPPORTED = {
    "dropout_p": 0.1,
    "softcap": 30.0,
    "alibi_slopes": SLOPES,
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
def test_half_precision(name):
    """Outputs in the dtype of q, the lse in float32, and nothing where probabilities would be."""
    inputs = base(name)
    half = {k: x.half() if getattr(x, "ndim", 0) > 2 else x for k, x in inputs.items()}
    flag = "return_softmax_lse" if "k_cache" in inputs else "return_attn_probs"
    o, lse, *probs = FUNCTIONS[name](**half, **{flag: True})
    exact, exact_lse, *_ = FUNCTIONS[name](**inputs, **{flag: True})
    assert o.dtype == torch.float16 and lse.dtype == torch.float32
    assert [(x.shape, x.dtype) for x in probs] == ([] if "k_cache" in inputs else [((0,), o.dtype)])
    torch.testing.assert_close(o.float(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backend_is_chosen_by_name(name):
    inputs = {k: x.double() if getattr(x, "ndim", 0) > 2 else x for k, x in base(name).items()}
    with pytest.raises(ValueError, match="backend='triton' cannot run: .*float64"):
        FUNCTIONS[name](**inputs, backend="triton")
    FUNCTIONS[name](**inputs, backend="eager")


def decode(q, k, v, pieces, as_tensor):
    """Outputs and lse of a sequence read in pieces of these lengths, and the caches they fill."""
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    results, length = [], 0
    for n in pieces:
        piece = (x[:, length : length + n] for x in (q, k, v))
        q_new, k_new, v_new = piece
        cache_seqlens = torch.full((len(q),), length, dtype=torch.int32) if as_tensor else length
        results.append(
            flash_attn_with_kvcache(
                q_new,
                *caches,
                k_new,
                v_new,
                cache_seqlens=cache_seqlens,
                causal=True,
                window_size=(3, 3),
                return_softmax_lse=True,
            )
        )
        if as_tensor:
            assert (cache_seqlens == length).all()
        length += n
    o, lse = zip(*results)
    return torch.cat(o, dim=1), torch.cat(lse, dim=2), caches


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 1, 1, 3)], ids=["one by one", "with a prompt"])
def test_decoding_equals_the_full_pass(pieces, as_tensor):
    q = torch.randn(2, 9, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 6, dtype=torch.float64)
    o, lse, caches = decode(q, k, v, pieces, as_tensor)
    options = {"causal": True, "window_size": (3, 0), "return_attn_probs": True}
    expected, expected_lse, _ = flash_attn_func(q, k, v, **options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)


@pytest.mark.parametrize("left", [-1, 2])
@pytest.mark.parametrize("Tq", [1, 2, 4])
def test_rows_of_different_lengths(Tq, left):
    """Into a cache with strides of its own, with fewer, as many and more queries than new tokens."""
    lengths, n, S = (0, 3, 6), 2, 8
    q = torch.randn(3, Tq, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 3, n, 2, 6, dtype=torch.float64)
    caches = [torch.randn(3, 2, S, 6, dtype=torch.float64).transpose(1, 2) for _ in range(2)]
    expected_caches = [x.clone() for x in caches]
    for cache, new in zip(expected_caches, (k, v)):
        for b, length in enumerate(lengths):
            cache[b, length : length + n] = new[b]
    o, lse = flash_attn_with_kvcache(
        q,
        *caches,
        k,
        v,
        cache_seqlens=int32(*lengths),
        softmax_scale=0.3,
        causal=True,
        window_size=(left, left),
        return_softmax_lse=True,
    )
    assert all(torch.equal(*pair) for pair in zip(caches, expected_caches))
    for b, length in enumerate(lengths):
        row = [x[b : b + 1, : length + n] for x in (q, *expected_caches)]
        row[0] = q[b : b + 1]
        window = left + 1 if left >= 0 else None
        exact = reference.window_attn(*row, window, softmax_scale=0.3, return_lse=True)
        torch.testing.assert_close((o[b : b + 1], lse[b : b + 1]), exact)


@pytest.mark.parametrize("cache_seqlens", [None, 4, int32(4, 4)], ids=["all", "int", "tensor"])
def test_without_new_tokens_the_cache_is_only_read(cache_seqlens):
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    caches = torch.randn(2, 2, 7, 2, 6, dtype=torch.float64)
    length = 7 if cache_seqlens is None else 4
    caches[:, :, length:] = torch.nan
    before = caches.clone()
    o = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=cache_seqlens, causal=True, window_size=(2, 2)
    )
    torch.testing.assert_close(o, reference.window_attn(q, *caches[:, :, :length], 3))
    assert torch.equal(caches.nan_to_num(), before.nan_to_num())


def test_values_on_a_device_are_not_read_on_the_host():
    """Tensors without values, as those on a GPU would be waited for: reading one is an error."""
    inputs = {
        k: x.to("meta") if k != "causal" else x for k, x in base("flash_attn_with_kvcache").items()
    }
    assert flash_attn_with_kvcache(**inputs).shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match="k has 8 tokens, more than the 7 slots"):
        new = torch.empty(2, 8, 2, 8, device="meta")
        flash_attn_with_kvcache(**inputs | {"k": new, "v": new})


def test_tokens_that_nobody_counted_stay_in_the_cache():
    """Compiled, as on a GPU, no length is read: what does not fit goes around as in a ring buffer."""
    fn = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    caches = torch.randn(2, 2, 7, 2, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 2, 6, dtype=torch.float64)
    expected = caches.clone()
    for cache, new in zip(expected, (k, v)):
        cache[0, [5, 6, 0]], cache[1, [2, 3, 4]] = new
    ours = fn(q, *caches, k, v, cache_seqlens=int32(5, 2), causal=True, window_size=(3, 0))
    assert torch.equal(caches, expected)
    exact = reference.window_attn_with_kvcache(q, *expected, 4, cache_seqlens=int32(8, 5))
    torch.testing.assert_close(ours, exact)
    unlimited = fn(q, *caches, k, v, cache_seqlens=int32(5, 2), causal=True)
    assert unlimited[0].isnan().all() and unlimited[1].isfinite().all()


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_kvcache_has_no_backward(name):
    inputs = base("flash_attn_with_kvcache")
    inputs[name].requires_grad_()
    before = inputs["k_cache"].detach().clone()
    with pytest.raises(ValueError, match=f"^{name} requires a gradient"):
        flash_attn_with_kvcache(**inputs)
    assert torch.equal(inputs["k_cache"], before)
    with torch.no_grad():
        flash_attn_with_kvcache(**inputs)
    assert not torch.equal(inputs["k_cache"], before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_as_one_graph(name):
    fn, options = FUNCTIONS[name], {"window_size": (2, 2)}
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
