"""Bytes that a `LaCTLayer` reads and writes in memory beside its two operations, forward and backward.

```
python -m benchmarks.layer_traffic                            # bfloat16, 1,536 channels, all options
python -m benchmarks.layer_traffic --hidden-size 768 --heads 12
```

They are counted of one call on the meta device, which needs no memory and no GPU: what goes into and comes
out of each torch operation, views and allocations apart, and of each kernel of the layer, which reads and
writes every tensor once. `window_attn` and `block_causal_ttt` are left out. The table is for each token and
channel: what grows with the number of tokens, and so not the reading of weights.

Two bytes of `silu_l2norm_rope_fwd` are a copy of v, which is made where calls are compiled, transformed or
counted as here. Otherwise there is a view in its place.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import is_device_work, tensors_of
from lact_kernels import LaCTLayer

OPERATIONS = ("window_attn", "ttt_")
T = 4096  # of the first of two calls; the other has twice as many


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden-size", type=int, default=1536, metavar="C")
    parser.add_argument("--heads", type=int, default=24, help="of the attention")
    parser.add_argument("--fast-weight-heads", type=int, default=4)
    options = parser.parse_args(arguments)
    layer = LaCTLayer(
        options.hidden_size,
        options.heads,
        options.fast_weight_heads,
        attn_qk_norm=False,
        learnable_ttt_scale=True,
        use_momentum=True,
        dtype=torch.bfloat16,
        device="meta",
    )
    forward, backward = bytes_per_token_and_channel(layer)
    print(f"{'bytes for each token and channel':<48} {'forward':>9} {'backward':>9}")
    for name in forward | backward:
        print(f"{name:<48} {forward[name]:9.2f} {backward[name]:9.2f}")
    print(f"{'in all':<48} {forward.total():9.2f} {backward.total():9.2f}")
    return 0


def bytes_per_token_and_channel(layer: LaCTLayer) -> tuple[Counter[str], Counter[str]]:
    """Of the forward and the backward of a layer on the meta device, by operation."""
    (short_forward, short_backward), (forward, backward) = (_moved(layer, n) for n in (T, 2 * T))
    share = 1 / (T * layer.hidden_size)
    return tuple(
        Counter({name: (long[name] - short[name]) * share for name in long})
        for short, long in ((short_forward, forward), (short_backward, backward))
    )


def _moved(layer: LaCTLayer, tokens: int) -> tuple[Counter[str], Counter[str]]:
    dtype = layer.qkv.weight.dtype
    x = torch.empty(1, tokens, layer.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    outputs = []
    forward = bytes_moved(lambda: outputs.append(layer(x)))
    leaves = [x, *layer.parameters()]
    return forward, bytes_moved(lambda: torch.autograd.grad(outputs, leaves, [torch.empty_like(x)]))


def bytes_moved(fn: Callable[[], object]) -> Counter[str]:
    """Call `fn` once: how many bytes its operations read and write, by their names."""
    counter = _Bytes()
    with counter:
        fn()
    return counter.moved


class _Bytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        library, name = func._schema.name.split("::")
        if library != "lact_kernels":
            with self:
                result = func.decompose(*args, **kwargs)  # such as linear: into what it consists of
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if is_device_work(func) and not name.startswith(OPERATIONS):
            moved = [*tensors_of((args, kwargs)), *tensors_of(result)]
            self.moved[name] += sum(_bytes_of(x) for x in moved)
        return result


def _bytes_of(x: torch.Tensor) -> int:
    """Without those of axes along which it is expanded, which are read from a cache."""
    sizes = (size for size, stride in zip(x.shape, x.stride()) if stride)
    return x.itemsize * torch.Size(sizes).numel()


if __name__ == "__main__":
    sys.exit(main())
