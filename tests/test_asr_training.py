"""Training learns, can be killed at any moment, and goes on as if nothing had been."""

import json
import math
import os
import signal

import pytest
import soundfile
import torch

from lact_kernels.asr.cli import main
from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.manifest import Utterance, write_manifest
from lact_kernels.asr.pretrained import load_recogniser
from lact_kernels.asr.text import build_tokenizer
from lact_kernels.asr.training import TrainingOptions, new_model, train, usable
from tests.ranks import PATIENCE, warm_processes

PITCHES = {"low": 300, "high": 1200}
OPTIONS = {"batch_size": 4, "save_steps": 4, "logging_steps": 1, "warmup_steps": 2, "workers": 0}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attn_heads": 2,
    "num_lact_heads": 2,
    "intermediate_size": 32,
    "window_size": 8,
    "lact_chunk_size": 4,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Utterance]:
    """ "Words" that are tones."""
    folder, generator = tmp_path_factory.mktemp("corpus"), torch.Generator().manual_seed(0)
    utterances = []
    for number in range(26):
        names = [list(PITCHES)[i] for i in torch.randint(2, (3,), generator=generator).tolist()]
        t = torch.arange(4000) / 16000
        tones = [0.3 * torch.sin(2 * math.pi * PITCHES[name] * t) for name in names]
        parts = [x for tone in tones for x in (tone, torch.zeros(2000))]
        path = folder / f"{number}.flac"
        soundfile.write(path, torch.cat(parts).numpy(), 16000)
        utterances.append(Utterance(str(path), " ".join(names), 18000 / 16000, speaker="tone"))
    return utterances


def run(out, corpus, dev=(), config=None, **options):
    tokenizer = build_tokenizer((u.text for u in corpus), "word")
    config = LaCTASRConfig(**SIZES, vocab_size=len(tokenizer), **config or {})
    options = TrainingOptions(**OPTIONS | {"epochs": 2} | options)
    return train(out, new_model(config, options.seed), tokenizer, corpus, dev, options)


def curve(out) -> dict[int, float]:
    """The loss of each step, as the last checkpoint has it."""
    last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus):
    """A training of 14 steps in two epochs that nobody disturbs, and its folder."""
    out = tmp_path_factory.mktemp("unbroken")
    return run(out, corpus), out


def test_it_learns(tmp_path, corpus):
    plain = {"dropout": 0.0, "num_freq_masks": 0, "num_time_masks": 0}
    options = {"augmentation": None, "learning_rate": 1e-2, "save_steps": 35, "logging_steps": 5}
    recogniser = run(tmp_path, corpus, corpus[:6], plain, epochs=20, **options)
    losses = list(curve(tmp_path).values())
    assert losses[-1] < 0.3 * losses[0]
    state = json.loads(next(tmp_path.glob("checkpoints/*/trainer_state.json")).read_text())
    rates = [entry["eval_wer"] for entry in state["log_history"] if "eval_wer" in entry]
    assert min(rates) < 0.2
    assert list(tmp_path.glob("checkpoints/**/events.out.tfevents*"))
    loaded = load_recogniser(tmp_path)
    assert loaded.words == ("high", "low") == recogniser.words
    for name, p in recogniser.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], p, rtol=0, atol=0)


@pytest.mark.parametrize("step", [3, 6, 9], ids=["before a checkpoint", "between two", "epoch 2"])
def test_a_crash_changes_nothing(tmp_path, corpus, unbroken, step, monkeypatch):
    expected, folder = unbroken
    from lact_kernels.asr import training

    class Crash(training._Interruption):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise MemoryError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_Interruption", Crash)
        with pytest.raises(MemoryError):
            run(tmp_path, corpus)
    again = run(tmp_path, corpus)
    assert curve(tmp_path) == curve(folder) and len(curve(folder)) == 14
    for name, p in expected.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], p, rtol=0, atol=0, msg=name)


def test_an_unfinished_checkpoint_is_not_read(tmp_path, corpus, unbroken):
    expected, folder = unbroken
    run(tmp_path, corpus)
    last = tmp_path / "checkpoints" / "checkpoint-14"
    state = (last / "trainer_state.json").read_text()
    (last / "trainer_state.json").write_text(state[: len(state) // 2])
    again = run(tmp_path, corpus)
    assert curve(tmp_path) == curve(folder)
    weight = again.model.ctc_head.weight
    torch.testing.assert_close(weight, expected.model.ctc_head.weight, rtol=0, atol=0)


def test_ctrl_c_saves_first(tmp_path, corpus, unbroken, monkeypatch):
    expected, _ = unbroken
    from lact_kernels.asr import training

    class CtrlC(training._Interruption):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                signal.raise_signal(signal.SIGINT)
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_Interruption", CtrlC)
        with pytest.raises(KeyboardInterrupt, match="after step 6"):
            run(tmp_path, corpus)
    assert (tmp_path / "checkpoints" / "checkpoint-6").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = run(tmp_path, corpus)
    weight = again.model.ctc_head.weight
    torch.testing.assert_close(weight, expected.model.ctc_head.weight, rtol=0, atol=0)


def command_that_is_killed(arguments, threads):
    """It dies within the second checkpoint: weights are written, and their optimizer is not."""
    save, torch.save = torch.save, lambda x, file, *rest: die_at(file) or save(x, file, *rest)
    torch.set_num_threads(threads)
    main(arguments)


def die_at(file):
    if "checkpoint-8" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.xdist_group("ranks")  # which have the warm processes
def test_sigkill_within_a_checkpoint(tmp_path, corpus, unbroken):
    """The command is killed, and started again: the same curve to the last digit."""
    _, folder = unbroken
    write_manifest(tmp_path / "train.jsonl", corpus)
    out = tmp_path / "out"
    arguments = ["train", str(out), "--unit", "word", "--epochs", "2"]
    arguments += ["--train", str(tmp_path / "train.jsonl"), "--set"]
    arguments += [f"{name}={value}" for name, value in (SIZES | {"look_ahead": 4}).items()]
    arguments += ["use_momentum=True", "attn_qk_norm=True", "inter_multi=1"]
    for name, value in OPTIONS.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    process = warm_processes().Process(
        target=command_that_is_killed, args=(arguments, torch.get_num_threads())
    )
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    unfinished = out / "checkpoints" / "checkpoint-8"
    assert (unfinished / "model.safetensors").is_file()
    assert not (unfinished / "trainer_state.json").exists()
    assert main(arguments) == 0
    assert curve(out) == curve(folder)
    assert load_recogniser(out).words == ("high", "low")


def test_other_settings_in_the_same_folder(tmp_path, corpus, unbroken):
    _, folder = unbroken
    with pytest.raises(ValueError, match=r"other settings \(learning_rate, seed\)"):
        run(folder, corpus, seed=1, learning_rate=1e-4)


def test_workers_and_accumulation(tmp_path, corpus, unbroken):
    """Reading in another process changes nothing; accumulated steps make fewer updates."""
    _, folder = unbroken
    run(tmp_path / "workers", corpus, workers=1)
    assert curve(tmp_path / "workers") == curve(folder)
    run(tmp_path / "accumulated", corpus, gradient_accumulation_steps=2)
    assert len(curve(tmp_path / "accumulated")) == 8


def test_going_on_from_a_recogniser(tmp_path, corpus, unbroken):
    before, folder = unbroken
    recogniser = load_recogniser(folder)
    train(
        tmp_path,
        recogniser.model,
        recogniser.tokenizer,
        corpus,
        options=TrainingOptions(**OPTIONS, epochs=1, learning_rate=1e-9),
    )
    after = load_recogniser(tmp_path).model
    weight = before.model.ctc_head.weight
    torch.testing.assert_close(after.ctc_head.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.features.mean, before.model.features.mean)


def test_bfloat16_and_gradient_checkpointing(tmp_path, corpus):
    recogniser = run(
        tmp_path, corpus[:8], epochs=1, bf16=True, gradient_checkpointing=True, join_seconds=4.0
    )
    assert all(
        p.dtype == torch.float32 and p.isfinite().all() for p in recogniser.model.parameters()
    )


def test_utterances_that_ctc_cannot_align_are_left_out(corpus):
    tokenizer = build_tokenizer((u.text for u in corpus), "word")
    config = LaCTASRConfig(**SIZES, vocab_size=len(tokenizer), max_utterance_seconds=1.1)
    kept, counts = usable(corpus, tokenizer, config, TrainingOptions())
    assert kept == [] and counts == {"longer than 1.1 s": 26}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"workers": -1}, "workers must be an integer of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"save_steps": 10, "logging_steps": 3}, "must divide save_steps = 10, got 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_bad_calls(tmp_path, corpus):
    tokenizer = build_tokenizer((u.text for u in corpus), "word")
    with pytest.raises(ValueError, match="no utterances to train on"):
        train(tmp_path, new_model(LaCTASRConfig(**SIZES, vocab_size=4)), tokenizer, [])
    with pytest.raises(ValueError, match="that of the tokenizer, 4, got 9"):
        train(tmp_path, new_model(LaCTASRConfig(**SIZES, vocab_size=9)), tokenizer, corpus)
    assert not list(tmp_path.iterdir())
