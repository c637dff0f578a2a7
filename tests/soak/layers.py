"""`LaCTLayer` of any options, whole, padded and packed, and in pieces with a `LaCTCache`; its branches."""

import copy
import io

import torch
from torch import Tensor
from torch.func import functional_call

import reference.rms_norm_scale_add
import reference.silu_l2norm_rope
from lact_kernels import LaCTCache, LaCTLayer
from lact_kernels.ops import rms_norm_scale_add, silu_l2norm_rope
from tests.lact_layer_cases import oracle, randomised
from tests.soak.bar import hold_gradients, hold_results
from tests.soak.draw import Draw, borders_of, int32, kind

CAUSAL_WINDOWS = (None, 1, 2, 5, 9)
WINDOWS = (*CAUSAL_WINDOWS, (3, 2), (0, 6), (-1, 1), (4, -1), (-1, -1))


def draw_layer(draw: Draw, dtype: torch.dtype, backend: str, windows) -> LaCTLayer:
    chance, flag = draw.chance, lambda: draw.chance(0.5)
    heads = draw.choice(((4, 2), (2, 2), (2, 1), (1, 1), (2, 4) if backend == "eager" else (4, 1)))
    options = dict(
        num_attn_heads=heads[0],
        num_lact_heads=heads[1],
        inter_multi=draw.choice((0.5, 1, 1.5)),
        window_size=draw.choice(windows),
        lact_chunk_size=draw.choice((1, 3, 4, 8)),
        qkv_bias=flag(),
        attn_qk_norm=flag(),
        qkv_silu=flag(),
        no_v_silu=flag(),
        use_muon=chance(0.2),
        learnable_ttt_scale=flag(),
        ttt_prenorm=flag(),
        ttt_nope=chance(0.3),
        rope_theta=draw.choice((100.0, 500000.0)),
        w0_w2_low_rank=draw.choice((-1, 1, 4)),
        use_momentum=flag(),
        temporal_reduction=3 if chance(0.15) else 1,
        layer_idx=0,
    )
    draw.note(dtype=dtype, backend=backend, **options)
    return randomised(LaCTLayer(16, **options, backend=backend, dtype=dtype))


def draw_mask(draw: Draw, B: int, T: int) -> Tensor:
    """Padding on the left, on the right, on both sides, or holes anywhere, of each row."""
    rows = []
    for _ in range(B):
        a, b = sorted((draw.randint(0, T), draw.randint(0, T)))
        how = draw.choice(("left", "right", "both", "holes", "all"))
        row = torch.ones(T, dtype=torch.bool)
        if how in ("left", "both"):
            row[:a] = False
        if how in ("right", "both"):
            row[b:] = False
        if how == "holes":
            row = torch.rand(T) < 0.6
        rows.append(row)
    return (torch.stack(rows) if rows else torch.empty(0, T)).to(
        draw.choice((torch.bool, torch.int32, torch.int64))
    )


@kind(8)
def lact_layer(draw: Draw) -> None:
    """Outputs and gradients of input and parameters are those of every sequence alone."""
    backend, dtype = draw.backend(0.05)
    layer = draw_layer(draw, dtype, backend, WINDOWS)
    B, T = draw.choice((0, 1, 1, 2, 2, 2, 3, 3)), draw.length(16)
    how = draw.choice(("full", "padded", "padded", "packed"))
    mask, borders = None, None
    if how == "padded":
        mask = draw_mask(draw, B, T)
        exists = list(mask.bool())
    elif how == "packed":
        borders = draw.borders(12)
        B, T = 1, borders[-1]
    else:
        exists = [torch.ones(T, dtype=torch.bool)] * B
    inputs = {"x": draw.normal(B, T, 16, dtype=dtype)}
    inputs |= {name: p.detach() for name, p in layer.named_parameters()}
    draw.note(B=B, T=T, mask=mask, borders=borders)

    def ours(x):
        parameters = {name: p for name, p in x.items() if name != "x"}
        packing = {"attention_mask": mask}
        if borders:
            packing["cu_seqlens"] = int32(borders)
        return {"y": functional_call(layer, parameters, (x["x"],), packing)}

    def plain(x):
        rows = x["x"]
        if borders:
            parts = rows[0].split([b - a for a, b in zip(borders, borders[1:])])
            return {"y": torch.cat([oracle(layer, part, x) for part in parts])[None]}
        y = torch.zeros_like(rows)
        for n in range(B):
            y[n, exists[n]] = oracle(layer, rows[n, exists[n]], x)
        return {"y": y}

    gradients = draw.gradients(dtype, inputs)
    with draw.tiles():
        hold_gradients(ours, plain, gradients, inputs)


class CachedRows:
    """Rows that a layer reads in pieces, all that each was given, and the outputs."""

    def __init__(self, layer: LaCTLayer, B: int):
        self.layer, self.cache = layer, LaCTCache()
        empty = next(layer.parameters()).new_empty(0, layer.hidden_size)
        self.given, self.outputs = [empty] * B, [empty] * B

    def read(self, draw: Draw, how: str) -> None:
        B, r = len(self.given), self.layer.temporal_reduction
        dtype = self.given[0].dtype
        if how == "packed":
            lengths = [r * draw.choice((0, 1, draw.randint(0, 7))) for _ in range(B)]
            x = draw.normal(1, sum(lengths), self.layer.hidden_size, dtype=dtype)
            y = self.layer(x, cache=self.cache, cu_seqlens=borders_of(lengths))
            parts = list(zip(x[0].split(lengths), y[0].split(lengths)))
        else:
            t = r * (1 if how == "token" else draw.choice((0, 1, 2, draw.randint(0, 9))))
            x = draw.normal(B, t, self.layer.hidden_size, dtype=dtype)
            mask = torch.ones(B, t, dtype=torch.bool)
            if how == "padded" and r == 1:
                mask = draw_mask(draw, B, t)
            y = self.layer(x, mask if how == "padded" else None, self.cache)
            exists = mask.bool()
            assert not y[~exists].any(), "outputs at padding"
            parts = [(x[n, e], y[n, e]) for n, e in enumerate(exists)]
        for n, (more, out) in enumerate(parts):
            self.given[n] = torch.cat([self.given[n], more])
            self.outputs[n] = torch.cat([self.outputs[n], out])

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(order))
        self.given, self.outputs = ([x[n] for n in order] for x in (self.given, self.outputs))


@kind(14)
def lact_cache(draw: Draw) -> None:
    """Pieces of any kind, rows in another order, copies and saved states: the outputs of every row alone."""
    backend, dtype = draw.backend(0.05)
    if backend == "eager":
        dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    else:
        dtype = torch.float32
    layer = draw_layer(draw, dtype, backend, CAUSAL_WINDOWS)
    rows, program = CachedRows(layer, draw.randint(1, 3)), []
    draw.note(program=program)
    with torch.no_grad(), draw.tiles():
        for _ in range(draw.randint(2, 4 if backend == "triton" else 12)):
            step = draw.choice(("batch", "padded", "packed", "token", "token", "token", "state"))
            if step == "state" and not rows.cache.layers:
                continue
            if step == "state":
                step = draw.choice(("reorder", "copy", "saved"))
            program.append(step)
            if step == "reorder":
                order = [draw.randrange(len(rows.given)) for _ in range(draw.randint(1, 3))]
                rows.reorder(order)
            elif step == "copy":
                rows.cache = copy.deepcopy(rows.cache)
            elif step == "saved":
                file = io.BytesIO()
                torch.save(rows.cache.state_dict(), file)
                file.seek(0)
                rows.cache = LaCTCache.from_state_dict(torch.load(file, weights_only=True))
            else:
                rows.read(draw, step)
            program[-1] += f" {[len(x) for x in rows.given]}"
    inputs = {f"x{n}": x for n, x in enumerate(rows.given)}
    inputs |= {name: p.detach() for name, p in layer.named_parameters()}

    def plain(x):
        return {f"y{n}": oracle(layer, x[f"x{n}"], x) for n in range(len(rows.given))}

    actual = {f"y{n}": y for n, y in enumerate(rows.outputs)}
    hold_results(actual, plain, inputs, dtype)


@kind(6)
def layer_branches(draw: Draw) -> None:
    """What a layer does before and after its operations: `silu_l2norm_rope` and `rms_norm_scale_add`."""
    backend, dtype = draw.backend(0.1)
    Hq, Hf = draw.choice(((6, 2), (2, 2), (4, 1), (2, 4) if backend == "eager" else (2, 1)))
    D = draw.choice((2, 4, 8)) * (2 if Hf > Hq else 1)
    B, T, C = draw.randint(0, 3), draw.length(20), Hq * D
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    silu, silu_v, rotate = draw.chance(0.7), draw.chance(0.5), draw.chance(0.7)
    options = dict(num_attn_heads=Hq, num_lact_heads=Hf, silu=silu, rotate_fast=rotate)
    options["silu_v"] = silu and silu_v
    angles = draw.normal(draw.choice((1, B)), T, D // 2) * 3
    angles = {"cos": angles.cos().to(wide), "sin": angles.sin().to(wide)}
    inputs = {"projection": draw.normal(B, T, 3 * C, dtype=dtype) * draw.choice((0.1, 1, 1, 5))}
    inputs |= {name: draw.normal(C, 2, dtype=wide) for name in ("qk_scale", "qk_offset")}
    inputs["ttt"] = (draw.normal(B, T, Hf, C // Hf) * draw.choice((1, 1, 0.01))).to(dtype)
    inputs["norm_weight"] = draw.normal(C // Hf, dtype=wide)
    if draw.chance(0.7):
        inputs["scale"] = draw.normal(B, T, Hf, dtype=dtype)
    joint = draw.chance(0.7)
    draw.note(dtype=dtype, backend=backend, B=B, T=T, D=D, joint=joint, **options)
    gradients = draw.gradients(dtype, inputs)

    def call(before, after, **backend):
        def run(x):
            qkv = x["projection"] if joint else x["projection"].chunk(3, dim=-1)
            tables = {n: t.to(x["qk_scale"].dtype) for n, t in angles.items()}
            outputs = before.silu_l2norm_rope(
                qkv, x["qk_scale"], x["qk_offset"], **tables, **options, **backend
            )
            names = ("attn_q", "attn_k", "attn_v", "fast_q", "fast_k", "fast_v")
            results = dict(zip(names, outputs))
            results["sum"] = after.rms_norm_scale_add(
                results["attn_q"], x["ttt"], x["norm_weight"], x.get("scale"), eps=1e-5, **backend
            )
            return results

        return run

    with draw.tiles():
        ours = call(silu_l2norm_rope, rms_norm_scale_add, backend=backend)
        plain = call(reference.silu_l2norm_rope, reference.rms_norm_scale_add)
        hold_gradients(ours, plain, gradients, inputs)
