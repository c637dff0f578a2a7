"""flash-attn's function over a cache: what is written, what is read, and what a query sees."""

import pytest
import torch

import reference
from lact_kernels.compat import flash_attn_func, flash_attn_with_kvcache
from tests.flash_attn_cases import attention, base, int32, limits


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


ROWS = {  # causal, window, softcap
    "no limit": (True, (-1, 0), 0.0),
    "a window": (True, (2, 2), 0.0),
    "both sides, capped": (False, (1, 2), 0.5),
    "everything": (False, (-1, -1), 0.0),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("Tq", [1, 2, 4])
def test_rows_of_different_lengths(Tq, case):
    """Into a cache with strides of its own, with fewer, as many and more queries than new tokens."""
    causal, window_size, softcap = ROWS[case]
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
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        return_softmax_lse=True,
    )
    assert all(torch.equal(*pair) for pair in zip(caches, expected_caches))
    for b, length in enumerate(lengths):
        row = [x[b : b + 1, : length + n] for x in (q, *expected_caches)]
        row[0] = q[b : b + 1]
        exact = attention(*row, *limits(causal, window_size, Tq, S), softcap, 0.3)
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
