"""Runs that stop and continue, and their checkpoints."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pddm_ext import __version__, load
from pddm_ext.workbench import checkpoint, cli, measuring, outcome
from pddm_ext.workbench.data import glyphs
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG, Run
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, assert_refused, differences, dropping, interrupt_at, scalars, trained, untimed

pytestmark = pytest.mark.usefixtures("one_thread")


# Runs that stop and continue


@pytest.mark.parametrize(
    ("changed", "backbone"),
    [
        ({"method": "pddm-anchor"}, None),
        ({"method": "recommended", "unit_steps": 4}, None),
        ({"method": "triplet-all", "density": 0.1, "structure": 0.3}, None),
        ({"method": "multi-similarity-mined", "accumulate": 2}, None),
        ({"method": "triplet-semihard", "augment": False}, None),
        ({"method": "pddm-pair", "schedule": "cosine", "warmup": 3, "accumulate": 2}, None),
        ({"method": "pddm-anchor", "precision": "bf16-mixed"}, None),
        ({"method": "contrastive", "precision": "64-true"}, None),
        ({"method": "pddm-batch"}, dropping),
        ({"method": "pddm-pair", "bank": 20}, None),
        ({"method": "recommended", "unit_steps": 4, "bank": 20}, None),
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
    # Once, in the third step, which is finished; then twice, in the fifth, which is lost.
    for batch, times, taken in ((3 * changed.get("accumulate", 1), 1, 3), (2 * changed.get("accumulate", 1), 2, 4)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, batch, times)
            with pytest.raises(KeyboardInterrupt):
                train("stopped")
        assert checkpoint.load(tmp_path / "stopped" / CHECKPOINT)["taken"] == taken
        torch.manual_seed(99)  # whatever the process did in between
    stopped = train("stopped")
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert states[0]["taken"] == 6
    assert not differences(*states)
    assert untimed(outcome.figures(stopped)) == untimed(outcome.figures(whole))


@pytest.mark.parametrize(
    "changed", [{"method": "pddm-anchor"}, {"method": "joint"}, {"method": "recommended", "unit_steps": 4}]
)
def test_a_finished_run_can_be_made_longer(tiny: Dataset, tmp_path: Path, changed: dict[str, Any]) -> None:
    """From a step between two evaluations, too; each stop is one measurement more."""
    trained(tiny, tmp_path / "whole", steps=7, every=3, accumulate=2, **changed)
    for steps in (2, 4, 7):
        trained(tiny, tmp_path / "grown", steps=steps, every=3, accumulate=2, **changed)
    whole, grown = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "grown"))
    for part in ("learner", "optimizer", "generators", "taken"):
        assert not differences(whole[part], grown[part]), part
    assert whole["curves"]["step"] == [0, 3, 6, 7]
    assert grown["curves"]["step"] == [0, 2, 3, 4, 6, 7]


def test_stopping_and_resuming_on_the_command_line(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no other option than the folder: all else is in its config.json."""
    folder, changed = tmp_path / "stopped", ["--method", "contrastive", "--no-augment", "--seed", "3"]
    command = ["train", *TINY_OPTIONS, *changed, "--out", str(folder)]
    for batch, times, taken, saved in ((1, 1, 1, 1), (2, 1, 3, 3), (2, 2, 4, 4)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, batch, times)
            assert cli.main(command) == 130
        said = f"stopped after {taken} steps; {folder / CHECKPOINT} of step {saved} is there; --resume continues"
        assert said in capsys.readouterr().err
        command = ["train", "--resume", "--out", str(folder)]
    assert not (folder / "metrics.json").exists()
    assert [step for step, _ in scalars(folder)["recall"]] == [0, 2, 4]  # what was measured is on the disk
    assert cli.main(command) == 0
    assert cli.main(["train", *TINY_OPTIONS, *changed, "--out", str(tmp_path / "whole")]) == 0
    stopped, whole = (outcome.read(tmp_path / name) for name in ("stopped", "whole"))
    assert stopped is not None
    assert whole is not None
    assert untimed(stopped) == untimed(whole)


def test_the_default_folder_is_resumed_by_its_config_too(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert cli.main(["train", *TINY_OPTIONS, "--method", "contrastive"]) == 130
    assert cli.main(["train", "--resume", "--method", "contrastive", "--steps", "4"]) == 0
    metrics = outcome.read(tmp_path / "runs" / "glyphs" / "contrastive" / "seed-0")
    assert metrics is not None
    assert metrics["settings"] == {**Settings(**TINY).__dict__, "method": "contrastive", "steps": 4}


def test_ctrl_c_before_the_first_step_leaves_no_checkpoint(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "baselines", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 130
    assert "stopped after 0 steps; no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("where", ["refuse_divergence", "point", "separation"])
def test_ctrl_c_in_an_evaluation_ends_it_at_once_and_loses_no_step(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Of a measurement between, or of the thresholds at the end."""
    changed = {"method": "contrastive", "patience": 9, "classes": 2}
    whole = trained(tiny, tmp_path / "whole", **changed)
    measure, calls = getattr(measuring, where), []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == {"refuse_divergence": 2, "point": 3, "separation": 1}[where]:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")
        return measure(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny, tmp_path / "stopped", **changed)
    state = checkpoint.load(tmp_path / "stopped" / CHECKPOINT)
    assert state["taken"] == (6 if where == "separation" else 4)
    stopped = trained(tiny, tmp_path / "stopped", **changed)
    assert untimed(outcome.figures(stopped)) == untimed(outcome.figures(whole))
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert not differences(*states)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--lr", "0.5"],
            "--lr was 0.001 and is 0.5 now, where the run is to be resumed; leave it as it was, or begin",
        ),
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


def test_resuming_on_other_pictures_is_refused_unless_they_are_accepted(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And is told which side has changed."""
    trained(tiny, tmp_path, steps=2)
    content = (tmp_path / CHECKPOINT).read_bytes()
    others = {
        "test had 20 pictures of 5 classes and has 18 pictures of 5 classes now": replace(
            tiny, test=tiny.test.some(torch.arange(18))
        ),
        "train had 32 pictures of 8 classes and has 28 pictures of 7 classes now": replace(
            tiny, train=tiny.train.classes(torch.arange(7))
        ),
        "train had 32 pictures of 8 classes and has as many others now": replace(
            tiny, train=tiny.train.some(torch.arange(32).roll(1))
        ),
        "gallery had none and has 32 pictures of 8 classes now": replace(
            tiny, test=tiny.train, gallery=tiny.train, distort_test=False
        ),
    }
    resumed = ["train", *TINY_OPTIONS, "--out", str(tmp_path), "--resume"]
    for message, other in others.items():
        monkeypatch.setattr(glyphs, "load", lambda other=other: other)
        assert cli.main(resumed) == 2
        error = capsys.readouterr().err
        assert "saw other pictures than --data glyphs has now" in error
        assert message in error
        assert error.endswith("by --accept-changed-data\n")
        assert error.count("\n") == 1
        assert (tmp_path / CHECKPOINT).read_bytes() == content
    monkeypatch.setattr(glyphs, "load", lambda: next(iter(others.values())))
    assert cli.main([*resumed, "--accept-changed-data"]) == 0
    assert f"warning: {next(iter(others))}" in capsys.readouterr().err
    metrics = outcome.read(tmp_path)
    assert metrics is not None
    assert metrics["data"]["test"]["pictures"] == 18
    assert metrics["curves"]["step"] == [0, 2, 4, 6]
    assert cli.main(resumed) == 0  # they are what the run has seen now


def test_proxies_of_other_classes_are_refused_whatever_is_accepted(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2, method="norm-softmax")
    other = replace(tiny, train=tiny.train.classes(torch.arange(8).roll(1)))
    with pytest.raises(ValueError, match="its proxies are of other classes than --data glyphs has"):
        Run(Settings(**TINY, method="norm-softmax"), other, tmp_path).resume(accept_changed_data=True)


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
    for damaged, kind in ((b"", "an empty file"), (content[: len(content) // 2], "a damaged file: its end is missing")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"checkpoint\.pt: not a readable checkpoint \({kind}\)"):
            checkpoint.load(path)
    for other in ({"weights": torch.zeros(1)}, [1], {"format": checkpoint.FORMAT, "settings": {}}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not a checkpoint of format"):
            checkpoint.load(path)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/photo.jpg", b"picture")
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "not a readable checkpoint (an empty file)"),
        (b"epochs: 5\n", "not a readable checkpoint (not a file of torch's)"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not a readable checkpoint (not a file of torch's)"),
        (zipped(), "not a readable checkpoint (a zip archive)"),
        (pickle.dumps(Path("x")), "not a readable checkpoint (a pickle, which may hold code and is not opened)"),
        (pickle.dumps({"a": 1}), "not a readable checkpoint (a pickle, which may hold code and is not opened)"),
        (safetensors.torch.save({"a": torch.zeros(2)}), "not a readable checkpoint (a file of safetensors: weights"),
        (saved(nn.Linear(2, 2)), "not a readable checkpoint (a file of torch's that holds code, or is damaged)"),
        (saved(Path("x"), _use_new_zipfile_serialization=False), "not a readable checkpoint (a pickle, which may"),
        (saved({"state_dict": {}}), "not a checkpoint of format 4, but another file of torch's"),
        (saved(torch.zeros(3)), "not a checkpoint of format 4, but another file of torch's"),
    ],
    ids=str.split("empty text png zip pickle plain-pickle safetensors module old-pickle other-state tensor"),
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, content: bytes, kind: str
) -> None:
    """In one line, without torch's advice to read it unsafely."""
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    assert cli.main(["eval", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pddm-ext: error: {path}: {kind}")
    assert error.endswith("; expected the one that 'pddm-ext train' writes\n")
    assert error.count("\n") == 1
    assert "weights_only" not in error
    assert not recwarn.list


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        *((part, value, "not a checkpoint of format") for part in checkpoint.KEYS for value in (None, [5])),
        *((part, {"x": 5}, f"damaged; its {part} are none") for part in ("data", "baselines", "thresholds")),
        ("curves", {"step": 5}, "damaged; its steps or curves"),
        ("taken", -5, "damaged; its steps or curves"),
        ("curves", {}, "damaged; its steps or curves"),
        ("learner", {}, "its weights do not fit the net"),
        ("learner", {3: torch.ones(1)}, "damaged; its weights are none"),
        ("settings", {"steps": "x"}, "steps is 'x'"),
        ("settings", {}, "damaged; its settings are none"),
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


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no curves": (lambda state: state["curves"].clear(), "steps or curves"),
    "curves without points": (lambda state: state.update(curves={name: [] for name in state["curves"]}), "steps or"),
    "curves a point short": (lambda state: [curve.pop() for curve in state["curves"].values()], "steps or curves"),
    "a curve a point short": (lambda state: state["curves"]["recall"].pop(), "steps or curves"),
    "a curve of words": (lambda state: state["curves"].update(recall=["x", "y"]), "steps or curves"),
    "steps that go back": (lambda state: state["curves"]["step"].reverse(), "steps or curves"),
    "losses of other steps": (lambda state: state.update(losses=torch.zeros(1, 3)), "steps or curves"),
    "no data": (lambda state: state["data"].clear(), "data"),
    "data without pictures": (lambda state: state["data"]["train"].pop("pictures"), "data"),
    "no seed": (lambda state: state["settings"].pop("seed"), "settings"),
    "baselines of words": (lambda state: state["baselines"].update(backbone="x"), "baselines"),
    "baselines without a figure": (lambda state: state["baselines"]["backbone"].pop("map_at_r"), "baselines"),
    "a baseline without a value": (lambda state: state["baselines"]["untrained"]["recall"].update({"1": {}}), "base"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_told_by_whatever_reads_the_checkpoint(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    state, (change, part) = checkpoint.load(tmp_path / CHECKPOINT), DAMAGES[damage]
    change(state)
    checkpoint.save(tmp_path / CHECKPOINT, state)
    assert_told_by_all(tmp_path, capsys, f"damaged; its {part}")


def assert_told_by_all(folder: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    path = folder / CHECKPOINT
    (folder / ".lock").touch()  # which a run leaves
    for command in (["eval", str(path)], ["train", *TINY_OPTIONS, "--out", str(folder), "--resume"]):
        assert_refused(command, folder, capsys, f"{path}: ", message)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as caught:
        load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("at", ["weights", "pickle", "header", "directory"])
def test_bytes_that_have_changed_are_told(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    """Of weights torch reads whatever there is."""
    trained(tiny, tmp_path, steps=2)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    weights = checkpoint.load(path)["learner"]["net.head.weight"].numpy().tobytes()
    place = {
        "weights": content.index(weights) + len(weights) // 2,
        "pickle": content.index(b"settings"),
        "header": content.index(b"PK\3\4", 4),
        "directory": content.index(b"PK\1\2") + 16,  # a checksum
    }[at]
    content[place : place + 4] = bytes(byte ^ 255 for byte in content[place : place + 4])
    path.write_bytes(content)
    told = "not a readable checkpoint (a damaged file: what it holds does not fit its checksums); expected the one that"
    assert_told_by_all(tmp_path, capsys, told)


def test_a_checkpoint_without_checksums_is_read(tiny: Dataset, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        trained(tiny, tmp_path, steps=2)
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load(tmp_path / CHECKPOINT)["taken"] == 2


def test_settings_that_an_earlier_version_did_not_know_had_their_defaults(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny, tmp_path, steps=2)
    path, figures = tmp_path / CHECKPOINT, tmp_path / "figures.json"
    state = checkpoint.load(path)
    del state["settings"]["label_noise"], state["settings"]["unit_fallback"]
    checkpoint.save(path, state)
    assert cli.main(["eval", str(path), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["settings"] == asdict(Settings(**{**TINY, "steps": 2}))


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
    assert f"{path}: not a readable checkpoint (a file of torch's that holds code" in capsys.readouterr().err
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
