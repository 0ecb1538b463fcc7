"""DeepFashion's In-Shop Clothes Retrieval (Liu, Luo, Qiu, Wang, Tang, CVPR 2016), whose queries have a gallery."""

from __future__ import annotations

from pathlib import Path

from . import files, photos
from .augment import PHOTOS, Photographs
from .files import Archive
from .published import warn_of_size
from .splits import Dataset

#: Published numbers of training pictures and items, queries, gallery pictures, and items of these two.
FIGURES = (25_882, 3_997, 14_218, 12_612, 3_985)
INDEX = "list_eval_partition.txt"
_STATUS = ("train", "query", "gallery")
EXPECTED = (
    f"expected Eval/{INDEX} and Img/img.zip or what it unpacks to (img/), of the In-shop Clothes Retrieval Benchmark "
    f"in https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html"
)


def load(root: str | Path, view: Photographs = PHOTOS, *, only: photos.Only | None = None) -> Dataset:
    """The benchmark's own split by item; warns where its size is not the published one.

    Args:
        root: the folder that holds ``Eval/list_eval_partition.txt`` or that list itself, and the pictures: ``img/``
            or ``img.zip``, here or in ``Img/``. A zip is read without being unpacked.
        view: how the photographs are seen.
        only: the half whose pictures have to be there, if the other one does not matter.

    Raises:
        FileNotFoundError: nothing is there, or something of it is missing.
        ValueError: a damaged archive or list.
    """
    root = Path(root)
    if root.is_file():
        raise ValueError(f"{root}: a file, where --data in-shop takes the folder that holds it; {EXPECTED}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {EXPECTED}")
    lists = [root / place / INDEX for place in ("Eval", "Anno", ".") if (root / place / INDEX).is_file()]
    if not lists:
        raise FileNotFoundError(f"{root}: holds no {INDEX}; {EXPECTED}")
    folder = _pictures(root)
    sides = _items(lists[0])
    trained_on, queried = (set(sides[side]) for side in ("train", "query"))
    for side in ("query", "gallery"):
        both = sorted(trained_on & sides[side].keys())
        if both:
            raise ValueError(f"{lists[0]} is damaged: item {both[0]} is in train and in {side}; {EXPECTED}")
    alone = sorted(queried ^ sides["gallery"].keys())
    if alone:
        raise ValueError(f"{lists[0]} is damaged: item {alone[0]} is not in both of query and gallery; {EXPECTED}")
    train, query, gallery = (sorted(sides[side].items()) for side in _STATUS)
    dataset = photos.dataset(
        "in-shop", folder, train, query, gallery=gallery, where=str(root), expected=EXPECTED, view=view, only=only
    )
    assert dataset.gallery is not None
    sizes = (len(split.labels) for split in (dataset.train, dataset.test, dataset.gallery))
    found = tuple(n for pair in zip(sizes, (len(train), None, len(query)), strict=True) for n in pair if n is not None)
    told = "{:,} training pictures of {:,} items, {:,} queries and {:,} gallery pictures of {:,} items"
    warn_of_size(str(root), "In-Shop", told, found, FIGURES)
    return dataset


def _pictures(root: Path) -> Path | Archive:
    for folder in (root, root / "Img"):
        if (folder / "img").is_dir():
            return folder
        if (folder / "img.zip").is_file():
            archive = Archive(folder / "img.zip")
            try:
                archive.names()
            except ValueError as error:
                raise ValueError(f"{error}; {EXPECTED}") from error
            return archive
    raise FileNotFoundError(f"{root}: holds neither img/ nor img.zip, nor does {root / 'Img'}; {EXPECTED}")


def _items(index: Path) -> dict[str, dict[str, list[str]]]:
    """Items with their pictures, by the list's third column."""
    try:
        count, _, *lines = index.read_text("utf-8").splitlines()
        rows = [line.split() for line in lines if line.strip()]
        bad = next((row for row in rows if len(row) != 3 or row[2] not in _STATUS), None)
        if bad is not None:
            raise ValueError(f"a line has {' '.join(bad)!r}")
        if len(rows) != int(count):
            raise ValueError(f"it announces {int(count):,} pictures and lists {len(rows):,}")
        files.listed([path for path, _, _ in rows])
    except ValueError as error:
        raise ValueError(f"{index} is damaged ({error}); {EXPECTED}") from error
    sides: dict[str, dict[str, list[str]]] = {side: {} for side in _STATUS}
    for path, item, status in rows:
        sides[status].setdefault(item, []).append(path)
    return sides
