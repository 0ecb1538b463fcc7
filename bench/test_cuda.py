"""Every figure the README quotes for a GPU. A row of the table is a test."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pddm_ext import _C, QuadrupletLoss, mine_and_score, reference, score_matrix, topk
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
    shares, rates = [], []
    for _ in range(5):
        before = matmul_rate(dtype)
        rate = operations / seconds(ours)
        rates.append((before + matmul_rate(dtype)) / 2)
        shares.append(rate / rates[-1])
    benchmark.extra_info["matmul_tflops"] = statistics.median(rates) / 1e12
    hopper = dtype == torch.bfloat16 and _C.warpgroups(torch.cuda.current_device())
    figures = {"matmul": (statistics.median(shares), 0.75 if hopper else 0.5)}
    if dtype == torch.bfloat16:
        chunk = quickest_chunk(lambda rows: chunked_mine(feats, labels, unit, "anchor", rows))
        peers = {"chunked": lambda: chunked_mine(feats, labels, unit, "anchor", chunk)}
        benchmark.extra_info["chunk"] = chunk
        figures["chunked"] = (race(benchmark, ours, peers, rounds=5)["chunked"], 15)
    else:
        race(benchmark, ours, {}, rounds=5)
    row(benchmark, f'forward `"anchor"`, n={n}, d=h=m={dim}, {str(dtype).removeprefix("torch.")}', **figures)


@torch.no_grad()
def test_forward_of_narrow_units(benchmark: Any) -> None:
    n, dim = 8192, 128
    given = on_gpu(n, dim, torch.bfloat16)
    race(benchmark, lambda: mine_and_score(*given, mode="anchor"), {}, rounds=5)
    rate = pair_operations(n * (n - 1) / 2, dim) / benchmark.extra_info["milliseconds"]["ours"] * 1e3
    row(
        benchmark,
        f'forward `"anchor"`, n={n}, d=h=m={dim}, bfloat16',
        matmul=(rate / matmul_rate(torch.bfloat16), 0.3),
    )


@pytest.mark.parametrize(("n", "dim"), [(4096, 512), (4096, 384), (4096, 256), (8192, 128), (8192, 64)])
@torch.no_grad()
def test_both_kernels(benchmark: Any, n: int, dim: int) -> None:
    if not _C.warpgroups(torch.cuda.current_device()):
        pytest.skip("one kernel here")
    given = on_gpu(n, dim, torch.bfloat16)

    def portable() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PDDM_WARPGROUPS", "off")
            return mine_and_score(*given, mode="anchor")

    ratio = race(benchmark, lambda: mine_and_score(*given, mode="anchor"), {"portable": portable}, rounds=5)
    ours = benchmark.extra_info["milliseconds"]["ours"]
    rate = pair_operations(n * (n - 1) / 2, dim) / ours * 1e3
    row(
        benchmark,
        f'forward `"anchor"` beside the portable kernel, n={n}, d=h=m={dim}, bfloat16',
        portable=(ratio["portable"], 1),
        matmul=(rate / matmul_rate(torch.bfloat16), 0),
    )


# Its chunks are one graph, which takes minutes to compile.
@torch.no_grad()
def test_forward_compiled(benchmark: Any) -> None:
    feats, labels, unit = on_gpu(4096, 512, torch.bfloat16)
    compiled = torch.compile(lambda: chunked_mine(feats, labels, unit, "anchor", 64))
    ratio = race(
        benchmark, lambda: mine_and_score(feats, labels, unit, mode="anchor"), {"compiled": compiled}, rounds=5
    )
    row(benchmark, 'forward `"anchor"`, n=4096, d=h=m=512, bfloat16, beside compiled', compiled=(ratio["compiled"], 5))


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


def test_step_over_mining(benchmark: Any) -> None:
    feats, labels, unit = on_gpu(1024, 512, torch.bfloat16)
    mining = torch.no_grad()(lambda: mine_and_score(feats, labels, unit, mode="anchor"))
    ratio = race(benchmark, training_step(feats, labels, unit, "anchor", mine_and_score), {"mining": mining}, rounds=15)
    row(
        benchmark,
        'training step `"anchor"`, n=1024, 4 per class, d=512, bfloat16, over its mining alone',
        **{"÷ mining": (1 / ratio["mining"], -1.5)},
    )


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_small_step(benchmark: Any, mode: str) -> None:
    """Nothing but launches: what the loss's operator saves beside the same loss in plain PyTorch."""
    feats, labels, unit = on_gpu(64, 64, torch.bfloat16)
    fused, plain = QuadrupletLoss(), reference.QuadrupletLoss()

    def step(loss: Any) -> Callable[[], None]:
        return training_step(feats, labels, unit, mode, mine_and_score, loss)

    ratio = race(benchmark, step(fused), {"plain loss": step(plain)}, rounds=30)
    row(
        benchmark,
        f'training step `"{mode}"`, n=64, 4 per class, d=64, bfloat16, beside the plain loss',
        **{"plain loss": (ratio["plain loss"], 1)},
    )


def test_matrix_backward(benchmark: Any) -> None:
    feats, _, unit = on_gpu(2048, 512, torch.bfloat16)
    feats.requires_grad_()
    scores, inputs = score_matrix(feats, unit), [feats, *unit.parameters()]
    upstream = torch.randn_like(scores)
    ratio = race(
        benchmark,
        lambda: torch.autograd.grad(scores, inputs, upstream, retain_graph=True),
        {"forward": torch.no_grad()(lambda: score_matrix(feats, unit))},
        rounds=3,
    )
    row(
        benchmark,
        "`score_matrix` backward over forward, n=2048, d=h=m=512, bfloat16",
        **{"÷ forward": (1 / ratio["forward"], -5)},
    )


@pytest.mark.parametrize(("queries", "gallery"), [(1, 1_000_000), (1000, 100_000)])
@torch.no_grad()
def test_topk(benchmark: Any, queries: int, gallery: int) -> None:
    """Over the scores alone, as a matrix."""
    among, _, unit = on_gpu(gallery, 128, torch.bfloat16)
    of = among[:queries] + 0.1
    ratio = race(
        benchmark, lambda: topk(of, among, 10, unit), {"scores": lambda: score_matrix(of, unit, among)}, rounds=5
    )
    row(
        benchmark,
        f"`topk` of {queries:,} queries among {gallery:,}, d=h=m=128, bfloat16, over its scores alone",
        **{"÷ scores": (1 / ratio["scores"], -1.25)},
    )


@pytest.mark.parametrize(("n", "dim", "wanted"), [(4096, 512, 25), (4096, 128, 15), (32768, 128, 0)])
@torch.no_grad()
def test_candidates(benchmark: Any, n: int, dim: int, wanted: float) -> None:
    given = on_gpu(n, dim, torch.bfloat16)
    ratio = race(
        benchmark,
        lambda: mine_and_score(*given, mode="anchor", candidates=32),
        {"exact": lambda: mine_and_score(*given, mode="anchor")},
        rounds=5,
    )
    row(
        benchmark,
        f'`"anchor"` by 32 candidates, n={n}, 4 per class, d=h=m={dim}, bfloat16',
        **{"exact mining": (ratio["exact"], wanted)},
    )
