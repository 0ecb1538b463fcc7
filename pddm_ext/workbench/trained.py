"""What a training run leaves, in use: pictures to unit features, and scores of their pairs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pddm_ext
from pddm_ext import _C
from pddm_ext.precision import no_autocast

from . import checkpoint
from .backbones import said
from .data.augment import View, from_description
from .data.reading import pictured
from .model import Embedder, embedder, pieces
from .settings import Settings, parse
from .similarity import Similarity

Picture = str | os.PathLike[str] | Image.Image | Tensor

#: Pictures that are embedded at once.
BATCH = 32


class Features(nn.Module):
    """Stored pictures to unit features: what a net sees of them, the net, and the norm. ``torch.export`` takes it.

    It stays in evaluation mode: ``train()`` leaves it there.

    Args:
        net: the trained net.
        view: how it sees pictures.
    """

    def __init__(self, net: Embedder, view: View) -> None:
        super().__init__()
        self.net, self.view = net, view
        self.eval()

    def train(self, mode: bool = True) -> Features:
        """Evaluation mode, whatever is asked for: BatchNorm's statistics are part of what was trained."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (n, channels, stored, stored) uint8 to unit features (n, dim)."""
        return self.both(pictures)[0]

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit features and, of a net with a structure head, structures of the same shape."""
        feats, structure = self.net.both(self.view.plain(pictures).to(self.net.head.weight.dtype))
        return F.normalize(feats, dim=1), structure


class Trained:
    """An embedder in evaluation mode that prepares its pictures itself; :func:`pddm_ext.load` makes it.

    Attributes:
        module: stored pictures (n, channels, stored, stored) uint8 to unit features (n, dim); :meth:`prepare` makes
            stored pictures.
        unit: the PDDM unit that was trained with it or for it, or None.
        cosine: weight of the cosine beside the unit's score (:class:`.similarity.Similarity`), in :meth:`score` and
            whatever else ranks by score; 0 where the unit was trained together with the embedding.
        floor: of the unit's score, as there.
        view: how pictures are seen.
        names: the classes that were trained on.
        settings: of the run.
        thresholds: what parts same from different on the run's validation pictures: for ``"distance"`` and
            ``"score"``, a threshold by rate of false positives (``"0.01"``, ``"0.001"``) and where both errors are
            equal (``"eer"``); empty without validation pictures. See :meth:`threshold`.
        digest: identifies backbone, weights and view: features of two embedders with the same one are comparable.
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
        cosine: float = 0.0,
        floor: float = -math.inf,
    ) -> None:
        self.module, self.unit, self.view, self.names = module, unit, view, names
        self.cosine, self.floor = cosine, floor
        self.settings, self.thresholds, self.digest = settings, thresholds, digest

    @property
    def similarity(self) -> Similarity | None:
        """What ranks by score, where there is a unit."""
        return None if self.unit is None else Similarity(self.unit, self.cosine, self.floor)

    @property
    def dim(self) -> int:
        """Length of a feature."""
        return self.settings.dim

    @property
    def structured(self) -> bool:
        """Whether the net has a structure head."""
        return self.module.net.structure is not None

    @property
    def device(self) -> torch.device:
        """Where features are computed."""
        return self.module.net.head.weight.device

    def to(self, device: str | torch.device) -> Trained:
        """Move it to a device, and give it back. Where pddm_ext has no kernels the unit is on the CPU."""
        self.module.to(device)
        if self.unit is not None:
            served = ("cpu", "cuda") if _C.build_info()["cuda"] not in (None, "emulated") else ("cpu",)
            self.unit.to(device if torch.device(device).type in served else "cpu")
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
            pictures: one picture as in :meth:`prepare`, or any number of them; a uint8 tensor (n, c, height, width),
                also as one of several, is n of them.

        Raises:
            TypeError, ValueError, OSError: as in :meth:`prepare`; of a list or tuple the kinds of all are looked at
                before any is embedded.
        """
        return self.both(pictures)[0]

    def both(self, pictures: Picture | Iterable[Picture]) -> tuple[Tensor, Tensor | None]:
        """Unit features and, of a net with a structure head, structures, (n, dim) float32 on the CPU each."""
        none = torch.empty(0, self.dim, dtype=torch.float32, device="cpu")
        feats, structures = [none], [none]
        rest = _each(pictures)
        while batch := list(islice(rest, BATCH)):
            found, structure = self.embed(torch.stack([self.prepare(picture) for picture in batch]))
            feats.append(found)
            if structure is not None:
                structures.append(structure)
        return torch.cat(feats), torch.cat(structures) if self.structured else None

    @torch.no_grad()
    def embed(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`both` of stored pictures (n, channels, stored, stored) uint8, all at once."""
        self.module.eval()  # a part of it may have been set to training
        stored = stored.to(self.device)
        with no_autocast(stored):
            feats, structures = zip(*map(self.module.both, pieces(stored)), strict=True)
        return _whole(feats), _whole(structures) if self.structured else None

    @torch.no_grad()
    def score(self, a: Picture | Iterable[Picture], b: Picture | Iterable[Picture]) -> Tensor:
        """Scores (n,), float32 on the CPU, of matched pictures: the larger, the more alike.

        Args:
            a, b: as many pictures of each, as in :meth:`__call__`; one alone is compared with each of the others.

        Raises:
            TypeError, ValueError, OSError: as in :meth:`__call__`; it has no unit, or as many pictures of each are
                not there.
        """
        scoring = self._scoring()
        x, y = self(a), self(b)
        if len(x) != len(y) and 1 not in (len(x), len(y)):
            raise ValueError(f"a is {len(x)} pictures and b {len(y)}; as many of each, or one of either, are accepted")
        count = max(len(x), len(y)) if len(x) and len(y) else 0
        rows = torch.cat([x.expand(count, -1), y.expand(count, -1)]).to(scoring.device)
        i = torch.arange(count, device=rows.device)
        with no_autocast(rows):
            return scoring.pairs(rows, i, i + count).float().cpu()

    def threshold(self, by: str = "distance", fpr: float | str = 0.01) -> float:
        """What parts same from different, as chosen on the run's validation pictures.

        Args:
            by: ``"distance"``, at or below which two pictures are of the same class, or ``"score"``, at or above which.
            fpr: the share of different pairs that is taken for the same, 0.01 or 0.001; or ``"eer"``, where that is the
                share of same pairs that is not.

        Raises:
            ValueError: there is no such threshold; the message says how to get one.
        """
        if by == "score":
            self._scoring()
        if by not in ("distance", "score"):
            raise ValueError(f"by is {by!r}; 'distance' and 'score' have thresholds of a run, others need threshold=")
        if isinstance(fpr, bool) or fpr not in (0.01, 0.001, "eer"):
            raise ValueError(f"fpr is {fpr!r}; 0.01, 0.001 and 'eer' are accepted, or a threshold= of your own")
        values = self.thresholds.get(by, {})
        key = fpr if isinstance(fpr, str) else f"{fpr:g}"
        if not values:
            raise ValueError(
                f"the checkpoint has no threshold by {by}: a run chooses it on validation pictures, at its end; train "
                f"with a folder val/ or with --patience, or give threshold="
            )
        if key not in values:
            raise ValueError(
                f"the run's validation pictures are too few to tell pairs apart by {by} at a rate of {key}, or all "
                f"alike; {', '.join(sorted(values))} are there, or give threshold="
            )
        return values[key]

    def _scoring(self) -> Similarity:
        if self.similarity is None:
            raise ValueError(f"it was trained by {self.settings.method}, {self.lacks}, and has no score")
        return self.similarity

    @property
    def lacks(self) -> str:
        """Why it has no unit, where it has none."""
        if self.settings.unit_updates:
            return "whose PDDM unit is trained when the run has ended (go on with --resume)"
        return "without a PDDM unit"


def _whole(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts)).float().cpu()


def _each(pictures: Any) -> Iterator[Picture]:
    """Picture by picture; what is none is refused by its name."""
    if isinstance(pictures, (str, os.PathLike, Image.Image, Tensor)):
        pictures = [pictures]
    if not isinstance(pictures, Iterable) or _foreign(pictures):
        raise TypeError(f"pictures is {_kind(pictures)}; one or several of these are accepted: {_ACCEPTED}")
    if isinstance(pictures, Sequence):
        for place, picture in enumerate(pictures):
            _check(place, picture)
    return _flat(pictures)


def _flat(pictures: Iterable[Any]) -> Iterator[Picture]:
    for place, picture in enumerate(pictures):
        _check(place, picture)
        if isinstance(picture, Tensor) and picture.dim() == 4:
            yield from picture
        else:
            yield picture


_TENSOR = "uint8 of (c, height, width) or (n, c, height, width), c being 1, 3 or 4"
_ACCEPTED = f"a path, a Pillow picture or a tensor, {_TENSOR}"


def _check(place: int, picture: Any) -> None:
    if isinstance(picture, Tensor):
        shape = picture.shape[-3:]
        if picture.dtype != torch.uint8 or picture.dim() not in (3, 4) or shape[0] not in (1, 3, 4) or 0 in shape:
            raise ValueError(
                f"picture {place} is a tensor of shape {tuple(picture.shape)} and {picture.dtype}; "
                f"{_TENSOR}, is accepted"
            )
    elif not isinstance(picture, (str, os.PathLike, Image.Image)):
        raise TypeError(f"picture {place} is {_kind(picture)}; {_ACCEPTED}, is accepted")


def _foreign(pictures: Any) -> bool:
    """Whether it can be iterated over, and not for its pictures."""
    return isinstance(pictures, (bytes, bytearray, Mapping)) or hasattr(pictures, "__array__")


def _kind(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    # An array has its channels last, as no tensor here.
    return f"{name} (PIL.Image.fromarray makes a picture of an array)" if hasattr(value, "__array__") else name


def load(
    path: str | os.PathLike[str], *, backbone: nn.Module | str | None = None, device: str | torch.device = "cpu"
) -> Trained:
    """A trained embedder from the checkpoint of a run, in evaluation mode; nothing in the file is executed.

    Nothing is fetched: the checkpoint has all weights.

    Args:
        path: ``checkpoint.pt`` of a run, or the run's folder.
        backbone: the module, where the run had one of the user's own: it is given the run's weights and becomes a part
            of the embedder. Or its name, MODULE:CALLABLE, which says that its code may run.
        device: where it computes.

    Returns:
        The embedder: of the best step where validation pictures chose one, else of the last.

    Raises:
        FileNotFoundError: there is no checkpoint.
        TypeError: ``backbone`` is neither.
        ValueError: the file is damaged or no checkpoint, or its backbone is the user's and not given, or does not fit,
            or there is no such device.
        ModuleNotFoundError: the package of its backbone is not installed.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if backbone is not None and not isinstance(backbone, (nn.Module, str)):
        raise TypeError(f"backbone is {_kind(backbone)}; a torch.nn.Module or a name is accepted")
    state = checkpoint.load(path)
    try:
        trained = _trained(state, backbone)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return trained.to(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"device is {str(device)!r}, which is not to be had here; {said(error)}") from error


def _trained(state: Mapping[str, Any], backbone: nn.Module | str | None) -> Trained:
    """What is in a checkpoint; a ValueError says what is not."""
    settings = Settings(**parse(state["settings"], "its settings"))
    weights = state["best"] or state["learner"]
    if not all(type(value) is Tensor for value in weights.values()):
        raise ValueError("damaged; its weights are no tensors by name")
    of_net, of_unit = _under("net.", weights), _under("objective.unit.", weights)
    cosine, floor = torch.tensor(0.0), torch.tensor(-math.inf)
    if settings.unit_updates:
        of_unit = _under("fitted.unit.", weights)
        cosine, floor = (weights.get(f"fitted.{name}", torch.empty(0)) for name in ("cosine", "floor"))
        if not of_unit or cosine.shape != () or floor.shape != ():
            raise ValueError("damaged; it has no weights of a unit")
        if not state["fitted"]:
            of_unit = {}
    if tuple(of_net.get("head.bias", torch.empty(0)).shape) != (settings.dim,):
        raise ValueError(f"damaged; it has no weights of a net with features of length {settings.dim}")
    # No floor is -inf.
    if floor.isnan() or not all(value.isfinite().all() for value in (*of_net.values(), *of_unit.values(), cosine)):
        raise ValueError("its weights are not all finite; train again with a lower --lr")
    if isinstance(backbone, str) and backbone != settings.backbone:
        raise ValueError(f"its backbone is {settings.backbone}; --backbone is {backbone}")
    if ":" in settings.backbone and backbone is None:
        raise ValueError(
            f"its backbone is {settings.backbone}, whose code would run; confirm with --backbone {settings.backbone} "
            f"(in Python backbone='{settings.backbone}', or the module itself)"
        )
    if not state["view"]:
        raise ValueError("its pictures were seen by a view of the user's own, which no checkpoint holds")
    view = from_description(state["view"])
    # The weights are here: those that were published are not fetched again.
    given = backbone if isinstance(backbone, nn.Module) else None
    net = embedder(replace(settings, pretrained=False), (view.channels, view.size, view.size), given)
    unit = _sized(settings.dim, of_unit) if of_unit else None
    if settings.precision == "64-true":
        net.double()
        if unit is not None:
            unit.double()
    try:
        net.load_state_dict(of_net)
        if unit is not None:
            unit.load_state_dict(of_unit)
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit its backbone or the one given; {error}") from error
    module = Features(net, view).requires_grad_(False)
    if unit is not None:
        unit.eval().requires_grad_(False)
    facts = {"backbone": settings.backbone, "view": state["view"]}
    return Trained(
        module,
        unit,
        view,
        tuple(state["names"]),
        settings,
        state["thresholds"],
        checkpoint.digest(of_net, facts),
        float(cosine),
        float(floor),
    )


def _sized(dim: int, weights: Mapping[str, Tensor]) -> pddm_ext.PDDM:
    try:
        hidden, combined = len(weights["u.bias"]), len(weights["c.bias"])
    except (KeyError, TypeError) as error:
        raise ValueError("damaged; it has no weights of a unit") from error
    return pddm_ext.PDDM(dim, hidden, combined)


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def accelerated(accelerator: str) -> torch.device:
    """The device of a kind, by Lightning Fabric's names.

    Raises:
        ValueError: there is none.
    """
    from lightning_fabric import Fabric  # which takes seconds, and which nobody needs who names a device of torch's

    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (RuntimeError, ImportError, ValueError) as error:
        hint = "" if accelerator == "cpu" else "; --accelerator cpu is there on every machine"
        raise ValueError(f"--accelerator {accelerator} is not to be had: {error}{hint}") from error
