"""Thousands of small cases, drawn at random, against the reference: `python -m tests.soak`."""
