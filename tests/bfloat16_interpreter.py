"""bfloat16 products in Triton's interpreter, for tests only.

The interpreter keeps bfloat16 values as 16-bit integers and hands these to `numpy.matmul`. Here the
operands are widened to float32 first, which is what the hardware does: it multiplies bfloat16
values exactly and accumulates in float32.
"""

import contextlib

import numpy as np


@contextlib.contextmanager
def bfloat16_products(enabled=True):
    """Inside, `tl.dot` of bfloat16 operands is right in the interpreter."""
    if not enabled:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_wide_dot(builder, a, b, *rest):
        return create_dot(builder, _widen(a), _widen(b), *rest)

    InterpreterBuilder.create_dot = create_wide_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = create_dot


def _widen(handle):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.view(np.uint16).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)
