"""`LaCTLayer` against its oracle: outputs and every gradient, padded, packed, in every option."""

import copy

import pytest
import torch

from lact_kernels import LaCTCache, LaCTLayer
from tests.cases import WRITES
from tests.lact_layer_cases import CASES, SMALL, gradients, make_layer, oracle
from tests.tolerance import assert_close_to_float64

T = 29  # three chunks and a rest
MASKS = {
    "left": [[0] * 9 + [1] * 20, [1] * 29],
    "right": [[1] * 17 + [0] * 12, [1] * 29],
    "both-and-holes": [[0] * 3 + [1] * 10 + [0] * 2 + [1] * 10 + [0] * 4, [0] * 28 + [1]],
    "empty-row": [[0] * 29, [1] * 25 + [0] * 4],
}


def assert_equal_to_oracle(actual, expected, case):
    bound = 1e-8 if "muon" in case else 1e-11
    for name, x in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - x).abs().max() / x.abs().max()
        assert error < bound, f"{name}: {error:.1e}"


def assert_padded_equals_unpadded(case, mask, dtype=torch.float64, **options):
    layer = make_layer(case, dtype, **options)
    mask = torch.tensor(mask)
    x = torch.randn(*mask.shape, 32, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)  # also where there is no token
    y = layer(x, mask)
    expected = torch.zeros_like(y)
    for n, exists in enumerate(mask.bool()):
        expected[n, exists] = oracle(layer, x[n, exists])
    actual = {"y": y} | gradients(layer, x, y, dy)
    assert not y[mask == 0].any() and not actual["x"][mask == 0].any()
    assert_equal_to_oracle(actual, {"y": expected} | gradients(layer, x, expected, dy), case)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case):
    layer = make_layer(case)
    x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = layer(x)
    expected = torch.stack([oracle(layer, row) for row in x])
    assert_equal_to_oracle(
        {"y": y} | gradients(layer, x, y, dy),
        {"y": expected} | gradients(layer, x, expected, dy),
        case,
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("case", ["paper", "full-attention", "reduction", "two-sided"])
def test_a_padded_row_equals_the_unpadded_sequence(case, mask):
    assert_padded_equals_unpadded(case, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
def test_masks_of_any_integer_dtype(dtype):
    layer, x = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64)
    mask = torch.tensor(MASKS["left"])
    assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask.bool()))
    assert torch.equal(layer(x, torch.ones_like(mask, dtype=dtype)), layer(x))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("argument", ["attention_mask", "cu_seqlens"])
def test_a_buffer_that_is_used_again(argument, write):
    """Nothing is remembered of it: neither its values, nor what inference mode has made of them."""
    layer = make_layer("paper")
    if argument == "cu_seqlens":
        x, place, value = torch.randn(1, T, 32, dtype=torch.float64), 1, 20
        buffer = torch.tensor([0, 13, T], dtype=torch.int32)
    else:
        x, place, value = torch.randn(2, T, 32, dtype=torch.float64), (1, slice(20, None)), 0
        buffer = torch.tensor(MASKS["left"])
    with torch.inference_mode():
        layer(x, **{argument: buffer})
    write(buffer, place, value)
    y = layer(x, **{argument: buffer})
    assert torch.equal(y, layer(x, **{argument: buffer.clone()}))
    if argument == "attention_mask":
        assert not y[1, 20:].any()
    y.sum().backward()


@pytest.mark.parametrize("case", ["paper", "prenorm-muon", "reduction", "two-sided"])
def test_packed_sequences_do_not_see_one_another(case):
    layer = make_layer(case)
    lengths = [13, 0, 25, 1]
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    cu_seqlens = torch.tensor([0, 13, 13, 38, 39], dtype=torch.int32)
    y = layer(x, cu_seqlens=cu_seqlens)
    expected = torch.cat([oracle(layer, part) for part in x[0].split(lengths)])[None]
    assert_equal_to_oracle(
        {"y": y} | gradients(layer, x, y, dy),
        {"y": expected} | gradients(layer, x, expected, dy),
        case,
    )


def assert_as_exact_as_plain_pytorch(case, dtype, **options):
    """STYLE: at most twice the error of the oracle in the same dtype, for outputs and gradients."""
    layer = make_layer(case, dtype, **options)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, :6] = False
    x = torch.randn(2, T, 32).to(dtype)
    dy = torch.randn(2, T, 32).to(dtype) * mask[..., None]

    def results(layer, x, plain):
        x = x.detach().requires_grad_()
        if plain:
            y = torch.zeros(2, T, 32, dtype=x.dtype)
            for n in range(2):
                y[n, mask[n]] = oracle(layer, x[n, mask[n]])
        else:
            y = layer(x, mask)
        return {"y": y.detach()} | gradients(layer, x, y, dy.to(x.dtype))

    actual, same_dtype = results(layer, x, False), results(layer, x, True)
    exact = results(copy.deepcopy(layer).double(), x.double(), True)
    for name, x in actual.items():
        assert_close_to_float64(x, same_dtype[name], exact[name], name)


@pytest.mark.parametrize("case", ["paper", "prenorm", "qk-norm-bias", "reduction", "two-sided"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_float32_is_as_exact_as_plain_pytorch(case, backend):
    assert_as_exact_as_plain_pytorch(case, torch.float32, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_plain_pytorch(dtype):
    assert_as_exact_as_plain_pytorch("paper", dtype)


def test_autocast_computes_products_in_its_dtype_and_fast_weights_in_float32():
    layer = make_layer("qk-norm-bias", torch.float32)
    x = torch.randn(2, T, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = torch.stack([oracle(layer, row) for row in x])
    assert (y - exact).norm() < 0.02 * exact.norm()
    given = {n: g.dtype for n, g in gradients(layer, x, y, torch.ones_like(y)).items()}
    assert set(given.values()) == {torch.float32}, given


def test_parameters_are_those_of_the_authors_layer():
    """Their names, order (an optimizer's state is by order) and shapes, read off their code at 1f84d47."""
    layer = make_layer("qk-norm-bias")
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "w1": (2, 16, 24),
        "qk_scale": (32, 2),
        "qk_offset": (32, 2),
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "q_norm.weight": (32,),
        "k_norm.weight": (32,),
        "o_proj.weight": (32, 32),
        "w0.w_left": (2, 24, 4),
        "w0.w_right": (2, 4, 16),
        "w2.w_left": (2, 24, 4),
        "w2.w_right": (2, 4, 16),
        "lr_proj.weight": (6, 32),
        "lr_proj.bias": (6,),
        "ttt_scale_proj.weight": (2, 32),
        "ttt_scale_proj.bias": (2,),
        "ttt_norm.weight": (16,),
        "momentum_proj.0.weight": (2, 32),
        "momentum_proj.0.bias": (2,),
    }
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]
    plain = [name for name, _ in make_layer("defaults").named_parameters()]
    assert plain[:5] == ["w0", "w2", "w1", "qk_scale", "qk_offset"]
    assert plain[5:] == [
        "qkv.weight",
        "q_norm.weight",
        "k_norm.weight",
        "o_proj.weight",
        "lr_proj.weight",
        "lr_proj.bias",
        "ttt_norm.weight",
    ]


def test_arguments_by_position_are_those_of_the_authors_layer():
    values = dict(
        hidden_size=64,
        num_attn_heads=4,
        num_lact_heads=2,
        inter_multi=2,
        window_size=7,
        lact_chunk_size=9,
        qkv_bias=True,
        attn_qk_norm=False,
        qkv_silu=False,
        no_v_silu=True,
        lr_dim=1,
        use_muon=True,
        lr_parameterization="mamba",
        learnable_ttt_scale=True,
        ttt_prenorm=True,
        ttt_nope=True,
        rope_theta=3.0,
        layer_idx=5,
        max_position_embeddings=10,
        w0_w2_low_rank=3,
        use_momentum=True,
        ttt_loss_type="dot_product",
        fw_init_gain=0.1,
        use_fused_kernel=False,
        fp32_states=True,
    )
    layer = LaCTLayer(*values.values())
    for name in values.keys() & vars(layer).keys():
        assert getattr(layer, name) == values[name], name


def test_initial_fast_weights_and_rates():
    layer = LaCTLayer(256, 4, 2, 1, w0_w2_low_rank=32)
    low_rank = layer.w0(torch.float32) - 0.5 * torch.eye(128)
    assert 0.25 * 128**-0.5 * 0.9 < low_rank.std() < 0.25 * 128**-0.5 * 1.1
    layer = LaCTLayer(256, 4, 2, 2)
    for w in (layer.w0, layer.w1, layer.w2):
        assert 0.95 < w.std() * w.shape[2] ** 0.5 < 1.05
    assert torch.equal(layer.qk_scale, torch.ones(256, 2)) and not layer.qk_offset.any()


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 5, 32), (1, 1, 32)], ids=str)
@pytest.mark.parametrize("case", ["paper", "reduction"])
def test_empty_and_single(case, shape):
    layer = make_layer(case)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    masked = layer(x, torch.zeros(shape[:2], dtype=torch.bool))
    assert masked.shape == shape and not masked.any()


def test_compiles_into_one_graph_and_for_any_length():
    layer = make_layer("paper")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (T, T + 4):
        x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        actual = torch.autograd.grad(compiled(x).sum(), layer.w1)
        torch.testing.assert_close(actual, torch.autograd.grad(layer(x).sum(), layer.w1))


def test_checkpointing_gives_the_same_gradients():
    layer, x = make_layer("paper"), torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    dy = torch.randn_like(y)
    actual, expected = gradients(layer, x, y, dy), gradients(layer, x, layer(x), dy)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_attn_heads=5), ValueError, "num_attn_heads must divide hidden_size = 32, got 5"),
        (dict(num_lact_heads=3), ValueError, "num_lact_heads must divide hidden_size = 32, got 3"),
        (dict(num_attn_heads=32), ValueError, "heads of 1 channels"),
        (dict(inter_multi=0.01), ValueError, "inter_multi must leave at least one"),
        (dict(window_size=0), ValueError, "window_size must be at least 1, got 0"),
        (dict(window_size=(2, -2)), ValueError, "window_size must have sides of at least 0, or -1"),
        (dict(window_size=(2,)), ValueError, "window_size must be an int, a pair"),
        (dict(lact_chunk_size=2.0), TypeError, "lact_chunk_size must be an int, got 2.0"),
        (dict(temporal_reduction=0), ValueError, "temporal_reduction must be at least 1"),
        (dict(rope_theta=0.0), ValueError, "rope_theta must be positive, got 0.0"),
        (dict(layer_idx="0"), TypeError, "layer_idx must be an int, got '0'"),
        (dict(use_muon=1), TypeError, "use_muon must be True or False, got 1"),
        (dict(lr_dim=4), NotImplementedError, "lr_dim must be 1, got 4"),
        (dict(lr_parameterization="x"), NotImplementedError, "lr_parameterization must be 'mamba'"),
        (dict(ttt_loss_type="l2"), NotImplementedError, "must be 'dot_product', got 'l2'"),
        (dict(backend="cuda"), ValueError, "backend must be 'auto', 'triton' or 'eager'"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LaCTLayer(**SMALL | options)


def test_muon_in_the_authors_fused_kernel_is_another_function():
    with pytest.warns(UserWarning, match="stacked into one matrix"):
        LaCTLayer(**SMALL, use_muon=True, use_fused_kernel=True)


@pytest.mark.parametrize(
    "given, kept",
    [(5, 5), ((4, 0), 5), ([4, 0], 5), ((-1, 0), None), ([3, 2], (3, 2)), ((-1, -1), (-1, -1))],
    ids=str,
)
def test_windows(given, kept):
    """However a window is given, it is kept in one way; a pair is one that looks ahead."""
    layer = LaCTLayer(**SMALL | dict(window_size=given))
    assert layer.window_size == kept and layer.looks_ahead == isinstance(kept, tuple)
    assert f"window_size={kept}" in repr(layer)


@pytest.mark.parametrize("right", [0, 2, -1])
@pytest.mark.parametrize("reduction", [1, 3])
def test_how_far_a_token_hears(right, reduction):
    """The last token that the output of one depends on is in its window, as fast weights are causal."""
    layer = make_layer("two-sided", window_size=(3, right), temporal_reduction=reduction)
    x, token = torch.randn(1, T, 32, dtype=torch.float64, requires_grad=True), 10
    layer(x)[0, token].sum().backward()
    heard = x.grad[0].abs().amax(dim=1).nonzero()[:, 0]
    last = (token // reduction + right + 1) * reduction - 1
    assert heard[-1] == (T - 1 if right == -1 else last)


@pytest.mark.parametrize("window_size", [(3, 2), (0, -1)], ids=str)
def test_a_layer_that_looks_ahead_takes_no_cache(window_size):
    layer, cache = make_layer("paper", torch.float32, window_size=window_size), LaCTCache()
    with pytest.raises(
        ValueError, match=rf"cache must be None .* = \({window_size[0]}, .*right side"
    ):
        layer(X, cache=cache)
    assert not cache.layers


X = torch.zeros(2, 6, 32)
MASK = torch.ones(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X[..., :16],), ValueError, "with C = 32, got"),
        ((X[0],), ValueError, "hidden_states must have the shape"),
        ((X.long(),), TypeError, "hidden_states must have one of the dtypes"),
        ((None,), TypeError, "hidden_states must be a tensor"),
        ((X, MASK.float()), TypeError, "attention_mask must be bool or integers"),
        ((X, MASK[:, :5]), ValueError, r"attention_mask must have the shape \[B, T\] = \(2, 6\)"),
        ((X, [[1]]), TypeError, "attention_mask must be a tensor"),
        ((X.to_sparse(),), TypeError, "hidden_states must be a dense tensor"),
        ((X, MASK.to_sparse()), TypeError, "attention_mask must be a dense tensor"),
        ((X, MASK, None, torch.tensor([0, 6])), ValueError, "exclude each other"),
        ((X, None, None, torch.tensor([0, 6], dtype=torch.int32)), ValueError, "B = 1"),
        ((X[:1], None, None, torch.tensor([0, 5], dtype=torch.int32)), ValueError, "end at T = 6"),
        ((X, None, {}), TypeError, "cache must be a LaCTCache, got dict"),
        ((X.double(),), TypeError, "hidden_states must have the dtype torch.float32 of this layer"),
        ((X.to("meta"),), ValueError, "hidden_states must be on cpu like this layer, got meta"),
    ],
    ids=range(15),
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        LaCTLayer(**SMALL)(*arguments)
