"""What ptxas says of every CUDA kernel: registers, shared memory, spills.

As nvcc's launcher it keeps ptxas's report beside the object:  resources.py keep nvcc … -o OBJECT …
Then it prints the table, and fails if a kernel that does the work spills:  resources.py report FOLDER SHAPES_PROGRAM
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HOT = ("score_kernel", "multiply_kernel")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


class Use(NamedTuple):
    registers: int
    spilled: int


def keep(command: list[str]) -> int:
    ran = subprocess.run(command, capture_output=True, text=True)
    sys.stdout.write(ran.stdout)
    lines = ran.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not line.startswith(("ptxas info", "    ")))
    if ran.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text(ran.stderr)
    return ran.returncode


def read(report: str) -> dict[tuple[str, str], Use]:
    uses, entry, spilled = {}, None, 0
    for line in report.splitlines():
        if found := ENTRY.search(line):
            entry = found[1], found[2]
        elif found := SPILLS.search(line):
            spilled = int(found[1]) + int(found[2])
        elif (found := USED.search(line)) and entry:
            uses[entry] = Use(int(found[1]), spilled)
            entry = None
    return uses


def short(mangled: list[str]) -> list[str]:
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    plain = (
        re.sub(r"^void |pddm::cuda::|Arithmetic|\(anonymous namespace\)::|\(int\)", "", n) for n in names.splitlines()
    )
    return [re.sub(r"\(.*", "", name).replace(" >", ">") for name in plain]


def report(build: Path, shapes: Path) -> int:
    uses: dict[tuple[str, str], Use] = {}
    files = sorted(build.rglob("*.ptxas"))
    for file in files:
        uses |= read(file.read_text())
    if not uses:
        sys.exit(f"no ptxas reports under {build}")
    architectures = sorted({arch for _, arch in uses}, key=lambda a: int(re.sub(r"\D", "", a)))
    kernels = sorted({kernel for kernel, _ in uses})
    # Shared memory is asked for at launch: the scoring kernels' with u' of 512 outputs.
    shared = dict(line.split("\t") for line in subprocess.check_output([shapes], text=True).splitlines())
    rows, bad = [], []
    for kernel, name in zip(kernels, short(kernels), strict=True):
        cells = []
        for arch in architectures:
            use = uses.get((kernel, arch))
            cells.append(
                "-" if use is None else f"{use.registers}" + (f" +{use.spilled} B spilled" if use.spilled else "")
            )
            if use and use.spilled and any(hot in name for hot in HOT):
                bad.append(f"{name} on {arch}: {use.spilled} bytes")
        rows.append([name, shared.get(name, "-"), *cells])
    table = [["kernel", "shared bytes", *(f"registers {a}" for a in architectures)], *sorted(rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in bad:
        print(f"spills in a hot kernel: {line}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        sys.exit(keep(sys.argv[2:]))
    sys.exit(report(Path(sys.argv[2]), Path(sys.argv[3])))
