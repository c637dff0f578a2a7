"""The kernels, and the configurations in which each ships."""

from collections.abc import Iterable, Iterator

from benchmarks.compile_report import fast_weight_cases, layer_cases, window_attn_cases
from benchmarks.compile_report.case import CompileCase

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
        for module in (window_attn_cases, fast_weight_cases, layer_cases):
            for case in module.compile_cases(arch):
                if (not wanted or case.name in wanted) and (case.demanding or not demanding):
                    yield case
