"""Runs what Triton compiles for NVIDIA GPUs, on a CPU with NumPy: values, faults and counts, no times.

See docs/ptx_emulator.md. Not installed with the package: it belongs to the tests and benchmarks.
"""

from ptx_emulator.errors import (
    Deadlock,
    Divergence,
    EmulatorError,
    InvalidAccess,
    StepLimit,
    StoppedAtReport,
    UnsupportedInstruction,
)
from ptx_emulator.launch import Options
from ptx_emulator.launcher import Emulation, LaunchRecord, Reported, emulate
from ptx_emulator.reports import Report
from ptx_emulator.tensormap import TensorMapArgument

__all__ = [
    "Deadlock",
    "Divergence",
    "Emulation",
    "EmulatorError",
    "InvalidAccess",
    "LaunchRecord",
    "Options",
    "Report",
    "Reported",
    "StepLimit",
    "StoppedAtReport",
    "TensorMapArgument",
    "UnsupportedInstruction",
    "emulate",
]
