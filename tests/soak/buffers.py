"""What is remembered of a tensor holds no longer when its contents change, or gradients are needed."""

import copy

import torch
from torch import Tensor

import lact_kernels
from lact_kernels import LaCTLayer, compat
from tests.soak.bar import same_bits
from tests.soak.draw import Draw, int32, kind
from tests.soak.layers import draw_mask


def draw_call(draw: Draw):
    """A function of borders or of a mask, and another one of them at each call; and what it is called."""
    T = draw.randint(2, 20)
    q, k, v = (draw.normal(1, T, 2, 8, dtype=torch.float32) for _ in range(3))
    w = [draw.normal(2, 8, 8, dtype=torch.float32) for _ in range(3)]
    lr = [torch.full((1, T, 2), 0.1)] * 3
    N = draw.randint(1, 4)
    layer = LaCTLayer(16, 2, 1, window_size=3, lact_chunk_size=2)
    B = draw.randint(1, 3)
    x = draw.normal(B, T, 16, dtype=torch.float32)
    row = x[:1]

    def borders() -> Tensor:
        return int32([0, *sorted(draw.randint(0, T) for _ in range(N - 1)), T])

    def mask() -> Tensor:
        return draw_mask(draw, B, T).to(torch.int64)

    def varlen(c):
        q0, k0, v0 = (x[0] for x in (q, k, v))
        return compat.flash_attn_varlen_func(q0, k0, v0, c, c, T, T, causal=True)

    calls = {
        "window_attn": (lambda c: lact_kernels.window_attn(q, k, v, 3, cu_seqlens=c), borders),
        "block_causal_ttt": (
            lambda c: lact_kernels.block_causal_ttt(q, k, v, *w, *lr, chunk_size=2, cu_seqlens=c),
            borders,
        ),
        "flash_attn_varlen_func": (varlen, borders),
        "layer, packed": (lambda c: layer(row, cu_seqlens=c), borders),
        "layer, padded": (lambda m: layer(x, m), mask),
    }
    name = draw.choice(list(calls))
    draw.note(call=name, B=B, T=T)
    return (*calls[name], [q, k, v, *w, *layer.parameters()])


@kind(4)
def reused_buffer(draw: Draw) -> None:
    """A tensor whose contents were replaced, in whatever way, is another tensor."""
    call, contents, _ = draw_call(draw)
    buffer = contents()
    for _ in range(draw.randint(1, 3)):
        with torch.inference_mode(draw.chance(0.3)):
            call(buffer)
        new, how = contents(), draw.choice(("copy_", ".data", "NumPy"))
        draw.note(how=how, before=buffer.tolist(), after=new.tolist())
        if how == "copy_":
            buffer.copy_(new)
        elif how == ".data":
            buffer.data[:] = new
        else:
            buffer.numpy()[:] = new.numpy()
        assert torch.equal(call(buffer), call(new)), "a reused buffer has the effect of before"


@kind(3)
def training_after_inference(draw: Draw) -> None:
    """Gradients do not depend on what was called without them on the same tensors before."""
    call, contents, tensors = draw_call(draw)
    given = contents()
    with torch.inference_mode(), torch.no_grad():
        call(given)
    leaves = [x.requires_grad_() for x in tensors]
    grads = [
        torch.autograd.grad(call(x).sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (given, given.clone())
    ]
    assert all(map(same_bits, *grads)), "other gradients"


@kind(2)
def transformers_after_inference(draw: Draw) -> None:
    """The same of the attention of a model: padded and packed."""
    from tests.soak.drop_ins import models
    from tests.test_compat_transformers_attention import tokens

    ours = copy.copy(models(draw.choice(("mistral", "gemma3")))[1])
    T = draw.randint(2, 20)
    if draw.chance(0.5):
        a = draw.randint(1, T)
        positions = torch.cat([torch.arange(a), torch.arange(T - a)])[None]
        ids, inputs = tokens(1, T), {"position_ids": positions}
    else:
        ids, inputs = tokens(2, T), {"attention_mask": draw_mask(draw, 2, T).to(torch.int64)}
        inputs["attention_mask"][:, :-1].cumsum_(1).clamp_(max=1)  # no holes
        inputs["attention_mask"][:, -1] = 1
    draw.note(**{name: x.tolist() for name, x in inputs.items()})
    use_cache = draw.chance(0.5)  # without one, `transformers` makes masks of another kind
    draw.note(use_cache=use_cache)
    leaves = list(ours.parameters())
    with torch.inference_mode():
        ours(ids, **inputs, use_cache=use_cache)
    results = []
    for given in (inputs, {name: x.clone() for name, x in inputs.items()}):
        logits = ours(ids, **given, use_cache=use_cache).logits
        results.append(torch.autograd.grad(logits.sum(), leaves, allow_unused=True))
    for a, b in zip(*results):
        assert a is b or torch.equal(a, b), "other gradients"
