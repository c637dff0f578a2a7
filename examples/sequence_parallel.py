"""One long sequence on several processes: each holds a part of it, and computes what one process would.

```
torchrun --nproc-per-node 2 examples/sequence_parallel.py
```

A LaCT layer computes a sequence forward and backward, once whole in each process and once in parts. Printed
are the differences (float64: rounding alone), the tokens of each process, and how much it sends. Exit status:
0 if outputs and gradients agree to 1e-10, 1 if not. Half a minute on two cores. With GPUs, each process uses
one.
"""

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lact_kernels import LaCTLayer
from lact_kernels.distributed import SequencePieces

HIDDEN, HEADS, FAST_HEADS = 128, 4, 2
TOLERANCE = 1e-10


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(
        device.type, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("sequence",)
    )

    torch.manual_seed(0)  # the same weights and tokens on every rank
    layer = LaCTLayer(
        HIDDEN, HEADS, FAST_HEADS, window_size=options.window, lact_chunk_size=options.chunk,
        use_momentum=True, use_muon=True, dtype=torch.float64,
    ).to(device)  # fmt: skip
    x = torch.randn(1, options.tokens, HIDDEN, dtype=torch.float64).to(device)
    dy = torch.randn_like(x)

    # The essential lines. Within the layer, ranks send each other what they need.
    pieces = SequencePieces.even(mesh, options.tokens)
    mine = pieces.take(x).requires_grad_()
    y, gradients, seconds = run(layer, mine, pieces.take(dy), pieces=pieces)
    for gradient in gradients[1:]:  # of the weights; DDP or FSDP would add them up
        dist.all_reduce(gradient)

    whole = x.requires_grad_()
    whole_y, whole_gradients, whole_seconds = run(layer, whole, dy)
    errors = {
        "outputs": relative_error(y, pieces.take(whole_y)),
        "gradient of the tokens": relative_error(gradients[0], pieces.take(whole_gradients[0])),
        "gradients of the weights": max(map(relative_error, gradients[1:], whole_gradients[1:])),
    }

    rows = [None] * pieces.size
    dist.all_gather_object(rows, (pieces.start, pieces.stop, seconds, list(errors.values())))
    errors = dict(zip(errors, map(max, zip(*(row[3] for row in rows)))))
    if pieces.rank == 0:
        report(options, rows, whole_seconds, errors)
    dist.destroy_process_group()
    return 0 if max(errors.values()) < TOLERANCE else 1


def run(layer: LaCTLayer, x: torch.Tensor, dy: torch.Tensor, **where):
    """Outputs, gradients of the input and all weights, and the seconds that it took."""
    dist.barrier()
    begin = time.perf_counter()
    y = layer(x, **where)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    if x.is_cuda:
        torch.cuda.synchronize()
    return y, gradients, time.perf_counter() - begin


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def report(options, rows, whole_seconds: float, errors: dict[str, float]) -> None:
    print(
        f"{options.tokens} tokens, window {options.window}, chunks of {options.chunk}, on {len(rows)}"
        f" processes ({options.device}); one alone takes {whole_seconds:.2f} s beside the others"
    )
    for rank, (start, stop, seconds, _) in enumerate(rows):
        print(f"  rank {rank}: tokens {start} to {stop}, {seconds:.2f} s forward and backward")
    D, fast_dim = HIDDEN // HEADS, HIDDEN // FAST_HEADS
    halo = 2 * (options.window - 1) * HEADS * D
    print(
        "Each rank sends the next one, forward, at most\n"
        f"  {halo} numbers for the window, 2 (W - 1) H D: those of {options.window - 1} tokens\n"
        f"  {6 * FAST_HEADS * fast_dim**2} for the fast weights, 3 H D^2 and their momentum\n"
        f"and as many gradients back. All keys and values would be {2 * options.tokens * HIDDEN}."
    )
    for name, error in errors.items():
        print(f"  {name}: differ by {error:.1e} from those of one process")
    good = max(errors.values()) < TOLERANCE
    print("They are the same, but for rounding." if good else "They are NOT the same.")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    for name in ("tokens", "window", "chunk"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if "WORLD_SIZE" not in os.environ:
        parser.error(
            "it needs several processes: torchrun --nproc-per-node 2 examples/sequence_parallel.py"
        )
    gpus = torch.cuda.device_count()
    enough = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    if options.device == "cuda" and not enough:
        parser.error(f"--device cuda: each process needs a GPU, and there are {gpus}")
    if options.device == "auto":
        options.device = "cuda" if enough else "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
