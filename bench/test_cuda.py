"""Every figure the README quotes for a GPU. A row of the table is a test."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pddm_ext import _C, QuadrupletLoss, mine_and_score
from peers import chunked_mine
from races import batch, pair_operations, race, row, seconds, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CHUNKS = (4, 16, 64)


def on_gpu(n: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Features, labels, and a unit in the features' own dtype, so that no contender converts parameters."""
    feats, labels, unit = batch(n, dim)
    return feats.cuda().to(dtype), labels.cuda(), unit.cuda().to(dtype)


def matmul_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    a @ b
    return 2 * 8192**3 / statistics.median(seconds(lambda: a @ b) for _ in range(10))


def quickest_chunk(run: Callable[[int], Any]) -> int:
    for chunk in CHUNKS:
        run(chunk)
    return min(CHUNKS, key=lambda chunk: min(seconds(lambda: run(chunk)) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@torch.no_grad()
def test_forward_anchor(benchmark: Any, dtype: torch.dtype) -> None:
    n, dim = 4096, 512
    feats, labels, unit = on_gpu(n, dim, dtype)

    def ours() -> Any:
        return mine_and_score(feats, labels, unit, mode="anchor")

    ours()
    operations = pair_operations(n * (n - 1) / 2, dim)
    shares = []
    for _ in range(5):
        before = matmul_rate(dtype)
        rate = operations / seconds(ours)
        shares.append(rate / ((before + matmul_rate(dtype)) / 2))
    benchmark.extra_info["matmul_tflops"] = matmul_rate(dtype) / 1e12
    figures = {"matmul": (statistics.median(shares), 0.5)}
    if dtype == torch.bfloat16:
        chunk = quickest_chunk(lambda rows: chunked_mine(feats, labels, unit, "anchor", rows))
        compiled = torch.compile(lambda: chunked_mine(feats, labels, unit, "anchor", 64))
        ratio = race(
            benchmark,
            ours,
            {"chunked": lambda: chunked_mine(feats, labels, unit, "anchor", chunk), "compiled": compiled},
            rounds=5,
        )
        benchmark.extra_info["chunk"] = chunk
        figures |= {"chunked": (ratio["chunked"], 15), "compiled": (ratio["compiled"], 5)}
    else:
        race(benchmark, ours, {}, rounds=5)
    row(benchmark, f'forward `"anchor"`, n={n}, d=h=m={dim}, {str(dtype).removeprefix("torch.")}', **figures)


def test_training_step(benchmark: Any) -> None:
    feats, labels, unit = on_gpu(1024, 512, torch.bfloat16)
    step = partial(training_step, feats, labels, unit, "batch")
    chunk = quickest_chunk(lambda rows: step(lambda f, y, u, mode: chunked_mine(f, y, u, mode, rows))())
    peers = {"chunked": step(lambda f, y, u, mode: chunked_mine(f, y, u, mode, chunk))}
    ratio = race(benchmark, step(mine_and_score), peers, rounds=15)
    benchmark.extra_info["chunk"] = chunk
    with torch.no_grad():
        _C.reset_counters("cuda")
        mine_and_score(feats, labels, unit, mode="batch")
        benchmark.extra_info["launches"] = _C.counters("cuda")["launches"]
        mining = [seconds(lambda: mine_and_score(feats, labels, unit, mode="batch")) for _ in range(30)]
    benchmark.extra_info["mining_ms"] = statistics.median(mining) * 1e3
    row(benchmark, 'training step `"batch"`, n=1024, 4 per class, d=512, bfloat16', chunked=(ratio["chunked"], 50))


def test_memory(benchmark: Any) -> None:
    """Of a step, beyond its inputs and outputs."""
    feats, labels, unit = on_gpu(16384, 512, torch.bfloat16)
    feats.requires_grad_()

    def step() -> float:
        feats.grad = None
        unit.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        QuadrupletLoss()(feats, mine_and_score(feats, labels, unit, mode="anchor")).backward()
        torch.cuda.synchronize()
        gradients = [t.grad for t in (feats, *unit.parameters())]
        outputs = sum(g.numel() * g.element_size() for g in gradients if g is not None)
        return (torch.cuda.max_memory_allocated() - before - outputs) / 2**20

    step()
    grown = benchmark.pedantic(step, rounds=1)
    row(benchmark, 'memory of a step `"anchor"`, n=16384, d=512, bfloat16, MiB', MiB=(grown, -128))


@torch.no_grad()
def test_anchor_scaling(benchmark: Any) -> None:
    small, large = on_gpu(4096, 512, torch.bfloat16), on_gpu(16384, 512, torch.bfloat16)
    name = "n=16384 ÷ n=4096"
    ratio = race(
        benchmark,
        lambda: mine_and_score(*small, mode="anchor"),
        {name: lambda: mine_and_score(*large, mode="anchor")},
        rounds=5,
    )
    row(benchmark, '`"anchor"` time, n=16384 over n=4096, d=512, bfloat16 (16 ± 10 %)', **{name: (ratio[name], -17.6)})
