"""What mining and the way back should cost on a GPU, by instructions and bytes: the predictions in docs/gpu.md.

python bench/predict.py --sass build/cuda    read what make cuda has built, keep the counts, and write the page
python bench/predict.py                      write the page from what is kept
python bench/predict.py --check              fail where the page is not that
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
import resources  # noqa: E402 - found by the line above
from table import RESULTS, replace  # noqa: E402 - beside this file

STORE, PAGE = RESULTS / "sass.json", ROOT / "docs" / "gpu.md"
BEGIN, END = (f"<!-- bench/results/sass.json: {mark} -->" for mark in ("begin", "end"))


@dataclass(frozen=True)
class Gpu:
    """A processor, by its maker's white paper but where a comment says otherwise.

    Attributes:
        matrix: multiply-adds a cycle of a multiprocessor, bfloat16 with float32 sums.
        reached: the share of them that instructions of a warp reach; those of four warps reach all.
        second: bytes a cycle that the second-level cache gives to each multiprocessor.
        memory: bytes a second.
    """

    arch: str
    name: str
    multiprocessors: int
    ghz: float
    matrix: int
    reached: float
    second: float
    memory: float

    @property
    def flops(self) -> float:
        return 2e9 * self.ghz * self.multiprocessors * self.matrix


GPUS = (
    Gpu("sm_80", "A100 SXM", 108, 1.41, 1024, 1.0, 5120 / 108, 2.039e12),
    # The second-level cache's rate is not in the paper: taken to be an A100's, for each multiprocessor.
    Gpu("sm_86", "RTX A6000", 84, 1.80, 512, 1.0, 5120 / 108, 0.768e12),
    # mma.sync stops near 0.62 of wgmma's rate (Luo et al., arXiv 2402.13499); the cache is taken to give as many bytes
    # a cycle as an A100's.
    Gpu("sm_90a", "H100 SXM", 132, 1.83, 2048, 0.62, 5120 / 132, 3.35e12),
)
#: Bytes a cycle of shared memory; schedulers; instructions of an epilogue for each output.
SHARED, SCHEDULERS, EPILOGUE = 128, 4, 6
#: Inputs of a step, and bytes of a row in it.
DEEP, ROW = 32, 64
#: Rows and widths, as bench/test_cuda.py has them.
CASES = ((4096, 512), (4096, 384), (4096, 256), (8192, 128), (8192, 64))
BACKWARD = (2048, 512)
#: Rows of d numbers that the kernels between the products read or write for each pair: u and v' made 2, u' to unit norm
#: 2, dC 2, through the norms 6, added to the rows 4.
BETWEEN = 16


@dataclass(frozen=True)
class Shape:
    """A kernel's tile: ``groups`` × ``across`` warps of pairs by outputs, or that many warpgroups."""

    key: str
    pairs: int
    outputs: int
    groups: int
    across: int
    blocks: int
    cluster: bool

    @property
    def warps(self) -> int:
        return self.groups * (4 if self.cluster else self.across)

    def cycles(self, gpu: Gpu, loops: list[list[float]], dim: int) -> float:
        """Of a tile in one block, while ``blocks`` of them share the multiprocessor; d = h = m."""
        steps, blocks = math.ceil(dim / DEEP), math.ceil(dim / self.outputs)
        # In the order of the code: W_u's loop, that of v', that of u'; each instructions and products.
        made_u, made_v, stored = loops[0], loops[-2], loops[-1]
        total = 0.0
        for (instructions, products), in_shared in ((made_u, False), (made_v, False), (stored, True)):
            matrix = self.pairs * self.outputs * DEEP / gpu.matrix / (1 if self.cluster else gpu.reached)
            own = 2 if self.cluster else self.pairs / self.groups / 16 * self.outputs / self.across / 8 * 2
            issue = instructions / products * own * self.warps / SCHEDULERS
            if self.cluster:
                # Each warpgroup reads the weights, and u' or two rows of four bytes in place of it; a copy brings them.
                reads = self.groups * (self.outputs * ROW + 64 * (ROW if in_shared else 2 * ROW))
                shared = (reads + self.outputs * ROW) / SHARED
                second = self.outputs * ROW / 2 / gpu.second
            else:
                reads = self.warps * (self.pairs / self.groups + self.outputs / self.across) * ROW
                shared = (reads + (self.outputs + (0 if in_shared else self.pairs)) * ROW) / SHARED
                second = self.outputs * ROW / gpu.second
            total += blocks * steps * max(matrix, issue, shared, second)
        epilogue = 2 * blocks * self.pairs * self.outputs * EPILOGUE / 32 / SCHEDULERS
        return total + (0 if self.cluster else epilogue)

    def seconds(self, gpu: Gpu, loops: list[list[float]], n: int, dim: int) -> float:
        tiles = math.ceil(n / 16) * (math.ceil(n / 16) + 1) / 2 * 256 / self.pairs
        waves = math.ceil(tiles / (gpu.multiprocessors * self.blocks))
        return waves * self.blocks * self.cycles(gpu, loops, dim) / (gpu.ghz * 1e9)


SHAPES = (
    Shape("Shape<128, 256, ", 128, 256, 2, 4, 1, False),
    Shape("Shape<64, 256, ", 64, 256, 2, 4, 1, False),
    Shape("Shape<64, 128, ", 64, 128, 2, 4, 2, False),
    Shape("Shape<32, 64, ", 32, 64, 2, 2, 4, False),
    Shape("ClusterShape<256, ", 128, 256, 2, 1, 1, True),
    Shape("ClusterShape<192, ", 128, 192, 2, 1, 1, True),
    Shape("ClusterShape<128, ", 192, 128, 3, 1, 1, True),
    Shape("ClusterShape<64, ", 192, 64, 3, 1, 1, True),
)


def counts(build: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Instructions and products of the bfloat16 kernels' main loops, by shape and architecture."""
    cuobjdump = next(ROOT.glob(".venv/lib/python*/site-packages/nvidia/cu13/bin/cuobjdump"), Path("cuobjdump"))
    found: dict[str, dict[str, list[list[float]]]] = {}
    code = resources.read_code(build, cuobjdump)
    known = {gpu.arch for gpu in GPUS}
    names = dict(zip(sorted({k for k, _ in code}), resources.short(sorted({k for k, _ in code})), strict=True))
    for (kernel, arch), loops in code.items():
        name = names[kernel]
        for shape in SHAPES:
            kind = ("hopper_" if shape.cluster else "") + "score_kernel<Bf16, " + shape.key
            if arch in known and name.startswith(kind) and not name.endswith("false>"):
                found.setdefault(shape.key, {})[arch] = [[loop.instructions, loop.products] for loop in loops]
    return found


def forward(gpu: Gpu, loops: dict[str, Any], cluster: bool, n: int, dim: int) -> float | None:
    """Seconds, by the best shape."""
    there = [s for s in SHAPES if s.cluster == cluster and gpu.arch in loops.get(s.key, {})]
    return min((shape.seconds(gpu, loops[shape.key][gpu.arch], n, dim) for shape in there), default=None)


def backward(gpu: Gpu, n: int, dim: int) -> float:
    """Seconds, of all pairs: products recomputed, of the inputs and of the weights, and the bytes between them."""
    products = 3 * operations(n, dim) / (gpu.flops * gpu.reached)
    return products + n * (n + 1) / 2 * BETWEEN * dim * 2 / gpu.memory


def operations(n: int, dim: int) -> float:
    return n * (n - 1) / 2 * 6 * dim**2


def table() -> str:
    loops = json.loads(STORE.read_text("utf-8"))
    cuda = json.loads((RESULTS / "cuda.json").read_text("utf-8"))
    run = {row["what"]: row for row in cuda["rows"] if "beside the portable kernel" in row["what"]}
    columns = [(gpu, False) for gpu in GPUS] + [(GPUS[-1], True)]
    heads = [f"{gpu.name}, {'Hopper' if cluster else 'portable'} kernel" for gpu, cluster in columns]
    lines = [
        f"| n, d = h = m | {' | '.join(heads)} | measured, portable | measured, Hopper |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for n, dim in CASES:
        took_of = [forward(gpu, loops, cluster, n, dim) for gpu, cluster in columns]
        cells = [
            "-" if of is None else f"{operations(n, dim) / of / gpu.flops:.0%}"
            for of, (gpu, _) in zip(took_of, columns, strict=True)
        ]
        row = next((r for what, r in run.items() if f"n={n}, d=h=m={dim}," in what), None)
        if row is None:
            cells += ["", ""]
        else:
            took = row["milliseconds"]
            cells += [f"{operations(n, dim) / took[k] * 1e3 / GPUS[-1].flops:.0%}" for k in ("portable", "ours")]
        lines.append(f"| {n}, {dim} | {' | '.join(cells)} |")
    n, dim = BACKWARD
    lines += [
        "",
        f"| backward of `score_matrix`, n={n}, d=h=m={dim} | ms | over the portable forward | over Hopper's |",
        "|---|---|---|---|",
    ]
    for gpu in GPUS:
        back = backward(gpu, n, dim)
        over = [forward(gpu, loops, cluster, n, dim) for cluster in (False, True)]
        cells = ["-" if of is None else f"{back / of:.1f}" for of in over]
        lines.append(f"| {gpu.name} | {back * 1e3:.0f} | {' | '.join(cells)} |")
    row = next((row["milliseconds"] for row in cuda["rows"] if "`score_matrix` backward" in row["what"]), None)
    if row is not None:
        lines.append(f"| measured | {row['ours']:.0f} |  | {row['ours'] / row['forward']:.1f} |")
    return "\n".join([*lines, "", f"Measured on an {cuda['processor']}, {cuda['date']}; all others are predicted."])


def page() -> str:
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sass", type=Path, help="folder of make cuda's build")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what is kept")
    arguments = parser.parse_args()
    if arguments.check:
        if PAGE.read_text("utf-8") != page():
            print(f"{PAGE} is not what is kept; run python bench/predict.py", file=sys.stderr)
            return 1
        return 0
    if arguments.sass:
        replace(STORE, json.dumps(counts(arguments.sass), sort_keys=True, indent=1) + "\n")
    replace(PAGE, page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
