"""Scenes of a few coloured spheres on a ground, ray-cast by cameras that look at them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPHERES = 3
DISTANCE, FIELD = 3.5, 0.42  # of the cameras from the middle; half an image's side, one unit away
ARC = math.radians(60)  # the cameras stand on this part of a circle
SUN = F.normalize(torch.tensor([0.5, -0.3, 0.8]), dim=0)
UP = torch.tensor([0.0, 0.0, 1.0])


class Views(NamedTuple):
    """Pictures of B scenes by V cameras each."""

    colours: Tensor  # [B, V, 3, S, S], from 0 to 1
    rays: Tensor  # [B, V, 6, S, S], Plücker coordinates: direction d and moment o x d

    def of(self, indices: Tensor | slice) -> "Views":
        return Views(self.colours[:, indices], self.rays[:, indices])

    def first(self, n: int) -> "Views":
        return self.of(slice(n))

    def last(self, n: int) -> "Views":
        return self.of(slice(-n, None))


def random_views(scenes: int, views: int, size: int) -> Views:
    """Random scenes, and what random cameras see of them: `views` images of size x size pixels of each."""
    origins, directions = _cameras(scenes, views, size)
    colours = _cast(_spheres(scenes), _ground(scenes), origins, directions)
    moments = torch.linalg.cross(origins.expand_as(directions), directions, dim=2)
    return Views(colours, torch.cat([directions, moments], dim=2))


def _uniform(low: float, high: float, shape: tuple[int, ...]) -> Tensor:
    return low + (high - low) * torch.rand(shape)


class _Spheres(NamedTuple):
    centres: Tensor  # [B, n, 3]
    radii: Tensor  # [B, n]
    colours: Tensor  # [B, n, 3]


def _spheres(scenes: int) -> _Spheres:
    """Spheres that stand on the ground around the middle, now and then one in another."""
    shape = (scenes, SPHERES)
    radii = _uniform(0.25, 0.55, shape)
    places = torch.arange(SPHERES) + _uniform(0, 0.25, shape)
    angles = 2 * math.pi * (places / SPHERES + torch.rand(scenes, 1))
    away = _uniform(0.6, 1.1, shape)
    centres = torch.stack([away * angles.cos(), away * angles.sin(), radii], dim=-1)
    return _Spheres(centres, radii, torch.rand(*shape, 3))


def _ground(scenes: int) -> Tensor:
    return _uniform(0.3, 0.9, (scenes, 3))


def _cameras(scenes: int, views: int, size: int):
    """Origins `[B, V, 3, 1, 1]` and directions `[B, V, 3, S, S]` of the rays through all pixels."""
    shape = (scenes, views)
    around = _uniform(0, ARC, shape)
    above = _uniform(math.radians(20), math.radians(50), shape)
    ring = torch.stack([around.cos(), around.sin()], dim=-1) * above.cos()[..., None]
    origins = DISTANCE * torch.cat([ring, above.sin()[..., None]], dim=-1)
    forward = F.normalize(0.3 * UP - origins, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, UP.expand_as(forward)), dim=-1)
    axes = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)
    steps = FIELD * ((torch.arange(size) + 0.5) / size * 2 - 1)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    pixels = F.normalize(torch.stack([x, y, torch.ones_like(x)]), dim=0)  # [3, S, S]
    return origins[..., None, None], torch.einsum("bvij,jyx->bviyx", axes, pixels)


def _cast(spheres: _Spheres, ground: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """The colours that rays end on: `[B, V, 3, S, S]`."""
    distances, nearest = _hit(spheres, origins, directions).min(dim=2)
    down = directions[:, :, 2]
    to_ground = torch.where(down < 0, -origins[:, :, 2] / down, math.inf)
    is_sphere = (distances < to_ground)[:, :, None]
    distances = torch.minimum(distances, to_ground)[:, :, None]
    points = origins + directions * distances.clamp(max=1e3)

    def of_nearest(x: Tensor) -> Tensor:  # [B, n, 3] -> [B, V, 3, S, S]
        rows = torch.arange(len(x))[:, None, None, None]
        return x[rows, nearest].movedim(-1, 2)

    normals = (points - of_nearest(spheres.centres)) / of_nearest(spheres.radii[..., None])
    normals = torch.where(is_sphere, normals, UP[:, None, None])
    colours = torch.where(is_sphere, of_nearest(spheres.colours), ground[:, None, :, None, None])
    lit = _hit(spheres, points + 1e-3 * normals, SUN[:, None, None].expand_as(points)).amin(dim=2)
    light = torch.einsum("bvcyx,c->bvyx", normals, SUN).clamp(min=0) * (lit == math.inf)
    colours = colours * (0.35 + 0.65 * light[:, :, None])
    sky = torch.tensor([0.55, 0.75, 1.0])[:, None, None]
    return torch.where(distances < 12, colours, sky)


def _hit(spheres: _Spheres, origins: Tensor, directions: Tensor) -> Tensor:
    """The distances at which rays enter each sphere, `[B, V, n, S, S]`; inf where they miss it."""
    centres = spheres.centres
    along = torch.einsum("bvcyx,bnc->bvnyx", directions, centres)
    along = along - (origins * directions).sum(dim=2, keepdim=True)
    squares = (origins**2).sum(dim=2, keepdim=True)
    squares = squares - 2 * torch.einsum("bvcyx,bnc->bvnyx", origins, centres)
    constant = (centres**2).sum(dim=-1) - spheres.radii**2
    inside = along**2 - squares - constant[:, None, :, None, None]
    distance = along - inside.clamp(min=0).sqrt()
    return torch.where((inside > 0) & (distance > 0), distance, math.inf)
