"""The data set that a run's settings name."""

from __future__ import annotations

from ..settings import Settings
from .splits import Dataset


def load(settings: Settings) -> Dataset:
    """What ``--data`` names, from ``--root`` where it has one; imports only what that one needs.

    Raises:
        FileNotFoundError: something is not there; the message names it and where it comes from.
        ValueError: something is damaged, or ``--download`` of what cannot be fetched.
    """
    if settings.data in ("cub200", "cars196", "sop"):
        from . import published

        return published.load(settings.data, settings.root, download=settings.download)
    if settings.download:
        raise ValueError(f"--download fetches cub200, cars196 and sop; --data is {settings.data}")
    if settings.data == "folder":
        from . import photos

        return photos.folder(settings.root)
    if settings.data == "omniglot":
        from . import omniglot

        return omniglot.load(settings.root)
    from . import glyphs

    return glyphs.load()
