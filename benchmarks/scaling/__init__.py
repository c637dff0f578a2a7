"""A LaCT model whose sequences are split over GPUs: bytes, work and predicted times. Nothing is measured.

`counts` has the formulas, which are exact and know nothing of a machine. `models` and `hardware` are what
they are evaluated for: shapes of the paper, and rates that are assumptions. `times` predicts steps from all
three. docs/scaling.md discusses them; `python -m benchmarks.scaling` prints its tables.
"""
