"""Validation shared by both operations.

Every function raises before any work starts: `TypeError` for a wrong type or dtype, `ValueError` for
a wrong value, shape or device. Messages name the argument, what came and what was expected.
"""

import functools
import importlib.util
import math
import os
from typing import Literal, get_args

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # found, not imported
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Backend = Literal["auto", "triton", "eager"]
BACKENDS = get_args(Backend)


def check_floating(name: str, x: Tensor, *layouts: str) -> None:
    """`x` is a floating-point tensor with one of the layouts, and only B and T may be empty."""
    expected = " or ".join(layouts)
    check_float_dtype(name, x, expected)
    if x.ndim not in [len(layout.split(",")) for layout in layouts]:
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(x.shape)}")
    if 0 in x.shape[-2:]:
        raise ValueError(f"{name} {expected} has an empty head or channel axis: {tuple(x.shape)}")


def check_float_dtype(name: str, x: Tensor, layout: str) -> None:
    """`x` is a tensor of a floating dtype that the operations know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {dtypes}, got {x.dtype}")


def check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    like: str = "q",
) -> None:
    """`x` is a tensor of exactly this shape, dtype and device, which is that of the argument `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have the dtype {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {x.device}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have the shape {layout} = {tuple(shape)}, got {tuple(x.shape)}"
        )


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        check_flag(name, flag)


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_int(name: str, value: int) -> None:
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_positive_int(name: str, value: int) -> None:
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_finite_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(value) < math.inf:  # nor NaN; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def known_values(lengths: Tensor) -> list[int]:
    """The values of a tensor as far as they can be known without waiting for a device: all or none."""
    return lengths.tolist() if lengths.is_cpu and not torch.compiler.is_compiling() else []


def known_lengths(name: str, lengths: Tensor | int, B: int, device: torch.device) -> list[int]:
    """`known_values` of an int32 `[B]`, or an int for all rows; they are not negative."""
    if is_int(lengths):
        values = [lengths]
    elif isinstance(lengths, Tensor):
        check_tensor(name, lengths, (B,), "[B]", torch.int32, device)
        values = known_values(lengths)
    else:
        raise TypeError(f"{name} must be an int32 tensor [B] or an int, got {lengths!r}")
    for length in values:
        if length < 0:
            raise ValueError(f"{name} must not be negative, got {length}")
    return values


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def left_inference_mode(x: Tensor) -> bool:
    """Whether x was made in inference mode, and is used outside: nothing may be written to it there, and
    autograd does not keep it."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return False
    return x.is_inference() and not torch.is_inference_mode_enabled()


def check_no_gradient(function: str, instead: str, **tensors: Tensor | None) -> None:
    """No tensor needs a gradient, which `function` has none for and `instead` has."""
    for name, x in tensors.items():
        if needs_gradient(x):
            raise ValueError(
                f"{name} requires a gradient, and {function} has no backward: call it under"
                f" torch.no_grad() or torch.inference_mode(), or use {instead}"
            )


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, name: str = "cu_seqlens") -> None:
    """What can be known of `cu_seqlens` without reading its values: see `ops/offsets.py` for those."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor [N+1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must have the dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} must have the shape [N+1] with N >= 1, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device and not cu_seqlens.is_cpu:
        raise ValueError(f"{name} must be on {or_on_the_cpu(q)}, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"{name} needs packed input with B = 1, got q with B = {q.shape[0]}")


def or_on_the_cpu(x: Tensor, name: str = "q") -> str:
    """Where a tensor that is read on the host may be, in a message."""
    return f"{x.device} like {name}{'' if x.is_cpu else ' or on the CPU'}"


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto', 'triton' or 'eager', got {backend!r}")


def choose_backend(backend: Backend, q: Tensor, obstacle: str | None) -> Backend:
    """The backend that runs: Triton for "auto" where it can, and for "triton", or the obstacle is raised.

    `obstacle` is what keeps the operation's own kernels from this call, if anything does.
    """
    check_backend(backend)
    if not triton_runs_on(q):
        obstacle = f"it needs Triton and a CUDA tensor, and q is on {q.device}"
    elif q.is_cuda and gpu_obstacle(q.device.index) is not None:
        obstacle = gpu_obstacle(q.device.index)
    elif q.dtype not in TRITON_DTYPES:
        obstacle = f"it has no kernels for {q.dtype}"
    if backend == "auto":
        return "triton" if obstacle is None and q.is_cuda else "eager"
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend='triton' cannot run: {obstacle}; use backend='eager' or 'auto'")
    return backend


def triton_runs_on(x: Tensor) -> bool:
    """Whether Triton is installed and can run kernels on this tensor: on a GPU, or interpreted."""
    on_device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on_device and TRITON_INSTALLED


def gpu_obstacle(index: int | None) -> str | None:
    """What keeps the kernels from the GPU of this index: they are made for NVIDIA's, from Ampere on."""
    return _gpu_obstacle(index)


# What torch.compiler.assume_constant_result does, but for importing torch._dynamo, and Triton with it.
gpu_obstacle._dynamo_marked_constant = True


@functools.cache
def _gpu_obstacle(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"its kernels need compute capability 8.0 or above, and q's device has {major}.{minor}"
        )
    return None
