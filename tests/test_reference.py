"""Cases worked by hand, which prove the oracle."""

import math

import pytest
import torch

import reference
from reference.ttt import newton_schulz


def qkv(T, Hq=2, Hkv=2, D=4, Dv=3, Tk=None):
    shapes = [(T, Hq, D), (Tk or T, Hkv, D), (Tk or T, Hkv, Dv)]
    return [torch.randn(2, *s, dtype=torch.float64) for s in shapes]


def test_window_of_one_returns_v():
    q, k, v = qkv(5)
    torch.testing.assert_close(reference.window_attn(q, k, v, 1), v)


@pytest.mark.parametrize("window_size", [7, 8, 100, None])
def test_window_that_holds_everything_is_causal_attention(window_size):
    q, k, v = qkv(7)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    ours = reference.window_attn(q, k, v, window_size)
    torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_window_of_two_by_hand():
    q, k = torch.ones(1, 3, 1, 1), torch.tensor([0.0, 0.0, math.log(3.0)]).view(1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    o, lse = reference.window_attn(q, k, v, 2, softmax_scale=1.0, return_lse=True)
    # The last query sees scores 0 and log 3: weights 1/4 and 3/4 on the values 2 and 6.
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 1.5, 5.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([0.0, math.log(2.0), math.log(4.0)]))


def test_queries_are_aligned_to_the_last_key():
    q, k, v = qkv(9)
    whole = reference.window_attn(q, k, v, 4)
    torch.testing.assert_close(reference.window_attn(q[:, -2:], k, v, 4), whole[:, -2:])


def test_query_heads_share_key_heads_in_order():
    q, k, v = qkv(6, Hq=4, Hkv=2)
    grouped = reference.window_attn(q, k, v, 3)
    for head in range(4):
        kv = slice(head // 2, head // 2 + 1)
        alone = reference.window_attn(q[:, :, head : head + 1], k[:, :, kv], v[:, :, kv], 3)
        torch.testing.assert_close(grouped[:, :, head : head + 1], alone)


def test_packed_sequences_do_not_see_each_other():
    q, k, v = (x[:1] for x in qkv(7))
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    packed = reference.window_attn(q, k, v, 5, cu_seqlens=cu_seqlens)
    parts = [reference.window_attn(q[:, s], k[:, s], v[:, s], 5) for s in (slice(3), slice(3, 7))]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def ttt_inputs(T, H=1, Dk=3, Dv=2, Dh=4):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    tokens = normal(1, T, H, Dk), normal(1, T, H, Dk), normal(1, T, H, Dv)
    weights = normal(H, Dh, Dk), normal(H, Dv, Dh), normal(H, Dh, Dk)
    return tokens, weights, [torch.rand(1, T, H, dtype=torch.float64) for _ in range(3)]


def swiglu(x, w0, w1, w2):
    """The fast network with torch's own functions, head 0."""
    return (torch.nn.functional.silu(x @ w0[0].mT) * (x @ w2[0].mT)) @ w1[0].mT


def test_one_chunk_means_no_update():
    (q, k, v), weights, lrs = ttt_inputs(6)
    o = reference.block_causal_ttt(q, k, v, *weights, *lrs, chunk_size=6)
    torch.testing.assert_close(o[0, :, 0], swiglu(q[0, :, 0], *weights))


def test_rates_of_zero_leave_the_weights():
    (q, k, v), weights, lrs = ttt_inputs(6)
    o = reference.block_causal_ttt(q, k, v, *weights, *(0 * lr for lr in lrs), chunk_size=2)
    # renorm divides by ||row|| + 1e-5, so the weights shrink by that much and no more.
    torch.testing.assert_close(o[0, :, 0], swiglu(q[0, :, 0], *weights), rtol=1e-3, atol=1e-3)


def updated_weights(k, v, weights, lrs):
    """One update of head 0 by autograd: ascends `sum_t lr_t <f(k_t), v_t>`, each matrix by its rates."""
    new = []
    for i, lr in enumerate(lrs):
        leaves = [w.clone().requires_grad_() for w in weights]
        gain = (lr[0, :, 0, None] * swiglu(k[0, :, 0], *leaves) * v[0, :, 0]).sum()
        step = torch.autograd.grad(gain, leaves[i])[0]
        new.append((weights[i], step))
    return new


@pytest.mark.parametrize("prenorm", [False, True])
def test_update_is_the_gradient_of_the_dot_product(prenorm):
    (q, k, v), weights, lrs = ttt_inputs(4)
    chunk = [x[:, :2] for x in (k, v)]
    pairs = updated_weights(*chunk, weights, [lr[:, :2] for lr in lrs])
    new = []
    for w, step in pairs:
        x = w + step
        norm = w.norm(dim=-1, keepdim=True)
        new.append(x / (x.norm(dim=-1, keepdim=True) + 1e-5) * norm)
    o = reference.block_causal_ttt(q, k, v, *weights, *lrs, chunk_size=2, prenorm=prenorm)
    torch.testing.assert_close(o[0, 2:, 0], swiglu(q[0, 2:, 0], *new))


def test_momentum_keeps_the_mean_share_of_the_last_step():
    (q, k, v), weights, lrs = ttt_inputs(3)
    momentum = torch.rand(1, 3, 1, dtype=torch.float64)
    o = reference.block_causal_ttt(q, k, v, *weights, *lrs, chunk_size=1, momentum=momentum)
    buffers, current = [0.0, 0.0, 0.0], list(weights)
    for c in range(2):
        at = slice(c, c + 1)
        pairs = updated_weights(k[:, at], v[:, at], current, [lr[:, at] for lr in lrs])
        buffers = [step + momentum[0, c, 0] * m for (_, step), m in zip(pairs, buffers)]
        for i, m in enumerate(buffers):
            x = current[i] + m
            norms = weights[i].norm(dim=-1, keepdim=True)
            current[i] = x / (x.norm(dim=-1, keepdim=True) + 1e-5) * norms
    torch.testing.assert_close(o[0, 2:, 0], swiglu(q[0, 2:, 0], *current))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)], ids=["square", "wide", "tall"])
def test_newton_schulz_brings_singular_values_near_one(shape):
    singular_values = torch.linalg.svdvals(
        newton_schulz(torch.randn(3, *shape, dtype=torch.float64))
    )
    assert singular_values.max() < 1.3
    # ... and keeps the singular vectors: U V^T of the input is near the result.
    g = torch.randn(*shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert torch.linalg.matrix_norm(newton_schulz(g) - u @ vh, ord=2) < 0.4


def test_packed_sequences_start_afresh():
    (q, k, v), weights, lrs = ttt_inputs(7)
    cu_seqlens = torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    o = reference.block_causal_ttt(q, k, v, *weights, *lrs, chunk_size=2, cu_seqlens=cu_seqlens)
    for s in (slice(0, 5), slice(5, 7)):
        tokens, rates = [x[:, s] for x in (q, k, v)], [lr[:, s] for lr in lrs]
        alone = reference.block_causal_ttt(*tokens, *weights, *rates, chunk_size=2)
        torch.testing.assert_close(o[:, s], alone)
