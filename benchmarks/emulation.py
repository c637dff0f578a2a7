"""The package's kernels in the PTX emulator: an architecture that the machine need not have.

```
with emulated_device(90) as emulation:
    lact_kernels.window_attn(q, k, v, 512, backend="triton")  # CPU tensors
```
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from lact_kernels.ops import checks
from lact_kernels.triton import configs, launch
from ptx_emulator import Emulation, emulate


@contextlib.contextmanager
def emulated_device(arch: int, num_multiprocessors: int = 1, **options) -> Iterator[Emulation]:
    """Inside, `backend="triton"` runs on CPU tensors, compiled for `sm_<arch>` and emulated.

    `num_multiprocessors` decides how far the package cuts up few programs. `options` are those of
    `ptx_emulator.emulate`.
    """
    with (
        mock.patch.object(configs, "CPU_CAPABILITY", divmod(arch, 10)),
        mock.patch.object(launch, "CPU_MULTIPROCESSORS", num_multiprocessors),
        mock.patch.object(checks, "triton_runs_on", lambda x: True),
        emulate(arch, **options) as emulation,
    ):
        yield emulation
