"""The kernels, and the configurations in which each ships."""

import importlib
from collections.abc import Iterable, Iterator

from lact_kernels.triton.configs import CompileCase

# Modules with a function `compile_cases(arch)`. A new kernel is added here and nowhere else.
KERNEL_MODULES = (
    "lact_kernels.triton.window_attn.fwd",
    "lact_kernels.triton.window_attn.bwd",
    "lact_kernels.triton.window_attn.with_kvcache",
    "lact_kernels.triton.fast_weights.activations",
    "lact_kernels.triton.fast_weights.products",
    "lact_kernels.triton.fast_weights.update",
    "lact_kernels.triton.fast_weights.update_bwd",
    "lact_kernels.triton.fast_weights.newton_schulz",
    "lact_kernels.triton.layer.silu_l2norm_rope",
    "lact_kernels.triton.layer.rms_norm_scale_add",
)


# sm_80 stands for sm_86, sm_89 and sm_120 as well, which have cases where their rows are their own. For sm_89
# the compiler does what it does for sm_86.
COMPILED_FOR = (80, 86, 90, 100, 120)


def compile_cases(
    archs: Iterable[int] = COMPILED_FOR, passes: Iterable[str] = (), demanding: bool = False
) -> Iterator[CompileCase]:
    """The shipped configurations; `passes` restricts them to those names, `demanding` to the most demanding.

    These have packed sequences and padded dims: the code of the others with the same tiles, and more.
    """
    wanted = set(passes)
    for arch in archs:
        for module in KERNEL_MODULES:
            for case in importlib.import_module(module).compile_cases(arch):
                if (not wanted or case.name in wanted) and (case.demanding or not demanding):
                    yield case
