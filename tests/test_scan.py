"""The look at every photograph before a run: what cannot be read is named, what is there twice is counted."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pddm_ext.workbench import cli, loop
from pddm_ext.workbench.data import photos, scan
from pddm_ext.workbench.data.splits import Dataset, file_of
from pddm_ext.workbench.settings import Settings
from runs import TINY_OPTIONS
from small_data import BLUE, GREEN, RED, Members, encoded, plain, scatter

pytestmark = pytest.mark.usefixtures("one_thread")

_NET = """from torch import nn

def net():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
"""


def photograph(number: int, size: int = 96) -> Image.Image:
    """Coarse shapes in colours, others for each number."""
    shapes = np.random.default_rng(number).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(shapes).resize((size, size), Image.Resampling.BICUBIC)


def catalogue(classes: str, side: str = "", pictures: int = 3) -> Members:
    """Classes of photographs that look like no other."""
    return {
        f"{side}{name}/{place}.png": encoded(photograph(100 * ord(name) + place + 10 * len(side)), "PNG")
        for name in classes
        for place in range(pictures)
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a net for photographs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(_NET)
    return tmp_path


def options(*more: str) -> list[str]:
    """A run on the photographs in ``pictures``."""
    own = ["--data", "folder", "--root", "pictures", "--backbone", "mine:net", "--picture", "32", "--steps", "2"]
    return [*TINY_OPTIONS, *own, "--classes", "2", "--method", "contrastive", *more]


def damaged(root: Path) -> dict[str, str]:
    """Damage three pictures, each in another way; a word of each one's reason."""
    whole = encoded(Image.effect_noise((200, 200), 50), "JPEG")
    (root / "a" / "0.png").write_bytes(b"")
    (root / "c" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "h" / "2.png").write_bytes(b"<html>Not found</html>")
    return {"a/0.png": "cannot identify", "c/1.png": "truncated", "h/2.png": "cannot identify"}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_unreadable_picture_is_listed_before_any_training(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, workers: str
) -> None:
    wrong = damaged(scatter(place / "pictures", catalogue("abcdefgh")))
    method = ["--methods", "contrastive", "--seeds", "1"] if command == "compare" else []
    given = options("--out", "out", "--workers", workers)
    if command == "compare":
        del given[given.index("--method") : given.index("--method") + 2]
    assert cli.main([command, *given, *method]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, (path, reason) in zip(lines[:3], wrong.items(), strict=True):
        assert re.fullmatch(rf"pictures/{path}: not a readable picture \(.*{reason}.*\)", line)
    assert lines[3:] == [
        "pddm-ext: error: 3 of 24 pictures cannot be read, each named above; mend or remove them, or "
        "--skip-unreadable leaves them out"
    ]
    assert not list((place / "out").rglob("checkpoint.pt"))


def test_unreadable_pictures_are_left_out_as_if_they_were_not_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scatter(place / "pictures", catalogue("abcdefgh"))
    wrong = damaged(root)
    assert cli.main(["train", *options("--out", "out", "--skip-unreadable", "--workers", "2")]) == 0
    told = capsys.readouterr()
    for path in wrong:
        assert f"left out: pictures/{path}: not a readable picture" in told.err
    assert "warning: 3 of 24 pictures cannot be read and are left out" in told.err
    assert "train on 4 classes, 10 pictures: a to d, the first half of the classes by name" in told.out
    assert "search among 4 classes, 11 pictures: e to h, the second half of the classes by name" in told.out
    skipped, _ = scan.examined(photos.folder(root), skip=True, progress=False)
    for path in wrong:
        (root / path).unlink()
    assert skipped.digest() == photos.folder(root).digest()
    # Neither measuring nor going on minds that they are gone.
    assert cli.main(["eval", "out/checkpoint.pt", "--backbone", "mine:net"]) == 0
    assert cli.main(["train", *options("--out", "out", "--resume", "--steps", "4")]) == 0


def test_a_comparison_looks_once_and_its_runs_leave_out_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(scatter(place / "pictures", catalogue("abcdefgh")))
    given = options("--out", "out", "--skip-unreadable")
    del given[given.index("--method") : given.index("--method") + 2]
    looked: list[Dataset] = []
    look = scan.scan

    def counted(dataset: Dataset, *more: Any) -> scan.Scan:
        looked.append(dataset)
        return look(dataset, *more)

    monkeypatch.setattr(scan, "scan", counted)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))
    assert cli.main(["compare", *given, "--methods", "contrastive", "--seeds", "2"]) == 0
    assert len(looked) == 1
    assert capsys.readouterr().err.count("left out: ") == 3
    for seed in (0, 1):
        metrics = (place / "out" / "cells" / "contrastive" / f"seed-{seed}" / "metrics.json").read_text("utf-8")
        assert '"pictures": 10' in metrics
        assert '"pictures": 11' in metrics
        assert json.loads(metrics)["data"]["notes"] == [
            "3 of 24 pictures cannot be read and are left out (--skip-unreadable)"
        ]


def test_measuring_looks_at_the_measured_half_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scatter(place / "pictures", catalogue("abcd", "train/") | catalogue("efgh", "test/"))
    assert cli.main(["train", *options("--out", "out")]) == 0
    capsys.readouterr()
    (root / "train/a/0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 24 pictures cannot be read"):
        scan.ready(Settings(data="folder", root=str(root)), progress=False)
    dataset = scan.ready(Settings(data="folder", root=str(root)), only="test", progress=False)
    assert len(dataset.test.labels) == 12
    (root / "test/e/0.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.main(["eval", "out/checkpoint.pt", "--backbone", "mine:net"]) == 2
    told = capsys.readouterr().err
    assert "test/e/0.png: not a readable picture" in told
    assert "1 of 12 pictures cannot be read" in told
    assert "train/a" not in told


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_goes_bad_under_way_ends_a_run_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    root = scatter(place / "pictures", catalogue("abcdefgh"))
    introduce = scan.introduction

    def damaging(dataset: Dataset, **more: Any) -> list[str]:  # after the look
        for path in root.glob("[abcd]/*.png"):
            path.write_bytes(b"no picture")
        return introduce(dataset, **more)

    monkeypatch.setattr(scan, "introduction", damaging)
    assert cli.main(["train", *options("--out", "out", "--workers", workers, "--no-progress")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"pddm-ext: error: pictures/./.\.png: not a readable picture \(cannot identify image file; .*\); expected .*",
        line,
    )


def test_a_class_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    root = scatter(tmp_path, catalogue("abcd") | {f"a/{place}.png": b"no picture" for place in range(3)})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(root))}: no picture of class a can be read"):
        scan.examined(photos.folder(root), skip=True, progress=False)


def test_known_classes_are_parted_once_the_unreadable_are_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scatter(place / "pictures", catalogue("abcd", pictures=4) | catalogue("e"))
    bad = ("a/3.png", "b/0.png", "e/2.png")  # the last of a is all that would be searched for
    scatter(root, dict.fromkeys(bad, b"no picture"))
    assert cli.main(["train", *options("--out", "out", "--split", "known", "--skip-unreadable")]) == 0
    told = capsys.readouterr()
    assert "warning: 3 of 19 pictures cannot be read and are left out" in told.err
    skipped, _ = scan.examined(photos.folder(root, split="known"), skip=True, progress=False)
    assert skipped.gallery is skipped.train
    assert skipped.notes == ("3 of 19 pictures cannot be read and are left out (--skip-unreadable)",)
    for path in bad:
        (root / path).unlink()
    whole = photos.folder(root, split="known")
    assert skipped.digest() == whole.digest()
    assert (skipped.train.names, skipped.test.names, skipped.protocol) == (tuple("abcde"), tuple("abcd"), "known")
    assert [file_of(skipped.test.pictures, row) for row in range(4)] == [
        "a/2.png",
        "b/3.png",
        "c/3.png",
        "d/3.png",
    ]
    # Neither going on nor measuring minds that they are gone.
    assert cli.main(["train", *options("--out", "out", "--resume", "--steps", "4")]) == 0
    assert cli.main(["eval", "out/checkpoint.pt", "--backbone", "mine:net"]) == 0
    assert "untrained" in capsys.readouterr().out
    assert photos.without(whole, ["no.png"]) is whole


def test_known_classes_of_which_too_little_can_be_read_are_an_error(tmp_path: Path) -> None:
    root = scatter(tmp_path, catalogue("abc"))
    scatter(root, {"a/0.png": b"", "b/1.png": b""})
    told = (
        "number of classes with three pictures or more that can be read is 1, at least 2 are needed for --split known"
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(str(root))}: {told}"):
        scan.examined(photos.folder(root, split="known"), skip=True, progress=False)
    scatter(root, {f"a/{number}.png": b"" for number in range(3)})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(root))}: no picture of class a can be read; a class"):
        scan.examined(photos.folder(root, split="known"), skip=True, progress=False)


def test_other_pictures_of_the_same_names_and_sizes_are_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bitmaps(first: int) -> Members:
        return {
            f"{name}/{place}.bmp": encoded(photograph(first + 9 * ord(name) + place), "BMP")
            for name in "abcdefgh"
            for place in range(3)
        }

    def baselines() -> dict[str, Any]:
        assert cli.main(["eval", "out", "--backbone", "mine:net", "--json", "again.json"]) == 0
        found: dict[str, Any] = json.loads(Path("again.json").read_text())["baselines"]
        return found

    scatter(place / "pictures", bitmaps(0))
    assert cli.main(["train", *options("--out", "out")]) == 0
    assert baselines()
    scatter(place / "pictures", bitmaps(5))
    assert baselines() == {}
    capsys.readouterr()
    resumed = ["train", *options("--out", "out", "--resume", "--steps", "4")]
    assert cli.main(resumed) == 2
    assert "train had 12 pictures of 4 classes and has as many others now; " in (error := capsys.readouterr().err)
    assert error.endswith("by --accept-changed-data\n")
    assert cli.main([*resumed, "--accept-changed-data"]) == 0


def test_what_was_passed_over_and_the_split_are_told_when_a_run_begins(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scatter(place / "pictures", catalogue("abcdefgh") | {"a/more/1.jpg": plain(RED), "b/IMG_1": b""})
    assert cli.main(["train", *options("--out", "out", "--split", "none")]) == 0
    told = capsys.readouterr()
    assert "warning: passed over: 1 folder in class folders, such as a/more, with 1 picture" in told.err
    assert "warning: passed over: 1 file without an extension, such as b/IMG_1" in told.err
    assert (
        "search among 8 classes, 24 pictures: a to h, the very pictures to train on: none are held out for a test"
        in told.out
    )


def test_eval_says_what_is_measured_and_what_of_it_was_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scatter(place / "pictures", catalogue("abcdefgh"))
    assert cli.main(["train", *options("--out", "out", "--split", "none")]) == 0
    evaluate = ["eval", "out", "--backbone", "mine:net", "--json", "again.json", "--root"]

    def told(*more: str) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        assert cli.main([*evaluate, *more]) == 0
        return capsys.readouterr().out, json.loads(Path("again.json").read_text())["data"]

    out, data = told("pictures")
    assert "search among 8 classes, 24 pictures: a to h, all that are there\n" in out
    assert "\n8 of the 8 classes searched for were trained on\n" in out
    out, data = told("pictures", "--split", "half")
    assert "search among 4 classes, 12 pictures: e to h, the second half of the classes by name\n" in out
    assert (data["protocol"], data["notes"]) == ("known", [])
    scatter(place / "others", catalogue("ghijklmn"))
    out, data = told("others")
    assert "\n2 of the 8 classes searched for were trained on\n" in out
    assert data["protocol"] == "known"
    assert data["notes"] == ["2 of the 8 classes searched for were trained on"]
    out, data = told("others", "--split", "half")
    assert "\nnone of the 4 classes searched for was trained on\n" in out
    assert data["protocol"] == "unseen"
    (place / "others" / "k" / "bad.png").write_bytes(b"")
    assert cli.main([*evaluate, "others"]) == 2
    assert "--skip-unreadable leaves them out" in capsys.readouterr().err
    out, data = told("others", "--skip-unreadable")
    assert data["test"]["pictures"] == 24


@pytest.mark.parametrize("out", ["pictures", "pictures/run", "pictures/a/run", "default"])
def test_a_run_among_the_pictures_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    scatter(place / "pictures", catalogue("abcdefgh"))
    given = ["--out", out] if out != "default" else []
    if out == "default":
        monkeypatch.chdir(place / "pictures")
        given = ["--root", "."]
    before = sorted(place.rglob("*"))
    for command in (["train"], ["compare", "--methods", "contrastive"]):
        words = [word for word in options(*given) if command == ["train"] or word not in ("--method", "contrastive")]
        assert cli.main([*command, *words]) == 2
        assert "where it would be taken for a class of pictures; choose a folder outside" in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_drawings_are_not_looked_at(tiny: Dataset) -> None:
    assert not scan.scan(tiny).place
    dataset, lost = scan.examined(tiny)
    assert (dataset, lost) == (tiny, frozenset())


# Near-duplicates


def copies(picture: Image.Image) -> dict[str, bytes]:
    """A picture as it comes back from elsewhere."""
    buffer = io.BytesIO(encoded(picture, "JPEG", quality=40))
    return {
        "same": encoded(picture, "PNG"),
        "jpeg": buffer.getvalue(),
        "small": encoded(picture.resize((picture.width // 2, picture.height // 2)), "PNG"),
        "large": encoded(picture.resize((picture.width * 8, picture.height * 8)), "JPEG"),
    }


@pytest.mark.parametrize("kind", ["same", "jpeg", "small", "large"])
def test_copies_across_the_sides_are_counted_and_named(tmp_path: Path, kind: str) -> None:
    members = catalogue("abcd", "train/") | catalogue("efgh", "test/")
    twice = {f"test/{name}/copy.png": copies(photograph(100 * ord(other) + 60))[kind] for name, other in ("ea", "fb")}
    dataset, _ = scan.examined(photos.folder(scatter(tmp_path, members | twice)), progress=False)
    assert dataset.notes == (
        "2 of 14 test pictures look the same as one of the training pictures, such as test/e/copy.png and "
        "train/a/0.png: any embedding finds copies, which Recall@1 then counts for nothing",
    )
    measured, _ = scan.examined(photos.folder(tmp_path, only="test"), only="test", progress=False)
    assert measured.notes == ()


def test_copies_of_training_pictures_to_choose_by_are_counted(tmp_path: Path) -> None:
    root = scatter(tmp_path, catalogue("abcd", "train/") | catalogue("efgh", "test/") | catalogue("xyz", "val/"))
    shutil.copy(root / "train/b/1.png", root / "val/x/9.png")
    (note,) = scan.examined(photos.folder(root), progress=False)[0].notes
    assert note.startswith("1 of 10 validation pictures look the same as one of the training pictures, such as val/x/9")
    shutil.copy(root / "test/e/0.png", root / "val/x/9.png")
    (note,) = scan.examined(photos.folder(root), progress=False)[0].notes
    assert note.startswith("1 of 10 validation pictures look the same as one of the test pictures, such as val/x/9")


def test_copies_to_choose_by_in_the_gallery_are_counted(tmp_path: Path) -> None:
    sides = [catalogue("abc", "train/"), *(catalogue("xyz", f"{side}/") for side in ("val", "query", "gallery"))]
    root = scatter(tmp_path, {path: content for side in sides for path, content in side.items()})
    assert not [note for note in scan.examined(photos.folder(root), progress=False)[0].notes if "validation" in note]
    shutil.copy(root / "gallery/x/0.png", root / "val/x/9.png")
    notes = scan.examined(photos.folder(root), progress=False)[0].notes
    assert any(note.startswith("1 of 10 validation pictures look the same as one of the gallery") for note in notes)


def test_copies_within_the_test_side_are_counted_once_each(tmp_path: Path) -> None:
    root = scatter(tmp_path, catalogue("abcdefgh"))
    assert scan.examined(photos.folder(root), progress=False)[0].notes == ()
    shutil.copy(root / "e/0.png", root / "e/9.png")
    (note,) = scan.examined(photos.folder(root), progress=False)[0].notes
    assert note.startswith("2 of 13 test pictures look the same as one of the other test pictures, such as e/0.png and")


def test_copies_among_queries_do_no_harm_but_in_the_gallery_they_do(tmp_path: Path) -> None:
    root = scatter(tmp_path, catalogue("abc", "train/") | catalogue("xyz", "query/") | catalogue("xyz", "gallery/"))
    shutil.copy(root / "query/x/0.png", root / "query/x/9.png")
    assert scan.examined(photos.folder(root), progress=False)[0].notes == ()
    shutil.copy(root / "query/x/0.png", root / "gallery/x/9.png")
    (note,) = scan.examined(photos.folder(root), progress=False)[0].notes
    assert note.startswith("2 of 10 test pictures look the same as one of the gallery pictures, such as query/x/0.png")


def test_plain_pictures_of_other_colours_are_no_copies(tmp_path: Path) -> None:
    colours = (RED, GREEN, BLUE, (0, 0, 0), (90, 90, 90), (120, 120, 120))
    scatter(tmp_path, {f"{name}/1.png": plain(colour) for name, colour in zip("abcdef", colours, strict=True)})
    assert scan.examined(photos.folder(tmp_path), progress=False)[0].notes == ()
    scatter(tmp_path, {"f/2.png": plain(colours[-1], 3)})
    (note,) = scan.examined(photos.folder(tmp_path), progress=False)[0].notes
    assert note.startswith("2 of 4 test pictures look the same")


def test_a_run_needs_no_look(place: Path) -> None:
    """In a script: what cannot be read is then met when it is needed."""
    damaged(scatter(place / "pictures", catalogue("abcdefgh")))
    dataset = photos.folder(place / "pictures")
    settings = Settings(data="folder", root="pictures", backbone="mine:net", classes=2, steps=1, accelerator="cpu")
    run = loop.Run(settings, dataset)
    with pytest.raises(ValueError, match="not a readable picture"):
        run.train(progress=False)
