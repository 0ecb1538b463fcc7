"""The data set that a run's settings name."""

from __future__ import annotations

from typing import Literal

from ..settings import DRAWINGS, SPLITS, Settings
from .augment import PHOTOS, Photographs
from .splits import Dataset

#: What ``--download`` fetches.
FETCHED = ("cub200", "cars196", "sop")

# The splits of data that have a choice.
_SPLITS = {"folder": SPLITS[:-1], "grocery": ("half", "unseen")}
_SPLITS |= dict.fromkeys((*DRAWINGS, *FETCHED), ("half", "known"))


def takes(data: str, root: str, split: str, gallery: str) -> tuple[bool, bool]:
    """Whether data takes a split, and a gallery."""
    splits = _SPLITS.get(data, ("half",))
    if data == "folder":
        from . import photos

        splits = ("half",) if photos.has_sides(root) else splits
    return split in splits, gallery == "train" or data == "grocery"


def load(settings: Settings, view: Photographs = PHOTOS, only: Literal["train", "test"] | None = None) -> Dataset:
    """What ``--data`` names, from ``--root`` where it has one; imports only what that one needs.

    Args:
        settings: name the data.
        view: how photographs are seen; drawings have a view of their own.
        only: the half of the data that has to be whole, where the other does not matter: what is trained on, or what
            is measured (``"test"``: queries and gallery).

    Raises:
        FileNotFoundError: something is not there; the message names it and where it comes from.
        ValueError: something is damaged, ``--download`` of what cannot be fetched, or an option for other data.
    """
    data = settings.data
    if settings.download and data not in FETCHED:
        raise ValueError(f"--download fetches {', '.join(FETCHED[:-1])} and {FETCHED[-1]}; --data is {data}")
    if settings.split not in _SPLITS.get(data, ("half",)):
        whose = [name for name, splits in _SPLITS.items() if settings.split in splits]
        has = f"takes {', '.join(_SPLITS[data])}" if data in _SPLITS else "has a split of its own"
        raise ValueError(f"--split {settings.split} is for --data {', '.join(whose)}; {data} {has}")
    if settings.gallery != "train" and data != "grocery":
        raise ValueError(f"--gallery {settings.gallery} is for --data grocery; --data is {data}")
    if data in FETCHED:
        from . import published

        known = settings.split == "known"
        return published.load(data, settings.root, view, download=settings.download, known=known, only=only)
    if data == "in-shop":
        from . import inshop

        return inshop.load(settings.root, view, only=only)
    if data == "grocery":
        from . import grocery

        return grocery.load(settings.root, view, gallery=settings.gallery, unseen=settings.split == "unseen", only=only)
    if data == "folder":
        from . import photos

        return photos.folder(settings.root, view, split=settings.split, seed=settings.seed, only=only)
    if data == "omniglot":
        from . import omniglot

        drawn = omniglot.load(settings.root)
    else:
        from . import glyphs

        drawn = glyphs.load()
    return drawn.known() if settings.split == "known" else drawn
