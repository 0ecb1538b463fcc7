"""What was trained, for programs without this package: graphs, and how to prepare pictures for them.

A folder has the embedder (``embedder.pt2`` of ``torch.export``, ``embedder.onnx``), where there is one the unit
(``unit.pt2``, ``unit.onnx``), and ``preprocessing.json``. The number of pictures or pairs is dynamic. Numbers are
float32, also where the run's were float64. Operators are plain ones: the unit is the one of
:mod:`pddm_ext.reference`, for the fused operators are this package's own.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pddm_ext import reference

from .. import __version__
from .._installing import bring
from . import checkpoint
from .data.augment import Drawings, Photographs, View
from .data.splits import INK
from .trained import Features, Trained

#: Suffixes by format.
FORMATS = {"torch": ".pt2", "onnx": ".onnx"}
PREPROCESSING = "preprocessing.json"

#: What ONNX's exporter imports.
_ONNX = ("onnx", "onnxscript")


class _Both(nn.Module):
    """Stored pictures to unit features and structures."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features.both(pictures)


class _Score(nn.Module):
    """:class:`.similarity.Similarity` in plain operators."""

    def __init__(self, unit: reference.PDDM, cosine: float, floor: float) -> None:
        super().__init__()
        self.unit, self.cosine, self.floor = unit, cosine, floor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        alike = (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)
        scores: Tensor = self.unit(x, y).clamp(min=self.floor) + self.cosine * alike
        return scores


def available() -> tuple[str, ...]:
    """The formats that can be written here: ``"torch"``, and ``"onnx"`` where its packages are installed."""
    return tuple(name for name in FORMATS if name != "onnx" or not _missing())


def export(trained: Trained, folder: str | os.PathLike[str], formats: Collection[str] | None = None) -> list[Path]:
    """Write graphs and ``preprocessing.json`` into a folder, which is there when all of them are.

    The embedder takes ``pictures`` (n, channels, stored, stored) uint8 and gives ``features`` (n, dim), of unit norm;
    of a net with a structure head ``structure`` (n, dim), too. The unit takes ``x`` and ``y`` (n, dim) and gives
    ``scores`` (n,).

    Args:
        trained: what :func:`pddm_ext.load` gives.
        folder: not there yet, or empty.
        formats: of ``FORMATS``; by default those that are :func:`available`.

    Returns:
        The files.

    Raises:
        ValueError: another format, a folder that holds files, or a net that does not export.
        ModuleNotFoundError: a package of ONNX's exporter is not installed.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    chosen = tuple(dict.fromkeys(available() if formats is None else formats))
    _check(folder, chosen)
    graphs = {"embedder": _embedder(trained)}
    if trained.unit is not None:
        graphs["unit"] = _unit(trained)
    with _whole(folder) as made:
        for name, (program, inputs, outputs) in graphs.items():
            for kind in chosen:
                content = _torch(program) if kind == "torch" else _onnx(program, inputs, outputs, name)
                (made / f"{name}{FORMATS[kind]}").write_bytes(content)
        checkpoint.write_json(made / PREPROCESSING, preprocessing(trained))
        names = sorted(path.name for path in made.iterdir())
    return [folder / name for name in names]


def preprocessing(trained: Trained) -> dict[str, Any]:
    """What ``preprocessing.json`` holds: how a file becomes what the embedder takes, and what its results mean."""
    view, dim = trained.view, trained.dim
    outputs = ("features", "structure") if trained.module.net.structure is not None else ("features",)
    graphs: dict[str, Any] = {
        "embedder": {
            "input": {"pictures": ["n", view.channels, view.stored, view.stored]},
            "input dtype": "uint8",
            "output": {name: ["n", dim] for name in outputs},
            "output dtype": "float32",
            "inside": _inside(view),
        }
    }
    if trained.unit is not None:
        told = f"it is at least {trained.floor:.6g}, and {trained.cosine:.6g} times the cosine of the rows is added"
        beside = [told] if trained.cosine else []
        graphs["unit"] = {
            "input": {"x": ["n", dim], "y": ["n", dim]},
            "input dtype": "float32",
            "output": {"scores": ["n"]},
            "output dtype": "float32",
            "inside": ["the score of each pair of rows; a larger one is more alike", *beside],
        }
    return {
        "preparation": _preparation(view),
        "graphs": graphs,
        "dim": dim,
        "classes": list(trained.names),
        "thresholds": {kind: dict(values) for kind, values in trained.thresholds.items()},
        "meaning of thresholds": "by rate of false positives on validation pictures; at or below a Euclidean distance "
        "of features, or at or above a score, two pictures are of the same class",
        "digest": trained.digest,
        "versions": {"pddm_ext": __version__, "torch": torch.__version__},
    }


def _preparation(view: View) -> dict[str, Any]:
    """What :mod:`.data.reading` does, in order; interpolations are Pillow's, whose kernels grow where they shrink."""
    shape = [view.channels, view.stored, view.stored]
    decoded = {"depth": "8 bits a channel; of 16, divided by 257 and rounded", "alpha": "on white"}
    if isinstance(view, Drawings):
        return {
            **decoded,
            "colours": "grey, by ITU-R 601-2 luma",
            "values": "inverted, so that ink is bright",
            "crop": "the box of what is not 0",
            "resize": {"longer side": INK, "interpolation": "lanczos"},
            "pad": {"to": shape, "with": 0, "the drawing": "in the middle"},
        }
    assert isinstance(view, Photographs)  # the user's own are in no checkpoint
    return {
        **decoded,
        "orientation": "upright, by EXIF",
        "colours": "red, green, blue",
        "crop": "the square in the middle, as long as the shorter side",
        "resize": {"to": shape, "interpolation": view.interpolation},
    }


def _inside(view: View) -> list[Any]:
    """What the graph does before and after the net."""
    seen: list[Any] = ["divided by 255"]
    if isinstance(view, Photographs):
        middle = {"crop": "the middle", "to": [view.channels, view.size, view.size]}
        seen = [middle, *seen, {"mean": list(view.mean), "std": list(view.std)}]
    else:
        seen.append({"average of 2 x 2 pixels, to": [view.channels, view.size, view.size]})
    return [*seen, "the net", "features divided by their norm"]


def _check(folder: Path, formats: tuple[str, ...]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"formats has {name!r}; {', '.join(FORMATS)} are accepted")
    if not formats:
        raise ValueError(f"formats is empty; {', '.join(FORMATS)} are accepted")
    if "onnx" in formats and (missing := _missing()):
        raise ModuleNotFoundError(
            f"the format onnx needs {missing}, which is not there; it comes with {bring('export')}", name=missing
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds files already; a folder that is not there yet, or empty, is accepted")


def _missing() -> str:
    return next((name for name in _ONNX if importlib.util.find_spec(name) is None), "")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    made.mkdir()
    try:
        yield made
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


_Graph = tuple[ExportedProgram, tuple[str, ...], tuple[str, ...]]
"""A graph, and the names of what goes in and comes out."""


def _embedder(trained: Trained) -> _Graph:
    view = trained.view
    module = copy.deepcopy(trained.module).float().cpu()
    structured = module.net.structure is not None
    pictures = torch.zeros(2, view.channels, view.stored, view.stored, dtype=torch.uint8)
    program = _traced(_Both(module).eval() if structured else module, pictures)
    return program, ("pictures",), ("features", "structure") if structured else ("features",)


def _unit(trained: Trained) -> _Graph:
    fused = trained.unit
    assert fused is not None
    unit = reference.PDDM(fused.dim, fused.hidden, fused.combined, normalize_input=fused.normalize_input)
    unit.load_state_dict(fused.state_dict())
    rows = torch.zeros(2, fused.dim)
    module = _Score(unit, trained.cosine, trained.floor) if trained.cosine else unit
    return _traced(module.eval().requires_grad_(False), rows, rows.clone()), ("x", "y"), ("scores",)


def _traced(module: nn.Module, *example: Tensor) -> ExportedProgram:
    number = Dim("n", min=1)
    try:
        with _quiet():
            return torch.export.export(module, example, dynamic_shapes=tuple({0: number} for _ in example))
    except Exception as error:  # of code that is not ours
        raise ValueError(f"the net does not export with a dynamic number of pictures: {_first_line(error)}") from error


def _torch(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(program: ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], name: str) -> bytes:
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple({0: "n"} for _ in inputs),
            )
    except Exception as error:  # operators that ONNX does not have
        raise ValueError(f"the {name} does not export to ONNX: {_first_line(error)}") from error
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _first_line(error: BaseException) -> str:
    """The cause of what an exporter raises, without its pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' words to their developers."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
