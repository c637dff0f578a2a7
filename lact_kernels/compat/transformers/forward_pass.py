"""What the layers of a model share within one forward pass."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Pass:
    """What has been read of tensors in the present forward pass, for the layers that share these tensors.

    A pass begins when a model makes its masks, or when the same layer asks a second time. Nothing is
    remembered for longer, as NumPy, `.data` and other kernels can change a tensor without changing its
    version. Layers whose configuration is not the one that the masks were made for read every time.
    """

    def __init__(self):
        self._config = None
        self._results = WeakTensorKeyDictionary()

    def begin(self, config) -> None:
        self._config, self._results = config, WeakTensorKeyDictionary()

    def remember(self, module, x: Tensor, call: Hashable, read: Callable[[], Any]) -> Any:
        """The result of `read()` for `x` and `call`, remembered if another layer has read it in this pass."""
        is_known = self._config is not None and getattr(module, "config", None) is self._config
        if not is_known or torch.compiler.is_compiling():
            return read()
        version = None if x.is_inference() else x._version
        call = call, version, torch.is_inference_mode_enabled()
        known, layers, result = self._results.get(x, (None, (), None))
        if known != call or id(module) in layers:
            layers, result = set(), read()
            self._results[x] = call, layers, result
        layers.add(id(module))
        return result


PASS = _Pass()
