"""Mining among references: rows that are not the batch, such as a memory bank's.

They are streamed in tiles of a fixed size, so that memory grows with the rows of the batch and not with the number of
pairs; of each tile nothing is kept but the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, ops
from .candidates import first_largest, slots
from .precision import no_autocast, score_dtype
from .quadruplets import MODES

#: Rows of a tile's sides, and pairs of a list that are scored at once.
_SIDE, _AT_ONCE = 2048, 2**14

Tile = Callable[[Tensor, Tensor | None], Tensor]
"""Scores of rows (r, d) with others (c, d): (r, c); or with themselves (r, r), each pair once."""


class Side(NamedTuple):
    """Rows that pairs are made of, on one side."""

    #: (n, d), any norms.
    feats: Tensor
    #: (n,) int64, numbers of classes from 0; −1 is in no pair.
    classes: Tensor
    #: (n,) int64, equal for rows of one sample, or None: no two are.
    ids: Tensor | None

    def part(self, rows: Tensor | slice) -> Side:
        return Side(self.feats[rows], self.classes[rows], None if self.ids is None else self.ids[rows])

    def parts(self) -> Iterator[tuple[int, Side]]:
        """Pieces of at most a tile's side, and the row that each starts at."""
        for first in range(0, len(self.classes), _SIDE):
            yield first, self.part(slice(first, first + _SIDE))


def number_classes(
    labels: Tensor, ref_labels: Tensor, left_out: Tensor | None, ref_left_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Labels (n,) and (m,) of any integers as numbers from 0; −1 for rows that are left out (bool, or None)."""
    both = torch.cat([labels.long(), ref_labels.long()])
    ranked = torch.searchsorted(both.sort().values, both)
    classes, ref_classes = ranked[: labels.shape[0]], ranked[labels.shape[0] :]
    if left_out is not None:
        classes = torch.where(left_out, -1, classes)
    if ref_left_out is not None:
        ref_classes = torch.where(ref_left_out, -1, ref_classes)
    return classes, ref_classes


def pair_masks(rows: Side, others: Side) -> tuple[Tensor, Tensor]:
    """Which pairs of two sides are positive, and which negative: (r, c) bool each."""
    there = (rows.classes[:, None] >= 0) & (others.classes >= 0)
    if rows.ids is not None and others.ids is not None:
        there &= rows.ids[:, None] != others.ids
    same = rows.classes[:, None] == others.classes
    return there & same, there & ~same


class Best:
    """The largest of each row so far, NaN never, and of equal ones the lowest column, in whatever order they come."""

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self.score = like.new_zeros(rows, dtype=dtype)
        self.column = like.new_zeros(rows, dtype=torch.int64)
        self.found = like.new_zeros(rows, dtype=torch.bool)

    def offer(self, rows: slice, scores: Tensor, allowed: Tensor, first: int) -> None:
        at, score, found = first_largest(scores.masked_fill(~allowed, torch.nan))
        at += first
        earlier = (score == self.score[rows]) & (at < self.column[rows])
        better = found & (~self.found[rows] | (score > self.score[rows]) | earlier)
        self.score[rows] = torch.where(better, score, self.score[rows])
        self.column[rows] = torch.where(better, at, self.column[rows])
        self.found[rows] |= found


def hardest_negatives(rows: Side, references: Side, tile: Tile, dtype: torch.dtype) -> Best:
    """Of each row, by scores of that dtype."""
    best = Best(len(rows.classes), rows.feats, dtype)
    for at, some in rows.parts():
        for first, others in references.parts():
            scores = tile(some.feats, others.feats)
            best.offer(slice(at, at + len(some.classes)), scores, pair_masks(some, others)[1], first)
    return best


def tile_scores(unit: Sequence[Any], dtype: torch.dtype) -> Tile:
    """Scores of a tile by the unit's arguments, in the precision of a dtype."""

    def tile(rows: Tensor, columns: Tensor | None) -> Tensor:
        joined, split = rows.to(dtype), -1
        if columns is not None:
            joined, split = torch.cat([joined, columns.to(dtype)]), len(rows)
        scores: Tensor = torch.ops.pddm.score_matrix(joined, split, *unit)
        return scores

    return tile


def _mine(feats: Tensor, classes: Tensor, ref_feats: Tensor, ref_classes: Tensor, *others: Any) -> tuple[Tensor, ...]:
    ids, ref_ids, *unit, mode = others
    rows, references = Side(feats, classes, ids), Side(ref_feats, ref_classes, ref_ids)
    tile = tile_scores(unit, feats.dtype)
    with no_autocast(feats):
        if MODES[mode] == "batch":
            return _batch(rows, references, tile, unit)

        def negatives_of(j: Tensor) -> Best:
            return hardest_negatives(references.part(j), references, tile, score_dtype(feats))

        return rows_among(rows, references, tile, negatives_of, anchors=MODES[mode] == "anchor")


def rows_among(
    rows: Side, references: Side, tile: Tile, negatives_of: Callable[[Tensor], Best], *, anchors: bool
) -> tuple[Tensor, ...]:
    """The quadruplet of each row with its own hardest positive, or of each positive pair.

    ``negatives_of`` gives the hardest negatives of distinct references.
    """
    n, dtype = len(rows.classes), score_dtype(rows.feats)
    far, near = (Best(n, rows.feats, dtype) for _ in range(2))
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for at, some in rows.parts():
        block = slice(at, at + len(some.classes))
        for first, others in references.parts():
            scores = tile(some.feats, others.feats)
            positive, negative = pair_masks(some, others)
            near.offer(block, scores, negative, first)
            if anchors:
                far.offer(block, -scores, positive, first)
            else:
                i, j = positive.nonzero(as_tuple=True)
                pairs.append((i + at, j + first, scores[i, j]))
    if anchors:
        i, j, s_ij, valid = torch.arange(n, device=rows.feats.device), far.column, -far.score, far.found
    else:
        none = far.column[:0], far.column[:0], far.score[:0]
        i, j, s_ij = (torch.cat(parts) for parts in zip(none, *pairs, strict=True))
        order = (i * len(references.classes) + j).argsort()
        i, j, s_ij = i[order], j[order], s_ij[order]
        valid = torch.ones_like(i, dtype=torch.bool)
    valid = valid & near.found[i]
    l, s_jl = torch.zeros_like(j), torch.zeros_like(s_ij)  # noqa: E741 - the paper's name
    found = torch.zeros_like(valid)
    distinct, place = torch.unique(j[valid], return_inverse=True)
    best = negatives_of(distinct)
    l[valid], s_jl[valid], found[valid] = best.column[place], best.score[place], best.found[place]
    return slots(valid & found, (i, j, near.column[i], l), (s_ij, near.score[i], s_jl))


def _batch(rows: Side, references: Side, tile: Tile, unit: Sequence[Any]) -> tuple[Tensor, ...]:
    """The quadruplet of the hardest positive pair."""
    i, j, s_ij, valid = hardest(positives_among(rows, references), rows, references, unit)
    k, l = torch.zeros_like(i), torch.zeros_like(i)  # noqa: E741 - the paper's name
    s_ik, s_jl = torch.zeros_like(s_ij), torch.zeros_like(s_ij)
    if bool(valid):
        near = hardest_negatives(one_side(rows.part(i), references.part(j)), references, tile, s_ij.dtype)
        k, l, s_ik, s_jl = near.column[:1], near.column[1:], near.score[:1], near.score[1:]  # noqa: E741
        valid = near.found.all()[None]
    return slots(valid, (i, j, k, l), (s_ij, s_ik, s_jl))


def positives_among(rows: Side, references: Side) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (i, j) of equal classes, of one sample too, in the order of i, then j."""
    order = references.classes.argsort(stable=True)
    in_order = references.classes[order]
    begin = torch.searchsorted(in_order, rows.classes)
    counts = torch.searchsorted(in_order, rows.classes, right=True) - begin
    return listed(order, begin, torch.where(rows.classes >= 0, counts, 0))


def hardest(
    positives: Iterable[tuple[Tensor, Tensor]], rows: Side, references: Side, unit: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of listed pairs (i, j), in the order of i, then j, the first of least score: i, j, s_ij and whether there is one,
    (1,) each."""
    like = rows.feats
    best = like.new_zeros(1, dtype=score_dtype(like))
    pair, valid = like.new_zeros(2, 1, dtype=torch.int64), like.new_zeros(1, dtype=torch.bool)
    for i, j in positives:
        if rows.ids is not None and references.ids is not None:
            apart = rows.ids[i] != references.ids[j]
            i, j = i[apart], j[apart]
        if len(i) == 0:
            continue
        (of_i, at_i), (of_j, at_j) = (torch.unique(side, return_inverse=True) for side in (i, j))
        joined = torch.cat([rows.feats[of_i], references.feats[of_j].to(like.dtype)])
        scores = torch.ops.pddm.score_pairs(joined, at_i, at_j + len(of_i), *unit)
        at, score, found = first_largest(-scores[None])
        better = found & (~valid | (-score < best))
        best, valid = torch.where(better, -score, best), valid | found
        pair = torch.where(better, torch.stack([i[at], j[at]]), pair)
    return pair[0], pair[1], best, valid


def one_side(a: Side, b: Side) -> Side:
    ids = None if a.ids is None or b.ids is None else torch.cat([a.ids, b.ids])
    return Side(torch.cat([a.feats, b.feats.to(a.feats.dtype)]), torch.cat([a.classes, b.classes]), ids)


def listed(
    order: Tensor, begin: Tensor, counts: Tensor, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of each row i with order[begin[i]], …, order[begin[i] + counts[i] − 1], some thousands at a time.

    Args:
        order: (m,) rows.
        begin: (n,) places in the order.
        counts: (n,).
        part: which of how many even parts of the list.
    """
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    last = (part[0] + 1) * total // part[1]
    for first in range(part[0] * total // part[1], last, _AT_ONCE):
        number = torch.arange(first, min(last, first + _AT_ONCE), device=order.device)
        i = torch.searchsorted(ends, number, right=True)
        # Counted from the end of the row's own.
        yield i, order[begin[i] + counts[i] - (ends[i] - number)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    feats, _, ref_feats, _, _, _, *unit, _ = inputs
    ctx.mark_non_differentiable(*output[3:])
    keep_among(ctx, feats, ref_feats, unit, output)


def keep_among(ctx: Any, feats: Tensor, ref_feats: Tensor, unit: Sequence[Any], mined: tuple[Tensor, ...]) -> None:
    """Of the references only those that were picked, however many there are; each once, where shapes may say how many.
    A memory bank may go on meanwhile."""
    named = torch.cat(mined[4:7])
    picked, place = named.clamp(min=0), torch.arange(named.shape[0], device=named.device)
    if _checks.concrete(named):
        picked, place = torch.unique(picked, return_inverse=True)
    rows = ref_feats[picked] if ref_feats.shape[0] else ref_feats.new_zeros(picked.shape[0], ref_feats.shape[1])
    place = torch.where(named < 0, -1, place + feats.shape[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feats, rows.detach(), picked, place, mined[3], *unit[:8])
    ctx.switches, ctx.references = unit[8:], ref_feats.shape


def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    feats, rows, picked, place, i, *unit = ctx.saved_tensors
    if all(g is None for g in upstream[:3]):
        return (None,) * 17
    n = feats.shape[0]
    j, k, l = place.reshape(3, i.shape[0]).unbind()  # noqa: E741 - the paper's names
    joined = torch.cat([feats, rows.to(feats.dtype)])
    given = [(g, a, b) for g, a, b in zip(upstream[:3], (i, i, j), (j, k, l), strict=True) if g is not None]
    weight, first, second = (torch.cat(parts) for parts in zip(*given, strict=True))
    d_joined, *d_unit = ops.call("score_pairs_backward", weight, joined, first, second, *unit, *ctx.switches)
    d_refs = None
    if ctx.needs_input_grad[2] and ctx.references[0]:
        d_refs = d_joined.new_zeros(ctx.references).index_add(0, picked, d_joined[n:]).to(rows.dtype)
    return (d_joined[:n], None, d_refs, None, None, None, *d_unit, None, None, None)


def mine_references(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator ``mine`` with the references' features and classes after the batch's, and then ids of both."""
    mined: tuple[Tensor, ...] = ops.call("mine_references", *arguments)
    return mined


def _shapes(feats: Tensor, classes: Tensor, ref_feats: Tensor, ref_classes: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shapes: tuple[Tensor, ...] = ops.shapes_of_mining(feats, classes, *others[2:])
    return shapes


def _operator() -> torch.library.Library:
    schema = str(torch.ops.pddm.mine.default._schema)
    rows = "Tensor feats, Tensor classes, Tensor ref_feats, Tensor ref_classes, Tensor? ids, Tensor? ref_ids"
    schema = schema.replace("pddm::mine(Tensor feats, Tensor labels", f"mine_references({rows}")
    library = torch.library.Library("pddm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema)  # type: ignore[no-untyped-call]
    torch.library.register_kernel("pddm::mine_references", ("cpu", "cuda"), _mine, lib=library)
    ops.shapes("mine_references")(_shapes)
    ops.differentiable("mine_references", backward, _keep)
    return library


_LIBRARY = _operator()  # whose registrations end with it
