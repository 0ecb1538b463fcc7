"""What `make cuda` promises: a spill in a kernel that does the work does not pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RESOURCES = Path(__file__).parent / "cuda" / "resources.py"
SCORE = (
    "_ZN4pddm4cuda12score_kernelINS0_13ArithmeticF32ENS0_5ShapeILi32ELi64ELi2ELi2ELi3ELi2EEEEEv"
    "NS0_9WorkspaceINT_4RealEEENS0_3JobIS7_EE"
)
OTHER = "_ZN4pddm4cuda11list_kernelIfEEvNS0_6SourceIT_EEliNS0_5ChunkIS3_EE"


def said_by_ptxas(kernel: str, spilled: int) -> str:
    return (
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {kernel}\n"
        f"    32 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers\n"
    )


def report(folder: Path) -> subprocess.CompletedProcess[str]:
    shapes = folder / "shapes"
    shapes.write_text("#!/bin/sh\nprintf 'score_kernel<F32, Shape<32, 64, 2, 2, 3, 2>>\\t83200\\n'\n")
    shapes.chmod(0o755)
    return subprocess.run([sys.executable, RESOURCES, "report", folder, shapes], capture_output=True, text=True)


@pytest.mark.parametrize(("kernel", "spilled", "fails"), [(SCORE, 0, False), (SCORE, 4, True), (OTHER, 8, False)])
def test_a_spill_in_a_hot_kernel_fails(tmp_path, kernel, spilled, fails):
    (tmp_path / "kernels.o.ptxas").write_text(said_by_ptxas(kernel, spilled))
    done = report(tmp_path)
    assert done.returncode == fails, done.stderr
    assert "128" in done.stdout
    assert ("spills in a hot kernel" in done.stderr) == fails
    if spilled:
        assert f"+{spilled} B spilled" in done.stdout
    if kernel == SCORE:
        assert "score_kernel<F32, Shape<32, 64, 2, 2, 3, 2>>  83200" in done.stdout


def test_nothing_to_report_is_a_failure(tmp_path):
    assert report(tmp_path).returncode != 0


def test_the_launcher_keeps_the_report_and_passes_on_what_failed(tmp_path):
    target = tmp_path / "kernels.o"
    script = tmp_path / "compiler.py"
    script.write_text(
        "import sys\n"
        "print('ptxas info    : Used 1 registers', file=sys.stderr)\n"
        "print('warning: mind', file=sys.stderr)\n"
        "sys.exit('fail' in sys.argv)\n"
    )
    command = [sys.executable, RESOURCES, "keep", sys.executable, script, "-o", target]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stderr == "warning: mind\n"
    assert "Used 1 registers" in Path(f"{target}.ptxas").read_text()
    assert subprocess.run([*command, "fail"], capture_output=True).returncode == 1
