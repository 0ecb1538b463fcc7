"""Files that are whole or not there, folders with one writer, and the state of a run in a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .. import __version__
from .console import own
from .settings import parse

#: A reader of FORMAT also reads every earlier one that a release has written; the first release writes 4.
FORMAT = 4
#: What a state consists of. ``best`` is the learner of the best step where validation pictures choose one, else empty;
#: ``view`` how pictures are seen, empty if it is the user's own; ``names`` the classes trained on; ``data`` what each
#: side of the data consists of; ``losses`` those since the last point of the curves.
KEYS: dict[str, type] = {
    "settings": dict,
    "data": dict,
    "taken": int,
    "seconds": float,
    "curves": dict,
    "losses": Tensor,
    "generators": dict,
    "learner": dict,
    "best": dict,
    "view": dict,
    "names": list,
    "baselines": dict,
    "thresholds": dict,
    "fitted": bool,
    "optimizer": dict,
    "scheduler": dict,
    "precision": dict,
}
#: What is read of each side of ``data``, and of each of ``baselines``.
_SIDE = {"classes": int, "from": list, "pictures": int, "digest": str}
_POINT = {"value": float, "low": float, "high": float}
_FIGURES = {"recall": dict.fromkeys("1248", _POINT), "map_at_r": _POINT, "r_precision": _POINT}


#: What :func:`write_bytes` writes under, and nobody else.
_TEMPORARY = re.compile(r"\..+\.\d+\.unfinished-by-pddm-ext")


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished-by-pddm-ext")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def deliver(path: Path, content: bytes) -> None:
    """Write to a file that a user has named: a link is followed, and a device or a pipe is written to as it is."""
    descriptor = own(path)
    if descriptor is not None:  # which is open already, and may be no file that could be opened again
        sys.stdout.flush()
        sys.stderr.flush()
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
    elif path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_bytes(Path(os.path.realpath(path)), content)


def as_json(value: Any) -> bytes:
    """Plain values for people, too: letters of any script as they are.

    What a file's name may hold and UTF-8 may not (a lone surrogate) is written as JSON's escape.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """:func:`write_bytes` of :func:`as_json`."""
    write_bytes(path, as_json(value))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep it from other processes as long as this lasts; a killed process keeps nothing, and what
    it had half written, in the folder or one within it, goes.

    An empty file ``.lock`` stays in it.

    Raises:
        ValueError: another process has claimed it.
        OSError: it is no folder, or not to be written to.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
    except OSError as error:
        raise OSError(
            f"--out is {folder} ({error.strerror or error}); a folder that can be made and written to is accepted"
        ) from error
    try:
        for path in (*folder.glob(".*"), *folder.glob("*/.*")):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():  # of a process that was killed while it wrote
                path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def digest(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Identifies tensors by name, and plain values beside them."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def there(path: Path) -> None:
    """Raise FileNotFoundError where there is no checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint is there; expected the one that 'pddm-ext train' writes")


def load(path: Path) -> dict[str, Any]:
    """Read a state back; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, no checkpoint, or of a format that this version does not read.
    """
    there(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not _whole(path):
            raise ValueError("it does not fit its checksums")
    except Exception as error:
        # Not what torch says, which is almost anything at a damaged file, and at others how to turn safety off.
        raise ValueError(
            f"{path}: not a readable checkpoint ({_kind(path)}); expected the one that 'pddm-ext train' writes"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is int and found != FORMAT:
        way = "a newer pddm_ext wrote it: upgrade" if found > FORMAT else "no release wrote that: train again"
        raise ValueError(f"{path}: a checkpoint of format {found}; pddm_ext {__version__} reads {FORMAT}; {way}")
    if (
        not isinstance(state, dict)
        or type(found) is not int
        or not all(isinstance(state.get(key), kind) for key, kind in KEYS.items())
        or not all(isinstance(name, str) for name in state["names"])
    ):
        whose = "" if type(found) is int else ", but another file of torch's"
        raise ValueError(
            f"{path}: not a checkpoint of format {FORMAT}{whose}; expected the one that 'pddm-ext train' writes"
        )
    _refuse_damaged(path, state)
    return state


def _refuse_damaged(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse parts that no run has written, and that would fail only where they are read."""
    data, thresholds = state["data"], state["thresholds"]
    for part, sound in (
        # A run of an earlier version may lack others, which then had their defaults.
        ("settings", "seed" in parse(state["settings"], str(path))),
        ("data", data.keys() >= {"train", "test"} and all(_like(side, _SIDE) for side in data.values())),
        ("steps or curves", _measured(state)),
        ("baselines", all(_like(figures, _FIGURES) for figures in state["baselines"].values())),
        (
            "thresholds",
            all(type(cuts) is dict and all(type(v) is float for v in cuts.values()) for cuts in thresholds.values()),
        ),
        ("weights", all(type(name) is str for name in (*state["learner"], *state["best"]))),
    ):
        if not sound:
            raise ValueError(f"{path}: damaged; its {part} are none that a run has")


def _like(value: Any, form: Any) -> bool:
    """Whether a value is of a type, or a dict that has the members of one of types."""
    if not isinstance(form, dict):
        return type(value) is form
    return type(value) is dict and all(name in value and _like(value[name], part) for name, part in form.items())


def _measured(state: Mapping[str, Any]) -> bool:
    """Whether curves are of one length, and losses those since their last point."""
    curves, losses = state["curves"], state["losses"]
    if not curves.keys() >= {"step", "seconds"} or not all(type(curve) is list for curve in curves.values()):
        return False
    steps = curves["step"]
    return (
        len(steps) > 0
        and all(len(curve) == len(steps) for curve in curves.values())
        and all(type(step) is int for step in steps)
        and all(one < other for one, other in zip((-1, *steps), steps, strict=False))
        and all(type(v) in (int, float) for name, curve in curves.items() if name != "loss" for v in curve)
        and losses.dim() == 2
        and losses.shape[1] == state["taken"] - steps[-1]
    )


def _whole(path: Path) -> bool:
    """Whether what is in a zip archive fits its checksums, at which torch does not look; True of another file."""
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) has it written without any.
            return not any(part.CRC for part in archive.infolist()) or archive.testzip() is None
    except Exception:  # as with torch, almost anything
        return False


def _kind(path: Path) -> str:
    """What a file is that torch does not read as tensors and plain values, by its first bytes."""
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError as error:
        return str(error.strerror)
    if not begin:
        return "an empty file"
    if begin[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            return "a damaged file: its end is missing"
        if not _whole(path):
            return "a damaged file: what it holds does not fit its checksums"
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
        return "a file of torch's that holds code, or is damaged" if pickled else "a zip archive"
    if begin[8:10] == b'{"':
        return "a file of safetensors: weights alone"
    if begin[0] == 0x80:
        return "a pickle, which may hold code and is not opened"
    return "not a file of torch's"
