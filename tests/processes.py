"""Other processes that run this package, wherever the suite was started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pddm_ext


def environment_of_a_user(**more: str) -> dict[str, str]:
    """For processes that run the workbench with this package, wherever the suite was started."""
    places = [str(Path(__file__).parent / "bare"), str(Path(pddm_ext.__file__).parents[1])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
        **more,
    }


def members(session: int) -> list[int]:
    """The processes of a session that live, as /proc has them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, _, _, of = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """With this package and these helpers, wherever the suite was started."""
    places = [str(Path(pddm_ext.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment}
    # Not from the repository: its package would come first.
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=places[1], capture_output=True, text=True, timeout=300
    )


def in_two_processes(target: Callable[[int, int, Path], None], folder: Path, *, preload: str) -> list[dict[str, Any]]:
    """What ``target(rank, port, folder)`` leaves in RANK.pt in each of two processes that share a port.

    ``preload`` is a module that takes seconds to import, and is so once instead of twice.
    """
    return _run(target, [(rank,) for rank in range(2)], folder, preload)


def in_processes(
    target: Callable[[int, int, int, Path], None], world: int, folder: Path, *, preload: str
) -> list[dict[str, Any]]:
    """The same of ``target(rank, world, port, folder)`` in any number of processes."""
    return _run(target, [(rank, world) for rank in range(world)], folder, preload)


def _run(target: Callable[..., None], each: list[tuple[int, ...]], folder: Path, preload: str) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    processes = [context.Process(target=target, args=(*numbers, port, folder)) for numbers in each]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(processes))]
