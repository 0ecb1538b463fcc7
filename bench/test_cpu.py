"""Every figure the README quotes for the CPU. A row of the table is a test."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from pddm_ext import _C, mine_and_score, reference
from peers import chunked_mine, compiled_mine
from races import batch, efficiency, pair_operations, race, row, seconds, training_step


@pytest.mark.parametrize(
    ("n", "dim", "wanted"),
    [(256, 512, (10, 5, 0.85)), (512, 128, (18, 1, 0.70))],
    ids=["n256-d512", "n512-d128"],
)
@torch.no_grad()
def test_forward_anchor(benchmark: Any, n: int, dim: int, wanted: tuple[float, float, float]) -> None:
    feats, labels, unit = batch(n, dim)

    def ours() -> Any:
        return mine_and_score(feats, labels, unit, mode="anchor")

    share = efficiency(benchmark, ours, pair_operations(n * (n - 1) / 2, dim), "float32")
    ratio = race(
        benchmark,
        ours,
        {
            "compiled": lambda: compiled_mine(feats, labels, unit, mode="anchor"),
            "reference": lambda: reference.mine_and_score(feats, labels, unit, mode="anchor"),
            "chunked": lambda: chunked_mine(feats, labels, unit, "anchor"),
        },
        rounds=7,
    )
    # What any implementation that scores every pair could reach here: the peers' time at the peak's rate.
    floor = pair_operations(n * (n - 1) / 2, dim) / (benchmark.extra_info["peak_gflops"] * 1e9)
    times = benchmark.extra_info["milliseconds"]
    benchmark.extra_info["ratio_at_peak"] = {name: times[name] / 1e3 / floor for name in ratio}
    row(
        benchmark,
        f'forward `"anchor"`, n={n}, d=h=m={dim}, float32',
        reference=(ratio["reference"], wanted[0]),
        chunked=(ratio["chunked"], wanted[1]),
        compiled=(ratio["compiled"], 1),
        peak=(share, wanted[2]),
    )


@pytest.mark.skipif(not _C.multiplies_bfloat16(), reason="this machine has neither AVX-512-BF16 nor AMX")
@pytest.mark.parametrize(("n", "dim"), [(256, 512), (512, 128)], ids=["n256-d512", "n512-d128"])
@torch.no_grad()
def test_forward_bfloat16(benchmark: Any, n: int, dim: int) -> None:
    feats, labels, unit = batch(n, dim)
    low = feats.bfloat16()

    def ours() -> Any:
        return mine_and_score(low, labels, unit, mode="anchor")

    share = efficiency(benchmark, ours, pair_operations(n * (n - 1) / 2, dim), "bfloat16")
    ratio = race(
        benchmark, ours, {"own float32": lambda: mine_and_score(feats, labels, unit, mode="anchor")}, rounds=15
    )
    what = f'forward `"anchor"`, n={n}, d=h=m={dim}, bfloat16'
    row(benchmark, what, **{"own float32": (ratio["own float32"], 1.6)}, peak=(share, 0))


@pytest.mark.parametrize(("mode", "wanted", "rounds"), [("batch", 500, 5), ("anchor", 30, 5)])
def test_training_step(benchmark: Any, mode: str, wanted: float, rounds: int) -> None:
    feats, labels, unit = batch(256, 512)
    step = partial(training_step, feats, labels, unit, mode)
    ratio = race(
        benchmark,
        step(mine_and_score),
        {
            "reference": step(reference.mine_and_score),
            "chunked": step(lambda f, y, u, mode: chunked_mine(f, y, u, mode)),
        },
        rounds=rounds,
    )
    mining = statistics.median(seconds(lambda: mine_and_score(feats, labels, unit, mode=mode)) for _ in range(15))
    benchmark.extra_info["mining_ms"] = mining * 1e3
    pairs = 3 * 256 / 2 + 2 * 256 if mode == "batch" else 256 * 255 / 2
    peak = _C.multiply_add_peak("float32", 0.2)
    times = benchmark.extra_info["milliseconds"]
    floor = pair_operations(pairs, 512) / peak
    benchmark.extra_info["peak_gflops"] = peak / 1e9
    benchmark.extra_info["floor_ms"] = floor * 1e3
    benchmark.extra_info["ratio_at_peak"] = {name: times[name] / 1e3 / floor for name in ratio}
    row(
        benchmark,
        f'training step `"{mode}"`, n=256, 4 per class, d=512',
        reference=(ratio["reference"], wanted),
        chunked=(ratio["chunked"], 1),
    )


@torch.no_grad()
def test_batch_scaling(benchmark: Any) -> None:
    small, large = batch(512, 128), batch(4096, 128)
    ratio = race(
        benchmark, lambda: mine_and_score(*small), {"n=4096 ÷ n=512": lambda: mine_and_score(*large)}, rounds=31
    )
    row(
        benchmark, '`"batch"` time, n=4096 over n=512, 4 per class, d=128', **{"n=4096 ÷ n=512": (*ratio.values(), -10)}
    )


MEMORY = """
import torch
from pddm_ext import PDDM, QuadrupletLoss, _C, mine_and_score

def step(n):
    torch.manual_seed(0)
    feats, labels = torch.randn(n, 64, requires_grad=True), torch.arange(n) // 4
    QuadrupletLoss()(feats, mine_and_score(feats, labels, unit, mode="anchor")).backward()

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

unit = PDDM(64)
step(64)
_C.reset_counters()
with open("/proc/self/clear_refs", "w") as marks:
    marks.write("5")  # the high-water mark starts again from here
before = kib("VmRSS:")
step(4096)
print((kib("VmHWM:") - before) / 1024, _C.counters()["bytes_peak"] / 2**20)
"""


def test_memory(benchmark: Any) -> None:
    """What one step adds to the process's resident set at most, features and gradients included."""
    result = benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True), rounds=1
    )
    grown, native = map(float, result.stdout.split())
    benchmark.extra_info["native_mib"] = native
    row(benchmark, 'memory of a step `"anchor"`, n=4096, d=64, MiB', **{"MiB": (grown, -64)})


@torch.no_grad()
def test_ceilings(benchmark: Any) -> None:
    """The two ceilings of this machine: the multiply-add peak, and torch's own float32 matmul."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    share = []
    for _ in range(15):
        peak = _C.multiply_add_peak("float32", 0.02)
        share.append(2 * 2048**3 / seconds(lambda: a @ b) / peak)
    benchmark.pedantic(lambda: a @ b, rounds=5)
    benchmark.extra_info["peak_gflops"] = _C.multiply_add_peak("float32", 0.2) / 1e9
    row(benchmark, "torch.matmul 2048³, float32 (a ceiling, not ours)", peak=(statistics.median(share), 0))
