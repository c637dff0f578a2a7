"""Every example runs, and finds what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, found",
    [
        ("own_module", "without fast weights, 0.0"),
        ("swap_layers", "replaced: layers.0.attn, layers.1.attn, layers.2.attn"),
        ("sliding_window_lm", "logits differ from eager attention by"),
        ("stream", "5120 frames: saved and restored"),
    ],
)
def test_example(name, found):
    done = run(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found in done.stdout


def test_stream_of_no_frames_is_an_error():
    done = run("stream", "--piece", "0")
    assert done.returncode == 2 and "--piece must be at least 1, got 0" in done.stderr
