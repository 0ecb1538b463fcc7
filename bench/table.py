"""From pytest-benchmark's JSON to a table: print it, keep the run, and put it into the README.

python bench/table.py cpu build/bench-cpu.json             print
python bench/table.py cpu build/bench-cpu.json --store     and keep it in bench/results/, and write the README's table
python bench/table.py --check                              fail if a table of the README is not that of its stored run
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
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
DEVICES = ("cpu", "cuda")


def read_run(device: str, path: Path) -> dict[str, Any]:
    """What is worth keeping of a run; nothing that names the machine beyond its processor."""
    raw = json.loads(path.read_text())
    run = {
        "date": raw["datetime"][:10],
        "torch": torch.__version__,
        "pddm_ext": pddm_ext.__version__,
        "compiler": _C.build_info()["compiler"],
        "rows": [b["extra_info"] for b in raw["benchmarks"]],
    }
    if device == "cuda":
        return run | {"processor": torch.cuda.get_device_name(), "cuda": _C.build_info()["cuda"]}
    return run | {
        "processor": raw["machine_info"]["cpu"].get("brand_raw", "unknown"),
        "threads": torch.get_num_threads(),
        "instructions": _C.cpu_capability(),
        "bfloat16": _C.multiplies_bfloat16(),
    }


def text(name: str, value: float) -> str:
    if name == "peak":
        return f"{value:.0%} of the multiply-add peak"
    if name == "matmul":
        return f"{value:.0%} of torch.matmul's rate"
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
    return "\n".join([*lines, "", cuda_notes(run) if "cuda" in run else cpu_notes(run)])


def cuda_notes(run: dict[str, Any]) -> str:
    notes = f"{run['processor']}, CUDA {run['cuda']}, torch {run['torch']}, {run['compiler']}, {run['date']}."
    for r in run["rows"]:
        if "matmul_tflops" in r:
            notes += f" torch.matmul 8192³ beside the {r['what']}: {r['matmul_tflops']:.0f} TFLOP/s."
        if "launches" in r:
            ours = r["milliseconds"]["ours"]
            notes += f" Of the step's {ours:.2f} ms, mining is {r['mining_ms']:.2f} ms in {r['launches']} launches."
    return notes


def cpu_notes(run: dict[str, Any]) -> str:
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
    return notes


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(content)
    os.replace(temporary, path)


def readme_with(device: str, table: str) -> str:
    begin, end = (f"<!-- bench/results/{device}.json: {which} -->" for which in ("begin", "end"))
    content = README.read_text()
    before, _, rest = content.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{README.name} has no '{begin}' … '{end}'")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=DEVICES, nargs="?")
    parser.add_argument("run", type=Path, nargs="?", help="pytest-benchmark's JSON")
    parser.add_argument("--store", action="store_true", help="keep the run and write the README's table")
    parser.add_argument("--check", action="store_true", help="compare the README's tables with the stored runs")
    arguments = parser.parse_args()
    if arguments.check:
        stored = [(device, RESULTS / f"{device}.json") for device in DEVICES]
        stale = [
            device
            for device, path in stored
            if path.exists() and README.read_text() != readme_with(device, render(json.loads(path.read_text())))
        ]
        for device in stale:
            print(f"README.md's table is not that of bench/results/{device}.json", file=sys.stderr)
        return bool(stale)
    if arguments.run is None:
        parser.error("a device and pytest-benchmark's JSON are needed")
    run = read_run(arguments.device, arguments.run)
    table = render(run)
    print(table)
    if arguments.store:
        replace(RESULTS / f"{arguments.device}.json", json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        replace(README, readme_with(arguments.device, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
