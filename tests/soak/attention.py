"""`window_attn`, alone and over caches."""

import copy

import torch

import lact_kernels
import reference
from lact_kernels import RingKVCache
from tests.soak.bar import hold, hold_gradients
from tests.soak.draw import Draw, int32, kind

SIZES = (1.0, 1.0, 1.0, 0.01, 5.0, 20.0)  # of queries and keys: scores up to some thousands


def heads(draw: Draw) -> tuple[int, int]:
    """Of queries, and of keys."""
    Hkv = draw.randint(1, 2)
    return Hkv * draw.choice((1, 1, 2, 3)), Hkv


def window(draw: Draw, Tk: int) -> int | None:
    return draw.choice((None, 1, 2, 2**40, *(draw.randint(1, Tk + 3) for _ in range(6))))


def two_sided_window(draw: Draw, Tk: int) -> int | tuple[int, int] | None:
    if draw.chance(0.5):
        return window(draw, Tk)
    return draw.choice((-1, 0, 2**40, draw.randint(0, Tk + 3))), draw.choice(
        (-1, 0, 1, 2**40, draw.randint(0, Tk + 3))
    )


def softcap(draw: Draw) -> float | None:
    return draw.choice((None, None, None, 0.5, 30.0))


def scale(draw: Draw) -> float | None:
    return draw.choice((None, None, None, 0.0, -0.7, 3.0))


@kind(30)
def window_attn(draw: Draw) -> None:
    """Dense and packed, with as many or more keys, forward and backward."""
    backend, dtype = draw.backend()
    longest = 40 if backend == "triton" else 150
    (Hq, Hkv), D, Dv = heads(draw), draw.randint(1, 40), draw.randint(1, 40)
    scores = {"softmax_scale": scale(draw), "softcap": softcap(draw)}
    packing = {}
    if draw.chance(0.4):
        borders = draw.borders(longest)
        B, Tq, Tk = 1, borders[-1], borders[-1]
        packing["cu_seqlens"] = int32(borders)
    else:
        B, Tq = draw.choice((0, 1, 1, 1, 2, 2)), draw.length(longest)
        Tk = Tq + draw.choice((0, draw.length(longest)))
    W = two_sided_window(draw, Tk)
    shapes = {"q": (Tq, Hq, D), "k": (Tk, Hkv, D), "v": (Tk, Hkv, Dv)}
    sizes = {"q": draw.choice(SIZES), "k": draw.choice(SIZES), "v": draw.choice((1.0, 0.01, 3.0))}
    inputs = {
        name: draw.laid_out((draw.normal(B, *shape) * sizes[name]).to(dtype))
        for name, shape in shapes.items()
    }
    if draw.chance(0.3):
        inputs["sinks"] = (draw.normal(Hq) * draw.choice(SIZES)).to(dtype)
    gradients = draw.gradients(dtype, inputs, (("o",), ("lse",), None))
    draw.note(dtype=dtype, B=B, Tq=Tq, Tk=Tk, window=W, shapes=shapes, sizes=sizes, backend=backend)
    draw.note(**scores, **packing, sinks="sinks" in inputs, gradients=gradients)

    def call(fn, **more):
        def run(x):
            q, k, v, *_ = x.values()
            sinks = x.get("sinks")
            o, lse = fn(q, k, v, W, **packing, **scores, sinks=sinks, return_lse=True, **more)
            return {"o": o, "lse": lse}

        return run

    ours = call(lact_kernels.window_attn, backend=backend)
    with draw.tiles():
        hold_gradients(ours, call(reference.window_attn), gradients, inputs)


@kind(12)
def window_attn_with_kvcache(draw: Draw) -> None:
    """Caches written from the front, and rings; what was never written is NaN."""
    backend, dtype = draw.backend()
    longest = 30 if backend == "triton" else 80
    (Hq, Hkv), D, Dv = heads(draw), draw.randint(1, 40), draw.randint(1, 40)
    B, Tq, S = draw.randint(1, 3), draw.choice((0, 1, 1, 2, 5)), draw.randint(1, longest)
    W = two_sided_window(draw, S)
    left = -1 if W is None else W[0] if isinstance(W, tuple) else W - 1
    goes_round = left >= 0 and S >= left + Tq
    lengths = [draw.randint(0, 4 * S if goes_round else S) for _ in range(B)]
    inputs = {
        "q": draw.laid_out(draw.normal(B, Tq, Hq, D, dtype=dtype) * draw.choice(SIZES[:5])),
        "k": draw.normal(B, S, Hkv, D, dtype=dtype) * draw.choice(SIZES[:5]),
        "v": draw.normal(B, S, Hkv, Dv, dtype=dtype),
    }
    for name in "kv":
        for b, length in enumerate(lengths):
            inputs[name][b, length:] = torch.nan
        inputs[name] = draw.laid_out(inputs[name])
    if draw.chance(0.3):
        inputs["sinks"] = (draw.normal(Hq) * draw.choice(SIZES)).to(dtype)
    options = {"softmax_scale": scale(draw), "softcap": softcap(draw), "return_lse": True}
    if lengths != [S] * B or draw.chance(0.5):
        options["cache_seqlens"] = int32(lengths)
    draw.note(dtype=dtype, backend=backend, Tq=Tq, S=S, window=W, heads=(Hq, Hkv), D=D, Dv=Dv)
    draw.note(**options, sinks="sinks" in inputs)

    def call(fn, **more):
        def run(x):
            o, lse = fn(x["q"], x["k"], x["v"], W, **options, sinks=x.get("sinks"), **more)
            return {"o": o, "lse": lse}

        return run

    ours = call(lact_kernels.window_attn_with_kvcache, backend=backend)
    with draw.tiles():
        hold(ours, call(reference.window_attn_with_kvcache), inputs, dtype)


@kind(6)
def unseen_keys(draw: Draw) -> None:
    """Keys whose scores are -inf, as q k overflows, do not exist; a row of nothing else sees nothing."""
    backend, dtype = draw.choice(("eager", "triton")), torch.float32
    T, H, D, Dv = draw.length(60 if backend == "eager" else 30), 2, draw.randint(2, 20), 5
    W = draw.choice((1, 2, 4, T + 1))
    far = torch.rand(T) < draw.choice((0.0, 0.3, 0.7, 1.0))
    inputs = {
        "q": draw.normal(1, T, H, D),
        "k": draw.normal(1, T, H, D),
        "v": draw.normal(1, T, H, Dv),
    }
    inputs["q"][..., 0], inputs["k"][..., 0] = 1e30, torch.where(far, -1e30, 0.0)[:, None]
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    gradients = draw.gradients(dtype, inputs, (("o",), None) if not far.any() else (("o",),))
    draw.note(backend=backend, T=T, D=D, window=W, far=far.tolist(), gradients=gradients)

    def ours(x):
        o, lse = lact_kernels.window_attn(
            x["q"], x["k"], x["v"], W, return_lse=True, backend=backend
        )
        return {"o": o, "lse": lse}

    def plain(x):
        place = torch.arange(T)
        visible = (place <= place[:, None]) & (place > place[:, None] - W) & ~far
        blind = ~visible.any(dim=-1, keepdim=True)
        scores = torch.einsum("bihd,bjhd->bhij", x["q"], x["k"]) * D**-0.5
        scores = scores.masked_fill(~visible, -torch.inf).masked_fill(blind, 0.0)
        o = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1) * visible, x["v"])
        return {"o": o, "lse": scores.logsumexp(dim=-1).masked_fill(blind[:, 0], -torch.inf)}

    with draw.tiles():
        hold_gradients(ours, plain, gradients, inputs)


@kind(8)
def ring_kv_cache(draw: Draw) -> None:
    """Ragged appends, rows in another order, copies; queries in between, of the tokens read so far."""
    backend, dtype = draw.backend(0.1)
    (Hq, Hkv), D, Dv = heads(draw), draw.randint(1, 20), draw.randint(1, 20)
    B, W, most = draw.randint(1, 3), draw.randint(1, 12), draw.randint(1, 3)
    window = W if draw.chance(0.5) else (W - 1, draw.choice((-1, 0, 1, 2, 2**40)))
    ring = RingKVCache(B, window, Hkv, D, head_dim_v=Dv, max_queries=most, dtype=dtype)
    rows = [
        [torch.empty(0, Hkv, d, dtype=dtype) for d in (D, Dv)] for _ in range(B)
    ]  # k and v of each
    for _ in range(draw.randint(1, 8)):
        step = draw.choice(("append", "append", "append", "rows", "copy", "token"))
        B = len(rows)
        if step == "rows":
            order = [draw.randrange(B) for _ in range(draw.randint(1, 3))]
            ring.select_rows(torch.tensor(order))
            rows = [list(rows[n]) for n in order]
        elif step == "copy":
            ring = copy.deepcopy(ring)
        else:
            t = 1 if step == "token" else draw.length(30)
            new = [draw.laid_out(draw.normal(B, t, Hkv, d, dtype=dtype)) for d in (D, Dv)]
            lengths = [draw.randint(0, t) for _ in range(B)] if draw.chance(0.5) else [t] * B
            ring.append(*new, None if lengths == [t] * B else int32(lengths))
            for b, length in enumerate(lengths):
                rows[b] = [torch.cat([x, y[b, :length]]) for x, y in zip(rows[b], new)]
        _check_ring(draw, ring, rows, Hq, backend, dtype)


def _check_ring(draw, ring, rows, Hq, backend, dtype) -> None:
    B, Tq = len(rows), draw.randint(0, ring.max_queries)
    assert ring.seqlens.tolist() == [len(k) for k, _ in rows]
    for i, seen in enumerate(ring.view()):
        for b, row in enumerate(rows):
            kept = row[i][-ring.k.shape[1] :]
            places = seen.shape[1] - len(kept)
            assert torch.equal(seen[b, places:], kept), f"the view of row {b}"
            assert not seen[b, :places].any(), f"the padding of row {b}"
    inputs = {"q": draw.normal(B, Tq, Hq, ring.k.shape[3], dtype=dtype)}
    for b, (k, v) in enumerate(rows):
        inputs |= {f"k{b}": k, f"v{b}": v}

    if draw.chance(0.3):
        inputs["sinks"] = draw.normal(Hq, dtype=dtype)
    options = {"softcap": softcap(draw), "return_lse": True}

    def ours(x):
        o, lse = ring.window_attn(x["q"], sinks=x.get("sinks"), **options, backend=backend)
        return {"o": o, "lse": lse}

    def plain(x):
        results = [
            reference.window_attn(
                x["q"][b, None],
                x[f"k{b}"][None],
                x[f"v{b}"][None],
                ring.window_size,
                sinks=x.get("sinks"),
                **options,
            )
            for b in range(B)
        ]
        o, lse = map(torch.cat, zip(*results))
        return {"o": o, "lse": lse}

    with draw.tiles():
        hold(ours, plain, inputs, dtype)
