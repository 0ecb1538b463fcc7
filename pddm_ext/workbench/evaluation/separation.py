"""How far positive and negative pairs are apart, and how much of its space an embedding uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

import pddm_ext
from pddm_ext import _numbers

from . import inputs

BINS = 60

# Pairs of a kind that are looked at, and numbers of gathered features, or scored pairs, in memory at once.
_PAIRS = 2**20
_NUMBERS, _SCORED = 2**23, 2**18


def pairs(labels: Tensor, seed: int, most: int) -> tuple[Tensor, Tensor]:
    """Row numbers of positive pairs (2, P) and of negative pairs (2, N), int64.

    All pairs of a kind, each once, where there are no more than ``most``; else that many drawn by the seed, each pair
    as likely.

    Raises:
        TypeError: labels are no integers.
        ValueError: labels are no (n,), without a positive or without a negative pair.
    """
    labels = inputs.classes(labels, None)
    _numbers.size("most", most)
    inputs.seed(seed)
    order = labels.argsort(stable=True)
    _, member, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    place, end = torch.arange(len(labels)), counts.cumsum(0)[member]
    generator = torch.Generator().manual_seed(seed)

    def chosen(first: Tensor, last: Tensor | int) -> Tensor:
        """Pairs of each place in ``order`` with the places from ``first`` to before ``last``."""
        partners = last - first
        until = partners.cumsum(0)
        total = int(until[-1]) if len(until) else 0
        if total == 0:
            raise ValueError("labels have no positive pair, or no negative one; at least one of each is accepted")
        number = torch.arange(total) if total <= most else torch.randint(total, (most,), generator=generator)
        one = torch.searchsorted(until, number, right=True)
        other = first[one] + number - (until - partners)[one]
        return order[torch.stack([one, other])]

    return chosen(place + 1, end), chosen(end, len(labels))


def _nearness(features: Tensor, both: Tensor) -> Tensor:
    def of(i: Tensor, j: Tensor) -> Tensor:
        distances: Tensor = torch.linalg.vector_norm(features[i] - features[j], dim=1)
        return -distances

    return _in_parts(of, both, max(1, _NUMBERS // features.shape[1]))


def _scores(features: Tensor, both: Tensor, unit: pddm_ext.PDDM) -> Tensor:
    gallery = features.to(unit.u.weight.device)

    def of(i: Tensor, j: Tensor) -> Tensor:
        with torch.no_grad():
            return pddm_ext.score_pairs(gallery, i.to(gallery.device), j.to(gallery.device), unit).cpu()

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


def separation(features: Tensor, labels: Tensor, unit: pddm_ext.PDDM | None, seed: int) -> dict[str, dict[str, Any]]:
    """The :func:`distribution` of positive and of negative pairs by ``"distance"`` (negated) and by ``"score"``.

    Args:
        features: (n, d).
        labels: (n,) integers, with a positive and a negative pair.
        unit: scores, where there is one, on its own device.
        seed: of the pairs, where there are too many to look at all.

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: a shape that is not accepted, or labels as in :func:`pairs`.
        FloatingPointError: a feature or a score is not finite.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    both = pairs(labels, seed, _PAIRS)
    values = {"distance": [_nearness(features, kind) for kind in both]}
    if unit is not None:
        values["score"] = [_scores(features, kind, unit) for kind in both]
        if not all(scores.isfinite().all() for scores in values["score"]):
            raise FloatingPointError("the PDDM unit's scores are not finite; lower --lr or --unit-lr-factor")
    return {name: distribution(*(kind.double().numpy() for kind in kinds)) for name, kinds in values.items()}


def spread(features: Tensor) -> float:
    """Half the mean squared distance between unit features: 1 around the whole sphere, 0 when all are one point.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` says.
    """
    features = inputs.features(features, unit=True)
    return 1 - features.mean(0).square().sum().item()


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values (Roy & Vetterli, 2007): how many dimensions are in use.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` says.
    """
    features = inputs.features(features)
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())
