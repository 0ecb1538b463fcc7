"""Labelled pictures, split by class, and how batches and a test set are drawn from them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..interrupts import uninterrupted
from .augment import View

#: Side of a stored drawing and of its ink, in pixels.
CANVAS, INK = 64, 44


class Pictures(Protocol):
    """Stored pictures: a tensor (n, c, H, W) uint8, or what reads such rows when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Split:
    """Pictures of one side of the open-set protocol.

    Attributes:
        pictures: rows of (c, H, W) uint8.
        labels: (n,) int64 into ``names``.
        names: one per class.
        groups: what the classes come from (scripts, alphabets), for people.
        digest: identifies the pictures, so that a resumed run is known to see the same ones.
        group_of: each class's place in ``groups``, where they are kinds of classes.
    """

    pictures: Pictures
    labels: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    digest: str
    group_of: tuple[int, ...] = ()

    def classes(self, chosen: Tensor) -> Split:
        """The split's classes ``chosen`` (k,), labelled anew in that order."""
        rows = torch.cat([(self.labels == c).nonzero().flatten() for c in chosen])
        new = torch.full((len(self.names),), -1)
        new[chosen] = torch.arange(len(chosen))
        names = tuple(self.names[c] for c in chosen.tolist())
        group_of = [self.group_of[c] for c in chosen.tolist()] if self.group_of else []
        groups = sorted(set(group_of))
        few = "some of " if len(names) < len(self.names) else ""
        return Split(
            Rows(self.pictures, rows),
            new[self.labels[rows]],
            names,
            tuple(self.groups[g] for g in groups) or tuple(few + group for group in self.groups),
            f"{self.digest}:{hashlib.sha256(chosen.numpy().tobytes()).hexdigest()}",
            tuple(groups.index(g) for g in group_of),
        )

    def some(self, rows: Tensor) -> Split:
        """These rows (k,) of the split; its classes keep their names and labels."""
        digest = f"{self.digest}:{hashlib.sha256(rows.numpy().tobytes()).hexdigest()}"
        return replace(self, pictures=Rows(self.pictures, rows), labels=self.labels[rows], digest=digest)

    def thinned(self, share: float, seed: int) -> Split:
        """So large a share of each class's pictures, and two of them at least, drawn by the seed."""
        if share == 1:
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for c in range(len(self.names)):
            rows = (self.labels == c).nonzero().flatten()
            order = torch.randperm(len(rows), generator=generator)
            chosen.append(rows[order[: max(2, round(share * len(rows)))]])
        return self.some(torch.cat(chosen).sort().values)

    def mislabelled(self, share: float, seed: int) -> Split:
        """So large a share of the pictures under another class each, drawn by the seed."""
        if share == 0 or len(self.names) < 2:
            return self
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(len(self.labels), generator=generator)[: round(share * len(self.labels))]
        by = torch.randint(1, len(self.names), (len(wrong),), generator=generator)
        labels = self.labels.clone()
        labels[wrong] = (labels[wrong] + by) % len(self.names)
        return replace(self, labels=labels)

    def parted(self) -> tuple[Split, Split]:
        """The pictures without the last fifth of each class (:func:`held_out`), and that fifth; neighbours stay
        together."""
        kept, out = [], []
        for c in range(len(self.names)):
            rows = (self.labels == c).nonzero().flatten()
            first = len(rows) - held_out(len(rows))
            kept.append(rows[:first])
            out.append(rows[first:])
        return self.some(torch.cat(kept).sort().values), self.some(torch.cat(out).sort().values)

    def named(self, names: Collection[str]) -> Split:
        """The classes of these names, in the split's order, labelled anew."""
        chosen = [c for c, name in enumerate(self.names) if name in names]
        if not chosen:
            raise ValueError(f"none of {', '.join(sorted(names)[:3])} is among {', '.join(self.groups)}")
        return self.classes(torch.tensor(chosen))


def held_out(count: int) -> int:
    """How many of a class's pictures are a fifth of them, one at least, where two are left to train on."""
    return max(1, count // 5) if count > 2 else 0


@dataclass(frozen=True)
class Rows:
    """Some rows of stored pictures."""

    pictures: Pictures
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.pictures[self.rows[rows]]


@dataclass(frozen=True)
class Joined:
    """Stored pictures, and others of the same shape after them."""

    first: Pictures
    second: Pictures

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: Tensor) -> Tensor:
        second = rows >= len(self.first)
        parts = [self.first[rows[~second]], self.second[rows[second] - len(self.first)]]
        pictures = torch.empty(len(rows), *parts[0].shape[1:], dtype=parts[0].dtype)
        pictures[~second], pictures[second] = parts
        return pictures


def file_of(pictures: Pictures, row: int) -> str | None:
    """The file that a row is read from, relative to its folder and for people; None where it comes from none."""
    if isinstance(pictures, Rows):
        return file_of(pictures.pictures, int(pictures.rows[row]))
    if isinstance(pictures, Joined):
        first = len(pictures.first)
        return file_of(pictures.first, row) if row < first else file_of(pictures.second, row - first)
    paths = getattr(pictures, "paths", None)
    return None if paths is None else legible(paths[row])


def legible(name: str) -> str:
    """A name that any file can hold: under an ASCII locale Python reads an umlaut as two lone surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable(name: str) -> str:
    """A name for a terminal, in one line: what would move its cursor is written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in legible(name))


TestClasses = Literal["unseen", "known", "seen"]


@dataclass(frozen=True)
class Dataset:
    """What to train on, and who is then searched for among whom.

    Attributes:
        name: the data set's.
        view: how a net sees its pictures.
        train: pictures to train on.
        test: queries; without a gallery every one of them is searched for among all the others.
        distort_test: whether a test sample is a distorted picture (few distinct ones, as with fonts) or the picture
            itself.
        gallery: what the queries are searched among, by the names of its classes.
        val: further queries, to choose settings, a step or a threshold by.
        others: other pictures of the classes trained on, where classes searched for are unseen: queries among some of
            those, to choose settings by.
        among: what ``val`` is searched among, if not what :meth:`selecting` would choose.
        protocol: what the test classes are to training: ``"unseen"`` ones, ``"known"`` ones of which other pictures
            are searched for among those trained on, or ``"seen"`` where nothing was held out.
        notes: what somebody who reads the figures should know of the data, a line each.
        parted: whether both sides are files of the same classes, which :func:`.photos.parted` has parted.
    """

    name: str
    view: View
    train: Split
    test: Split
    distort_test: bool = False
    gallery: Split | None = None
    val: Split | None = None
    others: Split | None = None
    among: Split | None = None
    protocol: TestClasses = "unseen"
    notes: tuple[str, ...] = ()
    parted: bool = False

    def digest(self) -> str:
        """Identifies the pictures and labels of every side."""
        sha = hashlib.sha256()
        for split in (self.train, self.test, self.gallery, self.val, self.others):
            if split is not None:
                sha.update(split.digest.encode() + split.labels.numpy().tobytes())
        return sha.hexdigest()

    def selecting(self) -> Dataset | None:
        """The data with the validation queries in the test queries' place, where their classes are trained on among the
        same gallery, or the training pictures if it lacks one of them, else among themselves; None without validation
        pictures."""
        if self.val is None:
            return None
        sides: tuple[Split | None, ...] = () if self.protocol == "unseen" else (self.gallery, self.train)
        sides = sides if self.among is None else (self.among,)
        names = set(self.val.names)
        gallery = next((side for side in sides if side is not None and names <= set(side.names)), None)
        return replace(self, name=f"{self.name} (validation)", test=self.val, gallery=gallery, val=None)

    def hold_out(self, seed: int) -> Dataset:
        """The data with some training pictures held out as ``val``: a quarter of the classes where test classes are
        unseen, a fifth of each class's pictures where they are known. The data itself where it has a ``val``.

        The gallery of the test queries stays whole, for what is measured not to depend on how a step is chosen; the
        validation queries are searched for among what is left to train on.

        Raises:
            ValueError: too few classes or pictures.
        """
        if self.val is not None:
            return self
        if self.protocol == "unseen":
            held = self.validation(0)
            return replace(self, train=held.train, val=held.test, among=held.gallery)
        generator = torch.Generator().manual_seed(seed)
        kept, out = [], []
        for c in range(len(self.train.names)):
            rows = (self.train.labels == c).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            held_out = len(rows) // 5
            kept.append(rows[held_out:])
            out.append(rows[:held_out])
        if sum(map(len, out)) < 2:
            raise ValueError(
                f"{self.name} has too few pictures a class to hold some out for validation; at least 5 of two classes, "
                f"or a folder val/, are accepted"
            )
        train = self.train.some(torch.cat(kept).sort().values)
        among = train if self.gallery is self.train else self.among
        return replace(self, train=train, val=self.train.some(torch.cat(out).sort().values), among=among)

    def validation(self, fold: int) -> Dataset:
        """Some training classes in the test classes' place, to choose settings by.

        The last group of classes in fold 0, the one before in fold 1, and so on around; without groups, a quarter of
        the classes. Where classes are known: ``val``, or a fifth of each class's pictures.

        Raises:
            ValueError: too few classes.
        """
        if self.protocol == "known":
            selecting = self.hold_out(fold).selecting()
            assert selecting is not None
            return replace(selecting, name=f"{self.name} (validation {fold})")
        classes = torch.arange(len(self.train.names))
        if len(self.train.groups) > 1 and self.train.group_of:
            held = torch.tensor(self.train.group_of) == (-1 - fold) % len(self.train.groups)
        else:
            held = classes % 4 == (-1 - fold) % 4
        if held.sum() < 2 or (~held).sum() < 2:
            raise ValueError(
                f"{self.name} has {len(classes)} classes to train on; too few to hold some out for validation"
            )
        train, test = self.train.classes(classes[~held]), self.train.classes(classes[held])
        name = f"{self.name} (validation {fold})"
        if self.others is not None:
            return Dataset(name, self.view, train, self.others.named(test.names), self.distort_test, gallery=test)
        return Dataset(name, self.view, train, test, self.distort_test)

    def known(self) -> Dataset:
        """The data with all its classes on both sides: the last fifth of each one's pictures is searched for among the
        others."""
        train, test = self.train, self.test
        if set(train.names) & set(test.names):
            raise ValueError(f"{self.name} has the same classes on both sides already")
        pictures = Joined(train.pictures, test.pictures)
        labels = torch.cat([train.labels, test.labels + len(train.names)])
        groups = (*train.groups, *test.groups)
        group_of: tuple[int, ...] = ()
        if train.group_of and test.group_of:
            group_of = (*train.group_of, *(len(train.groups) + group for group in test.group_of))
        both = hashlib.sha256(f"{train.digest}:{test.digest}".encode()).hexdigest()
        whole = Split(pictures, labels, (*train.names, *test.names), groups, both, group_of)
        rest, searched = whole.parted()
        return replace(
            self, train=rest, test=searched, distort_test=False, gallery=rest, val=None, others=None, protocol="known"
        )


def in_memory(groups: dict[str, dict[str, Tensor]]) -> Split:
    """A split of pictures (n, c, H, W) uint8 held in memory, by group and class."""
    classes = [pictures for group in groups.values() for pictures in group.values()]
    pictures = torch.cat(classes)
    return Split(
        pictures,
        labels=torch.repeat_interleave(torch.tensor([len(rows) for rows in classes])),
        names=tuple(name for group in groups.values() for name in group),
        groups=tuple(groups),
        digest=hashlib.sha256(pictures.numpy().tobytes()).hexdigest(),
        group_of=tuple(place for place, group in enumerate(groups.values()) for _ in group),
    )


def fit(picture: Image.Image) -> Tensor:
    """The ink of a grey picture (ink bright), cropped, scaled to a longer side of 44 and centred: (1, 64, 64) uint8.

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
    return torch.from_numpy(np.array(canvas))[None]


class _Batches:
    """Fetches a whole batch at once where PyTorch's loader would fetch sample by sample."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(rows)
        return self.split.pictures[index], self.split.labels[index], index


def batches(
    split: Split, classes: int, samples: int, count: int, *, seed: int, workers: int = 0, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``count`` batches of ``classes`` × ``samples`` stored pictures: (c·s, …) uint8, their labels and rows (c·s,).

    The seed decides them; the first ``skip`` are left out. A class with fewer pictures than ``samples`` repeats some.
    """
    # Here, for a process that only reads pictures would take seconds longer to start.
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pytorch_metric_learning.utils import common_functions

    size = classes * samples
    before, common_functions.NUMPY_RANDOM = common_functions.NUMPY_RANDOM, np.random.RandomState(seed)
    try:
        order = list(MPerClassSampler(split.labels, samples, size, length_before_new_iter=count * size))
    finally:
        common_functions.NUMPY_RANDOM = before
    rows = [order[start : start + size] for start in range(skip * size, count * size, size)]
    loader: Iterable[tuple[Tensor, Tensor, Tensor]] = DataLoader(
        _Batches(split),  # type: ignore[arg-type]
        batch_sampler=rows,
        num_workers=min(workers, len(rows)),
        collate_fn=_whole,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),  # else it draws from torch's own, once for each call
    )
    with uninterrupted():  # a step that is to be finished needs its batches
        drawn = iter(loader)
    yield from drawn


def _whole(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch that was fetched at once: nothing is left to collate."""
    return batch


class TestSet:
    """The test split as a net sees it, the same for the same seed: the queries, then the gallery, if it is another.

    Rows are shuffled: where an embedding collapses to ties, the order of rows must not favour the same class.

    Attributes:
        names: one per class, of queries and gallery.
        labels: (n,) int64 into ``names``.
        queries: (q,) int64 rows that are searched for; None where every row is, among all the others.
        gallery: (n - q,) int64 rows that are searched among; None as above.
    """

    __test__ = False  # not a test of pytest's

    def __init__(self, dataset: Dataset, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        test, gallery = dataset.test, dataset.gallery
        order = torch.randperm(len(test.labels), generator=generator)
        self.names, self.labels, self.show = test.names, test.labels[order], dataset.view.show
        self._stored: Pictures = Rows(test.pictures, order)
        self._plain = dataset.view.plain
        self.queries: Tensor | None = None
        self.gallery: Tensor | None = None
        if gallery is not None:
            count = len(order)
            order = torch.randperm(len(gallery.labels), generator=generator)
            self.names = tuple(dict.fromkeys((*test.names, *gallery.names)))
            place = {name: number for number, name in enumerate(self.names)}
            numbers = torch.tensor([place[name] for name in gallery.names])
            self.labels = torch.cat([self.labels, numbers[gallery.labels[order]]])
            self._stored = Joined(self._stored, Rows(gallery.pictures, order))
            self.queries, self.gallery = torch.arange(count), torch.arange(count, len(self.labels))
        self._distorted = None
        if dataset.distort_test:
            self._distorted = dataset.view.augment(self._stored[torch.arange(len(self.labels))], generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """What a net sees of these rows: (len(rows), channels, size, size) float32."""
        return self._plain(self._stored[rows]) if self._distorted is None else self._distorted[rows]

    @property
    def stored(self) -> Pictures | None:
        """The stored pictures, row by row; None where what a net sees of them is distorted."""
        return self._stored if self._distorted is None else None

    def file(self, row: int) -> str | None:
        """The file of a row, relative to its folder; None where it comes from none."""
        return file_of(self._stored, row)
