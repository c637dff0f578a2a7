"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before its import."""

import importlib.util
import os

import pytest
import torch

pytest_plugins = ["tests.ranks"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# A borrowed GPU machine may lack what speech needs. Elsewhere a package that is missing is an error.
SPEECH = ("accelerate", "jiwer", "soundfile", "tensorboard", "torchaudio", "transformers")
if torch.cuda.is_available() and not all(map(importlib.util.find_spec, SPEECH)):
    collect_ignore_glob = ["test_*asr*.py"]


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
