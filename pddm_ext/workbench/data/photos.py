"""Photographs in files, decoded when asked for, and folders of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .augment import PHOTOS, Photographs
from .reading import read
from .splits import Dataset, Split

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Classes = Sequence[tuple[str, Sequence[str]]]
"""Class names, and the classes' files by paths relative to a folder."""


@dataclass(frozen=True)
class Photos:
    """Photographs in files, read anew whenever they are asked for.

    Attributes:
        folder: what the paths are relative to.
        paths: one per row.
        expected: ends the error at a file that cannot be read: what was expected and where it comes from.
        view: how they are seen, which decides what of them is read.
    """

    folder: Path
    paths: tuple[str, ...]
    expected: str
    view: Photographs = PHOTOS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The middle squares of these rows: (len(rows), 3, stored, stored) uint8, red, green and blue.

        Raises:
            ValueError: a file is not a readable picture; the message names it.
        """
        photos = torch.empty(len(rows), 3, self.view.stored, self.view.stored, dtype=torch.uint8)
        for photo, row in zip(photos, rows.tolist(), strict=True):
            path = self.folder / self.paths[row]
            try:
                photo.copy_(read(path, self.view))
            except OSError as error:
                raise ValueError(f"{path}: not a readable picture ({error.strerror}); {self.expected}") from error
            except ValueError as error:
                raise ValueError(f"{error}; {self.expected}") from error
        return photos


def dataset(
    name: str, folder: Path, train: Classes, test: Classes, *, where: str, expected: str, view: Photographs = PHOTOS
) -> Dataset:
    """Photographs in the files of a folder, all of them checked to be there.

    Args:
        name: the data set's.
        folder: what the paths of ``train`` and ``test`` are relative to.
        train: classes to train on.
        test: classes to search among.
        where: begins the messages: what the user knows the files by.
        expected: ends the messages: what was expected and where it comes from.
        view: how they are seen.

    Raises:
        FileNotFoundError: a file is missing or empty; the message names the first and counts the others.
        ValueError: fewer than two classes on a side.
    """
    for side, classes in (("train on", train), ("search among", test)):
        if len(classes) < 2:
            raise ValueError(
                f"{where}: number of classes to {side} is {len(classes)}, at least 2 are needed; {expected}"
            )
    sizes = {path: _size(folder / path) for _, paths in (*train, *test) for path in paths}
    lost = [path for path, size in sizes.items() if size == 0]
    if lost:
        raise FileNotFoundError(
            f"{where}: {len(sizes) - len(lost):,} of {len(sizes):,} pictures found; the first that is missing or "
            f"empty is {lost[0]}; {expected}"
        )
    train_on, search_among = (_split(folder, side, sizes, view, expected=expected) for side in (train, test))
    return Dataset(name, view, train_on, search_among)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _split(folder: Path, classes: Classes, sizes: Mapping[str, int], view: Photographs, *, expected: str) -> Split:
    paths = tuple(path for _, members in classes for path in members)
    sha = hashlib.sha256()
    for path in paths:
        sha.update(_bytes(path) + f"\0{sizes[path]}\n".encode())
    return Split(
        Photos(folder, paths, expected, view),
        labels=torch.repeat_interleave(torch.tensor([len(members) for _, members in classes])),
        names=tuple(_legible(name) for name, _ in classes),
        groups=(f"{_legible(classes[0][0])} to {_legible(classes[-1][0])}",),
        digest=sha.hexdigest(),
    )


def _bytes(name: str) -> bytes:
    """A name as the file system has it, whatever the locale that Python read it under."""
    return name.encode("utf-8", "surrogateescape")


def _legible(name: str) -> str:
    """A name that any file can hold: under an ASCII locale Python reads an umlaut as two lone surrogates."""
    return _bytes(name).decode("utf-8", "replace")


def folder(root: str | Path, view: Photographs = PHOTOS) -> Dataset:
    """ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg, or ROOT/CLASS/*.jpg where those two folders are not both there.

    In the second case the first half of the class names, sorted, trains and the rest tests; the middle one of an odd
    number tests. Other pictures than JPEG are taken by their extensions (``EXTENSIONS``); other files, and folders
    whose names start with a dot, are passed over.

    Raises:
        FileNotFoundError: there is no such folder, or a picture is an empty file.
        ValueError: a class without pictures, a class on both sides, or fewer than two classes on a side.
    """
    root = Path(root)
    kinds = ", ".join(EXTENSIONS)
    expected = f"expected ROOT/CLASS/PICTURE, or ROOT/train/CLASS/PICTURE and ROOT/test/CLASS/PICTURE, with {kinds}"
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {expected}")
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _classes(root, "train", expected), _classes(root, "test", expected)
        both = sorted(dict(train).keys() & dict(test).keys())
        if both:
            raise ValueError(
                f"{root}: {len(both)} classes are in train and in test, such as {both[0]}; expected test classes that "
                f"are not trained on"
            )
    else:
        classes = _classes(root, ".", expected)
        train, test = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    return dataset("folder", root, train, test, where=str(root), expected=expected, view=view)


def _classes(root: Path, side: str, expected: str) -> Classes:
    classes = []
    for folder in sorted((root / side).iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        # Archivers leave files like ._one.jpg beside the pictures.
        paths = sorted(
            path.relative_to(root).as_posix()
            for path in folder.iterdir()
            if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        )
        if not paths:
            raise ValueError(f"{folder}: a class without pictures; {expected}")
        classes.append((folder.name, paths))
    return classes
