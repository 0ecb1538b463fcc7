"""The whole contract in plain PyTorch: the truth that the kernels are compared with.

Written to be read beside the paper (Huang, Loy, Tang, *Local Similarity-Aware Deep Feature Embedding*, NIPS 2016,
section 3), not to be fast: every pair's u and v is a tensor of its own. The names, arguments, results and errors are
those of the package; only the arithmetic is spelled out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, health, losses, processes
from .parameters import Parameters
from .precision import autocast, no_autocast, score_dtype
from .quadruplets import Mode, Quadruplets
from .unit import default_unit
from .unlabelled import check, unlabelled

__all__ = [
    "PDDM",
    "QuadrupletLoss",
    "Quadruplets",
    "default_unit",
    "mine_and_score",
    "score_matrix",
    "score_pairs",
    "select_quadruplets",
    "topk",
]


class QuadrupletLoss(losses.QuadrupletLoss):
    __doc__ = losses.QuadrupletLoss.__doc__
    _fused = False


class PDDM(Parameters):
    __doc__ = Parameters.__doc__

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of matched rows: (…, d) and (…, d) to (…)."""
        _checks.matched_rows(x, y, self)
        return _score(_unit_rows(x), _unit_rows(y), self)

    def mine(
        self,
        feats: Tensor,
        labels: Tensor,
        *,
        mode: Mode = "batch",
        ignore_label: int | None = None,
        candidates: int | None = None,
        ref_feats: Tensor | None = None,
        ref_labels: Tensor | None = None,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Quadruplets:
        """:func:`mine_and_score` with this unit."""
        return mine_and_score(
            feats,
            labels,
            self,
            mode=mode,
            ignore_label=ignore_label,
            candidates=candidates,
            ref_feats=ref_feats,
            ref_labels=ref_labels,
            ids=ids,
            ref_ids=ref_ids,
            group=group,
        )


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(autocast(x).to(score_dtype(x)), dim=-1)


def _score(f_i: Tensor, f_j: Tensor, unit: Parameters) -> Tensor:
    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        with no_autocast(x):  # it has rounded the features; sums are in the scores' dtype
            return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    u = (f_i - f_j).abs()
    v = (f_i + f_j) / 2
    if unit.normalize_input:
        u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    u = F.relu(linear(unit.u, u))
    v = F.relu(linear(unit.v, v))
    c = F.relu(linear(unit.c, torch.cat([F.normalize(u, dim=-1), F.normalize(v, dim=-1)], dim=-1)))
    return linear(unit.s, c).squeeze(-1)


def score_pairs(feats: Tensor, i: Tensor, j: Tensor, unit: Parameters) -> Tensor:
    """Scores of the listed pairs: feats (n, d), i and j (P,) to (P,)."""
    _checks.pairs(feats, i, j, unit)
    f = _unit_rows(feats)
    return _score(f[i.long()], f[j.long()], unit)


def score_matrix(x: Tensor, unit: Parameters, y: Tensor | None = None) -> Tensor:
    """Scores of every row of x (n, d) with every row of y (m, d), or of x itself: (n, m)."""
    _checks.matrix(x, unit, y)
    f = _unit_rows(x)
    g = f if y is None else _unit_rows(y)
    return _score(f[:, None, :], g[None, :, :], unit)


def _scores(x: Tensor, unit: Parameters, y: Tensor | None = None) -> Tensor:
    """:func:`score_matrix`, whose gradient passes by rows that are not finite: their scores are NaN as they are, and it
    would be NaN, too, where nobody asks for it."""

    def cleaned(rows: Tensor) -> tuple[Tensor, Tensor]:
        finite = rows.isfinite().all(1)
        return torch.where(finite[:, None], rows, 0.0), finite

    x, of_x = cleaned(x)
    y, of_y = (None, of_x) if y is None else cleaned(y)
    return torch.where(of_x[:, None] & of_y, score_matrix(x, unit, y), torch.nan)


def _first_best(scores: Tensor, allowed: Tensor, smallest: bool) -> tuple[Tensor, Tensor]:
    """Along the last dimension: the first index of the best allowed score that is no NaN, and whether there is one."""
    allowed = allowed & ~scores.isnan()
    if scores.shape[-1] == 0:
        none = scores.new_zeros(scores.shape[:-1], dtype=torch.bool)
        return none.long(), none
    worst = torch.inf if smallest else -torch.inf
    candidates = scores.masked_fill(~allowed, worst)
    best = candidates.amin(-1, keepdim=True) if smallest else candidates.amax(-1, keepdim=True)
    return (allowed & (scores == best)).byte().argmax(-1), allowed.any(-1)


def select_quadruplets(
    scores: Tensor, labels: Tensor, mode: Mode = "batch", *, ignore_label: int | None = None
) -> Quadruplets:
    """Hard quadruplets by any (n, n) matrix of similarities, which need not come from a unit.

    (i, j) is the positive pair of smallest score, k and l the negatives of largest score to i and to j. Rows labelled
    ``ignore_label`` are in no pair.
    """
    _checks.mode(mode)
    return _select(scores, *_pairs(labels, ignore_label), mode).of_rows(labels.shape[0])


def _pairs_between(
    labels: Tensor, others: Tensor, ids: Tensor | None, other_ids: Tensor | None, ignore_label: int | None
) -> tuple[Tensor, Tensor]:
    """Which pairs of a row and a reference are positive, and which negative: (n, m) bool each."""
    same = labels.long()[:, None] == others.long()
    paired = torch.ones_like(same)
    if ids is not None and other_ids is not None:
        paired &= ids.long()[:, None] != other_ids.long()
    for left_out, dim in ((unlabelled(labels, ignore_label), 1), (unlabelled(others, ignore_label), 0)):
        if left_out is not None:
            paired &= ~left_out.unsqueeze(dim)
    return same & paired, ~same & paired


def _pairs(labels: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which negative: (n, n) bool each."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    same = labels[:, None] == labels[None, :]
    left_out = unlabelled(labels, ignore_label)
    paired = torch.ones_like(same) if left_out is None else ~(left_out[:, None] | left_out[None, :])
    return same & paired & (rows[:, None] != rows[None, :]), ~same & paired


def _largest(values: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Where each row's ``count`` largest allowed values are, the first of equal ones, NaN last: (n, n) bool."""
    values = values.nan_to_num(nan=torch.finfo(values.dtype).min).masked_fill(~allowed, -torch.inf)
    order = values.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(allowed).scatter(1, order[:, :count], True) & allowed


def _select(scores: Tensor, positive: Tensor, negative: Tensor, mode: Mode) -> Quadruplets:
    return _select_among(scores, scores, positive if mode == "anchor" else positive.triu(), negative, negative, mode)


def _select_among(
    scores: Tensor, between: Tensor, positive: Tensor, negative: Tensor, negative_between: Tensor, mode: Mode
) -> Quadruplets:
    """Of n rows among m references: scores (n, m), those between references (m, m), and which pairs may be picked."""
    n, m = scores.shape
    rows = torch.arange(n, device=scores.device)
    detached = scores.detach()

    k_of, has_k = _first_best(detached, negative, smallest=False)
    l_of, has_l = _first_best(between.detach(), negative_between, smallest=False)
    if mode == "batch":
        flat, found = _first_best(detached.flatten(), positive.flatten(), smallest=True)
        i, j = flat.reshape(1) // max(m, 1), flat.reshape(1) % max(m, 1)
        found = found.reshape(1)
    elif mode == "anchor":
        i = rows
        j, found = _first_best(detached, positive, smallest=True)
    else:
        i, j = positive.nonzero(as_tuple=True)
        found = torch.ones_like(i, dtype=torch.bool)
    if n == 0 or m == 0:
        k = l = i  # noqa: E741
        valid = found
    else:
        k, l = k_of[i], l_of[j]  # noqa: E741
        valid = found & has_k[i] & has_l[j]

    def score(of: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if n == 0 or m == 0:
            return scores.new_zeros(a.shape)
        return torch.where(valid, of[a, b], 0.0)

    def index(a: Tensor) -> Tensor:
        return torch.where(valid, a, -1)

    s_ij, s_ik, s_jl = score(scores, i, j), score(scores, i, k), score(between, j, l)
    return Quadruplets(index(i), index(j), index(k), index(l), s_ij, s_ik, s_jl, valid)


def mine_and_score(
    feats: Tensor,
    labels: Tensor,
    unit: Parameters | None = None,
    *,
    mode: Mode = "batch",
    ignore_label: int | None = None,
    candidates: int | None = None,
    ref_feats: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Quadruplets:
    """Hard quadruplets of feats (n, d) with labels (n,) under the unit's score, and the scores of their pairs.

    With candidates, a row's negatives are those of them with the largest dot products, its positives those with the
    smallest; a pair is one that either of its rows has, or, with a slot for each row, that this row has.

    With references, j, k and l are rows of these. In a group every process mines the whole batch, and keeps its slots.
    """
    references = _checks.References(ref_feats, ref_labels, ids, ref_ids)
    if group is not None:
        given = (feats, labels, unit, mode, ignore_label, candidates, references, group)
        of = processes.of_miners(*given, default_unit)
        return _mine_group(feats, labels, unit, mode, ignore_label, references, group, of)
    check(ignore_label)
    unit, _ = _checks.mining(feats, labels, unit, mode, default_unit, candidates, references)
    left_out = unlabelled(labels, ignore_label)
    if ref_feats is not None and ref_labels is not None:
        others = ref_feats.to(autocast(feats).dtype)
        pairs = _pairs_between(labels, ref_labels, ids, ref_ids, ignore_label)
        apart = _pairs_between(ref_labels, ref_labels, ref_ids, ref_ids, ignore_label)[1]
        quads = _select_among(_scores(autocast(feats), unit, others), _scores(others, unit), *pairs, apart, mode)
        health.after_mining(quads, autocast(feats), labels, unit, left_out, ref_feats)
        return quads.of_rows(feats.shape[0], ref_feats.shape[0])
    positive, negative = _pairs(labels, ignore_label)
    if candidates is not None and candidates < feats.shape[0]:
        f = _unit_rows(feats).detach()
        with no_autocast(f):
            alike = f @ f.T
        negative = _largest(alike, negative, candidates)
        positive = _largest(-alike, positive, candidates)
        positive = positive if mode == "anchor" else positive | positive.T
    quads = _select(_scores(autocast(feats), unit), positive, negative, mode)
    health.after_mining(quads, autocast(feats), labels, unit, left_out)
    return quads.of_rows(feats.shape[0])


def _mine_group(
    feats: Tensor,
    labels: Tensor,
    unit: Parameters | None,
    mode: Mode,
    ignore_label: int | None,
    references: _checks.References,
    group: dist.ProcessGroup,
    of: list[int],
) -> Quadruplets:
    every, y = processes.gathered(feats, of, group), processes.shards(labels.long(), of, group)
    ref_feats, ref_labels, ids, ref_ids = references
    numbers = None if ids is None else processes.shards(ids.long(), of, group)
    among: dict[str, Any] = {"ref_feats": ref_feats, "ref_labels": ref_labels, "ids": numbers, "ref_ids": ref_ids}
    whole = mine_and_score(every, y, unit, mode=mode, ignore_label=ignore_label, **among)
    first = sum(of[: dist.get_rank(group)])
    last = first + of[dist.get_rank(group)]
    if mode == "anchor":
        return Quadruplets(*(field[first:last] for field in whole)).of_rows(len(every), references.number())
    own = (whole.i >= first) & (whole.i < last)
    if mode == "pair":  # a pair that is not valid has no row, but a place among all pairs
        positive = _pairs(y, ignore_label)[0].triu()
        if ref_labels is not None:
            positive = _pairs_between(y, ref_labels, numbers, ref_ids, ignore_label)[0]
        low = positive.nonzero()[:, 0]
        kept = (low >= first) & (low < last)
        return Quadruplets(*(field[kept] for field in whole)).of_rows(len(every), references.number())
    i, j, k, l = (torch.where(own, index, -1) for index in whole[:4])  # noqa: E741 - the paper's names
    s_ij, s_ik, s_jl = (torch.where(own, score, 0.0) for score in whole[4:7])
    quads = Quadruplets(i, j, k, l, s_ij, s_ik, s_jl, whole.valid & own)
    return quads.of_rows(len(every), references.number())


def topk(queries: Tensor, gallery: Tensor, k: int, unit: Parameters) -> tuple[Tensor, Tensor]:
    """The k best gallery rows of every query, best first: scores (q, k) and int64 indices (q, k). No gradient."""
    _checks.ranking(queries, gallery, k, unit)
    with torch.no_grad():
        scores = score_matrix(queries, unit, gallery)
        # A stable sort keeps the lowest index first among equals; NaN goes last.
        order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        first = order.sort(dim=-1, descending=True, stable=True).indices
        last = scores.isnan().gather(-1, first).byte().sort(dim=-1, stable=True).indices
        indices = first.gather(-1, last)[:, :k]
        return scores.gather(-1, indices), indices
