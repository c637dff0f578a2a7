"""Unseen views of scenes from a few pictures of each: fast weights as the memory of a scene.

```
python -m examples.novel_views [--out demo-results/novel_views.png]
```

A small model of the kind of LaCT's for novel views. A scene (`examples/scenes.py`) comes as a few pictures,
with the rays through their pixels. Each block updates its fast weights on the patches of these pictures, and
then applies them to the patches of the views to be rendered, which have rays and no colours. No patch meets
another in any other way, so all that the model knows of a scene is in its fast weights.

The same model is trained twice, the second time without the update. Both are measured on scenes that neither
has seen, beside two simple baselines. Then scenes are reconstructed once, which leaves fast weights for each
block, and rendered from these alone. About a minute on one core. Exit status: 0 if updates gain at least
`MARGIN`, and what is rendered from the fast weights alone is that of the joint pass.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import views_picture
from examples.scenes import Views, random_views
from lact_kernels.compat.lact import FastWeightGluMLPMultihead, TTTOperator

PATCH, DIM, HEAD_DIM, BLOCKS = 8, 64, 32, 2
INPUTS, TARGETS = (1, 2, 4), 4  # numbers of pictures of a scene that are given, and asked for
BATCH, BATCHES = 8, 128  # scenes of a step, and steps after which they come again
HELD_OUT = 64  # scenes that no training sees
LEARNING_RATE = 1e-2
MARGIN = 2.0  # dB, of four pictures

States = list[dict[str, Tensor]]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.fast = FastWeightGluMLPMultihead(DIM, HEAD_DIM, muon_update_steps=2)
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x: Tensor, info: dict) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.fast(self.norm(x), info)
        x = x + y
        return x + self.mlp(x), state


class ViewModel(nn.Module):
    """Renders views of a scene from pictures of it; without `fast_weights`, from their rays alone."""

    def __init__(self, fast_weights: bool):
        super().__init__()
        self.fast_weights = fast_weights
        self.embed = nn.Sequential(nn.Linear(9 * PATCH**2, DIM), nn.LayerNorm(DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.paint = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 3 * PATCH**2), nn.Sigmoid())

    def forward(self, inputs: Views, rays: Tensor) -> Tensor:
        """Render `rays [B, m, 6, S, S]` in one pass with the pictures: `[B, m, 3, S, S]`."""
        seen, asked = self._tokens(inputs.rays, inputs.colours), self._tokens(rays)
        n, m = seen.shape[1], asked.shape[1]
        order = [
            TTTOperator(0, n, update=self.fast_weights, apply=False),
            TTTOperator(0, n + m, update=False, apply=True),
        ]
        x, _ = self._run(torch.cat([seen, asked], dim=1), order)
        return self._images(x[:, n:], rays)

    def reconstruct(self, inputs: Views) -> States:
        """The fast weights of each block after the pictures."""
        order = [TTTOperator(0, -1, update=True, apply=True)]
        return self._run(self._tokens(inputs.rays, inputs.colours), order)[1]

    def render(self, rays: Tensor, states: States) -> Tensor:
        """Render views of a scene that was reconstructed."""
        order = [TTTOperator(0, -1, update=False, apply=True)]
        return self._images(self._run(self._tokens(rays), order, states)[0], rays)

    def _run(self, x: Tensor, order: list, states: States | None = None) -> tuple[Tensor, States]:
        after = []
        for block, state in zip(self.blocks, states or [{}] * BLOCKS):
            x, new = block(x, {"ttt_op_order": order, **state})
            after.append(new)
        return x, after

    def _tokens(self, rays: Tensor, colours: Tensor | None = None) -> Tensor:
        """One token for each patch of each view, `[B, V * patches, DIM]`."""
        B, V = rays.shape[:2]
        signed = torch.zeros_like(rays[:, :, :3]) if colours is None else 2 * colours - 1
        pixels = torch.cat([signed, rays], dim=2).flatten(0, 1)  # [B * V, 9, S, S]
        patches = F.pixel_unshuffle(pixels, PATCH).flatten(2).mT  # [B * V, patches, 9 * PATCH**2]
        return self.embed(patches.reshape(B, -1, 9 * PATCH**2))

    def _images(self, x: Tensor, rays: Tensor) -> Tensor:
        B, V, _, S, _ = rays.shape
        side = S // PATCH
        patches = self.paint(x).view(B * V, side, side, -1).movedim(-1, 1)
        return F.pixel_shuffle(patches, PATCH).unflatten(0, (B, V))


def train(model: ViewModel, batches: list[Views], steps: int) -> None:
    """Bring down the squared error of some views of a scene, given others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        views = batches[step % len(batches)]
        mixed = torch.randperm(views.rays.shape[1])
        seen = mixed[: INPUTS[int(torch.randint(len(INPUTS), ()))]]
        inputs, targets = views.of(seen), views.of(mixed[-TARGETS:])
        loss = F.mse_loss(model(inputs, targets.rays), targets.colours)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 8) == 0:
            left = (time.perf_counter() - start) / step * (steps - step)
            print(f"  step {step:4d}  loss {loss.item():.4f}  {left:3.0f} s left", flush=True)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Of each view, in dB: `[B, V]`."""
    return -10 * (images - truth).square().mean(dim=(2, 3, 4)).log10()


def nearest_view(inputs: Views, rays: Tensor) -> Tensor:
    """For each view the picture whose camera looks in the most similar direction."""
    looks, asked = (x[:, :, :3].mean(dim=(3, 4)) for x in (inputs.rays, rays))
    nearest = (asked @ looks.mT).argmax(dim=2)  # [B, m]
    return inputs.colours[torch.arange(len(rays))[:, None], nearest]


def mean_colour(inputs: Views, rays: Tensor) -> Tensor:
    return inputs.colours.mean(dim=(1, 3, 4), keepdim=True).expand_as(rays[:, :, :3])


def main() -> int:
    options = _parse()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that a second thread mostly waits
    try:
        return _train_and_compare(options)
    finally:
        torch.set_num_threads(threads)


def _train_and_compare(options: argparse.Namespace) -> int:
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    views = INPUTS[-1] + TARGETS
    batches = [random_views(BATCH, views, options.size) for _ in range(min(BATCHES, options.steps))]
    held_out = random_views(HELD_OUT, views, options.size)
    models = {}
    for name, fast_weights in (("fast weights", True), ("without updates", False)):
        print(f"Training, {name}:")
        torch.manual_seed(options.seed)  # the same parameters, and pictures in the same order
        models[name] = ViewModel(fast_weights)
        train(models[name], batches, options.steps)
    with torch.no_grad():
        better = _compare(models, held_out)
        same = _render_alone(models["fast weights"], held_out)
        inputs, truth = held_out.first(INPUTS[-1]), held_out.last(TARGETS)
        rendered = {name: model(inputs, truth.rays) for name, model in models.items()}
    scores = {name: psnr(images, truth.colours) for name, images in rendered.items()}
    views_picture.draw(options.out, inputs.colours, truth.colours, rendered, scores)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if better and same else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of each training (800)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the model (0)")
    parser.add_argument("--size", type=int, default=32, help="pixels of a view's side (32)")
    default = Path("demo-results/novel_views.png")
    parser.add_argument("--out", type=Path, default=default, metavar="PNG", help=f"({default})")
    options = parser.parse_args()
    if options.steps < 40:
        parser.error(f"--steps must be at least 40, got {options.steps}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be at least 0 and less than 2**32, got {options.seed}")
    if options.size < PATCH or options.size % PATCH:
        parser.error(f"--size must be a multiple of {PATCH}, got {options.size}")
    if options.out.suffix != ".png" or options.out.is_dir():
        parser.error(f"--out must be a file that ends in .png, got {options.out}")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def _compare(models: dict[str, ViewModel], held_out: Views) -> bool:
    """Print the PSNR for each number of pictures. True if updates gain enough."""
    renderers = {**models, "nearest picture": nearest_view, "mean colour": mean_colour}
    truth = held_out.last(TARGETS)
    print(f"PSNR in dB, {HELD_OUT} held-out scenes, by the number of pictures given:")
    print(" " * 18 + "".join(f"{n:8d}" for n in INPUTS))
    scores = []
    for name, render in renderers.items():
        images = [render(held_out.first(n), truth.rays) for n in INPUTS]
        scores.append([psnr(x, truth.colours).mean().item() for x in images])
        print(f"  {name:<16}" + "".join(f"{score:8.2f}" for score in scores[-1]))
    with_updates, without, *_ = scores
    gain = with_updates[-1] - without[-1]
    print(f"Updates gain {gain:.1f} dB with {INPUTS[-1]} pictures.")
    return gain >= MARGIN


def _render_alone(model: ViewModel, held_out: Views) -> bool:
    """Reconstruct once, render view by view, and compare with the joint pass."""
    inputs, rays = held_out.first(INPUTS[-1]), held_out.last(TARGETS).rays
    states = model.reconstruct(inputs)
    alone = torch.cat([model.render(view, states) for view in rays.split(1, dim=1)], dim=1)
    size = sum(w.numel() for state in states for w in state.values()) // HELD_OUT
    error = (alone - model(inputs, rays)).abs().max().item()
    print(f"Reconstructed once to {size} fast weights for each scene, and rendered view by view:")
    print(f"the largest difference from the joint pass is {error:.1e}")
    return error < 1e-4


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
