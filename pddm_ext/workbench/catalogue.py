"""A catalogue of pictures: their features in files, an index of them, and what in it is nearest to a picture."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

import pddm_ext
from pddm_ext import _numbers

from . import catalogue_files as files
from . import checkpoint
from .catalogue_files import Content, Floats, label
from .data.photos import no_files
from .data.reading import extensions
from .embedding import embed, now_and_then, walk
from .trained import Picture, Trained

#: What was embedded before :meth:`Catalogue.build` was stopped: a folder within the catalogue's, a catalogue itself.
UNFINISHED = ".unfinished"
_MINUTE = 60.0  # seconds between two times that it is written
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

Rows = NDArray[np.int64]
Index = Literal["auto", "flat", "hnsw", "ivf-pq"]
Ranking = Literal["distance", "score", "structure"]


@dataclass(frozen=True)
class Match:
    """A picture of the catalogue beside one that was searched for.

    Attributes:
        path: relative to the catalogue's folder.
        label: the folder that it lies in, relative to the catalogue's; None where that is the catalogue's itself.
        distance: Euclidean, of unit features: 0 to 2.
        score: as :meth:`.Trained.score`, where it ranks; the larger, the more alike.
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
        no_files: broken links and special files, which are passed over, too.
    """

    new: int = 0
    changed: int = 0
    gone: int = 0
    kept: int = 0
    anew: str = ""
    unreadable: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    no_files: tuple[str, ...] = ()

    def said(self) -> list[str]:
        """In lines for people."""
        lines = [f"left out: {reason}" for reason in self.unreadable]
        if self.passed_over:
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.passed_over.items()))
            count = sum(self.passed_over.values())
            what = "files that are no pictures" if count > 1 else "file that is no picture"
            lines.append(f"passed over {count} {what} by name: {kinds}")
        if self.no_files:
            lines.append(f"passed over: {no_files(self.no_files)}")
        if self.anew:
            lines.append(f"all embedded: {self.anew}")
        return [*lines, f"{self.new} new, {self.changed} changed, {self.gone} gone, {self.kept} kept"]


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

    def __init__(self, trained: Trained, content: Content, index: Any, changes: Changes) -> None:
        self.trained, self.changes = trained, changes
        self.folder, self.paths, self.index = Path(content.folder), content.paths, content.index
        self.labels = tuple(map(label, content.paths))
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
        folders whose names start with a dot are passed over, and so are links to nowhere. Of a catalogue of the same
        folder by the same embedder only files whose size or time is another are embedded again. Until all is written
        the old catalogue stays; what was embedded by then is kept for the next time, in a process that was killed the
        most of it.

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
        lost: list[str] = []
        found = dict(sorted(walk(folder, "", passed_over, lost, ())))
        _enough(folder, len(found), index)
        with checkpoint.claimed(out):
            before, anew = _before(out, trained, folder)
            kept = before.unchanged(found)
            embedded = {
                path: rows
                for path, rows in _before(out / UNFINISHED, trained, folder)[0].unchanged(found).items()
                if path not in kept
            }
            if _differs(trained, folder, {**kept, **embedded}):
                kept, embedded = {}, {}
                anew = "the same pictures have other features now; the backbone's code or arithmetic has changed"
            rest = [path for path in found if path not in kept and path not in embedded]

            def keep() -> None:
                _write(out / UNFINISHED, trained, folder, "flat", found, embedded)

            try:
                unreadable = embed(
                    trained, folder, rest, workers, skip_unreadable, progress, embedded, now_and_then(keep, _MINUTE)
                )
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
                    no_files=tuple(sorted(lost)),
                )
                kind = _by_size(len(paths)) if index == "auto" else index
                if anew or embedded or changes.gone or kind != before.index or not len(before.paths):
                    rows = {path: embedded.get(path) or kept[path] for path in paths}
                    _write(out, trained, folder, kind, found, rows)
            except BaseException:
                if embedded:
                    with suppress(OSError):
                        keep()
                raise
            files.remove(out / UNFINISHED)
            content, made = files.read(out)
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
        content, index = files.read(out, trained)
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
        elif isinstance(threshold, bool) or not isinstance(threshold, Real) or not math.isfinite(threshold):
            raise ValueError(f"threshold is {threshold!r}; a finite number is accepted")
        (x, structure), (y, _) = self._known(a), self._known(b)
        value = self._values(x, structure, y[None], by)[0]
        return bool(value >= threshold if by == "score" else value <= threshold)

    def _can(self, by: str) -> None:
        if by not in RANKINGS:
            raise ValueError(f"by is {by!r}; {', '.join(RANKINGS)} are accepted")
        method = self.trained.settings.method
        if by == "score" and self.trained.unit is None:
            raise ValueError(f"by is 'score'; the embedder was trained by {method}, {self.trained.lacks}")
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
            similarity = self.trained.similarity
            assert similarity is not None
            j = torch.arange(1, len(near) + 1)
            values = similarity.pairs(torch.cat([x, y]), torch.zeros_like(j), j)
        return values.double().cpu().numpy()


def _distances(query: Floats, near: Floats) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.linalg.norm(near.astype(np.float64) - query.astype(np.float64), axis=1)
    return distances


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


def indexed(kind: str, features: Floats) -> Any:
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


def _before(out: Path, trained: Trained, folder: Path) -> tuple[Content, str]:
    """The catalogue to go on from, which is empty where there is none to, and then why."""
    none = np.empty((0, trained.dim), np.float32)
    nothing = Content(trained.digest, "", "", (), (), (), none, none if trained.structured else None)
    try:
        content, _ = files.read(out)
    except FileNotFoundError:
        return nothing, ""
    except files.TornError as error:
        return nothing, str(error)
    if content.digest != trained.digest:
        return nothing, f"{out} was embedded by another checkpoint"
    if content.folder != str(folder.resolve()):
        return nothing, f"{out} is of another folder, {content.folder}"
    return content, ""


def _differs(trained: Trained, folder: Path, kept: Mapping[str, Sequence[Floats]]) -> bool:
    """Whether features are others than those kept, by a few: weights say nothing of the code that uses them."""
    asked = list(kept)[:: max(1, len(kept) // 2)]
    now: dict[str, list[Floats]] = {}
    embed(trained, folder, asked, 0, True, False, now)
    return any(
        not np.allclose(old, new, rtol=1e-2, atol=1e-2 * float(np.abs(new).mean()))
        for path, rows in now.items()
        for old, new in zip(kept[path], rows, strict=True)
    )


def _write(
    out: Path,
    trained: Trained,
    folder: Path,
    kind: str,
    found: Mapping[str, tuple[int, int]],
    rows: Mapping[str, Sequence[Floats]],
) -> None:
    """A catalogue of pictures, with size and time, by their features and structures."""
    features, *structures = (np.stack(column) for column in zip(*rows.values(), strict=True))
    sizes, mtimes = zip(*(found[path] for path in rows), strict=True)
    content = Content(
        trained.digest,
        str(folder.resolve()),
        kind,
        tuple(rows),
        sizes,
        mtimes,
        features,
        structures[0] if structures else None,
    )
    out.mkdir(exist_ok=True)
    files.write(out, content, indexed(kind, features))
