"""Rankings of the test pictures for one another, and the retrieval figures that they give."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

import pddm_ext
from pddm_ext import _numbers

from . import inputs

KS = (1, 2, 4, 8)

# Entries of the rankings that are in memory at once, and draws of a bootstrap.
_ENTRIES = 2**21
_RESAMPLES = 2000


def by_distance(features: Tensor, queries: Tensor, k: int) -> Tensor:
    """The k nearest other rows (Euclidean) of each query, nearest first.

    Args:
        features: (n, d), compared in float32.
        queries: (q,) int64 rows of ``features``.
        k: 1 to n − 1.

    Returns:
        (q, k) int64 rows of ``features``; never the query itself.

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape that is not accepted, or k.
        IndexError: a query is no row.
        FloatingPointError: a feature is not finite.
    """
    features = inputs.features(features)
    queries = inputs.queries(queries, len(features))
    inputs.neighbours(k, len(features))
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(features.numpy())
    _, ranked = index.search(features[queries].numpy(), k + 1)
    return _others(torch.from_numpy(ranked), queries)


def by_score(features: Tensor, queries: Tensor, k: int, unit: pddm_ext.PDDM) -> Tensor:
    """:func:`by_distance` with the unit's score in the distance's place, best first; NaN scores come last."""
    features = inputs.features(features, scored=True)
    queries = inputs.queries(queries, len(features))
    inputs.neighbours(k, len(features))
    gallery = features.to(unit.u.weight.device)
    _, ranked = pddm_ext.topk(gallery[queries.to(gallery.device)], gallery, k + 1, unit)
    return _others(ranked.cpu(), queries)


def rerank(features: Tensor, queries: Tensor, ranked: Tensor, unit: pddm_ext.PDDM, candidates: int) -> Tensor:
    """A ranking (q, k) of the queries (q,) whose first ``candidates`` columns are put in the order of the unit's score.

    Equal scores, and the columns after the candidates, keep their order; NaN scores come last among the candidates.
    """
    features = inputs.features(features, scored=True)
    queries = inputs.queries(queries, len(features))
    ranked = inputs.ranked(ranked, queries, len(features))
    _numbers.size("candidates", candidates)
    first, rest = ranked[:, :candidates], ranked[:, candidates:]
    gallery = features.to(unit.u.weight.device)
    i, j = queries.repeat_interleave(first.shape[1]), first.flatten()
    with torch.no_grad():
        scores = pddm_ext.score_pairs(gallery, i.to(gallery.device), j.to(gallery.device), unit)
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


def relevant(labels: Tensor) -> Tensor:
    """How many other rows have each row's label: (n,) int64. Labels are (n,) integers."""
    labels = inputs.classes(labels, None)
    _, member, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    others: Tensor = counts[member] - 1
    return others


def per_query(ranked: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    """Recall@1, 2, 4, 8, MAP@R and R-precision of each query: (q, 6) float64 in [0, 1].

    R is the number of other rows of the query's class (Musgrave, Belongie & Lim, *A Metric Learning Reality Check*,
    ECCV 2020).

    Args:
        ranked: (q, k) int64 rows, k at least the largest R and 8, or all other rows.
        queries: (q,) int64 rows, none alone in its class.
        labels: (n,) integers.

    Raises:
        TypeError: something is no integers.
        ValueError: a shape that does not fit, or a query alone in its class.
        IndexError: a row that is not there.
    """
    labels = inputs.classes(labels, None)
    queries = inputs.queries(queries, len(labels))
    ranked = inputs.ranked(ranked, queries, len(labels))
    hits = labels[ranked] == labels[queries][:, None]
    r = relevant(labels)[queries][:, None]
    if not r.all():
        raise ValueError(f"queries has row {int(queries[r[:, 0].argmin()])}, which is alone in its class")
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
    unit: pddm_ext.PDDM | None,
    seed: int,
    candidates: int,
    structure: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """The :func:`summary` of each ranking of all rows that are not alone in their class.

    Args:
        features: (n, d).
        labels: (n,) integers, two of them equal at least.
        unit: ranks, too, where there is one, on its own device.
        seed: of the intervals.
        candidates: how many of the nearest rows are re-ranked, at least 1.
        structure: (n, d) weights that re-rank, too, where they are given.

    Returns:
        Summaries of ``"distance"``; with a unit, ``"score"`` (of all rows) and ``"rerank"`` (the nearest rows by
        distance in the order of their scores); with a structure, ``"structure"`` (the nearest rows by distance in the
        order of their adaptive distances).

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape or labels that are not accepted, or candidates.
        FloatingPointError: a feature is not finite.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    _numbers.size("candidates", candidates)
    counts = relevant(labels)
    queries = counts.nonzero().flatten()
    _two_alike(queries)
    k = min(len(labels) - 1, max(*KS, int(counts.max())))
    wide = k if unit is None and structure is None else min(len(labels) - 1, max(k, candidates))
    figures: dict[str, list[Tensor]] = {}
    for chunk in torch.split(queries, max(1, _ENTRIES // wide)):
        ranked = by_distance(features, chunk, wide)
        rankings = {"distance": ranked}
        if unit is not None:
            rankings["score"] = by_score(features, chunk, k, unit)
            rankings["rerank"] = rerank(features, chunk, ranked, unit, candidates)
        if structure is not None:
            rankings["structure"] = by_structure(features, structure, chunk, ranked, candidates)
        for kind, ranking in rankings.items():
            figures.setdefault(kind, []).append(per_query(ranking[:, :k], chunk, labels))
    return {kind: summary(torch.cat(parts), seed) for kind, parts in figures.items()}


def recall_at_k(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Share of rows with their own class among the K nearest other rows (Euclidean), for K = 1, 2, 4, 8.

    Rows alone in their class are left out. Features are (n, d), labels (n,) integers.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`retrieval` says.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    queries = relevant(labels).nonzero().flatten()
    _two_alike(queries)
    ranked = by_distance(features, queries, min(len(labels) - 1, max(KS)))
    hits = labels[ranked] == labels[queries][:, None]
    return {k: hits[:, :k].any(1).double().mean().item() for k in KS}


def _two_alike(queries: Tensor) -> None:
    if len(queries) == 0:
        raise ValueError("labels have no class of two rows or more; at least one is accepted")
