"""What a run starts from, and the step and thresholds that validation pictures choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pddm_ext
from pddm_ext.workbench import checkpoint, cli, measuring, outcome
from pddm_ext.workbench.data import glyphs
from pddm_ext.workbench.data.splits import Dataset, TestSet
from pddm_ext.workbench.evaluation.retrieval import retrieval
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.settings import Settings
from runs import (
    TINY,
    TINY_OPTIONS,
    Counted,
    differences,
    interrupt_at,
    looked,
    measured,
    scalars,
    trained,
    untimed,
    with_gallery,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CHOOSING = {"method": "contrastive", "classes": 2, "patience": 2, "steps": 12}


# The step before the first


@pytest.mark.parametrize("data", ["distorted", "gallery"])
def test_a_run_measures_what_it_starts_from_in_one_pass(tiny: Dataset, tmp_path: Path, data: str) -> None:
    dataset = tiny if data == "distorted" else with_gallery(tiny)
    backbone = Counted()
    run = Run(Settings(**TINY, method="contrastive"), replace(dataset, val=None), tmp_path, backbone)
    net, test = run.learner.net, run.test
    net.eval()
    with torch.no_grad():
        bare, untrained = backbone(test[torch.arange(len(test))]), net(test[torch.arange(len(test))])
    net.train()
    expected = {
        name: retrieval(F.normalize(x, dim=1), test.labels, None, 0, 1, queries=test.queries, gallery=test.gallery)[
            "distance"
        ]
        for name, x in (("backbone", bare), ("untrained", untrained))
    }
    seen: list[int] = []
    backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    run.train(progress=False)
    assert seen[0] == len(test)  # then the first batch
    assert seen[1] == TINY["classes"] * TINY["samples"]
    assert run.baselines == expected
    assert checkpoint.load(tmp_path / CHECKPOINT)["baselines"] == expected
    assert run.curves["step"] == [0, 2, 4, 6]
    assert run.curves["loss"][0] is None
    assert run.curves["seconds"][0] == 0
    assert run.curves["recall"][0] == expected["untrained"]["recall"]["1"]["value"]
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4, 6]
    assert [step for step, _ in scalars(tmp_path)["recall"]] == [0, 2, 4, 6]
    assert outcome.figures(run)["baselines"] == expected


def figures(level: float) -> dict[str, Any]:
    point = {"value": level, "low": level, "high": level}
    return {"recall": dict.fromkeys(("1", "2", "4", "8"), point), "map_at_r": point, "r_precision": point}


@pytest.mark.parametrize("worse", [True, False])
def test_train_says_so_at_its_end(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worse: bool
) -> None:
    level = 1.0 if worse else 0.0
    monkeypatch.setattr(measuring, "baselines", lambda *_: {"backbone": figures(level)})
    assert cli.main(["train", *TINY_OPTIONS, "--method", "contrastive", "--out", str(tmp_path)]) == 0
    said = "The run has ended below its backbone's bare features, by distance" in capsys.readouterr().out
    assert said == worse


# A step chosen on validation pictures


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """The MAP@R of the measurements, by their steps, in the place of what they are."""
    point = measuring.point

    def changed(seen: Any, test: TestSet, settings: Settings) -> dict[str, float]:
        return {**point(seen, test, settings), "map_at_r": values.pop(0)}

    monkeypatch.setattr(measuring, "point", changed)


def test_a_run_stops_where_validation_has_waited_long_enough_and_keeps_the_best(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name}={value}" for name, value in CHOOSING.items()]
    trained(tiny, tmp_path / "four", **{**CHOOSING, "patience": 9, "steps": 4})
    with monkeypatch.context() as patch:
        scripted(patch, [0.2, 0.1, 0.3, 0.3, 0.25, 0.9])
        assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "of those to train on, hold out to choose by 3 classes, 12 pictures: two" in printed.out
    assert "train on 5 classes, 20 pictures: one" in printed.out
    assert "Figures are those of step 4 of 8, the best on validation pictures." in printed.out
    assert "training: step 8/12, validation R@1 " in printed.err
    metrics, state = outcome.read(tmp_path / "run"), checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert metrics is not None
    assert metrics["curves"]["step"] == [0, 2, 4, 6, 8]
    assert (metrics["chosen_step"], metrics["curves_of"]) == (4, "validation")
    assert state["taken"] == 8
    assert not differences(checkpoint.load(tmp_path / "four" / CHECKPOINT)["learner"], state["best"])
    assert differences(state["best"], state["learner"])
    # The figures are of the test pictures and the best weights; so is what is loaded to be used.
    used = pddm_ext.load(tmp_path / "run")
    dataset = tiny.hold_out(0)
    again = measured(used.module.net, used.unit, TestSet(dataset, 0))
    assert again["results"] == metrics["results"]
    assert "validation/recall" in scalars(tmp_path / "run")
    assert cli.main(["eval", str(tmp_path / "run"), "--json", str(tmp_path / "again.json")]) == 0
    assert outcome.json.loads((tmp_path / "again.json").read_text())["results"] == metrics["results"]
    # It has stopped for good, but for more patience.
    resumed = ["train", "--resume", "--out", str(tmp_path / "run"), "--no-progress"]
    assert cli.main(resumed) == 0
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT)["taken"] == 8
    assert untimed(outcome.read(tmp_path / "run") or {}) == untimed(metrics)
    scripted(monkeypatch, [0.2, 0.1])
    assert cli.main([*resumed, "--patience", "4"]) == 0
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT)["taken"] == 12


def test_curves_are_of_the_validation_pictures(tiny: Dataset) -> None:
    run = trained(tiny, **CHOOSING)
    data = tiny.hold_out(0).selecting()
    assert data is not None
    assert run.dataset.train.names == tuple("abcde")
    run.learner.load_state_dict(run._best)
    test = TestSet(data, 0)
    found = retrieval(looked(run.learner.net, test).features, test.labels, None, 0, 1)["distance"]
    at = run.curves["step"].index(run.chosen_step)
    assert run.curves["map_at_r"][at] == max(run.curves["map_at_r"]) == found["map_at_r"]["value"]
    assert run.curves["recall"][at] == found["recall"]["1"]["value"]


@pytest.mark.parametrize("batch", [1, 5])
def test_a_run_that_chooses_resumes_to_the_same_bits(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    changed = {**CHOOSING, "method": "recommended", "unit_steps": 4, "steps": 6}
    whole = trained(tiny, tmp_path / "whole", **changed)
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny, tmp_path / "stopped", **changed)
    stopped = trained(tiny, tmp_path / "stopped", **changed)
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert not differences(*states)
    assert untimed(outcome.figures(whole)) == untimed(outcome.figures(stopped))


def test_too_few_classes_to_hold_some_out_are_told_before_any_work(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", *TINY_OPTIONS, "--patience", "2", "--out", str(tmp_path / "out")]
    assert cli.main([*options, "--classes", "6"]) == 2
    assert "--classes is 6; glyphs has 5 to train on without those held out" in capsys.readouterr().err
    monkeypatch.setattr(glyphs, "load", lambda: replace(tiny, val=tiny.test.some(torch.arange(5))))
    assert cli.main(options) == 2
    assert "glyphs has 5 validation pictures; Recall@8 needs more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Thresholds


@pytest.mark.parametrize("changed", [{"val": True}, {"patience": 1, "steps": 12}, {}])
@pytest.mark.parametrize("method", ["pddm-anchor", "contrastive"])
def test_thresholds_are_of_the_validation_pictures(
    tiny: Dataset, tmp_path: Path, method: str, changed: dict[str, Any]
) -> None:
    """By the weights that are kept, wherever there are some."""
    options = {name: value for name, value in changed.items() if name != "val"}
    dataset = with_gallery(tiny) if "val" in changed else tiny
    run = trained(dataset, tmp_path, method=method, classes=3, **options)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    selecting = run.dataset.selecting()
    if not changed:
        assert selecting is None
        assert state["thresholds"] == run.thresholds == outcome.figures(run)["thresholds"] == {}
        return
    assert selecting is not None
    used = pddm_ext.load(tmp_path)
    test = TestSet(selecting, 0)
    pairs = measured(used.module.net, used.unit, test)["pairs"]
    expected = {
        kind: {rate: cut for rate, cut in pair["thresholds"].items() if cut is not None} for kind, pair in pairs.items()
    }
    assert set(expected) == ({"distance", "score"} if method == "pddm-anchor" else {"distance"})
    assert state["thresholds"] == run.thresholds == used.thresholds == expected
    assert outcome.figures(run)["thresholds"] == expected


# Measured once


@pytest.mark.parametrize("changed", [{}, {"structure": 0.3, "method": "pddm-pair"}])
def test_the_last_measurement_is_that_of_the_end(tiny: Dataset, changed: dict[str, Any]) -> None:
    """And its figures are what evaluating anew would give."""
    backbone = Counted()
    run = trained(tiny, None, backbone, **{"method": "contrastive", **changed})
    before = backbone.pictures
    figures = outcome.figures(run)
    assert backbone.pictures == before
    again = measured(run.learner.net, run.learner.unit, run.test)
    assert backbone.pictures > before
    for name, value in again.items():
        assert figures[name] == value, name
