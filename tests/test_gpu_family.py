"""The layers of LaCT's views and minimal implementations on a GPU, at sizes that fill tiles."""

import copy

import pytest
import torch

from benchmarks import plain_family
from lact_kernels.compat import lact
from tests.tolerance import assert_close_to_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("full_float32_products"),
    pytest.mark.filterwarnings("ignore:use_muon. the orthogonalised update is added"),
]
DEVICE = "cuda"
INFO = {"ttt_op_order": [(0, 300, True, True), (300, -1, False, True)]}
LAYERS = {
    "FastWeightGluMLPMultihead": ((256, 128), {"inter_multi": 2, "muon_update_steps": 5}),
    "BidirectionalLaCTSwiGLU": ((256, 64), {}),
    "CausalLaCTSwiGLUWithSlidingWindowAttn": (
        (256, 128, 64),
        {"lact_chunk_size": 128, "window_size": 100},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_as_exact_as_the_plain_one(name, dtype):
    """In bfloat16 by autocast, as these models are trained."""
    sizes, options = LAYERS[name]
    plain = getattr(plain_family, name)(*sizes, **options, muon_dtype=dtype).to(DEVICE)
    exact = copy.deepcopy(plain).double()
    exact.muon_dtype = torch.float64
    ours = getattr(lact, name)(*sizes, **options, backend="triton").to(DEVICE)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 430, 256, device=DEVICE)
    dy = torch.randn(2, 430, 256, device=DEVICE)

    def results(layer, x):
        x = x.detach().requires_grad_()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32 and layer is not exact):
            y = layer(x, INFO)[0] if hasattr(layer, "lr_fc") else layer(x)
        leaves = {"x": x} | dict(layer.named_parameters())
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach()} | dict(zip(leaves, gradients))

    actual, same_dtype = results(ours, x), results(plain, x)
    expected = results(exact, x.double())
    for key, value in actual.items():
        if value.numel() >= 16:  # of the two biases of a few numbers the weights tell more
            assert_close_to_float64(value, same_dtype[key], expected[key], key)
