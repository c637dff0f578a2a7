"""What every test gets, and which tests a process can run."""

import gc
import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch

pytest_plugins = ["tests.interpreter", "tests.ranks"]

# Of thousands of modules that are imported nothing is garbage: to look for it takes a third of their time.
gc.disable()

# Without a GPU a process interprets Triton's kernels, or with TRITON_INTERPRET=0 emulates what is compiled of
# them: Triton decides for one when it is imported. tests/emulated is for the latter, everything else is not.
ON_CPU = not torch.cuda.is_available()
EMULATED = Path(__file__).parent / "emulated"
if ON_CPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Threads that wait for each other on a busy machine cost more than what tests compute.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A borrowed GPU machine may lack what speech needs. Elsewhere a package that is missing is an error.
SPEECH = ("accelerate", "jiwer", "soundfile", "tensorboard", "torchaudio", "transformers")
if not ON_CPU and not all(map(importlib.util.find_spec, SPEECH)):
    collect_ignore_glob = ["test_*asr*.py"]


def pytest_ignore_collect(collection_path):
    """Leave out what this kind of process cannot run."""
    if collection_path.suffix != ".py":
        return None
    emulated = EMULATED in collection_path.parents
    return (
        True
        if (emulated and INTERPRETED) or (not emulated and ON_CPU and not INTERPRETED)
        else None
    )


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and ON_CPU:
            item.add_marker(skip)


def pytest_collection_finish(session):
    """What has been imported stays: to look through it for garbage took a seventh of the tests' time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def signals():
    """Signals do what they do in a terminal: a shell starts background processes deaf to Ctrl-C."""
    dispositions = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, action) for number, action in dispositions.items()}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def full_float32_products():
    """The oracle's float32 products must not be TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
