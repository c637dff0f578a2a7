import functools

import torch

from benchmarks.emulation import emulated_device
from lact_kernels import window_attn
from tests.cases import WindowCase, check_window_attn


def test_smoke():
    case = WindowCase("T150", Tq=150, window_size=33, Hq=2, Hkv=1, D=64, Dv=64)
    with emulated_device(90):
        check_window_attn(functools.partial(window_attn, backend="triton"), case, torch.bfloat16)
