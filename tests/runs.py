"""Small runs of the workbench: data, settings, and comparisons of what they leave."""

from __future__ import annotations

import json
import signal
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from pddm_ext import PDDM
from pddm_ext.workbench import cli
from pddm_ext.workbench.console import Progress
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset, Split, TestSet, batches, in_memory
from pddm_ext.workbench.evaluation.evaluate import measure, over
from pddm_ext.workbench.learner import Learner
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.measuring import Seen, look
from pddm_ext.workbench.model import Embedder
from pddm_ext.workbench.settings import Settings

TINY = {"steps": 6, "classes": 4, "samples": 3, "dim": 8, "every": 2, "accelerator": "cpu"}
TINY_OPTIONS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


def blots(classes: int, seed: int) -> list[Tensor]:
    """Classes of random coarse patterns, each of four pictures a little different: (4, 1, 64, 64) uint8 each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(classes, 1, 1, 8, 8, generator=generator)
    coarse = coarse + 0.3 * torch.rand(classes, 4, 1, 8, 8, generator=generator)
    large = torch.nn.functional.interpolate(coarse.flatten(0, 1), scale_factor=8) * 190
    return list(large.byte().split(4))


def make_tiny() -> Dataset:
    def split(groups: dict[str, str], seed: int) -> Split:
        pictures = iter(blots(sum(map(len, groups.values())), seed))
        return in_memory({group: {name: next(pictures) for name in names} for group, names in groups.items()})

    return Dataset(
        "glyphs", DRAWINGS, split({"one": "abcde", "two": "fgh"}, 0), split({"three": "vwxyz"}, 1), distort_test=True
    )


def with_gallery(tiny: Dataset) -> Dataset:
    """The same classes on every side: queries of each class, the others of them in the gallery and to train on."""
    rows = torch.arange(32)
    train = tiny.train.some(rows[rows % 4 > 1])
    return replace(
        tiny,
        train=train,
        test=tiny.train.some(rows[rows % 4 == 0]),
        gallery=train,
        val=tiny.train.some(rows[rows % 4 == 1]),
        distort_test=False,
        protocol="known",
    )


def make_archive(path: Path) -> Path:
    """Omniglot's layout in small, for processes that no fixture reaches: 5 alphabets × 3 characters × 4 drawings."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for alphabet in "ABCDE":
            for character in range(3):
                ink = random.integers(0, 2, (12, 12)).repeat(8, 0).repeat(8, 1) * 255
                for drawing in range(4):
                    noisy = np.where(random.random(ink.shape) < 0.1, 0, ink).astype(np.uint8)
                    name = f"images_background_small1/{alphabet}/character{character + 1:02}/{drawing}.png"
                    with archive.open(name, "w") as file:
                        Image.fromarray(noisy).convert("1").save(file, "PNG")
    return path


def pictures_of(dataset: Dataset, **changed: Any) -> tuple[Tensor, Tensor]:
    """A batch as a net sees it."""
    stored, labels, _ = next(batches(dataset.train, 4, 3, 1, seed=0, **changed))
    return dataset.view.plain(stored), labels


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON holds them, without what no two runs share."""
    metrics = json.loads(json.dumps(metrics))
    del metrics["curves"]["seconds"]
    return metrics


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, batch: int, times: int = 1, number: signal.Signals = signal.SIGINT
) -> None:
    """Ctrl-C, or another signal, once or more often, while this many-th batch is with the net, counted from 1."""
    forward, calls = Learner.forward, []

    def interrupted(self: Learner, *given: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == batch:
            for _ in range(times):
                signal.raise_signal(number)
        return forward(self, *given)

    monkeypatch.setattr(Learner, "forward", interrupted)


def trained(dataset: Dataset, folder: Path | None = None, backbone: nn.Module | None = None, **changed: Any) -> Run:
    """A run to its end, from its folder's checkpoint if there is one."""
    run = Run(Settings(**{**TINY, **changed}), dataset, folder, backbone)
    if folder is not None and (folder / CHECKPOINT).exists():
        run.resume()
    run.train(progress=False)
    return run


def seen_by(net: nn.Module, test: Any, workers: int = 0, progress: bool = False) -> Tensor:
    """What any net makes of a test set, or of what stands for one."""
    with Progress("embedding", len(test), 0, "picture", progress) as bar:
        (rows,) = over(test, lambda part: (net(part),), net, workers, bar)
    return rows


def looked(net: Embedder, test: TestSet, workers: int = 0) -> Seen:
    with Progress("", len(test), 0, "picture", False) as bar:
        return look(net, test, None, workers=workers, bar=bar)


def measured(net: Embedder, unit: PDDM | None, test: TestSet, seed: int = 0) -> dict[str, Any]:
    """Every figure of a net on a test set, embedded anew."""
    seen = looked(net, test)
    rows = {"structure": seen.structure, "queries": test.queries, "gallery": test.gallery}
    return measure(seen.features, test.labels, unit, seed=seed, **rows)


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two states of dicts, lists, tensors and values are not the same bits."""
    if isinstance(one, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        return [found for key in one for found in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, (a, b) in pairs for found in differences(a, b, f"{at}/{place}")]
    return [] if one == other else [at]


class Counted(nn.Module):
    """A small frozen-able backbone with everything that training changes; counts the pictures it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.layers.append(nn.Dropout(0.3))
        self.pictures = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.pictures += len(pictures)
        features: Tensor = self.layers(pictures)
        return features


def dropping() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 16), nn.ReLU())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_refused(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str], begin: str, message: str
) -> None:
    """That a command says in a line what is wrong, and leaves all files of a folder as they are."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"pddm-ext: error: {begin}")
    assert error.count("\n") == 1
    assert files() == before
