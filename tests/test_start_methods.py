"""Worker processes under each way in which Python starts them, and the command line as a module."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pddm_ext.workbench import cli, compare, outcome
from pddm_ext.workbench.data import photos, scan
from pddm_ext.workbench.data.augment import DRAWINGS, PHOTOS
from pddm_ext.workbench.data.load import load
from pddm_ext.workbench.data.splits import Dataset, TestSet
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings
from processes import environment_of_a_user
from runs import TINY, TINY_OPTIONS, make_archive, make_tiny, untimed
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")

_SCRIPT = """
import multiprocessing, sys
from pddm_ext.workbench import cli

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    out = sys.argv[sys.argv.index("--out") + 1]
    status = cli.main(["train", *sys.argv[2:]])
    sys.exit(status or cli.main(["eval", out + "/checkpoint.pt", "--json", "again.json"]))
"""


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = environment_of_a_user(**environment)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "start", [s for s in ("fork", "spawn", "forkserver") if s in multiprocessing.get_all_start_methods()]
)
def test_training_and_evaluation_read_pictures_in_workers(tmp_path: Path, start: str) -> None:
    """With the figures of a run that has none."""
    root = make_archive(tmp_path / "small.zip")
    (tmp_path / "script.py").write_text(_SCRIPT)
    options = [*TINY_OPTIONS, "--data", "omniglot", "--root", str(root), "--steps", "2", "--workers", "1"]
    done = run("script.py", start, *options, "--method", "contrastive", "--out", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    settings = Settings(**{**TINY, "steps": 2}, data="omniglot", root=str(root), method="contrastive")
    alone = Run(settings, load(settings))
    alone.train(progress=False)
    expected = untimed(outcome.figures(alone))
    trained = outcome.read(tmp_path / "run")
    assert trained is not None
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == trained
    trained["settings"]["workers"] = 0
    assert untimed(trained) == expected


def test_a_comparison_reads_pictures_in_workers(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "small.zip")
    options = [*TINY_OPTIONS, "--data", "omniglot", "--root", str(root), "--steps", "2", "--workers", "1"]
    grid = ["--methods", "pddm-anchor", "--seeds", "1", "--out", "grid"]
    done = run("-m", "pddm_ext", "compare", *options, *grid, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid" / "report.html").exists()


def test_a_picture_that_a_worker_cannot_read_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "photos")
    for broken in (root / "a").iterdir():
        broken.write_bytes(b"no picture")
    (tmp_path / "net_for_a_test.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # As files that go bad after the look at all of them, which would have named them before.
    monkeypatch.setattr(scan, "examined", lambda dataset, **_: (dataset, frozenset()))
    data = ["--data", "folder", "--root", str(root), "--backbone", "net_for_a_test:net", "--workers", "1"]
    assert cli.main(["train", *TINY_OPTIONS, *data, "--out", str(tmp_path / "run")]) == 2
    measured, error = capsys.readouterr().err.splitlines()
    assert measured.startswith("training: step 0/6")
    assert error.startswith(f"pddm-ext: error: {root / 'a'}")
    assert "not a readable picture" in error


def test_a_comparisons_loaders_start_workers_as_a_run_by_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda name, force: set_to.append((name, force)))
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    compare._begin("fork")
    assert set_to == [("fork", True)]


def every_dataset(tmp_path: Path) -> list[Dataset]:
    drawings = load(Settings(data="omniglot", root=str(make_archive(tmp_path / "small.zip"))))
    folder = photos.folder(make_folder(tmp_path / "photos"))
    return [make_tiny(), drawings, folder, make_tiny().validation(0)]


def test_what_workers_get_can_be_pickled(tmp_path: Path) -> None:
    for dataset in every_dataset(tmp_path):
        rows = torch.arange(3)
        again = pickle.loads(pickle.dumps(dataset))
        assert again.digest() == dataset.digest()
        test, other = TestSet(dataset, 0), pickle.loads(pickle.dumps(TestSet(dataset, 0)))
        assert torch.equal(other[rows], test[rows])
        assert torch.equal(other.show(other[rows]), test.show(test[rows]))


@pytest.mark.parametrize("view", [DRAWINGS, PHOTOS], ids=["drawings", "photographs"])
def test_a_view_is_made_of_functions_that_other_processes_find(view: Any) -> None:
    assert pickle.loads(pickle.dumps(view)) == view


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = run("-m", "pddm_ext", "info", folder=tmp_path)
    assert done.returncode == 0
    assert "instruction sets" in done.stdout
    refused = run("-m", "pddm_ext", "train", "--steps", "0", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "pddm-ext: error: --steps is 0; at least 1 is accepted\n"
