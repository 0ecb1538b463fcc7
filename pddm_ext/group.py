"""Mining the batch of all processes of a group, of which each scores its part of the pairs.

Rows are cut into as many blocks as there are processes. A process scores its block with itself and with the blocks
after it, in a ring, up to the opposite one, of which it has half::

    of 4 processes         0 1 2 3          the pairs of blocks a and b are scored by the number at (a, b); where two
                         0 0 0 ½ .          stand opposite each other, each takes half of the rows
                         1 . 1 1 ½
                         2 ½ . 2 2
                         3 3 ½ . 3

so that each has n²/2W of n²/2 pairs, give or take a row. What is then exchanged are the best of each row, O(n) numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .candidates import slots
from .precision import no_autocast, score_dtype
from .processes import gathered, shards
from .quadruplets import MODES
from .references import Best, Side, Tile, hardest, listed, number_classes, pair_masks, tile_scores
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


def _bests(rows: Side, ranks: _Ranks, tile: Tile) -> tuple[Best, Best, tuple[Tensor, Tensor, Tensor]]:
    """Every row's hardest negative and positive (by −S) so far as this process's pairs tell, and its positive pairs:
    i < j and their scores, (p,) each."""
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
                scores = tile(some.feats, some.feats[:0]) if at == to else tile(some.feats, more.feats)
                positive, negative = pair_masks(some, more)
                if at == to:
                    positive.fill_diagonal_(False)
                else:
                    near.offer(to, scores.T, negative.T, first)
                    far.offer(to, -scores.T, positive.T, first)
                near.offer(at, scores, negative, second)
                far.offer(at, -scores, positive, second)
                i, j = (positive.triu() if at == to else positive).nonzero(as_tuple=True)
                low, high = torch.minimum(i + first, j + second), torch.maximum(i + first, j + second)
                pairs.append((low, high, scores[i, j]))
    i, j, s_ij = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return near, far, (i, j, s_ij)


def _rows(rows: Side, ranks: _Ranks, tile: Tile, own: slice, *, anchors: bool) -> tuple[Tensor, ...]:
    near, far, pairs = _bests(rows, ranks, tile)
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
    # Of all processes' the least, by its number where several are equal.
    pair = Best(1, s_ij, s_ij.dtype)
    pair.score, pair.column, pair.found = -s_ij, i * n + j, valid
    ranks.settle(pair)
    if not bool(pair.found):
        none = torch.zeros_like(i)
        return slots(pair.found, (none,) * 4, (s_ij,) * 3)
    i, j, s_ij = pair.column // n, pair.column % n, -pair.score
    part = ranks.part(n)
    both, columns = rows.part(torch.cat([i, j])), rows.part(part)
    near = Best(2, rows.feats, s_ij.dtype)
    for first, some in columns.parts():
        near.offer(slice(0, 2), tile(both.feats, some.feats), pair_masks(both, some)[1], part.start + first)
    ranks.settle(near)
    valid = near.found.all()[None] & (i >= own.start) & (i < own.stop)
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


def mine_group(
    feats: Tensor,
    labels: Tensor,
    of: list[int],
    ignore_label: int | None,
    unit: ops.UnitArguments,
    mode: int,
    group: dist.ProcessGroup,
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
    """
    ranks = _Ranks(group)
    first = sum(of[: ranks.rank])
    own = slice(first, first + of[ranks.rank])
    left_out = unlabelled(labels, ignore_label)
    if left_out is None:
        left_out = torch.zeros_like(labels, dtype=torch.bool)
    every = gathered(feats, of, group)
    y, out = shards(torch.stack([labels.long(), left_out.long()], dim=1), of, group).unbind(1)
    classes = number_classes(y, y[:0], out.bool(), None)[0]
    rows = Side(every.detach(), classes, None)
    tile = _tile_or_square(unit, feats.dtype)
    with torch.no_grad(), no_autocast(feats):
        if MODES[mode] == "batch":
            mined = _batch(rows, ranks, tile, own, unit)
        else:
            mined = _rows(rows, ranks, tile, own, anchors=MODES[mode] == "anchor")
    return (*_Scored.apply(every, mined, *unit), *mined[3:])  # type: ignore[no-untyped-call]


def _tile_or_square(unit: Sequence[Any], dtype: torch.dtype) -> Tile:
    """Scores of two sides; with an empty second one, of the first with itself, each pair once."""
    rectangle = tile_scores(unit, dtype)

    def tile(rows: Tensor, columns: Tensor) -> Tensor:
        if len(columns):
            return rectangle(rows, columns)
        scores: Tensor = torch.ops.pddm.score_matrix(rows, -1, *unit)
        return scores

    return tile
