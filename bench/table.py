"""From pytest-benchmark's JSON to tables: of kernels a reader's in the README, and the project's goals in
docs/performance.md; of searching photographs one in docs/photographs.md.

python bench/table.py cpu build/bench-cpu.json             print them; cuda and search likewise
python bench/table.py cpu build/bench-cpu.json --store     and keep the run in bench/results/, of a processor with AMX
                                                           as cpu-amx.json, and write the pages
python bench/table.py --check                              fail if a page's table is not that of its stored run
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
README, GOALS, PHOTOGRAPHS = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "photographs.md"
PEERS = ("reference", "chunked", "compiled", "portable")
NARROW = "\u202f"  # a narrow space, where no line breaks
SHARES = {"peak": "of the peak", "matmul": "of torch.matmul"}


def read_run(subject: str, path: Path) -> dict[str, Any]:
    """What is worth keeping of a run; nothing that names the machine beyond its processor."""
    raw = json.loads(path.read_text("utf-8"))
    run = {
        "date": raw["datetime"][:10],
        "torch": torch.__version__,
        "pddm_ext": pddm_ext.__version__,
        "compiler": _C.build_info()["compiler"],
        "rows": [b["extra_info"] for b in raw["benchmarks"]],
    }
    if subject == "cuda":
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
    if name.startswith("peak, "):
        return f"{value:.0%}, {name.removeprefix('peak, ')}"
    if name == "matmul":
        return f"{value:.0%} of torch.matmul's rate"
    if name == "MiB":
        return f"{value:.1f} MiB"
    if "÷" in name:
        return (f"{value:.1f}" if value >= 2 else f"{value:.2f}") + (f" {name}" if "," in name else "")
    return f"{value:.{1 if value < 100 else 0}f}× {name}"


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}{NARROW}ms"


def floor(row: dict[str, Any]) -> float | None:
    """Milliseconds that the pairs' multiply-adds take at the peak: what a peer takes, over its ratio to them."""
    for name, ratio in row.get("ratio_at_peak", {}).items():
        return row["milliseconds"][name] / ratio
    return None


def reader_row(row: dict[str, Any]) -> dict[str, str]:
    """Cells by column: what ours takes, how many times as long a peer does, and how near ours is to a bound."""
    measured = {name: value for name, (value, _) in row["figures"].items()}
    ours, least = row.get("milliseconds", {}).get("ours"), floor(row)
    cells = {"what": row["what"].removesuffix(", MiB"), "ours": milliseconds(ours), "floor": milliseconds(least)}
    for name, value in measured.items():
        if name in PEERS:
            cells[name] = text(name, value).removesuffix(f" {name}")
        elif name in SHARES:
            cells[SHARES[name]] = f"{value:.0%}"
        elif name == "MiB":
            cells["ours"] = text(name, value).replace(" ", NARROW)
        elif "÷" in name:
            cells["ours"] = f"×{NARROW}{value:.1f}"
    if ours and least and "peak" not in measured:
        cells[SHARES["peak"]] = f"{least / ours:.0%}"
    return cells


def reader_table(run: dict[str, Any]) -> str:
    rows = [cells for cells in map(reader_row, run["rows"]) if cells["ours"]]
    columns = [
        name for name in ("what", "ours", *PEERS, *SHARES.values(), "floor") if any(row.get(name) for row in rows)
    ]
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", machine(run)])


def goals_table(run: dict[str, Any]) -> str:
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
    return "\n".join([*lines, "", machine(run) + (cuda_notes(run) if "cuda" in run else cpu_notes(run))])


def machine(run: dict[str, Any]) -> str:
    built = f"torch {run['torch']}, {run['compiler']}, {run['date']}."
    if "cuda" in run:
        return f"{run['processor']}, CUDA {run['cuda']}, {built}"
    peaks = sorted(r["peak_gflops"] for r in run["rows"] if "peak_gflops" in r)
    peak = f"multiply-add peak {peaks[len(peaks) // 2]:.0f} GFLOP/s (median), " if peaks else ""
    return f"{run['processor']}, {run['threads']} threads, {run['instructions']}, {peak}{built}"


def cuda_notes(run: dict[str, Any]) -> str:
    notes = ""
    for r in run["rows"]:
        if "matmul_tflops" in r:
            notes += f" torch.matmul 8192³ beside the {r['what']}: {r['matmul_tflops']:.0f} TFLOP/s."
        if "launches" in r:
            ours = r["milliseconds"]["ours"]
            notes += f" Of the step's {ours:.2f} ms, mining is {r['mining_ms']:.2f} ms in {r['launches']} launches."
    return notes


def cpu_notes(run: dict[str, Any]) -> str:
    notes = ""
    for r in run["rows"]:
        if "mining_ms" in r:
            what, ours = r["what"].partition(",")[0], r["milliseconds"]["ours"]
            notes += (
                f" Of the {ours:.1f} ms of the {what}, mining is {r['mining_ms']:.1f} ms, of which "
                f"{r['floor_ms']:.1f} ms are its pairs' multiply-adds at the peak."
            )
    if not run["bfloat16"] and any("mining_ms" in r for r in run["rows"]):
        notes += " Neither AVX-512-BF16 nor AMX here: the two bfloat16 rows were not measured."
    return notes


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(content, "utf-8")
    os.replace(temporary, path)


def search_table(run: dict[str, Any]) -> str:
    lines = ["| what | takes | compared with | | goal |", "|---|---|---|---|---|"]
    for r in run["rows"]:
        what, ours = r["what"], milliseconds(r["milliseconds"]["ours"])
        for name, (value, target) in r["figures"].items():
            kind, met = ("time", value <= -target) if target < 0 else ("rate", value >= target)
            goal = f"{'≤' if target < 0 else '≥'} {abs(target)}" if target else ""
            lines.append(f"| {what} | {ours} | {name} | {value:.2f} × its {kind}{'' if met else ' ✗'} | {goal} |")
            what = ours = ""
    built = f"torch {run['torch']}, {run['date']}."
    return "\n".join([*lines, "", f"{run['processor']}, {run['threads']} threads, {built}"])


_KERNELS = {README: reader_table, GOALS: goals_table}
_GOALS = {GOALS: goals_table}
TABLES = {
    "cpu": _KERNELS,
    "cuda": _KERNELS,
    "candidates": _GOALS,
    "steps": _GOALS,
    "search": {PHOTOGRAPHS: search_table},
}
# Runs on a processor with AMX are kept beside those on one without.
WITH_AMX = {f"{subject}-amx": _GOALS for subject in ("cpu", "candidates", "steps")}


def page_with(page: Path, subject: str, run: dict[str, Any]) -> str:
    """The page, with the run's table between its marks."""
    begin, end = (f"<!-- bench/results/{subject}.json: {which} -->" for which in ("begin", "end"))
    before, _, rest = page.read_text("utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page.name} has no '{begin}' … '{end}'")
    return f"{before}{begin}\n{tables(subject)[page](run)}\n{end}{after}"


def tables(subject: str) -> dict[Path, Any]:
    return (TABLES | WITH_AMX)[subject]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=TABLES, nargs="?")
    parser.add_argument("run", type=Path, nargs="?", help="pytest-benchmark's JSON")
    parser.add_argument("--store", action="store_true", help="keep the run and write its tables into the pages")
    parser.add_argument("--check", action="store_true", help="compare the pages' tables with the stored runs")
    arguments = parser.parse_args()
    if arguments.check:
        stored = {subject: RESULTS / f"{subject}.json" for subject in TABLES | WITH_AMX}
        runs = {subject: json.loads(path.read_text("utf-8")) for subject, path in stored.items() if path.exists()}
        stale = [
            (page, subject)
            for subject, run in runs.items()
            for page in tables(subject)
            if page.read_text("utf-8") != page_with(page, subject, run)
        ]
        for page, subject in stale:
            print(f"{page.name}'s table is not that of bench/results/{subject}.json", file=sys.stderr)
        return bool(stale)
    if arguments.run is None:
        parser.error("a subject and pytest-benchmark's JSON are needed")
    run = read_run(arguments.subject, arguments.run)
    print("\n\n".join(table(run) for table in TABLES[arguments.subject].values()))
    if arguments.store:
        subject = arguments.subject
        if run.get("instructions") == "amx" and f"{subject}-amx" in WITH_AMX:
            subject += "-amx"
        replace(RESULTS / f"{subject}.json", json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        for page in tables(subject):
            replace(page, page_with(page, subject, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
