"""The window attention kernels against the dense reference, launched directly.

Without a GPU they run in Triton's interpreter, with blocks of 16 so that a few dozen tokens
straddle every edge. The tests marked `gpu` run the same cases with the blocks of the table.
"""

import pytest
import torch
import triton
import triton.language as tl

from lact_kernels.triton.configs import KernelConfig
from lact_kernels.triton.primitives import key_tile_bounds, query_tile_bounds
from lact_kernels.triton.window_attn_bwd import window_attn_bwd
from lact_kernels.triton.window_attn_fwd import window_attn_fwd
from reference.window_attn import window_attn
from tests.bfloat16_interpreter import bfloat16_products
from tests.cases import assert_cancelled, filled_with_nan
from tests.tolerance import assert_close_to_float64

SMALL = KernelConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
ON_CPU = not torch.cuda.is_available()
DEVICE = "cpu" if ON_CPU else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_interpreter = pytest.mark.skipif(not ON_CPU, reason="runs in the interpreter only")

# B, Tq, Tk, Hq, Hkv, D, Dv, W, why
CASES = [
    pytest.param(1, 1, 1, 1, 1, 16, 16, 1, id="one_token"),
    pytest.param(1, 33, 33, 1, 1, 16, 16, 1, id="window_of_itself"),
    pytest.param(1, 33, 33, 1, 1, 16, 16, None, id="full_one_past_a_tile"),
    pytest.param(1, 20, 20, 1, 1, 16, 16, 50, id="window_longer_than_keys"),
    pytest.param(1, 64, 64, 1, 1, 16, 16, 16, id="window_of_one_tile"),
    pytest.param(1, 65, 65, 1, 1, 16, 16, 33, id="all_three_segments_ragged"),
    pytest.param(2, 31, 31, 4, 2, 16, 16, 9, id="two_heads_per_kv_head"),
    pytest.param(1, 18, 18, 3, 1, 16, 16, 5, id="one_kv_head"),
    pytest.param(1, 19, 52, 2, 1, 16, 16, 21, id="kv_cache_of_odd_length"),
    pytest.param(1, 1, 40, 4, 2, 16, 16, 17, id="decode_leaves_keys_unseen"),
    pytest.param(1, 34, 34, 1, 1, 24, 16, 18, id="padded_head_dim"),
    pytest.param(1, 20, 20, 1, 1, 16, 40, 7, id="value_dim_differs"),
]
LARGE_CASES = [
    pytest.param(2, 300, 300, 4, 2, 64, 64, 100, id="d64"),
    pytest.param(1, 700, 700, 2, 2, 128, 128, 257, id="d128"),
    pytest.param(1, 130, 515, 4, 1, 128, 128, 300, id="d128_kv_cache"),
    pytest.param(1, 400, 400, 2, 1, 80, 96, 129, id="d80_dv96"),
    pytest.param(1, 385, 385, 2, 1, 256, 256, None, id="d256_full"),
]


def make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, dtype):
    q = torch.randn(B, Tq, Hq, D, device=DEVICE, dtype=dtype)
    k = torch.randn(B, Tk, Hkv, D, device=DEVICE, dtype=dtype)
    v = torch.randn(B, Tk, Hkv, Dv, device=DEVICE, dtype=dtype)
    do = torch.randn(B, Tq, Hq, Dv, device=DEVICE, dtype=dtype)
    dlse = torch.randn(B, Hq, Tq, device=DEVICE)
    return q, k, v, do, dlse


def run_kernels(q, k, v, do, dlse, window_size, scale, config):
    Tk = k.shape[1]
    window_size = Tk if window_size is None else min(window_size, Tk)
    with filled_with_nan(), bfloat16_products(ON_CPU and q.dtype == torch.bfloat16):
        o, lse = window_attn_fwd(q, k, v, window_size, scale, config=config)
        grads = window_attn_bwd(do, dlse, q, k, v, o, lse, window_size, scale, config=config)
    return o, lse, *grads


def run_reference(q, k, v, do, dlse, window_size, scale, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    o, lse = window_attn(q, k, v, window_size, softmax_scale=scale, return_lse=True)
    if dlse is None:
        grads = torch.autograd.grad(o, (q, k, v), do.to(dtype))
    else:
        grads = torch.autograd.grad((o, lse), (q, k, v), (do.to(dtype), dlse.to(dtype)))
    return o.detach(), lse.detach(), *grads


def check(q, k, v, do, dlse, window_size, config, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    actual = run_kernels(q, k, v, do, dlse, window_size, scale, config)
    same = run_reference(q, k, v, do, dlse, window_size, scale, q.dtype)
    exact = run_reference(q, k, v, do, dlse, window_size, scale, torch.float64)
    assert [x.dtype for x in actual] == [q.dtype, torch.float32, *3 * [q.dtype]]
    single_key = 1 in (window_size, k.shape[1])
    for name, a, s, e in zip(("o", "lse", "dq", "dk", "dv"), actual, same, exact):
        if single_key and name in ("dq", "dk"):
            assert_cancelled(a, e, [q, k, v], do, name)
        else:
            assert_close_to_float64(a, s, e, name)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, Tq, Tk, Hq, Hkv, D, Dv, window_size", CASES)
def test_kernels_match_reference(B, Tq, Tk, Hq, Hkv, D, Dv, window_size, dtype):
    check(*make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, dtype), window_size, SMALL)


@needs_interpreter
@pytest.mark.parametrize(
    "block_m, block_n", [(32, 16), (16, 32)], ids=["wide_queries", "wide_keys"]
)
def test_unequal_blocks(block_m, block_n):
    config = KernelConfig(block_m, block_n, num_warps=4, num_stages=1)
    for window_size in (15, 16, 17, 40):
        check(*make_inputs(1, 70, 84, 1, 1, 16, 16, torch.float32), window_size, config)


@needs_interpreter
def test_dk_and_dv_in_launches_of_their_own():
    config = KernelConfig(16, 16, num_warps=4, num_stages=1, split=True)
    check(*make_inputs(1, 31, 40, 4, 2, 16, 24, torch.float32), 13, config)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_of_the_table(dtype):
    check(*make_inputs(1, 150, 170, 1, 1, 64, 64, dtype), 70, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, Tq, Tk, Hq, Hkv, D, Dv, window_size", CASES + LARGE_CASES)
def test_kernels_match_reference_on_gpu(B, Tq, Tk, Hq, Hkv, D, Dv, window_size, dtype):
    check(*make_inputs(B, Tq, Tk, Hq, Hkv, D, Dv, dtype), window_size, None)


def test_without_gradient_of_lse():
    q, k, v, do, _ = make_inputs(1, 20, 20, 1, 1, 16, 16, torch.float32)
    check(q, k, v, do, None, 7, SMALL)


def test_strided_inputs_are_read_in_place(monkeypatch):
    """Slices of one projection, heads before time, and a gradient expanded from one number."""
    B, T, H, D = 2, 20, 2, 16
    qkv = torch.randn(B, T, 3, H, D, device=DEVICE)
    q, k, v = qkv.unbind(2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    do = torch.randn(B, T, H, 2 * D, device=DEVICE)[..., :D]
    copied = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x) or x)
    run_kernels(q, k, v, do, None, 7, 0.25, SMALL)
    assert all(x.is_contiguous() for x in copied)
    monkeypatch.undo()
    check(q, k, v, do, None, 7, SMALL)
    check(q, k, v, torch.ones((), device=DEVICE).expand(B, T, H, D), None, 7, SMALL)
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, do, None, 7, SMALL)


@pytest.mark.parametrize("stride", ["time", "batch"])
def test_offsets_beyond_32_bits(stride):
    """Views over memory that is never touched between the tokens, so only a few pages are real."""
    T, D = 300, 16
    strides = (2**31 + 64, D, D, 1) if stride == "batch" else (D, 2**23 - 64, D, 1)
    B = 2 if stride == "batch" else 1
    size = 1 + sum((n - 1) * step for n, step in zip((B, T, 1, D), strides))
    far = torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided((B, T, 1, D), strides)
    far.copy_(torch.randn(B, T, 1, D))
    config = KernelConfig(128, 128, num_warps=4, num_stages=1)
    near = far.contiguous()
    do = torch.randn(B, T, 1, D, device=DEVICE).half()
    expected = run_kernels(near, near, near, do, None, 40, 0.25, config)
    actual = run_kernels(far, far, far, far, None, 40, 0.25, config)
    again = run_kernels(near, near, near, near, None, 40, 0.25, config)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual, again))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale):
    check(*make_inputs(1, 20, 20, 1, 1, 16, 16, torch.float32), 7, SMALL, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_huge_scores_stay_finite(dtype):
    """Scores around 1e9, where float32 no longer resolves 1: the forward is still right."""
    q, k, v, do, dlse = make_inputs(1, 40, 40, 1, 1, 64, 64, dtype)
    q, k, scale = q * 1e4, k * 1e4, 0.125
    actual = run_kernels(q, k, v, do, dlse, 17, scale, SMALL)
    same = run_reference(q.float(), k.float(), v.float(), do, dlse, 17, scale, torch.float32)
    exact = run_reference(q, k, v, do, dlse, 17, scale, torch.float64)
    assert all(x.isfinite().all() for x in actual)
    assert_close_to_float64(actual[0].float(), same[0].to(dtype).float(), exact[0], "o")
    assert_close_to_float64(actual[1], same[1], exact[1], "lse")


@pytest.mark.parametrize("B, Tq, Tk", [(0, 5, 5), (2, 0, 0), (2, 0, 7)])
def test_empty_inputs(B, Tq, Tk):
    q, k, v, do, dlse = make_inputs(B, Tq, Tk, 2, 1, 16, 32, torch.float32)
    o, lse, dq, dk, dv = run_kernels(q, k, v, do, dlse, None, 0.25, None)
    assert o.shape == (B, Tq, 2, 32) and lse.shape == (B, 2, Tq)
    assert dq.shape == q.shape
    assert torch.equal(dk, torch.zeros_like(k)) and torch.equal(dv, torch.zeros_like(v))


def test_nothing_saved_is_written_and_backward_repeats():
    q, k, v, do, dlse = make_inputs(1, 33, 33, 2, 1, 16, 16, torch.float32)
    o, lse = window_attn_fwd(q, k, v, 9, 0.25, config=SMALL)
    saved = (do, dlse, q, k, v, o, lse)
    before = [x.clone() for x in saved]
    first = window_attn_bwd(*saved, 9, 0.25, config=SMALL)
    second = window_attn_bwd(*saved, 9, 0.25, config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(before, saved))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@triton.jit
def _bounds_kernel(
    out_ptr, Tq, Tk, window_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr
):
    tile = tl.program_id(0)
    if KEYS:
        a, b, c, d = key_tile_bounds(tile * BLOCK_M, Tq, Tk, window_size, BLOCK_M, BLOCK_N)
    else:
        a, b, c, d = query_tile_bounds(tile * BLOCK_N, Tq, Tk, window_size, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + tile * 4, a)
    tl.store(out_ptr + tile * 4 + 1, b)
    tl.store(out_ptr + tile * 4 + 2, c)
    tl.store(out_ptr + tile * 4 + 3, d)


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (64, 64), (83, 83), (50, 80), (50, 131), (1, 70)])
def test_only_tiles_that_intersect_the_window_are_visited(Tq, Tk, block_m, block_n):
    position = torch.arange(Tq)[:, None] + Tk - Tq
    key = torch.arange(Tk)
    for window_size in sorted({1, 2, 15, 16, 17, 33, 48, 64, Tk}):
        window_size = min(window_size, Tk)
        seen = (key <= position) & (key > position - window_size)
        for by_query in (True, False):
            rows, own, other = (seen, block_m, block_n) if by_query else (seen.T, block_n, block_m)
            tiles = [row_tile.split(other, dim=1) for row_tile in rows.split(own)]
            bounds = torch.empty(len(tiles), 4, dtype=torch.int32, device=DEVICE)
            _bounds_kernel[(len(tiles),)](
                bounds, Tq, Tk, window_size, BLOCK_M=block_m, BLOCK_N=block_n, KEYS=by_query
            )
            for row_tile, (first, interior, after, end) in zip(tiles, bounds.tolist()):
                visited = list(range(first, end))
                assert visited == [n for n, tile in enumerate(row_tile) if tile.any()]
                assert first <= interior <= after <= max(end, first)
                for n in visited:
                    # Interior: every pair visible, and no looped-over row out of bounds. (A ragged
                    # tile of the program's own rows is masked where it is stored.)
                    tile = row_tile[n]
                    whole = bool(tile.all()) and tile.shape[1] == other
                    assert (interior <= n < after) == whole


def test_same_kernel_for_every_length():
    """Lengths, windows, batch sizes and head counts are runtime values, never compile-time ones."""
    from lact_kernels.triton import window_attn_bwd as bwd
    from lact_kernels.triton import window_attn_fwd as fwd

    for module in (fwd, bwd):
        for case in module.compile_cases(90):
            assert not {"Tq", "Tk", "Hq", "Hkv", "window_size"} & set(case.constexprs)
            assert not any(name.startswith("stride") for name in case.constexprs)
