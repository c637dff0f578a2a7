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


@pytest.mark.slow
def test_sequence_parallel():
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", *command, "examples/sequence_parallel.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "They are the same, but for rounding." in done.stdout
    assert "rank 1: tokens 2048 to 4096" in done.stdout


def test_sequence_parallel_alone_says_how_to_call_it():
    command = [sys.executable, "examples/sequence_parallel.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr


def test_stream_of_no_frames_is_an_error():
    done = run("stream", "--piece", "0")
    assert done.returncode == 2 and "--piece must be at least 1, got 0" in done.stderr
