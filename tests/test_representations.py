"""What is printed of states and caches is one line, for which no device is read."""

import torch

from lact_kernels import LaCTCache, LaCTLayer, RingKVCache, block_causal_ttt
from tests.cases import TTTCase


def test_states():
    inputs = TTTCase("", B=1, T=6, momentum=True).inputs(torch.float32)
    borders = torch.tensor([0, 5, 6], dtype=torch.int32)
    _, state = block_causal_ttt(**inputs, chunk_size=4, cu_seqlens=borders, return_state=True)
    assert repr(state) == (
        "TTTState(w0 [2, 2, 7, 5], w1 [2, 2, 6, 7], w2 [2, 2, 7, 5], torch.float32 on cpu,"
        " chunk_size=4, muon=False, prenorm=False, momentum given, 1 tokens of torch.float32 pending)"
    )
    _, state = block_causal_ttt(**inputs, chunk_size=8, cu_seqlens=borders, return_state=True)
    assert repr(state).endswith("1 to 5 tokens of torch.float32 pending)")
    assert repr(state.pending[0]) == (
        "TTTTokens(k [2, 5, 2, 5], v [2, 5, 2, 6], 1 to 5 tokens, torch.float32 on cpu)"
    )


def test_caches():
    ring = RingKVCache(3, 4, 2, 8, head_dim_v=6, max_queries=2, dtype=torch.float16, device="meta")
    ring.max_seqlen = 7
    assert repr(ring) == (
        "RingKVCache(k [3, 5, 2, 8], v [3, 5, 2, 6], torch.float16 on meta, window_size=4,"
        " max_queries=2, at most 7 tokens in a row)"
    )
    cache = LaCTCache()
    assert repr(cache) == "LaCTCache(0 layers, 0 tokens)"
    for i, window in enumerate((6, None)):
        layer = LaCTLayer(32, 4, 2, window_size=window, layer_idx=i, device="meta")
        with torch.no_grad():
            layer(torch.empty(2, 9, 32, device="meta"), cache=cache)
    assert repr(cache) == (
        "LaCTCache(2 layers, 9 tokens, 2 rows, window_size=6 and None, torch.float32 on meta)"
    )
