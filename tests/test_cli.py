"""The command line: what it leaves behind, what it refuses before any work, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pddm_ext
from pddm_ext.workbench import checkpoint, cli, loop, measuring, outcome
from pddm_ext.workbench.data import glyphs, load
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, assert_refused, make_archive, scalars, untimed
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")


# What a run leaves behind


def test_what_train_leaves_behind(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "5", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    for text in ("train on 8 classes, 32 pictures: one, two", "search among 5 classes, 20 pictures: three"):
        assert text in printed.out
    for text in ("Recall@1", "Recall@8", "MAP@R", "by distance", "by score", "re-ranked", f"run: {folder}"):
        assert text in printed.out
    assert "step 5/5" in printed.err  # the last measurement's line
    left = sorted(file.name for file in folder.iterdir())
    assert left == [".lock", CHECKPOINT, CONFIG, "metrics.json", "tensorboard"]

    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics["data"] == {
        "protocol": "unseen",
        "notes": [],
        "train": {"classes": 8, "from": ["one", "two"], "pictures": 32},
        "test": {"classes": 5, "from": ["three"], "pictures": 20},
    }
    assert set(metrics["results"]) == {"distance", "score", "rerank"}
    assert metrics["curves"]["step"] == [0, 2, 4, 5]
    assert {len(curve) for curve in metrics["curves"].values()} == {4}
    assert metrics["curves"]["loss"][0] is None
    assert metrics["curves_of"] == "test"
    assert metrics["chosen_step"] is None
    assert metrics["curves"]["recall"][-1] == pytest.approx(metrics["results"]["distance"]["recall"]["1"]["value"])
    assert metrics["spread"] == pytest.approx(metrics["curves"]["spread"][-1])
    assert metrics["collapsed"] == (metrics["spread"] < measuring.COLLAPSED)
    assert metrics["environment"]["device"] == "cpu"
    assert metrics["environment"]["threads"] == 1

    logged = scalars(folder)
    assert logged.keys() == metrics["curves"].keys()
    for name, curve in metrics["curves"].items():
        first = name == "loss"  # there is none before the first step
        assert [step for step, _ in logged[name]] == [0, 2, 4, 5][first:]
        assert [value for _, value in logged[name]] == pytest.approx(curve[first:], rel=1e-6), name


def test_eval_prints_and_writes_the_figures_of_the_run(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--precision", "64-true", "--structure", "0.3", "--out", str(tmp_path)]
    assert cli.main(["train", *TINY_OPTIONS, *options]) == 0
    table = capsys.readouterr().out.split("three\n")[1].split("run: ")[0]
    assert all(heading in table for heading in ("by distance", "by score", "re-ranked", "by structure"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["eval", str(tmp_path / CHECKPOINT), "--json", str(tmp_path / "again.json")]) == 0
    told = "search among 5 classes, 20 pictures: three\nnone of the 5 classes searched for was trained on\n"
    assert capsys.readouterr().out == told + table
    again, metrics = (json.loads((tmp_path / name).read_text()) for name in ("again.json", "metrics.json"))
    assert again == metrics
    assert cli.main(["eval", str(tmp_path / CHECKPOINT), "--accelerator", "nonsense"]) == 2
    assert "--accelerator nonsense is not to be had" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "again.json"])


def test_eval_finds_data_that_have_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = make_archive(tmp_path / "small.zip")
    options = ["--data", "omniglot", "--root", str(archive), *TINY_OPTIONS, "--out", str(tmp_path / "run")]
    assert cli.main(["train", *options]) == 0
    assert "search among 6 classes, 24 pictures: D, E" in capsys.readouterr().out
    archive.rename(tmp_path / "moved.zip")
    path = str(tmp_path / "run" / CHECKPOINT)
    assert cli.main(["eval", path]) == 2
    assert str(archive) in capsys.readouterr().err
    assert cli.main(["eval", path, "--root", str(tmp_path / "moved.zip")]) == 0
    assert "Recall@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "{} holds a run; --resume continues it, another --out begins a new one"),
        (["--lr", "0.01"], "{} holds a run of other settings (--lr was 0.001 and is 0.01 now); another --out begins"),
        (["--method", "n-pair"], "{} holds a run of other settings (--method was pddm-anchor and is n-pair now)"),
    ],
)
def test_an_earlier_run_is_not_overwritten_and_what_to_do_is_said(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "2", "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "2", *changed, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


_PHOTO_NET = """
from torch import nn

def net():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
"""


def _trained_on_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *data: str) -> tuple[list[str], Path]:
    """The option that names a backbone of the user's, and the folder of its run on a folder."""
    (tmp_path / "photo_net.py").write_text(_PHOTO_NET)
    monkeypatch.syspath_prepend(tmp_path)
    net, run = ["--backbone", "photo_net:net"], tmp_path / "run"
    options = ["--data", "folder", *data, "--picture", "32", "--steps", "2", "--method", "contrastive"]
    assert cli.main(["train", *TINY_OPTIONS, *net, *options, "--out", str(run)]) == 0
    return net, run


def test_eval_measures_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other and fewer classes than were trained on, and with pictures that the run did not see."""
    root = make_folder(tmp_path / "photos", classes=10, pictures=3)
    net, run = _trained_on_photographs(tmp_path, monkeypatch, "--root", str(root))
    path = str(run)  # a run's folder is as good as its checkpoint

    def measured(*options: str) -> dict[str, Any]:
        assert cli.main(["eval", path, *net, *options, "--json", str(tmp_path / "again.json")]) == 0
        found: dict[str, Any] = json.loads((tmp_path / "again.json").read_text())
        return found

    def counts(metrics: dict[str, Any]) -> tuple[int, int]:
        return metrics["data"]["test"]["classes"], metrics["data"]["test"]["pictures"]

    assert counts(measured()) == (5, 15)
    (root / "f" / "0.png").unlink()  # as a damaged picture that was removed
    assert counts(measured()) == (5, 14)
    other = make_folder(tmp_path / "other", classes=3, pictures=4)
    again = measured("--root", str(other), "--split", "none")
    assert counts(again) == (3, 12)
    assert again["data"]["train"]["pictures"] == 15
    assert again["settings"]["root"] == str(root)
    capsys.readouterr()
    assert cli.main(["eval", path, *net, "--data", "glyphs", "--root", ""]) == 2
    assert "--data is glyphs; " in capsys.readouterr().err


def test_eval_of_other_data_leaves_out_a_split_and_a_gallery_that_these_do_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "photos", classes=4, pictures=6)
    net, run = _trained_on_photographs(tmp_path, monkeypatch, "--root", str(root), "--split", "known")
    sides = tmp_path / "sides"
    make_folder(sides / "test", classes=3, pictures=4)
    command = ["eval", str(run), *net, "--root", str(sides)]
    assert cli.main([*command, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["data"]["test"]["pictures"] == 12
    capsys.readouterr()
    assert cli.main([*command, "--split", "known"]) == 2  # which was asked for
    assert "has its sides in test" in capsys.readouterr().err
    assert load.takes("grocery", "", "known", "catalogue") == (False, True)
    assert load.takes("in-shop", "", "half", "catalogue") == (True, False)
    assert load.takes("folder", str(root), "known", "train") == (True, True)


@pytest.mark.parametrize("sides", [False, True])
def test_eval_repeats_a_run_that_held_pictures_of_known_classes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sides: bool
) -> None:
    """What the test pictures are searched for in has the held-out ones, too."""
    (tmp_path / "photo_net.py").write_text(_PHOTO_NET)
    monkeypatch.syspath_prepend(tmp_path)
    random, root, run = np.random.default_rng(0), tmp_path / "photos", tmp_path / "run"
    for label in "abcd":
        base = random.integers(60, 196, (4, 4, 3))
        for place in range(10):
            folder = root / ("test" if place > 7 else "train") / label if sides else root / label
            folder.mkdir(parents=True, exist_ok=True)
            noisy = (base + random.integers(-60, 61, base.shape)).astype(np.uint8)
            Image.fromarray(noisy).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{place}.png")
    data = ["--data", "folder", "--root", str(root), "--picture", "32", "--backbone", "photo_net:net"]
    options = [
        "--method",
        "contrastive",
        "--patience",
        "2",
        "--out",
        str(run),
        *([] if sides else ["--split", "known"]),
    ]
    assert cli.main(["train", *TINY_OPTIONS, *data, *options]) == 0
    printed = capsys.readouterr().out
    assert "train on 4 classes, 28 pictures" in printed
    assert "search among 4 classes, 32 pictures" in printed
    table = printed[printed.index("by distance") :].partition("run: ")[0]
    evaluate = ["eval", str(run), "--backbone", "photo_net:net", "--json", str(tmp_path / "again.json")]
    assert cli.main(evaluate) == 0
    assert capsys.readouterr().out.endswith(table)  # with the lines on what it began with
    again, metrics = (json.loads(path.read_text("utf-8")) for path in (tmp_path / "again.json", run / "metrics.json"))
    assert metrics["data"]["gallery"]["pictures"] == 32
    del metrics["data"]["val"]
    assert again == metrics
    before = (run / "metrics.json").read_bytes()
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert untimed(json.loads((run / "metrics.json").read_bytes())) == untimed(json.loads(before))


@pytest.mark.parametrize(
    ("given", "target", "message"),
    [
        ("run", "run/checkpoint.pt", "run; a file elsewhere is accepted"),
        ("run", "run/metrics.json", "run; a file elsewhere is accepted"),
        ("run", "run/tensorboard/x.json", "run; a file elsewhere is accepted"),
        ("run", "link", "run; a file elsewhere is accepted"),
        ("run/checkpoint.pt", "run/config.json", "run; a file elsewhere is accepted"),
        ("run/checkpoint.pt", "run/checkpoint.pt", "which is read; another file is accepted"),
        ("copy.pt", "copy.pt", "which is read; another file is accepted"),
        ("run", "copy.pt", "which holds something that is no JSON; a new file, or an earlier one, is accepted"),
        ("run", "circle", "a file in a folder that is there is accepted"),
        ("run", "lost", "a file in a folder that is there is accepted"),
    ],
)
def test_eval_writes_over_no_input_nor_anything_but_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, target: str, message: str
) -> None:
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    for name in ("run/checkpoint.pt", "run/config.json", "copy.pt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("run/checkpoint.pt")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "lost").symlink_to("nowhere/at.json")
    command = ["eval", str(tmp_path / given), "--json", str(tmp_path / target)]
    assert_refused(command, tmp_path, capsys, f"--json is {tmp_path / target}", message)


def test_what_a_user_names_is_written_through_links_and_into_pipes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("far/file.json")
    (tmp_path / "far").mkdir()
    for content in (b"{}", b"[]"):
        checkpoint.deliver(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "file.json").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    cli._file("--page", tmp_path / "pipe", [])
    checkpoint.deliver(tmp_path / "pipe", b"piped")
    assert os.read(reader, 100) == b"piped"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "output").symlink_to("/dev/fd/1")
    print("before")
    cli._file("--json", tmp_path / "output", [])
    checkpoint.deliver(tmp_path / "output", b"between\n")
    print("after")
    assert capfd.readouterr().out == "before\nbetween\nafter\n"
    assert (tmp_path / "output").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link", "output", "pipe"]


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    assert outcome.read(tmp_path) is None
    for damaged in ("", "{", "[]", '{"settings": {}}', "\udcff"):
        (tmp_path / "metrics.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"metrics\.json: not the figures of a finished run .* delete it"):
            outcome.read(tmp_path)


# Options and settings


def test_config_repeats_a_run_and_options_override_it(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "contrastive", "--no-augment", "--lr", "0.002", "--seed", "3"]
    assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "first")]) == 0
    config = tmp_path / "first" / CONFIG
    given = json.loads(config.read_text())
    assert given == {**Settings(**TINY).__dict__, "method": "contrastive", "augment": False, "lr": 0.002, "seed": 3}
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "again")]) == 0
    first, again = (outcome.read(tmp_path / name) for name in ("first", "again"))
    assert first is not None
    assert again is not None
    assert untimed(first) == untimed(again)
    assert (tmp_path / "again" / CONFIG).read_bytes() == config.read_bytes()

    changed = ["--config", str(config), "--steps", "2", "--augment", "--lr", "1"]
    assert cli.main(["train", *changed, "--out", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / CONFIG).read_text()) == {**given, "steps": 2, "augment": True, "lr": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps": 5', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a JSON object of settings"),
        (b'{"step": 5}', "'step' is no setting; data, root"),
        (b'{"steps": "5"}', "steps is '5'; a value of type int is accepted"),
        (b'{"steps": 5.0}', "steps is 5.0; a value of type int is accepted"),
        (b'{"steps": true}', "steps is True; a value of type int is accepted"),
        (b'{"augment": 1}', "augment is 1; a value of type bool is accepted"),
        (b'{"lr": null}', "lr is None; a value of type float is accepted"),
        (b'{"lr": NaN}', "--lr is nan; a positive finite number is accepted"),
        (b'{"method": "triplet"}', "--method is 'triplet'; recommended, joint, pddm-batch"),
        (b'{"precision": "fp8"}', "--precision is 'fp8'; 32-true"),
        (None, "config.json (No such file or directory); a file of settings is accepted"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_bad_config_fails_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: pytest.fail("work was begun"))
    config = tmp_path / "config.json"
    if content is not None:
        config.write_bytes(content)
    assert cli.main([command, "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "omniglot"], "--data omniglot needs --root"),
        (["--root", "somewhere"], "--data glyphs has no --root"),
        (["--download"], "--download fetches cub200, cars196 and sop; --data is glyphs"),
        (["--steps", "0"], "--steps is 0; at least 1 is accepted"),
        (["--classes", "1"], "--classes is 1; at least 2 is accepted"),
        (["--classes", "999"], "--classes is 999; glyphs has 8 to train on"),
        (["--samples", "1"], "--samples is 1; at least 2 is accepted"),
        (["--accumulate", "0"], "--accumulate is 0; at least 1 is accepted"),
        (["--dim", "0"], "--dim is 0; at least 1 is accepted"),
        (["--devices", "0"], "--devices is 0; at least 1 is accepted"),
        (["--workers", "-1"], "--workers is -1; at least 0 is accepted"),
        (["--workers", "100000"], "--workers is 100000; at most 1024 is accepted"),
        (["--warmup", "-1"], "--warmup is -1; at least 0 is accepted"),
        (["--lr", "nan"], "--lr is nan; a positive finite number is accepted"),
        (["--unit-lr-factor", "-1"], "--unit-lr-factor is -1.0; a positive finite number is accepted"),
        (["--weight-decay", "inf"], "--weight-decay is inf; a finite number from 0 is accepted"),
        (["--density", "-1"], "--density is -1.0; a finite number from 0 is accepted"),
        (["--density-ratio", "0"], "--density-ratio is 0.0; a positive finite number is accepted"),
        (["--structure", "nan"], "--structure is nan; a finite number from 0 is accepted"),
        (["--clusters", "1"], "--clusters is 1; at least 2 is accepted"),
        (["--margin", "-0.1"], "--margin is -0.1; a finite number from 0 is accepted"),
        (["--seed", "-1"], "--seed is -1; at least 0 is accepted"),
        (["--seed", str(2**32)], "less than 2**32 is accepted"),
        (["--dim", str(2**31)], "--dim is 2147483648; less than 2**31 is accepted"),
        (["--steps", str(10**30)], "less than 2**31 is accepted"),
        (["--lr", "1e31"], "--lr makes a learning rate of 1e+31; at most 1e+30 is accepted"),
        (["--lr", "1", "--unit-lr-factor", "1e40"], "--unit-lr-factor makes a learning rate of 1e+40; at most 1e+30"),
        (["--weight-decay", "1e38"], "--weight-decay is 1e+38; at most 1e+30 is accepted"),
        (["--every", "0"], "--every is 0; at least 1 is accepted"),
        (["--backbone", "resnet"], "--backbone is 'resnet'"),
        (
            ["--pretrained"],
            "--pretrained is for backbones with published weights",
        ),
        (
            ["--data", "folder", "--root", "x"],
            "--backbone convnet is for drawings (glyphs, omniglot); for --data folder",
        ),
        (["--resume"], "no checkpoint is there"),
    ],
)
def test_bad_options_fail_before_any_work(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupt_anywhere_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "load", load)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_choices_are_named_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--method", "--data", "--schedule", "--precision"):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", option, "nonsense"])
        assert left.value.code == 2
        assert f"argument {option}: invalid choice: 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pddm-ext: error: the following arguments are required: command; 'pddm-ext --help' says"),
        (["trian"], "pddm-ext: error: argument command: invalid choice: 'trian'"),
        (["info", "all"], "pddm-ext info: error: unrecognized arguments: all; 'pddm-ext info --help' says"),
        (
            ["train", "--batch", "64"],
            "pddm-ext train: error: unrecognized arguments: --batch 64; 'pddm-ext train --help'",
        ),
        (["train", "--steps", "ten"], "pddm-ext train: error: argument --steps: invalid int value: 'ten'"),
        (["eval"], "pddm-ext eval: error: the following arguments are required: checkpoint"),
        (["compare", "--seed", "0"], "pddm-ext compare: error: unrecognized arguments: --seed 0"),
        (["compare", "--methods"], "pddm-ext compare: error: argument --methods: expected at least one argument"),
        (["train", "--out", ""], "pddm-ext train: error: argument --out: it is ''; the name of a folder is accepted"),
        (["compare", "--out", " "], "pddm-ext compare: error: argument --out: it is ' '; the name of a folder"),
        (["embed", "run", "photos", "--out="], "pddm-ext embed: error: argument --out: it is ''; the name of a"),
        (["export", "run", "--out", ""], "pddm-ext export: error: argument --out: it is ''; the name of a folder"),
    ],
)
def test_what_the_parser_refuses_takes_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("accelerator", ["nonsense", "mps" if not torch.backends.mps.is_available() else "tpu"])
def test_an_accelerator_that_is_not_there_is_named(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: str
) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--accelerator", accelerator, "--out", str(tmp_path)]) == 2
    assert f"error: --accelerator {accelerator} is not to be had" in capsys.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()


def test_an_output_folder_that_is_a_file_is_named(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pddm-ext: error: --out is {tmp_path / 'out'} (")
    assert error.count("\n") == 1


def test_a_measurement_at_the_end_alone_takes_no_longer(tiny: Dataset, tmp_path: Path) -> None:
    """No more batches are drawn than are trained on."""
    options = ["--every", str(2**31 - 1), "--method", "contrastive", "--out", str(tmp_path)]
    assert cli.main(["train", *TINY_OPTIONS, *options]) == 0
    metrics = outcome.read(tmp_path)
    assert metrics is not None
    assert metrics["curves"]["step"] == [0, 6]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("list"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 576000000000 bytes"),
        RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly"),
    ],
)
def test_memory_that_runs_out_is_said_in_a_line(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def train(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loop.Run, "train", train)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"pddm-ext: error: out of memory ({' '.join(str(error).splitlines())}); lower --classes, --samples, "
        "--dim or --jobs\n"
    )


def test_an_error_of_our_own_making_keeps_its_traceback(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Run, "train", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)])


def test_divergence_ends_the_command(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--lr", "1e30", "--out", str(tmp_path)]) == 2
    assert "embedding is not finite after 2 steps; lower --lr" in capsys.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()
    assert not (tmp_path / "metrics.json").exists()


def test_info_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    build = pddm_ext._C.build_info()
    for text in (pddm_ext.__version__, torch.__version__, build["compiler"], build["stable_abi"], "CUDA", "threads"):
        assert text in out
    for name in pddm_ext._C.cpu_capabilities():
        assert name in out


def test_info_and_help_need_no_training_extra_and_train_says_how_to_get_them() -> None:
    program = """
import sys
for extra in ("matplotlib", "PIL", "tqdm", "sklearn", "scipy", "jinja2", "faiss", "lightning_fabric", "tensorboard"):
    sys.modules[extra] = None
sys.modules["pytorch_metric_learning"] = None
from pddm_ext.workbench import cli
assert cli.main(["info"]) == 0
try:
    cli.main(["compare", "--help"])
except SystemExit as left:
    assert left.code == 0
sys.exit(cli.main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "instruction sets" in done.stdout
    assert "--unit-lr-factor" in done.stdout
    assert "pip install '.[train]'" in done.stderr
    assert "Traceback" not in done.stderr
