"""From pytest-benchmark's JSON to the table: print it, keep the run, and put it into the README.

python bench/table.py build/bench.json             print
python bench/table.py build/bench.json --store     and keep it in bench/results/, and write the README's table
python bench/table.py --check                      fail if the README's table is not that of the stored run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import pddm_ext
from pddm_ext import _C

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "bench" / "results" / "cpu.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench/results/cpu.json: begin -->", "<!-- bench/results/cpu.json: end -->"


def read_run(path: Path) -> dict[str, Any]:
    """What is worth keeping of a run; nothing that names the machine beyond its processor."""
    raw = json.loads(path.read_text())
    cpu = raw["machine_info"]["cpu"]
    return {
        "date": raw["datetime"][:10],
        "processor": cpu.get("brand_raw", "unknown"),
        "threads": torch.get_num_threads(),
        "instructions": _C.cpu_capability(),
        "torch": torch.__version__,
        "pddm_ext": pddm_ext.__version__,
        "compiler": _C.build_info()["compiler"],
        "rows": [b["extra_info"] for b in raw["benchmarks"]],
        "bfloat16": _C.multiplies_bfloat16(),
    }


def text(name: str, value: float) -> str:
    if name == "peak":
        return f"{value:.0%} of the multiply-add peak"
    if name == "MiB":
        return f"{value:.1f} MiB"
    if "÷" in name:
        return f"{value:.1f}"
    return f"{value:.{1 if value < 100 else 0}f}× {name}"


def render(run: dict[str, Any]) -> str:
    lines = ["| what | measured | goal | ours | the floor would show |", "|---|---|---|---|---|"]
    for r in run["rows"]:
        measured, wanted = [], []
        for name, (value, target) in r["figures"].items():
            met = value >= target if target >= 0 else value <= -target
            measured.append(text(name, value) + ("" if met else " ✗"))
            if target not in (0, 1):
                wanted.append(("≤ " if target < 0 else "") + text(name, abs(target)))
        ours = r.get("milliseconds", {}).get("ours")
        ceiling = ", ".join(f"{v:.1f}× {name}" for name, v in r.get("ratio_at_peak", {}).items())
        lines.append(
            f"| {r['what']} | {', '.join(measured)} | {', '.join(wanted)} | "
            f"{'' if ours is None else f'{ours:.2f} ms'} | {ceiling} |"
        )
    peaks = sorted(r["peak_gflops"] for r in run["rows"] if "peak_gflops" in r)
    notes = (
        f"{run['processor']}, {run['threads']} threads, {run['instructions']}, multiply-add peak "
        f"{peaks[len(peaks) // 2]:.0f} GFLOP/s (median), torch {run['torch']}, {run['compiler']}, {run['date']}."
    )
    for r in run["rows"]:
        if "mining_ms" in r:
            what, ours = r["what"].partition(",")[0], r["milliseconds"]["ours"]
            notes += (
                f" Of the {ours:.1f} ms of the {what}, mining is {r['mining_ms']:.1f} ms, of which "
                f"{r['floor_ms']:.1f} ms are its pairs' multiply-adds at the peak."
            )
    if not run["bfloat16"]:
        notes += " No AVX-512-BF16 here: the two bfloat16 rows were not measured."
    return "\n".join([*lines, "", notes])


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(content)
    os.replace(temporary, path)


def readme_with(table: str) -> str:
    content = README.read_text()
    before, _, rest = content.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{README.name} has no '{BEGIN}' … '{END}'")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="pytest-benchmark's JSON")
    parser.add_argument("--store", action="store_true", help="keep the run and write the README's table")
    parser.add_argument("--check", action="store_true", help="compare the README's table with the stored run")
    arguments = parser.parse_args()
    if arguments.check:
        if README.read_text() != readme_with(render(json.loads(STORED.read_text()))):
            print("README.md's table is not that of bench/results/cpu.json", file=sys.stderr)
            return 1
        return 0
    run = read_run(arguments.run)
    table = render(run)
    print(table)
    if arguments.store:
        replace(STORED, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        replace(README, readme_with(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
