"""A catalogue of pictures: their features in files, an index of them, and what in it is nearest to a picture."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

import pddm_ext
from pddm_ext import _numbers

from . import checkpoint
from .console import Progress
from .data.augment import View
from .data.reading import extensions, read
from .trained import BATCH, Picture, Trained

#: Of ``catalogue.json``; a reader of it reads every earlier one that a release has written.
FORMAT = 1
FACTS, FEATURES, STRUCTURES, INDEX = "catalogue.json", "features.npy", "structures.npy", "index.faiss"
INDICES = ("auto", "flat", "hnsw", "ivf-pq")
RANKINGS = ("distance", "score", "structure")

#: Pictures up to which ``auto`` is ``flat``, which is exact: one query reads every feature, of 128 numbers 0.1 GB, in
#: about the time of a small net's forward pass.
FLAT = 200_000
#: And up to which it is ``hnsw``, which keeps all features and 300 bytes of links of each in memory: of 128 numbers
#: 1.6 GB. Beyond, ``ivf-pq`` keeps a byte for two numbers; what it ranks wrongly the exact distances of the candidates
#: put right.
HNSW = 2_000_000
#: Codes of ``ivf-pq`` are of a byte: as many centres are learned from the pictures.
_CENTRES = 256

_ANEW = "'pddm-ext embed' writes it anew"

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Index = Literal["auto", "flat", "hnsw", "ivf-pq"]
Ranking = Literal["distance", "score", "structure"]


@dataclass(frozen=True)
class Match:
    """A picture of the catalogue beside one that was searched for.

    Attributes:
        path: relative to the catalogue's folder.
        label: the folder that it lies in, relative to the catalogue's; None where that is the catalogue's itself.
        distance: Euclidean, of unit features: 0 to 2.
        score: the PDDM unit's, where it ranks; the larger, the more alike.
        adaptive: the adaptive distance by the searched one's structure, where that ranks.
    """

    path: str
    label: str | None
    distance: float
    score: float | None = None
    adaptive: float | None = None


@dataclass(frozen=True)
class Changes:
    """What :meth:`Catalogue.build` found and did.

    Attributes:
        new, changed, gone, kept: pictures that were not in the catalogue, were another file there, are no longer in the
            folder, and were left as they were.
        anew: why all were embedded in spite of a catalogue that was there; empty where that was not so.
        unreadable: pictures left out, each with its reason.
        passed_over: other files by their extension.
    """

    new: int = 0
    changed: int = 0
    gone: int = 0
    kept: int = 0
    anew: str = ""
    unreadable: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def said(self) -> list[str]:
        """In lines for people."""
        lines = [f"left out: {reason}" for reason in self.unreadable]
        if self.passed_over:
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.passed_over.items()))
            lines.append(f"passed over {sum(self.passed_over.values())} files that are no pictures by name: {kinds}")
        if self.anew:
            lines.append(f"all embedded: {self.anew}")
        return [*lines, f"{self.new} new, {self.changed} changed, {self.gone} gone, {self.kept} kept"]


@dataclass(frozen=True)
class _Content:
    """What the files of a catalogue hold, but for the index."""

    digest: str
    folder: str
    index: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    mtimes: tuple[int, ...]
    features: Floats
    structures: Floats | None


class Catalogue:
    """Pictures of a folder by their features. :meth:`build` makes or refreshes it, :meth:`open` opens it.

    A folder of ``features.npy``, (n, dim) float32 unit rows; ``structures.npy``, as many, of a net with a structure
    head; ``index.faiss``; and ``catalogue.json``: the embedder's digest, the pictures' folder, their paths, labels,
    sizes and times, and the other files' SHA-256, by which a catalogue is known to be whole. Features are mapped into
    memory, not read.

    Attributes:
        trained: the embedder.
        folder: of the pictures.
        paths: of the pictures, relative to it.
        labels: the folders that they lie in, relative to it; None for those in the folder itself.
        features: (n, dim) float32.
        structures: (n, dim) float32, or None.
        index: the kind: ``"flat"``, ``"hnsw"`` or ``"ivf-pq"``.
        changes: what :meth:`build` did.
    """

    def __init__(self, trained: Trained, content: _Content, index: Any, changes: Changes) -> None:
        self.trained, self.changes = trained, changes
        self.folder, self.paths, self.index = Path(content.folder), content.paths, content.index
        self.labels = tuple(map(_label, content.paths))
        self.features, self.structures = content.features, content.structures
        self._index = index
        self._row = {path: row for row, path in enumerate(content.paths)}

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def build(
        cls,
        trained: Trained,
        folder: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        index: Index = "auto",
        workers: int = 0,
        skip_unreadable: bool = False,
        progress: bool | None = False,
    ) -> Catalogue:
        """Embed a folder's pictures into a catalogue, or bring the catalogue that is there up to date.

        Pictures are what their extensions say (:func:`.data.reading.extensions`), in folders of any depth; files and
        folders whose names start with a dot are passed over. Of a catalogue of the same folder by the same embedder
        only files whose size or time is another are embedded again. Until all is written the old catalogue stays.

        Args:
            trained: the embedder.
            folder: of the pictures.
            out: folder of the catalogue.
            index: ``"flat"`` is exact, ``"hnsw"`` and ``"ivf-pq"`` are quick among many; ``"auto"`` is flat up to
                200,000 pictures, hnsw up to 2,000,000.
            workers: processes that read pictures ahead of the net; 0 reads between its batches.
            skip_unreadable: leave out what cannot be read.
            progress: as in :class:`.console.Progress`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: no pictures, pictures that cannot be read (the message lists all of them, each with its
                reason), too few for the index, or ``out`` is in use or holds something else.
            OSError: ``out`` cannot be written to.
        """
        folder, out = Path(folder), Path(out)
        if index not in INDICES:
            raise ValueError(f"index is {index!r}; {', '.join(INDICES)} are accepted")
        _numbers.size("workers", workers, 0)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; a folder of pictures is expected")
        passed_over: Counter[str] = Counter()
        found = dict(sorted(_walk(folder, "", passed_over, ())))
        _enough(folder, len(found), index)
        with checkpoint.claimed(out):
            before, anew = _before(out, trained, folder)
            kept = {
                path: row
                for row, (path, *facts) in enumerate(zip(before.paths, before.sizes, before.mtimes, strict=True))
                if found.get(path) == tuple(facts)
            }
            rest = [path for path in found if path not in kept]
            embedded, unreadable = _embedded(trained, folder, rest, workers, skip_unreadable, progress)
            paths = [path for path in found if path in kept or path in embedded]
            _enough(folder, len(paths), index)
            # A picture that was there and cannot be read any more is gone, too.
            known, there = set(before.paths), set(paths)
            changes = Changes(
                new=sum(path not in known for path in embedded),
                changed=sum(path in known for path in embedded),
                gone=len(known - there),
                kept=len(kept),
                anew=anew,
                unreadable=tuple(unreadable),
                passed_over=dict(passed_over),
            )
            kind = _by_size(len(paths)) if index == "auto" else index
            if anew or embedded or changes.gone or kind != before.index or not len(before.paths):
                columns: list[list[Floats]] = [[], []] if trained.structured else [[]]
                for path in paths:
                    rows = (
                        embedded[path]
                        if path in embedded
                        else [
                            values[kept[path]] for values in (before.features, before.structures) if values is not None
                        ]
                    )
                    for column, row in zip(columns, rows, strict=True):
                        column.append(row)
                features, *structures = (np.stack(column) for column in columns)
                sizes, mtimes = zip(*(found[path] for path in paths), strict=True)
                content = _Content(
                    trained.digest,
                    str(folder.resolve()),
                    kind,
                    tuple(paths),
                    sizes,
                    mtimes,
                    features,
                    structures[0] if structures else None,
                )
                _write(out, content, _indexed(kind, features))
            content, made = _read(out)
        return cls(trained, content, made, changes)

    @classmethod
    def open(cls, out: str | os.PathLike[str], trained: Trained) -> Catalogue:
        """A catalogue that is there.

        Args:
            out: folder of the catalogue.
            trained: the embedder that made it.

        Raises:
            FileNotFoundError: there is no catalogue.
            ValueError: it is of another embedder, damaged, or was interrupted while being written.
        """
        out = Path(out)
        content, index = _read(out, trained)
        return cls(trained, content, index, Changes(kept=len(content.paths)))

    def search(
        self,
        pictures: Picture | Iterable[Picture],
        k: int = 10,
        by: Ranking = "distance",
        candidates: int = 100,
    ) -> list[list[Match]]:
        """What is nearest to each picture: the index's candidates, in the order of their exact values.

        Args:
            pictures: one or several, as the embedder takes them.
            k: how many of each, best first; all where there are fewer.
            by: ``"distance"``, the unit's ``"score"``, or the adaptive distance by the picture's ``"structure"``.
            candidates: how many of the nearest by distance are looked at; at least ``k`` are.

        Raises:
            TypeError, ValueError, OSError: pictures as :class:`.trained.Trained` says, a number below 1, or what ranks
                is not there.
        """
        _numbers.size("k", k)
        _numbers.size("candidates", candidates)
        self._can(by)
        features, structures = self.trained.both(pictures)
        queries = features.numpy()
        rows = self._nearest(queries, max(k, candidates))
        return [
            self._ranked(query, None if structures is None else structures[place].numpy(), near, by)[:k]
            for place, (query, near) in enumerate(zip(queries, rows, strict=True))
        ]

    def same(
        self,
        a: Picture,
        b: Picture,
        fpr: float | str | None = None,
        *,
        threshold: float | None = None,
        by: Ranking = "distance",
    ) -> bool:
        """Whether two pictures are of the same class.

        Args:
            a, b: pictures, or paths in the catalogue as ``paths`` has them, whose features are there.
            fpr: the rate of false positives, on the run's validation pictures, that chose the threshold: 0.01 (the
                default), 0.001 or ``"eer"`` (:meth:`.trained.Trained.threshold`).
            threshold: one of your own in its place: a distance (by structure, of b from a) at or below which, or a
                score at or above which, they are the same.
            by: as in :meth:`search`.

        Raises:
            TypeError, ValueError, OSError: as :meth:`search`; both or a bad one of ``fpr`` and ``threshold``; or the
                run had no validation pictures.
        """
        self._can(by)
        if threshold is None:
            threshold = self.trained.threshold(by, 0.01 if fpr is None else fpr)
        elif fpr is not None:
            raise ValueError(f"fpr is {fpr} and threshold {threshold}; one of them is accepted")
        elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise ValueError(f"threshold is {threshold!r}; a finite number is accepted")
        (x, structure), (y, _) = self._known(a), self._known(b)
        value = self._values(x, structure, y[None], by)[0]
        return bool(value >= threshold if by == "score" else value <= threshold)

    def _can(self, by: str) -> None:
        if by not in RANKINGS:
            raise ValueError(f"by is {by!r}; {', '.join(RANKINGS)} are accepted")
        method = self.trained.settings.method
        if by == "score" and self.trained.unit is None:
            raise ValueError(f"by is 'score'; the embedder was trained by {method}, without a PDDM unit")
        if by == "structure" and self.structures is None:
            raise ValueError("by is 'structure'; the embedder has no structure head, which --structure trains")

    def _known(self, picture: Any) -> tuple[Floats, Floats | None]:
        """Feature and structure of a picture, or of a path in the catalogue."""
        row = self._row.get(os.fspath(picture)) if isinstance(picture, (str, os.PathLike)) else None
        if row is not None:
            return self.features[row], None if self.structures is None else self.structures[row]
        features, structures = self.trained.both(picture)
        if len(features) != 1:
            raise ValueError(f"{len(features)} pictures are given; one, or a path in the catalogue, is accepted")
        return features[0].numpy(), None if structures is None else structures[0].numpy()

    def _nearest(self, queries: Floats, count: int) -> Sequence[Rows]:
        """The rows of some ``count`` nearest pictures of each query; all where there are no more."""
        if count >= len(self):
            return [np.arange(len(self))] * len(queries)
        if len(queries) == 0:
            return []
        if self.index == "hnsw":
            self._index.hnsw.efSearch = 2 * count
        rows: Rows = self._index.search(queries, count)[1]
        short = (rows < 0).any(1)  # too few in the lists that were looked into
        if short.any():
            rows[short] = faiss.knn(queries[short], np.asarray(self.features), count)[1]
        return list(rows)

    def _ranked(self, query: Floats, structure: Floats | None, rows: Rows, by: str) -> list[Match]:
        near = self.features[rows]
        distances = _distances(query, near)
        values = distances if by == "distance" else self._values(query, structure, near, by)
        # NaN, of a score, sorts last; ties go to the nearer, then to the lower row.
        order = np.lexsort((rows, distances, -values if by == "score" else values))
        return [
            Match(
                self.paths[rows[place]],
                self.labels[rows[place]],
                float(distances[place]),
                score=float(values[place]) if by == "score" else None,
                adaptive=float(values[place]) if by == "structure" else None,
            )
            for place in order
        ]

    def _values(self, query: Floats, structure: Floats | None, near: Floats, by: str) -> NDArray[np.float64]:
        """What ranks rows (m, dim) near a query (dim,)."""
        if by == "distance":
            return _distances(query, near)
        x, y = torch.from_numpy(query[None].copy()), torch.from_numpy(near.copy())
        if by == "structure":
            assert structure is not None
            weights = torch.from_numpy(structure[None].astype(np.float64))
            values = pddm_ext.adaptive_distance(x.double(), weights, y.double())[0]
        else:
            unit = self.trained.unit
            assert unit is not None
            rows = torch.cat([x, y]).to(unit.u.weight.device)
            j = torch.arange(1, len(rows), device=rows.device)
            values = pddm_ext.score_pairs(rows, torch.zeros_like(j), j, unit)
        return values.double().cpu().numpy()


def _distances(query: Floats, near: Floats) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.linalg.norm(near.astype(np.float64) - query.astype(np.float64), axis=1)
    return distances


def _label(path: str) -> str | None:
    return path.rpartition("/")[0] or None


def _walk(
    folder: Path, inside: str, passed_over: Counter[str], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Relative paths of pictures, with size and time; links are followed, but not around in a circle."""
    known, status = extensions(), os.stat(folder / inside)
    this = (status.st_dev, status.st_ino)
    if this in above:
        return
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # archivers leave files like ._one.jpg beside the pictures
                continue
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir():
                yield from _walk(folder, path, passed_over, (*above, this))
                continue
            kind = os.path.splitext(entry.name)[1].lower()
            if kind not in known:
                passed_over[kind or "no extension"] += 1
                continue
            try:
                status = entry.stat()
                yield path, (status.st_size, status.st_mtime_ns)
            except OSError:  # a link to nowhere, which reading will name
                yield path, (-1, 0)


def _by_size(count: int) -> str:
    return "flat" if count <= FLAT else "hnsw" if count <= HNSW else "ivf-pq"


def _enough(folder: Path, count: int, index: str) -> None:
    if count == 0:
        raise ValueError(
            f"{folder}: no readable pictures; {', '.join(extensions())} are looked for, in folders of any depth"
        )
    if index == "ivf-pq" and count < _CENTRES:
        raise ValueError(
            f"index is 'ivf-pq', which learns {_CENTRES} centres from the pictures; {folder} has {count} of them. "
            f"'flat' is exact, and quick for so few"
        )


def _before(out: Path, trained: Trained, folder: Path) -> tuple[_Content, str]:
    """The catalogue to go on from, which is empty where there is none to, and then why."""
    none = np.empty((0, trained.dim), np.float32)
    nothing = _Content(trained.digest, "", "", (), (), (), none, none if trained.structured else None)
    try:
        content, _ = _read(out)
    except FileNotFoundError:
        return nothing, ""
    except _TornError as error:
        return nothing, str(error)
    if content.digest != trained.digest:
        return nothing, f"{out} was embedded by another checkpoint"
    if content.folder != str(folder.resolve()):
        return nothing, f"{out} is of another folder, {content.folder}"
    return content, ""


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


def _embedded(
    trained: Trained, folder: Path, paths: Sequence[str], workers: int, skip_unreadable: bool, progress: bool | None
) -> tuple[dict[str, list[Floats]], list[str]]:
    """The feature of each path, and its structure where the net has a head for it; and errors at unreadable pictures.

    Where these are to end it nothing is embedded after the first one, and the others are looked for.
    """
    chunks = [list(range(start, min(start + BATCH, len(paths)))) for start in range(0, len(paths), BATCH)]
    loader: Iterable[Any] = DataLoader(
        _Files(folder, paths, trained.view),  # type: ignore[arg-type]
        batch_size=None,
        sampler=chunks,
        num_workers=min(workers, len(chunks)),
        generator=torch.Generator(),  # else it draws from torch's own
    )
    embedded: dict[str, list[Floats]] = {}
    unreadable: list[str] = []
    with Progress("embedding", len(paths), 0, "picture", progress if paths else False) as bar:
        for chunk, (rows, stored, errors) in zip(chunks, loader, strict=True):
            unreadable += errors
            if rows and (skip_unreadable or not unreadable):
                columns = [values.numpy() for values in trained.embed(stored) if values is not None]
                for row, *values in zip(rows, *columns, strict=True):
                    if not all(np.isfinite(value).all() for value in values):
                        raise ValueError(f"{folder / paths[row]}: its feature is not finite")
                    embedded[paths[row]] = values
            for _ in chunk:
                bar.update()
            if chunk[-1] % (BATCH * 32) >= BATCH * 31 or chunk is chunks[-1]:
                bar.report(f"{len(unreadable)} unreadable")
    if unreadable and not skip_unreadable:
        listed = "; ".join(unreadable)
        raise ValueError(
            f"{len(unreadable)} of {len(paths)} pictures cannot be read: {listed}; --skip-unreadable leaves them out"
        )
    return embedded, unreadable


def _indexed(kind: str, features: Floats) -> Any:
    count, dim = features.shape
    index: Any
    if kind == "flat":
        index = faiss.IndexFlatL2(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32)
        index.hnsw.efConstruction = 100
    else:
        # faiss asks for 39 pictures to learn a list from. A code of a byte for two numbers; an odd one is turned first.
        # np: without polysemous training, which takes minutes for a search that is not used.
        lists, codes = max(1, min(int(4 * math.sqrt(count)), count // 39)), -(-dim // 2)
        turn = f"RR{2 * codes}," if dim % 2 else ""
        index = faiss.index_factory(dim, f"{turn}IVF{lists},PQ{codes}np")
        inverted: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        inverted.nprobe = max(1, lists // 16)
        inverted.pq.cp.min_points_per_centroid = 1  # else it warns of a small catalogue
        index.train(features)
    index.add(features)
    return index


def _write(out: Path, content: _Content, index: Any) -> None:
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
            "labels": [_label(path) for path in content.paths],
            "sizes": content.sizes,
            "mtimes": content.mtimes,
        }
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
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
        for name, path in temporary.items():
            os.replace(path, out / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    if structures is None:
        (out / STRUCTURES).unlink(missing_ok=True)


def _sha(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


class _TornError(ValueError):
    """Files that are not of one catalogue."""


def _read(out: Path, trained: Trained | None = None) -> tuple[_Content, Any]:
    """A catalogue's content, and its index; where an embedder is given, of that one."""
    path = out / FACTS
    torn = _TornError(f"{out} was interrupted while being written; {_ANEW}")
    if not path.is_file():
        if (out / FEATURES).exists():
            raise torn
        raise FileNotFoundError(f"{out}: no catalogue; 'pddm-ext embed' writes one")
    try:
        facts = json.loads(path.read_text("utf-8"))
        found = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of a catalogue; delete it, or choose another folder") from error
    if found != FORMAT:
        raise ValueError(
            f"{path}: a catalogue of format {found!r}; pddm_ext {pddm_ext.__version__} reads {FORMAT}; "
            f"a newer one reads it, or delete the catalogue"
        )
    if trained is not None and facts.get("digest") != trained.digest:
        raise ValueError(f"{out} was embedded by another checkpoint; {_ANEW}")
    try:
        paths, sizes, mtimes = (tuple(facts[name]) for name in ("paths", "sizes", "mtimes"))
        files = facts["files"]
        if not {FEATURES, INDEX} <= files.keys() <= {FEATURES, INDEX, STRUCTURES}:
            raise torn
        if any(_sha(out / name) != digest for name, digest in files.items()):
            raise torn
        features, *structures = (
            np.load(out / name, mmap_mode="r", allow_pickle=False) for name in (FEATURES, STRUCTURES) if name in files
        )
        index = faiss.deserialize_index(np.fromfile(out / INDEX, np.uint8))
    except (KeyError, TypeError, AttributeError, ValueError, FileNotFoundError, RuntimeError) as error:
        raise torn from error
    if not len(paths) == len(sizes) == len(mtimes) == len(features) == index.ntotal:
        raise torn
    content = _Content(
        facts["digest"],
        facts["folder"],
        facts["index"],
        paths,
        sizes,
        mtimes,
        features,
        structures[0] if structures else None,
    )
    return content, index
