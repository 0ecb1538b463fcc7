"""One writer for a folder, whatever ends it, and what Ctrl-C and a killed process leave behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pddm_ext.workbench import checkpoint, cli, compare, outcome
from pddm_ext.workbench.checkpoint import claimed
from pddm_ext.workbench.compare import Cell, Grid
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG, Run
from pddm_ext.workbench.settings import Settings
from processes import environment_of_a_user, members
from runs import TINY, TINY_OPTIONS, interrupt_at, make_archive, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc"),
]

_HOLDER = """
import os, sys, time
from pathlib import Path
from pddm_ext.workbench.checkpoint import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Another process that has claimed a folder."""
    holders = []

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, str(folder)]
        holder = subprocess.Popen(command, cwd=tmp_path, env=environment_of_a_user(), stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def commands(folder: Path) -> dict[str, list[str]]:
    """What would write into a folder or, for a comparison, has a cell there."""
    out = ["--out", str(folder)]
    grid = ["compare", *TINY_OPTIONS, "--methods", "contrastive", "--seeds", "1"]
    return {
        "train": ["train", *TINY_OPTIONS, *out],
        "resume": ["train", *TINY_OPTIONS, "--resume", *out],
        "compare": [*grid, *out],
        "a cell": [*grid, "--out", str(folder.parents[2]) if len(folder.parts) > 3 else ""],
    }


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("command", ["train", "resume", "compare", "a cell"])
def test_a_folder_in_use_is_refused_and_left_as_it_is_until_its_process_is_gone(
    here: None,
    tiny: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hold: Callable[[Path], subprocess.Popen[str]],
    command: str,
) -> None:
    folder = tmp_path / "grid" / "cells" / "contrastive" / "seed-0"
    arguments = commands(folder)[command]
    if command == "resume":
        trained(tiny, folder, steps=2)
    holder = hold(folder)
    before = files(folder)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"pddm-ext: error: {folder} is in use by another process; wait for it, or choose another --out\n"
    assert files(folder) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert cli.main(arguments) == 0


def test_a_folder_is_free_after_every_kind_of_end(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train", *TINY_OPTIONS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert cli.main(options) == 130
    with claimed(tmp_path):
        pass
    assert cli.main([*options, "--resume", "--lr", "5"]) == 2  # another rate than the checkpoint's
    assert cli.main([*options, "--resume"]) == 0
    assert cli.main([*options, "--resume"]) == 0  # finished, and free
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        raise ZeroDivisionError
    with claimed(tmp_path):
        pass


def test_sigterm_leaves_the_checkpoint_of_its_step_as_ctrl_c_does(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 4, number=signal.SIGTERM)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 130
    assert "stopped after 4 steps; " in (said := capsys.readouterr().err)
    assert f"{tmp_path / CHECKPOINT} of step 4 is there" in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
    """And the folder is that of the other."""
    make_archive(tmp_path / "small.zip")
    data = ["--data", "omniglot", "--root", "small.zip", "--steps", "40", "--every", "20", "--out", "run"]
    command = [sys.executable, "-m", "pddm_ext", "train", *TINY_OPTIONS, *data]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([*command, "--lr", lr], cwd=tmp_path, env=environment_of_a_user(), **pipes)
        for lr in ("0.001", "0.002")
    ]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert sorted(status for _, status in ends) == [0, 2]
    (refused,) = [error for error, status in ends if status == 2]
    assert (
        "in use by another process" in refused or "holds a run" in refused
    )  # the other had ended before this one began
    lr = 0.001 if ends[0][1] == 0 else 0.002
    metrics = outcome.read(tmp_path / "run")
    assert metrics is not None
    assert metrics["settings"]["lr"] == checkpoint.load(tmp_path / "run" / CHECKPOINT)["settings"]["lr"] == lr
    assert f'"lr": {lr}' in (tmp_path / "run" / CONFIG).read_text()


def test_a_run_that_has_ended_meanwhile_is_not_written_over(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was not there when this one looked, and is when this one has the folder."""
    claim = checkpoint.claimed

    def late(folder: Path) -> contextlib.AbstractContextManager[None]:
        trained(tiny, folder, steps=2)
        return claim(folder)

    monkeypatch.setattr(checkpoint, "claimed", late)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "run")]) == 2
    assert "holds a run; --resume continues it" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT)["taken"] == 2


def test_a_cell_that_another_process_has_finished_is_not_run_again(
    here: None, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = Grid(Settings(**TINY), ["contrastive"], [0], tmp_path).cells()
    compare.run_cell(cell, 1)
    before = files(cell.folder)
    monkeypatch.setattr(Run, "train", lambda *_, **__: pytest.fail("run again"))
    compare.run_cell(cell, 1)
    assert files(cell.folder) == before


def test_a_cell_with_another_settings_checkpoint_keeps_its_config(here: None, tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2, method="contrastive")
    (tmp_path / CONFIG).write_text("as it was")
    with pytest.raises(ValueError, match=r"--lr was 0\.001 and is 0\.5 now"):
        compare.run_cell(Cell("contrastive", Settings(**{**TINY, "method": "contrastive", "lr": 0.5}), tmp_path), 1)
    assert (tmp_path / CONFIG).read_text() == "as it was"


def test_one_of_several_processes_claims(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Path], subprocess.Popen[str]]
) -> None:
    """The leading one has the folder; another would find it taken, and writes nothing."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    hold(tmp_path / "run")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(Run, "train", lambda self, **_: setattr(self, "leads", False))
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "run")]) == 0
    assert not files(tmp_path / "run")


# Signals to a run of several processes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A command in a session of its own, on a small archive."""
    make_archive(tmp_path / "small.zip")
    started = []

    def starter(command: str, *options: str) -> subprocess.Popen[str]:
        data = ["--data", "omniglot", "--root", "small.zip", "--steps", "100000"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "pddm_ext", command, *TINY_OPTIONS, *data, *options],
                cwd=tmp_path,
                env=environment_of_a_user(),
                start_new_session=True,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield starter
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def resumed(place: Path, steps: int) -> dict[str, Any]:
    """The state in which a run goes on to so many steps."""
    done = subprocess.run(
        [sys.executable, "-m", "pddm_ext", "train", "--resume", "--out", "run", "--steps", str(steps)],
        cwd=place,
        env=environment_of_a_user(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return checkpoint.load(place / "run" / CHECKPOINT)


def test_ctrl_c_stops_all_processes_of_a_run_at_a_checkpoint(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("train", "--devices", "2", "--method", "contrastive", "--out", "run", "--no-progress")
    path = tmp_path / "run" / CHECKPOINT
    wait_for(path.exists)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    state = checkpoint.load(path)
    taken = state["taken"]
    assert error.endswith(
        f"stopped after {taken} steps; run/checkpoint.pt of step {taken} is there; --resume continues from it\n"
    )
    assert "Traceback" not in error
    assert state["losses"].shape == (2, 2)  # of a chunk that was not measured any more
    assert state["curves"]["step"][-1] == taken - 2
    wait_for(lambda: not members(process.pid))
    assert resumed(tmp_path, taken + 2)["curves"]["step"][-3:] == [taken - 2, taken, taken + 2]


def test_a_process_that_is_killed_ends_the_others_and_loses_no_checkpoint(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """By torch.distributed's own error. tests/endurance/kills.py has thirty moments of four commands."""
    process = start("train", "--devices", "2", "--method", "pddm-anchor", "--gather", "--out", "run", "--no-progress")
    path = tmp_path / "run" / CHECKPOINT
    wait_for(path.exists)
    (other,) = (each for each in members(process.pid) if each != process.pid and importing(each))
    left, own = (tmp_path / "run" / f".metrics.json.4194304{of}" for of in (".unfinished-by-pddm-ext", ""))
    left.write_text("{")  # as a process leaves it that was killed there
    own.write_text("somebody's")
    os.kill(other, signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "gloo" in error.lower() or "DistBackendError" in error, error
    wait_for(lambda: not members(process.pid))
    taken = checkpoint.load(path)["taken"]
    assert resumed(tmp_path, taken + 2)["taken"] == taken + 2
    assert {hidden.name for hidden in (tmp_path / "run").rglob(".*")} == {".lock", own.name}


def test_a_leading_process_that_is_killed_at_once_takes_the_others_along(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    """They have not met yet, and would wait for it."""
    process = start("train", "--devices", "2", "--method", "contrastive", "--out", "run", "--no-progress")
    wait_for(lambda: len(members(process.pid)) > 1)
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not members(process.pid))


def test_ctrl_c_reaches_no_worker_that_reads_pictures(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """It goes to them, too, and a step that is to be finished needs them."""
    process = start("train", "--workers", "1", "--method", "contrastive", "--every", "50", "--out", "run")
    wait_for((tmp_path / "run" / CHECKPOINT).exists)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith("stopped after ")
    assert "Traceback" not in error
    wait_for(lambda: not members(process.pid))


# Signals to a comparison and its processes


@pytest.fixture
def grid(start: Callable[..., subprocess.Popen[str]]) -> Callable[[], subprocess.Popen[str]]:
    """A comparison that takes long, in a session of its own."""
    options = ["--methods", "contrastive", "n-pair", "--seeds", "1", "--jobs", "2", "--every", "2", "--out", "grid"]
    return lambda: start("compare", *options)


def wait_for(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def importing(process: int) -> bool:
    """Whether it has begun to import torch, which takes seconds."""
    with contextlib.suppress(OSError):
        return "libtorch_cpu" in Path(f"/proc/{process}/maps").read_text()
    return False


def test_ctrl_c_stops_a_comparison_in_one_line(tmp_path: Path, grid: Callable[[], subprocess.Popen[str]]) -> None:
    """It is the first process that answers: the others, which get it too, do not, not even while they start."""
    process = grid()
    wait_for(lambda: any(importing(child) for child in members(process.pid) if child != process.pid))
    for child in members(process.pid):
        if child != process.pid:
            os.kill(child, signal.SIGINT)
    wait_for(lambda: len(list((tmp_path / "grid").rglob(CHECKPOINT))) == 2)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert error == "\nstopped; what has finished is in grid, and the same command goes on from there\n"
    wait_for(lambda: not members(process.pid))
    for path in (tmp_path / "grid").rglob(CHECKPOINT):
        state = checkpoint.load(path)
        assert state["taken"] >= 2
        # Each has left the step that it had reached.
        assert state["taken"] == state["curves"]["step"][-1] + state["losses"].shape[1]
        with claimed(path.parent):
            pass
    assert not [path for path in (tmp_path / "grid").rglob(".*") if path.name != ".lock"]  # nothing half written


def test_a_comparison_that_is_killed_takes_its_processes_along(
    tmp_path: Path, grid: Callable[[], subprocess.Popen[str]]
) -> None:
    process = grid()
    wait_for(lambda: len(list((tmp_path / "grid").rglob(CHECKPOINT))) == 2)
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not members(process.pid))
    for path in (tmp_path / "grid").rglob(CHECKPOINT):
        with claimed(path.parent):
            assert checkpoint.load(path)["taken"] >= 2


def test_a_run_that_is_killed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory ran out."""
    cell = Cell("contrastive", Settings(**TINY), tmp_path)
    monkeypatch.setattr(compare, "run_cell", _killed)
    with pytest.raises(OSError, match="the process of a run has been killed; too little memory, perhaps"):
        list(compare._each([cell], 1, 1))


def _killed(*_: Any) -> None:
    os.kill(multiprocessing.current_process().pid or 0, signal.SIGKILL)
