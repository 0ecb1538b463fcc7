"""Mining that scores no more pairs than a row has candidates: the rows of other classes nearest to it by dot product.

The dot products are n², too, but of 2d operations each, where a score has 2dh + 4hm; they are made block by block and
nothing but each row's nearest is kept of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .precision import no_autocast, score_dtype
from .quadruplets import MODES

#: Dot products in memory at once.
_ENTRIES = 2**22


class Candidates(NamedTuple):
    """Rows that a row is scored with, in ascending order, −1 where there are fewer."""

    #: (n, C) int64, of other classes: the C nearest.
    near: Tensor
    #: (n, F) int64, F ≤ C, of its own class: the F farthest, which are all where a class has no more.
    far: Tensor


@torch.no_grad()
def choose(feats: Tensor, labels: Tensor, count: int) -> Candidates:
    """Each row's candidates, by the dot product of unit rows; of equal ones the lowest rows, and NaN last.

    Args:
        feats: (n, d), any strides and norms.
        labels: (n,), any integers.
        count: C, from 1 to n − 1.
    """
    with no_autocast(feats):
        rows = F.normalize(feats.to(score_dtype(feats)), dim=1)
        n = len(rows)
        classes, size = torch.unique(labels.long(), return_inverse=True, return_counts=True)[1:]
        order = classes.argsort(stable=True)
        begin = size.cumsum(0) - size
        near = torch.empty(n, count, dtype=torch.int64, device=rows.device)
        for lot in torch.split(torch.arange(n, device=rows.device), max(1, _ENTRIES // n)):
            same = classes[lot, None] == classes
            near[lot] = _first(rows[lot] @ rows.T, same, count)

        most = min(int(size.max()) - 1, count)
        far = torch.full((n, most), -1, device=rows.device)
        others = torch.arange(most, device=rows.device)
        place = torch.empty_like(order)
        place[order] = torch.arange(n, device=rows.device) - begin[classes[order]]
        # Of a small class the others, itself skipped.
        small = size[classes] - 1 <= count
        at = others + (others >= place[small, None])
        there = others < size[classes[small], None] - 1
        at = (begin[classes[small], None] + at).clamp(max=n - 1)
        far[small] = torch.where(there, order[at], -1)
        for c in (size - 1 > count).nonzero().flatten().tolist():
            own = order[begin[c] : begin[c] + size[c]]
            for lot in torch.split(torch.arange(len(own), device=rows.device), max(1, _ENTRIES // len(own))):
                itself = lot[:, None] == torch.arange(len(own), device=rows.device)
                far[own[lot]] = own[_first(-(rows[own[lot]] @ rows[own].T), itself, most)]
    return Candidates(near, far)


def _first(values: Tensor, but: Tensor, count: int) -> Tensor:
    """Columns of each row's largest values in ascending order, −1 where there are fewer; NaN is the least.

    Args:
        values: (r, c), which are changed.
        but: (r, c), which do not count.
    """
    values.nan_to_num_(nan=torch.finfo(values.dtype).min)
    values.masked_fill_(but, -torch.inf)
    found, columns = values.topk(min(count + 1, values.shape[1]))
    if found.shape[1] > count:
        # topk takes any of equal values; where they are the last ones wanted, a stable sort takes the lowest columns.
        tied = (found[:, count - 1] == found[:, count]) & (found[:, count] > -torch.inf)
        found, columns = found[:, :count], columns[:, :count]
        if bool(tied.any()):
            columns[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    columns = torch.where(found > -torch.inf, columns, values.shape[1]).sort(dim=1).values
    return torch.where(columns < values.shape[1], columns, -1)


def _mine(feats: Tensor, labels: Tensor, *unit_mode_and_count: Any) -> tuple[Tensor, ...]:
    """What the operator ``mine`` gives, of candidates alone; in mode ``"pair"`` of the positive pairs that are scored.

    Each unordered pair is scored once, though both of its rows may ask for it.
    """
    *unit, mode, count = unit_mode_and_count
    n = len(feats)
    near, far = choose(feats, labels, count)
    rows = torch.arange(n, device=feats.device)
    (negative, of_near), (positive, of_far) = (_distinct(rows, asked) for asked in (near, far))
    pairs = torch.cat([positive, negative])
    scores = torch.ops.pddm.score_pairs(feats, pairs // n, pairs % n, *unit)
    positives, negatives = scores.split([len(positive), len(negative)])

    k, s_k, found = _largest(_spread(negatives, of_near, near), near)
    if MODES[mode] == "anchor":
        i = rows
        j, s_ij, valid = _largest(-_spread(positives, of_far, far), far)
        s_ij = -s_ij
    else:
        i, j, s_ij = positive // n, positive % n, positives
        valid = torch.ones_like(i, dtype=torch.bool)
        if MODES[mode] == "batch":
            every = torch.arange(len(positive), device=feats.device)[None]
            at, s_ij, valid = _largest(-positives[None], every)
            i, j, s_ij = (i[at], j[at], -s_ij) if len(positive) else (rows[:1], rows[:1], s_ij)
    valid = valid & found[i] & found[j]
    slots = [torch.where(valid, index, -1) for index in (i, j, k[i], k[j])]
    return (*(torch.where(valid, s, 0) for s in (s_ij, s_k[i], s_k[j])), *slots, valid)


def _distinct(rows: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """The unordered pairs of rows with those they ask for, i·n + j of i < j in ascending order; and where each is."""
    rows = rows[:, None].expand_as(asked)[asked >= 0]
    others = asked[asked >= 0]
    keys = torch.minimum(rows, others) * len(asked) + torch.maximum(rows, others)
    distinct, place = torch.unique(keys, return_inverse=True)
    return distinct, place


def _spread(scores: Tensor, places: Tensor, asked: Tensor) -> Tensor:
    """Scores of the pairs that each row asks for, in their places; NaN where it asks for none."""
    spread = scores.new_full(asked.shape, torch.nan)
    spread[asked >= 0] = scores[places]
    return spread


def _largest(scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the column of its largest score that is no NaN (the first of equal ones), the score, and whether
    there is one."""
    if scores.shape[1] == 0:
        none = scores.new_zeros(len(scores), dtype=torch.bool)
        return none.long(), scores.new_zeros(len(scores)), none
    # Above any score: −∞ is one, too.
    counts = ~scores.isnan()
    best = scores.masked_fill(~counts, -torch.inf).amax(1)
    at = (counts & (scores == best[:, None])).byte().argmax(1, keepdim=True)
    return columns.gather(1, at)[:, 0], scores.gather(1, at)[:, 0], counts.any(1)


def mine_candidates(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator ``mine`` with a number of candidates, fewer than rows, after its arguments."""
    mined: tuple[Tensor, ...] = ops.call("mine_candidates", *arguments)
    return mined


def _operator() -> torch.library.Library:
    schema = str(torch.ops.pddm.mine.default._schema)
    schema = schema.replace("pddm::mine(", "mine_candidates(").replace(", int mode)", ", int mode, SymInt candidates)")
    library = torch.library.Library("pddm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema)  # type: ignore[no-untyped-call]
    library.impl("mine_candidates", _mine, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    ops.shapes("mine_candidates")(ops.shapes_of_mining)
    ops.differentiable("mine_candidates", ops.mine_backward, ops.keep_mined)
    return library


_LIBRARY = _operator()  # whose registrations end with it
