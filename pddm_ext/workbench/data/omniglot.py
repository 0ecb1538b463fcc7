"""Handwritten characters: a folder or the public zip of Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps

from .augment import DRAWINGS
from .splits import Dataset, Split, fit, in_memory

TRAIN_ALPHABETS, TEST_ALPHABETS = 3, 2
ARCHIVE = "images_background_small1"
EXPECTED = (
    f"expected {ARCHIVE}/ALPHABET/characterNN/*.png with at least {TRAIN_ALPHABETS + TEST_ALPHABETS} alphabets, as in "
    f"python/{ARCHIVE}.zip of https://github.com/brendenlake/omniglot"
)

Drawing = tuple[str, str, str, bytes]
"""Alphabet, character, where the file is, its bytes."""


def load(root: str | Path) -> Dataset:
    """The first three alphabets by name to train on, the last two to search among.

    Args:
        root: the zip, its unpacked folder of alphabets, or the folder that holds either.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a damaged archive or picture, a drawing that is there twice, or too few alphabets; the message names
            the file.
    """
    root = Path(root)
    if (root / f"{ARCHIVE}.zip").is_file():
        root = root / f"{ARCHIVE}.zip"
    if root.is_dir():
        found = _from_folder(root)
    elif root.is_file():
        found = _from_zip(root)
    else:
        raise FileNotFoundError(f"{root}: no such file or folder; {EXPECTED}")

    alphabets: dict[str, dict[str, list[torch.Tensor]]] = {}
    for alphabet, character, where, content in found:
        alphabets.setdefault(alphabet, {}).setdefault(character, []).append(_read(where, content))
    names = sorted(alphabets)
    if len(names) < TRAIN_ALPHABETS + TEST_ALPHABETS:
        raise ValueError(f"{root}: found {len(names)} alphabets ({', '.join(names) or 'none'}); {EXPECTED}")
    for alphabet, characters in alphabets.items():
        for character, drawings in characters.items():
            if len(drawings) < 2:
                raise ValueError(f"{root}: {alphabet}/{character} has a single drawing; {EXPECTED}")

    def split(chosen: list[str]) -> Split:
        return in_memory(
            {a: {f"{a} {c}": torch.stack(drawn) for c, drawn in sorted(alphabets[a].items())} for a in chosen}
        )

    return Dataset("omniglot", DRAWINGS, split(names[:TRAIN_ALPHABETS]), split(names[-TEST_ALPHABETS:]))


def _from_folder(root: Path) -> Iterator[Drawing]:
    if (root / ARCHIVE).is_dir():
        root = root / ARCHIVE
    paths = [path for above in ("*", "*/*") for path in sorted(root.glob(f"{above}/character*/*"))]
    paths = [path for path in paths if _is_drawing(path.name)]
    _refuse_copies(root, (path.relative_to(root).as_posix() for path in paths))
    for path in paths:
        yield path.parts[-3], path.parts[-2], str(path), path.read_bytes()


def _is_drawing(name: str) -> bool:
    # Archivers leave files like ._0108_01.png beside the drawings.
    return name.endswith(".png") and not name.startswith(".")


def _refuse_copies(root: Path, names: Iterable[str]) -> None:
    """Raise ValueError at a drawing that is there twice: the test would find nothing but copies."""
    found: dict[tuple[str, ...], str] = {}
    for name in names:
        drawing = PurePosixPath(name).parts[-3:]
        if drawing in found:
            raise ValueError(
                f"{root}: {'/'.join(drawing)} is there twice, as {found[drawing]} and as {name}; leave one of them, or "
                f"name the folder to take; {EXPECTED}"
            )
        found[drawing] = name


def _from_zip(path: Path) -> Iterator[Drawing]:
    try:
        with zipfile.ZipFile(path) as archive:
            drawings = []
            for name in sorted(archive.namelist()):
                parts = PurePosixPath(name).parts
                if len(parts) >= 3 and parts[-2].startswith("character") and _is_drawing(parts[-1]):
                    drawings.append((name, parts))
            _refuse_copies(path, (name for name, _ in drawings))
            for name, parts in drawings:
                yield parts[-3], parts[-2], f"{path}/{name}", archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable zip archive ({error}); {EXPECTED}") from error


def _read(where: str, content: bytes) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            # Ink is black in the files and bright here.
            return fit(ImageOps.invert(picture.convert("L")))
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: not a readable drawing ({error}); {EXPECTED}") from error
