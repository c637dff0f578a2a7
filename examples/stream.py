"""Stream a recording through LaCT layers: the outputs of one pass, in constant memory.

```
python -m examples.stream [--piece FRAMES]
```

A stack of layers gets the log-mel frames of a recording in blocks, as they would arrive from a microphone. A
cache keeps the window and the fast weights. Now and then it is saved, and a new one is loaded from the file.
About 15 seconds on two cores. Exit status: 0 if the outputs are those of one pass.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.speech import FRAMES_PER_SECOND, MELS, RECORDING, log_mel, read_audio
from lact_kernels import LaCTCache, LaCTLayer

LAYERS, CHANNELS, WINDOW, CHUNK = 4, 128, 100, 100


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(MELS, CHANNELS)
        self.norms = nn.ModuleList(nn.RMSNorm(CHANNELS) for _ in range(LAYERS))
        self.layers = nn.ModuleList(
            LaCTLayer(
                CHANNELS,
                num_attn_heads=4,
                num_lact_heads=2,
                window_size=WINDOW,
                lact_chunk_size=CHUNK,
                use_momentum=True,
                layer_idx=i,
            )
            for i in range(LAYERS)
        )

    def forward(self, frames: Tensor, cache: LaCTCache | None = None) -> Tensor:
        x = self.inputs(frames)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), cache=cache)
        return x


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--piece", type=int, default=16, help="frames of a block (16)")
    piece = parser.parse_args().piece
    if piece < 1:
        parser.error(f"--piece must be at least 1, got {piece}")

    torch.manual_seed(0)
    model = Encoder()
    frames = log_mel(read_audio(RECORDING))[None]  # [1, T, 80]
    T = frames.shape[1]
    print(f"{T / FRAMES_PER_SECOND:.1f} s of speech, {T} frames, window and chunks of {CHUNK}")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(frames)
        cache, outputs, times = LaCTCache(), [], []
        for block in frames.split(piece, dim=1):
            start = time.perf_counter()
            outputs.append(model(block, cache))
            times.append(time.perf_counter() - start)
            seen = cache.get_seq_length()
            if seen % (64 * piece) == 0:
                file = Path(folder) / "cache.pt"
                torch.save(cache.state_dict(), file)
                cache = LaCTCache.from_state_dict(torch.load(file, weights_only=True))
                size = file.stat().st_size / 2**10
                print(f"  {seen:5d} frames: saved and restored {size:.0f} KiB", flush=True)
    error = (torch.cat(outputs, dim=1) - expected).abs().max().item()
    median, slowest = 1000 * statistics.median(times), 1000 * max(times)
    print(f"{len(times)} pieces of {1000 * piece / FRAMES_PER_SECOND:.0f} ms of speech", end="")
    print(f" took {median:.0f} ms each (median; the slowest {slowest:.0f})")
    print(f"largest difference from one pass: {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
