"""What a report shows of an embedding in pictures: a map, retrieved neighbours, mined quadruplets."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

from pddm_ext.quadruplets import Quadruplets

from ..data.splits import TestSet
from ..evaluation.retrieval import answered, by_distance, by_score
from ..similarity import Similarity

_MAP_CLASSES, _MAP_SAMPLES, _MAP_SIDE = 30, 8, 1000
_QUERIES, _NEIGHBOURS, _QUADRUPLETS = 6, 10, 8
#: Sides of a photograph on the page and on the map; drawings keep their size.
_PHOTO, _MAP_PHOTO = 96, 44

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Shown:
    """One trained method.

    Attributes:
        features: (n, d) unit features of the test set, float32 on the CPU.
        unit: what scores, if it has a PDDM unit.
        quadruplets: what it mines from the batch, if it mines quadruplets.
    """

    features: Tensor
    unit: Similarity | None = None
    quadruplets: Quadruplets | None = None
    mined_by_score: bool = False


@dataclass(frozen=True)
class Examples:
    """What pictures are made of: methods trained with one seed, on that seed's test set and on one training batch.

    Attributes:
        seed: of the runs shown.
        test: the seed's test set.
        batch: (b, channels, size, size) float32, training pictures as a net sees them.
        shown: methods by label; the first one's errors choose the queries.
        classes: the name of each training picture's class, if they are to be named.

    Raises:
        ValueError: nothing to show, or features that are not of the test set.
    """

    seed: int
    test: TestSet
    batch: Tensor
    shown: Mapping[str, Shown]
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.shown:
            raise ValueError("shown is empty; at least one method is accepted")
        for label, shown in self.shown.items():
            if len(shown.features) != len(self.test):
                raise ValueError(f"{label} has {len(shown.features)} features; the test set has {len(self.test)} rows")
        if self.classes and len(self.classes) != len(self.batch):
            raise ValueError(f"classes has length {len(self.classes)}; batch has {len(self.batch)} pictures")


@dataclass(frozen=True)
class Picture:
    """A picture of the page: a data URI, what it is in words, the name of its class, and its file, if it has one."""

    source: str
    text: str
    name: str = ""
    file: str | None = None

    def short(self, length: int) -> str:
        """The file's own name in at most ``length`` letters: else without its kind, and rather its end, which tells it
        from others."""
        path = PurePosixPath((self.file or "").replace("\\", "/"))
        name = path.name if len(path.name) <= length else path.stem
        if len(name) <= length:
            return name
        first = (length - 1) // 3
        return f"{name[:first]}…{name[len(name) - (length - 1 - first) :]}"


@dataclass(frozen=True)
class Neighbour:
    picture: Picture
    right: bool


@dataclass(frozen=True)
class Query:
    """A query, whether the first method's nearest is of its class, and neighbours by label and ranking."""

    picture: Picture
    right: bool
    answers: list[tuple[str, str, list[Neighbour]]]


def queries(examples: Examples) -> list[Query]:
    """A few queries and what each method finds for them in the gallery, or among all others where there is none; up to
    half of them errors of the first method."""
    test, first = examples.test, next(iter(examples.shown.values()))
    rows = _choose(first.features, test)
    count = min(_NEIGHBOURS, len(test) - 1 if test.gallery is None else len(test.gallery))
    found: list[tuple[str, str, Tensor]] = []
    for label, shown in examples.shown.items():
        found.append((label, "by distance", by_distance(shown.features, rows, count, test.gallery)))
        if shown.unit is not None:
            found.append((label, "by score", by_score(shown.features, rows, count, shown.unit, test.gallery)))
    return [
        _query(test, row, [(label, ranking, ranked[q].tolist()) for label, ranking, ranked in found])
        for q, row in enumerate(rows.tolist())
    ]


def _query(test: TestSet, row: int, found: list[tuple[str, str, list[int]]]) -> Query:
    rows = list({row: None} | {other: None for _, _, ranked in found for other in ranked})
    labels = dict(zip(rows, test.labels[rows].tolist(), strict=True))
    seen = _thumbnails(test.show(test[torch.tensor(rows)]), _PHOTO)
    sources = {other: _data_uri(pixels) for other, pixels in zip(rows, seen, strict=True)}

    def picture(other: int, what: str) -> Picture:
        name = test.names[labels[other]]
        return Picture(sources[other], f"{what}: class {name}", name, test.file(other))

    def neighbour(place: int, other: int) -> Neighbour:
        right = labels[other] == labels[row]
        return Neighbour(picture(other, f"{place}, {'right' if right else 'wrong'}"), right)

    answers = [
        (label, ranking, [neighbour(place, other) for place, other in enumerate(ranked, start=1)])
        for label, ranking, ranked in found
    ]
    return Query(picture(row, "query"), answers[0][2][0].right, answers)


def _choose(features: Tensor, test: TestSet) -> Tensor:
    """Rows (q,) of queries with an answer, errors before hits; the first that come in the test set's own, shuffled
    order."""
    half, labels = _QUERIES // 2, test.labels
    wrong: list[int] = []
    right: list[int] = []
    for part in torch.split(answered(labels, test.queries, test.gallery), 512):
        hit = labels[by_distance(features, part, 1, test.gallery)[:, 0]] == labels[part]
        wrong += part[~hit].tolist()
        right += part[hit].tolist()
        if len(wrong) >= half and len(right) >= _QUERIES - half:
            break
    errors = wrong[: max(half, _QUERIES - len(right))]
    return torch.tensor(errors + right[: _QUERIES - len(errors)])


def quadruplets(examples: Examples, label: str) -> list[list[tuple[str, Picture, str]]]:
    """Some of a method's quadruplets of the batch: four of (role, picture, its score or distance) each."""
    shown = examples.shown[label]
    quads = shown.quadruplets
    if quads is None:
        return []
    slots = quads.valid.nonzero().flatten()
    slots = slots[torch.linspace(0, len(slots) - 1, min(_QUADRUPLETS, len(slots))).long()]
    seen = _thumbnails(examples.test.show(examples.batch), _PHOTO)

    def value(score: Tensor) -> str:
        return f"S {score:.3g}" if shown.mined_by_score else f"D {-score:.3g}"

    def member(role: str, row: Tensor, text: str) -> tuple[str, Picture, str]:
        name = examples.classes[int(row)] if examples.classes else ""
        return role, Picture(_data_uri(seen[int(row)]), f"{role}: class {name}" if name else role, name), text

    return [
        [
            member("anchor", quads.i[q], ""),
            member("positive", quads.j[q], value(quads.s_ij[q])),
            member("negative", quads.k[q], value(quads.s_ik[q])),
            member("negative", quads.l[q], value(quads.s_jl[q])),
        ]
        for q in slots
    ]


def chart(examples: Examples, label: str) -> Picture:
    """t-SNE of some test classes: every sample's picture at its place, in its class's colour."""
    test, features = examples.test, examples.shown[label].features
    classes = _mapped(examples)
    rows = torch.cat([(test.labels == c).nonzero().flatten()[:_MAP_SAMPLES] for c in classes])
    places = _places(features[rows].double().numpy(), examples.seed)
    shown = test.show(test[rows])
    drawings = shown.shape[1] == 1
    side = shown.shape[-1] if drawings else _MAP_PHOTO
    seen = _thumbnails(shown, side - 6)

    canvas = np.full((_MAP_SIDE, _MAP_SIDE, 3), 255, np.uint8)
    for (x, y), member, picture in zip(
        (places * (_MAP_SIDE - side)).astype(int), test.labels[rows].tolist(), seen, strict=True
    ):
        colour = _colour(classes.index(member), len(classes))
        window = canvas[y : y + side, x : x + side]
        if drawings:
            # Below a quarter it is the noise of the test sample, not its ink.
            ink = ((0.75 - picture[:, :, None] / 255) / 0.5).clip(0, 1)
            window[:] = (window + ink * (colour - window)).round()
        else:
            window[:] = colour.round()
            window[3:-3, 3:-3] = picture
    text = f"t-SNE of {len(rows)} test samples of {len(classes)} classes by {label}"
    return Picture(_data_uri(canvas, photographs=not drawings), text)


def legend(examples: Examples) -> list[tuple[str, str]]:
    """The classes of every :func:`chart` by name, each with its colour as CSS has it."""
    classes = _mapped(examples)
    colours = [_colour(order, len(classes)).round().astype(int) for order in range(len(classes))]
    return [
        (examples.test.names[c], f"#{red:02x}{green:02x}{blue:02x}")
        for c, (red, green, blue) in zip(classes, colours, strict=True)
    ]


def _mapped(examples: Examples) -> list[int]:
    """Some classes of queries, drawn by the seed."""
    test = examples.test
    asked = set((test.labels if test.queries is None else test.labels[test.queries]).tolist())
    drawn = torch.randperm(len(test.names), generator=torch.Generator().manual_seed(examples.seed)).tolist()
    return [c for c in drawn if c in asked][:_MAP_CLASSES]


def _colour(order: int, count: int) -> NDArray[np.float64]:
    # Neighbouring hues differ in brightness too.
    return np.array(colorsys.hsv_to_rgb(order / count, 0.9, 0.55 + 0.3 * (order % 2))) * 255


def _places(features: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Places (n, 2) from 0 to 1."""
    # The exact method is fast for so few, and its sums do not depend on the number of threads.
    spread_out = min(features.shape) > 1 and features.std(0).max() > 0
    tsne = TSNE(
        init="pca" if spread_out else "random",
        method="exact",
        perplexity=min(12, (len(features) - 1) / 3),
        random_state=seed,
    )
    places: NDArray[np.float64] = tsne.fit_transform(features).astype(np.float64)
    low, high = places.min(0), places.max(0)
    scaled: NDArray[np.float64] = (places - low) / np.maximum(high - low, 1e-12)
    return scaled


def _thumbnails(shown: Tensor, side: int) -> list[Pixels]:
    """Photographs (n, 3, H, W) in [0, 1] scaled to ``side``; drawings (n, 1, H, W) in [0, 1] dark on white."""
    pixels: Pixels = (shown * 255).round().byte().numpy()
    if pixels.shape[1] == 1:
        return list(255 - pixels[:, 0])
    photographs = [Image.fromarray(photograph.transpose(1, 2, 0)) for photograph in pixels]
    return [np.asarray(photograph.resize((side, side), Image.Resampling.LANCZOS)) for photograph in photographs]


def _data_uri(pixels: Pixels, *, photographs: bool | None = None) -> str:
    # Photographs would be megabytes of PNG.
    photographs = pixels.ndim == 3 if photographs is None else photographs
    buffer = io.BytesIO()
    if photographs:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=82, optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    kind = "jpeg" if photographs else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
