"""A look at every photograph before a run: which cannot be read, and which look the same on both sides of a search."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import imagehash
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..console import Progress
from ..settings import Settings
from .augment import PHOTOS, Photographs
from .load import load
from .photos import Only, Photos, without
from .splits import Dataset, Split, legible

#: How a photograph is looked at: in small, which decodes a file to its end all the same.
_SMALL = Photographs(size=32, stored=32)

#: Two photographs look the same if their perceptual hashes differ in no more of the 64 bits, and their colours,
#: averaged over 4 × 4 parts, by no more of 255 in root mean square. The bits alone are noise where a picture has no
#: structure, and know no colour. Copies that were scaled, or saved again as JPEG, are within both; photographs of one
#: thing, taken one after the other, mostly are not.
_BITS, _COLOUR = 4, 8.0

#: Rows that are compared at a time with all others.
_CHUNK = 256


@dataclass(frozen=True)
class Scan:
    """What was seen of photographs in files.

    Attributes:
        unreadable: what is the matter with each file that cannot be read, by its path.
        place: the row of every readable file below.
        bits: (n, 64) float32, perceptual hashes of -1 and 1.
        colours: (n, 48) float32, average red, green and blue, up to 255, of 4 × 4 parts.
    """

    unreadable: dict[str, str]
    place: dict[str, int]
    bits: Tensor
    colours: Tensor


def scan(dataset: Dataset, only: Only | None = None, progress: bool | None = None) -> Scan:
    """Look at every photograph of a data set that is in a file, in threads.

    Args:
        dataset: of which drawings, and what is in memory, are passed over.
        only: the half to look at, as in :func:`.load.load`.
        progress: as in :class:`.console.Progress`.
    """
    photos: dict[str, tuple[Photos, int]] = {}
    for split in _sides(dataset, only):
        if isinstance(split.pictures, Photos):
            photos |= {path: (split.pictures, row) for row, path in enumerate(split.pictures.paths)}
    unreadable: dict[str, str] = {}
    place: dict[str, int] = {}
    bits, colours = [torch.empty(0, 64)], [torch.empty(0, 48)]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        with Progress("looking at pictures", len(photos), 0, "picture", progress if photos else False) as bar:
            for path, seen in zip(photos, pool.map(lambda each: _seen(*each), photos.values()), strict=True):
                if isinstance(seen, str):
                    unreadable[path] = seen
                else:
                    place[path] = len(place)
                    bits.append(seen[0])
                    colours.append(seen[1])
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return Scan(unreadable, place, torch.cat(bits), torch.cat(colours))


def _sides(dataset: Dataset, only: Only | None) -> list[Split]:
    trained, measured = (dataset.train, dataset.val, dataset.others), (dataset.test, dataset.gallery)
    chosen = {"train": trained, "test": measured, None: trained + measured}[only]
    return [split for split in chosen if split is not None]


def _seen(photos: Photos, row: int) -> tuple[Tensor, Tensor] | str:
    """The hash (1, 64) and colours (1, 48) of a photograph, or why there are none."""
    try:
        picture = photos.read(row, _SMALL)
    except ValueError as error:
        return str(error)
    hashed = imagehash.phash(Image.fromarray(picture.permute(1, 2, 0).numpy())).hash
    bits = torch.from_numpy(hashed).float().reshape(1, 64) * 2 - 1
    return bits, F.adaptive_avg_pool2d(picture.float(), 4).reshape(1, 48)


def alike(found: Scan, queries: Split, among: Split) -> list[tuple[str, str]]:
    """The queries that look the same as some other picture, each with the first such one, by their paths.

    Args:
        found: of both splits.
        queries: photographs in files.
        among: photographs in files.
    """
    ours, others = (_rows(found, split) for split in (queries, among))
    paths = list(found.place)
    pairs = []
    for rows in torch.split(ours, _CHUNK):
        near = found.bits[rows] @ found.bits[others].T >= 64 - 2 * _BITS
        near &= rows[:, None] != others
        for row in near.any(1).nonzero().flatten().tolist():
            candidates = others[near[row]]
            apart = (found.colours[candidates] - found.colours[rows[row]]).square().mean(1).sqrt()
            same = candidates[apart <= _COLOUR].tolist()
            if same:
                pairs.append((paths[int(rows[row])], paths[same[0]]))
    return pairs


def _rows(found: Scan, split: Split) -> Tensor:
    paths = split.pictures.paths if isinstance(split.pictures, Photos) else ()
    return torch.tensor([found.place[path] for path in paths if path in found.place], dtype=torch.int64)


def duplicates(dataset: Dataset, found: Scan, only: Only | None = None) -> list[str]:
    """A warning for each pair of sides that pictures are on twice, near enough, with their number and an example."""
    test, gallery, val, others = dataset.test, dataset.gallery, dataset.val, dataset.others
    apart = only is None and dataset.protocol != "seen"
    among = [("test", test, "training", dataset.train)] if apart else []
    if gallery is None:
        among.append(("test", test, "other test", test))
    elif gallery is not dataset.train or only is not None:
        among.append(("test", test, "gallery", gallery))
        if val is not None and apart:
            among.append(("validation", val, "gallery", gallery))
    if val is not None and apart:
        among += [("validation", val, "training", dataset.train), ("validation", val, "test", test)]
    if others is not None and apart:
        among.append(("validation", others, "training", dataset.train))
    lines = []
    for queries, asked, name, split in among:
        pairs = alike(found, asked, split)
        if pairs:
            one, other = map(legible, pairs[0])
            lines.append(
                f"{len(pairs):,} of {len(asked.labels):,} {queries} pictures look the same as one of the "
                f"{name} pictures, such as {one} and {other}: any embedding finds copies, which Recall@1 then counts "
                "for nothing"
            )
    return lines


def examined(
    dataset: Dataset, *, skip: bool = False, only: Only | None = None, progress: bool | None = None
) -> tuple[Dataset, frozenset[str]]:
    """The data once every photograph was looked at, with the near-duplicates among their notes.

    Args:
        dataset: what to look at.
        skip: leave out what cannot be read; else it is an error.
        only: the half to look at.
        progress: as in :class:`.console.Progress`; without any (False) nothing is printed.

    Returns:
        The data, and the paths that were left out of them.

    Raises:
        ValueError: a picture cannot be read, or none of some class; each has a line on standard error before.
    """
    found = scan(dataset, only, progress)
    lost = frozenset(found.unreadable)
    if lost:
        _print(("left out: " if skip else "") + reason for reason in found.unreadable.values())
        told = f"{len(lost):,} of {len(lost) + len(found.place):,} pictures cannot be read"
        if not skip:
            raise ValueError(f"{told}, each named above; mend or remove them, or --skip-unreadable leaves them out")
        dataset = without(dataset, lost)
        dataset = replace(dataset, notes=(*dataset.notes, f"{told} and are left out (--skip-unreadable)"))
    return replace(dataset, notes=(*dataset.notes, *duplicates(dataset, found, only))), lost


def ready(
    settings: Settings,
    view: Photographs = PHOTOS,
    *,
    only: Only | None = None,
    progress: bool | None = None,
    leads: bool = True,
) -> Dataset:
    """The settings' data, for a run to begin: loaded, every photograph looked at, and told what is to be known of them.

    Args:
        settings: name the data.
        view: how photographs are seen.
        only: the half of the data that has to be whole, as in :func:`.load.load`; the other is not looked at.
        progress: as in :class:`.console.Progress`.
        leads: whether this is the process that speaks, of several.

    Raises:
        FileNotFoundError, ValueError: as :func:`.load.load` and :func:`examined`.
    """
    dataset = load(settings, view, only)
    if not leads:
        # Others look for themselves only where they have to leave out the same pictures.
        found = scan(dataset, only, False).unreadable if settings.skip_unreadable else ()
        return without(dataset, found)
    dataset, _ = examined(dataset, skip=settings.skip_unreadable, only=only, progress=progress)
    tell(dataset)
    return dataset


def tell(dataset: Dataset) -> None:
    """Print what is to be known of the data, a line each, to standard error."""
    _print(f"pddm-ext: warning: {note}" for note in dataset.notes)


def introduction(dataset: Dataset, held_out: bool = False, only: Only | None = None) -> list[str]:
    """What is trained on, and what is searched for among what: a line for each side.

    ``held_out`` says that the validation pictures are of those to train on. With ``only="test"`` nothing is trained on.
    """
    sides = [] if only == "test" else [("train on", dataset.train)]
    if dataset.val is not None and only != "test":
        sides.append(("of those to train on, hold out to choose by" if held_out else "choose by", dataset.val))
    if dataset.gallery is None:
        sides.append(("search among", dataset.test))
    else:
        sides.append(("search for", dataset.test))
        if dataset.gallery is not dataset.train or only == "test":
            sides.append(("search among", dataset.gallery))
    return [
        f"{verb} {len(split.names)} classes, {len(split.labels)} pictures: {', '.join(split.groups)}"
        for verb, split in sides
    ]


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
