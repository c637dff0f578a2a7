"""Bytes that a layer moves beside its two operations: how they are counted, and how many they are."""

import pytest
import torch

from benchmarks import layer_traffic
from benchmarks.layer_traffic import bytes_moved, bytes_per_token_and_channel
from lact_kernels import LaCTLayer


def test_what_is_counted():
    x, w = torch.randn(2, 6, 8), torch.randn(5, 8)
    assert bytes_moved(lambda: x[:, 1:].transpose(1, 2)) == {}
    assert bytes_moved(lambda: torch.empty_like(x)) == {}
    assert bytes_moved(lambda: x + x) == {"add": 3 * 4 * x.numel()}
    assert bytes_moved(lambda: x[:, :2].clone()) == {"clone": 2 * 4 * x.numel() // 3}
    assert bytes_moved(lambda: x + torch.ones(()).expand(8)) == {
        "ones": 4,
        "add": 2 * 4 * x.numel() + 4,
    }
    product = bytes_moved(lambda: torch.nn.functional.linear(x, w))
    assert product == {"mm": 4 * (x.numel() + w.numel() + 12 * 5)}


def counted(C=1024, **options):
    options = dict(attn_qk_norm=False, learnable_ttt_scale=True, use_momentum=True) | options
    layer = LaCTLayer(C, C // 64, 4, **options, dtype=torch.bfloat16, device="meta")
    return bytes_per_token_and_channel(layer)


def test_a_layer():
    """In units of a tensor `[B, T, C]` of two bytes, and a little for what has a few channels."""
    forward, backward = counted()

    def units(moved, *names):
        return sum(moved[name] for name in names) / 2

    # Forward: x to q, k, v; x to rates, momentum and scale; o to y.
    assert units(forward, "mm", "addmm") == pytest.approx(4 + 1 + 2, abs=0.05)
    assert units(forward, "silu_l2norm_rope_fwd") == pytest.approx(3 + 6, abs=0.3)
    assert units(forward, "rms_norm_scale_add_fwd") == pytest.approx(3, abs=0.05)
    # Backward, of each product the gradient of its input and of its weight.
    assert units(backward, "mm") == pytest.approx(4 + (1 + 1) + 4 + 4, abs=0.1)
    assert units(backward, "silu_l2norm_rope_bwd") == pytest.approx(6 + 3 + 3, abs=0.3)
    assert units(backward, "rms_norm_scale_add_bwd") == pytest.approx(3, abs=0.05)
    # The two gradients of x are added; nothing else is added or joined.
    assert units(backward, "add") == pytest.approx(3, abs=0.05)
    assert units(backward, "cat") < 0.05
    assert forward.total() / 2 == pytest.approx(19 + 1.3, abs=0.1)  # with the angles in float64
    assert backward.total() / 2 == pytest.approx(32 + 0.4, abs=0.2)


def test_only_the_norms_gradients_are_joined_where_queries_and_keys_are_normed():
    _, backward = counted(attn_qk_norm=True)
    assert backward["cat"] / 2 == pytest.approx(6, abs=0.05)
    assert backward["silu_l2norm_rope_bwd"] / 2 == pytest.approx(12, abs=0.3)


def test_the_table(capsys):
    assert (
        layer_traffic.main(["--hidden-size", "128", "--heads", "2", "--fast-weight-heads", "1"])
        == 0
    )
    *rows, total = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    for column in (-2, -1):
        assert sum(float(row[column]) for row in rows) == pytest.approx(
            float(total[column]), abs=0.2
        )
