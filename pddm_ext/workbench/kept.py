"""What a frozen backbone makes of the pictures: computed once, and kept on disk."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from .checkpoint import digest, write_bytes
from .console import Progress
from .data.augment import described
from .data.photos import Photos
from .data.splits import Dataset, Joined, Pictures, Rows, TestSet
from .evaluation.evaluate import over
from .model import Embedder

#: So many features are computed anew where a file has them: code may have changed where weights have not.
_PROBED = 8
#: The length of the SHA-256 at a file's end, which numpy does not read.
_DIGEST = hashlib.sha256().digest_size


class Kept:
    """Features (n, f) of a data set's pictures, plain, by a backbone that does not change.

    Those of a file are of the same pictures, backbone, weights, view and precision: its name is their digest, with
    the times of photographs' files. So runs that share a folder and a backbone share them. Where pictures are seen by a
    view of the user's own, which has no digest, they are in memory alone. A file ends with its own SHA-256.

    Args:
        net: whose backbone makes them, in evaluation mode, on its device.
        dataset: the pictures of all its sides.
        folder: of the files; None keeps them in memory alone.
        workers: processes that read the pictures.
        progress: over the pictures, as in :class:`.console.Progress`.

    Raises:
        FloatingPointError: a feature is not finite.
        OSError: the folder is not to be written to.
    """

    def __init__(
        self, net: Embedder, dataset: Dataset, folder: Path | None, *, workers: int = 0, progress: bool | None = False
    ) -> None:
        self._net, self._view, self._workers, self._progress = net, dataset.view, workers, progress
        view = described(dataset.view)
        self._folder = None if view is None else folder
        facts = {"view": view, "backbone": repr(net.backbone), "dtype": str(next(net.parameters()).dtype)}
        self._of_backbone = digest(net.backbone.state_dict(), facts)
        self._bases: dict[int, tuple[Pictures, Tensor, Tensor]] = {}  # of each: used rows, and their features
        sides = [dataset.train]
        if not dataset.distort_test:
            sides += [side for side in (dataset.test, dataset.gallery, dataset.val) if side is not None]
        used: dict[int, tuple[Pictures, list[Tensor], set[str]]] = {}
        for side in sides:
            for base, rows in _origins(side.pictures):
                _, lots, names = used.setdefault(id(base), (base, [], set()))
                lots.append(rows)
                # A part of a split has the digest of the split, and what it is of it after a colon.
                names.add(side.digest.partition(":")[0])
        for number, (base, lots, names) in used.items():
            distinct: Tensor = torch.unique(torch.cat(lots))
            state = [base.state()] if isinstance(base, Photos) else []
            features = self._features(Rows(base, distinct), [*sorted(names), *state, _hash(distinct)], seen=False)
            self._bases[number] = base, distinct, features

    def of(self, pictures: Pictures) -> Tensor:
        """The features (n, f) of a side's pictures, row by row, on the CPU."""
        parts = []
        for base, rows in _origins(pictures):
            _, known, features = self._bases[id(base)]
            parts.append(features[torch.searchsorted(known, rows)])
        return torch.cat(parts)

    def of_test(self, dataset: Dataset, seed: int) -> Tensor:
        """The features (n, f) of ``TestSet(dataset, seed)``, of the data or of what it has to select by."""
        test = TestSet(dataset, seed)
        if test.stored is not None:
            return self.of(test.stored)
        return self._features(test, [dataset.digest(), f"distorted by {seed}"], seen=True)

    def _features(self, pictures: Pictures | TestSet, names: list[str], *, seen: bool) -> Tensor:
        """Of a file where there is one, else computed, and kept."""
        if self._folder is None:
            return self._computed(pictures, seen)
        self._folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256("\n".join([self._of_backbone, *names]).encode()).hexdigest()[:32]
        path = self._folder / f"{key}.npy"
        # Another run that needs them waits for the one that computes them.
        with FileLock(self._folder / ".lock"):
            found = self._read(path, pictures, seen)
            if found is None:
                found = self._computed(pictures, seen)
                buffer = io.BytesIO()
                np.save(buffer, found.numpy(), allow_pickle=False)
                content = buffer.getvalue()
                write_bytes(path, content + hashlib.sha256(content).digest())
        return found

    def _read(self, path: Path, pictures: Pictures | TestSet, seen: bool) -> Tensor | None:
        """The features in a file; None where there is none, or where it is damaged or of other code."""
        try:
            content = path.read_bytes()
            if hashlib.sha256(memoryview(content)[:-_DIGEST]).digest() != content[-_DIGEST:]:
                return None
            found = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        probe = self._computed(pictures, seen, rows=torch.arange(min(_PROBED, len(pictures))))
        if found.dtype != probe.dtype or found.shape != (len(pictures), probe.shape[1]):
            return None
        near = torch.allclose(found[: len(probe)], probe, rtol=1e-2, atol=1e-2 * float(probe.abs().mean()))
        return found if near else None

    def _computed(self, pictures: Pictures | TestSet, seen: bool, rows: Tensor | None = None) -> Tensor:
        view, backbone = self._view, self._net.backbone
        weight = next(self._net.parameters())

        def call(batch: Tensor) -> tuple[Tensor]:
            return (backbone(batch if seen else view.plain(batch).to(weight.dtype)),)

        lot = pictures if rows is None else Rows(pictures, rows)
        show = False if rows is not None else self._progress
        with Progress("backbone features", len(lot), 0, "picture", show) as bar:
            (features,) = over(lot, call, self._net, self._workers if rows is None else 0, bar)
        if not features.isfinite().all():
            raise FloatingPointError("the backbone's features are not finite before any training")
        return features


def _origins(pictures: Pictures) -> Iterator[tuple[Pictures, Tensor]]:
    """Where rows come from: the pictures that are no part of others, and which rows of those."""
    if isinstance(pictures, Joined):
        yield from _origins(pictures.first)
        yield from _origins(pictures.second)
        return
    base, rows = pictures, torch.arange(len(pictures))
    while isinstance(base, Rows):
        rows = base.rows[rows]
        base = base.pictures
    yield base, rows


def _hash(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
