"""What searching photographs is measured on: a backbone of its published weights, made pictures, made features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pddm_ext import PDDM
from pddm_ext.workbench import backbones, catalogue, catalogue_files, model
from pddm_ext.workbench.settings import Settings
from pddm_ext.workbench.trained import Features, Trained


def embedder(dim: int = 128) -> Trained:
    """EfficientNet-Lite0 and a unit, as a run would leave them before its first step; pictures of 224 pixels."""
    settings = Settings(data="folder", root="photographs", backbone=backbones.LITE, dim=dim)
    view = backbones.view(settings)
    module = Features(model.embedder(settings, (view.channels, view.size, view.size)), view).requires_grad_(False)
    return Trained(module, PDDM(dim), view, (), settings, {}, "made")


def folder(root: Path, count: int) -> list[str]:
    """JPEGs of 500 × 375 pixels, about as large as photographs of that size; their names."""
    random, names = np.random.default_rng(0), []
    for place in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        names.append(f"{place:04}.jpg")
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(root / names[-1], quality=90)
    return names


def opened(out: Path, trained: Trained, rows: int) -> catalogue.Catalogue:
    """A flat catalogue of so many made features."""
    features = np.random.default_rng(0).standard_normal((rows, trained.dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names, zeros = tuple(f"{row:06}.jpg" for row in range(rows)), (0,) * rows
    content = catalogue_files.Content(trained.digest, "", "flat", names, zeros, zeros, features, None)
    catalogue_files.write(out, content, catalogue.indexed("flat", features))
    return catalogue.Catalogue.open(out, trained)
