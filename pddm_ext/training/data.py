"""Drawings, and how a batch or a test set is drawn from them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

#: Side of a stored drawing, of its ink, and of the picture a net sees, in pixels.
CANVAS, INK, PICTURE = 64, 44, 32


@dataclass(frozen=True)
class Split:
    """Drawings of one side of the open-set protocol.

    Attributes:
        drawings: (n, 64, 64) uint8, ink 255 on 0, normalised by :func:`fit`.
        labels: (n,) int64 into ``names``.
        names: one per class.
        groups: what the classes come from (scripts, alphabets), for people.
    """

    drawings: Tensor
    labels: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Training classes, and test classes that share nothing with them.

    ``distort_test``: whether a test sample is a distorted drawing (few distinct drawings, as with fonts) or the drawing
    itself (real handwriting).
    """

    name: str
    train: Split
    test: Split
    distort_test: bool

    def digest(self) -> str:
        """Identifies the pictures and labels, so that a resumed run is known to see the same ones."""
        sha = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.drawings, split.labels):
                sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()


def fit(picture: Image.Image) -> Tensor:
    """The ink of a grey picture (ink bright), cropped, scaled to a longer side of 44 and centred: (64, 64) uint8.

    Raises:
        ValueError: there is no ink.
    """
    box = picture.getbbox()
    if box is None:
        raise ValueError("the picture is blank")
    ink = picture.crop(box)
    scale = INK / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return torch.from_numpy(np.array(canvas))


def plain(drawings: Tensor) -> Tensor:
    """Pictures as a net sees them, undistorted: (n, 64, 64) uint8 to (n, 1, 32, 32) float32 in [0, 1]."""
    return F.avg_pool2d(drawings[:, None].float() / 255, CANVAS // PICTURE)


def distort(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures under a random rotation (±12°), scale (0.85 to 1.15), shift (±2 pixels) and noise (σ 0.1).

    (n, 64, 64) uint8 to (n, 1, 32, 32) float32 in [0, 1].
    """
    n = len(drawings)
    angle, zoom, right, down = torch.rand(4, n, generator=generator) * 2 - 1
    angle = angle * math.radians(12)
    zoom = 1 / (1 + 0.15 * zoom)
    shift = torch.stack([right, down], -1) * (2 * 2 / PICTURE)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(n, 2, 2)
    affine = torch.cat([zoom[:, None, None] * turn, shift[:, :, None]], -1)
    grid = F.affine_grid(affine, [n, 1, CANVAS, CANVAS], align_corners=False)
    pictures = F.grid_sample(drawings[:, None].float() / 255, grid, align_corners=False)
    pictures = F.avg_pool2d(pictures, CANVAS // PICTURE)
    return (pictures + 0.1 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


class BatchSampler:
    """Batches of ``classes`` × ``samples`` distorted drawings: images (c·s, 1, 32, 32) and labels (c·s,).

    A class with fewer drawings than ``samples`` repeats some, each time under another distortion.
    """

    def __init__(self, split: Split, classes: int, samples: int) -> None:
        self.split, self.classes, self.samples = split, classes, samples
        self.rows = [(split.labels == c).nonzero().flatten() for c in range(len(split.names))]

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(self.rows), generator=generator)[: self.classes]
        picked = []
        for c in chosen.tolist():
            rows = self.rows[c]
            rounds = -(-self.samples // len(rows))
            order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])
            picked.append(rows[order[: self.samples]])
        drawn = torch.cat(picked)
        return distort(self.split.drawings[drawn], generator), self.split.labels[drawn]


def frozen_test(dataset: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """The test set, the same for the same seed: images (n, 1, 32, 32) and labels (n,), one sample per drawing.

    Rows are shuffled: where an embedding collapses to ties, the order of rows must not favour the same class.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset.test.labels), generator=generator)
    drawings = dataset.test.drawings[order]
    images = distort(drawings, generator) if dataset.distort_test else plain(drawings)
    return images, dataset.test.labels[order]
