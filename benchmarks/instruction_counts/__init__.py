"""What kernels execute at a real size, counted in the PTX emulator, and bounds on time from that.

`__main__.py` is the command, `points.py` says what is run and what it needs, `peers.py` has what others
make of the same inputs, `counting.py` runs and counts, `rates.py` says what GPUs do at best.
"""
