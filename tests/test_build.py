"""What building and installing promise, but for the installing itself (tests/install)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pddm_ext

ROOT = Path(__file__).resolve().parents[1]
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


MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


@pytest.mark.parametrize(
    ("in_the_source_folder", "installed", "said"),
    [
        ([], [], r"clone/pddm_ext has none: .* 'pip install \.' .* start Python in another folder"),
        ([], [MODULE], r"clone/pddm_ext hides the package installed in \S*/site/pddm_ext: .* another folder"),
        ([MODULE], [MODULE], r"clone/pddm_ext hides the package installed in \S*/site/pddm_ext: "),
        ([], ["_C.cpython-39-x86_64-linux-gnu.so"], r"clone/pddm_ext has none: "),
        (["_C.cpython-39-x86_64-linux-gnu.so"], [], r"another Python \(_C\.cpython-39-\S*\) than this, "),
        (
            [MODULE],
            [],
            r"clone/pddm_ext/_C\.\S* is there, and torch is \d.*: it needs 2\.10 or later\. .* install .* again",
        ),
    ],
)
def test_a_native_module_that_does_not_load_says_why_and_what_to_do(tmp_path, in_the_source_folder, installed, said):
    clone, site = tmp_path / "clone", tmp_path / "site"
    (site / "pddm_ext").mkdir(parents=True)
    (site / "pddm_ext" / "__init__.py").touch()
    source = Path(pddm_ext.__file__).parent
    shutil.copytree(source, clone / "pddm_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for folder, names in ((clone, in_the_source_folder), (site, installed)):
        for name in names:
            (folder / "pddm_ext" / name).write_text("no library")
    # Without site, whose hooks would find an editable installation first; the folder it is started in comes first.
    places = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import pddm_ext"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: pddm_ext's native module does not load (")
    assert re.search(said, last), last


def test_make_help_has_one_line_for_every_target():
    makefile = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (help(?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    assert declared is not None
    targets = declared[1].replace("\\\n", " ").split()
    told = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in told.stdout.splitlines()]
    assert sorted(line[1] for line in lines) == sorted(targets)
    assert all(line[0] == "make" and len(line) == 3 for line in lines)
