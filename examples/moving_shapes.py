"""Videos for `examples/video.py`: a shape that moves and bounces; how near frames are to it; a picture."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16  # pixels in a row, and rows
COLOURS = ((1, 0.2, 0.2), (0.2, 1, 0.2), (0.3, 0.4, 1), (1, 1, 0.2), (1, 0.3, 1), (0.2, 1, 1))
DRAWN = 3  # videos in the picture


def videos(n: int, frames: int, generator: torch.Generator) -> Tensor:
    """`[n, frames, SIZE, SIZE, 3]` from 0 to 1: a square, disc or triangle on black in each video.

    Its size, colour, first place and velocity are random.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    radius = uniform(2, 3.5, 1, 1)
    angle, speed = uniform(0, 2 * math.pi, 1), uniform(0.8, 1.6, 1)  # pixels in a frame
    velocity = torch.stack((angle.sin(), angle.cos()), dim=-1) * speed[..., None]  # [n, 1, 2]
    room = SIZE - 2 * radius
    path = room * uniform(0, 1, 1, 2) + velocity * torch.arange(frames)[:, None]
    centre = radius + room - (path.remainder(2 * room) - room).abs()  # [n, frames, 2]

    y, x = (torch.arange(SIZE) + 0.5 - c[..., None] for c in centre.unbind(-1))
    y, x, radius = y[..., :, None], x[..., None, :], radius[..., None]
    shapes = (  # the distance from each one's edge, negative within: [n, frames, SIZE, SIZE]
        torch.maximum(x.abs(), y.abs()) - 0.89 * radius,
        torch.hypot(x, y) - radius,
        torch.maximum(y - radius / 2, 0.75**0.5 * x.abs() - y / 2 - radius / 2),
    )
    shape = torch.randint(len(shapes), (n,), generator=generator)
    outside = torch.stack(shapes)[shape, torch.arange(n)]
    colour = torch.tensor(COLOURS)[torch.randint(len(COLOURS), (n,), generator=generator)]
    return (0.5 - outside).clamp(0, 1)[..., None] * colour[:, None, None, None]


def score(frames: Tensor, truth: Tensor) -> tuple[list[float], list[float]]:
    """For each frame, as means over the videos: PSNR in dB, and the error of the shape's place in pixels."""
    error = (frames - truth).square().mean(dim=(2, 3, 4))
    distance = (_centre_of_mass(frames) - _centre_of_mass(truth)).norm(dim=-1)
    psnr = -10 * error.clamp(min=1e-6).log10()
    return psnr.mean(dim=0).tolist(), distance.mean(dim=0).tolist()


def _centre_of_mass(frames: Tensor) -> Tensor:  # [B, frames, SIZE, SIZE, 3] -> [B, frames, 2]
    light = frames.amax(dim=-1)
    light = torch.where(light > 0.25, light, 1e-6)  # the middle of the canvas if all is dark
    places = torch.arange(SIZE) + 0.5
    y, x = ((light.sum(dim) * places).sum(dim=-1) for dim in (-1, -2))
    return torch.stack((y, x), dim=-1) / light.sum(dim=(-1, -2))[..., None]


def draw(videos: dict[str, Tensor], given: int, path: Path) -> None:
    """Write a PNG: for each of the first videos, a row of frames for each name."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nmatplotlib is not installed, so there is no picture")
        return
    rows = [(name, frames[i]) for i in range(DRAWN) for name, frames in videos.items()]
    figure, axes = plt.subplots(len(rows), figsize=(9, 1.2 * len(rows)), layout="constrained")
    gap, width = 2, SIZE + 2
    for axis, (name, frames) in zip(axes, rows):
        strip = F.pad(frames, (0, 0, 0, gap), value=1.0).transpose(0, 1).flatten(1, 2)
        axis.imshow(strip[:, :-gap].numpy(), interpolation="nearest")
        labels = [f"{i}, given" if i < given else i for i in range(len(frames))]
        axis.set_xticks([width * i + SIZE / 2 for i in range(len(frames))], labels)
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.tick_params(length=0, labelsize=7)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\npicture in {path}")
