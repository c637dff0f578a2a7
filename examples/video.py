"""A small video model whose only memory of earlier frames is its fast weights.

```
python -m examples.video [--steps N] [--seed N] [--out DIR]
```

A coloured shape moves over a black canvas and bounces off its edges. The model is given the first two frames
and generates the others one by one. A frame begins as noise, which is taken away in a few steps; then its
tokens update the fast weights, and are never read again. Attention stays within a frame.

In training a video is one sequence, noisy 0, clean 0, noisy 1, clean 1, ...: each clean frame updates the
fast weights, through which it goes itself, and so does the noisy frame behind it. The same model without
updates, and the last frame that was given, show what the memory is worth. About 80 seconds on one core. Exit
status: 0 if generation computes what training did and fast weights make the first frame better, 1 if not, 2
for wrong arguments.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import moving_shapes
from lact_kernels.compat.lact import (
    ar_fast_weight_swish_glu_weight_norm_mini_batch,
    ar_fast_weight_swish_glu_weight_norm_mini_batch_inference,
)

FRAMES, GIVEN, PATCH = 8, 2, 4
SIDE = moving_shapes.SIZE // PATCH
TOKENS, CHANNELS = SIDE**2, 3 * PATCH**2  # of a frame, and of a token
DIM, HEADS, ATTENTION_HEADS, BLOCKS = 64, 2, 4, 2
BATCH, LEARNING_RATE = 8, 4e-3
TEST_VIDEOS, DENOISING_STEPS = 64, 4
MUON = {"use_moun": True, "num_moun_iters": 3}  # spelled as the functions spell it

Weights = list[Tensor]  # w0, w1, w2


class FastWeights(nn.Module):
    """What a model has around the two functions: projections, rates, initial weights and a norm."""

    def __init__(self, updates: bool):
        super().__init__()
        self.updates, D = updates, DIM // HEADS
        self.norm = nn.LayerNorm(DIM)
        self.to_qk = nn.Linear(DIM, 2 * DIM, bias=False)
        with torch.no_grad():  # queries and keys begin alike: a query finds what is near its token
            self.to_qk.weight[:DIM] = self.to_qk.weight[DIM:]
        self.to_v = nn.Linear(DIM, DIM)
        self.to_rates = nn.Linear(DIM, 3 * HEADS)
        self.w0, self.w1, self.w2 = (
            nn.Parameter(torch.randn(HEADS, D, D) * D**-0.5) for _ in range(3)
        )
        self.out_norm = nn.RMSNorm(D)
        self.out = nn.Linear(DIM, DIM)

    def initial_weights(self, B: int) -> Weights:
        return [w.repeat(B, 1, 1) for w in (self.w0, self.w1, self.w2)]  # [B * HEADS, D, D]

    def forward(self, x: Tensor, where: Tensor, weights: Weights | None, update: bool):
        """Without `weights`, `x` is a video in the order of training; with them it is one frame."""
        B, x = len(x), self.norm(x)
        q, k = F.normalize(F.silu(_heads(self.to_qk(x + where), 2)), dim=-1)
        (v,) = F.silu(_heads(self.to_v(x), 1))  # [B * HEADS, T, D]
        rates = F.softplus(_heads(self.to_rates(x), 3))  # [3, B * HEADS, T, 1]
        start = self.initial_weights(B) if weights is None else weights
        arguments = (*start, q, k, v, *rates)
        if weights is None and self.updates:
            o, *end = ar_fast_weight_swish_glu_weight_norm_mini_batch(
                *arguments, w_scale=1.0, mini_batch_size=TOKENS, **MUON
            )
        else:
            o, *end = ar_fast_weight_swish_glu_weight_norm_mini_batch_inference(
                *arguments, w_scale=1.0, do_update=update and self.updates, **MUON
            )
        o = self.out_norm(o).unflatten(0, (B, HEADS)).transpose(1, 2).flatten(2)
        return self.out(o), end


def _heads(x: Tensor, parts: int) -> Tensor:  # -> [parts, B * HEADS, T, D]
    return x.unflatten(-1, (parts, HEADS, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)


class Attention(nn.Module):
    """Among the tokens of a frame."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.to_qk, self.to_v = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        y = self.norm(x)
        qkv = torch.cat((self.to_qk(y + where), self.to_v(y)), dim=-1).reshape(-1, TOKENS, 3 * DIM)
        q, k, v = qkv.unflatten(-1, (3, ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(o.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, updates: bool):
        super().__init__()
        self.memory, self.attention = FastWeights(updates), Attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x: Tensor, where: Tensor, weights: Weights | None, update: bool):
        o, weights = self.memory(x, where, weights, update)
        x = x + o
        x = x + self.attention(x, where)
        return x + self.mlp(x), weights


class VideoModel(nn.Module):
    """Noisy frames to clean ones. `updates=False` leaves the fast weights as they are."""

    def __init__(self, updates: bool):
        super().__init__()
        self.read = nn.Linear(CHANNELS, DIM)
        self.level = nn.Sequential(nn.Linear(2, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.where = nn.Linear(36, DIM)
        self.blocks = nn.ModuleList(Block(updates) for _ in range(BLOCKS))
        self.norm, self.write = nn.LayerNorm(DIM), nn.Linear(DIM, CHANNELS)
        nn.init.normal_(self.where.weight, std=0.3)  # place and time outweigh the noise
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def initial_weights(self, B: int) -> list[Weights]:
        return [block.memory.initial_weights(B) for block in self.blocks]

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        times: Tensor,
        weights: list[Weights] | None = None,
        update: bool = False,
    ) -> tuple[Tensor, list[Weights]]:
        """The frames as they would be without noise, and the fast weights of the blocks after them.

        `x [B, frames, TOKENS, CHANNELS]` has noise of `level [B, frames]`, 0 for a clean frame; `times
        [frames]` are their places in the video. For `weights` and `update` see `FastWeights`.
        """
        levels = torch.stack((level, (level == 0).float()), dim=-1)
        where = self.where(_waves(times))
        h = (self.read(x) + self.level(levels)[:, :, None]).flatten(1, 2) + where
        ends = []
        for i, block in enumerate(self.blocks):
            h, end = block(h, where, None if weights is None else weights[i], update)
            ends.append(end)
        return self.write(self.norm(h)).unflatten(1, (-1, TOKENS)), ends


def _waves(times: Tensor) -> Tensor:
    """Time, row and column of each token as sines and cosines: `[frames * TOKENS, 36]`."""
    side = torch.arange(SIDE) / SIDE
    places = torch.cartesian_prod(times / FRAMES, side, side)  # [frames * TOKENS, 3]
    angles = math.pi * places[..., None] * torch.tensor([0.5, 1, 2, 4, 6, 8])
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)


def to_tokens(pixels: Tensor) -> Tensor:  # [B, frames, H, W, 3] -> [B, frames, TOKENS, CHANNELS]
    x = pixels.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
    return x.transpose(3, 4).flatten(4).flatten(2, 3)


def to_pixels(tokens: Tensor) -> Tensor:
    x = tokens.unflatten(3, (PATCH, PATCH, 3)).unflatten(2, (SIDE, SIDE))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def in_training_order(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """noisy 0, clean 0, noisy 1, ... to the last noisy one: frames, levels of their noise, and times."""
    level = torch.rand(clean.shape[:2], generator=generator).sqrt()
    noise, share = torch.randn(clean.shape, generator=generator), level[..., None, None]
    pairs = torch.stack(((1 - share) * clean + share * noise, clean), dim=2)
    levels = torch.stack((level, torch.zeros_like(level)), dim=2)
    times = torch.arange(FRAMES).repeat_interleave(2)
    return pairs.flatten(1, 2)[:, :-1], levels.flatten(1, 2)[:, :-1], times[:-1]


def train(model: VideoModel, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        clean = to_tokens(moving_shapes.videos(BATCH, FRAMES, generator))
        predicted, _ = model(*in_training_order(clean, generator))
        noisy = predicted[:, ::2]
        loss = F.mse_loss(noisy[:, GIVEN:], clean[:, GIVEN:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.perf_counter() - start) / step * (steps - step)
            print(f"  step {step:4d}  loss {loss.item():.4f}  {left:3.0f} s left", flush=True)


@torch.no_grad()
def generate(model: VideoModel, given: Tensor, generator: torch.Generator) -> Tensor:
    """The videos that begin with `given [B, GIVEN, TOKENS, CHANNELS]`, with it.

    Of earlier frames a call is handed the fast weights, and nothing else.
    """
    B, weights, frames = len(given), model.initial_weights(len(given)), []
    for i in range(FRAMES):
        now = torch.tensor([i])
        if i < GIVEN:
            x = given[:, i : i + 1]
        else:
            x = torch.randn(B, 1, TOKENS, CHANNELS, generator=generator)
            for step in range(DENOISING_STEPS, 0, -1):
                level, lower = step / DENOISING_STEPS, (step - 1) / DENOISING_STEPS
                clean, _ = model(x, torch.full((B, 1), level), now, weights)
                noise = (x - (1 - level) * clean) / level
                x = (1 - lower) * clean + lower * noise
        frames.append(x)
        _, weights = model(x, torch.zeros(B, 1), now, weights, update=True)
    return torch.cat(frames, dim=1)


@torch.no_grad()
def difference_of_calls(model: VideoModel, clean: Tensor, generator: torch.Generator) -> float:
    """The largest difference between one call in the order of training and a call for each frame of it.

    It is more than rounding: each call brings the weights back to the norms of those it is given, short of
    1e-5 in a division, and generation has more calls.
    """
    frames, levels, times = in_training_order(clean, generator)
    expected, _ = model(frames, levels, times)
    weights, parts = model.initial_weights(len(clean)), []
    for i in range(len(times)):
        part = (frames[:, i : i + 1], levels[:, i : i + 1], times[i : i + 1])
        predicted, weights = model(*part, weights, update=i % 2 == 1)
        parts.append(predicted)
    return (torch.cat(parts, dim=1) - expected).abs().max().item()


def main() -> int:
    options = _parse()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that a second thread mostly waits
    try:
        return _compare(options)
    finally:
        torch.set_num_threads(threads)


def _compare(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    truth = moving_shapes.videos(TEST_VIDEOS, FRAMES, generator)
    clean, found = to_tokens(truth), {}
    for name, updates in (("fast weights", True), ("no updates", False)):
        print(f"Training with {name}:")
        torch.manual_seed(options.seed)
        model = VideoModel(updates)
        train(model, options.steps, options.seed + 1)
        found[name] = to_pixels(generate(model, clean[:, :GIVEN], generator)).clamp(0, 1)
        if updates:
            difference = difference_of_calls(model, clean[:BATCH], generator)
    repeated = truth[:, GIVEN - 1 : GIVEN].expand_as(truth)
    compared = {**found, "last given": repeated}
    scores = {name: moving_shapes.score(x, truth) for name, x in compared.items()}
    _print_table(scores)
    print(
        "\nFrames predicted in one call, and in a call for each, differ by at most"
        f" {difference:.1e}."
    )
    moving_shapes.draw({"truth": truth, **found}, GIVEN, options.out / "video.png")
    print(f"{time.perf_counter() - start:.0f} s")
    first = {name: psnr[GIVEN] for name, (psnr, _) in scores.items()}
    return 0 if first["fast weights"] > first["no updates"] and difference < 1e-3 else 1


def _print_table(scores: dict[str, tuple[list[float], list[float]]]) -> None:
    print(f"\n{TEST_VIDEOS} new videos, generated from {GIVEN} frames:")
    width = 14 * len(scores)
    print(f"{'':5}  {'PSNR, dB':>{width}}  {'error of the place, pixels':>{width}}")
    print("frame  " + "  ".join(2 * ["".join(f"{name:>14}" for name in scores)]))
    for i in range(GIVEN, FRAMES):
        psnr = "".join(f"{values[i]:14.1f}" for values, _ in scores.values())
        distance = "".join(f"{values[i]:14.2f}" for _, values in scores.values())
        print(f"{i:5d}  {psnr}  {distance}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of each training (400)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--out", type=Path, default="demo-results", help="for video.png")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error(f"--steps must be at least 20, got {options.steps}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be at least 0 and less than 2**32, got {options.seed}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
