"""Which GPUs the kernels take, and with which rows of the table. None is needed here."""

from types import SimpleNamespace

import pytest
import torch

from lact_kernels.ops import checks
from lact_kernels.triton.configs import kernel_config, ttt_config
from lact_kernels.triton.primitives import Sizes

ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """Calls make every device one of this compute capability, or one of ROCm."""

    def is_one(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        checks._gpu_obstacle.cache_clear()

    monkeypatch.setattr(checks, "TRITON_INSTALLED", True)
    yield is_one
    checks._gpu_obstacle.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_gpus_from_ampere_on_take_the_kernels(gpu, capability):
    gpu(capability)
    assert checks.choose_backend("auto", ON_GPU, None) == "triton"
    assert checks.choose_backend("triton", ON_GPU, None) == "triton"


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, "need compute capability 8.0 or above, and q's device has 7.5"),
        ((6, 1), None, "need compute capability 8.0 or above, and q's device has 6.1"),
        ((9, 4), "6.4", "for NVIDIA GPUs, and this PyTorch is built for ROCm"),
    ],
)
def test_others_are_left_to_eager_and_refused_with_a_reason(gpu, capability, hip, reason):
    gpu(capability, hip)
    assert checks.choose_backend("auto", ON_GPU, None) == "eager"
    assert checks.choose_backend("eager", ON_GPU, None) == "eager"
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{reason}"):
        checks.choose_backend("triton", ON_GPU, None)


def test_the_choice_is_no_graph_break(gpu):
    gpu((7, 0))

    @torch.compile(fullgraph=True, backend="eager")
    def fails(x):
        return x + (0 if checks.gpu_obstacle(0) is None else 1)

    assert fails(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
@pytest.mark.parametrize("name", ["window_attn_fwd", "window_attn_bwd_dkv", "window_attn_bwd_dq"])
def test_small_shared_memory_has_rows_of_its_own_where_they_do_not_fit(capability, name):
    def row(D, dtype, capability):
        return kernel_config(name, D, D, dtype, capability)

    for D in (160, 192, 256):
        assert row(D, torch.bfloat16, capability) != row(D, torch.bfloat16, (8, 0))
        assert row(D, torch.float32, capability) == row(D, torch.float32, (9, 0))
    for D in (64, 80, 128):
        assert row(D, torch.float16, capability) == row(D, torch.float16, (8, 0))
    small, large = (
        ttt_config("ttt_outer", torch.bfloat16, capability) for capability in (capability, (8, 0))
    )
    assert small == large


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), None])
def test_tensor_cores_sum_few_terms_of_float32_at_once(capability):
    """The bar is held with sums over 32 channels and 32 keys, not with longer ones."""
    for D in (16, 40, 64):
        row = kernel_config("window_attn_fwd", D, D, torch.float32, capability)
        assert row.precision == "tf32x3"
        assert row.block_n <= 32 and Sizes.of(D, D, row).CHUNK == min(D, 32)
    for name in ("window_attn_fwd", "window_attn_bwd_dq", "window_attn_bwd_dkv"):
        assert kernel_config(name, 80, 80, torch.float32, capability).precision == "ieee"


def test_every_other_generation_has_its_rows():
    rows = {
        capability: kernel_config("window_attn_fwd", 256, 256, torch.bfloat16, capability)
        for capability in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3), None)
    }
    assert rows[8, 0] == rows[8, 7] != rows[9, 0] == rows[None]
    assert rows[10, 0] == rows[10, 3] != rows[9, 0]
    for capability, row in rows.items():
        described = kernel_config("window_attn_fwd", 256, 256, torch.bfloat16, capability, True)
        assert described.descriptors == (capability in ((9, 0), None))
        assert described.descriptors or described == row
