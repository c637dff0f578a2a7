"""Programs that show the package at work: `python -m examples.demo`."""

import benchmarks  # noqa: F401  (sets how idle threads wait, before PyTorch is imported)
