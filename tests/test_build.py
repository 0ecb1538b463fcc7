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
    "_ZN4pddm4cuda12score_kernelINS0_14ArithmeticBf16ENS0_5ShapeILi32ELi64ELi2ELi2ELi3ELi2EEEEEv"
    "NS0_9WorkspaceINT_4RealEEENS0_3JobIS7_EE"
)


def said_by_ptxas(kernel: str, spilled: int) -> str:
    return (
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {kernel}\n"
        f"    32 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers\n"
    )


def report(folder: Path, loop: list[str]) -> subprocess.CompletedProcess[str]:
    """Of a kernel whose only loop is this."""
    shapes, cuobjdump = folder / "shapes", folder / "cuobjdump"
    shapes.write_text("#!/bin/sh\nprintf 'score_kernel<Bf16, Shape<32, 64, 2, 2, 3, 2>>\\t83200\\n'\n")
    code = [*loop, "@!P0 BRA 0x0", "EXIT", "BRA 0xff0"]
    lines = "\n".join(f"        /*{16 * k:04x}*/   {text} ;   /* 0x0 */" for k, text in enumerate(code))
    listing = f"\nFatbin elf code:\n================\narch = sm_90a\n\t\tFunction : {SCORE}\n{lines}\n"
    (folder / "listing").write_text(listing)
    cuobjdump.write_text(f"#!/bin/sh\ncat '{folder}/listing'\n")
    for program in (shapes, cuobjdump):
        program.chmod(0o755)
    return subprocess.run(
        [sys.executable, RESOURCES, "report", folder, shapes, cuobjdump], capture_output=True, text=True
    )


PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


@pytest.mark.parametrize(
    ("loop", "complaint"),
    [
        ([PRODUCT, *["NOP"] * 15], None),
        ([PRODUCT, *["NOP"] * 30], "32.00 instructions per product; at most"),
        ([PRODUCT, "LDL R3, [R1]"], "a main loop touches local memory"),
        ([PRODUCT, "STL [R1], R3"], "a main loop touches local memory"),
        (["NOP"], "no main loop was found"),
    ],
)
def test_a_main_loop_that_spills_or_issues_too_much_fails(tmp_path, loop, complaint):
    (tmp_path / "kernels.o.ptxas").write_text(said_by_ptxas(SCORE, 8))
    done = report(tmp_path, loop)
    assert done.returncode == bool(complaint), done.stderr
    assert (complaint or "") in done.stderr
    assert "score_kernel<Bf16, Shape<32, 64, 2, 2, 3, 2>>  83200         128 +8 B spilled" in done.stdout  # cold ones
    if not complaint:
        assert f"score_kernel<Bf16, Shape<32, 64, 2, 2, 3, 2>>  {(len(loop) + 1):.2f}" in done.stdout


def test_products_that_wait_for_each_other_fail(tmp_path):
    serial = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a function call"
    (tmp_path / "kernels.o.ptxas").write_text(f"ptxas info    : {serial}\n{said_by_ptxas(SCORE, 0)}")
    done = report(tmp_path, [PRODUCT])
    assert done.returncode == 1
    assert f"kernels.o.ptxas: ptxas info    : {serial}" in done.stderr


def test_waiting_behind_the_end_is_no_loop(tmp_path):
    """Code after the last EXIT goes back to the middle of the program."""
    (tmp_path / "kernels.o.ptxas").write_text(said_by_ptxas(SCORE, 0))
    loop = ["NOP", "NOP", PRODUCT, "@!P1 BRA 0x0"]
    done = report(tmp_path, [*loop, *["LDL R3, [R1]"] * 40, "EXIT", "@!P0 BRA 0x20"])
    assert done.returncode == 0, done.stderr
    assert "32, 64, 2, 2, 3, 2>>  4.00" in done.stdout


def test_nothing_to_report_is_a_failure(tmp_path):
    assert report(tmp_path, [PRODUCT]).returncode != 0


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
    # No other place than torch's may hold a pddm_ext besides.
    others = [p for p in sys.path if p and not (Path(p, "pddm_ext").is_dir() and not Path(p, "torch").is_dir())]
    places = os.pathsep.join([str(site), *others])
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
