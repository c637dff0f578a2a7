"""Training on many ranks is the training of one process: DDP, FSDP2, pieces of sequences, checkpoints."""

import contextlib
import functools
import io
import os
import re
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples import train_distributed
from lact_kernels.asr import features
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.compat.transformers import LaCTForCausalLM, LaCTSWIGLUConfig
from tests.ranks import torchrun

pytestmark = pytest.mark.xdist_group("ranks")

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attn_heads=2,
    num_lact_heads=2,
    intermediate_size=32,
    window_size=5,
    lact_chunk_size=4,
    attn_qk_norm=True,
    use_momentum=True,
)
ROWS, TOKENS, CLIP = 8, 30, 0.1
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# What runs on every rank.


def make_model(kind: str, frozen: bool) -> torch.nn.Module:
    """A language model or a recogniser. Where ranks share rows the batch norms of the recogniser are frozen:

    each takes the statistics of its own rows, as batch norm does under DDP and FSDP2.
    """
    torch.manual_seed(1)
    if kind == "lm":
        sizes = SIZES | {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": None}
        model = LaCTForCausalLM(LaCTSWIGLUConfig(**sizes, initializer_range=0.2))
    else:
        plain = {"dropout": 0.0, "num_freq_masks": 0, "num_time_masks": 0, "look_ahead": 2}
        model = LaCTForCTC(LaCTASRConfig(**SIZES, **plain, vocab_size=6, n_mels=20))
    for layer in blocks_of(model):
        torch.nn.init.constant_(layer.attn.lr_proj.bias, 4.0)  # updates that change the next tokens
    model.double().train()
    if kind == "ctc" and frozen:
        model.encoder.eval()
    return model


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.layers if isinstance(model, LaCTForCTC) else model.model.layers


def make_batch(kind: str, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    if kind == "lm":
        ids = torch.randint(TOKENS, (ROWS, 21), generator=generator)
        return {"input_ids": ids, "labels": ids}
    waveform = torch.randn(ROWS, 10000, generator=generator, dtype=torch.float64)
    lengths = torch.randint(6000, 10001, (ROWS, 1), generator=generator)
    labels = torch.randint(1, 6, (ROWS, 3), generator=generator)
    exists = (torch.arange(10000) < lengths).long()
    return {"input_values": waveform, "attention_mask": exists, "labels": labels}


@contextlib.contextmanager
def float64_throughout():
    """Losses and features, which are float32 whatever the dtype of the model, are float64."""
    mel = features._mel_spectrogram.__wrapped__
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(features, "_mel_spectrogram", lambda *sizes: mel(*sizes).double()),
    ):
        yield


@contextlib.contextmanager
def accelerate_of_its_own(**environment: str):
    """What Accelerate shares within a process is new, and gone afterwards."""
    with contextlib.ExitStack() as stack:
        for state in (AcceleratorState, PartialState, GradientState):
            stack.enter_context(mock.patch.object(state, "_shared_state", {}))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        yield


@contextlib.contextmanager
def accelerator_of_the_ranks():
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with accelerate_of_its_own(OMP_NUM_THREADS="1", **names):
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == dist.get_world_size()
        yield accelerator


class Training:
    """A model and its optimizer, on one process, or on data x sequence ranks.

    `length` is that of what its blocks read last.
    """

    def __init__(
        self,
        kind: str,
        strategy: str | None = None,
        data: int = 1,
        sequence: int = 1,
        *,
        frozen: bool = True,
    ):
        self.kind, self.group, self.row, self.rows = kind, None, 0, 1
        self.accelerator = None
        model = make_model(kind, frozen)
        blocks_of(model)[0].mlp.register_forward_pre_hook(self._measure)
        if (
            strategy
        ):  # where this takes fewer than all ranks, the others do the same among themselves
            size = data * sequence
            copies, names = dist.get_world_size() // size, ("copy", "data", "sequence")
            mesh = init_device_mesh("cpu", (copies, data, sequence), mesh_dim_names=names)
            everyone = init_device_mesh("cpu", (copies, size), mesh_dim_names=("copy", "all"))[
                "all"
            ]
            self.group = everyone.get_group()
            self.row, self.rows = mesh["data"].get_local_rank(), data
            if sequence > 1:
                model.sequence_mesh = mesh["sequence"]
            if copies == 1:
                self.accelerator = Accelerator(cpu=True)
                assert self.accelerator.num_processes == size
        if strategy == "fsdp2":
            for module in (*blocks_of(model), model):
                fully_shard(module, mesh=everyone)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if strategy == "ddp" and self.accelerator:
            model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        elif strategy == "ddp":
            model = DistributedDataParallel(model, process_group=self.group)
        elif self.accelerator:
            self.optimizer = self.accelerator.prepare(self.optimizer)
        assert isinstance(model, DistributedDataParallel) == (strategy == "ddp")
        self.model = model

    def step(self, number: int) -> tuple[float, float]:
        """The loss of the whole batch, and the norm of the gradients."""
        batch = make_batch(self.kind, number)
        mine = {name: x.chunk(self.rows)[self.row] for name, x in batch.items()}
        self.optimizer.zero_grad()
        with float64_throughout():
            loss = self.model(**mine).loss
        if self.accelerator:
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        else:
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        loss = loss.detach()
        if self.group is not None:
            dist.all_reduce(loss, group=self.group)
            loss /= dist.get_world_size(self.group)
        return loss.item(), getattr(norm, "full_tensor", lambda: norm)().item()

    def _measure(self, mlp, inputs) -> None:
        self.length = inputs[0].shape[1]

    def steps(self, *numbers: int) -> list[float]:
        return [x for number in numbers for x in self.step(number)]

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Weights, and the optimizer's averages of gradients: weights do not tell how large those were."""
        options = StateDictOptions(full_state_dict=True)
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        averages = {
            f"{moment} of {name}": x
            for name, state in optimizer["state"].items()
            for moment, x in state.items()
        }
        return weights | averages

    def save(self, folder: str) -> None:
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optimizer": optimizer}
        dcp.save(state, checkpoint_id=folder, process_group=self.group)

    def load(self, folder: str) -> None:
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder, process_group=self.group)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=weights, optim_state_dict=optimizer
        )


def on_ranks(function):
    """`function`, with an Accelerate that has found these ranks."""

    @functools.wraps(function)
    def wrapped(*args):
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        with accelerate_of_its_own(OMP_NUM_THREADS="1", **names):
            return function(*args)

    return wrapped


@on_ranks
def equals_one_process(kind: str, strategy: str, data: int, sequence: int) -> None:
    frozen = data > 1
    one = Training(kind, frozen=frozen)
    many = Training(kind, strategy, data, sequence, frozen=frozen)
    expected = one.step(0)
    assert expected[1] > CLIP
    torch.testing.assert_close(many.step(0), expected, **CLOSE)
    assert many.length <= one.length // sequence + 1
    actual, expected = many.whole_state(), one.whole_state()
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, **CLOSE, msg=name)


@on_ranks
def saved(folder: str, *arguments) -> list[float]:
    training = Training(*arguments)
    training.steps(0, 1)
    training.save(folder)
    return training.steps(2, 3)


@on_ranks
def loaded(folder: str, *arguments) -> list[float]:
    training = Training(*arguments)
    training.load(folder)
    return training.steps(2, 3)


# The tests.


@pytest.mark.parametrize("layout", [(4, 1), (2, 1), (2, 2), (1, 2)], ids="{0[0]} x {0[1]}".format)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["lm", "ctc"])
def test_a_step_is_that_of_one_process(ranks, kind, strategy, layout):
    ranks.run(equals_one_process, kind, strategy, *layout)


@pytest.mark.parametrize("kind", ["lm", "ctc"])
def test_checkpoint_of_4_ranks_on_2_and_on_1(ranks, tmp_path, kind):
    folder = str(tmp_path / "checkpoint")
    unbroken = Training(kind)
    unbroken.steps(0, 1)
    expected = unbroken.steps(2, 3)
    for losses in ranks.run(saved, folder, kind, "fsdp2", 2, 2):
        assert losses == pytest.approx(expected, rel=1e-10)
    for layout in (("fsdp2", 1, 2), ("ddp", 2, 1)):
        for losses in ranks.run(loaded, folder, kind, *layout):
            assert losses == pytest.approx(expected, rel=1e-10)
    alone = Training(kind)
    alone.load(folder)
    assert alone.steps(2, 3) == pytest.approx(expected, rel=1e-10)


STEPS = 10
COMMAND = ["--log-every", "1", "--save-every", "4", "--device", "cpu", "--steps"]


def losses_of(text: str) -> dict[int, float]:
    return {int(s): float(x) for s, x in re.findall(r"step +(\d+)  loss ([\d.]+)", text)}


@pytest.fixture
def example(capsys, monkeypatch):
    """Runs a few steps of the example in this process: its exit status, its losses, and what it wrote."""
    for state in (AcceleratorState, PartialState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})

    def run(*arguments: str) -> tuple[int, dict[int, float], str]:
        capsys.readouterr()
        status = train_distributed.main([*COMMAND, str(STEPS), *map(str, arguments)])
        text = capsys.readouterr()
        return status, losses_of(text.out), text.out + text.err

    return run


@pytest.fixture(scope="module")
def unbroken() -> dict[int, float]:
    """The losses of the example, on one process that nobody disturbs."""
    with contextlib.redirect_stdout(io.StringIO()) as out, accelerate_of_its_own():
        assert train_distributed.main([*COMMAND, str(STEPS)]) == 0
    losses = losses_of(out.getvalue())
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def example_in_pieces(folder: Path, dies_behind: int | None) -> None:
    """The example on a rank of torchrun, of which the second one may be killed behind a step."""
    forward = LaCTForCausalLM.forward
    steps = iter(range(STEPS))

    def dies(self, *args, **kwargs):
        if next(steps) == dies_behind and os.environ["RANK"] == "1":  # the other one waits for it
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **kwargs)

    arguments = [*COMMAND, str(STEPS), "--strategy", "fsdp2", "--sequence-parallel", "2"]
    with (
        open(folder / f"log-{os.environ['RANK']}", "a") as log,
        contextlib.redirect_stdout(log),
        mock.patch.object(LaCTForCausalLM, "forward", dies),
    ):
        assert train_distributed.main([*arguments, "--checkpoint", str(folder / "c")]) == 0


def test_the_example_goes_on_after_a_rank_was_killed(tmp_path, unbroken):
    """With pieces of sequences on two ranks. (`--max-restarts` of torchrun is not reliable with gloo.)"""
    with pytest.raises(ChildFailedError):
        torchrun(2, example_in_pieces, tmp_path, 6)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000004"]
    torchrun(2, example_in_pieces, tmp_path, None)
    text = (tmp_path / "log-0").read_text()
    assert re.findall(r"fsdp2, 1 x 2 ranks, (\d+) steps done", text) == ["0", "4"]
    assert losses_of(text) == pytest.approx(unbroken, rel=1e-4)


def test_the_example_does_not_read_half_a_checkpoint(tmp_path, unbroken, example, monkeypatch):
    save, folder = dcp.save, tmp_path / "c"

    def fails_the_second_time(state, checkpoint_id):
        save(state, checkpoint_id=checkpoint_id)
        if state["step"] == 8:
            next(checkpoint_id.glob("*.distcp")).write_bytes(b"")
            raise MemoryError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", fails_the_second_time)
        with pytest.raises(MemoryError):
            example("--checkpoint", folder)
    assert sorted(p.name for p in folder.iterdir()) == ["partial", "step-00000004"]
    status, losses, _ = example("--checkpoint", folder)
    assert status == 0 and losses == {step: unbroken[step] for step in range(5, STEPS + 1)}
    assert [p.name for p in folder.iterdir()] == [f"step-{STEPS:08d}"]


def test_ctrl_c_in_the_example_saves_first(tmp_path, unbroken, example, monkeypatch):
    row = train_distributed.Recall.__getitem__

    def interrupted(self, i):
        if self.rows[i] == 6 * train_distributed.BATCH:  # of step 7; batches are read ahead
            signal.raise_signal(signal.SIGINT)
        return row(self, i)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_distributed.Recall, "__getitem__", interrupted)
        status, losses, text = example("--checkpoint", tmp_path)
    assert status == 130 and "stopped after step 6" in text and max(losses) == 6
    assert signal.getsignal(signal.SIGINT) is before
    status, after, _ = example("--checkpoint", tmp_path)
    assert status == 0 and min(after) == 7
    assert losses | after == unbroken


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--sequence-parallel", "2"],
            "must divide the number of processes, .* got 2 and 1 processes",
        ),
        (["--sequence-parallel", "0"], "--sequence-parallel must be at least 1, got 0"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
    ],
    ids=["sequence on one process", "no sequence", "never saved"],
)
def test_bad_sizes_in_the_example(example, capsys, arguments, message):
    try:
        status, _, text = example(*arguments)
    except SystemExit as end:
        status, text = end.code, capsys.readouterr().err
    assert status == 2 and re.search(message, text)
