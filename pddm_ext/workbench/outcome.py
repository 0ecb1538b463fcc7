"""What a finished run leaves behind: its figures in ``metrics.json``, written last, so that the file marks the end."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pddm_ext
from pddm_ext import _C

from .checkpoint import write_json
from .data.splits import Split, TestSet
from .evaluation.evaluate import evaluate
from .evaluation.retrieval import retrieval
from .loop import COLLAPSED, Run
from .settings import Settings

METRICS = "metrics.json"


def figures(run: Run, candidates: int = 100) -> dict[str, Any]:
    """Settings, curves, every figure of the evaluation, and where they come from, as plain numbers and strings."""
    settings = run.settings
    evaluated = evaluate(
        run.learner.net,
        run.learner.unit,
        run.test,
        seed=settings.seed,
        candidates=candidates,
        workers=settings.workers,
    )
    device = next(run.learner.parameters()).device
    return {
        "settings": asdict(settings),
        "data": {"train": _described(run.dataset.train), "test": _described(run.dataset.test)},
        "curves": run.curves,
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
    figures: dict[str, Any] = retrieval(F.normalize(pixels, dim=1), test.labels, None, seed, 1)["distance"]
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


def _described(split: Split) -> dict[str, Any]:
    return {"classes": len(split.names), "from": list(split.groups), "pictures": len(split.labels)}
