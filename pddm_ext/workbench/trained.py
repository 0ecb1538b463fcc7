"""What a training run leaves, in use: pictures to unit features, and scores of their pairs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pddm_ext

from . import checkpoint
from .data.augment import View, from_description
from .data.reading import pictured
from .model import Embedder, embedder
from .settings import Settings, parse

Picture = str | os.PathLike[str] | Image.Image | Tensor

#: Pictures that are embedded at once.
BATCH = 32


class Features(nn.Module):
    """Stored pictures to unit features: what a net sees of them, the net, and the norm. ``torch.export`` takes it.

    Args:
        net: the trained net.
        view: how it sees pictures.
    """

    def __init__(self, net: Embedder, view: View) -> None:
        super().__init__()
        self.net, self.view = net, view

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (n, channels, stored, stored) uint8 to unit features (n, dim)."""
        return self.both(pictures)[0]

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit features and, of a net with a structure head, structures of the same shape."""
        feats, structure = self.net.both(self.view.plain(pictures).to(next(self.net.parameters()).dtype))
        return F.normalize(feats, dim=1), structure


class Trained:
    """An embedder in evaluation mode that prepares its pictures itself; :func:`load` makes it.

    Attributes:
        module: stored pictures (n, channels, stored, stored) uint8 to unit features (n, dim); :meth:`prepare` makes
            stored pictures.
        unit: the PDDM unit that was trained with it, or None.
        view: how pictures are seen.
        names: the classes that were trained on.
        settings: of the run.
        thresholds: what parts same from different on the run's validation pictures: for ``"distance"`` and
            ``"score"``, a threshold by rate of false positives (``"0.01"``, ``"0.001"``) and where both errors are
            equal (``"eer"``); empty without validation pictures.
        digest: identifies weights and view: features of two embedders with the same one are comparable.
    """

    def __init__(
        self,
        module: Features,
        unit: pddm_ext.PDDM | None,
        view: View,
        names: tuple[str, ...],
        settings: Settings,
        thresholds: Mapping[str, Mapping[str, float]],
        digest: str,
    ) -> None:
        self.module, self.unit, self.view, self.names = module, unit, view, names
        self.settings, self.thresholds, self.digest = settings, thresholds, digest

    @property
    def dim(self) -> int:
        """Length of a feature."""
        return self.settings.dim

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def to(self, device: str | torch.device) -> Trained:
        """Move it to a device, and give it back."""
        self.module.to(device)
        if self.unit is not None:
            self.unit.to(device)
        return self

    def prepare(self, picture: Picture) -> Tensor:
        """What is stored of a picture: (channels, stored, stored) uint8.

        Args:
            picture: a path, a Pillow picture, or a uint8 tensor (1, 3 or 4, height, width).

        Raises:
            TypeError: none of these.
            ValueError: not a readable picture, or a tensor of another shape or dtype.
            OSError: there is no such file.
        """
        return pictured(picture, self.view)

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Tensor:
        """Unit features (n, dim), float32 on the CPU.

        Args:
            pictures: one picture as in :meth:`prepare`, or any number of them; a uint8 tensor (n, c, height, width)
                is n of them.

        Raises:
            TypeError, ValueError, OSError: as in :meth:`prepare`.
        """
        return self.both(pictures)[0]

    def both(self, pictures: Picture | Iterable[Picture]) -> tuple[Tensor, Tensor | None]:
        """Unit features and, of a net with a structure head, structures, (n, dim) float32 on the CPU each."""
        feats, structures = [torch.empty(0, self.dim)], [torch.empty(0, self.dim)]
        for batch in _batched(self._pictures(pictures)):
            found, structure = self.embed(torch.stack([self.prepare(picture) for picture in batch]))
            feats.append(found)
            if structure is not None:
                structures.append(structure)
        has_structure = self.module.net.structure is not None
        return torch.cat(feats), torch.cat(structures) if has_structure else None

    @torch.no_grad()
    def embed(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`both` of stored pictures (n, channels, stored, stored) uint8, all at once."""
        feats, structure = self.module.both(stored.to(self.device))
        return feats.float().cpu(), None if structure is None else structure.float().cpu()

    def _pictures(self, pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
        if isinstance(pictures, (str, os.PathLike, Image.Image)) or (
            isinstance(pictures, Tensor) and pictures.dim() == 3
        ):
            return [pictures]
        if isinstance(pictures, Iterable):
            return pictures
        raise TypeError(f"pictures is {type(pictures).__name__}; a picture or several of them are accepted")


def _batched(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    rest = iter(pictures)
    while batch := list(islice(rest, BATCH)):
        yield batch


def load(
    path: str | os.PathLike[str], *, backbone: nn.Module | None = None, device: str | torch.device = "cpu"
) -> Trained:
    """A trained embedder from the checkpoint of a run, in evaluation mode; nothing in the file is executed.

    Args:
        path: ``checkpoint.pt`` of a run, or the run's folder.
        backbone: the module, where the run had one of the user's own.
        device: where it computes.

    Returns:
        The embedder: of the best step where validation pictures chose one, else of the last.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged or no checkpoint, or its backbone is the user's and not given, or does not fit.
        ModuleNotFoundError: the package of its backbone is not installed.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    state = checkpoint.load(path)
    settings = Settings(**parse(state["settings"], str(path)))
    if ":" in settings.backbone and backbone is None:
        raise ValueError(
            f"{path}: its backbone is {settings.backbone}, whose code would run; backbone=MODULE is accepted"
        )
    if not state["view"]:
        raise ValueError(f"{path}: its pictures were seen by a view of the user's own, which no checkpoint holds")
    view = from_description(state["view"])
    # The weights follow: those that were published are not fetched again.
    bare = Settings(**{**parse(state["settings"], str(path)), "pretrained": False})
    net = embedder(bare, (view.channels, view.size, view.size), backbone)
    weights: dict[str, Tensor] = state["best"] or state["learner"]
    unit = pddm_ext.PDDM(settings.dim) if "objective.unit.u.weight" in weights else None
    if settings.precision == "64-true":
        net.double()
        if unit is not None:
            unit.double()
    try:
        net.load_state_dict(_under("net.", weights))
        if unit is not None:
            unit.load_state_dict(_under("objective.unit.", weights))
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit the net; {error}") from error
    module = Features(net, view).eval().requires_grad_(False)
    if unit is not None:
        unit.eval().requires_grad_(False)
    digest = checkpoint.digest(_under("net.", weights), state["view"])
    trained = Trained(module, unit, view, tuple(state["names"]), settings, state["thresholds"], digest)
    return trained.to(device)


def _under(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
