"""How many launches a function makes: Triton kernels, device operations of torch, host synchronisations.

At small sizes an operation is bound by its launches, and on a machine without a GPU they are what can be
counted exactly. `count_launches` sees forward and backward, and looks inside custom ops. What comes before a
launch is Python, of which `count_python_calls` counts the calls.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# These only reserve or rename memory. Views need no list: their schemas say that they alias an input.
ALLOCATIONS = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::set_",
}
# The host waits for these, as their value, or the shape of their result, is known on the device alone.
SYNCHRONISATIONS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# Methods that read values on the host. On CPU tensors they bypass the dispatcher, or do nothing there.
READING_METHODS = ("tolist", "numpy", "cpu")
LIBRARIES_OF_TORCH = ("aten", "prim", "prims")


@dataclasses.dataclass(frozen=True)
class Launches:
    """Counts by name. `kernels`, `ops` and `syncs` are their sums, `total` what the device is given."""

    kernel_names: Counter[str]
    op_names: Counter[str]
    sync_names: Counter[str]

    @property
    def kernels(self) -> int:
        """Launches of Triton kernels."""
        return self.kernel_names.total()

    @property
    def ops(self) -> int:
        """Torch operations that work on the device: mostly a launch each, more for some, such as sorts."""
        return self.op_names.total()

    @property
    def syncs(self) -> int:
        """Times the host waits for the device. Those that also compute something are in `ops` as well."""
        return self.sync_names.total()

    @property
    def total(self) -> int:
        return self.kernels + self.ops


def count_launches(fn: Callable[[], object]) -> Launches:
    """Call `fn` once and count what it launches.

    Triton kernels are counted on a GPU and in the interpreter. Views, metadata and allocations count
    as nothing. A custom op written in Python counts as what it does inside, any other as one. If
    anything runs on a GPU, operations on CPU tensors alone are left out: they are the host's work. The
    inside of compiled functions stays unseen.
    """
    counter = _Counter()
    with _triton_kernels(counter), _reading_methods(counter), counter:
        fn()
    ops = counter.device_ops or counter.host_ops
    return Launches(counter.kernels, ops, counter.syncs)


def count_python_calls(fn: Callable[[], object]) -> int:
    """Call `fn` once, without what Triton does to launch a kernel, and count calls of Python functions.

    Functions written in C do not count. Each resumption of a generator does.
    """
    calls = 0

    def count(frame, event: str, _) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is not nothing.__code__

    def nothing(*args, **kwargs) -> None:
        """In the place of a launch."""

    with contextlib.ExitStack() as stack:
        for kind in _kernel_types():
            stack.enter_context(mock.patch.object(kind, "run", nothing))
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            fn()
        finally:
            sys.setprofile(before)
    return calls


class _Counter(TorchDispatchMode):
    """Counts every torch operation below autograd. While `paused`, what runs is part of something counted."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.device_ops: Counter[str] = Counter()
        self.host_ops: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        devices = {x.device.type for x in tensors_of((args, kwargs))}
        if func.namespace not in LIBRARIES_OF_TORCH:
            return self._look_inside(func, args, kwargs, devices)
        with self:
            result = func.decompose(*args, **kwargs)  # such as matmul: into what it consists of
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self._count(func, devices, {x.device.type for x in tensors_of(result)}, args)
        return result

    def _look_inside(self, func, args, kwargs, devices: set[str]):
        """Run the op's kernel for the device with this mode on again, which is off within its own handler."""
        device = next((x for x in devices if x != "cpu"), "cpu")
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
        before = self._seen()
        with self:
            result = func.redispatch(keys, *args, **kwargs)
        if self._seen() == before:  # not written in Python, or with nothing to do
            self._count(func, devices, devices, args)
        return result

    def _count(self, func, inputs: set[str], outputs: set[str], args) -> None:
        name = func._schema.name
        from_device = inputs - {"cpu"}
        copies_to_host = from_device and "cpu" in outputs
        if name in SYNCHRONISATIONS or copies_to_host or _is_masked_index(name, args):
            self.syncs[name] += 1
        if is_device_work(func):
            ops = self.device_ops if from_device or outputs - {"cpu"} else self.host_ops
            ops[name] += 1

    def _seen(self) -> int:
        """How much was seen so far."""
        counters = (self.kernels, self.device_ops, self.host_ops, self.syncs)
        return sum(counter.total() for counter in counters)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def is_device_work(func) -> bool:
    """False for views, allocations, and for what returns no tensor and changes none: metadata."""
    is_view = func.is_view or torch.Tag.inplace_view in func.tags
    if is_view or func._schema.name in ALLOCATIONS:
        return False
    returns_tensor = any("Tensor" in str(x.type) for x in func._schema.returns)
    return returns_tensor or func._schema.is_mutable or func._schema.name == "aten::equal"


def _is_masked_index(name: str, args) -> bool:
    """`x[mask]` needs to know how many elements the mask selects."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(args[1]))


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def _triton_kernels(counter: _Counter) -> Iterator[None]:
    """Count launches of compiled and of interpreted kernels; the interpreter's own tensor work is not."""

    def counting(run: Callable) -> Callable:
        def counted(kernel, *args, warmup, **kwargs):
            if not warmup:
                counter.kernels[kernel.__name__] += 1
            with counter.pause():
                return run(kernel, *args, warmup=warmup, **kwargs)

        return counted

    with contextlib.ExitStack() as stack:
        for kind in _kernel_types():
            stack.enter_context(mock.patch.object(kind, "run", counting(kind.run)))
        yield


def _kernel_types() -> tuple[type, ...]:
    """Those of compiled and of interpreted kernels; none without Triton."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return ()
    return InterpretedFunction, JITFunction


@contextlib.contextmanager
def _reading_methods(counter: _Counter) -> Iterator[None]:
    def counting(name: str, method: Callable) -> Callable:
        def counted(x, *args, **kwargs):
            if counter.paused:
                return method(x, *args, **kwargs)
            counter.syncs[f"Tensor.{name}"] += 1
            with counter.pause():
                return method(x, *args, **kwargs)

        return counted

    with contextlib.ExitStack() as stack:
        for name in READING_METHODS:
            method = counting(name, getattr(torch.Tensor, name))
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        yield
