"""flash-attn's functions in one way: their signatures, calls of each, and what they have to compute."""

import inspect

import torch
from torch import Tensor

from lact_kernels.compat import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

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


def required(*names: str) -> dict:
    return dict.fromkeys(names, REQUIRED)


BORDERS = required("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SIGNATURES = {  # those of flash-attn 2.8.3
    flash_attn_func: required("q", "k", "v") | OPTIONS,
    flash_attn_kvpacked_func: required("q", "kv") | OPTIONS,
    flash_attn_qkvpacked_func: required("qkv") | OPTIONS,
    flash_attn_varlen_func: required("q", "k", "v") | BORDERS | OPTIONS | {"block_table": None},
    flash_attn_varlen_kvpacked_func: required("q", "kv") | BORDERS | OPTIONS,
    flash_attn_varlen_qkvpacked_func: required("qkv", "cu_seqlens", "max_seqlen") | OPTIONS,
    flash_attn_with_kvcache: required("q", "k_cache", "v_cache")
    | dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"))
    | dict.fromkeys(("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale"))
    | {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True}
    | {"alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False},
}
FUNCTIONS = {fn.__name__: fn for fn in SIGNATURES}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def base(name: str) -> dict:
    """A call of each function that works, in float32."""
    q, kv, qkv = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 2, 8), torch.randn(2, 5, 3, 4, 8)
    options = {"causal": True}
    if name == "flash_attn_with_kvcache":
        k_cache, v_cache = kv.unbind(2)
        k, v = torch.randn(2, 2, 3, 2, 8)
        caches = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        return {"q": q} | caches | {"cache_seqlens": int32(4, 2)} | options
    if "varlen" in name:
        q, kv, qkv = (x.flatten(0, 1) for x in (q, kv, qkv))
        if name == "flash_attn_varlen_qkvpacked_func":
            options |= {"cu_seqlens": int32(0, 4, 10), "max_seqlen": 6}
        else:
            options |= {"cu_seqlens_q": int32(0, 4, 10), "cu_seqlens_k": int32(0, 8, 14)}
            options |= {"max_seqlen_q": 6, "max_seqlen_k": 8}
    if "_qkvpacked" in name:
        return {"qkv": qkv} | options
    if "_kvpacked" in name:
        return {"q": q, "kv": kv} | options
    return {"q": q, "k": kv.select(-3, 0), "v": kv.select(-3, 1)} | options


# Each takes q, k and v as batches, and returns outputs and lse of the batch.


def with_lse(fn, *args, **options):
    o, lse, probs = fn(*args, **options, return_attn_probs=True)
    assert probs.shape == (0,) and probs.dtype == o.dtype
    return o, lse


def packed(fn, borders_of, *tensors, **options):
    """The same of sequences laid end to end."""
    lengths = [x.shape[1] for x in borders_of]
    borders = [int32(*(n * T for n in range(len(borders_of[0]) + 1))) for T in lengths]
    B, Tq = tensors[0].shape[:2]
    tokens = (x.flatten(0, 1) for x in tensors)
    o, lse = with_lse(fn, *tokens, *borders, *lengths, **options)
    return o.unflatten(0, (B, Tq)), lse.unflatten(1, (B, Tq)).transpose(0, 1)


def dense(q, k, v, **options):
    return with_lse(flash_attn_func, q, k, v, **options)


def kvpacked(q, k, v, **options):
    return with_lse(flash_attn_kvpacked_func, q, torch.stack((k, v), dim=2), **options)


def qkvpacked(q, k, v, **options):
    return with_lse(flash_attn_qkvpacked_func, torch.stack((q, k, v), dim=2), **options)


def varlen(q, k, v, **options):
    return packed(flash_attn_varlen_func, (q, k), q, k, v, **options)


def varlen_kvpacked(q, k, v, **options):
    kv = torch.stack((k, v), dim=2)
    return packed(flash_attn_varlen_kvpacked_func, (q, kv), q, kv, **options)


def varlen_qkvpacked(q, k, v, **options):
    qkv = torch.stack((q, k, v), dim=2)
    return packed(flash_attn_varlen_qkvpacked_func, (qkv,), qkv, **options)


def kvcache(q, k, v, **options):
    return flash_attn_with_kvcache(q, k, v, **options, return_softmax_lse=True)


def kvcache_of_new_tokens(q, k, v, **options):
    caches = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    options = options | {"cache_seqlens": 0, "return_softmax_lse": True}
    return flash_attn_with_kvcache(q, *caches, k, v, **options)


CALLS = {
    fn.__name__: fn
    for fn in (dense, kvpacked, qkvpacked, varlen, varlen_kvpacked, varlen_qkvpacked)
    + (kvcache, kvcache_of_new_tokens)
}
SELF_ATTENTION = {"qkvpacked", "varlen_qkvpacked"}  # as many queries as keys
WITHOUT_BACKWARD = {"kvcache", "kvcache_of_new_tokens"}


def limits(causal: bool, window_size: tuple[int, int], Tq: int, most_keys: int) -> tuple[int, int]:
    """How far a query sees to the left and to the right, in the order of flash-attn's launcher.

    `Tq` is the most queries, and `most_keys` the most keys of a sequence, or the slots of a cache.
    """
    left, right = (side if side < most_keys else -1 for side in window_size)
    if causal and Tq != 1:
        right = 0
    if left < 0 and right < 0:
        return -1, -1
    return left if left >= 0 else most_keys, right if right >= 0 else most_keys


def attention(q, k, v, left, right, softcap=0.0, softmax_scale=None):
    """Outputs and lse by the rule of flash-attn's own tests: scale, cap, mask, softmax, 0 where blind."""
    (Tq, D), Tk = q.shape[1::2], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (softmax_scale or D**-0.5)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(Tk) - torch.arange(Tk - Tq, Tk)[:, None]  # from the query to the key
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if left >= 0 or right >= 0:
        seen = (distance >= -left) & (distance <= right)
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(dim=-1)
    weights = torch.where(seen, torch.exp(scores - lse.masked_fill(~seen.any(-1), 0)[..., None]), 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse
