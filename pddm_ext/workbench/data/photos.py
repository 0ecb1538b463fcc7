"""Photographs in files, decoded when asked for, and folders of them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from . import files
from .augment import PHOTOS, Photographs
from .files import Archive
from .reading import OPTIONAL, decoded, extensions
from .splits import Dataset, Split, TestClasses, held_out, legible

# Class names, and the classes' files by paths relative to a folder.
Classes = Sequence[tuple[str, Sequence[str]]]

# The one half of a data set that has to be whole: what is trained on, or what is measured.
Only = Literal["train", "test"]


@dataclass(frozen=True)
class Photos:
    """Photographs in files, read anew whenever they are asked for.

    Attributes:
        folder: what the paths are relative to.
        paths: one per row.
        expected: ends the error at a file that cannot be read: what was expected and where it comes from.
        view: how they are seen, which decides what of them is read.
    """

    folder: Path | Archive
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
            try:
                photo.copy_(self.read(row, self.view))
            except ValueError as error:
                raise ValueError(f"{error}; {self.expected}") from error
        return photos

    def state(self) -> str:
        """Identifies the files as they are now, by their sizes and times; the archive's own, if they are in one."""
        sha = hashlib.sha256()
        for path in [self.folder.path] if isinstance(self.folder, Archive) else map(self.folder.joinpath, self.paths):
            try:
                status = os.stat(path)
                sha.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # which reading will name
                sha.update(b"lost\n")
        return sha.hexdigest()

    def read(self, row: int, view: Photographs) -> Tensor:
        """The middle square of a row as another view stores it: (3, stored, stored) uint8.

        Raises:
            ValueError: the file is not a readable picture; the message names it and the reason.
        """
        where = os.path.join(str(self.folder), self.paths[row])
        try:
            with files.opened(self.folder, self.paths[row]) as file:
                return decoded(file, where, view)
        except OSError as error:
            raise ValueError(f"{where}: not a readable picture ({error.strerror or error})") from error


def dataset(
    name: str,
    folder: Path | Archive,
    train: Classes,
    test: Classes,
    *,
    gallery: Classes | None = None,
    val: Classes | None = None,
    others: Classes | None = None,
    protocol: TestClasses = "unseen",
    words: Mapping[str, str] | None = None,
    where: str,
    expected: str,
    view: Photographs = PHOTOS,
    only: Only | None = None,
    listed: bool = True,
    parted: bool = False,
) -> Dataset:
    """Photographs in the files of a folder.

    Args:
        name: the data set's.
        folder: what the paths are relative to.
        train: classes to train on.
        test: classes to search for.
        gallery: classes to search among: ``train`` itself, others, or None for those of ``test``.
        val: further classes to search for.
        others: other pictures of the classes to train on, as in :class:`.splits.Dataset`.
        protocol: as in :class:`.splits.Dataset`.
        words: what to say of a side, by its name here.
        where: begins the messages: what the user knows the files by.
        expected: ends the messages: what was expected and where it comes from.
        view: how they are seen.
        only: the half that has to be whole, if the other one does not matter.
        listed: whether the paths come from a list, and their files have to be looked for.
        parted: as in :class:`.splits.Dataset`.

    Raises:
        FileNotFoundError: a file is missing or empty; the message names the first and counts the others.
        ValueError: fewer than two classes to train on or to search for, or nothing that a search could find.
    """
    sides = {"train": train, "test": test, "gallery": gallery, "val": val, "others": others}
    needed = {"train": ("train", "val", "others"), "test": ("test", "gallery"), None: tuple(sides)}[only]
    for side, verb in (("train", "train on"), ("test", "search among")):
        count = len(sides[side] or ())
        if side in needed and count < 2:
            raise ValueError(f"{where}: number of classes to {verb} is {count}, at least 2 are needed; {expected}")
    sizes = {
        path: files.size(folder, path) for classes in sides.values() for _, paths in classes or () for path in paths
    }
    wanted = {path for side in needed for path in _paths(sides[side] or ())}
    lost = [path for path, size in sizes.items() if size == 0 and path in wanted]
    if listed and lost:
        raise FileNotFoundError(
            f"{where}: {len(wanted) - len(lost):,} of {len(wanted):,} pictures found; the first that is missing or "
            f"empty is {lost[0]}; {expected}"
        )
    # Of the half that does not matter nothing is read.
    stamps = {path: files.stamp(folder, path) if path in wanted else str(size) for path, size in sizes.items()}
    made = {
        side: _split(Photos(folder, _paths(classes), expected, view), classes, stamps, (words or {}).get(side, ""))
        for side, classes in sides.items()
        if classes is not None
    }
    if gallery is train:
        made["gallery"] = made["train"]
    if gallery is not None and not set(made["gallery"].names) & set(made["test"].names):
        raise ValueError(
            f"{where}: none of the {len(test)} classes to search for, such as {made['test'].names[0]}, is among the "
            f"{len(gallery)} to search among; {expected}"
        )
    return Dataset(
        name,
        view,
        made["train"],
        made["test"],
        gallery=made.get("gallery"),
        val=made.get("val"),
        others=made.get("others"),
        protocol=protocol,
        parted=parted,
    )


#: What :func:`parted` leaves on either side, in words.
KNOWN = {"train": "all but the last fifth of each class's pictures by name", "test": "the last fifth of them"}


def parted(classes: Classes) -> tuple[Classes, Classes]:
    """Each class's pictures without the last fifth by name, and that fifth, which is one at least of three or more.

    Neighbours by name may be nearly the same picture; they stay on one side.
    """
    held = [(name, paths, held_out(len(paths))) for name, paths in classes]
    return [(name, paths[: len(paths) - h]) for name, paths, h in held], [(n, paths[-h:]) for n, paths, h in held if h]


def known(data: Dataset, where: str, expected: str) -> Dataset:
    """The data of two sides, each of photographs in files and classes of its own, with all classes on both
    (:func:`parted`).

    Args:
        data: as :func:`dataset` makes it.
        where: as there.
        expected: as there.

    Raises:
        ValueError: fewer than two classes of three pictures or more.
    """
    return _parted(data, [*_classes(data.train), *_classes(data.test)], where, expected)


def _classes(split: Split) -> list[tuple[str, list[str]]]:
    assert isinstance(split.pictures, Photos)
    by_class: list[list[str]] = [[] for _ in split.names]
    for path, label in zip(split.pictures.paths, split.labels.tolist(), strict=True):
        by_class[label].append(path)
    return list(zip(split.names, by_class, strict=True))


def _parted(data: Dataset, classes: Classes, where: str, expected: str) -> Dataset:
    train, test = parted(classes)
    assert isinstance(data.train.pictures, Photos)
    assert isinstance(data.view, Photographs)
    return dataset(
        data.name,
        data.train.pictures.folder,
        train,
        test,
        gallery=train,
        protocol="known",
        words=KNOWN,
        where=where,
        expected=expected,
        view=data.view,
        listed=False,
        parted=True,
    )


def _paths(classes: Classes) -> tuple[str, ...]:
    return tuple(path for _, members in classes for path in members)


def _split(photos: Photos, classes: Classes, stamps: Mapping[str, str], words: str) -> Split:
    names = tuple(legible(name) for name, _ in classes)
    groups = [f"{names[0]} to {names[-1]}"] if names else []
    return Split(
        photos,
        labels=torch.repeat_interleave(torch.tensor([len(members) for _, members in classes], dtype=torch.int64)),
        names=names,
        groups=(", ".join([*groups, *filter(None, [words])]),),
        digest=_digest(photos.paths, stamps),
    )


def _digest(paths: Iterable[str], stamps: Mapping[str, str]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        # The name as the file system has it, whatever the locale that Python read it under.
        sha.update(path.encode("utf-8", "surrogateescape") + f"\0{stamps[path]}\n".encode())
    return sha.hexdigest()


def without(dataset: Dataset, lost: Iterable[str]) -> Dataset:
    """The data as they would be without some of the files, digest included: those of ``Photos``, by their paths.

    Raises:
        ValueError: a class would have none left, or too few classes enough to be parted.
    """
    gone = set(lost)
    if dataset.parted:
        return _parted_without(dataset, gone)
    made: dict[int, Split] = {}
    for split in (dataset.train, dataset.test, dataset.gallery, dataset.val, dataset.others):
        if split is not None and isinstance(split.pictures, Photos) and id(split) not in made:
            made[id(split)] = _kept(split, split.pictures, gone)
    return replace(
        dataset,
        train=made.get(id(dataset.train), dataset.train),
        test=made.get(id(dataset.test), dataset.test),
        gallery=made.get(id(dataset.gallery), dataset.gallery),
        val=made.get(id(dataset.val), dataset.val),
        others=made.get(id(dataset.others), dataset.others),
    )


def _kept(split: Split, photos: Photos, gone: set[str]) -> Split:
    rows = torch.tensor([row for row, path in enumerate(photos.paths) if path not in gone], dtype=torch.int64)
    if len(rows) == len(photos):
        return split
    before, left = (torch.bincount(labels, minlength=len(split.names)) for labels in (split.labels, split.labels[rows]))
    _refuse_lost([split.names[c] for c in ((before > 0) & (left == 0)).nonzero().flatten().tolist()], photos)
    paths = tuple(photos.paths[row] for row in rows.tolist())
    stamps = {path: files.stamp(photos.folder, path) for path in paths}
    return replace(
        split, pictures=replace(photos, paths=paths), labels=split.labels[rows], digest=_digest(paths, stamps)
    )


def _parted_without(data: Dataset, gone: set[str]) -> Dataset:
    photos, whole = data.train.pictures, dict(_classes(data.train))
    assert isinstance(photos, Photos)
    for name, paths in _classes(data.test):
        whole[name] += paths
    if gone.isdisjoint(_paths([*whole.items()])):
        return data
    left = [(name, [path for path in paths if path not in gone]) for name, paths in whole.items()]
    _refuse_lost([name for name, paths in left if not paths], photos)
    enough = sum(held_out(len(paths)) > 0 for _, paths in left)
    if enough < 2:
        raise ValueError(
            f"{photos.folder}: number of classes with three pictures or more that can be read is {enough}, at least 2 "
            f"are needed for --split known; mend their pictures, or add some"
        )
    return replace(_parted(data, left, str(photos.folder), photos.expected), notes=data.notes)


def _refuse_lost(classes: Sequence[str], photos: Photos) -> None:
    if classes:
        others = f", nor of {len(classes) - 1} others" if len(classes) > 1 else ""
        raise ValueError(
            f"{photos.folder}: no picture of class {classes[0]} can be read{others}; a class without pictures is not "
            f"accepted"
        )


# Folders

_SIDES = ("train", "test", "query", "gallery", "val")
#: What systems and archivers leave beside pictures; like whatever begins with a dot, it is nobody's picture.
_LEFTOVERS = ("__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db")


@dataclass
class _Listing:
    """The class folders of one or more folders, and what else is there.

    Attributes:
        root: what paths are relative to.
        expected: ends the messages.
        passed: paths that are no pictures of a class, by what they are.
        empty: what to say of classes without pictures, by the identity of their list.
    """

    root: Path
    expected: str
    passed: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[int, str] = field(default_factory=dict)

    def classes(self, side: str) -> Classes:
        """The class folders of ``root/side`` with their pictures, by name.

        Raises:
            ValueError: names that cannot be told apart.
        """
        found = []
        for entry in _visible(self.root / side):
            if not entry.is_dir():
                self._pass(entry, "outside class folders")
                continue
            before = {kind: len(paths) for kind, paths in self.passed.items()}
            paths = sorted(self._relative(path) for path in _visible(entry) if self._is_picture(path))
            found.append((entry.name, paths))
            if not paths:
                new = {kind: others[before.get(kind, 0) :] for kind, others in self.passed.items()}
                told = "; ".join(_told(self.root, kind, others) for kind, others in new.items() if others)
                self.empty[id(paths)] = f"{entry}: a class without pictures{f' ({told})' if told else ''}"
        written = Counter(legible(name) for name, _ in found)
        twice = [name for name, count in written.items() if count > 1]
        if twice:  # bytes that are no letters
            raise ValueError(f"{self.root / side}: several classes are written {twice[0]}; {self.expected}")
        return found

    def refuse_empty(self, classes: Classes) -> None:
        """Raise ValueError at the first of these classes that has no pictures."""
        for _, paths in classes:
            if not paths:
                raise ValueError(f"{self.empty[id(paths)]}; {self.expected}")

    def notes(self) -> tuple[str, ...]:
        """A line for each kind of what was passed over."""
        return tuple(f"passed over: {_told(self.root, kind, paths)}" for kind, paths in self.passed.items())

    def beside(self, path: Path) -> None:
        """Count something that stands beside the sides."""
        self._pass(path, "beside the sides")

    def _is_picture(self, path: Path) -> bool:
        if path.is_dir():
            self._pass(path, "in class folders")
        elif not path.is_file():  # a broken link; or a pipe, at which reading would wait for ever
            self.passed.setdefault("no file", []).append(self._relative(path))
        elif path.suffix.lower() in extensions():
            return True
        else:
            self.passed.setdefault(path.suffix.lower(), []).append(self._relative(path))
        return False

    def _pass(self, path: Path, place: str) -> None:
        kind = "folder" if path.is_dir() else "picture" if path.suffix.lower() in extensions() else "file"
        self.passed.setdefault(f"{kind} {place}", []).append(self._relative(path))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _visible(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in _LEFTOVERS
    )


def _told(root: Path, kind: str, paths: Sequence[str]) -> str:
    """What was passed over, of one kind, in words."""
    noun, _, place = kind.partition(" ")
    end = f", such as {legible(paths[0])}"
    if noun == "folder":
        held = sum(_pictures_below(root / path) for path in paths)
        end += f", with {_counted(held, 'picture')}"
    if noun in ("folder", "picture", "file") and place:
        return f"{_counted(len(paths), noun)} {place}{end}"
    if kind == "no file":
        return no_files(paths)
    if not kind:
        return f"{_counted(len(paths), 'file')} without an extension{end}"
    reader = f" ({OPTIONAL[kind][1]} would read them)" if kind in OPTIONAL else ""
    return f"{_counted(len(paths), 'file')} of the kind {legible(kind)}{end}{reader}"


def no_files(paths: Sequence[str]) -> str:
    """Links to nowhere, and what is neither a file nor a folder, in words."""
    several = "s" * (len(paths) > 1)
    return f"{_counted(len(paths), 'broken link')} or special file{several}, such as {legible(paths[0])}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _pictures_below(folder: Path) -> int:
    return sum(
        PurePosixPath(name).suffix.lower() in extensions() and not name.startswith(".")
        for _, _, names in os.walk(folder)
        for name in names
    )


def folder(
    root: str | Path, view: Photographs = PHOTOS, *, split: str = "half", seed: int = 0, only: Only | None = None
) -> Dataset:
    """Folders of classes, by one of four protocols. What is passed over is counted in ``notes``.

    ==================================  =================================================================
    in ROOT                             what is searched for, among what
    ==================================  =================================================================
    ``train/ query/ gallery/ [val/]``   query among gallery; any class may be on any side
    ``train/ test/ [val/]``             test among itself, where no class of it is in train;
                                        test among train, where all of them are
    class folders                       as ``split`` says, half of them among themselves, or all of them
    ==================================  =================================================================

    Every one holds CLASS/PICTURE. Pictures are taken by their extensions (:func:`.reading.extensions`); what begins
    with a dot, and what systems and archivers leave, is passed over without a word.

    Args:
        root: the folder.
        view: how the photographs are seen.
        split: where ROOT holds class folders: ``"half"`` searches among the second half of them by name (the middle one
            of an odd number included), ``"random"`` among a half drawn by the seed, ``"none"`` among the very pictures
            that are trained on; ``"known"`` searches for the last fifth of each class's pictures by name among the
            others.
        seed: draws that half.
        only: the half of the data that has to be whole, if the other one does not matter. To measure, ROOT needs no
            ``train/``; what is then missing is an empty side.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a file, a side is missing, a class without pictures, test classes of which some are trained on
            and others are not, fewer than two classes on a side, or a split that the folder has already.
    """
    root = Path(root)
    expected = (
        f"expected ROOT/CLASS/PICTURE, or the same in ROOT/train and ROOT/test, or in ROOT/train, ROOT/query and "
        f"ROOT/gallery, with {', '.join(extensions())}"
    )
    if root.is_file():
        raise ValueError(f"{root}: a file, where --data folder takes a folder: unpack an archive first; {expected}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {expected}")
    listing, sides = _Listing(root, expected), _sides_of(root)
    if sides:
        if split != "half":
            raise ValueError(
                f"--split {split} is for a folder of class folders; {root} has its sides in {_listed(sorted(sides))}"
            )
        made, notes = _of_sides(listing, sides, only)
    else:
        made, notes = _of_classes(listing, split, seed, only), ()
    found = dataset("folder", root, **made, where=str(root), expected=expected, view=view, only=only, listed=False)
    return replace(found, notes=(*notes, *listing.notes()))


def has_sides(root: str | Path) -> bool:
    """Whether a folder says itself what is for training and what for the test."""
    return Path(root).is_dir() and bool(_sides_of(Path(root)))


def _sides_of(root: Path) -> set[str]:
    """The sides that are there. A class folder of such a name has pictures in it and other class folders beside it."""
    folders = {path.name: path for path in _visible(root) if path.is_dir()}
    return {
        side
        for side in folders.keys() & set(_SIDES)
        if folders.keys() <= set(_SIDES) or any(path.is_dir() for path in _visible(folders[side]))
    }


def _listed(names: Sequence[str]) -> str:
    *first, last = (f"{name}/" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _of_classes(listing: _Listing, split: str, seed: int, only: Only | None) -> dict[str, Any]:
    classes = listing.classes(".")
    half = len(classes) // 2
    order = list(range(len(classes)))
    if split == "random":
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    train, test = (tuple(classes[c] for c in sorted(chosen)) for chosen in (order[:half], order[half:]))
    if split == "none":
        train = test = tuple(classes)
    if split == "known":
        listing.refuse_empty(classes)
        train, test = map(tuple, parted(classes))
    if only != "test":
        listing.refuse_empty(train)
    if only != "train":
        listing.refuse_empty(test)
    if split == "none":
        what = "all that are there" if only == "test" else "the very pictures to train on: none are held out for a test"
        words = {"train": "all that are there", "test": what}
        return {"train": train, "test": test, "protocol": "seen", "words": words}
    if split == "known":
        return {"train": train, "test": test, "gallery": train, "protocol": "known", "words": KNOWN, "parted": True}
    words = {"train": "the first half of the classes by name", "test": "the second half of the classes by name"}
    if split == "random":
        words = dict.fromkeys(words, f"half of the classes, drawn by seed {seed}")
    return {"train": train, "test": test, "words": words}


def _of_sides(listing: _Listing, sides: set[str], only: Only | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    root = listing.root
    ways = "expected train/ with test/, or train/ with query/ and gallery/, of class folders each"
    if "test" in sides and sides & {"query", "gallery"}:
        raise ValueError(f"{root} has {_listed(sorted(sides))}; {ways}")
    needed = {"query", "gallery"} if sides & {"query", "gallery"} else {"test"}
    if only != "test":
        needed.add("train")
    if needed - sides:
        raise ValueError(f"{root} has {_listed(sorted(sides))} but no {_listed(sorted(needed - sides))}; {ways}")
    for path in _visible(root):
        if path.name not in sides:
            listing.beside(path)
    # What is not needed is looked at, for the names of its classes, but nobody has to mend it.
    aside = _Listing(root, listing.expected)
    found = {}
    for side in sorted(sides):
        needed_by = "train" if side in ("train", "val") else "test"
        found[side] = (listing if only in (None, needed_by) else aside).classes(side)
        if only in (None, needed_by):
            listing.refuse_empty(found[side])
    train = found.get("train", [])
    searched = found["query" if "query" in sides else "test"]
    trained_on = dict(train).keys()
    known = [name for name, _ in searched if name in trained_on]
    new = [name for name, _ in searched if name not in trained_on]
    made: dict[str, Any] = {"train": train, "test": searched, "val": found.get("val")}
    notes = []
    if "query" in sides:
        there = dict(found["gallery"]).keys()
        lost = [(name, paths) for name, paths in searched if name not in there]
        if lost and len(lost) < len(searched):
            notes.append(
                f"{len(lost)} of {len(searched)} classes in query/ are not in gallery/, such as {legible(lost[0][0])}: "
                f"for their {_counted(sum(len(paths) for _, paths in lost), 'picture')} there is nothing to be found"
            )
        made |= {"gallery": found["gallery"], "protocol": "known" if known else "unseen"}
        if known:
            how_many = "all" if not new else f"{len(known)} of {len(searched)}"
            made["words"] = {"test": f"{how_many} of them trained on"}
    elif known and new:
        raise ValueError(
            f"{root}: {len(known)} of the {len(searched)} classes in test/ are in train/, too, such as "
            f"{legible(known[0])}, and {len(new)} are not, such as {legible(new[0])}; expected all of them in train/ "
            f"(then test/ is searched for among train/) or none (then among itself); for both at once, put what is "
            f"searched for into query/ and what it is searched among into gallery/, in the place of test/"
        )
    elif known:
        if only == "test":
            aside.refuse_empty(train)  # which is measured, too
        words = {"test": "all of them trained on, searched for among the training pictures"}
        made |= {"gallery": train, "protocol": "known", "words": words}
    return made, tuple(notes)
