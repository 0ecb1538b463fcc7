"""Files that are whole or not there, and the state of a run in one of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

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
        ValueError: the file is damaged or no checkpoint of this format.
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
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise ValueError(f"{path}: not a checkpoint of format {FORMAT}; expected the one that 'pddm-ext train' writes")
    return state
