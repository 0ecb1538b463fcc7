"""kill −9 at random moments of ``pddm-ext train`` and ``compare``, of all processes or of one.

``python tests/endurance/kills.py [MOMENTS [COMMAND …]]`` (some minutes): each of four commands is killed and started
again until it has been killed so often, and then runs to its end; that must be the end of one that was left alone, to
the last bit. After each kill no file may be half a file. Prints a line a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pddm_ext.workbench import checkpoint
from processes import environment_of_a_user, members
from runs import TINY_OPTIONS, differences, make_archive

SHORT = [*TINY_OPTIONS, "--data", "omniglot", "--root", "small.zip", "--no-progress"]
#: Long enough that a kill in the midst of it finds steps taken, measurements made and files being written.
STEPS = ["--steps", "60", "--every", "1"]
COMMANDS = {
    "train": ["train", *SHORT, *STEPS, "--method", "pddm-pair", "--bank", "40"],
    "train, two processes": [
        "train",
        *SHORT,
        *STEPS,
        "--method",
        "recommended",
        "--unit-steps",
        "40",
        "--devices",
        "2",
    ],
    "compare": ["compare", *SHORT, *STEPS, "--methods", "pddm-anchor", "contrastive", "--seeds", "1", "--jobs", "1"],
    "compare, two jobs": ["compare", *SHORT, *STEPS, "--methods", "pddm-pair", "n-pair", "--seeds", "1", "--jobs", "2"],
}
ALONE = 60.0  # seconds in which the others must end when one of them has been killed


def start(command: list[str], place: Path, out: str) -> subprocess.Popen[str]:
    again = ["--resume"] if command[0] == "train" and (place / out / "checkpoint.pt").exists() else []
    return subprocess.Popen(
        [sys.executable, "-m", "pddm_ext", *command, "--out", out, *again],
        cwd=place,
        env=environment_of_a_user(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def whole(folder: Path) -> None:
    """Every file that is there under its own name can be read."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.name == "checkpoint.pt":
            checkpoint.load(path)
        elif path.suffix == ".html":
            assert path.read_text("utf-8").rstrip().endswith("</html>"), path


def ends(folder: Path) -> dict[str, Any]:
    """What every run of a folder has come to, but for the seconds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("checkpoint.pt")):
        state = checkpoint.load(path)
        del state["seconds"], state["curves"]["seconds"]
        found[str(path.relative_to(folder))] = state
    for path in sorted(folder.rglob("metrics.json")):
        metrics = json.loads(path.read_text("utf-8"))
        del metrics["curves"]["seconds"]
        found[str(path.relative_to(folder))] = metrics
    return found


def kill_and_go_on(command: list[str], place: Path, moments: int, taken: float, draw: random.Random) -> str:
    """How it went, in words."""
    kills, one, slowest = 0, 0, 0.0
    while True:
        process = start(command, place, "killed")
        if kills < moments:
            # From its first import to its last file; a run that goes on has less to do.
            time.sleep(draw.uniform(0.2, 0.8) * taken)
            alive = members(process.pid)
            if process.poll() is None:
                kills += 1
                if draw.random() < 0.5:
                    for each in alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(each, signal.SIGKILL)
                else:
                    one += 1
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(draw.choice(alive), signal.SIGKILL)
                begun = time.monotonic()
                while members(process.pid):
                    assert time.monotonic() - begun < ALONE, "the others went on"
                    time.sleep(0.05)
                slowest = max(slowest, time.monotonic() - begun)
                process.communicate()
                whole(place / "killed")
                continue
            # It came to its end first: anew.
            said = process.communicate()[0]
            assert process.returncode == 0, said
            (place / "killed").rename(place / f"early-{time.monotonic_ns()}")
            continue
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return f"{kills} kills, {one} of them of one process, whose others ended within {slowest:.1f} s"


def main() -> None:
    moments = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    torch.set_num_threads(1)
    for name in sys.argv[2:] or COMMANDS:
        command = COMMANDS[name]
        draw = random.Random(name)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            make_archive(place / "small.zip")
            begun = time.monotonic()
            said = start(command, place, "whole").communicate()[0]
            taken = time.monotonic() - begun
            assert (place / "whole").exists(), said
            how = kill_and_go_on(command, place, moments, taken, draw)
            expected, found = ends(place / "whole"), ends(place / "killed")
            assert expected, said
            different = differences(expected, found)
            assert not different, different
            left = [path for path in (place / "killed").rglob(".*") if path.name != ".lock"]
            assert not left, left
            print(f"{name}: {how}; the same end in {len(found)} files, nothing half written", flush=True)


if __name__ == "__main__":
    main()
