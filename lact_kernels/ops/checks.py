"""Validation shared by both operations.

Every function raises before any work starts: `TypeError` for a wrong type or dtype, `ValueError` for
a wrong value, shape or device. Messages name the argument, what came and what was expected.
"""

import functools
import importlib.util
import numbers
import os
import sys
from typing import Literal, get_args

import torch
from torch import Tensor

from lact_kernels.core.offsets import is_transformed

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # found, not imported
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_FAST_DIM = 2048  # of a kernel that reads a fast head's channels at once
MOST_TOKENS = 2**62  # more than any sequence has; registered ops take numbers of 64 bits

Backend = Literal["auto", "triton", "eager"]
BACKENDS = get_args(Backend)


def check_floating(name: str, x: Tensor, *layouts: str) -> None:
    """`x` is a floating-point tensor with one of the layouts, and only B and T may be empty."""
    expected = layouts[0] if len(layouts) == 1 else " or ".join(layouts)
    check_float_dtype(name, x, expected)
    if x.ndim not in [layout.count(",") + 1 for layout in layouts]:
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(x.shape)}")
    if not (x.shape[-1] and x.shape[-2]):
        raise ValueError(f"{name} {expected} has an empty head or channel axis: {tuple(x.shape)}")


def check_float_dtype(name: str, x: Tensor, layout: str) -> None:
    """`x` is a tensor of a floating dtype that the operations know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in FLOAT_DTYPES:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {dtypes}, got {x.dtype}")


def check_dense(name: str, x: Tensor) -> None:
    """`x` is neither sparse nor nested."""
    if x.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor, got a nested one: lay its sequences end to end, with their"
            " borders in cu_seqlens"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of the layout {x.layout}")


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
    if x.is_nested or x.layout is not torch.strided:
        check_dense(name, x)
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


def plain(value: object) -> object:
    """A number of another library, NumPy's among them, as Python's own; everything else as it is."""
    if type(value) in (int, float, bool, torch.SymInt):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_int(name: str, value: int) -> int:
    """`value` as a plain int. A symbolic one stays as it is."""
    if type(value) is int:
        return value
    number = plain(value)
    if not is_int(number):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return number


def check_positive_int(name: str, value: int) -> int:
    value = check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_count(name: str, value: int) -> int:
    """`check_positive_int` of how many tokens or chunks: more than any sequence has are all the same."""
    value = check_positive_int(name, value)
    # Compiled code would be bound by the comparison to the numbers that it has been compiled for.
    return value if torch.compiler.is_compiling() or value < MOST_TOKENS else MOST_TOKENS


def check_window(name: str, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """How far a query sees to its left and right, None for no limit.

    It is given as such a pair, with -1 for no limit, or as the number of tokens up to the query; None is all.
    """
    is_pair = isinstance(window, (tuple, list))
    sides = window if is_pair else [0 if window is None else window]
    are_ints = all([is_int(plain(side)) for side in sides])
    if not are_ints or (is_pair and len(sides) != 2):
        message = f"{name} must be an int, a pair (left, right) or None, got {window!r}"
        raise ValueError(message) if are_ints else TypeError(message)
    if is_pair:
        left, right = (_check_side(name, side, window) for side in sides)
        return left, right
    return (None if window is None else check_count(name, window) - 1), 0


def _check_side(name: str, side: int, window) -> int | None:
    side = check_int(name, side)
    if side < -1:
        raise ValueError(
            f"{name} must have sides of at least 0, or -1 for no limit, got {window!r}"
        )
    if side == -1:
        return None
    return side if torch.compiler.is_compiling() or side < MOST_TOKENS else MOST_TOKENS


def given_window(left: int | None, right: int | None) -> int | tuple[int, int] | None:
    """The inverse of `check_window`: a pair where a query sees later tokens, otherwise a number or None."""
    if right == 0:
        return None if left is None else left + 1
    return -1 if left is None else left, -1 if right is None else right


def check_causal_window(name: str, window: int | tuple[int, int] | None) -> int | None:
    """How many tokens a query sees, itself included, of a window without later ones; None for all."""
    left, right = check_window(name, window)
    if right != 0:
        raise NotImplementedError(
            f"{name} must be an int or a pair (left, 0), of a query that sees itself and the tokens on its"
            f" left; later ones, as in {window!r}, are not supported"
        )
    return None if left is None else left + 1


def check_finite_number(name: str, value: float) -> float:
    """`value` as a plain number."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(number) <= sys.float_info.max:  # nor NaN; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def known_values(x: Tensor | int) -> list[int]:
    """The values of a tensor as far as they can be known without waiting for a device: all or none."""
    if not isinstance(x, Tensor):
        return [x]
    return x.tolist() if has_known_values(x) else []


def has_known_values(x: Tensor) -> bool:
    """Whether values can be read without waiting. A subclass may have none at all, as fake tensors."""
    readable = x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()
    return readable and not is_transformed()


def check_cache_seqlens(seqlens: Tensor | int, B: int, device: torch.device) -> Tensor | int:
    """`cache_seqlens` as an int32 `[B]`, or as one int for all rows, which may also be a tensor `[]`.

    Its values are left to `known_seqlens`.
    """
    name = "cache_seqlens"
    if isinstance(seqlens, Tensor):
        if seqlens.ndim == 0 and seqlens.dtype in (torch.int32, torch.int64):
            if has_known_values(seqlens):
                return check_cache_seqlens(seqlens.item(), B, device)
            seqlens = seqlens.to(torch.int32).expand(B).contiguous()
        check_tensor(name, seqlens, (B,), "[B]", torch.int32, device)
    else:
        seqlens = plain(seqlens)
        if not is_int(seqlens):
            raise TypeError(f"{name} must be an int32 tensor [B] or an int, got {seqlens!r}")
    return seqlens


def known_seqlens(cache_seqlens: Tensor | int) -> list[int]:
    """The `known_values` of checked `cache_seqlens`, none of them negative."""
    values = known_values(cache_seqlens)
    for seqlen in values:
        if seqlen < 0:
            raise ValueError(f"cache_seqlens must not be negative, got {seqlen}")
    return values


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def left_inference_mode(x: Tensor) -> bool:
    """Whether x was made in inference mode, and is used outside: nothing may be written to it there, and
    autograd does not keep it."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return False
    return x.is_inference() and not torch.is_inference_mode_enabled()


def may_need_backward(*tensors: Tensor | None) -> bool:
    """Whether what an op keeps for its backward may be read; within `torch.func` tensors do not tell."""
    return (torch.is_grad_enabled() and is_transformed()) or needs_gradient(*tensors)


def check_no_gradient(function: str, instead: str, **tensors: Tensor | None) -> None:
    """No tensor needs a gradient, which `function` has none for and `instead` has."""
    for name, x in tensors.items() if torch.is_grad_enabled() else ():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and {function} has no backward: call it under"
                f" torch.no_grad() or torch.inference_mode(), or use {instead}"
            )


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, name: str = "cu_seqlens") -> None:
    """What can be known of `cu_seqlens` without reading its values: see `core/offsets.py` for those."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor [N+1], got {type(cu_seqlens).__name__}")
    check_dense(name, cu_seqlens)
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
    if backend == "eager" or (backend == "auto" and not q.is_cuda):
        return "eager"
    if not triton_runs_on(q):
        obstacle = f"it needs Triton and a CUDA tensor, and q is on {q.device}"
    elif q.is_cuda and gpu_obstacle(q.device.index) is not None:
        obstacle = gpu_obstacle(q.device.index)
    elif q.dtype not in TRITON_DTYPES:
        obstacle = f"it has no kernels for {q.dtype}"
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {obstacle}; use backend='eager' or 'auto'")
    return "eager"


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


def wide_fast_heads_obstacle(fast_dim: int) -> str | None:
    """Why a kernel that reads a fast head's channels at once cannot take so many, or None if it can."""
    if fast_dim > MAX_TRITON_FAST_DIM:
        return f"fast heads have up to {MAX_TRITON_FAST_DIM} channels, got {fast_dim}"
    return None
