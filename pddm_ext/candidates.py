"""Mining that scores no more pairs than a row has candidates: the rows of other classes nearest to it by dot product.

The dot products are n², too, but of 2d operations each, where a score has 2dh + 4hm; they are made block by block, on
the CPU by an operator that makes each once for both of its rows, and nothing but each row's nearest is kept of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .precision import no_autocast, score_dtype
from .quadruplets import MODES

#: Dot products in memory at once: a GPU would not be busy with fewer.
_ENTRIES, _ENTRIES_OF_GPU = 2**22, 2**24

_Score = Callable[[Tensor, Tensor], Tensor]
"""Scores of pairs of rows i and j."""


class Rows(NamedTuple):
    """A batch as its candidates are chosen from it."""

    #: (n, d) unit rows, in the scores' dtype.
    unit: Tensor
    #: (n,) bool, whether a row has no NaN and no infinity.
    finite: Tensor
    #: (n,) int64, numbers of classes from 0.
    classes: Tensor
    #: (c,) int64, rows of each class.
    sizes: Tensor


def rows_of(feats: Tensor, labels: Tensor) -> Rows:
    """Of feats (n, d), any strides and norms, and labels (n,), any integers."""
    unit = F.normalize(feats.to(score_dtype(feats)), dim=1)
    classes, sizes = torch.unique(labels.long(), return_inverse=True, return_counts=True)[1:]
    # A unit row has no infinity, and its sum none but NaN: one pass.
    return Rows(unit, ~unit.sum(1).isnan(), classes, sizes)


def nearest(rows: Rows, of: Tensor | None, count: int) -> Tensor:
    """Rows of other classes with the largest dot products, in ascending order: (m, count), −1 where there are fewer.

    Of products that are equal as they are computed those of the lowest rows. Rows that are not finite are nobody's, and
    have none, since no score of theirs wins.

    Args:
        rows: n of them.
        of: (m,), whose; None is every row.
        count: from 1 to n − 1.
    """
    classes = torch.where(rows.finite, rows.classes, -1)
    if of is None and rows.unit.is_cpu:  # a product of two rows serves both of them
        chosen: Tensor = torch.ops.pddm.nearest(rows.unit, classes, count)
        return chosen
    of = torch.arange(len(rows.unit), device=rows.unit.device) if of is None else of
    parts = [of.new_empty(0, count)]
    for at in torch.split(of, _at_once(rows.unit)):
        parts.append(torch.ops.pddm.largest(dot_products(rows.unit[at], rows.unit), classes[at], classes, count))
    return torch.cat(parts)


def farthest(rows: Rows, count: int) -> Tensor:
    """Each row's positives, or those of the least dot products, in ascending order: (n, ≤ count), −1 for none.

    Of equal ones the lowest rows, and rows that are not finite last.
    """
    n, device = len(rows.unit), rows.unit.device
    order = rows.classes.argsort(stable=True)
    begin = rows.sizes.cumsum(0) - rows.sizes
    largest = int(rows.sizes.max()) - 1
    most = min(largest, count)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=device) - begin[rows.classes[order]]
    # Of a class of few the others, itself skipped.
    others = torch.arange(most, device=device)
    at = begin[rows.classes, None] + others + (others >= place[:, None])
    far = torch.where(others < rows.sizes[rows.classes, None] - 1, order[at.clamp(max=n - 1)], -1)
    if largest > count:
        for c in (rows.sizes - 1 > count).nonzero().flatten().tolist():
            own = order[begin[c] : begin[c] + rows.sizes[c]]
            every = torch.arange(len(own), device=device)
            for part in torch.split(every, _at_once(own)):  # of all but itself
                alike = dot_products(rows.unit[own[part]], rows.unit[own])
                far[own[part]] = own[torch.ops.pddm.largest(-alike, part, every, most)]
    return far


def lists(feats: Tensor, labels: Tensor, count: int) -> Tensor:
    """Each row's nearest and its positives side by side: (n, ≥ count), the positives from column ``count`` on."""
    if not ops.on_device(feats):
        rows = rows_of(feats, labels)
        return torch.cat([nearest(rows, None, count), farthest(rows, count)], dim=1)
    n = len(feats)
    unit, weights, classes = torch.ops.pddm.candidate_rows(feats, labels)
    of_all, at_once = unit.T, _at_once(unit)
    parts = [
        torch.ops.pddm.candidates(_products(unit[at : at + at_once], of_all), at, weights, classes, count)
        for at in range(0, max(1, n), at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dot_products(x: Tensor, y: Tensor) -> Tensor:
    """(n, d) and (m, d) → (n, m): on the CPU the same whatever the number of threads, and of equal rows, which those of
    a matrix product are not."""
    products: Tensor = torch.ops.pddm.dot_products(x, y) if x.is_cpu else x @ y.T
    return products


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """In float32 of half precisions, where every product of two numbers is exact."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return rows @ others
    return torch.mm(rows, others, out_dtype=torch.float32) if rows.is_cuda else rows.float() @ others.float()


def _at_once(others: Tensor) -> int:
    """How many rows have their dot products with so many others in memory."""
    return max(1, (_ENTRIES if others.device.type == "cpu" else _ENTRIES_OF_GPU) // max(1, len(others)))


def _mine(feats: Tensor, labels: Tensor, *unit_mode_and_count: Any) -> tuple[Tensor, ...]:
    """What the operator ``mine`` gives, of candidates alone; mode ``"pair"`` of the positive pairs that are scored."""
    *unit, mode, count = unit_mode_and_count

    def score(i: Tensor, j: Tensor) -> Tensor:
        scored: Tensor = torch.ops.pddm.score_pairs(feats, i, j, *unit)
        return scored

    with no_autocast(feats):
        if MODES[mode] == "batch":
            return _hardest(rows_of(feats, labels), score, count)
        near_and_far = lists(feats, labels, count)
        if MODES[mode] == "anchor":
            mined: tuple[Tensor, ...] = torch.ops.pddm.mine_listed(feats, near_and_far, count, *unit)
            return mined
        return _hard(near_and_far[:, :count], near_and_far[:, count:], score)


def _hardest(rows: Rows, score: _Score, count: int) -> tuple[Tensor, ...]:
    """The quadruplet of the hardest positive pair: the candidates of two rows are enough."""
    i, j, _ = torch.ops.pddm.asked_pairs(farthest(rows, count))
    order = (i * len(rows.unit) + j).argsort()
    i, j = i[order], j[order]
    at, s_ij, valid = first_largest(-score(i, j)[None])
    both = torch.cat([i[at], j[at]]) if len(i) else i.new_zeros(2)
    near = nearest(rows, both, count)
    entries = (near >= 0).nonzero()
    scores = rows.unit.new_full(near.shape, torch.nan)
    scores[entries[:, 0], entries[:, 1]] = score(both[entries[:, 0]], near[entries[:, 0], entries[:, 1]])
    at, s_k, found = first_largest(scores)
    k = near.gather(1, at[:, None])[:, 0]
    return slots(valid & found.all(), (both[:1], both[1:], k[:1], k[1:]), (-s_ij, s_k[:1], s_k[1:]))


def _hard(near: Tensor, far: Tensor, score: _Score) -> tuple[Tensor, ...]:
    """The quadruplet of each positive pair that is scored. Each unordered pair is scored once, though both of its rows
    may ask for it."""
    negative, positive = torch.ops.pddm.asked_pairs(near), torch.ops.pddm.asked_pairs(far)
    scores = score(*(torch.cat([negative[side], positive[side]]) for side in (0, 1)))
    negatives, positives = scores[: len(negative[0])], scores[len(negative[0]) :]
    k, s_k, found = torch.ops.pddm.best_asked(negatives, negative[2], near, False)
    order = (positive[0] * len(near) + positive[1]).argsort()
    i, j = positive[0][order], positive[1][order]
    return slots(found[i] & found[j], (i, j, k[i], k[j]), (positives[order], s_k[i], s_k[j]))


def slots(valid: Tensor, indices: tuple[Tensor, ...], scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the operator's order: scores, indices, and which are valid."""
    return (
        *(torch.where(valid, s, 0) for s in scores),
        *(torch.where(valid, index, -1) for index in indices),
        valid,
    )


def first_largest(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (r, c) where its largest score that is no NaN first is, the score, and whether there is one."""
    if scores.shape[1] == 0:
        none = scores.new_zeros(len(scores), dtype=torch.bool)
        return none.long(), scores.new_zeros(len(scores)), none
    # Above any score: −∞ is one, too.
    counts = ~scores.isnan()
    best = scores.masked_fill(~counts, -torch.inf).amax(1)
    at = (counts & (scores == best[:, None])).byte().argmax(1, keepdim=True)
    return at[:, 0], scores.gather(1, at)[:, 0], counts.any(1)


def mine_candidates(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator ``mine`` with a number of candidates, fewer than rows, after its arguments."""
    mined: tuple[Tensor, ...] = ops.call("mine_candidates", *arguments)
    return mined


def _operator() -> torch.library.Library:
    schema = str(torch.ops.pddm.mine.default._schema)
    schema = schema.replace("pddm::mine(", "mine_candidates(").replace(", int mode)", ", int mode, SymInt candidates)")
    library = torch.library.Library("pddm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema)  # type: ignore[no-untyped-call]
    # This way the compiler leaves it alone where a graph breaks at it.
    torch.library.register_kernel("pddm::mine_candidates", ("cpu", "cuda"), _mine, lib=library)
    ops.shapes("mine_candidates")(ops.shapes_of_mining)
    ops.differentiable("mine_candidates", ops.mine_backward, ops.keep_mined)
    return library


_LIBRARY = _operator()  # whose registrations end with it
