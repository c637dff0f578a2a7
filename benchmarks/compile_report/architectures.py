"""What a multiprocessor of each architecture holds, from NVIDIA's compute capability tables."""

import dataclasses

KIB = 1024
# Every program takes this much shared memory for the system.
RESERVED_SHARED = KIB
TENSOR_MEMORY_COLUMNS = 512


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one architecture: bytes of shared memory, registers, warps and programs."""

    shared_per_block: int
    shared_per_multiprocessor: int
    warps_per_multiprocessor: int = 64
    programs_per_multiprocessor: int = 32
    registers_per_multiprocessor: int = 65536


ARCHITECTURES = {
    80: Architecture(163 * KIB, 164 * KIB),
    86: Architecture(99 * KIB, 100 * KIB, 48, 16),
    89: Architecture(99 * KIB, 100 * KIB, 48, 24),
    90: Architecture(227 * KIB, 228 * KIB),
    100: Architecture(227 * KIB, 228 * KIB),
    120: Architecture(99 * KIB, 100 * KIB, 48, 24),
}


def programs_per_multiprocessor(
    limits: Architecture, registers: int, shared: int, num_warps: int, tensor_columns: int
) -> int:
    """How many programs fit at once: an estimate from registers, shared memory and warps."""
    registers_per_warp = -(-registers * 32 // 256) * 256  # handed out in units of 256
    bounds = [
        limits.programs_per_multiprocessor,
        limits.warps_per_multiprocessor // num_warps,
        limits.registers_per_multiprocessor // (registers_per_warp * num_warps),
        limits.shared_per_multiprocessor // (shared + RESERVED_SHARED),
    ]
    if tensor_columns:
        bounds.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(bounds)
