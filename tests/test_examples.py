"""Every example runs, and finds what it says."""

import contextlib
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import torchrun

ROOT = Path(__file__).parent.parent
SEQUENCE_PARALLEL = str(ROOT / "examples/sequence_parallel.py")


@pytest.fixture
def run(monkeypatch):
    """Runs an example's `main` in this process with these arguments: its exit status."""

    def run(name: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return importlib.import_module(f"examples.{name}").main()

    return run


@pytest.mark.parametrize(
    "example, found",
    [
        (["own_module"], "without fast weights, 0.0"),
        (["swap_layers"], "replaced: layers.0.attn, layers.1.attn, layers.2.attn"),
        (["stream", "--piece", "40"], "5120 frames: saved and restored"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_example(run, capsys, example, found):
    assert run(*example) == 0
    assert found in capsys.readouterr().out


def test_novel_views(run, capsys, monkeypatch, tmp_path):
    """Without updates both trainings are the same, so any gain is theirs."""
    monkeypatch.setattr("examples.novel_views.MARGIN", 0.25)
    picture = tmp_path / "views" / "picture.png"
    assert run("novel_views", "--steps", "100", "--size", "16", "--out", str(picture)) == 0
    said = capsys.readouterr().out
    for row in ("fast weights", "without updates", "nearest picture", "mean colour"):
        assert re.search(rf"  {row} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d\n", said)
    assert "with 4 pictures" in said
    assert "the largest difference from the joint pass is" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--steps", "39"], "--steps must be at least 40, got 39"),
        (["--seed", str(2**64)], "--seed must be at least 0 and less than 2**32"),
        (["--size", "12"], "--size must be a multiple of 8, got 12"),
        (["--size", "0"], "--size must be a multiple of 8, got 0"),
        (["--out", "views.jpg"], "--out must be a file that ends in .png, got views.jpg"),
    ],
)
def test_novel_views_refuses(run, capsys, arguments, error):
    with pytest.raises(SystemExit) as end:
        run("novel_views", *arguments)
    assert end.value.code == 2 and error in capsys.readouterr().err


def test_sliding_window_lm():
    """In a process of its own, in which nothing else has registered the attention."""
    code = (
        "import sys; from examples import sliding_window_lm as e; e.STEPS = 3; sys.exit(e.main())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logits differ from eager attention by" in done.stdout


def sequence_parallel(log: Path) -> None:
    arguments = ["--device", "cpu", "--tokens", "1024", "--window", "64", "--chunk", "128"]
    sys.argv = [SEQUENCE_PARALLEL, *arguments]
    with open(f"{log}-{os.environ['RANK']}", "w") as file, contextlib.redirect_stdout(file):
        try:
            runpy.run_path(SEQUENCE_PARALLEL, run_name="__main__")
        except SystemExit as end:
            assert end.code == 0


@pytest.mark.xdist_group("ranks")
def test_sequence_parallel(tmp_path):
    torchrun(2, sequence_parallel, tmp_path / "log")
    said = (tmp_path / "log-0").read_text()
    assert "They are the same, but for rounding." in said
    assert "rank 1: tokens 512 to 1024" in said


def test_sequence_parallel_alone_says_how_to_call_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SEQUENCE_PARALLEL])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(SEQUENCE_PARALLEL, run_name="__main__")
    assert end.value.code == 2 and "torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_video(run, monkeypatch, capsys, tmp_path):
    """A short training is enough to see that fast weights remember the frames before."""
    monkeypatch.setattr("examples.video.TEST_VIDEOS", 16)
    monkeypatch.setattr("examples.video.FRAMES", 5)
    assert run("video", "--steps", "40", "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d ", line)]
    assert [row[0] for row in rows] == ["2", "3", "4"]
    remembered, guessed = (float(psnr) for psnr in rows[0][1:3])
    assert remembered > guessed + 0.3
    assert float(re.search(r"differ by at most (\S+)\.\n", said)[1]) < 1e-4
    assert (tmp_path / "video.png").read_bytes().startswith(b"\x89PNG")


def test_video_of_too_few_steps_is_an_error(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("video", "--steps", "19")
    assert end.value.code == 2
    assert "--steps must be at least 20, got 19" in capsys.readouterr().err


def test_stream_of_no_frames_is_an_error(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("stream", "--piece", "0")
    assert end.value.code == 2
    assert "--piece must be at least 1, got 0" in capsys.readouterr().err
