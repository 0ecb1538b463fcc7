"""What ptxas says of every CUDA kernel: registers, shared memory, spills. And how many instructions the main loops of
those on tensor cores issue for each matrix instruction.

As nvcc's launcher it keeps ptxas's report beside the object:  resources.py keep nvcc … -o OBJECT …
Then it prints the tables:  resources.py report FOLDER SHAPES_PROGRAM CUOBJDUMP
It fails if a main loop touches local memory, which is where spilled registers are, or issues more than it may, and if
ptxas says that the instructions of warpgroups lose by what it found.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

#: Instructions for each matrix instruction, by how a name begins or the first numbers of a shape: all of the busiest
#: loop, skipped or not.
MOST = {
    "hopper_multiply": 120.0,
    "multiply_kernel<Bf16, Shape<128, 128": 5.5,
    "multiply": 14.0,
    "128, 256": 4.6,
    "64, 256": 5.6,
    "64, 128": 9.5,
    "32, 64": 17.0,
    "hopper": 65.0,
}
#: Of matrix instructions that wait for each other, and of registers that are not shared out as asked.
LOSS = "Potential Performance Loss"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


class Use(NamedTuple):
    registers: int
    spilled: int


class Loop(NamedTuple):
    """One that holds matrix instructions and no other such loop."""

    instructions: int
    products: int
    local: int  # accesses of local memory


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


def main_loops(code: str) -> list[Loop]:
    """Of a kernel's disassembly."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;/]*?)\s*;", code)]
    place = {at: k for k, (at, _) in enumerate(lines)}
    loops = []
    for end, (_, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = place.get(int(target[1], 16)) if target else None
        # What lies behind the end of the program comes back to its middle after a wait.
        if start is not None and start <= end and "EXIT" not in [text for _, text in lines[start:end]]:
            loops.append((start, end))
    found: list[tuple[int, int]] = []
    for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if any("MMA." in text for _, text in lines[start : end + 1]) and not any(
            start <= a and b <= end for a, b in found
        ):
            found.append((start, end))
    bodies = [[text for _, text in lines[start : end + 1]] for start, end in sorted(found)]
    return [
        Loop(len(body), sum("MMA." in t for t in body), sum(bool(re.search(r"\b(LDL|STL)\b", t)) for t in body))
        for body in bodies
    ]


def read_code(build: Path, cuobjdump: Path) -> dict[tuple[str, str], list[Loop]]:
    """The main loops by kernel and architecture."""
    loops = {}
    for file in sorted(build.rglob("*.ptxas")):
        listing = subprocess.check_output([cuobjdump, "--dump-sass", file.with_suffix("")], text=True)
        for part in re.split(r"^Fatbin elf code:", listing, flags=re.M)[1:]:
            arch = re.search(r"^arch = (\w+)", part, re.M)
            for function in re.split(r"^\t\tFunction : ", part, flags=re.M)[1:]:
                if arch and (found := main_loops(function)):
                    loops[function.split("\n", 1)[0].strip(), arch[1]] = found
    return loops


def short(mangled: list[str]) -> list[str]:
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    plain = (
        re.sub(r"^void |pddm::cuda::|Arithmetic|\(anonymous namespace\)::|\(int\)", "", n) for n in names.splitlines()
    )
    return [re.sub(r"\(.*", "", name).replace(" >", ">") for name in plain]


def limit(name: str) -> float:
    return next(most for kind, most in MOST.items() if f" Shape<{kind}," in name or name.startswith(kind))


def report(build: Path, shapes: Path, cuobjdump: Path) -> int:
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
    rows: list[list[str]] = []
    bad = [f"{file.name}: {line.strip()}" for file in files for line in file.read_text().splitlines() if LOSS in line]
    for kernel, name in zip(kernels, short(kernels), strict=True):
        cells = []
        for arch in architectures:
            use = uses.get((kernel, arch))
            cells.append(
                "-" if use is None else f"{use.registers}" + (f" +{use.spilled} B spilled" if use.spilled else "")
            )
        rows.append([name, shared.get(name, "-"), *cells])
    print_table([["kernel", "shared bytes", *(f"registers {a}" for a in architectures)], *sorted(rows)])

    loops = read_code(build, cuobjdump)
    kernels = sorted({kernel for kernel, _ in loops})
    if not kernels:
        sys.exit("no main loop was found")
    rows = []
    for kernel, name in zip(kernels, short(kernels), strict=True):
        cells = []
        for arch in architectures:
            found = loops.get((kernel, arch), [])
            ratios = [loop.instructions / loop.products for loop in found]
            cells.append(" ".join(f"{ratio:.2f}" for ratio in ratios) or "-")
            if any(loop.local for loop in found):
                bad.append(f"{name} on {arch}: a main loop touches local memory")
            if max(ratios, default=0) > limit(name):
                bad.append(f"{name} on {arch}: {max(ratios):.2f} instructions per product; at most {limit(name)}")
        rows.append([name, *cells])
    print()
    print_table([["instructions per product in", *architectures], *sorted(rows)])
    for line in bad:
        print(line, file=sys.stderr)
    return bool(bad)


def print_table(table: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        sys.exit(keep(sys.argv[2:]))
    sys.exit(report(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))
