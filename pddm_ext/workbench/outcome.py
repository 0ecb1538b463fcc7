"""What a finished run leaves behind: its figures in ``metrics.json``, written last, so that the file marks the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pddm_ext
from pddm_ext import _C

from .checkpoint import write_json
from .console import Progress
from .data.splits import Dataset, TestClasses, TestSet
from .evaluation.evaluate import measure
from .evaluation.retrieval import retrieval
from .loop import Run
from .measuring import COLLAPSED, Seen, chosen, look, sides
from .settings import Settings
from .similarity import Similarity
from .trained import Trained

METRICS = "metrics.json"


def figures(run: Run, candidates: int = 100, *, progress: bool | None = False) -> dict[str, Any]:
    """Settings, curves, every figure of the evaluation, and where they come from, as plain numbers and strings.

    Args:
        run: that has ended.
        candidates: how many of the nearest rows are re-ranked.
        progress: over the pictures, as in :class:`.console.Progress`, where the run has not just measured them.
    """
    seen = run.look(progress=progress)
    told = {
        "settings": asdict(run.settings),
        "data": _told(sides(run.dataset), run.dataset),
        "curves": run.curves,
        "baselines": run.baselines,
        "thresholds": run.thresholds,
    }
    device = next(run.learner.parameters()).device
    return _figures(told, seen, run.test, run.learner.similarity, device, run.settings.seed, candidates)


def again(
    state: Mapping[str, Any],
    trained: Trained,
    dataset: Dataset,
    *,
    candidates: int = 100,
    workers: int = 0,
    progress: bool | None = False,
) -> dict[str, Any]:
    """:func:`figures` of a checkpoint on the test side of any data.

    Args:
        state: of the checkpoint.
        trained: what it has trained.
        dataset: whose test side is measured, seen as the checkpoint's net sees pictures.
        candidates: as there.
        workers: processes that read the pictures.
        progress: as there.
    """
    seed = trained.settings.seed
    test = TestSet(dataset, seed)
    with Progress("measuring", len(test), 0, "picture", progress) as bar:
        seen = look(trained.module.net, test, None, workers=workers, bar=bar)
    measured = {name: side for name, side in sides(dataset).items() if name in ("test", "gallery")}
    # What training began with was measured on its own pictures: of others it says nothing.
    same = all(measured.get(name) == state["data"].get(name) for name in ("test", "gallery"))
    if not same:  # the folder's own protocol knows nothing of what this checkpoint was trained on
        known = _known(trained.names, dataset)
        protocol: TestClasses = "known" if known else "unseen"
        notes = (familiar(trained.names, dataset),) if 0 < known < len(dataset.test.names) else ()
        dataset = replace(dataset, protocol=protocol, notes=(*dataset.notes, *notes))
    told = {
        "settings": asdict(trained.settings),  # what the run did not know had its default
        "data": _told({"train": state["data"]["train"], **measured}, dataset),
        "curves": state["curves"],
        "baselines": state["baselines"] if same else {},
        "thresholds": state["thresholds"],
    }
    return _figures(told, seen, test, trained.similarity, trained.device, seed, candidates)


def familiar(names: Sequence[str], dataset: Dataset) -> str:
    """How many of the classes searched for are among those trained on, in words."""
    known, count = _known(names, dataset), len(dataset.test.names)
    return f"{known or 'none'} of the {count} classes searched for {'was' if known < 2 else 'were'} trained on"


def _known(names: Sequence[str], dataset: Dataset) -> int:
    return len(set(names) & set(dataset.test.names))


def _figures(
    told: dict[str, Any],
    seen: Seen,
    test: TestSet,
    unit: Similarity | None,
    device: torch.device,
    seed: int,
    candidates: int,
) -> dict[str, Any]:
    evaluated = measure(
        seen.features,
        test.labels,
        unit,
        seed=seed,
        candidates=candidates,
        structure=seen.structure,
        queries=test.queries,
        gallery=test.gallery,
    )
    return {
        **told,
        "curves_of": "test" if chosen(told["curves"]) is None else "validation",
        "chosen_step": chosen(told["curves"]),
        **evaluated,
        "collapsed": evaluated["spread"] < COLLAPSED,
        "environment": {
            "pddm_ext": pddm_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "instruction_set": _C.cpu_capability(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def raw_pixels(test: TestSet, seed: int) -> dict[str, Any]:
    """Retrieval figures of the pictures themselves, compared pixel by pixel: what any embedding should surpass.

    A photograph is compared at 32 × 32 pixels, as a drawing is.
    """
    parts = torch.split(torch.arange(len(test)), 256)
    pixels = torch.cat([F.adaptive_avg_pool2d(test[rows], 32).flatten(1) for rows in parts])
    figures: dict[str, Any] = retrieval(
        F.normalize(pixels, dim=1), test.labels, None, seed, 1, queries=test.queries, gallery=test.gallery
    )["distance"]
    return figures


def write(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json`` into an existing folder."""
    write_json(folder / METRICS, metrics)


def read(folder: Path) -> dict[str, Any] | None:
    """The folder's ``metrics.json``; None where no run has finished.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text("utf-8"))
        if isinstance(metrics, dict) and metrics.keys() >= {"settings", "curves", "results"}:
            # What the run did not know had its default.
            metrics["settings"] = {setting.name: setting.default for setting in fields(Settings)} | metrics["settings"]
            return metrics
        raise ValueError("figures are missing")
    except ValueError as error:
        raise ValueError(f"{path}: not the figures of a finished run ({error}); delete it to train again") from error


def _told(sides: Mapping[str, Mapping[str, Any]], measured: Dataset) -> dict[str, Any]:
    """What each side consists of, and what the classes measured are to training, for people."""
    described = {name: {key: side[key] for key in ("classes", "from", "pictures")} for name, side in sides.items()}
    return {"protocol": measured.protocol, "notes": list(measured.notes), **described}
