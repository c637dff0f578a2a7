"""`LaCTCache`: a sequence in pieces equals the whole one, for any split, batch, order and place."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lact_kernels.layers.cache
import lact_kernels.layers.contexts
from lact_kernels import LaCTCache, LaCTLayer
from tests.lact_layer_cases import CAUSAL, make_layer, oracle

T = 30
SPLITS = {
    "prefill-then-tokens": [18] + [1] * 12,
    "tokens": [1] * 30,
    "uneven": [0, 3, 12, 3, 0, 9, 3],
    "one-call": [30],
}


def read(layer, x, pieces, cache):
    with torch.no_grad():
        return torch.cat([layer(part, cache=cache) for part in x.split(pieces, dim=1)], dim=1)


def tensors(state):
    """All tensors of a state dict."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    return [x for y in state for x in tensors(y)] if isinstance(state, (tuple, *_VIEWS)) else []


_VIEWS = (list, type({}.values()))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("case", CAUSAL)
def test_any_split_equals_the_whole_sequence(case, split):
    layer, x = make_layer(case), torch.randn(2, T, 32, dtype=torch.float64)
    if case == "reduction" and min(split) == 1:
        split = [3 * n for n in split if n == 1] if split[0] == 1 else [18, 3, 3, 3, 3]
        split = split[: T // 3]
    actual = read(layer, x, split, LaCTCache())
    expected = torch.stack([oracle(layer, row) for row in x])
    assert (actual - expected).abs().max() < (1e-9 if "muon" in case else 1e-12)


@pytest.mark.parametrize(
    "backend, pieces",
    [("eager", [6] + [1] * 18), ("triton", [7, 1, 1, 6, 1, 1, 1])],
    ids=["eager", "triton"],
)
def test_three_chunks_token_by_token_in_float32(backend, pieces):
    """In the interpreter token by token around the ends of chunks: at 8 and 16."""
    layer, x = make_layer("paper", torch.float32, backend=backend), torch.randn(1, sum(pieces), 32)
    actual = read(layer, x, pieces, LaCTCache())
    assert (actual - layer(x)).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["paper", "paper-muon", "full-attention"])
def test_rows_of_different_lengths_go_on_together(case):
    """A left-padded prompt in two pieces, tokens one by one, then a right-padded piece."""
    layer = make_layer(case)
    x = torch.randn(3, T, 32, dtype=torch.float64)
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, :14] = 0  # this row has nothing in the first piece
    mask[2, 24:] = 0
    cache, outputs = LaCTCache(), []
    with torch.no_grad():
        for start, stop in ((0, 11), (11, 17), *((t, t + 1) for t in range(17, 22)), (22, T)):
            piece = slice(start, stop)
            outputs.append(layer(x[:, piece], mask[:, piece], cache))
    expected = torch.zeros_like(x)
    for n, exists in enumerate(mask.bool()):
        expected[n, exists] = oracle(layer, x[n, exists])
    assert (torch.cat(outputs, dim=1) - expected).abs().max() < 1e-9
    assert cache.layers[0].lengths == (23, 16, 24) and cache.get_seq_length() == T


def test_rows_that_came_to_the_same_place_in_different_turns():
    """Two padded turns after which both rows have read as much, then token by token into a full chunk."""
    layer, cache, outputs = make_layer("paper"), LaCTCache(), []
    x, mask = torch.randn(2, 16, 32, dtype=torch.float64), torch.ones(2, 16, dtype=torch.bool)
    mask[0, [0, 1]], mask[1, [4, 5]] = False, False
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 6), *((t, t + 1) for t in range(6, 16))):
            piece = slice(start, stop)
            outputs.append(layer(x[:, piece], mask[:, piece], cache))
    assert cache.layers[0].lengths == (14, 14)
    for row, exists, y in zip(x, mask, torch.cat(outputs, dim=1)):
        assert (y[exists] - oracle(layer, row[exists])).abs().max() < 1e-12


@pytest.mark.parametrize("change", ["nothing", "deepcopy", "reorder", "state_dict"])
def test_a_cache_of_inference_mode_goes_on_outside(change):
    """Nothing may be written to its tensors there, and autograd keeps none of them."""
    layer, x, cache = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64), LaCTCache()
    with torch.inference_mode():
        read(layer, x[:, :9], [8, 1], cache)
        if change == "reorder":
            cache.reorder_cache(torch.arange(2))
        elif change == "state_dict":
            cache = LaCTCache.from_state_dict(cache.state_dict())
        elif change == "deepcopy":
            cache = copy.deepcopy(cache)
    with torch.no_grad():
        pieces = [layer(x[:, 9:10], cache=cache)]
    pieces += [layer(part, cache=cache) for part in x[:, 10:].split([1, T - 11], dim=1)]
    torch.cat(pieces, dim=1).sum().backward()
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x)[:, 9:])


def test_full_attention_keeps_all_tokens_in_slots_that_grow(monkeypatch):
    monkeypatch.setattr(lact_kernels.layers.cache, "INITIAL_CAPACITY", 4)
    layer, x = make_layer("full-attention"), torch.randn(2, T, 32, dtype=torch.float64)
    cache = LaCTCache()
    for n, pieces in ((4, [3, 1]), (8, [1]), (32, [20, 1, 1, 3])):
        start = cache.get_seq_length()
        stop = start + sum(pieces)
        actual = read(layer, x[:, start:stop], pieces, cache)
        torch.testing.assert_close(actual, layer(x)[:, start:stop])
        assert cache.layers[0].kv.k.shape[1] == n


def test_a_long_window_takes_the_memory_of_its_tokens(monkeypatch):
    monkeypatch.setattr(lact_kernels.layers.cache, "INITIAL_CAPACITY", 4)
    monkeypatch.setattr(lact_kernels.layers.cache, "LONG_WINDOW", 8)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    for window_size, slots in ((2**62, (4, 8, 32)), (9, (4, 8, 9))):
        layer, cache, start = make_layer("paper", window_size=window_size), LaCTCache(), 0
        for n, pieces in zip(slots, ([3, 1], [1], [3, 1, 1, 7, 1])):
            stop = start + sum(pieces)
            actual = read(layer, x[:, start:stop], pieces, cache)
            torch.testing.assert_close(actual, layer(x)[:, start:stop])
            assert cache.layers[0].kv.k.shape[1] == n
            start = stop


def test_packed_tokens_of_all_rows_are_a_batch(monkeypatch):
    """They read the ring in place."""
    layer, x, cache = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64), LaCTCache()
    read(layer, x[:, : T - 1], [T - 1], cache)
    monkeypatch.delattr(lact_kernels.layers.contexts.CachedContext, "_window_attn_over_copies")
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32)
    with torch.no_grad():
        actual = layer(x[:, -1][None], cache=cache, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(actual[0], layer(x)[:, -1])


def test_packed_prompts_then_a_batch_of_tokens():
    layer = make_layer("paper")
    prompts = [torch.randn(n, 32, dtype=torch.float64) for n in (13, 0, 21)]
    more = torch.randn(3, 6, 32, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 13, 13, 34], dtype=torch.int32)
    cache = LaCTCache()
    with torch.no_grad():
        first = layer(torch.cat(prompts)[None], cache=cache, cu_seqlens=cu_seqlens)
    rest = read(layer, more, [1, 1, 4], cache)
    for n, (prompt, y) in enumerate(zip(prompts, first[0].split([13, 0, 21]))):
        expected = oracle(layer, torch.cat([prompt, more[n]]))
        torch.testing.assert_close(torch.cat([y, rest[n]]), expected)


def test_reordering_follows_the_beams():
    """Rows may be dropped, repeated and added, with chunks that are not full."""
    layer = make_layer("paper")
    x = torch.randn(3, T, 32, dtype=torch.float64)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[1, :5] = False
    cache = LaCTCache()
    layer(x[:, :13], mask, cache)
    rows = torch.tensor([1, 0, 1, 1])
    assert cache.reorder_cache(rows.int()) is cache
    more = torch.randn(4, 9, 32, dtype=torch.float64)
    actual = read(layer, more, [1] * 9, cache)
    for n, row in enumerate(rows.tolist()):
        expected = oracle(layer, torch.cat([x[row, :13][mask[row]], more[n]]))[-9:]
        torch.testing.assert_close(actual[n], expected)
    for bad, error, message in (
        (torch.tensor([4]), ValueError, r"rows of 0 .. 3, got \[4\]"),
        (torch.tensor([[0]]), ValueError, "beam_idx must have the shape"),
        ([0], TypeError, "beam_idx must be an int32 or int64 tensor"),
    ):
        with pytest.raises(error, match=message):
            cache.reorder_cache(bad)


def test_copies_and_saved_states_go_on_independently():
    layer, x = make_layer("paper-muon"), torch.randn(2, T, 32, dtype=torch.float64)
    cache = LaCTCache()
    expected = read(layer, x, [13, 17], cache.__class__())[:, 13:]
    read(layer, x[:, :13], [13], cache)
    copied, saved, file = copy.deepcopy(cache), cache.state_dict(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for other in (cache, copied):
        torch.testing.assert_close(read(layer, x[:, 13:], [1] * 17, other), expected)
    for state in (saved, saved, loaded):  # also after the cache itself went on
        other = LaCTCache.from_state_dict(state)
        torch.testing.assert_close(read(layer, x[:, 13:], [1] * 17, other), expected)


def test_a_cache_can_be_emptied_but_not_rewound():
    layer, x = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64)
    cache = LaCTCache()
    read(layer, x, [20, 10], cache)
    with pytest.raises(ValueError, match="0 tokens only.*max_length=29 of 30"):
        cache.crop(29)
    with pytest.raises(ValueError, match="max_length=-1"):
        cache.crop(-1)
    cache.crop(30)
    assert cache.get_seq_length() == cache.get_seq_length(0) == 30 and len(cache.layers) == 1
    cache.crop(0)
    assert cache.get_seq_length() == cache.get_seq_length(0) == 0 and not cache.layers
    row = x[:1]  # another batch size
    torch.testing.assert_close(read(layer, row, [10, 20], cache), layer(row))


def test_everything_moves_to_a_device():
    layer, x = make_layer("paper"), torch.randn(2, 13, 32, dtype=torch.float64)
    cache = LaCTCache()
    layer(x, cache=cache)
    assert len(tensors(cache.state_dict())) > 10
    assert cache.to("meta") is cache
    assert {x.device.type for x in tensors(cache.state_dict())} == {"meta"}
    with pytest.raises(ValueError, match="cache is on meta, and hidden_states on cpu"):
        layer(x, cache=cache)


class CountBytes(TorchDispatchMode):
    """The bytes that operations return."""

    def __init__(self):
        super().__init__()
        self.total = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.calls += 1
        self.total += sum(
            x.nbytes
            for x in (out if isinstance(out, (tuple, list)) else [out])
            if hasattr(x, "nbytes")
        )
        return out


def test_memory_and_work_per_token_do_not_depend_on_the_position():
    """Token 5 of a chunk, behind 2 and behind 52 chunks (at the same place of the ring)."""
    layer = make_layer("paper-muon", torch.float32)
    x = torch.randn(1, 8 * 52 + 8, 32)
    results = {}
    for chunks in (2, 52):
        cache = LaCTCache()
        read(layer, x[:, : 8 * chunks + 4], [8 * chunks, 4], cache)
        for position in (4, 5, 6, 7):
            token = x[:, 8 * chunks + position, None]
            with CountBytes() as count:
                read(layer, token, [1], cache)
            held = sum(t.nbytes for t in tensors(cache.state_dict()))
            results.setdefault(position, []).append((count.total, count.calls, held))
    for position, (early, late) in results.items():
        assert early == late, position


def test_no_gradient_flows_into_an_earlier_call():
    layer = make_layer("paper")
    x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 12, 32, dtype=torch.float64)
    cache = LaCTCache()
    layer(x[:, :18], cache=cache)
    (second,) = torch.autograd.grad(layer(x[:, 18:], cache=cache), x, dy)
    (whole,) = torch.autograd.grad(layer(x)[:, 18:], x, dy)
    assert not second[:, :18].any() and whole[:, :18].any()
    torch.testing.assert_close(second[:, 18:], whole[:, 18:])
    token = torch.randn(2, 1, 32, dtype=torch.float64, requires_grad=True)
    layer(token, cache=cache).sum().backward()
    assert token.grad.any()


def test_an_interrupted_call_leaves_a_cache_that_says_so(monkeypatch):
    layer, x = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64)
    cache = LaCTCache()
    layer(x[:, :8], cache=cache)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lact_kernels.layers.contexts, "block_causal_ttt", interrupt)
        layer(x[:, 8:], cache=cache)
    for use in (
        lambda: layer(x[:, 8:], cache=cache),
        lambda: cache.to("cpu"),
        cache.state_dict,
        lambda: cache.reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="left half-way"):
            use()
    cache.reset()
    torch.testing.assert_close(read(layer, x, [T], cache), layer(x))


def test_caches_that_do_not_fit():
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    cache = LaCTCache()
    make_layer("paper")(x, cache=cache)
    before = cache.state_dict()
    for layer, y, message in (
        (make_layer("paper"), x[:1], "cache has 2 rows, and hidden_states have 1"),
        (
            make_layer("full-attention"),
            x,
            "cache is of a layer of .*window_size=5.*window_size=None",
        ),
        (make_layer("paper", layer_idx=None), x, "give the layer one"),
        (make_layer("paper"), x[:0], "got B = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(y, cache=cache)
    with pytest.raises(TypeError, match="cache has keys of torch.float64, and those of .*bfloat16"):
        with torch.autocast("cpu", torch.bfloat16):
            make_layer("paper", torch.float32)(x.float(), cache=cache)
    assert list(map(torch.equal, tensors(before), tensors(cache.state_dict()))).count(False) == 0
    layer, cache = make_layer("reduction"), LaCTCache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="row 0 of cache has had 10 frames, no multiple"):
        layer(x, cache=cache)


def test_the_length_is_traced():
    """What every call of a model asks of a cache does not end a graph, nor make torch.compile warn."""
    layer, cache = LaCTLayer(32, 4, 2, layer_idx=0, window_size=6), LaCTCache()
    compiled = torch.compile(LaCTCache.get_seq_length, backend="eager", fullgraph=True)
    assert compiled(cache) == 0
    layer(torch.randn(1, 5, 32), cache=cache)
    assert compiled(cache) == 5
