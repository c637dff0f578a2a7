"""Packaging of lact-kernels: of the repository, only `lact_kernels` is installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "lact_kernels/core/version.py").read_text()
).group(1)

TRANSFORMERS = ["transformers>=4.57"]
ASR = [
    *TRANSFORMERS,
    "accelerate>=1.1",
    'flashlight-text>=0.0.7; python_version < "3.13"',  # beam search; it has no later wheels
    "jiwer>=4",
    "soundfile>=0.13",
    "tensorboard>=2.15",
    "torchaudio>=2.8",
    "tqdm>=4.60",
]
BENCH = ["matplotlib>=3.8", "numpy<2.4", "pytest>=8", "pytest-benchmark>=5"]
# The Triton interpreter of the tests needs numpy, and fails with 2.4. With pytest 9.2 pytest-xdist 3.8 takes
# no notice of xdist_group, and every worker would start the processes that distributed tests share.
TEST = [
    "hypothesis>=6.100",
    "mypy>=1.18",
    "numpy<2.4",
    "pytest>=8,<9.2",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
    "setuptools>=77",
]

setup(
    name="lact-kernels",
    version=VERSION,
    description="Fused Triton kernels for LaCT: sliding-window attention and chunked test-time training",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["lact_kernels", "lact_kernels.*"]),
    package_data={"lact_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.8", 'triton>=3.4; platform_system == "Linux"'],
    extras_require={
        "asr": ASR,
        "bench": BENCH,
        "transformers": TRANSFORMERS,
        "test": ASR + BENCH + TEST,
    },
    entry_points={"console_scripts": ["lact-asr = lact_kernels.asr.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
