"""`lact-asr`: from recordings to a recogniser and to transcripts; errors without tracebacks."""

import json
import re
import subprocess
import sys

import pytest
import torch

from lact_kernels.asr.cli import COMMANDS, main
from lact_kernels.asr.manifest import write_manifest
from tests.test_asr_training import SIZES, corpus  # noqa: F401


def test_from_recordings_to_transcripts(tmp_path, corpus, capsys, monkeypatch):  # noqa: F811
    manifest, model = tmp_path / "tones.jsonl", tmp_path / "model"
    write_manifest(manifest, corpus)
    broken = json.dumps({"audio_filepath": "none.wav", "duration": 1.0, "text": "low high"})
    manifest.write_text(manifest.read_text() + broken + "\n")
    settings = [f"{name}={value}" for name, value in SIZES.items()]
    settings += ["num_freq_masks=0", "num_time_masks=0", "dropout=0.0", "look_ahead=4"]
    arguments = ["train", str(model), "--train", str(manifest), "--set", *settings]
    arguments += ["--unit", "word", "--epochs", "20", "--batch-size", "4", "--no-augmentation"]
    arguments += ["--learning-rate", "0.01", "--warmup-steps", "2", "--workers", "0"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "training: 27 utterances" in said
    assert "fast weights learn every 0.16 s: at least once in 100% of the utterances" in said

    results = tmp_path / "results.json"
    assert main(["evaluate", str(model), f"tones={manifest}", "--json", str(results)]) == 0
    tones = json.loads(results.read_text())["sets"]["tones"]
    assert tones["wer"]["rate"] < 0.1 and tones["skipped"] == 1
    capsys.readouterr()

    assert main(["transcribe", str(model), corpus[0].path, "--format", "json"]) == 0
    transcript = json.loads(capsys.readouterr().out)
    assert transcript["text"] == corpus[0].text
    starts = [word["start"] for s in transcript["segments"] for word in s["words"]]
    assert starts == pytest.approx([0.0, 0.375, 0.75], abs=0.2)

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main(["stream", str(model), corpus[0].path, "--fast"]) == 0
    assert threads == [1]
    streamed = capsys.readouterr()
    assert re.findall("[a-z]+", streamed.out) == corpus[0].text.split()
    assert "latency by design 200 ms" in streamed.err


def test_a_window_with_later_frames(tmp_path, corpus, capsys):  # noqa: F811
    """Everything but streams, of whose error the output is one line."""
    manifest, model = tmp_path / "tones.jsonl", tmp_path / "model"
    write_manifest(manifest, corpus[:8])
    settings = [f"{name}={value}" for name, value in (SIZES | {"window_size": [4, 3]}).items()]
    arguments = ["train", str(model), "--train", str(manifest), "--set", *settings]
    assert main([*arguments, "--unit", "word", "--epochs", "1", "--workers", "0"]) == 0
    assert json.loads((model / "config.json").read_text())["window_size"] == [4, 3]
    assert main(["evaluate", str(model), str(manifest)]) == 0
    assert main(["transcribe", str(model), corpus[0].path]) == 0
    capsys.readouterr()
    assert main(["stream", str(model), corpus[0].path, "--fast"]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.startswith("lact-asr: a stream needs a window_size without a right side")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0 and all(re.search(rf"^ +{name} ", text, re.M) for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 2, "COMMAND"),
        (["fly"], 2, "invalid choice"),
        (["train", "OUT", "--train", "x", "--set", "chunk"], 2, "'chunk' is not NAME=VALUE"),
        (["train", "OUT", "--train", "x", "--set", "a=b("], 2, "no value of Python"),
        (["train", "OUT", "--train", "nothing.jsonl"], 1, "nothing.jsonl"),
        (["train", "OUT", "--train", "bad.jsonl"], 1, "bad.jsonl, line 2"),
        (["train", "OUT", "--train", "good.jsonl", "--config", "huge"], 1, "choose one of tiny"),
        (
            ["train", "OUT", "--train", "good.jsonl", "--set", "look_ahead=-1"],
            1,
            "at least 0, got -1",
        ),
        (
            ["train", "OUT", "--train", "good.jsonl", "--set", "lookahead=1"],
            1,
            "no option lookahead",
        ),
        (["train", "OUT", "--train", "good.jsonl", "--epochs", "0"], 1, "epochs must be"),
        (["train", "OUT", "--train", "good.jsonl", "--init", "OUT"], 1, "no config.json"),
        (["evaluate", "OUT", "good.jsonl"], 1, "OUT is not the folder of a recogniser"),
        (["transcribe", "OUT", "good.wav"], 1, "no config.json"),
        (["stream", "OUT", "good.wav"], 1, "no config.json"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    good = '{"audio_filepath": "a.wav", "duration": 1, "text": "one"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(good + "{\n")
    try:
        result = main(arguments)
    except SystemExit as error:
        result = error.code
    said = capsys.readouterr().err
    assert result == status and message in said
    assert "Traceback" not in said and (status == 2 or said.count("\n") == 1)
    assert not (tmp_path / "OUT").exists()


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(FileNotFoundError):
        main(["--debug", "train", "OUT", "--train", "nothing.jsonl"])


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    from lact_kernels.asr.commands import transcribe

    def interrupted(args):
        raise KeyboardInterrupt("stopped after step 7")

    monkeypatch.setattr(transcribe, "run", interrupted)
    assert main(["transcribe", "MODEL", "x.wav"]) == 130
    assert capsys.readouterr().err == "\nlact-asr: interrupted: stopped after step 7\n"


@pytest.mark.slow
def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "lact_kernels.asr", "transcribe", "none", "x.wav"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        done.stderr == "lact-asr: none has no config.json: it is not the folder of a recogniser\n"
    )
