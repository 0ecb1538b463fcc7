"""Scores that are asked for by name: listed pairs, whole matrices, and the best of a gallery."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .ops import call, tracing, unit_arguments
from .precision import autocast
from .unit import PDDM


def score_pairs(feats: Tensor, i: Tensor, j: Tensor, unit: PDDM) -> Tensor:
    """Scores of listed pairs of rows, differentiable.

    Args:
        feats: (n, d) features, float32, float64, bfloat16 or float16, any strides. Rows are L2-normalised inside.
        i, j: (P,) row numbers of any integer dtype.
        unit: the scoring unit.

    Returns:
        (P,) scores, float32 (float64 for float64 features).

    Raises:
        ValueError: a shape, length or feature dimension that does not fit.
        TypeError: a dtype that is not accepted.
        IndexError: a row number out of range.
    """
    tensors = _checks.pairs(feats, i, j, unit)
    scores: Tensor = call("score_pairs", autocast(feats), i, j, *unit_arguments(unit, tensors))
    return scores


def score_matrix(x: Tensor, unit: PDDM, y: Tensor | None = None) -> Tensor:
    """Scores of every row of x with every row of y, differentiable. Without y, x with itself, each pair scored once.

    Args:
        x: (n, d) features, float32, float64, bfloat16 or float16, any strides. Rows are L2-normalised inside.
        unit: the scoring unit.
        y: (m, d) features of x's dtype, or None.

    Returns:
        (n, m) scores, float32 (float64 for float64 features).

    Raises:
        ValueError: a shape or feature dimension that does not fit.
        TypeError: a dtype that is not accepted.
    """
    tensors = _checks.matrix(x, unit, y)
    rows, split = (autocast(x), -1) if y is None else (torch.cat([autocast(x), autocast(y)]), x.shape[0])
    if y is not None and tracing():
        raise RuntimeError("torch.jit.trace would keep the number of x's rows beside y; torch.export is accepted")
    scores: Tensor = call("score_matrix", rows, split, *unit_arguments(unit, tensors))
    return scores


def topk(queries: Tensor, gallery: Tensor, k: int, unit: PDDM) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of every query, streamed: no (q, g) matrix is kept. No gradient.

    Args:
        queries: (q, d) features, float32, float64, bfloat16 or float16, any strides. Rows are L2-normalised inside.
        gallery: (g, d) features of the same dtype.
        k: how many, 1 to g.
        unit: the scoring unit.

    Returns:
        Scores (q, k), float32 (float64 for float64 features), best first, and int64 rows of the gallery (q, k). Ties
        go to the lowest row; NaN scores come last.

    Raises:
        ValueError: a shape, feature dimension or k that does not fit.
        TypeError: a dtype that is not accepted.
    """
    tensors = _checks.ranking(queries, gallery, k, unit)
    with torch.no_grad():
        scores, indices = call("topk", autocast(queries), autocast(gallery), k, *unit_arguments(unit, tensors))
    return scores, indices
