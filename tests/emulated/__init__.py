"""Tests of what Triton compiles, in the PTX emulator: run with TRITON_INTERPRET=0."""
