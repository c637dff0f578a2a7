"""The recogniser on a GPU: padding, streaming and training as on a CPU."""

import copy

import pytest
import torch

from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.streaming import FrameStream

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["tiny", "stream"])
def model(request) -> LaCTForCTC:
    return make_model(request.param)


def make_model(name: str, **options) -> LaCTForCTC:
    torch.manual_seed(0)
    options |= {"num_hidden_layers": 2, "num_freq_masks": 0, "dropout": 0.0}
    return LaCTForCTC(LaCTASRConfig.named(name, **options)).eval().cuda()


def noise(*shape):
    return 0.1 * torch.randn(*shape)


def test_logits_are_those_of_the_cpu_and_padding_changes_nothing(model):
    assert_padding_changes_nothing(model)


def test_padding_changes_nothing_where_windows_look_ahead():
    assert_padding_changes_nothing(make_model("tiny", window_size=(16, 15)))


def assert_padding_changes_nothing(model: LaCTForCTC) -> None:
    x, lengths = noise(2, 100_000), torch.tensor([100_000, 61_234])
    mask = torch.arange(100_000) < lengths[:, None]
    with torch.no_grad():
        together = model(x.cuda(), mask.cuda()).logits.cpu()
        on_cpu = copy.deepcopy(model).cpu()(x, mask).logits
        alone = model(x[1:, :61_234].cuda()).logits[0].cpu()
    torch.testing.assert_close(together, on_cpu, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(together[1, : len(alone)], alone, atol=1e-3, rtol=1e-3)


def test_streaming_equals_one_pass(model):
    x, stream = noise(100_000), FrameStream(model)
    frames = torch.cat([*(stream.push(piece) for piece in x.split(7777)), stream.finish()])
    with torch.no_grad():
        expected = model(x[None].cuda()).logits[0].log_softmax(dim=-1)
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


def test_training_in_bfloat16_learns(model):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, labels = noise(4, 60_000).cuda(), torch.randint(1, 30, (4, 8)).cuda()
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
