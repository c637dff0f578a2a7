"""Measurements: what the compiler makes of the kernels, and what the kernels take on a device."""

import os

# On a busy CPU, threads that spin while they wait for each other can slow an operation down tenfold.
# OpenMP reads this once, when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
