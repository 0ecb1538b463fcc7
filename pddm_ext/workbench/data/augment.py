"""From stored pictures to what a net sees, a batch at a time on the batch's device, plain or randomly distorted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class View:
    """How pictures are shown to a net.

    Functions of a module, not lambdas: a loader's worker processes, and those of a comparison, get a view pickled.

    Attributes:
        plain: stored (n, c, H, W) uint8 to (n, channels, size, size) float32, the same each time.
        augment: the same under random distortions drawn from a generator on the batch's device.
        show: what a net sees to (n, channels, size, size) float32 in [0, 1], for people.
    """

    channels: int
    size: int
    plain: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    show: Callable[[Tensor], Tensor]


def _half(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures, 2)


def plain_drawings(drawings: Tensor) -> Tensor:
    """(n, 1, 64, 64) uint8 to (n, 1, 32, 32) float32 in [0, 1]."""
    return _half(drawings.float() / 255)


def distort_drawings(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """:func:`plain_drawings` under rotation (±12°), scale (0.85 to 1.15), shift (±2 of 32 pixels) and noise (σ 0.1)."""
    n, device = len(drawings), drawings.device
    angle, zoom, right, down = torch.rand(4, n, generator=generator, device=device) * 2 - 1
    angle = angle * math.radians(12)
    zoom = 1 / (1 + 0.15 * zoom)
    shift = torch.stack([right, down], -1) * (2 * 2 / 32)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(n, 2, 2)
    affine = torch.cat([zoom[:, None, None] * turn, shift[:, :, None]], -1)
    grid = F.affine_grid(affine, list(drawings.shape), align_corners=False)
    pictures = _half(F.grid_sample(drawings.float() / 255, grid, align_corners=False))
    return (pictures + 0.1 * torch.randn(pictures.shape, generator=generator, device=device)).clamp(0, 1)


def show_drawings(seen: Tensor) -> Tensor:
    """(n, 1, 32, 32) float32 in [0, 1], as they are."""
    return seen


DRAWINGS = View(1, 32, plain_drawings, distort_drawings, show_drawings)

# The statistics that published backbones were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Side of a stored photograph and of the crop a net sees.
PHOTO, CROP = 256, 224


def _standard(pictures: Tensor, sign: int) -> Tensor:
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (_MEAN, _STD))
    return (pictures - mean) / std if sign > 0 else (pictures * std + mean).clamp(0, 1)


def plain_photos(photos: Tensor) -> Tensor:
    """The middle of (n, 3, 256, 256) uint8, standardised: (n, 3, 224, 224) float32."""
    edge = (PHOTO - CROP) // 2
    return _standard(photos[:, :, edge : edge + CROP, edge : edge + CROP].float() / 255, +1)


def distort_photos(photos: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops (0.16 to 1 of the area, aspect 3:4 to 4:3), half of them mirrored: (n, 3, 224, 224) float32."""
    n, device = len(photos), photos.device
    area, aspect, right, down, mirror = torch.rand(5, n, generator=generator, device=device)
    aspect = ((aspect * 2 - 1) * math.log(4 / 3) / 2).exp()
    side = (0.16 + 0.84 * area).sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    flip = torch.where(mirror < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    affine = torch.stack(
        [width * flip, zero, (right * 2 - 1) * (1 - width), zero, height, (down * 2 - 1) * (1 - height)], -1
    ).reshape(n, 2, 3)
    grid = F.affine_grid(affine, [n, 3, CROP, CROP], align_corners=False)
    return _standard(F.grid_sample(photos.float() / 255, grid, padding_mode="border", align_corners=False), +1)


def show_photos(seen: Tensor) -> Tensor:
    """Standardised (n, 3, 224, 224) back to [0, 1]."""
    return _standard(seen, -1)


PHOTOS = View(3, CROP, plain_photos, distort_photos, show_photos)
