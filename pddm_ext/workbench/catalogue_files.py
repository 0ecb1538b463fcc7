"""The files of a catalogue: all of them written, or none, and known to be of one another when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from numpy.typing import NDArray

import pddm_ext

from .trained import Trained

#: Of ``catalogue.json``; a reader of it reads every earlier one that a release has written.
FORMAT = 1
FACTS, FEATURES, STRUCTURES, INDEX = "catalogue.json", "features.npy", "structures.npy", "index.faiss"
#: Is there while the others get their names: what is then left of some of them is of a catalogue, and not somebody's.
_WRITING = ".writing"

_ANEW = "'pddm-ext embed' writes it anew"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Content:
    """What the files of a catalogue hold, but for the index; :class:`.catalogue.Catalogue` says what that is."""

    digest: str
    folder: str
    index: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    mtimes: tuple[int, ...]
    features: Floats
    structures: Floats | None

    def unchanged(self, found: Mapping[str, tuple[int, int]]) -> dict[str, list[Floats]]:
        """Feature, and structure, of each picture whose size and time are these."""
        columns = [values for values in (self.features, self.structures) if values is not None]
        return {
            path: [values[row] for values in columns]
            for row, (path, *facts) in enumerate(zip(self.paths, self.sizes, self.mtimes, strict=True))
            if found.get(path) == tuple(facts)
        }


def label(path: str) -> str | None:
    """The folder that a picture lies in; None where that is the catalogue's own."""
    return path.rpartition("/")[0] or None


def write(out: Path, content: Content, index: Any) -> None:
    """All files under temporary names, then by their own; the one that says what the others are comes last."""
    parts: dict[str, Callable[[BinaryIO], None]] = {
        FEATURES: lambda file: np.save(file, content.features),
        INDEX: lambda file: np.asarray(faiss.serialize_index(index)).tofile(file),
    }
    structures = content.structures
    if structures is not None:
        parts[STRUCTURES] = lambda file: np.save(file, structures)
    digests: dict[str, str] = {}

    def facts(file: BinaryIO) -> None:
        values = {
            "format": FORMAT,
            "digest": content.digest,
            "folder": content.folder,
            "index": content.index,
            "files": digests,
            "paths": content.paths,
            "labels": [label(path) for path in content.paths],
            "sizes": content.sizes,
            "mtimes": content.mtimes,
        }
        text = json.dumps(sealed(values), indent=1, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))

    for name in (FEATURES, STRUCTURES, INDEX, FACTS):
        for left in out.glob(f".{name}.*"):  # by a process that was killed
            left.unlink()
    temporary = {name: out / f".{name}.{os.getpid()}" for name in (*parts, FACTS)}
    try:
        for name, write in (*parts.items(), (FACTS, facts)):
            with open(temporary[name], "wb") as file:
                write(file)
            if name != FACTS:
                digests[name] = _sha(temporary[name])
        before = _listed(out)
        (out / _WRITING).touch()
        for name, path in temporary.items():
            os.replace(path, out / name)
        if structures is None and STRUCTURES in before:
            (out / STRUCTURES).unlink(missing_ok=True)
        (out / _WRITING).unlink()
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def remove(out: Path) -> None:
    """The catalogue in a folder, and the folder if nothing else is in it; nothing where there is no catalogue."""
    if not _listed(out) and not (out / _WRITING).exists():
        return
    for name in (FEATURES, STRUCTURES, INDEX, FACTS, _WRITING):
        (out / name).unlink(missing_ok=True)
    with suppress(OSError):
        out.rmdir()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with their own SHA-256."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _listed(out: Path) -> set[str]:
    """The files that the catalogue in a folder says it has."""
    try:
        return set(json.loads((out / FACTS).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _sha(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def _sound(facts: Mapping[str, Any]) -> bool:
    """Whether all facts are there, and of their kinds."""
    texts, lists = ("digest", "folder", "index"), {"paths": str, "sizes": int, "mtimes": int}
    files = facts["files"]
    return (
        all(type(facts.get(name)) is str for name in texts)
        and all(type(facts.get(name)) is list for name in lists)
        and all(type(value) is kind for name, kind in lists.items() for value in facts[name])
        and len({len(facts[name]) for name in lists}) == 1
        and type(files) is dict
        and {FEATURES, INDEX} <= files.keys() <= {FEATURES, STRUCTURES, INDEX}
    )


class TornError(ValueError):
    """Files that are not of one catalogue."""


def read(out: Path, trained: Trained | None = None) -> tuple[Content, Any]:
    """A catalogue's content, and its index; where an embedder is given, of that one.

    Raises:
        FileNotFoundError: there is none.
        TornError: files are missing, or not of one another.
        ValueError: it is of another embedder or format, or files of these names are no catalogue's.
    """
    path = out / FACTS
    torn = TornError(f"{out} is damaged, or was interrupted while being written; {_ANEW}")
    if not path.is_file():
        if (out / _WRITING).exists():
            raise torn
        for name in (FEATURES, STRUCTURES, INDEX):
            if (out / name).exists():
                raise ValueError(f"{out / name}: not of a catalogue; delete it, or choose another folder")
        raise FileNotFoundError(f"{out}: no catalogue; 'pddm-ext embed' writes one")
    try:
        facts = json.loads(path.read_text("utf-8"))
        found = facts["format"]
        facts["files"], facts["paths"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of a catalogue; delete it, or choose another folder") from error
    if found != FORMAT:
        raise ValueError(
            f"{path}: a catalogue of format {found!r}; pddm_ext {pddm_ext.__version__} reads {FORMAT}; "
            f"a newer one reads it, or delete the catalogue"
        )
    if facts != sealed(facts) or not _sound(facts):
        raise torn
    if trained is not None and facts["digest"] != trained.digest:
        raise ValueError(f"{out} was embedded by another checkpoint; {_ANEW}")
    files = facts["files"]
    try:
        if any(_sha(out / name) != digest for name, digest in files.items()):
            raise torn
        features, *structures = (
            np.load(out / name, mmap_mode="r", allow_pickle=False) for name in (FEATURES, STRUCTURES) if name in files
        )
        index = faiss.deserialize_index(np.fromfile(out / INDEX, np.uint8))
    except (OSError, ValueError, RuntimeError) as error:
        raise torn from error
    content = Content(
        facts["digest"],
        facts["folder"],
        facts["index"],
        tuple(facts["paths"]),
        tuple(facts["sizes"]),
        tuple(facts["mtimes"]),
        features,
        structures[0] if structures else None,
    )
    return content, index
