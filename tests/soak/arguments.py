"""One wrong argument, drawn at random, is an error that names it: never another exception, never silence."""

import torch
from torch import Tensor

import lact_kernels
from lact_kernels import LaCTCache, LaCTLayer, RingKVCache, compat
from lact_kernels.ops.rms_norm_scale_add import rms_norm_scale_add
from lact_kernels.ops.silu_l2norm_rope import silu_l2norm_rope
from tests.cases import TTTCase
from tests.soak.draw import Draw, int32, kind

ERRORS = (TypeError, ValueError, NotImplementedError)


def attention(**more) -> dict:
    R = torch.randn
    return {"q": R(2, 6, 4, 8), "k": R(2, 6, 2, 8), "v": R(2, 6, 2, 8)} | more


def packed() -> dict:
    R = torch.randn
    return {"q": R(1, 6, 4, 8), "k": R(1, 6, 2, 8), "v": R(1, 6, 2, 8)}


def ttt(**more) -> dict:
    inputs = TTTCase("", B=2, T=6, momentum=True).inputs(torch.float32)
    return {name: x.detach() for name, x in inputs.items()} | more


def ring() -> RingKVCache:
    return RingKVCache(2, 4, 2, 8)


def layer() -> LaCTLayer:
    return LaCTLayer(16, 2, 1, window_size=3, lact_chunk_size=2, layer_idx=0)


FLASH = {"causal": False, "deterministic": False, "return_attn_probs": False}
FLASH |= {"dropout_p": 0.0, "softmax_scale": 0.5, "window_size": (3, 2), "softcap": 0.5}
BORDERS = {"cu_seqlens_q": int32([0, 2, 6]), "cu_seqlens_k": int32([0, 3, 6])}
BORDERS |= {"max_seqlen_q": 4, "max_seqlen_k": 3}
CALLS = {
    "window_attn": lambda: (
        lact_kernels.window_attn,
        attention(window_size=3, softmax_scale=0.5, return_lse=False, backend="eager"),
    ),
    "window_attn, packed": lambda: (
        lact_kernels.window_attn,
        packed() | {"window_size": 3, "cu_seqlens": int32([0, 2, 6])},
    ),
    "window_attn_with_kvcache": lambda: (
        lact_kernels.window_attn_with_kvcache,
        {"q": torch.randn(2, 2, 4, 8), "k_cache": torch.randn(2, 6, 2, 8)}
        | {"v_cache": torch.randn(2, 6, 2, 8), "window_size": 3, "cache_seqlens": int32([6, 3])}
        | {"softmax_scale": 0.5, "return_lse": True, "backend": "auto"},
    ),
    "RingKVCache": lambda: (
        lambda **x: RingKVCache(**x),
        {"batch_size": 2, "window_size": 4, "num_kv_heads": 2, "head_dim": 8, "head_dim_v": 8}
        | {"max_queries": 2},
    ),
    "RingKVCache.append": lambda: (
        ring().append,
        {"k": torch.randn(2, 3, 2, 8), "v": torch.randn(2, 3, 2, 8), "lengths": int32([1, 3])},
    ),
    "RingKVCache.window_attn": lambda: (
        ring().window_attn,
        {"q": torch.randn(2, 1, 4, 8), "softmax_scale": 1.0, "return_lse": False},
    ),
    "block_causal_ttt": lambda: (
        lact_kernels.block_causal_ttt,
        ttt(chunk_size=4, muon=False, prenorm=True, return_state=False, checkpoint_interval=1)
        | {"backend": "eager"},
    ),
    "block_causal_ttt, packed": lambda: (
        lact_kernels.block_causal_ttt,
        {n: x[:1] if x.ndim == 4 or n[0] in "lm" else x for n, x in ttt().items()}
        | {"chunk_size": 4, "cu_seqlens": int32([0, 2, 6])},
    ),
    "ttt_apply": lambda: (
        lact_kernels.ttt_apply,
        {"q": torch.randn(2, 5, 2, 6), "w0": torch.randn(2, 7, 6), "w1": torch.randn(2, 4, 7)}
        | {"w2": torch.randn(2, 7, 6), "backend": "eager"},
    ),
    "flash_attn_func": lambda: (compat.flash_attn_func, attention(**FLASH)),
    "flash_attn_kvpacked_func": lambda: (
        compat.flash_attn_kvpacked_func,
        {"q": torch.randn(2, 6, 4, 8), "kv": torch.randn(2, 6, 2, 2, 8)} | FLASH,
    ),
    "flash_attn_qkvpacked_func": lambda: (
        compat.flash_attn_qkvpacked_func,
        {"qkv": torch.randn(2, 5, 3, 4, 8)} | FLASH,
    ),
    "flash_attn_varlen_func": lambda: (
        compat.flash_attn_varlen_func,
        {name: x[0] for name, x in packed().items()} | BORDERS | FLASH,
    ),
    "flash_attn_varlen_kvpacked_func": lambda: (
        compat.flash_attn_varlen_kvpacked_func,
        {"q": torch.randn(6, 4, 8), "kv": torch.randn(6, 2, 2, 8)} | BORDERS | FLASH,
    ),
    "flash_attn_varlen_qkvpacked_func": lambda: (
        compat.flash_attn_varlen_qkvpacked_func,
        {"qkv": torch.randn(6, 3, 4, 8), "cu_seqlens": int32([0, 2, 6]), "max_seqlen": 4} | FLASH,
    ),
    "flash_attn_with_kvcache": lambda: (
        compat.flash_attn_with_kvcache,
        {"q": torch.randn(2, 2, 4, 8), "k_cache": torch.randn(2, 6, 2, 8)}
        | {"v_cache": torch.randn(2, 6, 2, 8), "k": torch.randn(2, 2, 2, 8)}
        | {"v": torch.randn(2, 2, 2, 8), "cache_seqlens": int32([4, 3]), "causal": True}
        | {"window_size": (3, 0), "softmax_scale": 0.5, "return_softmax_lse": False}
        | {"softcap": 0.5},
    ),
    "block_causal_lact_swiglu": lambda: (
        compat.block_causal_lact_swiglu,
        {"w0": torch.randn(4, 7, 6), "w1": torch.randn(4, 5, 7), "w2": torch.randn(4, 7, 6)}
        | {"q": torch.randn(4, 9, 6), "k": torch.randn(4, 9, 6), "v": torch.randn(4, 9, 5)}
        | {name: torch.rand(4, 9, 1) for name in ("lr0", "lr1", "lr2", "momentum")}
        | {"chunk_size": 4, "use_muon": False},
    ),
    "silu_l2norm_rope": lambda: (
        silu_l2norm_rope,
        {"qkv": torch.randn(2, 5, 48)}
        | {"qk_scale": torch.randn(16, 2), "qk_offset": torch.randn(16, 2)}
        | {"cos": torch.randn(1, 5, 4), "sin": torch.randn(1, 5, 4)}
        | {"num_attn_heads": 2, "num_lact_heads": 1, "silu": True, "silu_v": True}
        | {"rotate_fast": True},
    ),
    "rms_norm_scale_add": lambda: (
        rms_norm_scale_add,
        {"attn": torch.randn(2, 5, 2, 8), "ttt": torch.randn(2, 5, 1, 16)}
        | {"norm_weight": torch.randn(16), "scale": torch.randn(2, 5, 1), "eps": 1e-5},
    ),
    "LaCTLayer": lambda: (
        LaCTLayer,
        {"hidden_size": 16, "num_attn_heads": 2, "num_lact_heads": 1, "inter_multi": 1.0}
        | {"window_size": 3, "lact_chunk_size": 2, "qkv_bias": False, "attn_qk_norm": True}
        | {"use_muon": False, "ttt_nope": False, "rope_theta": 100.0, "layer_idx": 0}
        | {"max_position_embeddings": 100, "w0_w2_low_rank": 2, "fw_init_gain": 0.5}
        | {"use_momentum": True, "temporal_reduction": 1, "use_fused_kernel": False}
        | {"fp32_states": False, "backend": "auto"},
    ),
    "LaCTLayer.forward": lambda: (
        layer(),
        {"hidden_states": torch.randn(2, 6, 16), "cache": LaCTCache()}
        | {"attention_mask": torch.ones(2, 6, dtype=torch.bool)},
    ),
    "LaCTLayer.forward, packed": lambda: (
        layer(),
        {"hidden_states": torch.randn(1, 6, 16), "cu_seqlens": int32([0, 2, 6])},
    ),
}
# Arguments of no effect.
WITHOUT_EFFECT = {"max_position_embeddings", "use_fused_kernel", "fp32_states"}
# What is no mistake, by the call's name up to a comma: an option may be left out, the values have as many
# channels as they like, dtypes are cast.
RIGHT = {
    ("window_attn", "softmax_scale", "None"),
    ("window_attn", "v", "a wider last axis"),
    ("window_attn_with_kvcache", "softmax_scale", "None"),
    ("window_attn_with_kvcache", "v_cache", "a wider last axis"),
    ("window_attn_with_kvcache", "cache_seqlens", "too large"),  # a ring
    ("RingKVCache.window_attn", "softmax_scale", "None"),
    *((x, "softmax_scale", "None") for x in CALLS if x.startswith("flash_attn")),
    *((f"flash_attn_{x}func", "v", "a wider last axis") for x in ("", "varlen_")),
    *(
        (f"flash_attn_{x}qkvpacked_func", "qkv", y)
        for x in ("", "varlen_")
        for y in ("a wider last axis", "float64", "half")
    ),
    *(("flash_attn_qkvpacked_func", "qkv", x) for x in ("another first axis", "on meta")),
    *(
        (x, "cache_seqlens", axes)
        for x in ("window_attn_with_kvcache", "flash_attn_with_kvcache")
        for axes in ("no axis", "one axis less")
    ),
    *(("block_causal_lact_swiglu", x, "half") for x in ("w0", "w1", "w2", "q", "k", "v")),
    *(
        ("block_causal_lact_swiglu", x, dtype)
        for x in ("lr0", "lr1", "lr2", "momentum")
        for dtype in ("half", "float64")
    ),
    *(("ttt_apply", "q", x) for x in ("half", "another first axis")),
    ("silu_l2norm_rope", "qkv", "another first axis"),  # cos and sin are those of every row
    *(("silu_l2norm_rope", x, y) for x in ("qk_scale", "qk_offset") for y in ("half", "float64")),
    *(("rms_norm_scale_add", "norm_weight", x) for x in ("half", "float64")),
    ("LaCTLayer.forward", "hidden_states", "another first axis"),
    ("LaCTLayer.forward", "attention_mask", "another dtype"),
    ("LaCTLayer", "layer_idx", "None"),
}


def wrong(draw: Draw, value):
    """Something that cannot be right in the place of this, and what it is."""
    if isinstance(value, Tensor):
        return wrong_tensor(draw, value)
    wrongs = {
        bool: (None, 1, 0.0, "yes", [True]),
        int: ("1", 1.5, float("nan"), [1], torch.randn(2), True),
        float: ("1", float("nan"), float("inf"), None, [1.0], True, torch.randn(2), 1j),
        str: ("gpu", 1, None, "", ["eager"]),
        tuple: (3, (3,), (3, 0.5), (None, 0), "30", None, (1, 2, 3), ("a", 0)),
        LaCTCache: ({}, 1, "cache", torch.ones(1)),
    }[type(value)]
    new = draw.choice(wrongs)
    return new, repr(new)


def wrong_tensor(draw: Draw, x: Tensor):
    floating = x.is_floating_point()
    makers = {
        "a list": lambda: x.tolist(),
        "a number": lambda: 1.0,
        "a string": lambda: "x",
        "NumPy": lambda: x.numpy(),
        "on meta": lambda: x.to("meta"),
        "complex": lambda: x.to(torch.complex64),
        "another dtype": lambda: x.to(torch.int64 if floating else torch.float32),
        "one axis more": lambda: x[None],
        "one axis less": lambda: x[0],
        "no axis": lambda: x.flatten()[0],
        "sparse": lambda: x.to_sparse(),
    }
    if floating:
        makers["float64"] = lambda: x.double()
        makers["half"] = lambda: x.half()
        makers["an empty last axis"] = lambda: x[..., :0]
        makers["a wider last axis"] = lambda: torch.cat([x, x], dim=-1)
    if floating and x.ndim > 1:
        makers["another first axis"] = lambda: torch.cat([x, x, x])
    if x.dtype == torch.int32:
        makers["negative"] = lambda: x - 100
        makers["too large"] = lambda: x + 100
        makers["longer"] = lambda: torch.cat([x, x, x])
    how = draw.choice(list(makers))
    return makers[how](), how


@kind(30)
def wrong_argument(draw: Draw) -> None:
    name = draw.choice(list(CALLS))
    fn, arguments = CALLS[name]()
    argument = draw.choice([x for x in arguments if x not in WITHOUT_EFFECT])
    value, what = wrong(draw, arguments[argument])
    draw.note(call=name, argument=argument, wrong=what)
    if (name.split(",")[0], argument, what) in RIGHT:
        return
    try:
        fn(**arguments | {argument: value})
    except ERRORS as error:
        others = [x for x in arguments if x in str(error)]
        # Sizes are those of the first tensors: with others, it is the next ones that do not fit.
        assert argument in str(error) or (isinstance(value, Tensor) and others), (
            f"the message does not name it: {type(error).__name__}: {error}"
        )
        return
    raise AssertionError("no error")
