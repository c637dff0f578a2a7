"""FlexAttention's kernels as Inductor makes them for a GPU that is not there, run on CPU tensors.

`torch.compile` traces `flex_attention` and its backward with CPU tensors. Both graphs are then lowered by
Inductor as if their tensors were on a GPU, whose properties it is told: so the templates, the lists of blocks
of the mask and the kernel that sums o * do are its own, as are block sizes, warps and stages, which it looks
up by head dim, dtype and compute capability where `max_autotune` is off. It would still time a few sizes of
that small kernel; the largest is taken. The Python module that Inductor writes for a graph allocates memory
and launches the kernels. Here it allocates CPU tensors, and launches on them what an emulator takes up.

All of that is private to torch: written against 2.11, and found to run with 2.14.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config, scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.kernel.flex import flex_attention as _templates  # noqa: F401  they are there
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.instruction_counts.rates import GPUS

DEVICE = torch.device("cuda", 0)
WARP_SIZE, THREADS, REGISTERS = 32, 2048, 2**16  # the last two of a multiprocessor, sm_80 and sm_90


def windowed_flex_attention(T: int, window_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of q, k, v [B, T, H, D] with a gradient, compiled on the first call, inside of `device`."""

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window_size)

    mask = flex.create_block_mask(sees, None, None, T, T, device="cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On a CPU it keeps no lse for a backward unless it is asked for.
        aux = flex.AuxRequest(lse=True)
        return flex.flex_attention(q, k, v, block_mask=mask, return_aux=aux)[0]

    backend = aot_autograd(
        fw_compiler=functools.partial(_compile, is_backward=False),
        bw_compiler=functools.partial(_compile, is_backward=True),
        decompositions=select_decomp_table(),
    )
    torch.compiler.reset()  # one function is compiled for so many windows only
    compiled = torch.compile(attention, dynamic=False, fullgraph=True, backend=backend)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@contextlib.contextmanager
def device(arch: int) -> Iterator[None]:
    """Inside, Inductor takes it that there is a GPU of this architecture."""
    gpu, capability = GPUS[arch], divmod(arch, 10)
    properties = DeviceProperties(
        type=DEVICE.type,
        index=DEVICE.index,
        multi_processor_count=gpu.multiprocessors,
        cc=arch,
        major=capability[0],
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=THREADS,
        max_threads_per_block=1024,
        warp_size=WARP_SIZE,
    )
    torchs = SimpleNamespace(name=gpu.name, **properties._asdict())
    tritons = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, WARP_SIZE))
    with (
        config.patch(compile_threads=1, max_autotune=False),  # in this process
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: torchs),
        mock.patch.object(torch.cuda, "current_device", lambda: DEVICE.index),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
        mock.patch.object(DeviceProperties, "create", lambda _: properties),
        mock.patch.object(driver, "_active", tritons),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
        mock.patch.object(scheduler, "has_triton", lambda: True),
        mock.patch.object(AsyncCompile, "triton", _kernel),
        mock.patch.object(CachingAutotuner, "run", _launch),
        mock.patch.object(flex, "_validate_device", lambda *_: None),  # no backward on a CPU
    ):
        yield


def _compile(graph: fx.GraphModule, inputs: list, is_backward: bool) -> Callable[[list], tuple]:
    """Lowers a graph of CPU tensors as one of DEVICE, and gives what runs it on CPU tensors."""
    mode = FakeTensorMode()

    def on_device(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)

    with mode:
        inputs = tree_map_only(Tensor, on_device, inputs)
        for module in graph.modules():  # also the graphs of the mask and of the scores
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                node.meta = tree_map_only(Tensor, on_device, node.meta)
    lowering = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
    debug = V.set_debug_handler(DebugContext())
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), debug:
        lowering.run(*inputs)
        code, _ = lowering.codegen()
    written = PyCodeCache.load(code.value)
    written.empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype
    )
    written.get_raw_stream = lambda index: None

    def run(tensors: list) -> tuple:
        return written.call(tensors)

    run._boxed_call = True  # that it takes a list, which it may empty
    return run


def _kernel(
    self: AsyncCompile, name: str, source: str, device_str: str = "cuda"
) -> CachingAutotuner:
    """In place of AsyncCompile.triton, which compiles at once."""
    return getattr(PyCodeCache.load(source), name)


def _launch(self: CachingAutotuner, *args, stream: None) -> None:
    """In place of CachingAutotuner.run, which times the configurations where there are several."""
    row = max(self.configs, key=lambda row: math.prod(row.kwargs.values()))
    names = [name for name in self.fn.arg_names if name not in row.kwargs]
    names += self.inductor_meta.get("extra_launcher_args", ())
    given = {**dict(zip(names, args, strict=True)), **row.kwargs}
    grid = GridExpr.from_meta(self.inductor_meta, row).eval_slow(given)
    arguments = {name: given[name] for name in self.fn.arg_names}
    self.fn[grid](**arguments, num_warps=row.num_warps, num_stages=row.num_stages)
