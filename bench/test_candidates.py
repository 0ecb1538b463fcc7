"""Mining by candidates over exact mining: what it saves, and how its cost grows. A row of the table is a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pddm_ext import _C, candidates, mine_and_score
from races import batch, pair_operations, race, row

COUNT = 32


# Exact mining takes minutes at the first.
@pytest.mark.parametrize(("dim", "wanted", "rounds"), [(512, 25, 1), (128, 15, 3)])
@torch.no_grad()
def test_over_exact(benchmark: Any, dim: int, wanted: float, rounds: int) -> None:
    given = batch(4096, dim)
    ratio = race(
        benchmark,
        lambda: mine_and_score(*given, mode="anchor", candidates=COUNT),
        {"exact": lambda: mine_and_score(*given, mode="anchor")},
        rounds=rounds,
    )
    row(
        benchmark,
        f'`"anchor"` by {COUNT} candidates, n=4096, 4 per class, d=h=m={dim}',
        **{"exact mining": (ratio["exact"], wanted)},
    )


def multiply_adds(given: Any, dot_products: float) -> float:
    """Operations that mining by candidates cannot do without, in time: those of the pairs' scores at float32's rate,
    and those of the dot products, each once, at `dot_products` times that."""
    feats = given[0]
    _C.reset_counters("cpu")
    mine_and_score(*given, mode="anchor", candidates=COUNT)
    scores = pair_operations(_C.counters("cpu")["pairs_scored"], feats.shape[1])
    return scores + len(feats) ** 2 * feats.shape[1] / dot_products


@torch.no_grad()
def test_growth(benchmark: Any) -> None:
    small, large = batch(4096, 128), batch(32768, 128)
    rows = candidates.rows_of(*large[:2])
    ratio = race(
        benchmark,
        lambda: mine_and_score(*small, mode="anchor", candidates=COUNT),
        {
            "n=32768": lambda: mine_and_score(*large, mode="anchor", candidates=COUNT),
            "choice": lambda: candidates.nearest(rows, None, COUNT),  # which alone grows with n²
        },
        rounds=3,
    )
    peak, ours = _C.multiply_add_peak("float32", 0.02), benchmark.extra_info["milliseconds"]["ours"] / 1e3
    # By vectors whole numbers of 16 bits are multiplied twice as fast; tiles multiply bfloat16.
    tiles = _C.cpu_capability() == "amx"
    dot_products = _C.multiply_add_peak("bfloat16", 0.02) / peak if tiles else 2
    least = multiply_adds(large, dot_products) / multiply_adds(small, dot_products)
    row(
        benchmark,
        f'`"anchor"` by {COUNT} candidates, d=h=m=128: n=32768 over n=4096',
        **{
            "÷ n=4096": (ratio["n=32768"], -12),
            "÷ n=4096, the choice among n=32768 alone": (ratio["choice"], 0),
            "÷ n=4096, each dot product once at float32's multiply-add peak": (32768**2 * 128 / peak / ours, 0),
            "÷ n=4096, multiply-adds alone": (least, 0),
        },
    )
