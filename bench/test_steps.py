"""What stands around mining in a training step: the way back, and small batches' bookkeeping. A row is a test."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pddm_ext import mine_and_score, score_pairs
from races import batch, efficiency, pair_operations, race, row, seconds, training_step


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("pairs", "wanted"), [(768, 0.8), (12288, 0.9)])
def test_listed_pairs(benchmark: Any, pairs: int, wanted: float, direction: str) -> None:
    """The way back is counted as three times the forward's irreducible work. A second share counts the rows' products
    with W_v, too, which no call can leave out and many pairs share."""
    feats, _, unit = batch(256, 512)
    feats.requires_grad_()
    i = torch.randint(256, (pairs,))
    j = (i + torch.randint(1, 256, (pairs,))) % 256
    scores, upstream, inputs = score_pairs(feats, i, j, unit), torch.rand(pairs), [feats, *unit.parameters()]
    run, times_forward = {
        "forward": (torch.no_grad()(lambda: score_pairs(feats, i, j, unit)), 1),
        "backward": (lambda: torch.autograd.grad(scores, inputs, upstream, retain_graph=True), 3),
    }[direction]
    share = efficiency(benchmark, run, times_forward * pair_operations(pairs, 512), "float32")
    benchmark.extra_info["milliseconds"] = {"ours": statistics.median(seconds(run) for _ in range(5)) * 1e3}
    benchmark.pedantic(run)
    with_rows = share * (1 + 256 * 2 * 512**2 / pair_operations(pairs, 512))
    row(
        benchmark,
        f"{direction} of {pairs:,} listed pairs, n=256, d=h=m=512, float32",
        **{"peak": (share, wanted), "peak, the rows' products counted": (with_rows, 0)},
    )


def test_step_over_mining(benchmark: Any) -> None:
    feats, labels, unit = batch(256, 512)

    @torch.no_grad()
    def mining() -> Any:
        return mine_and_score(feats, labels, unit, mode="anchor")

    step = training_step(feats, labels, unit, "anchor", mine_and_score)
    ratio = race(benchmark, step, {"mining": mining}, rounds=15)
    row(
        benchmark,
        'training step `"anchor"`, n=256, 4 per class, d=512, over its mining alone',
        **{"÷ mining": (1 / ratio["mining"], -1.15)},
    )


@pytest.mark.parametrize(("mode", "wanted"), [("batch", 0.5), ("anchor", 0.9)])
def test_small_training_step(benchmark: Any, mode: str, wanted: float) -> None:
    """What most people train with, where operators and their bookkeeping cost as much as the scores."""
    feats, labels, unit = batch(64, 64)
    ours = training_step(feats, labels, unit, mode, mine_and_score)
    multi_similarity = MultiSimilarityLoss()

    def theirs() -> None:
        feats.grad = None
        multi_similarity(feats, labels).backward()

    ratio = race(benchmark, ours, {"multi-similarity": theirs}, rounds=301)
    row(
        benchmark,
        f'training step `"{mode}"`, n=64, 4 per class, d=64, over a multi-similarity step of pytorch-metric-learning',
        **{"÷ multi-similarity": (1 / ratio["multi-similarity"], -wanted)},
    )
