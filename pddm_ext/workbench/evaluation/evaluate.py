"""All figures of an embedding on the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pddm_ext
from pddm_ext import _checks, _numbers

from ..console import Progress
from ..data.splits import Pictures, TestSet
from ..interrupts import uninterrupted
from ..model import pieces
from ..similarity import Similarity
from . import inputs
from .probes import clustering, transfer, zero_shot
from .retrieval import answered, retrieval
from .separation import effective_rank, separation, spread


def over(
    pictures: TestSet | Pictures,
    call: Callable[[Tensor], Sequence[Tensor]],
    net: nn.Module,
    workers: int,
    bar: Progress,
) -> tuple[Tensor, ...]:
    """What ``call`` gives for all pictures, row by row, on the CPU.

    Args:
        pictures: of a test set, or stored ones.
        call: gets them in parts, of the dtype and on the device of the net, which is in evaluation mode meanwhile.
        net: what ``call`` uses.
        workers: processes that read the pictures.
        bar: gets the pictures done.
    """
    was_training, weight = net.training, next(net.parameters())
    rows = torch.split(torch.arange(len(pictures)), 256)
    # Its own generator, for a loader draws from torch's once on every use.
    loader: Iterable[Tensor] = DataLoader(
        pictures,  # type: ignore[arg-type]
        batch_size=None,
        sampler=rows,
        num_workers=min(workers, len(rows)),
        generator=torch.Generator(),
    )
    parts: list[list[Tensor]] = []
    net.eval()
    try:
        with torch.no_grad():
            with uninterrupted():
                drawn = iter(loader)
            for lot in drawn:
                for piece in pieces(lot.to(weight)):
                    parts.append([rows.cpu() for rows in call(piece)])
                    bar.update(len(piece))
    finally:
        net.train(was_training)
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def measure(
    features: Tensor,
    labels: Tensor,
    unit: Similarity | pddm_ext.PDDM | None,
    *,
    seed: int,
    candidates: int = 100,
    structure: Tensor | None = None,
    queries: Tensor | None = None,
    gallery: Tensor | None = None,
) -> dict[str, Any]:
    """Every figure of given features: by distance, with a unit by its score, and with a structure re-ranked by that.

    Rankings and pairs are those of the queries with the gallery, clusters those of the queries, and the probes learn
    the gallery's rows and are tested on the queries (:func:`.probes.learned`); spread and effective rank are of either.

    Args:
        features: (n, d) unit rows (or zero ones, as ``normalize`` leaves them), of any floating dtype and on any
            device; measured in float32 on the CPU, without a gradient.
        labels: (n,) of any integer dtype; two classes or more have a query with an answer, another row of its class in
            the gallery. No figure depends on the numbers that the classes have.
        unit: what scores, on any device, or None; a unit alone is meant with its own score.
        seed: from 0, of whatever is drawn: the same gives the same figures.
        candidates: how many of the nearest rows are re-ranked, by score or by structure.
        structure: (n, d) positive weights, of any floating dtype, or None.
        queries: (q,) distinct rows that are searched for, of any integer dtype; every row without it.
        gallery: (g,) distinct rows that are searched among; every row without it. No query finds itself.

    Returns:
        ``results`` (:func:`.retrieval.retrieval`), ``left_out``, the number of queries without an answer, which no
        ranking counts, ``clustering`` (:func:`.probes.clustering`), ``transfer``, ``zero_shot``, ``pairs``
        (:func:`.separation.separation`), ``spread`` and ``effective_rank``, all as plain numbers that JSON can hold,
        None where there is nothing to measure.

    Raises:
        TypeError: an argument that is no tensor, unit or int, or a dtype or layout that is not accepted.
        ValueError: shapes, norms, labels, queries, a gallery, a unit or candidates that cannot be evaluated.
        IndexError: a query, or a row of the gallery, is no row.
        FloatingPointError: a feature, a structure or a score is not finite.
    """
    features = inputs.features(features, unit=True)
    labels = inputs.classes(labels, len(features))
    asked, among = inputs.sides(queries, gallery, len(features))
    found = answered(labels, queries, gallery, least=0)
    classes = len(torch.unique(labels[found]))
    if classes < 2:
        of = "labels have {} classes of two rows or more"
        if queries is not None or gallery is not None:
            of = "queries have {} classes of which the gallery has another row"
        raise ValueError(f"{of.format(classes)}; at least 2 are accepted")
    _numbers.size("candidates", candidates)
    inputs.seed(seed)
    if unit is not None:
        _checks._unit(unit.unit if isinstance(unit, Similarity) else unit, features.shape[1])
    if structure is not None:
        structure = inputs.features(structure, "structure")
        if structure.shape != features.shape or not (structure > 0).all():
            raise ValueError(
                f"structure has shape {tuple(structure.shape)} and values from {structure.min():.4g}; "
                f"{tuple(features.shape)}, as features have, and positive values are accepted"
            )
    either = torch.zeros(len(features), dtype=torch.bool).index_fill(0, torch.cat([asked, among]), True)
    used = features if either.all() else features[either]
    return {
        "results": retrieval(features, labels, unit, seed, candidates, structure, queries, gallery),
        "left_out": len(asked) - len(found),
        "clustering": clustering(features, labels, seed, queries),
        "transfer": transfer(features, labels, seed, queries, gallery),
        "zero_shot": zero_shot(features, labels, seed, queries, gallery),
        "pairs": separation(features, labels, unit, seed, queries, gallery),
        "spread": spread(used),
        "effective_rank": effective_rank(used),
    }
