"""A folder's pictures: found, and put through an embedder."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .catalogue_files import Floats
from .console import Progress
from .data.augment import View
from .data.reading import extensions, read
from .interrupts import uninterrupted
from .trained import BATCH, Trained


def now_and_then(work: Callable[[], None], seconds: float) -> Callable[[], None]:
    """Does the work when it is called so long after the last time, and, where it takes long, twenty times as long as it
    took."""
    done, pause = time.monotonic(), seconds

    def call() -> None:
        nonlocal done, pause
        begin = time.monotonic()
        if begin - done >= pause:
            work()
            done = time.monotonic()
            pause = max(seconds, 20 * (done - begin))

    return call


def walk(
    folder: Path, inside: str, passed_over: Counter[str], no_files: list[str], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Relative paths of pictures, with size and time; links are followed, but not around in a circle.

    Files of other kinds are counted in ``passed_over``; links to nowhere, and what is no file, go to ``no_files``.
    """
    known, status = extensions(), os.stat(folder / inside)
    this = (status.st_dev, status.st_ino)
    if this in above:
        return
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # archivers leave files like ._one.jpg beside the pictures
                continue
            path = f"{inside}/{entry.name}" if inside else entry.name
            # An entry of a folder ends at a link that leads to itself, a path does not.
            there = Path(entry.path) if entry.is_symlink() else entry
            if there.is_dir():
                yield from walk(folder, path, passed_over, no_files, (*above, this))
                continue
            if not there.is_file():  # a broken link; or a pipe, at which reading would wait for ever
                no_files.append(path)
                continue
            kind = os.path.splitext(entry.name)[1].lower()
            if kind not in known:
                passed_over[kind or "no extension"] += 1
                continue
            status = entry.stat()
            yield path, (status.st_size, status.st_mtime_ns)


class _Files:
    """What is stored of the pictures in files, and which of them cannot be read."""

    def __init__(self, folder: Path, paths: Sequence[str], view: View) -> None:
        self.folder, self.paths, self.view = folder, paths, view

    def __getitem__(self, rows: Sequence[int]) -> tuple[list[int], Tensor, list[str]]:
        """The readable ones of these rows, what is stored of them, and errors at the others."""
        readable, stored, errors = [], [], []
        for row in rows:
            path = self.folder / self.paths[row]
            try:
                stored.append(read(path, self.view))
                readable.append(row)
            except ValueError as error:
                errors.append(str(error))
            except OSError as error:
                errors.append(f"{path}: not a readable picture ({error.strerror})")
        return readable, torch.stack(stored) if stored else torch.empty(0, dtype=torch.uint8), errors


def embed(
    trained: Trained,
    folder: Path,
    paths: Sequence[str],
    workers: int,
    skip_unreadable: bool,
    progress: bool | None,
    embedded: dict[str, list[Floats]],
    keep: Callable[[], None] = lambda: None,
) -> list[str]:
    """Errors at unreadable pictures; ``embedded`` gets the feature of each path, and its structure where the net has a
    head for it; ``keep`` is called when there are more.

    Where errors are to end it nothing is embedded after the first one, and the others are looked for.
    """
    chunks = [list(range(start, min(start + BATCH, len(paths)))) for start in range(0, len(paths), BATCH)]
    loader: Iterable[Any] = DataLoader(
        _Files(folder, paths, trained.view),  # type: ignore[arg-type]
        batch_size=None,
        sampler=chunks,
        num_workers=min(workers, len(chunks)),
        generator=torch.Generator(),  # else it draws from torch's own
    )
    unreadable: list[str] = []
    with uninterrupted():
        read_ahead = iter(loader)
    with Progress("embedding", len(paths), 0, "picture", progress if paths else False) as bar:
        for chunk, (rows, stored, errors) in zip(chunks, read_ahead, strict=True):
            unreadable += errors
            if rows and (skip_unreadable or not unreadable):
                columns = [values.numpy() for values in trained.embed(stored) if values is not None]
                for row, *values in zip(rows, *columns, strict=True):
                    if not all(np.isfinite(value).all() for value in values):
                        raise ValueError(f"{folder / paths[row]}: its feature is not finite")
                    embedded[paths[row]] = values
                keep()
            bar.update(len(chunk))
            if chunk[-1] % (BATCH * 32) >= BATCH * 31 or chunk is chunks[-1]:
                bar.report(f"{len(unreadable)} unreadable")
    if unreadable and not skip_unreadable:
        listed = "; ".join(unreadable)
        raise ValueError(
            f"{len(unreadable)} of {len(paths)} pictures cannot be read: {listed}; --skip-unreadable leaves them out. "
            f"What was embedded is kept for the next time"
        )
    return unreadable
