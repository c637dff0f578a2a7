"""Types of PTX and what stands for them in NumPy.

A register holds an array `[programs or 1, threads or 1]`; what is uniform stays small by broadcasting.
"""

import numpy as np

DTYPES = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
UNTYPED = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}

# What a register holds before it is written: NaN or all ones, an address that no tensor has, false.
NEVER_WRITTEN = {
    "u8": np.uint8(0xFF),
    "u16": np.uint16(0xFFFF),
    "u32": np.uint32(0xFFFFFFFF),
    "u64": np.uint64(0xDEAD << 32),
    "f32": np.uint32(0xFFFFFFFF).view(np.float32),
    "pred": np.bool_(False),
}


def size_of(type: str) -> int:
    """Bytes of a value; 0 for a predicate."""
    return 0 if type == "pred" else int(type[1:]) // 8


def plain(type: str) -> str:
    """The same type, with untyped bits read as an unsigned number."""
    return UNTYPED.get(type, type)


def unsigned(type: str) -> str:
    """The unsigned integer of the same width, in which sums and products wrap around."""
    return type if type in ("pred", "f32") else "u" + type[1:]


def numpy_name(type: str) -> str:
    return f"np.{np.dtype(DTYPES[type]).name}" if type != "pred" else "np.bool_"
