"""The grid of methods and seeds: what it runs, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pddm_ext.workbench import checkpoint, cli, compare, outcome
from pddm_ext.workbench.compare import Cell, Grid, method
from pddm_ext.workbench.data import glyphs
from pddm_ext.workbench.data.load import load
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.evaluation.separation import spread
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG, Run
from pddm_ext.workbench.measuring import CollapseWarning
from pddm_ext.workbench.report import page
from pddm_ext.workbench.settings import PROXIES, Settings
from runs import TINY, TINY_OPTIONS, interrupt_at, make_archive, make_tiny, untimed

# Classes so few, and nets so small, that they collapse now and then; nothing here is about that.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{CollapseWarning.__module__}.CollapseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

COMMON = Settings(**{**TINY, "steps": 4, "classes": 3})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Cell]]:
    """Runs in this process, on a small data set in the glyphs' place; the cells that were run."""
    tiny, ran = make_tiny(), []
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    compare._loaded.cache_clear()

    def each(cells: list[Cell], jobs: int, threads: int) -> Iterator[Cell]:
        for cell in cells:
            ran.append(cell)
            compare.run_cell(cell, threads)
            yield cell

    monkeypatch.setattr(compare, "_each", each)
    yield ran
    compare._loaded.cache_clear()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave(cell: Cell, map_at_r: float) -> None:
    """Figures as though the cell had been run."""
    cell.folder.mkdir(parents=True)
    results = {"distance": {"map_at_r": {"value": map_at_r}}}
    outcome.write(cell.folder, {"settings": asdict(cell.settings), "curves": {}, "results": results})


# Methods


def test_a_method_may_have_settings_of_its_own() -> None:
    common = Settings(steps=7, lr=0.5)
    assert method("n-pair", common) == replace(common, method="n-pair")
    text = "pddm-pair:beta=0.5,augment=false,samples=3,schedule=cosine,weight=1"
    changed = {"beta": 0.5, "augment": False, "samples": 3, "schedule": "cosine", "weight": 1.0}
    assert method(text, common) == replace(common, method="pddm-pair", **changed)
    assert method("pddm-pair:augment=True", replace(common, augment=False)).augment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("triplet", "--methods has 'triplet'; recommended, joint, pddm-batch"),
        ("", "--methods has ''"),
        ("n-pair:bta=1", "--methods n-pair:bta=1: 'bta' is no setting; data"),
        ("n-pair:lr=fast", "--methods n-pair:lr=fast: lr is 'fast'; a value of type float"),
        ("n-pair:samples=2.5", "samples is '2.5'; a value of type int"),
        ("n-pair:augment=maybe", "augment is 'maybe'; a value of type bool"),
        ("n-pair:augment", "augment is ''; a value of type bool"),
        ("n-pair:samples=1", "--samples is 1; at least 2 is accepted"),
        ("n-pair:schedule=linear", "--schedule is 'linear'; constant, cosine"),
        ("n-pair:seed=3", "--methods n-pair:seed=3: seed is not a method's own"),
        ("n-pair:method=contrastive", "method is not a method's own"),
        ("n-pair:data=folder,root=x", "data is not a method's own"),
        ("multi-similarity:beta=20", "--methods multi-similarity:beta=20: multi-similarity does not use beta"),
        ("pddm-pair:margin=0.1", "pddm-pair does not use margin"),
        ("n-pair:clusters=3", "--methods n-pair:clusters=3: clusters does nothing without structure"),
        ("n-pair:centres=all", "centres does nothing without structure"),
        ("n-pair:density_ratio=1", "density_ratio does nothing without density"),
        ("recommended:weight=1,alpha=0.1", "recommended does not use weight"),
        ("recommended:unit_gradient=false", "recommended does not use unit_gradient"),
        ("joint:unit_steps=5", "joint does not use unit_steps"),
        ("multi-similarity:unit_noise=0.1", "unit_noise does nothing without unit_steps"),
        ("pddm-pair:unit_noise=0.1", "pddm-pair does not use unit_noise"),
        ("triplet-all:beta=0.1,margin=0.1", "triplet-all does not use beta"),
    ],
)
def test_bad_methods_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        method(text, Settings())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ["n-pair", "n-pair"]}, "--methods lists something twice: n-pair, n-pair"),
        ({"methods": []}, "--methods and --seeds have to name something"),
        ({"seeds": []}, "--methods and --seeds have to name something"),
        ({"seeds": [1, 2, 1]}, "--seeds lists something twice"),
        ({"lrs": [0.1, 1e-1]}, "--lrs lists something twice"),
        ({"lrs": [0.1, -1.0]}, "--lr is -1.0; a positive finite number"),
        ({"tries": 0}, "--tries is at least 1"),
        ({"methods": ["n-pair:lr=0.1"], "lrs": [0.1, 0.2]}, "has its own lr, and --lrs would choose another"),
        ({"common": replace(COMMON, devices=2)}, "--devices is 2; each run of a comparison has 1"),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    given = {"common": COMMON, "methods": ["n-pair"], "seeds": [0], "folder": tmp_path / "out", **changed}
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Grid(**given)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


# Cells


def test_a_grid_runs_each_cell_once(tmp_path: Path, here: list[Cell]) -> None:
    methods = ["pddm-anchor", "contrastive:dim=6,augment=false"]

    def run() -> dict[str, list[dict[str, Any]]]:
        return Grid(COMMON, methods, [3, 5], tmp_path).run(1, progress=False)

    first = run()
    assert [(cell.label, cell.settings.seed) for cell in here] == [(m, s) for s in (3, 5) for m in methods]
    assert len({cell.folder for cell in here}) == 4
    assert list(first) == methods
    for text, runs in first.items():
        assert [metrics["settings"] for metrics in runs] == [
            asdict(replace(method(text, COMMON), seed=seed)) for seed in (3, 5)
        ]
    for cell in here:
        expected = {".lock", CHECKPOINT, CONFIG, "metrics.json", "tensorboard"}
        assert {path.name for path in cell.folder.iterdir()} == expected
        assert json.loads((cell.folder / CONFIG).read_text()) == asdict(cell.settings)
    before = files(tmp_path)
    here.clear()
    assert run() == first
    assert not here
    assert files(tmp_path) == before
    more = Grid(COMMON, [*methods, "n-pair"], [3], tmp_path).run(1, progress=False)
    assert [cell.label for cell in here] == ["n-pair"]
    assert more[methods[0]] == first[methods[0]][:1]


def test_a_cell_is_what_train_would_give(tmp_path: Path, here: list[Cell]) -> None:
    (metrics,) = Grid(COMMON, ["pddm-pair"], [2], tmp_path).run(1, progress=False)["pddm-pair"]
    run = Run(replace(COMMON, method="pddm-pair", seed=2), make_tiny())
    run.train(progress=False)
    assert untimed(metrics) == untimed(outcome.figures(run))


def test_a_warning_is_a_line_that_names_its_run(
    tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several may run at a time, and each is reported when it has ended."""

    def train(run: Run, progress: bool) -> None:
        for kind in (CollapseWarning, UserWarning):
            print(end=warnings.formatwarning(kind("too much"), kind, "place.py", 7), file=sys.stderr)
        raise ValueError("enough")

    monkeypatch.setattr(Run, "train", train)
    assert cli.main(["compare", *TINY_OPTIONS, "--methods", "contrastive", "--seeds", "1", "--out", str(tmp_path)]) == 2
    ours, other, error = capsys.readouterr().err.splitlines()
    assert ours == "pddm-ext: warning: contrastive, seed 0: too much"
    assert other == "place.py:7: UserWarning: too much"
    assert error == "pddm-ext: error: enough"
    assert "place.py" in warnings.formatwarning(CollapseWarning("too much"), CollapseWarning, "place.py", 7)


def test_an_interrupted_cell_is_continued(tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> dict[str, Any]:
        label = "recommended:unit_steps=4"
        (metrics,) = Grid(COMMON, [label], [0], tmp_path / name).run(1, progress=False)[label]
        return metrics

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    folder = here[-1].folder
    assert checkpoint.load(folder / CHECKPOINT)["taken"] == 3
    assert not (folder / outcome.METRICS).exists()
    taken, train = [], Run.train

    def noted(self: Run, **given: Any) -> None:
        before = self.taken
        train(self, **given)
        taken.append(self.taken - before)

    monkeypatch.setattr(Run, "train", noted)
    assert untimed(run("stopped")) == untimed(whole)
    assert taken == [1]


def test_a_cell_of_other_settings_is_refused_and_kept(tmp_path: Path, here: list[Cell]) -> None:
    Grid(COMMON, ["n-pair"], [0], tmp_path).run(1, progress=False)
    before = files(tmp_path)
    here.clear()
    with pytest.raises(ValueError, match=r"seed-0: --steps was 4 and is 6 now; choose another --out"):
        Grid(replace(COMMON, steps=6), ["n-pair"], [0], tmp_path).run(1, progress=False)
    assert not here
    assert files(tmp_path) == before


def test_a_damaged_cell_is_named(tmp_path: Path, here: list[Cell]) -> None:
    grid = Grid(COMMON, ["n-pair"], [0], tmp_path)
    (cell,) = grid.cells()
    cell.folder.mkdir(parents=True)
    path = cell.folder / outcome.METRICS
    path.write_text('{"settings"')
    with pytest.raises(ValueError, match=r"metrics\.json: not the figures of a finished run"):
        grid.run(1, progress=False)
    assert not here
    assert path.read_text() == '{"settings"'


def test_a_run_that_diverges_is_an_error(tmp_path: Path, here: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(replace(COMMON, lr=1e30), ["n-pair"], [0], tmp_path)
    with pytest.raises(FloatingPointError, match="not finite"):
        grid.run(1, progress=False)
    assert compare.finished(here[0]) is None
    assert (
        cli.main(["compare", *TINY_OPTIONS, "--methods", "n-pair", "--lr", "1e30", "--out", str(tmp_path / "x")]) == 2
    )
    assert "embedding is not finite" in capsys.readouterr().err


# What would fail later fails first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "6", "--lrs", "0.1", "0.2"], "--classes is 6; glyphs (validation 0) has 5 to train on"),
        (["--lrs", "0.1", "0.2", "--tries", "2", "--classes", "4"], "--classes is 4; glyphs (validation 1) has 3 to"),
        (["--methods", "n-pair", "contrastive:classes=9"], "--classes is 9; glyphs has 8 to train on"),
        (["--patience", "2", "--classes", "6"], "--classes is 6; glyphs has 5 to train on without those held out"),
        (["--methods", "n-pair", "n-pair:backbone=nonsense"], "--backbone is 'nonsense'; convnet, efficientnet-lite0"),
        (
            ["--methods", "n-pair", "n-pair:backbone=collections:OrderedDict"],
            "TypeError: gives OrderedDict; a torch",
        ),
        (["--methods", "n-pair", "n-pair:backbone=not_there_at_all:net"], "--backbone not_there_at_all:net: ModuleNot"),
        (["--methods", "n-pair", "n-pair:accelerator=nonsense"], "--accelerator nonsense is not to be had"),
        (["--freeze", "--methods", "n-pair:backbone_lr_factor=0.1"], "backbone_lr_factor does nothing with freeze"),
    ],
)
def test_what_a_later_run_would_come_to_is_said_before_the_first(
    tmp_path: Path, here: list[Cell], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["compare", *TINY_OPTIONS, "--seeds", "2", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not here
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("lrs", [[], [0.1], [0.1, 0.2]])
def test_an_unfinished_cell_of_other_settings_is_refused_before_the_first(
    tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch, lrs: list[float]
) -> None:
    """Its first steps may serve a longer run, but no other one."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            Grid(COMMON, ["contrastive"], [1], tmp_path, lrs=lrs[:1]).run(1, progress=False)
    here.clear()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"contrastive/seed-1: --dim was 8 and is 9 now; choose another --out"):
        Grid(replace(COMMON, dim=9), ["n-pair", "contrastive"], [0, 1], tmp_path, lrs=lrs).run(1, progress=False)
    assert not here
    assert files(tmp_path) == before
    Grid(replace(COMMON, steps=6), ["contrastive"], [1], tmp_path, lrs=lrs[:1]).run(1, progress=False)
    metrics = outcome.read(here[0].folder)
    assert metrics is not None
    assert metrics["curves"]["step"] == [0, 2, 4, 6]


@pytest.mark.parametrize("method", PROXIES)
def test_methods_with_proxies_are_tuned_on_folds_of_fewer_classes(
    tmp_path: Path, here: list[Cell], method: str
) -> None:
    (metrics,) = Grid(COMMON, [method], [0], tmp_path, lrs=[1e-2, 1e-3]).run(1, progress=False)[method]
    assert len(here) == 3
    assert metrics["settings"]["proxy_lr_factor"] == 100
    compare.examples(Grid(COMMON, [method], [0], tmp_path, lrs=[1e-2, 1e-3]))


def test_a_grid_shows_the_step_that_was_chosen(tmp_path: Path, here: list[Cell]) -> None:
    grid = Grid(replace(COMMON, patience=1, steps=6), ["contrastive"], [0], tmp_path)
    (metrics,) = grid.run(1, progress=False)["contrastive"]
    examples, _ = compare.examples(grid)
    features = examples.shown["contrastive"].features
    assert spread(features) == metrics["spread"]


# Choosing learning rates


def test_the_best_learning_rate_on_average_is_chosen(tmp_path: Path) -> None:
    grid = Grid(COMMON, ["n-pair", "contrastive"], [0, 1], tmp_path, lrs=[0.1, 0.2, 0.3], tries=2)
    values = {
        ("n-pair", 0.1): (0.5, 0.1),
        ("n-pair", 0.2): (0.4, 0.4),
        ("n-pair", 0.3): (0.3, 0.2),
        ("contrastive", 0.1): (0.9, 0.8),
        ("contrastive", 0.2): (0.0, 0.0),
        ("contrastive", 0.3): (0.1, 0.9),
    }
    tuning = grid.tuning()
    assert len(tuning) == len({cell.folder for cell in tuning}) == 12
    assert {cell.fold for cell in tuning} == {0, 1}
    seeds = {cell.settings.seed for cell in tuning}
    assert not seeds & {0, 1}
    for cell in tuning:
        assert cell.fold is not None
        leave(cell, values[cell.settings.method, cell.settings.lr][cell.fold])
    assert grid.chosen() == {"n-pair": 0.2, "contrastive": 0.1}
    cells = [(cell.settings.method, cell.settings.lr, cell.settings.seed, cell.fold) for cell in grid.cells()]
    assert cells == [
        ("n-pair", 0.2, 0, None),
        ("contrastive", 0.1, 0, None),
        ("n-pair", 0.2, 1, None),
        ("contrastive", 0.1, 1, None),
    ]


def test_learning_rates_are_tried_on_training_classes_alone(
    tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, Dataset]] = []

    class Seen(Run):
        def __init__(self, settings: Settings, dataset: Dataset, *others: Any, **named: Any) -> None:
            seen.append((settings, dataset))
            super().__init__(settings, dataset, *others, **named)

    monkeypatch.setattr(compare, "Run", Seen)
    grid = Grid(COMMON, ["pddm-anchor"], [0], tmp_path, lrs=[1e-3, 1e30], tries=2)
    (metrics,) = grid.run(1, progress=False)["pddm-anchor"]
    assert metrics["settings"]["lr"] == 1e-3  # what diverges loses
    assert [cell.fold for cell in here] == [0, 1, 0, 1, None]
    whole = make_tiny()
    for cell, (settings, dataset) in zip(here, seen, strict=True):
        assert settings == cell.settings
        if cell.fold is None:
            assert dataset.digest() == whole.digest()
        else:
            assert "".join(dataset.test.names) == ["fgh", "abcde"][cell.fold]
            assert not set(dataset.train.names + dataset.test.names) & set(whole.test.names)
            assert not set(dataset.train.names) & set(dataset.test.names)
    lost = [outcome.read(cell.folder) for cell in here if cell.settings.lr == 1e30]
    assert [metrics is not None and metrics["diverged"] for metrics in lost] == [True, True]
    here.clear()
    grid.run(1, progress=False)
    assert not here


def test_scores_that_diverge_lose_too(tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit may diverge under an embedding that is finite."""
    figures = outcome.figures

    def measured(run: Run) -> dict[str, Any]:
        if run.settings.lr == 0.5:
            raise FloatingPointError("the PDDM unit's scores are not finite")
        return figures(run)

    monkeypatch.setattr(outcome, "figures", measured)
    (metrics,) = Grid(COMMON, ["pddm-anchor"], [0], tmp_path, lrs=[0.5, 1e-3]).run(1, progress=False)["pddm-anchor"]
    assert metrics["settings"]["lr"] == 1e-3


@pytest.mark.parametrize(("lrs", "chosen"), [([], 0.25), ([0.125], 0.125)])
def test_nothing_is_tried_where_there_is_no_choice(tmp_path: Path, lrs: Sequence[float], chosen: float) -> None:
    grid = Grid(replace(COMMON, lr=0.25), ["n-pair"], [0], tmp_path, lrs=lrs)
    assert grid.tuning() == []
    assert [cell.settings.lr for cell in grid.cells()] == [chosen]


# The command line


def test_compare_writes_a_report(tmp_path: Path, here: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "pddm-anchor", "multi-similarity:samples=4", "--seeds", "2"]
    options = ["compare", *TINY_OPTIONS, "--steps", "4", *methods, "--out", str(tmp_path)]
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    for text in (*methods[1:3], "raw pixels", "R@1", f"report: {tmp_path / 'report.html'}"):
        assert text in out
    assert [cell.settings.seed for cell in here] == [0, 0, 1, 1]
    page = (tmp_path / "report.html").read_text("utf-8")
    for text in ("<svg", "pddm-anchor", "multi-similarity:samples=4", "raw pixels"):
        assert text in page
    here.clear()
    assert cli.main(options) == 0
    assert not here
    assert capsys.readouterr().out == out


def test_an_interrupted_grid_says_how_to_go_on(
    tmp_path: Path, here: list[Cell], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 8)
    options = ["compare", *TINY_OPTIONS, "--methods", "n-pair", "contrastive", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(options) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert [compare.finished(cell) is not None for cell in here] == [True, False]
    assert not (tmp_path / "report.html").exists()
    before = files(here[0].folder)
    assert cli.main(options) == 0
    assert [cell.label for cell in here] == ["n-pair", "contrastive", "contrastive"]
    assert files(here[0].folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "triplet"], "--methods has 'triplet'"),
        (["--methods", "n-pair:nonsense=1"], "'nonsense' is no setting"),
        (["--seeds", "0"], "--seeds is 0; at least 1 is accepted"),
        (["--jobs", "0"], "--jobs is 0; at least 1 is accepted"),
        (["--tries", "0"], "--tries is 0; at least 1 is accepted"),
        (["--seeds", "1001"], "--seeds is 1001; at most 1000 is accepted"),
        (["--seeds", "5000000000"], "--seeds is 5000000000; at most 1000 is accepted"),
        (["--seeds", "9" * 30], f"--seeds is {'9' * 30}; at most 1000 is accepted"),
        (["--tries", "5000000000"], "--tries is 5000000000; at most 1000 is accepted"),
        (["--workers", "100000"], "--workers is 100000; at most 1024 is accepted"),
        (["--lrs", "0"], "--lr is 0.0; a positive finite number"),
        (["--devices", "2"], "--devices is 2; each run of a comparison has 1"),
    ],
)
def test_bad_comparisons_fail_before_any_work(
    tmp_path: Path, here: list[Cell], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["compare", *TINY_OPTIONS, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("now", "was", "said"),
    [
        ((0.8121, 0.4480), (0.8123, 0.4484), None),  # 81.2 and 44.8 on either side
        ((0.8121, 0.4495), (0.8123, 0.4484), None),  # above, where they are seen to differ
        ((0.8121, 0.4470), (0.8121, 0.4484), "Recall@1 81.2 % against 81.2 %, MAP@R 44.7 % against 44.8 %"),
        ((0.8112, 0.4495), (0.8121, 0.4484), "Recall@1 81.1 % against 81.2 %, MAP@R 45.0 % against 44.8 %"),
    ],
)
def test_below_is_what_is_below_as_it_is_printed(
    now: tuple[float, float], was: tuple[float, float], said: str | None
) -> None:
    def figures(recall: float, map_at_r: float) -> dict[str, Any]:
        return {"recall": {"1": {"value": recall}}, "map_at_r": {"value": map_at_r}}

    metrics = {
        "settings": {"seed": 0},
        "results": {"distance": figures(*now)},
        "baselines": {"untrained": figures(*was)},
    }
    told = [] if said is None else [f"The run has ended below the untrained embedder, by distance: {said}"]
    assert [str(below) for below in page._below({"": [metrics]})] == told


@pytest.mark.parametrize("option", ["--method", "--seed"])
def test_what_the_grid_decides_is_no_option(here: list[Cell], capsys: pytest.CaptureFixture[str], option: str) -> None:
    """Nor short for --methods and --seeds."""
    with pytest.raises(SystemExit) as left:
        cli.main(["compare", f"{option}=1"])
    assert left.value.code == 2
    assert f"unrecognized arguments: {option}=1" in capsys.readouterr().err
    assert not here


def test_what_fails_in_a_cell_is_said(tmp_path: Path, here: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--methods", "n-pair", "--seeds", "1", "--out", str(tmp_path / "out")]
    missing = ["--data", "omniglot", "--root", str(tmp_path / "nothing.zip")]
    assert cli.main(["compare", *TINY_OPTIONS, *missing, *out]) == 2
    assert f"pddm-ext: error: {tmp_path / 'nothing.zip'}" in capsys.readouterr().err


# Processes


def test_processes_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time, each started afresh."""
    archive, methods = make_archive(tmp_path / "small.zip"), ["joint", "contrastive"]
    data = ["--data", "omniglot", "--root", str(archive), "--steps", "2"]
    options = ["--methods", *methods, "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "grid")]
    assert cli.main(["compare", *TINY_OPTIONS, *data, *options]) == 0
    assert "2/2" in capsys.readouterr().err
    assert (tmp_path / "grid" / "report.html").exists()
    common = Settings(**{**TINY, "steps": 2}, data="omniglot", root=str(archive))
    for name in methods:
        metrics = outcome.read(tmp_path / "grid" / "cells" / name / "seed-0")
        run = Run(replace(common, method=name), load(common))
        run.train(progress=False)
        assert metrics is not None
        assert untimed(metrics) == untimed(outcome.figures(run))
