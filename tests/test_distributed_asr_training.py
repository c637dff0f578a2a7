"""The recogniser's training on several processes, which may share recordings, is that of one."""

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState

from lact_kernels.asr import training
from lact_kernels.asr.cli import main
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.dataset import SpeechDataset, collate
from lact_kernels.asr.manifest import write_manifest
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import load_recogniser
from lact_kernels.asr.text import build_tokenizer
from lact_kernels.asr.training import TrainingOptions, new_model, processes, train
from tests.ranks import Ranks
from tests.test_asr_training import SIZES, corpus  # noqa: F401

pytestmark = pytest.mark.xdist_group("ranks")

# Nothing is random. It is float64, as AdamW would make steps of what float32 rounds where a gradient is 0.
PLAIN = {"dropout": 0.0, "num_freq_masks": 0, "num_time_masks": 0}
OPTIONS = TrainingOptions(
    epochs=2, batch_size=3, learning_rate=1e-2, warmup_steps=2, save_steps=4, logging_steps=1,
    augmentation=None, workers=0,
)  # fmt: skip
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def utterances(corpus):  # noqa: F811
    """24 of several lengths: rows are padded, 8 batches of 3, and evaluation has as many for each rank."""
    return [replace(u, duration=1.125 - 0.02 * (i % 9)) for i, u in enumerate(corpus[:24])]


@contextlib.contextmanager
def launched(rank: int | None = None, size: int = 1):
    """This process as torchrun would have started it on a CPU. Behind it Accelerate has forgotten all."""
    values = {"OMP_NUM_THREADS": "1"}
    if rank is not None:
        values |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        values |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
    with (
        mock.patch.dict(os.environ, values),
        mock.patch.object(torch.accelerator, "is_available", return_value=False),
    ):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@contextlib.contextmanager
def fsdp_on_a_cpu():
    """Accelerate shards on a CPU too: it can, but takes the plugin on GPUs alone."""
    before = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
        self.distributed_type = DistributedType.FSDP

    with (
        mock.patch.object(AcceleratorState, "__init__", init),
        mock.patch.object(training, "processes", lambda _: processes(TrainingOptions())),
    ):
        yield


class OneIsStopped(training._Interruption):
    """SIGTERM for one process alone."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)
        super().on_step_end(args, state, control, **kwargs)


def float64_loss(*args, loss=LaCTForCTC._loss):
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return loss(*args)


def train_float64(out, utterances, options, dev=()) -> LaCTForCTC:
    tokenizer = build_tokenizer((u.text for u in utterances), "word")
    config = LaCTASRConfig(**SIZES, **PLAIN, vocab_size=len(tokenizer))
    with mock.patch.object(LaCTForCTC, "_loss", float64_loss):
        model = new_model(config).double()
        recogniser = train(out, model, tokenizer, utterances, dev, options)
    assert model.sequence_mesh is None
    return recogniser.model


def last_checkpoint(out) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and history."""
    last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    state = json.loads((last / "trainer_state.json").read_text())
    return LaCTForCTC.from_pretrained(last, dtype=torch.float64), state["log_history"]


def values(history, name):
    return [entry[name] for entry in history if name in entry]


def dev_loss(model, utterances):
    tokenizer = build_tokenizer((u.text for u in utterances), "word")
    with torch.no_grad(), mock.patch.object(LaCTForCTC, "_loss", float64_loss):
        return model.eval()(**collate(list(SpeechDataset(utterances, tokenizer)))).loss.item()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, utterances):
    """The last checkpoint of one process that makes an update of so many batches."""
    made = {}

    def make(batches):
        if batches not in made:
            out = tmp_path_factory.mktemp("one")
            with launched():
                options = replace(OPTIONS, gradient_accumulation_steps=batches)
                train_float64(out, utterances, options, utterances)
            made[batches] = last_checkpoint(out)
        return made[batches]

    return make


def train_on_ranks(out, utterances, options, stopped, dev):
    """The rank's model; before, one of them may be `stopped` behind step 3."""
    forced = fsdp_on_a_cpu() if options.fsdp else contextlib.nullcontext()
    with launched(dist.get_rank(), dist.get_world_size()), forced:
        if stopped:
            with (
                mock.patch.object(training, "_Interruption", OneIsStopped),
                pytest.raises(KeyboardInterrupt, match="after step 3"),
            ):
                train_float64(out, utterances, options, dev)
            assert [p.name for p in out.glob("checkpoints/check*")] == ["checkpoint-3"]
        model = train_float64(out, utterances, options, dev)
        assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
        return model.state_dict()


CASES = {
    "two-groups": ({"sequence_parallel": 2}, True),
    "one-group": ({"sequence_parallel": 4, "gradient_checkpointing": True}, False),
    "fsdp": ({"sequence_parallel": 2, "fsdp": True}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_many_processes_are_one(ranks: Ranks, utterances, one_process, tmp_path, case):
    """Weights and losses, also behind an interruption, and one recogniser for all."""
    changes, stopped = CASES[case]
    options, dev = replace(OPTIONS, **changes), () if case == "fsdp" else utterances
    weights = ranks.run(train_on_ranks, tmp_path, utterances, options, stopped, dev)
    saved = load_recogniser(tmp_path, dtype=torch.float64).model.state_dict()
    for of_rank in weights:
        torch.testing.assert_close(of_rank, saved, rtol=0, atol=0)

    batches = ranks.size // changes["sequence_parallel"]
    (model, history), (whole, expected) = last_checkpoint(tmp_path), one_process(batches)
    assert len(values(expected, "loss")) == 16 // batches
    for name in ("loss", "grad_norm"):  # which Trainer adds up and rounds in float32
        assert values(history, name) == pytest.approx(values(expected, name), rel=1e-6)
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(whole.named_parameters()), **CLOSE
    )
    if dev:
        assert values(history, "eval_loss")[-1] == pytest.approx(
            dev_loss(model, utterances), rel=1e-8
        )
    if batches == 1:  # else the main process's batch norms have heard half as much
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), **CLOSE)
        assert values(history, "eval_wer") == values(expected, "eval_wer")


def errors(out, utterances, options):
    """What `train` raises on this rank."""
    with launched(dist.get_rank(), dist.get_world_size()):
        try:
            train_float64(out, utterances, options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def test_every_rank_says_what_is_wrong(ranks: Ranks, utterances, tmp_path):
    wrong = replace(OPTIONS, sequence_parallel=3)
    message = (
        "ValueError: the number of processes must be a multiple of sequence_parallel = 3, got 4"
    )
    assert ranks.run(errors, tmp_path, utterances, wrong) == 4 * [message]
    said = set(ranks.run(errors, tmp_path, utterances, replace(OPTIONS, fsdp=True)))
    assert len(said) == 1 and "a CPU Accelerate would pass it over in silence" in said.pop()
    assert not list(tmp_path.iterdir())

    (tmp_path / training.SETTINGS).write_text('{"learning_rate": 7}')
    said = ranks.run(errors, tmp_path, utterances, OPTIONS)
    assert len(set(said)) == 1 and "ValueError" in said[0] and "other settings" in said[0]


@pytest.mark.parametrize(
    "argument, message",
    [
        (["--sequence-parallel", "2"], "multiple of sequence_parallel = 2, got 1"),
        (["--sequence-parallel", "0"], "sequence_parallel must be an integer of at least 1, got 0"),
        (["--fsdp"], "fsdp needs GPUs, and there is none"),
    ],
    ids=lambda x: x[0][2:] if isinstance(x, list) else "",
)
def test_commands_that_cannot_run(corpus, tmp_path, capsys, argument, message):  # noqa: F811
    write_manifest(tmp_path / "a.jsonl", corpus)
    out = tmp_path / "out"
    with launched():
        assert main(["train", str(out), "--train", str(tmp_path / "a.jsonl"), *argument]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()


def test_what_fsdp_asks_of_accelerate():
    with launched():
        plugin = TrainingOptions(fsdp=True).trainer_arguments(Path("out"), False).fsdp_plugin_args
    with launched():  # bfloat16 is not Accelerate's, whose policy would round waveforms
        assert not TrainingOptions(fsdp=True, bf16=True).trainer_arguments(Path("out"), False).bf16
    assert plugin["fsdp_version"] == 2 and plugin["state_dict_type"] == "FULL_STATE_DICT"
    assert plugin["transformer_cls_names_to_wrap"] == "LaCTASRBlock"


def test_a_folder_of_a_version_without_these_options(corpus, tmp_path):  # noqa: F811
    """It goes on, but not with them."""
    model, options = new_model(LaCTASRConfig(**SIZES, vocab_size=4)), TrainingOptions()
    settings = training._settings(model, options, corpus)
    old = {k: v for k, v in settings.items() if k not in ("sequence_parallel", "fsdp")}
    (tmp_path / training.SETTINGS).write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"other settings \(sequence_parallel\)"):
        training._prepare(tmp_path, settings | {"sequence_parallel": 2})
    assert training._prepare(tmp_path, settings) is None
