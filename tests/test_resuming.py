"""Runs that stop and continue, and their checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pddm_ext import __version__
from pddm_ext.workbench import checkpoint, cli, outcome
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG, Run
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, differences, dropping, interrupt_at, scalars, trained, untimed

pytestmark = pytest.mark.usefixtures("one_thread")


# Runs that stop and continue


@pytest.mark.parametrize(
    ("changed", "backbone"),
    [
        ({"method": "pddm-anchor"}, None),
        ({"method": "recommended"}, None),
        ({"method": "triplet-all", "density": 0.1, "structure": 0.3}, None),
        ({"method": "multi-similarity-mined", "accumulate": 2}, None),
        ({"method": "triplet-semihard", "augment": False}, None),
        ({"method": "pddm-pair", "schedule": "cosine", "warmup": 3, "accumulate": 2}, None),
        ({"method": "pddm-anchor", "precision": "bf16-mixed"}, None),
        ({"method": "contrastive", "precision": "64-true"}, None),
        ({"method": "pddm-batch"}, dropping),
    ],
)
def test_a_resumed_run_ends_at_the_same_bits(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    backbone: Callable[[], nn.Module] | None,
) -> None:
    def train(name: str) -> Run:
        return trained(tiny, tmp_path / name, None if backbone is None else backbone(), **changed)

    whole = train("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * changed.get("accumulate", 1))
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert checkpoint.load(tmp_path / "stopped" / CHECKPOINT)["taken"] == 2
    torch.manual_seed(99)  # whatever the process did in between
    stopped = train("stopped")
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert states[0]["taken"] == 6
    assert not differences(*states)
    assert untimed(outcome.figures(stopped)) == untimed(outcome.figures(whole))


@pytest.mark.parametrize("method", ["pddm-anchor", "recommended"])
def test_a_finished_run_can_be_made_longer(tiny: Dataset, tmp_path: Path, method: str) -> None:
    """From a step between two evaluations, too; each stop is one measurement more."""
    trained(tiny, tmp_path / "whole", steps=7, every=3, accumulate=2, method=method)
    for steps in (2, 4, 7):
        trained(tiny, tmp_path / "grown", steps=steps, every=3, accumulate=2, method=method)
    whole, grown = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "grown"))
    for part in ("learner", "optimizer", "generators", "taken"):
        assert not differences(whole[part], grown[part]), part
    assert whole["curves"]["step"] == [3, 6, 7]
    assert grown["curves"]["step"] == [2, 3, 4, 6, 7]


def test_stopping_and_resuming_on_the_command_line(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", *TINY_OPTIONS, "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert cli.main(options) == 130
    assert "stopped after 1 steps; no checkpoint yet" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert cli.main(options) == 130
    assert f"stopped after 3 steps; {tmp_path / 'stopped' / CHECKPOINT} is there" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert scalars(tmp_path / "stopped")["step"] == [(2, 2)]  # what was measured is on the disk
    assert cli.main([*options, "--resume"]) == 0
    assert cli.main([*options[:-1], str(tmp_path / "whole")]) == 0
    stopped, whole = (outcome.read(tmp_path / name) for name in ("stopped", "whole"))
    assert stopped is not None
    assert whole is not None
    assert untimed(stopped) == untimed(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", "0.5"], "--lr was 0.001 and is 0.5 now"),
        (["--unit-lr-factor", "7"], " and is 7.0 now"),
        (["--method", "pddm-pair"], "--method was pddm-anchor and is pddm-pair now"),
        (["--no-augment"], "--augment was True and is False now"),
        (["--steps", "1"], "has taken 2 steps; --steps is 1"),
    ],
)
def test_resuming_under_other_options_names_them(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    content = (tmp_path / CHECKPOINT).read_bytes()
    assert cli.main(["train", *TINY_OPTIONS, *changed, "--out", str(tmp_path), "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == content
    assert not (tmp_path / CONFIG).exists()


def test_a_cosine_schedule_cannot_be_made_longer(tiny: Dataset, tmp_path: Path) -> None:
    """Its first steps would have been others."""
    trained(tiny, tmp_path, steps=2, schedule="cosine")
    with pytest.raises(ValueError, match="--steps was 2 and is 6 now"):
        trained(tiny, tmp_path, schedule="cosine")


def test_resuming_on_other_pictures_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2)
    for other in (
        Dataset("glyphs", DRAWINGS, tiny.train, tiny.train, distort_test=True),
        Dataset("glyphs", DRAWINGS, tiny.train.classes(torch.arange(7)), tiny.test, distort_test=True),
    ):
        with pytest.raises(ValueError, match="saw other pictures than --data glyphs has now"):
            Run(Settings(**TINY), other, tmp_path).resume()


def test_weights_of_another_net_are_refused(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: its weights do not fit the net"):
        Run(Settings(**TINY), tiny, tmp_path, backbone=dropping()).resume()


# Checkpoints


def test_a_missing_or_damaged_checkpoint_is_named(tiny: Dataset, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt: no checkpoint"):
        Run(Settings(**TINY), tiny, tmp_path).resume()
    trained(tiny, tmp_path, steps=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "tensorboard"]  # nothing temporary
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
            checkpoint.load(path)
    for other in ({"weights": torch.zeros(1)}, [1], {"format": checkpoint.FORMAT, "settings": {}}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not a checkpoint of format"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        *((part, value, "not a checkpoint of format") for part in checkpoint.KEYS for value in (None, [5])),
        ("taken", -5, "damaged; its steps or curves"),
        ("curves", {}, "damaged; its steps or curves"),
        ("learner", {}, "its weights do not fit the net"),
        ("settings", {"steps": "x"}, "was "),
        *((part, {}, "no state that fits this one") for part in ("generators", "optimizer")),
    ],
)
def test_a_part_of_a_checkpoint_that_is_damaged_is_told(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, value: Any, message: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    checkpoint.save(tmp_path / CHECKPOINT, {**state, part: value})
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("found", "way"), [(checkpoint.FORMAT + 1, "a newer pddm_ext wrote it: upgrade"), (1, "no release wrote that")]
)
def test_a_checkpoint_of_another_format_says_what_to_do(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: int, way: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    path = tmp_path / CHECKPOINT
    torch.save({**checkpoint.load(path), "format": found}, path)
    content = path.read_bytes()
    for command in (["eval", str(path)], ["train", *TINY_OPTIONS, "--out", str(tmp_path), "--resume"]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert f"a checkpoint of format {found}; pddm_ext {__version__} reads {checkpoint.FORMAT}; {way}" in error
    assert path.read_bytes() == content


class Creates:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny, tmp_path, steps=2)
    path, mark = tmp_path / CHECKPOINT, tmp_path / "mark"
    torch.save({**checkpoint.load(path), "precision": Creates(mark)}, path)
    assert cli.main(["eval", str(path)]) == 2
    assert f"{path}: not a readable checkpoint; expected the one" in capsys.readouterr().err  # no advice to run it
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert mark.exists()


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write_bytes(path, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_bytes(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
