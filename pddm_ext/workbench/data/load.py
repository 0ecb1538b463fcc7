"""The data set that a run's settings name."""

from __future__ import annotations

from ..settings import Settings
from .augment import PHOTOS, Photographs
from .splits import Dataset


def load(settings: Settings, view: Photographs = PHOTOS) -> Dataset:
    """What ``--data`` names, from ``--root`` where it has one; imports only what that one needs.

    Args:
        settings: name the data.
        view: how photographs are seen; drawings have a view of their own.

    Raises:
        FileNotFoundError: something is not there; the message names it and where it comes from.
        ValueError: something is damaged, or ``--download`` of what cannot be fetched.
    """
    if settings.data in ("cub200", "cars196", "sop"):
        from . import published

        return published.load(settings.data, settings.root, view, download=settings.download)
    if settings.download:
        raise ValueError(f"--download fetches cub200, cars196 and sop; --data is {settings.data}")
    if settings.data == "folder":
        from . import photos

        return photos.folder(settings.root, view)
    if settings.data == "omniglot":
        from . import omniglot

        return omniglot.load(settings.root)
    from . import glyphs

    return glyphs.load()
