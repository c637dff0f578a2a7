"""The signatures of others: flash-attn's, the LaCT authors', and the attention of `transformers`."""

import functools

import torch

import reference
from lact_kernels import compat
from lact_kernels.core.offsets import cu_seqlens_of
from tests.flash_attn_cases import limits
from tests.soak.attention import SIZES, heads, scale
from tests.soak.bar import hold, hold_gradients
from tests.soak.draw import Draw, int32, kind
from tests.test_compat_lact import by_heads, make
from tests.test_compat_lact_family import TRIPLE, by_reference
from tests.test_compat_lact_family import make as make_family


def draw_window(draw: Draw, keys: int) -> dict:
    """flash-attn's options of windows and scores; sides are of either sign, and up to beyond the keys."""
    left, right = (draw.choice((-1, -2, 0, 1, draw.randint(0, keys + 3))) for _ in range(2))
    options = {"causal": draw.chance(0.5), "window_size": (left, right)}
    return options | {"softmax_scale": scale(draw), "softcap": draw.choice((0.0, -1.0, 0.5, 20.0))}


def as_reference(options: dict, Tq: int, most_keys: int) -> dict:
    """The same for `reference.window_attn`."""
    sides = limits(options["causal"], options["window_size"], Tq, most_keys)
    cap = options["softcap"]
    scores = {"softmax_scale": options["softmax_scale"], "softcap": cap if cap > 0 else None}
    return {"window_size": sides, "return_lse": True} | scores


@kind(8)
def flash_attn(draw: Draw) -> None:
    """Dense and packed end to end, with other lengths of queries than of keys, of one tensor or more."""
    backend, dtype = draw.backend(0.1)
    longest = 25 if backend == "triton" else 60
    (Hq, Hkv), D, Dv = heads(draw), draw.randint(1, 24), draw.randint(1, 24)
    how, varlen = draw.choice(("", "kvpacked", "qkvpacked")), draw.chance(0.4)
    B, Tq, Tk = draw.randint(0, 2), draw.length(longest), draw.length(longest)
    if how == "qkvpacked":
        Tk, Hkv = Tq, Hq
    Dv = D if how else Dv
    packing, most = {}, [Tq, Tk]
    if varlen:
        B = 1
        lengths = [(draw.length(12), draw.length(12)) for _ in range(draw.randint(1, 5))]
        if how == "qkvpacked":
            lengths = [(n, n) for n, _ in lengths]
        of_queries, of_keys = zip(*lengths)
        names = ("cu_seqlens", "cu_seqlens_k")
        packing = {n: cu_seqlens_of(x) for n, x in zip(names, (of_queries, of_keys))}
        Tq, Tk, most = sum(of_queries), sum(of_keys), [max(of_queries), max(of_keys)]
    options = draw_window(draw, most[1])
    shapes = {"q": (Tq, Hq, D), "k": (Tk, Hkv, D), "v": (Tk, Hkv, Dv)}
    inputs = {n: draw.normal(B, *s) * draw.choice(SIZES[:5]) for n, s in shapes.items()}
    inputs = {n: draw.laid_out(x.to(dtype)) for n, x in inputs.items()}
    draw.note(how=how, dtype=dtype, backend=backend, B=B, shapes=shapes, **options, **packing)
    fn = getattr(compat, "_".join(filter(None, ("flash_attn", "varlen" * varlen, how, "func"))))

    def ours(x):
        tensors, arguments = [x[n] for n in "qkv"], [*packing.values(), *most * varlen]
        if how == "qkvpacked":
            tensors, arguments = [torch.stack(tensors, dim=2)], arguments[::2]
        elif how == "kvpacked":
            tensors = [tensors[0], torch.stack(tensors[1:], dim=2)]
        tensors = [t[0] for t in tensors] if varlen else tensors
        more = {"return_attn_probs": True, "backend": backend}
        o, lse, _ = fn(*tensors, *arguments, **options, **more)
        return {"o": o[None], "lse": lse[None]} if varlen else {"o": o, "lse": lse}

    def plain(x):
        o, lse = reference.window_attn(
            x["q"], x["k"], x["v"], **as_reference(options, *most), **packing
        )
        return {"o": o, "lse": lse}

    gradients = draw.gradients(dtype, inputs)
    with draw.tiles():
        hold_gradients(ours, plain, gradients, inputs)


@kind(5)
def flash_attn_with_kvcache(draw: Draw) -> None:
    """New tokens go behind those of each row, and nothing else of the cache changes."""
    backend, dtype = draw.backend(0.1)
    (Hq, Hkv), D, Dv = heads(draw), draw.randint(1, 24), draw.randint(1, 24)
    B, S, Tq = draw.randint(1, 3), draw.randint(1, 25), draw.randint(0, 5)
    n = draw.choice((None, 0, 1, draw.randint(0, S)))
    same = draw.chance(0.3)
    lengths = [draw.randint(0, S - (n or 0)) for _ in range(B)]
    lengths = lengths[:1] * B if same else lengths
    options = draw_window(draw, S)
    caches = [draw.laid_out(draw.normal(B, S, Hkv, d, dtype=dtype)) for d in (D, Dv)]
    inputs = {"q": draw.laid_out(draw.normal(B, Tq, Hq, D, dtype=dtype))}
    new = {}
    if n is not None:
        new = {name: draw.normal(B, n, Hkv, d, dtype=dtype) for name, d in (("k", D), ("v", Dv))}
    expected = [x.clone() for x in caches]
    for cache, x in zip(expected, new.values()):
        for b, length in enumerate(lengths):
            cache[b, length : length + n] = x[b]
    inputs |= {"k": expected[0], "v": expected[1]}
    draw.note(dtype=dtype, backend=backend, Tq=Tq, S=S, n=n, lengths=lengths, **options)

    def ours(x):
        o, lse = compat.flash_attn_with_kvcache(
            x["q"],
            *caches,
            **new,
            cache_seqlens=lengths[0] if same else int32(lengths),
            **options,
            return_softmax_lse=True,
            backend=backend,
        )
        assert all(map(torch.equal, caches, expected)), "another cache"
        return {"o": o, "lse": lse}

    def plain(x):
        totals = [length + (n or 0) for length in lengths]
        rows = [
            reference.window_attn(
                x["q"][b, None],
                x["k"][b, None, :t],
                x["v"][b, None, :t],
                **as_reference(options, Tq, S),
            )
            for b, t in enumerate(totals)
        ]
        o, lse = map(torch.cat, zip(*rows))
        return {"o": o, "lse": lse}

    with draw.tiles():
        hold(ours, plain, inputs, dtype)


@kind(5)
def lact_functions(draw: Draw) -> None:
    """The authors' functions, batch and heads on one axis."""
    dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    prenorm, muon = draw.chance(0.5), draw.chance(0.3)
    sizes = {name: draw.randint(1, 9) for name in ("dk", "dv", "dh")}
    C, l = draw.choice((1, 3, 4, 100)), draw.length(20)  # noqa: E741
    l = min(l, 6 * C) if muon else l  # noqa: E741
    inputs = make(dtype, rows=draw.randint(0, 4), l=l, momentum=draw.chance(0.5), **sizes)
    inputs = {name: x.detach() for name, x in inputs.items()}
    fn = compat.prenorm_block_causal_lact_swiglu if prenorm else compat.block_causal_lact_swiglu
    draw.note(dtype=dtype, prenorm=prenorm, muon=muon, chunk_size=C, l=l, **sizes)

    def ours(x):
        return {"o": fn(**x, chunk_size=C, use_muon=muon)}

    def plain(x):
        return {"o": by_heads(x, C, muon, prenorm)}

    gradients = draw.gradients(dtype, inputs)
    hold_gradients(ours, plain, gradients, inputs)


@kind(5)
def lact_views(draw: Draw) -> None:
    """Orders of any ranges, also beyond the tokens, and of any number of Newton-Schulz steps."""
    backend, dtype = draw.backend(0.1)
    dtype = torch.float32 if dtype.itemsize == 2 else dtype
    l, lq = draw.length(15), draw.length(15)  # noqa: E741
    steps = draw.choice((0, 0, 1, 3))
    order, expected = [], []
    for _ in range(draw.randint(0, 4)):
        start = draw.randint(0, 15)
        end = draw.choice((-1, start, draw.randint(start, 30)))
        update, apply = draw.chance(0.5) and len(expected) < 3, draw.chance(0.7)
        entry = compat.lact.TTTOperator(start, end, update, apply)
        order.append(draw.choice((entry, tuple(entry), list(entry))))
        for is_on, step, length in ((update, "update", l), (apply, "apply", lq)):
            stop = length if end == -1 else min(end, length)
            if is_on and start < stop:
                expected.append((step, [(start, stop)]))
    sizes = {name: draw.randint(1, 9) for name in ("dk", "dv", "dh")}
    inputs = make_family(dtype, True, rows=draw.randint(0, 3), l=l, lq=lq, **sizes)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs |= {n: draw.laid_out(inputs[n][:, :, None])[:, :, 0] for n in "qkv"}
    draw.note(dtype=dtype, backend=backend, order=order, steps=steps, l=l, lq=lq, **sizes)

    def named(results):
        return dict(zip(("o", "w0 after", "w1 after", "w2 after"), results))

    def ours(x):
        fn = compat.lact.fast_weight_swish_glu_weight_norm_mini_batch_apply
        return named(fn(**x, ttt_ua_order=order, muon_update_steps=steps, backend=backend))

    def plain(x):
        options = {"coefficients": (TRIPLE,) * steps, "detach_norms": True}
        return named(by_reference(x, expected, True, **options))

    with draw.tiles():
        hold_gradients(ours, plain, draw.gradients(dtype, inputs), inputs)


@functools.cache
def models(name: str):
    """A small model of `transformers` twice: with the library's attention, and with ours."""
    from tests.test_compat_transformers_attention import make

    return make(name)


@kind(1)
def transformers_attention(draw: Draw) -> None:
    """Padded and packed batches, pieces with a cache, generation: as with the library's attention."""
    from tests.test_compat_transformers_attention import (
        CACHE,
        close,
        numbered,
        packed_inputs,
        tokens,
    )

    plain, ours = models(draw.choice(("mistral", "qwen2", "gemma3")))
    how = draw.choice(("padded", "packed", "pieces", "generate"))
    B, T = draw.randint(1, 3), draw.randint(1, 24)
    mask = torch.ones(B, T, dtype=torch.int64)
    for row in mask:
        a, b = sorted((draw.randint(0, T - 1), draw.randint(1, T)))
        if draw.chance(0.5) and a < b:
            row[:a] = 0
            if how == "padded":
                row[b:] = 0
    ids, inputs = tokens(B, T), {"attention_mask": mask, "position_ids": numbered(mask)}
    draw.note(how=how, B=B, T=T, mask=mask.tolist(), model=type(ours).__name__)
    with torch.no_grad():
        if how == "packed":
            lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 4))]
            draw.note(lengths=lengths)
            ids = tokens(1, sum(lengths))
            how = draw.choice(("positions", "positions, with a cache", "borders"))
            logits = ours(ids, **packed_inputs(how, lengths)).logits[0]
            rows = ids.split(lengths, dim=1)
            close(logits, torch.cat([plain(x, use_cache=False).logits[0] for x in rows]))
            return
        expected = plain(ids, **inputs, use_cache=False).logits
        if how == "padded":
            logits = ours(ids, **inputs, use_cache=False).logits
        elif how == "pieces":
            from transformers import DynamicCache

            cache, logits, start = DynamicCache(config=ours.config), [], 0
            for t in draw.splits(T, 8):
                if not t:
                    continue
                stop = start + t
                piece = {"attention_mask": mask[:, :stop], CACHE: cache}
                piece["position_ids"] = inputs["position_ids"][:, start:stop]
                logits.append(ours(ids[:, start:stop], **piece).logits)
                start = stop
            logits = torch.cat(logits, dim=1)
        else:
            options = {"attention_mask": mask, "max_new_tokens": draw.randint(1, 12)}
            a, b = (m.generate(ids, do_sample=False, **options) for m in (plain, ours))
            assert torch.equal(a, b), "other tokens are generated"
            return
        close(logits[mask.bool()], expected[mask.bool()])
