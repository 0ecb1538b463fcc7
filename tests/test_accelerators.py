"""Where a run computes: a device that the kernels do not have is passed over by ``auto``, and refused by its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator
from lightning_fabric.connector import _Connector

from helpers import host_only
from pddm_ext.workbench import cli, compare, outcome
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, make_tiny

pytestmark = [host_only("as though there were an Apple GPU"), pytest.mark.usefixtures("one_thread")]

AUTO = [*TINY_OPTIONS, "--steps", "2", "--accelerator", "auto"]
SAID = "--accelerator auto would be mps here; this build of pddm_ext scores on cpu: on the CPU instead"


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch, tiny: Dataset) -> Iterator[None]:
    """A machine whose accelerator Lightning Fabric finds, chooses and names."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(MPSAccelerator, "auto_device_count", staticmethod(lambda: 1))
    monkeypatch.setattr(MPSAccelerator, "parse_devices", staticmethod(lambda devices: [0]))
    monkeypatch.setattr(
        MPSAccelerator, "get_parallel_devices", staticmethod(lambda devices: [torch.device("mps", 0)] * len(devices))
    )
    monkeypatch.setattr(_Connector, "_choose_auto_accelerator", staticmethod(lambda: "mps"))
    monkeypatch.setattr(compare, "_each", lambda cells, *_: (compare.run_cell(cell, 1) or cell for cell in cells))
    compare._loaded.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    compare._loaded.cache_clear()


@pytest.mark.parametrize("method", ["pddm-anchor", "multi-similarity"])
def test_auto_is_the_cpu_and_says_so(apple: None, tmp_path: Path, method: str) -> None:
    """For methods without a unit, too: what a comparison compares has one device."""
    with pytest.warns(UserWarning, match=SAID):
        assert cli.main(["train", *AUTO, "--method", method, "--out", str(tmp_path)]) == 0
    metrics = outcome.read(tmp_path)
    assert metrics is not None
    assert metrics["environment"]["device"] == "cpu"
    assert metrics["settings"]["accelerator"] == "auto"
    with pytest.warns(UserWarning, match=SAID):
        assert cli.main(["eval", str(tmp_path / CHECKPOINT)]) == 0


def test_a_comparison_computes_all_on_the_cpu(apple: None, tmp_path: Path) -> None:
    options = ["--methods", "pddm-anchor", "contrastive", "--seeds", "1", "--out", str(tmp_path)]
    with pytest.warns(UserWarning, match=SAID):
        assert cli.main(["compare", *AUTO, *options]) == 0
    for metrics in (outcome.read(path.parent) for path in tmp_path.rglob("metrics.json")):
        assert metrics is not None
        assert metrics["environment"]["device"] == "cpu"
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("accelerator", ["mps", "gpu"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_one_that_is_named_is_refused_with_the_way_out(
    apple: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: str, command: str
) -> None:
    options = [*TINY_OPTIONS, "--accelerator", accelerator, "--out", str(tmp_path)]
    assert cli.main([command, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"pddm-ext: error: --accelerator {accelerator} is mps here; this build of pddm_ext scores on cpu; "
        f"--accelerator cpu is accepted"
    )


def test_evaluation_refuses_one_that_is_named(apple: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert cli.main(["eval", str(tmp_path / CHECKPOINT), "--accelerator", "mps"]) == 2
    assert "--accelerator cpu is accepted" in capsys.readouterr().err


def test_a_method_without_a_unit_may_be_sent_to_a_device_by_name(apple: None) -> None:
    run = Run(Settings(**{**TINY, "method": "contrastive", "accelerator": "mps"}), make_tiny())
    assert run._fabric("mps", 1, []).device.type == "mps"


def test_what_is_not_there_names_what_is(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--accelerator", "nonsense", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--accelerator nonsense is not to be had" in error
    assert "; --accelerator cpu is there on every machine" in error
    assert error.count("\n") == 1
