"""Every example runs to its end and says something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_is_one_for_each_adapter() -> None:
    adapters = {path.stem for path in (Path(__file__).parent.parent / "pddm_ext/adapters").glob("[a-z]*.py")}
    assert {f"with_{name}" for name in adapters} <= {path.stem for path in EXAMPLES}  # not NAME.py, which would hide it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 40
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", path], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
