"""No console ends a run: not by its encoding, not by leaving, not by being none; and what a log gets to read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pddm_ext.workbench import cli, outcome
from pddm_ext.workbench.checkpoint import write_json
from pddm_ext.workbench.console import Progress, lenient
from pddm_ext.workbench.data import photos
from pddm_ext.workbench.data.splits import Dataset, file_of
from pddm_ext.workbench.report import page
from processes import environment_of_a_user
from runs import TINY_OPTIONS, make_archive
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")

_NET = """
from torch import nn
def net():
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 16))
"""


def start(folder: Path, *arguments: str, encoding: str = "", locale: str = "C.UTF-8", **options: Any) -> Any:
    environment = environment_of_a_user(
        PYTHONIOENCODING=encoding, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    command = [sys.executable, "-m", "pddm_ext", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False, timeout=300, **options)


def umlauts(folder: Path) -> list[str]:
    """Photographs in classes whose names are no ASCII, of which one is no UTF-8 either, and a net for them."""
    make_folder(folder / "Bilder")
    for name, other in (("a", "Ärger"), ("b", "日本"), ("e", "Žluť"), ("f", os.fsdecode(b"\xffz"))):
        os.rename(folder / "Bilder" / name, folder / "Bilder" / other)
    (folder / "mine.py").write_text(_NET)
    options = [*TINY_OPTIONS, "--steps", "2", "--classes", "2"]
    return [*options, "--data", "folder", "--root", "Bilder", "--backbone", "mine:net", "--method", "contrastive"]


@pytest.mark.parametrize(("encoding", "locale", "out"), [("ascii:strict", "C.UTF-8", "Läufe"), ("", "C", "runs")])
def test_class_names_that_a_console_cannot_show(tmp_path: Path, encoding: str, locale: str, out: str) -> None:
    options = [*umlauts(tmp_path), "--out", out]
    done = start(tmp_path, "train", *options, encoding=encoding, locale=locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"search among 4 classes" in done.stdout
    assert (b"run: " + out.encode("ascii", "backslashreplace")) in done.stdout
    assert b"Traceback" not in done.stderr
    # The same data, whatever the locale they are read under, and figures that everybody can read.
    metrics = outcome.read(tmp_path / out)
    assert metrics is not None
    assert metrics["data"]["train"]["from"] == ["c to h, the first half of the classes by name"]
    assert metrics["data"]["test"]["from"] == ["Ärger to \ufffdz, the second half of the classes by name"]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_output_folder_that_tensorboard_cannot_write_to_is_refused(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / os.fsdecode(b"x\xff")
    assert cli.main([command, *TINY_OPTIONS, "--out", str(out)]) == 2
    assert "which is no UTF-8 under this locale" in capsys.readouterr().err
    assert not out.exists()


def test_a_report_on_an_ascii_console(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", console)
    options = ["--methods", "contrastive", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(["compare", *TINY_OPTIONS, "--steps", "2", *options]) == 0
    assert rb" \xb1 " in console.buffer.getvalue()
    assert "±" in (tmp_path / "report.html").read_text("utf-8")


def test_the_report_is_there_before_anything_is_printed(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unprintable(*_: Any) -> str:
        assert (tmp_path / "report.html").exists()
        raise ValueError("this cannot be printed")

    monkeypatch.setattr(page, "table", unprintable)
    options = ["--methods", "contrastive", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(["compare", *TINY_OPTIONS, *options]) == 2


def test_readers_that_leave_end_nothing(tmp_path: Path) -> None:
    make_archive(tmp_path / "small.zip")
    options = [*TINY_OPTIONS, "--steps", "2", "--data", "omniglot", "--root", "small.zip", "--progress"]
    reading, writing = os.pipe()
    os.close(reading)
    done = start(tmp_path, "train", *options, "--out", "run", stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "closed", "status"),
    [("info", "stdout", 0), ("--help", "stdout", 0), ("train --steps 0", "stderr", 2), ("info", "both", 0)],
)
def test_streams_that_are_closed_change_no_status(tmp_path: Path, arguments: str, closed: str, status: int) -> None:
    shut = {"stdout": "1>&-", "stderr": "2>&-", "both": "0<&- 1>&- 2>&-"}[closed]
    environment = environment_of_a_user()
    command = f"exec {sys.executable} -m pddm_ext {arguments} {shut}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception ignored" not in done.stderr + done.stdout


def test_streams_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with lenient():
        print("café 日本 \udcff")
    assert sys.stdout is ascii_only
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == rb"caf\xe9 \u65e5\u672c \udcff" + os.linesep.encode()


@pytest.mark.parametrize("text", ["Ärger", "日本", "\udcff", 'quo"te', "back\\udcff"])
def test_json_holds_any_name(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / "one.json", {"name": text})
    assert json.loads((tmp_path / "one.json").read_text("utf-8")) == {"name": text}


def test_a_data_set_is_the_same_under_every_locale(tmp_path: Path) -> None:
    """Python reads a name's bytes as letters, or under an ASCII locale as one surrogate for each."""
    names = ("Köln", "Köln".encode().decode("ascii", "surrogateescape"))
    splits = [
        photos._split(photos.Photos(tmp_path, (path,), ""), [(name, [path])] * 2, {path: 5}, "")
        for name in names
        for path in [f"{name}/1.png"]
    ]
    assert splits[0].digest == splits[1].digest
    assert splits[0].names == splits[1].names == ("Köln", "Köln")
    assert [file_of(split.pictures, 0) for split in splits] == ["Köln/1.png"] * 2


# Progress


class Terminal(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "show", "bar", "lines"),
    [
        (True, None, True, False),
        (False, None, False, True),
        (False, True, True, False),
        (True, True, True, False),
        (True, False, False, False),
        (False, False, False, False),
    ],
)
def test_a_bar_is_for_terminals_and_a_log_gets_lines(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, show: bool | None, bar: bool, lines: bool
) -> None:
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("training", 6, 2, "step", show) as progress:
        for _ in range(2):
            progress.update()
            progress.report("R@1 50.0%")
    written = stream.getvalue()
    assert ("\r" in written) == bar
    assert (written == "training: step 3/6, R@1 50.0%\ntraining: step 4/6, R@1 50.0%\n") == lines
    assert bool(written) == (bar or lines)


def test_the_estimate_counts_the_evaluations_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the bar's; a bar in between is gone when it is done."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stream = Terminal(True)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("training", 25, 5, "step", None) as bar:
        bar.expect(10)
        assert bar.remaining() is None
        for _ in range(5):
            now[0] += 2
            bar.update()
        assert bar.remaining() == 15 * 2  # nothing is known of evaluations yet
        with bar.aside("measuring", 40, "picture") as pictures:
            now[0] += 30
            pictures.update(40)
            assert pictures.remaining() == 0
        assert bar.remaining() == 15 * 2 + 2 * 30  # at 20 and at 25
        with bar.aside("measuring", 40, "picture"):
            now[0] += 10
        assert bar.remaining() == 15 * 2 + 2 * 20
        bar._bar.refresh()
    assert "01:10" in stream.getvalue()
    assert "measuring: " in stream.getvalue()


def test_an_evaluation_shows_its_pictures(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "2", "--progress", "--out", str(tmp_path)]) == 0
    assert "measuring: " in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path), "--progress"]) == 0
    error = capsys.readouterr().err
    assert "measuring: 100%" in error
    assert "20/20" in error
    assert cli.main(["eval", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("option", "lines"), [([], 4), (["--no-progress"], 0)])
def test_a_log_has_a_line_for_each_measurement(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], lines: int
) -> None:
    options = ["--method", "multi-similarity", *option, "--out", str(tmp_path)]
    assert cli.main(["train", *TINY_OPTIONS, *options]) == 0
    written = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert len(written) == lines
    assert "step 6/6, R@1 " in written[-1] if lines else not written
