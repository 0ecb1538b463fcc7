"""Mining the batch of all processes of a group, of which each scores its part of the pairs.

Rows are cut into as many blocks as there are processes. A process scores its block with itself and with the blocks
after it, in a ring, up to the opposite one, of which it has half::

    of 4 processes         0 1 2 3          the pairs of blocks a and b are scored by the number at (a, b); where two
                         0 0 0 ½ .          stand opposite each other, each takes half of the rows
                         1 . 1 1 ½
                         2 ½ . 2 2
                         3 3 ½ . 3

so that each has n²/2W of n²/2 pairs, give or take a row. What is then exchanged are the best of each row, O(n) numbers,
and in mode "pair" the positive pairs' scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, health, ops
from .candidates import slots
from .precision import no_autocast, score_dtype
from .processes import gathered, shards
from .quadruplets import MODES
from .references import (
    Best,
    Side,
    Tile,
    backward,
    hardest,
    hardest_negatives,
    keep_among,
    listed,
    number_classes,
    one_side,
    pair_masks,
    positives_among,
    rows_among,
    tile_scores,
)
from .unlabelled import unlabelled


class _Ranks:
    """This process among those of its group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def part(self, total: int, rank: int | None = None) -> slice:
        """A process's even share of so many things."""
        rank = self.rank if rank is None else rank % self.world
        return slice(rank * total // self.world, (rank + 1) * total // self.world)

    def settle(self, best: Best) -> None:
        """Make the best of all processes each one's."""
        score = best.score.masked_fill(~best.found, -torch.inf)
        dist.all_reduce(score, dist.ReduceOp.MAX, group=self.group)
        none = torch.iinfo(torch.int64).max
        column = torch.where(best.found & (best.score == score), best.column, none)
        dist.all_reduce(column, dist.ReduceOp.MIN, group=self.group)
        best.found = column < none
        best.score, best.column = torch.where(best.found, score, 0), torch.where(best.found, column, 0)

    def least(self, score: Tensor, number: Tensor, found: Tensor) -> Best:
        """Of the processes' pairs, one each, that of the least score (by −S), or of equal ones of the least number."""
        pair = Best(1, score, score.dtype)
        pair.score, pair.column, pair.found = -score, number, found
        self.settle(pair)
        return pair

    def negatives(self, rows: Side, others: Side, tile: Tile) -> Best:
        """The hardest negatives of a few rows, the same in every process, each of which compares part of the others."""
        part = self.part(len(others.classes))
        near = hardest_negatives(rows, others.part(part), tile, score_dtype(rows.feats))
        near.column += part.start
        self.settle(near)
        return near

    def lists(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the processes have listed, each any number of entries, one after the other."""
        own = torch.tensor([len(parts[0])], device=parts[0].device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self.group)
        counts = [int(count) for count in every]
        if max(counts) == 0:
            return parts
        return tuple(shards(part, counts, self.group) for part in parts)


def _blocks(n: int, ranks: _Ranks) -> Iterator[tuple[slice, slice]]:
    """This process's rectangles of rows × later rows, and first its square, of whose pairs the half counts."""
    own = ranks.part(n)
    yield own, own
    for apart in range(1, (ranks.world - 1) // 2 + 1):
        yield own, ranks.part(n, ranks.rank + apart)
    if ranks.world % 2 == 0:
        half = ranks.world // 2
        low = ranks.part(n, min(ranks.rank, (ranks.rank + half) % ranks.world))
        high = ranks.part(n, max(ranks.rank, (ranks.rank + half) % ranks.world))
        middle = (low.start + low.stop) // 2
        yield (slice(low.start, middle) if ranks.rank < half else slice(middle, low.stop)), high


def _bests(rows: Side, ranks: _Ranks, tile: Tile, *, listing: bool) -> tuple[Best, Best, tuple[Tensor, Tensor, Tensor]]:
    """Every row's hardest negative and positive (by −S) so far as this process's pairs tell, and its positive pairs
    if they are to be listed: i < j and their scores, (p,) each."""
    n, dtype = len(rows.classes), score_dtype(rows.feats)
    near, far = (Best(n, rows.feats, dtype) for _ in range(2))
    pairs = [(near.column[:0], near.column[:0], near.score[:0])]
    for whole, others in _blocks(n, ranks):
        for a, some in rows.part(whole).parts():
            for b, more in rows.part(others).parts():
                first, second = whole.start + a, others.start + b
                at, to = slice(first, first + len(some.classes)), slice(second, second + len(more.classes))
                if whole == others and to.start < at.start:
                    continue
                scores = tile(some.feats, None if at == to else more.feats)
                positive, negative = pair_masks(some, more)
                if at == to:
                    positive.fill_diagonal_(False)
                else:
                    near.offer(to, scores.T, negative.T, first)
                    far.offer(to, -scores.T, positive.T, first)
                near.offer(at, scores, negative, second)
                far.offer(at, -scores, positive, second)
                if not listing:
                    continue
                i, j = (positive.triu() if at == to else positive).nonzero(as_tuple=True)
                low, high = torch.minimum(i + first, j + second), torch.maximum(i + first, j + second)
                pairs.append((low, high, scores[i, j]))
    i, j, s_ij = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return near, far, (i, j, s_ij)


def _rows(rows: Side, ranks: _Ranks, tile: Tile, own: slice, *, anchors: bool) -> tuple[Tensor, ...]:
    near, far, pairs = _bests(rows, ranks, tile, listing=not anchors)
    ranks.settle(near)
    if anchors:
        ranks.settle(far)
        i = torch.arange(own.start, own.stop, device=rows.feats.device)
        j, s_ij, valid = far.column[i], -far.score[i], far.found[i]
    else:
        i, j, s_ij = ranks.lists(pairs)
        order = (i * len(rows.classes) + j).argsort()
        order = order[(i[order] >= own.start) & (i[order] < own.stop)]
        i, j, s_ij = i[order], j[order], s_ij[order]
        valid = torch.ones_like(i, dtype=torch.bool)
    valid = valid & near.found[i] & near.found[j]
    return slots(valid, (i, j, near.column[i], near.column[j]), (s_ij, near.score[i], near.score[j]))


def _batch(rows: Side, ranks: _Ranks, tile: Tile, own: slice, unit: Sequence[Any]) -> tuple[Tensor, ...]:
    n = len(rows.classes)
    order = rows.classes.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=order.device)
    later = torch.searchsorted(rows.classes[order], rows.classes, right=True) - place - 1
    later = torch.where(rows.classes >= 0, later, 0)
    i, j, s_ij, valid = hardest(listed(order, place + 1, later, (ranks.rank, ranks.world)), rows, rows, unit)
    pair = ranks.least(s_ij, i * n + j, valid)
    i, j, s_ij = pair.column // max(n, 1), pair.column % max(n, 1), -pair.score
    near = ranks.negatives(rows.part(torch.cat([i, j])), rows, tile) if bool(pair.found) else _none(s_ij)
    valid = pair.found & near.found.all() & (i >= own.start) & (i < own.stop)
    return slots(valid, (i, j, near.column[:1], near.column[1:]), (s_ij, near.score[:1], near.score[1:]))


def _none(like: Tensor) -> Best:
    """Of two rows."""
    return Best(2, like, like.dtype)


def _rows_among(rows: Side, references: Side, ranks: _Ranks, tile: Tile, *, anchors: bool) -> tuple[Tensor, ...]:
    """Slots of this process's rows, whose i are its own numbers. A reference that several have picked is compared with
    all once."""

    def negatives_of(j: Tensor) -> Best:
        every = torch.unique(ranks.lists((j,))[0])
        best = Best(len(every), rows.feats, score_dtype(rows.feats))
        part = ranks.part(len(every))
        own = hardest_negatives(references.part(every[part]), references, tile, best.score.dtype)
        best.score[part], best.column[part], best.found[part] = own.score, own.column, own.found
        ranks.settle(best)
        at = torch.searchsorted(every, j)
        best.score, best.column, best.found = best.score[at], best.column[at], best.found[at]
        return best

    return rows_among(rows, references, tile, negatives_of, anchors=anchors)


def _batch_among(
    rows: Side, references: Side, every: Side, first: int, ranks: _Ranks, tile: Tile, unit: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The one slot, with this process's number of i if that is its own. ``every`` are the rows of all, ``first`` is
    where its own begin."""
    n, m = len(rows.classes), max(len(references.classes), 1)
    i, j, s_ij, valid = hardest(positives_among(rows, references), rows, references, unit)
    pair = ranks.least(s_ij, (i + first) * m + j, valid)
    i, j, s_ij = pair.column // m, pair.column % m, -pair.score
    near = _none(s_ij)
    if bool(pair.found):
        near = ranks.negatives(one_side(every.part(i), references.part(j)), references, tile)
    i = i - first
    valid = pair.found & near.found.all() & (i >= 0) & (i < n)
    return slots(valid, (i, j, near.column[:1], near.column[1:]), (s_ij, near.score[:1], near.score[1:]))


class _Scored(torch.autograd.Function):
    """Scores that are known, with their gradient to the rows of all and to the unit."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, mined: tuple[Tensor, ...], *unit: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(every, *unit[:8], *mined[3:7])
        ctx.switches, ctx.others = unit[8:], len(unit) - 8
        return tuple(score.clone() for score in mined[:3])

    backward = staticmethod(ops.mine_backward)


class _ScoredAmong(torch.autograd.Function):
    """Scores that are known, with their gradient to this process's rows, the references and the unit."""

    @staticmethod
    def forward(
        ctx: Any, mined: tuple[Tensor, ...], feats: Tensor, ref_feats: Tensor, *unit: Any
    ) -> tuple[Tensor, ...]:
        keep_among(ctx, feats, ref_feats, unit, mined)
        return tuple(score.clone() for score in mined[:3])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        d_feats, _, d_refs, _, _, _, *d_unit = backward(ctx, *upstream)
        return (None, d_feats, d_refs, *d_unit[:10])


def mine_group(
    feats: Tensor,
    labels: Tensor,
    of: list[int],
    ignore_label: int | None,
    unit: ops.UnitArguments,
    mode: int,
    group: dist.ProcessGroup,
    references: _checks.References = _checks.NO_REFERENCES,
) -> tuple[Tensor, ...]:
    """What the operator ``mine`` gives for this process's slots of the batch of all.

    Args:
        feats: (n, d), this process's rows.
        labels: (n,).
        of: rows of every process.
        ignore_label: the label of rows that are in no pair, or None.
        unit: its arguments.
        mode: its number.
        group: whose processes all call this.
        references: the same in every process, or none.
    """
    ranks = _Ranks(group)
    first = sum(of[: ranks.rank])
    own = slice(first, first + of[ranks.rank])
    if references.feats is not None and references.labels is not None:
        return _among(feats, labels, of, own, ignore_label, unit, mode, ranks, references)
    left_out = unlabelled(labels, ignore_label)
    if left_out is None:
        left_out = torch.zeros_like(labels, dtype=torch.bool)
    every = gathered(feats, of, group)
    y, out = shards(torch.stack([labels.long(), left_out.long()], dim=1), of, group).unbind(1)
    classes = number_classes(y, y[:0], out.bool(), None)[0]
    health.of_group(every.detach(), classes)
    rows = Side(every.detach(), classes, None)
    tile = tile_scores(unit, feats.dtype)
    with torch.no_grad(), no_autocast(feats):
        if MODES[mode] == "batch":
            mined = _batch(rows, ranks, tile, own, unit)
        else:
            mined = _rows(rows, ranks, tile, own, anchors=MODES[mode] == "anchor")
    return (*_Scored.apply(every, mined, *unit), *mined[3:])  # type: ignore[no-untyped-call]


def _among(
    feats: Tensor,
    labels: Tensor,
    of: list[int],
    own: slice,
    ignore_label: int | None,
    unit: ops.UnitArguments,
    mode: int,
    ranks: _Ranks,
    references: _checks.References,
) -> tuple[Tensor, ...]:
    ref_feats, ref_labels, ids, ref_ids = references
    assert ref_feats is not None
    assert ref_labels is not None
    health.before_mining(ref_feats=ref_feats)
    outs = unlabelled(labels, ignore_label), unlabelled(ref_labels, ignore_label)
    classes, ref_classes = number_classes(labels, ref_labels, *outs)
    rows = Side(feats.detach(), classes, None if ids is None else ids.long())
    others = Side(ref_feats.detach(), ref_classes, None if ref_ids is None else ref_ids.long())
    tile = tile_scores(unit, feats.dtype)
    with torch.no_grad(), no_autocast(feats):
        if MODES[mode] != "batch":
            mined = _rows_among(rows, others, ranks, tile, anchors=MODES[mode] == "anchor")
        else:
            # Of the one row that is i the others know nothing, and its class is numbered anew in each process.
            samples = torch.zeros_like(classes) if rows.ids is None else rows.ids
            known = torch.stack([labels.long(), (classes >= 0).long(), samples], dim=1)
            y, there, numbers = shards(known, of, ranks.group).unbind(1)
            every_class = number_classes(y, ref_labels, there == 0, outs[1])
            every = Side(shards(rows.feats, of, ranks.group), every_class[0], None if ids is None else numbers)
            rows, others = every.part(own), Side(others.feats, every_class[1], others.ids)
            mined = _batch_among(rows, others, every, own.start, ranks, tile, unit)
    scores = _ScoredAmong.apply(mined, feats, ref_feats, *unit)  # type: ignore[no-untyped-call]
    i = torch.where(mined[7], mined[3] + own.start, -1)
    return (*scores, i, *mined[4:])
