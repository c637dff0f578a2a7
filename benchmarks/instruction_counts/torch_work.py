"""What PyTorch itself does beside kernels: FLOPs of products, bytes of operations, what it keeps."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.launches import LIBRARIES_OF_TORCH
from ptx_emulator import Emulation

aten = torch.ops.aten
_WITHOUT_VALUES = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
# Those that read nothing of their first tensor.
_FILL = {
    aten.zero_, aten.fill_, aten.copy_, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros,
    aten.new_ones, aten.new_full,
}  # fmt: skip


class TorchWork(TorchDispatchMode):
    """Of all operations but those that the emulator makes: each reads its inputs and writes its results once.

    So it is where nothing is fused. Views move nothing, and a registered op what it does inside.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0
        self._launching = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or torch.compile does nothing within

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in LIBRARIES_OF_TORCH and not self._launching:
            # A registered op is what it does inside, where this mode would be off.
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        result = func(*args, **kwargs)
        if not self._launching:
            if func._overloadpacket in flop_registry:
                count = flop_registry[func._overloadpacket]
                self.flops += count(*args, **kwargs, out_val=result)
            self.bytes += _moved(func, _tensors((args, kwargs)), _tensors(result))
        return result

    @contextlib.contextmanager
    def outside_of_launches(self) -> Iterator[None]:
        launch = Emulation.run

        def run(*args, **kwargs):
            self._launching = True
            try:
                return launch(*args, **kwargs)
            finally:
                self._launching = False

        with mock.patch.object(Emulation, "run", run), self:
            yield


class Kept:
    """Bytes of what is kept for a backward besides the inputs."""

    def __init__(self, inputs: Iterable[Tensor]):
        self._inputs = {_storage(x) for x in inputs}
        self._kept: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._kept.values())

    def counting(self) -> contextlib.AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if _storage(x) not in self._inputs:
            self._kept[_storage(x)] = x.untyped_storage().nbytes()
        return x


def _moved(func, inputs: list[Tensor], results: list[Tensor]) -> int:
    if func._overloadpacket in _WITHOUT_VALUES:
        return 0
    mutable = func._schema.is_mutable
    read = inputs[1:] if func._overloadpacket in _FILL else inputs
    own = {_storage(x) for x in inputs}
    written = [x for x in results if mutable or _storage(x) not in own]
    return sum(map(_extent, read + written)) if written else 0


def _tensors(tree) -> list[Tensor]:
    """Those with values, unlike what compilers trace with."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _extent(x: Tensor) -> int:
    """Bytes of the elements, those that stand for several counted once."""
    return x.itemsize * math.prod(n for n, stride in zip(x.shape, x.stride()) if stride)
