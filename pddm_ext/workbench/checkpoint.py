"""Files that are whole or not there, and the state of a run in one of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from .. import __version__

#: A reader of FORMAT also reads every earlier one that a release has written; the first release writes 2.
FORMAT = 2
KEYS = {
    "settings",
    "data_digest",
    "taken",
    "seconds",
    "curves",
    "generators",
    "learner",
    "optimizer",
    "scheduler",
    "precision",
}


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a state back; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, no checkpoint, or of a format that this version does not read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from; expected the one that 'pddm-ext train' writes")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises almost anything at a damaged file, with pages of advice after the first line.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason}); expected the one that 'pddm-ext train' writes"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is int and found != FORMAT:
        way = "a newer pddm_ext wrote it: upgrade" if found > FORMAT else "no release wrote that: train again"
        raise ValueError(f"{path}: a checkpoint of format {found}; pddm_ext {__version__} reads {FORMAT}; {way}")
    if not isinstance(state, dict) or type(found) is not int or not state.keys() >= KEYS:
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT}; expected the one that 'pddm-ext train' writes")
    return state
