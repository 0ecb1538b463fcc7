"""Neighbourhood-adaptive ranking: each sample says how much every coordinate counts in distances from it.

Sources: *Neighborhood-Adaptive Multi-cluster Ranking for Deep Metric Learning*, IEEE TCSVT 2022 (NAMR), and its
sibling, Li, Li, Xie, Zhang, *Neighborhood-Adaptive Structure Augmented Metric Learning*, AAAI 2022 (NASA).

With e the L2-normalised embeddings and w_i the structure of sample i, the adaptive distance is::

    d_w(i, j)² = Σ_t w_it (e_it − e_jt)² = Σ_t w_it e_it² − 2 Σ_t (w_it e_it) e_jt + Σ_t w_it e_jt²

two matrix products, never a tensor of pairs times coordinates. It is not symmetric: the neighbourhood is the query's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, _numbers
from .precision import no_autocast, score_dtype

# Of the mean distance: no centre of clusters lies nearer than this (NASA).
_NEAREST = 0.2
# Elements of the gathered candidates that are held at once in a re-ranking.
_GATHERED = 1 << 24


class StructureHead(nn.Module):
    """The structure of each sample, w = 0.5 + sigmoid(A x + b), in (0.5, 1.5) but for rounding.

    No coordinate is dropped, and none counts for more than three times another.

    A and b start at 0 (ours), so w at 1: a head that has not been trained leaves every ranking as it is.

    Args:
        dim: length of x: the features before the embedding layer, or the embeddings themselves.
        out: length of w, that of the embeddings; ``dim`` by default.

    Shape:
        x (n, dim), float32, float64, bfloat16 or float16, taken to the parameters' dtype; w (n, out), float32 (float64
        for float64 parameters). Under autocast the product is in its dtype and the sigmoid is not.

    Raises:
        ValueError: a size is not positive, or x is not (n, dim).
        TypeError: a size is no int, or x has a dtype that is not accepted.
    """

    def __init__(self, dim: int, out: int | None = None) -> None:
        super().__init__()
        out = dim if out is None else out
        for name, length in (("dim", dim), ("out", out)):
            _numbers.size(name, length)
        self.linear = nn.Linear(dim, out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        _checks._matrix("x", x)
        weight = self.linear.weight
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}; (rows, {weight.shape[1]}) is accepted")
        _checks._devices(x, weight)
        y: Tensor = self.linear(x.to(weight.dtype))
        return 0.5 + torch.sigmoid(y.to(score_dtype(weight)))


class MultiClusterRankingLoss(nn.Module):
    r"""Sorts each sample's neighbours into clusters by distance, without labels: trains the structure.

    Over the plain distances of the batch's pairs i ≠ j, of mean m and standard deviation σ, lie K centres, and every
    adaptive distance is drawn to the centre that it is nearest to, softly::

        η_1 = m,   η_K = max(0.2 m, m − spread · σ),   the others evenly between
        p_k(i, j) = softmax over k of −scale · |d_w(i, j) − η_k|
        loss = mean over i ≠ j of Σ_k p_k(i, j) |d_w(i, j) − η_k|

    Those near a sample become nearer, all others as far as the average: w_i stretches the coordinates in which a
    neighbourhood is to be told apart from what surrounds it. The centres are constants to the gradient, or they would
    follow the distances that they are to sort. K = 2 is NASA's pair of centres. NAMR sorts into several clusters; even
    spacing between the same two ends is ours. Equal distances (σ = 0) give equal centres.

    NASA's released code takes m and σ over all n² entries of the matrix of distances, of which the n of a row from
    itself are 0. These lower m and widen σ: in a batch of 32 rows whose distances are alike, η_K falls from near m to
    about half of it. ``over="all"`` does that; that of the pairs alone is what the formula says, and the default.

    Embeddings are L2-normalised inside, as everywhere in this package: the centres scale with the distances and
    ``scale`` does not, so its value means something only where distances have one scale (0 to 2). The gradient reaches
    the structure and the embeddings. To leave the embeddings to the metric loss alone, pass ``embeddings.detach()``.

    Fewer than two rows give 0 with zero gradients. Time is O(n² d), memory O(n d + n² K).

    Sources: NAMR, IEEE TCSVT 2022; NASA, AAAI 2022.

    Args:
        clusters: K, at least 2.
        scale: sharpness of the assignment, per unit of distance; positive.
        spread: how many standard deviations below the mean the nearest centre lies; positive.
        over: what m and σ are of: ``"pairs"`` i ≠ j, or ``"all"`` entries, zeros of the diagonal included, and σ then
            with n² − 1 in the place of n².

    Shape:
        embeddings and structure (n, d), float32, float64, bfloat16 or float16, structure not negative. The result is a
        scalar, float32 (float64 for float64 embeddings), also under autocast.

    Raises:
        ValueError: a parameter out of its range, or a shape that does not fit.
        TypeError: a parameter of another type, or a dtype that is not accepted.
    """

    def __init__(
        self, clusters: int = 2, scale: float = 10.0, spread: float = 3.0, *, over: Literal["pairs", "all"] = "pairs"
    ) -> None:
        super().__init__()
        _numbers.size("clusters", clusters, least=2)
        if over not in ("pairs", "all"):
            raise ValueError(f"over is {over!r}; 'pairs', 'all' are accepted")
        for name, value in (("scale", scale), ("spread", spread)):
            _numbers.number(name, value, "a positive finite number")
        self.clusters, self.scale, self.spread, self.over = clusters, scale, spread, over

    def extra_repr(self) -> str:
        own = f"clusters={self.clusters}, scale={self.scale}, spread={self.spread}"
        return own if self.over == "pairs" else f"{own}, over={self.over!r}"

    def forward(self, embeddings: Tensor, structure: Tensor) -> Tensor:
        _check("embeddings", embeddings, "structure", structure)
        n = embeddings.shape[0]
        if n < 2:
            return embeddings[:0].sum().to(score_dtype(embeddings)) + structure[:0].sum().to(score_dtype(embeddings))
        e, w = _unit_rows(embeddings), structure.to(score_dtype(embeddings))
        itself = torch.eye(n, dtype=torch.bool, device=e.device)
        offsets = (_distances(e, w, e) - self._centres(e, itself)[:, None, None]).abs()
        p = (-self.scale * offsets).softmax(0)
        # By rows first: a sum over all pairs would be split among threads, and depend on their number, as the bits of
        # torch's matrix products in the gradient may.
        return (p * offsets).sum(0).masked_fill(itself, 0).sum(-1).sum() / (n * (n - 1))

    @torch.no_grad()
    def _centres(self, e: Tensor, itself: Tensor) -> Tensor:
        """η of the plain distances, (K,), falling."""
        n, every = e.shape[0], self.over == "all"
        plain = _distances(e, torch.ones_like(e), e).masked_fill(itself, 0)
        mean = plain.sum(-1).sum() / (n * n if every else n * (n - 1))
        off = (plain - mean).square()
        off = off if every else off.masked_fill(itself, 0)
        deviation = (off.sum(-1).sum() / (n * n - 1 if every else n * (n - 1))).sqrt()
        nearest = torch.maximum(_NEAREST * mean, mean - self.spread * deviation)
        steps = torch.linspace(0, 1, self.clusters, dtype=e.dtype, device=e.device)
        return torch.lerp(mean, nearest, steps)


def adaptive_distance(query_embeddings: Tensor, query_structure: Tensor, gallery: Tensor) -> Tensor:
    """The distances d_w of every gallery row from every query, by the query's structure; differentiable.

    Args:
        query_embeddings: (q, d), float32, float64, bfloat16 or float16. Rows are L2-normalised inside.
        query_structure: (q, d), not negative, of any of those dtypes.
        gallery: (g, d) embeddings of the queries' dtype, L2-normalised inside.

    Returns:
        (q, g), float32 (float64 for float64 queries). At distance 0 the gradient is 0.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not accepted.
    """
    _check("query_embeddings", query_embeddings, "query_structure", query_structure)
    _checks._both("query_embeddings", query_embeddings, "gallery", gallery)
    return _distances(
        _unit_rows(query_embeddings), query_structure.to(score_dtype(query_embeddings)), _unit_rows(gallery)
    )


@torch.no_grad()
def structure_rerank(query_embeddings: Tensor, query_structure: Tensor, gallery: Tensor, ranked: Tensor) -> Tensor:
    """The candidates of each query, from any index, in the order of their adaptive distance. No gradient.

    Args:
        query_embeddings: (q, d), float32, float64, bfloat16 or float16. Rows are L2-normalised inside.
        query_structure: (q, d), not negative, of any of those dtypes.
        gallery: (g, d) embeddings of the queries' dtype, L2-normalised inside.
        ranked: (q, k) rows of the gallery of any integer dtype, or −1 where an index found fewer than k.

    Returns:
        (q, k) of the dtype of ``ranked``, nearest first. Ties stay in the order given; NaN distances come last, and −1
        after them.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not accepted.
        IndexError: a row that the gallery does not have (on the CPU; elsewhere nothing waits to find out).
    """
    _check("query_embeddings", query_embeddings, "query_structure", query_structure)
    _checks._both("query_embeddings", query_embeddings, "gallery", gallery)
    candidates = _candidates(ranked, query_embeddings, gallery)
    if candidates.numel() == 0 or gallery.shape[0] == 0:
        return ranked.clone()
    e, w, g = _unit_rows(query_embeddings), query_structure.to(score_dtype(query_embeddings)), _unit_rows(gallery)
    rows = max(1, _GATHERED // (candidates.shape[1] * g.shape[1]))
    squared = torch.cat(
        [
            (w_i[:, None] * (e_i[:, None] - g[c]).square()).sum(-1)
            for e_i, w_i, c in zip(
                torch.split(e, rows), torch.split(w, rows), torch.split(candidates, rows), strict=True
            )
        ]
    )
    # A sort takes NaN for the largest value. What −1 has read, the last row of the gallery, does not matter.
    by_distance = candidates.gather(1, squared.argsort(dim=1, stable=True))
    missing = (by_distance < 0).byte().argsort(dim=1, stable=True)
    return by_distance.gather(1, missing).to(ranked.dtype)


def concatenated_queries(query_embeddings: Tensor, query_structure: Tensor) -> Tensor:
    """Queries [2 w ∘ e ; −w] whose inner product with :func:`concatenated_gallery` ranks by adaptive distance.

    d_w(i, j)² = Σ_t w_it e_it² − ⟨query i, gallery j⟩, and the first sum is the query's alone: the largest inner
    product is the nearest row. An index of inner products therefore serves as it is, at twice the dimension.

    A plain L2 index ranks by ‖query‖² + ‖gallery‖² − 2⟨query, gallery⟩, which is the same order once all gallery
    vectors have one norm. As rows are of unit length, ‖gallery j‖² = 1 + Σ_t e_jt⁴ ≤ 2: append √(2 − ‖gallery j‖²) to
    each gallery vector and 0 to each query. No rescaling without that coordinate can do it, for Σ_t e_jt⁴ differs from
    row to row.

    Rows that are all but equal are told apart by :func:`structure_rerank` and not by these: their distances are what
    rounding leaves of sums of order 1.

    Args:
        query_embeddings: (q, d), float32, float64, bfloat16 or float16. Rows are L2-normalised inside.
        query_structure: (q, d), not negative, of any of those dtypes.

    Returns:
        (q, 2d), float32 (float64 for float64 queries).

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not accepted.
    """
    _check("query_embeddings", query_embeddings, "query_structure", query_structure)
    e, w = _unit_rows(query_embeddings), query_structure.to(score_dtype(query_embeddings))
    return torch.cat([2 * w * e, -w], dim=1)


def concatenated_gallery(gallery: Tensor) -> Tensor:
    """Gallery vectors [e ; e ∘ e] for :func:`concatenated_queries`; no structure of the gallery is needed.

    Args:
        gallery: (g, d), float32, float64, bfloat16 or float16. Rows are L2-normalised inside.

    Returns:
        (g, 2d), float32 (float64 for a float64 gallery).

    Raises:
        ValueError: the shape is not (g, d), with a d of at least 1.
        TypeError: a dtype that is not accepted.
    """
    _checks._matrix("gallery", gallery)
    _dimension("gallery", gallery)
    e = _unit_rows(gallery)
    return torch.cat([e, e.square()], dim=1)


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(x.to(score_dtype(x)), dim=-1)


def _distances(e: Tensor, w: Tensor, g: Tensor) -> Tensor:
    # Where all rows lie close together, less is lost to cancellation about their mean; differences know nothing of it.
    centre = g.detach().nan_to_num().sum(0) / max(g.shape[0], 1)
    e, g = e - centre, g - centre
    weighted = w * e
    with no_autocast(e):
        squared = (weighted * e).sum(-1, keepdim=True) + w @ g.square().T - 2 * (weighted @ g.T)
    # Rounding may leave less than 0, and at 0 the root has no gradient; NaN is neither and stays.
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _check(name: str, embeddings: Any, of: str, structure: Any) -> None:
    _checks._matrix(name, embeddings)
    _checks._matrix(of, structure)
    if structure.shape != embeddings.shape:
        raise ValueError(f"{of} has shape {tuple(structure.shape)}; {name} has {tuple(embeddings.shape)}")
    _checks._devices(embeddings, structure)
    _dimension(name, embeddings)
    if _checks.readable(structure) and (structure < 0).any():
        least = structure[structure < 0].min().item()  # of numbers: beside NaN there is no least
        raise ValueError(f"{of} has a negative weight, {least:g}; weights from 0 are accepted")


def _dimension(name: str, x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape (n, 0); a dimension of at least 1 is accepted")


def _candidates(ranked: Any, queries: Tensor, gallery: Tensor) -> Tensor:
    """int64, each a row of the gallery or −1."""
    _checks._tensor("ranked", ranked, _checks.INTEGERS, "an integer dtype")
    if ranked.dim() != 2 or ranked.shape[0] != queries.shape[0]:
        raise ValueError(
            f"ranked has shape {tuple(ranked.shape)}; ({queries.shape[0]}, k), a row per query, is accepted"
        )
    _checks._devices(queries, ranked)
    candidates: Tensor = ranked.long()
    if _checks.readable(candidates):
        bad = ((candidates < -1) | (candidates >= gallery.shape[0])).nonzero()
        if len(bad):
            i, j = bad[0].tolist()
            raise IndexError(f"ranked[{i}, {j}] is {int(candidates[i, j])}; gallery has {gallery.shape[0]} rows")
    return candidates
