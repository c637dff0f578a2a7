"""The speech demo runs from end to end; how well it recognises is for the whole of it to show."""

import shutil

import pytest

from examples import asr_demo


@pytest.mark.slow
def test_without_espeak_the_shipped_digits_serve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setitem(asr_demo.TASKS["digits"], "hears", 1250)
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
    assert ("passed" in said) == (status == 0)
    assert (tmp_path / "digits-0" / "results.json").is_file()


def test_commands_need_espeak(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr("sys.argv", ["asr_demo", "--task", "commands", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="commands needs espeak-ng: apt-get install espeak-ng"):
        asr_demo.main()
