"""Replace the layers of an existing LaCT model: one call, the same parameters, the same outputs.

```
python -m examples.swap_layers
```

The model has stand-ins for the layers of the LaCT authors (`examples/authors_layer.py`); with theirs the call
is the same. With our layers it can then compute token by token, with a cache of windows and fast weights.
About 10 seconds. Exit status: 0 if all results agree.
"""

import sys
import time

import torch
from torch import Tensor, nn

from examples.authors_layer import LaCTSWIGLULayer
from lact_kernels import LaCTCache
from lact_kernels.compat.lact import swap_lact_layers

T = 512


class Block(nn.Module):
    def __init__(self, layer_idx: int):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.attn = LaCTSWIGLULayer(layer_idx)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return x + self.attn(hidden_states=self.norm(x), **kwargs)[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(i) for i in range(3))

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        for layer in self.layers:
            x = layer(x, **kwargs)
        return x


def timed(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    y = model(x)
    y.sum().backward()
    return y.detach(), time.perf_counter() - start


def main() -> int:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, T, 64)
    checkpoint = model.state_dict()
    expected, before = timed(model, x)

    replaced = swap_lact_layers(model)
    print(f"replaced: {', '.join(replaced)}")
    print(f"a second call replaces {len(swap_lact_layers(model))} layers")
    model.load_state_dict(checkpoint, strict=True)

    actual, after = timed(model, x)
    error = (actual - expected).abs().max().item()
    print(f"largest difference of the outputs: {error:.1e}")
    print(f"forward and backward: {before:.2f} s before, {after:.2f} s after")

    cache = LaCTCache()
    with torch.no_grad():
        parts = [x[:, : T - 8], *x[:, T - 8 :].split(1, dim=1)]
        cached = torch.cat([model(part, past_key_values=cache) for part in parts], dim=1)
    cached_error = (cached - expected).abs().max().item()
    print(f"the last 8 tokens one by one with a cache: largest difference {cached_error:.1e}")
    return 0 if max(error, cached_error) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
