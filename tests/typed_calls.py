"""What a user writes, for `test_types.py`: it is type-checked and never run.

A call that has to be refused is marked `type: ignore` with the error expected there. A mark without an error
is an error itself.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import lact_kernels
from lact_kernels import (
    LaCTCache,
    LaCTLayer,
    NewtonSchulz,
    RingKVCache,
    TTTPlan,
    TTTState,
    TTTTokens,
    block_causal_ttt,
    compat,
    distributed,
    ttt_apply,
    window_attn,
    window_attn_with_kvcache,
)
from lact_kernels.compat.lact import LaCTSWIGLULayer
from lact_kernels.distributed import SequencePieces

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Stateful = tuple[Tensor, TTTState]


def attention(q: Tensor, k: Tensor, v: Tensor, flag: bool, name: str) -> Tensor:
    assert_type(window_attn(q, k, v, 4), Tensor)
    assert_type(window_attn(q, k, v, (3, 0), return_lse=False, backend="eager"), Tensor)
    assert_type(window_attn(q, k, v, softmax_scale=1, cu_seqlens=None, return_lse=True), Two)
    assert_type(window_attn(q, k, v, 4, return_lse=flag), Tensor | Two)
    assert_type(window_attn(q, k, v, (-1, 3), softcap=30.0, sinks=q, return_lse=True), Two)
    o: Tensor = window_attn(q, k, v, 4)
    o, lse = window_attn(q, k, v, 4, return_lse=True)
    assert_type((o, lse), Two)
    window_attn(q, k, v, 4, backend="cuda")  # type: ignore[call-overload]
    window_attn(q, k, v, 4, backend=name)  # type: ignore[call-overload]
    window_attn(q, k, v, 4.0)  # type: ignore[call-overload]
    window_attn(q, k, v, sinks=1.0)  # type: ignore[call-overload]
    window_attn(q, k, v, 4, None)  # type: ignore[call-overload]
    window_attn(q, k, v, 4, sliding_window=4)  # type: ignore[call-overload]
    o.backwards()  # type: ignore[attr-defined]
    return window_attn(q, k, v, 4, return_lse=True)  # type: ignore[return-value]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, flag: bool) -> None:
    assert_type(window_attn_with_kvcache(q, k, v, 4, cache_seqlens=5), Tensor)
    assert_type(window_attn_with_kvcache(q, k, v, (3, 0), backend="triton"), Tensor)
    assert_type(window_attn_with_kvcache(q, k, v, cache_seqlens=q, return_lse=True), Two)
    assert_type(window_attn_with_kvcache(q, k, v, return_lse=flag), Tensor | Two)
    assert_type(window_attn_with_kvcache(q, k, v, (3, -1), softcap=30.0, sinks=q), Tensor)
    window_attn_with_kvcache(q, k, v, backend="cuda")  # type: ignore[call-overload]

    cache = RingKVCache(1, 4, 2, 8, max_queries=2, dtype=torch.bfloat16, device="cuda")
    cache.append(k, v)
    assert_type(cache.window_attn(q), Tensor)
    assert_type(cache.window_attn(q, softmax_scale=1.0, return_lse=True), Two)
    assert_type(cache.window_attn(q, return_lse=flag, backend="eager"), Tensor | Two)
    assert_type(cache.view(), Two)
    assert_type(cache.to("cpu"), RingKVCache)
    assert_type(cache.k, Tensor)
    assert_type(cache.seqlens, Tensor)
    assert_type(cache.max_seqlen, int)
    cache.window_attn(q, window_size=4)  # type: ignore[call-overload]
    assert_type(RingKVCache(1, (3, -1), 2, 8).window_attn(q, softcap=30.0, sinks=q), Tensor)
    RingKVCache(1, None, 2, 8)  # type: ignore[arg-type]


def fast_weights(x: Tensor, w: Tensor, lr: Tensor, flag: bool) -> Tensor:
    tokens, weights, rates = (x, x, x), (w, w, w), (lr, lr, lr)
    assert_type(block_causal_ttt(x, x, x, w, w, w, lr, lr, lr), Tensor)
    assert_type(block_causal_ttt(*tokens, *weights, *rates, chunk_size=16, muon=True), Tensor)
    o, state = block_causal_ttt(*tokens, *weights, *rates, return_state=True)
    o = block_causal_ttt(*tokens, *weights, *rates, initial_state=state, prenorm=True)
    o = block_causal_ttt(*tokens, *weights, *rates, momentum=lr, cu_seqlens=x, backend="eager")
    assert_type((o, state), Stateful)
    assert_type(block_causal_ttt(*tokens, *weights, *rates, return_state=flag), Tensor | Stateful)
    block_causal_ttt(*tokens, *weights, *rates, backend="cuda")  # type: ignore[call-overload]
    block_causal_ttt(*tokens, *weights, *rates, initial_state=o)  # type: ignore[call-overload]
    block_causal_ttt(*tokens, *weights)  # type: ignore[call-overload]

    assert_type(ttt_apply(x, *weights, backend="eager"), Tensor)
    ttt_apply(x, *weights, backend="cuda")  # type: ignore[arg-type]
    ttt_apply(x, w, w, "eager")  # type: ignore[arg-type]

    assert_type(state.map(torch.Tensor.detach), TTTState)
    assert_type(state.entry(0), TTTState)
    assert_type(TTTState.stack([state, state]), TTTState)
    assert_type(state.weights, tuple[Tensor, ...])
    assert_type(state.pending, tuple[TTTTokens, ...])
    assert_type(state.pending_lengths, tuple[int, ...])
    return block_causal_ttt(*tokens, *weights, *rates, return_state=True)  # type: ignore[return-value]


def layer(x: Tensor) -> None:
    mixer = LaCTLayer(64, 2, 1, window_size=None, layer_idx=0, backend="eager", device="cpu")
    cache = LaCTCache()
    assert_type(mixer.forward(x, cache=cache), Tensor)
    assert_type(mixer.window_size, int | tuple[int, int] | None)
    assert_type(mixer.w1, torch.nn.Parameter)
    assert_type(mixer.backend, Literal["auto", "triton", "eager"])
    assert_type(cache.get_seq_length(), int)
    assert_type(cache.reorder_cache(x), LaCTCache)
    assert_type(LaCTCache.from_state_dict(cache.state_dict()), LaCTCache)
    mixer.forward(x, cahce=cache)  # type: ignore[call-arg]
    LaCTLayer(64, 2, 1, backend="cuda")  # type: ignore[arg-type]
    LaCTLayer(64, 2, 1, ttt_loss_type="mse")  # type: ignore[arg-type]


def several_devices(mesh: DeviceMesh, x: Tensor, w: Tensor, lr: Tensor, flag: bool) -> None:
    pieces = SequencePieces.even(mesh, 64, multiple_of=2)
    assert_type(pieces, SequencePieces)
    assert_type(SequencePieces.of(mesh, 8, None), SequencePieces)
    assert_type(SequencePieces.of_chunks(mesh, 64, 16), SequencePieces)
    assert_type(pieces.cu_seqlens, Tensor | None)
    assert_type(pieces.positions("cpu"), Tensor)
    assert_type(pieces.gather(pieces.take(x)), Tensor)
    assert_type(LaCTLayer(64, 2, 1).forward(x, pieces=pieces), Tensor)
    SequencePieces.even(mesh, "64")  # type: ignore[arg-type]

    assert_type(distributed.window_attn(x, x, x, 4, pieces=pieces), Tensor)
    assert_type(distributed.window_attn(x, x, x, pieces=pieces, return_lse=True), Two)
    assert_type(distributed.window_attn(x, x, x, pieces=pieces, return_lse=flag), Tensor | Two)
    distributed.window_attn(x, x, x, 4)  # type: ignore[call-overload]
    distributed.window_attn(x, x, x, pieces=pieces, backend="cuda")  # type: ignore[call-overload]

    ttt = distributed.block_causal_ttt
    tensors = (x, x, x, w, w, w, lr, lr, lr)
    assert_type(ttt(*tensors, pieces=pieces, scheme="within_chunks"), Tensor)
    assert_type(ttt(*tensors, pieces=pieces, return_state=True), Stateful)
    assert_type(ttt(*tensors, pieces=pieces, return_state=flag), Tensor | Stateful)
    ttt(*tensors, pieces=pieces, scheme="across")  # type: ignore[call-overload]

    plan = TTTPlan.bidirectional(64).shard(queries=(0, 32), keys=(0, 32))
    assert_type(plan, TTTPlan)
    untrained = (x, x, x, w, w, w, None, lr, None, plan)
    assert_type(distributed.ttt(*tensors, plan, group=mesh, muon=NewtonSchulz(())), Tensor)
    assert_type(distributed.ttt(*untrained, group=mesh, return_state=True), Stateful)
    assert_type(distributed.ttt(*tensors, plan, group=mesh, return_state=flag), Tensor | Stateful)
    distributed.ttt(*tensors, plan)  # type: ignore[call-overload]
    distributed.ttt(*tensors, [plan], group=mesh)  # type: ignore[call-overload]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, flag: bool) -> None:
    attn = compat.flash_attn_func
    assert_type(attn(q, k, v, 0.0, None, True, (3, 0)), Tensor)
    assert_type(attn(q, k, v, causal=True, return_attn_probs=False), Tensor)
    assert_type(attn(q, k, v, causal=True, return_attn_probs=True, backend="eager"), Three)
    assert_type(attn(q, k, v, causal=True, return_attn_probs=flag), Tensor | Three)
    assert_type(attn(q, k, v, 0.0, None, True, (3, 0), 0.0, None, False, flag), Tensor | Three)
    attn(q, k, v, causal=True, backend="cuda")  # type: ignore[call-overload]
    attn(q, k, v, causal=True, window_size=4)  # type: ignore[call-overload]

    assert_type(attn(q, k, v, window_size=(-1, 4), softcap=30.0), Tensor)

    packed = compat.flash_attn_qkvpacked_func
    assert_type(packed(q, causal=True), Tensor)
    assert_type(packed(q, causal=True, return_attn_probs=True), Three)
    assert_type(packed(q, causal=True, return_attn_probs=flag), Tensor | Three)
    kvpacked = compat.flash_attn_kvpacked_func
    assert_type(kvpacked(q, k, 0.0, None, False, (3, 3), 30.0), Tensor)
    assert_type(kvpacked(q, k, return_attn_probs=True), Three)
    assert_type(kvpacked(q, k, return_attn_probs=flag), Tensor | Three)
    kvpacked(q, k, v)  # type: ignore[call-overload]

    varlen = compat.flash_attn_varlen_func
    assert_type(varlen(q, k, v, lengths, lengths, 8, 8, causal=True, block_table=None), Tensor)
    assert_type(varlen(q, k, v, lengths, lengths, 8, 8, return_attn_probs=True), Three)
    assert_type(varlen(q, k, v, lengths, lengths, 8, 8, return_attn_probs=flag), Tensor | Three)
    varlen_kv = compat.flash_attn_varlen_kvpacked_func
    assert_type(varlen_kv(q, k, lengths, lengths, 8, lengths.max(), 0.0, None, True), Tensor)
    assert_type(varlen_kv(q, k, lengths, lengths, 8, 8, return_attn_probs=True), Three)
    assert_type(varlen_kv(q, k, lengths, lengths, 8, 8, return_attn_probs=flag), Tensor | Three)
    varlen_packed = compat.flash_attn_varlen_qkvpacked_func
    assert_type(varlen_packed(q, lengths, lengths.max(), window_size=(3, 3)), Tensor)
    assert_type(varlen_packed(q, lengths, 8, return_attn_probs=True), Three)
    assert_type(varlen_packed(q, lengths, 8, return_attn_probs=flag), Tensor | Three)
    varlen_packed(q, lengths)  # type: ignore[call-overload]

    cached = compat.flash_attn_with_kvcache
    assert_type(cached(q, k, v, cache_seqlens=lengths, causal=True), Tensor)
    assert_type(cached(q, k, v, k, v, cache_seqlens=3, return_softmax_lse=True), Two)
    assert_type(cached(q, k, v, return_softmax_lse=flag), Tensor | Two)
    cached(q, k, v, return_softmax_lse=1)  # type: ignore[call-overload]


def lact(model: torch.nn.Module, x: Tensor, w: Tensor, lr: Tensor) -> None:
    ttt = compat.block_causal_lact_swiglu
    assert_type(ttt(w, w, w, x, x, x, lr, lr, lr, 16, True, None), Tensor)
    ttt(w, w, w, x, x, x, lr, lr, lr, backend="cuda")  # type: ignore[arg-type]
    prenorm = compat.prenorm_block_causal_lact_swiglu
    assert_type(prenorm(w, w, w, x, x, x, lr, lr, lr, momentum=lr, backend="triton"), Tensor)
    assert_type(compat.swap_lact_layers(model, backend="auto"), dict[str, torch.nn.Module])
    compat.swap_lact_layers(model, backend="cuda")  # type: ignore[arg-type]
    result = LaCTSWIGLULayer(64, 2, 1).forward(x, past_key_values=LaCTCache())
    assert_type(result, tuple[Tensor, None, LaCTCache | None])


def family(x: Tensor, w: Tensor, lr: Tensor) -> None:
    Four = tuple[Tensor, Tensor, Tensor, Tensor]
    tensors = (w, w, w, x, x, x, lr, lr, lr)
    views = compat.lact.fast_weight_swish_glu_weight_norm_mini_batch_apply
    order = [compat.lact.TTTOperator(0, -1, True, True)]
    assert_type(views(*tensors, order, 5), Four)
    views(*tensors, order, backend="cuda")  # type: ignore[arg-type]
    video = compat.lact.ar_fast_weight_swish_glu_weight_norm_mini_batch
    assert_type(video(*tensors, 1.0, mini_batch_size=4), Four)
    piece = compat.lact.ar_fast_weight_swish_glu_weight_norm_mini_batch_inference
    assert_type(piece(*tensors, 1.0, do_update=True), Four)
    assert_type(compat.lact.bidirectional_lact_swiglu(*tensors, False), Tensor)
    layer = compat.lact.FastWeightGluMLPMultihead(64, 32)
    assert_type(layer.forward(x, {"ttt_op_order": order}), tuple[Tensor, dict[str, Tensor]])


def plans(x: Tensor, w: Tensor, lr: Tensor, flag: bool) -> None:
    ttt, plan = lact_kernels.ttt, lact_kernels.TTTPlan([lact_kernels.Update(0, 4)])
    assert_type(ttt(x, x, x, w, w, w, None, lr, None, plan, muon=True), Tensor)
    ttt(x, x, x, w, w, w, lr, lr, lr, [lact_kernels.Update(0, 4)])  # type: ignore[list-item]
    result = ttt(x, x, x, w, w, w, lr, lr, lr, [plan], return_state=flag)
    assert_type(result, Tensor | tuple[Tensor, lact_kernels.TTTState])
    _, state = lact_kernels.ttt_update(x, x, w, w, w, lr, lr, lr, return_state=True)
    assert_type(state, lact_kernels.TTTState)


assert_type(lact_kernels.__version__, str)
