"""The photographs that retrieval is compared on, with their class-disjoint splits: CUB-200-2011, CARS196 and SOP."""

from __future__ import annotations

import gzip
import http.client
import os
import tarfile
import tempfile
import urllib.error
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytorch_metric_learning.datasets import CUB, Cars196, StanfordOnlineProducts
from pytorch_metric_learning.datasets.base_dataset import BaseDataset

from . import photos
from .augment import PHOTOS, Photographs
from .files import outside
from .splits import Dataset

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, ValueError)
_OFFLINE = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class _Layout:
    """How a data set is published.

    Attributes:
        kind: what knows its splits.
        title: its name in papers.
        page: where people read about it and fetch it.
        archives: names of the one file it comes in.
        entries: what of the unpacked archive is needed; an index file that stands among them comes last.
        index: the files that list pictures and classes.
        listings: groups of index files, each group with one line for each picture.
        class_of: a class's name from a picture's path.
        figures: published numbers of training pictures and classes, test pictures and classes.
    """

    kind: type[BaseDataset]
    title: str
    page: str
    archives: tuple[str, ...]
    entries: tuple[str, ...]
    index: tuple[str, ...]
    listings: tuple[tuple[str, ...], ...]
    class_of: Callable[[str], str]
    figures: tuple[int, int, int, int]

    @property
    def expected(self) -> str:
        return f"expected what {self.archives[0]} of {self.page} ({self.kind.DOWNLOAD_URL}) unpacks to"


def _parent(path: str) -> str:
    return PurePosixPath(path).parent.name


def _product(path: str) -> str:
    """``bicycle_final/111085122871_0.JPG`` is a picture of the product ``bicycle 111085122871``."""
    return f"{_parent(path).removesuffix('_final')} {PurePosixPath(path).name.partition('_')[0]}"


LAYOUTS = {
    "cub200": _Layout(
        kind=CUB,
        title="CUB-200-2011",
        page="https://www.vision.caltech.edu/datasets/cub_200_2011",
        archives=("CUB_200_2011.tgz",),
        entries=("CUB_200_2011",),
        index=("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"),
        listings=(("CUB_200_2011/images.txt",), ("CUB_200_2011/image_class_labels.txt",)),
        class_of=_parent,
        figures=(5864, 100, 5924, 100),
    ),
    "cars196": _Layout(
        kind=Cars196,
        title="CARS196",
        page="https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder",
        archives=("stanford-car-dataset-by-classes-folder.zip", "archive.zip"),
        entries=("car_data", "anno_train.csv", "anno_test.csv", "names.csv"),
        index=("names.csv", "anno_train.csv", "anno_test.csv"),
        listings=(("anno_train.csv", "anno_test.csv"),),
        class_of=_parent,
        figures=(8054, 98, 8131, 98),
    ),
    "sop": _Layout(
        kind=StanfordOnlineProducts,
        title="Stanford Online Products",
        page="https://cvgl.stanford.edu/projects/lifted_struct",
        archives=("Stanford_Online_Products.zip",),
        entries=("Stanford_Online_Products",),
        index=("Stanford_Online_Products/Ebay_train.txt", "Stanford_Online_Products/Ebay_test.txt"),
        listings=(),
        class_of=_product,
        figures=(59551, 11318, 60502, 11316),
    ),
}


def load(
    name: str,
    root: str | Path,
    view: Photographs = PHOTOS,
    *,
    download: bool = False,
    known: bool = False,
    only: photos.Only | None = None,
) -> Dataset:
    """A published data set with its usual split; warns where its size is not the published one.

    CUB-200-2011 trains on its classes 1 to 100, CARS196 on 1 to 98, SOP on those of ``Ebay_train.txt``.

    Args:
        name: of ``LAYOUTS``.
        root: the folder that holds the unpacked archive, or the archive, or that archive. An archive is unpacked beside
            itself, once.
        view: how the photographs are seen.
        download: fetch the data set into ``root`` where neither is there.
        known: whether the last fifth of each class's pictures, of both sides, is searched for among the others instead.
        only: the half whose pictures have to be there, if the other one does not matter.

    Raises:
        FileNotFoundError: nothing is there, something of it is missing, or it cannot be fetched.
        ValueError: a damaged archive or index.
        OSError: the disk is full or may not be written to.
    """
    layout, root = LAYOUTS[name], Path(root)
    archives = [root] if root.is_file() else [root / archive for archive in layout.archives]
    if root.is_file():
        root = root.parent
    if not any((root / entry).exists() for entry in layout.entries):
        archive = next((archive for archive in archives if archive.is_file()), None)
        if archive is not None:
            _make(name, root, str(archive), lambda folder: _unpack(layout, archive, folder))
        elif download:
            url = layout.kind.DOWNLOAD_URL
            _make(name, root, f"{root}: the download from {url}", lambda folder: _fetch(layout, root, folder))
        else:
            there = (
                f"holds none of {', '.join(layout.entries + layout.archives)}" if root.is_dir() else "no such folder"
            )
            raise FileNotFoundError(f"{root}: {there}; {layout.expected}; with --download it is fetched")
    dataset = _read(name, root, str(root), view, only)
    found = tuple(len(each) for split in (dataset.train, dataset.test) for each in (split.labels, split.names))
    told = "{:,} training pictures of {:,} classes and {:,} test pictures of {:,} classes"
    warn_of_size(str(root), layout.title, told, found, layout.figures)
    return photos.known(dataset, str(root), layout.expected) if known else dataset


def warn_of_size(where: str, title: str, told: str, found: tuple[int, ...], figures: tuple[int, ...]) -> None:
    """Warn where the sizes that were found, to be put into the text ``told``, are not the published ``figures``."""
    if found != figures:
        warnings.warn(f"{where}: {told.format(*found)}; {title} as published has {told.format(*figures)}", stacklevel=3)


def _make(name: str, root: Path, where: str, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder in ``root`` and, once what is in it proves whole, move that to its place."""
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=root) as unfinished:
            fill(Path(unfinished))
            _read(name, Path(unfinished), where, PHOTOS, None)
            for entry in LAYOUTS[name].entries:
                try:
                    os.replace(Path(unfinished, entry), root / entry)
                except OSError:
                    # Another process may have been first; what it left is read like any other.
                    if not (root / entry).is_dir():
                        raise
    finally:
        if is_new and not any(root.iterdir()):
            root.rmdir()


def _fetch(layout: _Layout, root: Path, folder: Path) -> None:
    # The library unpacks what it fetches as Python's default says, which before 3.14 lets a member go anywhere.
    default = vars(tarfile.TarFile)["extraction_filter"]
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    url = layout.kind.DOWNLOAD_URL
    try:
        layout.kind(str(folder), split="train", download=True)
    except _OFFLINE as error:
        raise FileNotFoundError(f"{root}: {url} cannot be fetched ({error}); {layout.expected}") from error
    except (FileNotFoundError, IndexError):
        pass  # it then has no proper index, which is said when that is read
    except _DAMAGED as error:
        raise ValueError(f"{root}: not a readable archive came from {url} ({error}); {layout.expected}") from error
    finally:
        tarfile.TarFile.extraction_filter = default


def _unpack(layout: _Layout, archive: Path, folder: Path) -> None:
    try:
        if layout.archives[0].endswith(".tgz"):
            with gzip.open(archive) as stream:
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    tar.extractall(folder, filter="data")
                while stream.read(1 << 20):  # the check sum stands at the end
                    pass
        else:
            with zipfile.ZipFile(archive) as members:
                member = outside(members.namelist())
                if member is not None:
                    raise ValueError(f"its member {member} would be written outside")
                members.extractall(folder)
    except _DAMAGED as error:
        raise ValueError(f"{archive}: not a readable archive ({error}); {layout.expected}") from error


def _read(name: str, root: Path, where: str, view: Photographs, only: photos.Only | None) -> Dataset:
    """What the folder ``root`` holds, whole or refused; ``where`` is what messages call it."""
    layout = LAYOUTS[name]
    lost = [path for path in layout.index if not (root / path).is_file()]
    if lost:
        raise FileNotFoundError(
            f"{where}: {len(layout.index) - len(lost)} of {len(layout.index)} index files found; the first that is "
            f"missing is {lost[0]}; {layout.expected}"
        )
    index = f"{where}: the index ({', '.join(layout.index)})"
    try:
        sides = [layout.kind(str(root), split=split) for split in ("train", "test")]
        listed = [
            sum(1 for path in group for line in (root / path).read_text("utf-8").splitlines() if line.strip())
            for group in layout.listings
        ]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{index} is damaged ({error}); {layout.expected}") from error
    kept = sum(len(side) for side in sides)
    for group, lines in zip(layout.listings, listed, strict=True):
        if lines != kept:
            raise ValueError(
                f"{index} is damaged: {kept:,} pictures have a class, {' and '.join(group)} list {lines:,}; "
                f"{layout.expected}"
            )
    both = set(sides[0].labels) & set(sides[1].labels)
    if both:
        raise ValueError(f"{index} puts class {min(both)} on both sides of the split; {layout.expected}")
    train, test = (_classes(layout, root, side) for side in sides)
    return photos.dataset(name, root, train, test, where=where, expected=layout.expected, view=view, only=only)


def _classes(layout: _Layout, root: Path, side: BaseDataset) -> photos.Classes:
    start = len(os.path.join(root, ""))
    classes: dict[int, list[str]] = {}
    for path, label in zip(side.paths, side.labels, strict=True):
        classes.setdefault(label, []).append(path[start:].replace(os.sep, "/"))
    return [(layout.class_of(paths[0]), paths) for _, paths in sorted(classes.items())]
