"""Rankings of test pictures for queries among them, and the retrieval figures that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

import pddm_ext
from pddm_ext import _numbers

from ..similarity import Similarity
from . import inputs

KS = (1, 2, 4, 8)

# Entries of the rankings that are in memory at once, and draws of a bootstrap.
_ENTRIES = 2**21
_RESAMPLES = 2000


def by_distance(features: Tensor, queries: Tensor, k: int, gallery: Tensor | None = None) -> Tensor:
    """The k nearest other rows (Euclidean) of each query, nearest first.

    Args:
        features: (n, d), compared in float32.
        queries: (q,) int64 rows of ``features``.
        k: 1 to the rows that are searched among, less one if a query is one of them.
        gallery: (g,) int64 distinct rows of ``features`` to search among; all of them without it.

    Returns:
        (q, k) int64 rows of ``features``, of the gallery; never the query itself.

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape or gallery that is not accepted, or k.
        IndexError: a query, or a row of the gallery, is no row.
        FloatingPointError: a feature is not finite.
    """
    features = inputs.features(features)

    def search(queries: Tensor, among: Tensor, k: int) -> Tensor:
        index = faiss.IndexFlatL2(features.shape[1])
        index.add(among.numpy())
        _, ranked = index.search(queries.numpy(), k)
        return torch.from_numpy(ranked)

    return _ranked(features, queries, k, gallery, search)


def by_score(
    features: Tensor, queries: Tensor, k: int, unit: Similarity | pddm_ext.PDDM, gallery: Tensor | None = None
) -> Tensor:
    """:func:`by_distance` with the score in the distance's place, best first; NaN scores come last."""
    similarity = Similarity.of(unit)
    features = inputs.features(features, scored=True).to(similarity.device)

    def search(queries: Tensor, among: Tensor, k: int) -> Tensor:
        return similarity.best(queries, among, k)

    return _ranked(features, queries, k, gallery, search)


def _ranked(
    features: Tensor,
    queries: Tensor,
    k: int,
    gallery: Tensor | None,
    search: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """What ``search`` (queries, gallery, k) finds, as rows of ``features``, without the queries themselves."""
    queries = inputs.queries(queries, len(features))
    gallery = inputs.gallery(gallery, len(features))
    size = len(features) if gallery is None else len(gallery)
    itself = gallery is None or bool(torch.isin(queries, gallery).any())
    inputs.neighbours(k, size - itself, gallery is not None)
    among = features if gallery is None else features[gallery.to(features.device)]
    ranked = search(features[queries.to(features.device)], among, k + itself)
    ranked = ranked if gallery is None else gallery[ranked]
    return _others(ranked, queries) if itself else ranked


def rerank(
    features: Tensor, queries: Tensor, ranked: Tensor, unit: Similarity | pddm_ext.PDDM, candidates: int
) -> Tensor:
    """A ranking (q, k) of the queries (q,) whose first ``candidates`` columns are put in the order of the score.

    The rows ranked are those of the gallery that was searched: this one adds none.
    Equal scores, and the columns after the candidates, keep their order; NaN scores come last among the candidates.
    """
    features = inputs.features(features, scored=True)
    queries = inputs.queries(queries, len(features))
    ranked = inputs.ranked(ranked, queries, len(features))
    _numbers.size("candidates", candidates)
    first, rest = ranked[:, :candidates], ranked[:, candidates:]
    scores = Similarity.of(unit).pairs(features, queries.repeat_interleave(first.shape[1]), first.flatten())
    # Ascending, since a sort takes NaN for the largest value.
    order = (-scores.cpu().reshape(first.shape)).sort(dim=1, stable=True).indices
    return torch.cat([first.gather(1, order), rest], dim=1)


def by_structure(features: Tensor, structure: Tensor, queries: Tensor, ranked: Tensor, candidates: int) -> Tensor:
    """:func:`rerank` by the adaptive distance from the query, whose structure is its row of ``structure`` (n, d)."""
    _numbers.size("candidates", candidates)
    first, rest = ranked[:, :candidates], ranked[:, candidates:]
    return torch.cat([pddm_ext.structure_rerank(features[queries], structure[queries], features, first), rest], dim=1)


def _others(ranked: Tensor, queries: Tensor) -> Tensor:
    """One column less: the query's own row left out wherever it stands, or else the last one."""
    out = ranked == queries[:, None]
    out[:, -1] |= ~out.any(1)
    return ranked[~out].reshape(len(ranked), -1)


def relevant(labels: Tensor, gallery: Tensor | None = None) -> Tensor:
    """How many other rows, of the gallery (g,) if there is one, have each row's label: (n,) int64.

    Labels are (n,) integers.
    """
    labels = inputs.classes(labels, None)
    _, among = inputs.sides(None, gallery, len(labels))
    counts = torch.bincount(labels[among], minlength=int(labels.max()) + 1 if len(labels) else 0)
    others = counts[labels]
    others[among] -= 1
    return others


def per_query(ranked: Tensor, queries: Tensor, labels: Tensor, gallery: Tensor | None = None) -> Tensor:
    """Recall@1, 2, 4, 8, MAP@R and R-precision of each query: (q, 6) float64 in [0, 1].

    R is the number of other rows of the query's class (Musgrave, Belongie & Lim, *A Metric Learning Reality Check*,
    ECCV 2020), of those in the gallery.

    Args:
        ranked: (q, k) int64 rows of the gallery, k at least the largest R and 8, or all other rows.
        queries: (q,) int64 rows, each with another row of its class in the gallery.
        labels: (n,) integers.
        gallery: (g,) int64 distinct rows that were searched among; all of them without it.

    Raises:
        TypeError: something is no integers.
        ValueError: a shape or gallery that is not accepted, or a query without an answer.
        IndexError: a row that is not there.
    """
    labels = inputs.classes(labels, None)
    queries = inputs.queries(queries, len(labels))
    ranked = inputs.ranked(ranked, queries, len(labels))
    r = relevant(labels, gallery)[queries][:, None]
    if not r.all():
        row = int(queries[r[:, 0].argmin()])
        alone = "is alone in its class" if gallery is None else "has no other row of its class in the gallery"
        raise ValueError(f"queries has row {row}, which {alone}")
    if gallery is not None:
        outside = torch.ones(len(labels), dtype=torch.bool)
        outside[gallery.cpu().long()] = False
        if outside[ranked].any():
            raise ValueError(f"ranked has row {int(ranked[outside[ranked]][0])}, which is not in the gallery")
    hits = labels[ranked] == labels[queries][:, None]
    place = torch.arange(1, ranked.shape[1] + 1)
    within = (hits & (place <= r)).double()
    found = within.cumsum(1)
    recall = [hits[:, :k].any(1).double() for k in KS]
    return torch.stack([*recall, (within * found / place / r).sum(1), (within / r).sum(1)], dim=1)


def summary(figures: Tensor, seed: int) -> dict[str, Any]:
    """Means over the queries, q ≥ 2, of :func:`per_query`'s (q, 6), with 95 % bootstrap intervals over the queries.

    Returns:
        ``{"recall": {"1": point, …, "8": point}, "map_at_r": point, "r_precision": point}`` of points
        ``{"value", "low", "high"}``.
    """
    values, q = figures.numpy().T, len(figures)

    def means(draws: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        # How often each query was drawn does for all figures at once.
        counts = np.stack([np.bincount(draw, minlength=q) for draw in draws])
        result: NDArray[np.float64] = values @ counts.T / q
        return result

    interval = bootstrap(
        (np.arange(q),),
        means,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _ENTRIES // q),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    points = [
        {"value": float(value), "low": float(low), "high": float(high)}
        for value, low, high in zip(values.mean(1), interval.low, interval.high, strict=True)
    ]
    recall = {str(k): point for k, point in zip(KS, points, strict=False)}
    return {"recall": recall, "map_at_r": points[-2], "r_precision": points[-1]}


def retrieval(
    features: Tensor,
    labels: Tensor,
    unit: Similarity | pddm_ext.PDDM | None,
    seed: int,
    candidates: int,
    structure: Tensor | None = None,
    queries: Tensor | None = None,
    gallery: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """The :func:`summary` of each ranking for the queries with an answer, another row of their class in the gallery.

    Args:
        features: (n, d).
        labels: (n,) integers.
        unit: ranks, too, where there is one, on its own device.
        seed: of the intervals.
        candidates: how many of the nearest rows are re-ranked, at least 1.
        structure: (n, d) weights that re-rank, too, where they are given.
        queries: (q,) int64 distinct rows that are searched for; all of them without it.
        gallery: (g,) int64 distinct rows that are searched among; all of them without it. A query among them does not
            find itself.

    Returns:
        Summaries of ``"distance"``; with a unit, ``"score"`` (of the whole gallery) and ``"rerank"`` (the nearest rows
        by distance in the order of their scores); with a structure, ``"structure"`` (the nearest rows by distance in
        the order of their adaptive distances).

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape, labels, queries or a gallery that are not accepted, or candidates; fewer than two queries
            with an answer.
        IndexError: a query, or a row of the gallery, is no row.
        FloatingPointError: a feature is not finite.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    _numbers.size("candidates", candidates)
    asked = answered(labels, queries, gallery, least=2)
    most = int(relevant(labels, gallery)[asked].max())
    figures: dict[str, Tensor] = {}
    for places, others in _alike(asked, gallery, len(labels)):
        k = min(others, max(*KS, most))
        wide = k if unit is None and structure is None else min(others, max(k, candidates))
        for part in torch.split(places, max(1, _ENTRIES // wide)):
            chunk = asked[part]
            ranked = by_distance(features, chunk, wide, gallery)
            rankings = {"distance": ranked}
            if unit is not None:
                rankings["score"] = by_score(features, chunk, k, unit, gallery)
                rankings["rerank"] = rerank(features, chunk, ranked, unit, candidates)
            if structure is not None:
                rankings["structure"] = by_structure(features, structure, chunk, ranked, candidates)
            for kind, ranking in rankings.items():
                each = figures.setdefault(kind, torch.empty(len(asked), len(KS) + 2, dtype=torch.float64))
                each[part] = per_query(ranking[:, :k], chunk, labels, gallery)
    return {kind: summary(each, seed) for kind, each in figures.items()}


def recall_at_k(
    features: Tensor, labels: Tensor, queries: Tensor | None = None, gallery: Tensor | None = None
) -> dict[int, float]:
    """Share of queries with their own class among the K nearest other rows (Euclidean), for K = 1, 2, 4, 8.

    Queries without an answer are left out, as in :func:`retrieval`. Features are (n, d), labels (n,) integers, queries
    and gallery rows.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError: as :func:`retrieval` says; one query will do.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    asked = answered(labels, queries, gallery)
    hits = torch.zeros(len(asked), max(KS), dtype=torch.bool)
    for places, others in _alike(asked, gallery, len(labels)):
        k = min(others, max(KS))
        ranked = by_distance(features, asked[places], k, gallery)
        hits[places, :k] = labels[ranked] == labels[asked[places]][:, None]
    return {k: hits[:, :k].any(1).double().mean().item() for k in KS}


def answered(labels: Tensor, queries: Tensor | None = None, gallery: Tensor | None = None, least: int = 1) -> Tensor:
    """The queries with another row of their class in the gallery: (a,) int64 rows, in the queries' order.

    Args:
        labels: (n,) integers.
        queries: (q,) int64 distinct rows; all of them without it.
        gallery: (g,) int64 distinct rows; all of them without it.
        least: how many there have to be.

    Raises:
        TypeError: something is no integers.
        ValueError: a shape, queries or a gallery that are not accepted, or fewer than ``least``.
        IndexError: a row that is not there.
    """
    asked, _ = inputs.sides(queries, gallery, len(labels))
    found = asked[relevant(labels, gallery)[asked] > 0]
    if len(found) < least:
        if queries is None and gallery is None:
            raise ValueError("labels have no class of two rows or more; at least one is accepted")
        raise ValueError(
            f"{len(found)} of the {len(asked)} queries have another row of their class in the gallery; at least "
            f"{least} {'is' if least == 1 else 'are'} accepted"
        )
    return found


def _alike(queries: Tensor, gallery: Tensor | None, length: int) -> Iterator[tuple[Tensor, int]]:
    """Places of the queries that are rows of the gallery, then of those that are not, each with how many others are
    searched among; without places nothing."""
    inside = torch.ones(len(queries), dtype=torch.bool) if gallery is None else torch.isin(queries, gallery)
    size = length if gallery is None else len(gallery)
    for places, others in ((inside.nonzero().flatten(), size - 1), ((~inside).nonzero().flatten(), size)):
        if len(places):
            yield places, others
