"""Programs that show the package at work: `python -m examples.demo`."""

import benchmarks  # noqa: F401  (chooses how threads wait, before PyTorch is imported)
