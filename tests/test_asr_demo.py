"""The speech demo runs from end to end; how well it recognises is for the whole of it to show."""

import shutil

import pytest

from examples import asr_demo
from lact_kernels.asr.manifest import read_manifest, write_manifest

# A little of what is shipped, from all of it, and what learns some of the words from that.
FEW = {
    "train": 250,
    "dev": 25,
    "test_voice": 25,
    "test_accent": 25,
    "test_noise": 25,
    "test_flite": 25,
}
EASY = "--no-augmentation --learning-rate 0.006 --set num_hidden_layers=2 dropout=0.0".split()
EASY += ["num_freq_masks=0", "num_time_masks=0"]


@pytest.mark.slow
def test_without_espeak_the_shipped_digits_serve(tmp_path, monkeypatch, capsys):
    for name, number in FEW.items():
        utterances = read_manifest(asr_demo.SHIPPED / f"{name}.jsonl")
        few = utterances[:: len(utterances) // number]
        write_manifest(tmp_path / f"{name}.jsonl", few)
    monkeypatch.setattr(asr_demo, "SHIPPED", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    digits = asr_demo.TASKS["digits"]
    changes = {"hears": 2 * FEW["train"], "train": [*digits["train"], *EASY]}
    monkeypatch.setitem(asr_demo.TASKS, "digits", digits | changes)
    monkeypatch.setattr(asr_demo, "SECONDS", 2)
    monkeypatch.setattr("sys.argv", ["asr_demo", "--out", str(tmp_path)])
    status = asr_demo.main()
    said = capsys.readouterr().out
    assert "espeak-ng is not installed" in said
    for command in ("train", "evaluate", "transcribe", "stream"):
        assert f"$ lact-asr {command} " in said
    for name in ("test_voice", "test_accent", "test_noise", "test_flite"):
        assert f"\n{name} " in said
    assert "log-probabilities differ by at most" in said
    assert "confusions and alignment: " in said and (tmp_path / "digits-0/asr_demo.png").is_file()
    assert ("passed" in said) == (status == 0)
    assert (tmp_path / "digits-0" / "results.json").is_file()


def test_commands_need_espeak(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr("sys.argv", ["asr_demo", "--task", "commands", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="commands needs espeak-ng: apt-get install espeak-ng"):
        asr_demo.main()
