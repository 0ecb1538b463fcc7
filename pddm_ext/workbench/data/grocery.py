"""The Grocery Store Dataset (Klasson, Zhang, Kjellström, WACV 2019): known products, photographed in shops."""

from __future__ import annotations

import csv
from pathlib import Path

from . import files, photos
from .augment import PHOTOS, Photographs
from .files import Archive
from .published import warn_of_size
from .splits import Dataset

#: Published numbers of training, validation and test photographs, and of classes.
FIGURES = (2_640, 296, 2_485, 81)
CLASSES, SIDES = "classes.csv", ("train", "val", "test")
_INDEX = (CLASSES, *(f"{side}.txt" for side in SIDES))
EXPECTED = (
    "expected dataset/classes.csv and dataset/{train,val,test}.txt with the pictures they list, in a folder or zip of "
    "https://github.com/marcusklasson/GroceryStoreDataset"
)


def load(
    root: str | Path,
    view: Photographs = PHOTOS,
    *,
    gallery: str = "train",
    unseen: bool = False,
    only: photos.Only | None = None,
) -> Dataset:
    """The repository's own split, of the same classes on every side; warns where its size is not the published one.

    Args:
        root: the repository, its folder ``dataset``, its zip, or a folder that holds one of these. A zip is read
            without being unpacked.
        view: how the photographs are seen.
        gallery: what test photographs are searched among: ``"train"``, the training ones, or ``"catalogue"``, the one
            iconic picture of each class.
        unseen: whether every second class, by number, is searched for and not trained on.
        only: the half whose pictures have to be there, if the other one does not matter.

    Raises:
        FileNotFoundError: nothing is there, or something of it is missing.
        ValueError: a damaged archive or index.
    """
    root = Path(root)
    folder = _place(root)
    lost = [name for name in _INDEX if not files.size(folder, name)]
    if lost:
        raise FileNotFoundError(
            f"{folder}: {len(_INDEX) - len(lost)} of {len(_INDEX)} index files found; the first that is missing is "
            f"{lost[0]}; {EXPECTED}"
        )
    names, icons = _classes(folder)
    sides = {side: _listed(folder, f"{side}.txt", names) for side in SIDES}
    searched = sides["train"] if gallery == "train" else [(name, [icons[name]]) for name in names]
    among = "the training photographs" if gallery == "train" else "the catalogue's pictures"
    words = {"test": f"all of them trained on, searched for among {among}"}
    if unseen:
        among = "other photographs of theirs" if gallery == "train" else among
        words = {
            "train": "every second product",
            "test": f"every other product, none trained on, searched for among {among}",
        }
    trained, held = set(names[::2]) if unseen else set(names), set(names[1::2] if unseen else names)

    def of(classes: photos.Classes, chosen: set[str]) -> photos.Classes:
        return [(name, paths) for name, paths in classes if name in chosen]

    train = of(sides["train"], trained)
    dataset = photos.dataset(
        "grocery",
        folder,
        train,
        of(sides["test"], held),
        gallery=train if gallery == "train" and not unseen else of(searched, held),
        val=None if unseen else sides["val"],
        others=of(sides["val"], trained) if unseen else None,
        protocol="unseen" if unseen else "known",
        words=words,
        where=str(folder),
        expected=EXPECTED,
        view=view,
        only=only,
    )
    found = (*(sum(len(paths) for _, paths in sides[side]) for side in SIDES), len(names))
    form = "{:,} training, {:,} validation and {:,} test photographs of {:,} classes"
    warn_of_size(str(folder), "the Grocery Store Dataset", form, found, FIGURES)
    return dataset


def _place(root: Path) -> Path | Archive:
    """Where the index is: in a folder, or in a zip."""
    if root.is_file():
        return _in_zip(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such file or folder; {EXPECTED}")
    for folder in (root, root / "dataset", *sorted(root.glob("GroceryStoreDataset*/dataset"))):
        if any((folder / name).is_file() for name in _INDEX):
            return folder
    zips = sorted(root.glob("GroceryStoreDataset*.zip"))
    if len(zips) != 1:
        found = f"{len(zips)} zips, {zips[0].name} and others: name one" if zips else "neither dataset/ nor a zip of it"
        raise FileNotFoundError(f"{root}: holds {found}; {EXPECTED}")
    return _in_zip(zips[0])


def _in_zip(path: Path) -> Archive:
    try:
        names = Archive(path).names()
    except ValueError as error:
        raise ValueError(f"{error}; {EXPECTED}") from error
    for name in _INDEX:
        inside = sorted((member for member in names if member.split("/")[-1] == name), key=lambda m: m.count("/"))
        if inside:
            return Archive(path, inside[0].removesuffix(name))
    raise FileNotFoundError(f"{path}: holds no {CLASSES}; {EXPECTED}")


def _classes(folder: Path | Archive) -> tuple[list[str], dict[str, str]]:
    """The names of classes by their numbers, and the iconic picture of each."""
    rows = list(csv.reader(_lines(folder, CLASSES)))
    try:
        header, *rows = [row for row in rows if row]
        name, number, icon = (
            next(place for place, title in enumerate(header) if title.startswith(wanted))
            for wanted in ("Class Name", "Class ID", "Iconic Image Path")
        )
        if [int(row[number]) for row in rows] != list(range(len(rows))):
            raise ValueError("its class IDs are not 0, 1, 2, ...")
        names = [row[name] for row in rows]
        icons = {row[name]: row[icon].lstrip("/") for row in rows}
        if len(icons) < len(names) or "" in icons:
            raise ValueError("a class has no name of its own")
        astray = files.outside(list(icons.values()))
        if astray is not None:
            raise ValueError(f"{astray} leads out of its folder")
    except (ValueError, IndexError, StopIteration, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "a column is missing"
        raise ValueError(f"{folder}: the index {CLASSES} is damaged ({reason}); {EXPECTED}") from error
    return names, icons


def _listed(folder: Path | Archive, index: str, names: list[str]) -> photos.Classes:
    """Classes with their pictures, from lines of ``path, class, coarse class``."""
    found: dict[int, list[str]] = {}
    try:
        for line in filter(str.strip, _lines(folder, index)):
            path, label, _ = (part.strip() for part in line.split(","))
            if not 0 <= int(label) < len(names):
                raise ValueError(f"class {label} is not in {CLASSES}")
            found.setdefault(int(label), []).append(path)
        files.listed([path for paths in found.values() for path in paths])
    except ValueError as error:
        raise ValueError(f"{folder}: the index {index} is damaged ({error}); {EXPECTED}") from error
    return [(names[label], paths) for label, paths in sorted(found.items())]


def _lines(folder: Path | Archive, name: str) -> list[str]:
    try:
        with files.opened(folder, name) as file:
            return file.read().decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise ValueError(f"{folder}: the index {name} is damaged ({error}); {EXPECTED}") from error
