"""How far positive and negative pairs are apart, and how much of its space an embedding uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

import pddm_ext
from pddm_ext import _numbers

from ..similarity import Similarity
from . import inputs

BINS = 60
#: Rates of false positives at which :func:`verification` gives that of true ones.
FPRS = (1e-2, 1e-3)

# Pairs of a kind that are looked at, and numbers of gathered features, or scored pairs, in memory at once.
_PAIRS = 2**20
_NUMBERS, _SCORED = 2**23, 2**18


def pairs(
    labels: Tensor, seed: int, most: int, queries: Tensor | None = None, gallery: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row numbers of positive pairs (2, P) and of negative pairs (2, N), int64.

    A pair is a query and another row of the gallery, in whichever order. All pairs of a kind, each once, where there
    are no more than ``most``; else that many drawn by the seed, each pair as likely.

    Args:
        labels: (n,) integers.
        seed: from 0.
        most: from 1.
        queries: (q,) int64 distinct rows; all of them without it.
        gallery: (g,) int64 distinct rows; all of them without it.

    Raises:
        TypeError: something is no integers.
        ValueError: a shape, queries or a gallery that are not accepted; no positive or no negative pair.
        IndexError: a row that is not there.
    """
    labels = inputs.classes(labels, None)
    _numbers.size("most", most)
    inputs.seed(seed)
    asked, among = inputs.sides(queries, gallery, len(labels))
    generator = torch.Generator().manual_seed(seed)
    # The gallery by class, rows that are queries, too, before the others: such a row's pairs with those before it are
    # theirs already. Then whoever a query is paired with lies in two or three ranges.
    shared = torch.isin(among, asked)
    both, others = (rows[labels[rows].argsort(stable=True)] for rows in (among[shared], among[~shared]))
    order = torch.cat([both, others])
    rest = asked[~torch.isin(asked, among)]
    # For each row, where its class begins and ends among both, and among the others.
    begin, end = _ranges(labels[both], labels)
    start, stop = (len(both) + place for place in _ranges(labels[others], labels))

    def chosen(*ranges: tuple[Tensor, Tensor | int, Tensor | int]) -> Tensor:
        """Pairs of rows with the places in ``order`` from a first to before a last."""
        rows = torch.cat([rows for rows, _, _ in ranges])
        first, last = (torch.cat([torch.as_tensor(r[side]).expand(len(r[0])) for r in ranges]) for side in (1, 2))
        partners = last - first
        until = partners.cumsum(0)
        total = int(until[-1]) if len(until) else 0
        if total == 0:
            raise ValueError("labels have no positive pair, or no negative one; at least one of each is accepted")
        number = torch.arange(total) if total <= most else torch.randint(total, (most,), generator=generator)
        at = torch.searchsorted(until, number, right=True)
        other = first[at] + number - (until - partners)[at]
        return torch.stack([rows[at], order[other]])

    positive = chosen(
        (both, torch.arange(len(both)) + 1, end[both]),
        (both, start[both], stop[both]),
        (rest, begin[rest], end[rest]),
        (rest, start[rest], stop[rest]),
    )
    negative = chosen(
        (both, end[both], start[both]),
        (both, stop[both], len(order)),
        (rest, 0, begin[rest]),
        (rest, end[rest], start[rest]),
        (rest, stop[rest], len(order)),
    )
    return positive, negative


def _ranges(ascending: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where each label begins and ends among ascending ones."""
    return torch.searchsorted(ascending, labels), torch.searchsorted(ascending, labels, right=True)


def _nearness(features: Tensor, both: Tensor) -> Tensor:
    def of(i: Tensor, j: Tensor) -> Tensor:
        distances: Tensor = torch.linalg.vector_norm(features[i] - features[j], dim=1)
        return -distances

    return _in_parts(of, both, max(1, _NUMBERS // features.shape[1]))


def _scores(features: Tensor, both: Tensor, similarity: Similarity) -> Tensor:
    rows = features.to(similarity.device)

    def of(i: Tensor, j: Tensor) -> Tensor:
        return similarity.pairs(rows, i, j).cpu()

    return _in_parts(of, both, _SCORED)


def _in_parts(of: Callable[[Tensor, Tensor], Tensor], both: Tensor, size: int) -> Tensor:
    return torch.cat([of(part[0], part[1]) for part in torch.split(both, size, dim=1)])


def distribution(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> dict[str, Any]:
    """Two samples of a similarity, side by side.

    Returns:
        ``positive`` and ``negative``, shares in 60 common bins; ``edges``, the bins' 61; ``overlap``, the sum over bins
        of the smaller share, 0 for separate histograms and 1 for equal ones; ``auc``, the probability that a positive
        pair is more alike than a negative one, equal ones counted half, which no monotonic change of scale alters.
    """
    low, high = min(positive.min(), negative.min()), max(positive.max(), negative.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    p, n = (np.histogram(values, edges)[0] / len(values) for values in (positive, negative))
    kinds = np.repeat([1, 0], [len(positive), len(negative)])
    return {
        "positive": p.tolist(),
        "negative": n.tolist(),
        "edges": edges.tolist(),
        "overlap": float(np.minimum(p, n).sum()),
        "auc": float(roc_auc_score(kinds, np.concatenate([positive, negative]))),
    }


def verification(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> dict[str, Any]:
    """How well one threshold of a similarity tells same from different: a pair is called the same from it upwards.

    The true positive rate (TPR) is the share of the positive pairs that are called the same, the false positive rate
    (FPR) that of the negative ones. Pairs of equal similarity are called the same together or not at all.

    Args:
        positive: finite similarities of pairs of the same class, at least one.
        negative: of pairs of different classes, at least one.

    Returns:
        ``tpr``, for each of :data:`FPRS` as text the largest TPR of all thresholds whose FPR does not exceed it: None
        where there are fewer negative pairs than its reciprocal, which cannot tell, and 0 where every threshold that
        finds anything exceeds it; ``eer``, the equal error rate, where FPR = 1 − TPR, linear between neighbouring
        thresholds; ``thresholds``, for each of :data:`FPRS` the largest threshold that has its ``tpr`` (None where that
        is None or 0), for ``"eer"`` the largest one at which FPR is at least 1 − TPR.
    """
    kinds = np.repeat([1, 0], [len(positive), len(negative)])
    # From the largest similarity on, after a threshold above it that calls nothing the same.
    fpr, tpr, cuts = roc_curve(kinds, np.concatenate([positive, negative]), drop_intermediate=False)
    found: dict[str, Any] = {"tpr": {}, "eer": 0.0, "thresholds": {}}
    for rate in FPRS:
        best = tpr[np.searchsorted(fpr, rate, side="right") - 1]
        resolved = len(negative) >= round(1 / rate)
        found["tpr"][str(rate)] = float(best) if resolved else None
        found["thresholds"][str(rate)] = float(cuts[np.searchsorted(tpr, best)]) if resolved and best > 0 else None
    missed = 1 - tpr
    at = int(np.argmax(fpr >= missed))
    before, after = missed[at - 1] - fpr[at - 1], fpr[at] - missed[at]
    found["eer"] = float(fpr[at - 1] + before / (before + after) * (fpr[at] - fpr[at - 1]))
    found["thresholds"]["eer"] = float(cuts[at])
    return found


def separation(
    features: Tensor,
    labels: Tensor,
    unit: Similarity | pddm_ext.PDDM | None,
    seed: int,
    queries: Tensor | None = None,
    gallery: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """The :func:`distribution` and the :func:`verification` of positive and of negative pairs, by ``"distance"`` and by
    ``"score"``.

    Args:
        features: (n, d).
        labels: (n,) integers, with a positive and a negative pair.
        unit: scores, where there is one, on its own device.
        seed: of the pairs, where there are more than 2^20 of a kind to look at.
        queries: (q,) int64 distinct rows that are paired with the gallery's; all of them without it.
        gallery: (g,) int64 distinct rows; all of them without it.

    Returns:
        The similarity of ``"distance"`` is the negated distance, in ``edges``; its ``thresholds`` are distances, up to
        which a pair is called the same. Those of ``"score"`` are scores, from which on it is.

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape that is not accepted, or labels, queries or a gallery as in :func:`pairs`.
        IndexError: a query, or a row of the gallery, is no row.
        FloatingPointError: a feature or a score is not finite.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    both = pairs(labels, seed, _PAIRS, queries, gallery)
    values = {"distance": [_nearness(features, kind) for kind in both]}
    similarity = Similarity.of(unit)
    if similarity is not None:
        values["score"] = [_scores(features, kind, similarity) for kind in both]
        if not all(scores.isfinite().all() for scores in values["score"]):
            raise FloatingPointError("the PDDM unit's scores are not finite; lower its learning rate")
    found: dict[str, dict[str, Any]] = {}
    for name, kinds in values.items():
        positive, negative = (kind.double().numpy() for kind in kinds)
        found[name] = distribution(positive, negative) | verification(positive, negative)
    thresholds = found["distance"]["thresholds"]
    found["distance"]["thresholds"] = {rate: None if cut is None else -cut for rate, cut in thresholds.items()}
    return found


def spread(features: Tensor) -> float:
    """Half the mean squared distance between unit features: 1 around the whole sphere, 0 when all are one point.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` says.
    """
    features = inputs.features(features, unit=True)
    return max(0.0, 1 - features.mean(0).square().sum().item())  # rounding may take it below


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values (Roy & Vetterli, 2007): how many dimensions are in use.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` says.
    """
    features = inputs.features(features)
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())
