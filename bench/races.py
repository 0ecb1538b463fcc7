"""Races: contenders run in turn, round by round, so that whatever else the machine does meets them all, and a figure is
the median over rounds of a ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pddm_ext import _C, PDDM, QuadrupletLoss

Contender = Callable[[], Any]


def seconds(run: Contender) -> float:
    """Of one run on an otherwise idle device, launches and all."""
    finish()
    start = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def race(benchmark: Any, ours: Contender, peers: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Median over rounds of every peer's time ÷ ours.

    `compiled` goes first where it runs: its thread pool, which is not torch's, spins on for a while.
    """
    for run in (ours, *peers.values()):
        run()  # warm: pages, threads, compilation
    times: dict[str, list[float]] = {name: [] for name in peers}
    own: list[float] = []

    def play_peers() -> None:
        for name, run in peers.items():
            times[name].append(seconds(run))

    benchmark.pedantic(lambda: own.append(seconds(ours)), setup=play_peers, rounds=rounds, iterations=1)
    benchmark.extra_info["milliseconds"] = {
        "ours": statistics.median(own) * 1e3,
        **{name: statistics.median(t) * 1e3 for name, t in times.items()},
    }
    return {name: statistics.median(a / b for a, b in zip(t, own, strict=True)) for name, t in times.items()}


def efficiency(benchmark: Any, ours: Contender, operations: float, dtype: str, rounds: int = 15) -> float:
    """Median over rounds of ours' rate ÷ the multiply-add peak measured just before and after it."""
    shares, peaks = [], []
    for _ in range(rounds):
        before = _C.multiply_add_peak(dtype, 0.02)
        ours()  # warm: while the peak was measured, others had the caches
        rate = operations / seconds(ours)
        peaks.append((before + _C.multiply_add_peak(dtype, 0.02)) / 2)
        shares.append(rate / peaks[-1])
    benchmark.extra_info["peak_gflops"] = statistics.median(peaks) / 1e9
    return statistics.median(shares)


def row(benchmark: Any, what: str, **figures: tuple[float, float]) -> None:
    """A row of the table: figures as name=(measured, wanted); a negative `wanted` is an upper bound."""
    benchmark.extra_info["what"] = what
    benchmark.extra_info["figures"] = {name: list(pair) for name, pair in figures.items()}


def batch(n: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, PDDM]:
    generator = torch.Generator().manual_seed(n + dim)
    torch.manual_seed(dim)
    return torch.randn(n, dim, generator=generator).to(dtype), torch.arange(n) // 4, PDDM(dim)


def pair_operations(pairs: float, dim: int) -> float:
    """Irreducible floating-point operations of scoring: 2dh + 4hm a pair, d = h = m."""
    return pairs * 6 * dim * dim


def training_step(
    feats: torch.Tensor,
    labels: torch.Tensor,
    unit: PDDM,
    mode: str,
    mine: Callable[..., Any],
    loss: torch.nn.Module | None = None,
) -> Contender:
    """Forward, loss and backward with fresh gradients; the contender is mine(feats, labels, unit, mode=mode)."""
    feats.requires_grad_()
    loss = loss or QuadrupletLoss()

    def run() -> None:
        feats.grad = None
        unit.zero_grad()
        loss(feats, mine(feats, labels, unit, mode=mode)).backward()

    return run
