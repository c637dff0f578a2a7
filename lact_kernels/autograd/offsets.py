"""The borders of packed sequences, checked against the tokens that the ops are given.

Only inside of an op can values be read: where it is traced, they are not known.
"""

from torch import Tensor

from lact_kernels.core.offsets import Offsets, read_borders


def read_offsets(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Offsets | None:
    """Both borders, which come together or not at all, for `q [1, Tq, ..]` and `k [1, Tk, ..]`."""
    if cu_seqlens_q is None:
        return None
    names = ("cu_seqlens",) if cu_seqlens_q is cu_seqlens_k else ("cu_seqlens_q", "cu_seqlens_k")
    borders = []
    for name, cu_seqlens, x in zip(names, (cu_seqlens_q, cu_seqlens_k), (q, k)):
        borders.append(read_borders(cu_seqlens, name))
        T, end = x.shape[1], borders[-1][-1]
        if end != T:
            raise ValueError(f"{name} must end at T = {T}, got {end}")
    return Offsets(borders[0], borders[-1])
