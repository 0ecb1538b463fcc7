"""Two learners on the same batches from the same initial weights: quadruplets mined by PDDM, and by distance."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import pddm_ext
from pddm_ext.quadruplets import Mode, Quadruplets

from . import checkpoint
from .data import BatchSampler, Dataset, frozen_test
from .evaluate import KS, embed, recall_at_k, spread
from .model import ConvNet
from .settings import Settings, option

#: Below this spread an embedding counts as collapsed: its root-mean-square distance is a fifth of the whole sphere's.
COLLAPSED = 0.04


def mine_by_distance(feats: Tensor, labels: Tensor, mode: Mode) -> Quadruplets:
    """Hard quadruplets by the negative squared Euclidean distance of the unit features. No gradient."""
    with torch.no_grad():
        unit = F.normalize(feats, dim=1)
        return pddm_ext.reference.select_quadruplets(2 * (unit @ unit.T) - 2, labels, mode)


class Learner:
    """A net, the unit that mines for it (None: mined by distance), their optimizer, and the seconds they took."""

    def __init__(self, settings: Settings, *, pddm: bool) -> None:
        self.mode, self.loss = settings.mode, pddm_ext.QuadrupletLoss()
        self.net = ConvNet(settings.dim, settings.seed)
        groups: list[dict[str, Any]] = [{"params": list(self.net.parameters())}]
        self.unit: pddm_ext.PDDM | None = None
        if pddm:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.unit = pddm_ext.PDDM(settings.dim)
            groups.append({"params": list(self.unit.parameters()), "lr": settings.lr * settings.unit_lr_factor})
        self.optimizer = torch.optim.Adam(groups, lr=settings.lr, weight_decay=5e-4)
        self.seconds = self.mining_seconds = 0.0

    def mine(self, feats: Tensor, labels: Tensor) -> Quadruplets:
        if self.unit is None:
            return mine_by_distance(feats, labels, self.mode)
        return pddm_ext.mine_and_score(feats, labels, self.unit, mode=self.mode)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One update; returns the embedding loss E_e, which both kinds of learner have."""
        start = time.perf_counter()
        feats = self.net(images)
        before = time.perf_counter()
        quads = self.mine(feats, labels)
        self.mining_seconds += time.perf_counter() - before
        embedding = self.loss.embedding(feats, quads)
        loss = embedding
        if self.unit is not None:
            loss = self.loss.similarity(quads) + self.loss.weight * embedding
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        value = embedding.item()
        self.seconds += time.perf_counter() - start
        return value

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "unit": None if self.unit is None else self.unit.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
            "mining_seconds": self.mining_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        if self.unit is not None:
            self.unit.load_state_dict(state["unit"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.mining_seconds = state["seconds"], state["mining_seconds"]


class Run:
    """A comparison under way: the learners, the batches' generator, and what was measured every so many steps.

    Attributes:
        learners: ``"euclidean"`` and ``"pddm"``.
        curves: per learner, lists of ``step``, ``loss`` (mean E_e since the point before), ``recall`` (Recall@1 on the
            test classes) and ``spread``.
        images, labels: the frozen test set.

    Raises:
        ValueError: settings that cannot be trained on this data.
    """

    def __init__(self, settings: Settings, dataset: Dataset) -> None:
        classes, drawings = len(dataset.train.names), len(dataset.test.labels)
        if settings.classes > classes:
            raise ValueError(f"--classes is {settings.classes}; {dataset.name} has {classes} to train on")
        if drawings <= max(KS):
            raise ValueError(f"{dataset.name} has {drawings} test drawings; Recall@{max(KS)} needs more")
        self.settings, self.dataset = settings, dataset
        self.learners = {"euclidean": Learner(settings, pddm=False), "pddm": Learner(settings, pddm=True)}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.sampler = BatchSampler(dataset.train, settings.classes, settings.samples)
        self.images, self.labels = frozen_test(dataset, settings.seed)
        self.taken = 0
        self.curves: dict[str, dict[str, list[float]]] = {
            name: {"step": [], "loss": [], "recall": [], "spread": []} for name in self.learners
        }
        self._losses: dict[str, float] = dict.fromkeys(self.learners, 0.0)

    def train(self, checkpoint_path: Path, *, progress: bool = True) -> None:
        """Train up to ``settings.steps``, leaving a checkpoint every ``settings.every`` steps and at the end.

        Raises:
            FloatingPointError: an embedding diverged.
        """
        bar = tqdm(total=self.settings.steps, initial=self.taken, unit="step", disable=not progress, mininterval=0.5)
        with bar:
            while self.taken < self.settings.steps:
                images, labels = self.sampler(self.generator)
                for name, learner in self.learners.items():
                    self._losses[name] += learner.step(images, labels)
                self.taken += 1
                if self.taken % self.settings.every == 0:
                    self._measure()
                    bar.set_postfix({name: f"R@1 {curve['recall'][-1]:.1%}" for name, curve in self.curves.items()})
                    self.save(checkpoint_path)
                bar.update()
        if self.taken % self.settings.every:
            self.save(checkpoint_path)

    def _measure(self) -> None:
        for name, learner in self.learners.items():
            features = embed(learner.net, self.images)
            if not features.isfinite().all():
                raise FloatingPointError(f"the {name} embedding is not finite after {self.taken} steps; lower --lr")
            curve = self.curves[name]
            curve["step"].append(self.taken)
            curve["loss"].append(self._losses[name] / self.settings.every)
            curve["recall"].append(recall_at_k(features, self.labels)[1])
            curve["spread"].append(spread(features))
            self._losses[name] = 0.0

    def save(self, path: Path) -> None:
        checkpoint.save(
            path,
            {
                "settings": asdict(self.settings),
                "data_digest": self.dataset.digest(),
                "taken": self.taken,
                "generator": self.generator.get_state(),
                "curves": self.curves,
                "losses": self._losses,
                "learners": {name: learner.state() for name, learner in self.learners.items()},
            },
        )

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same settings and data; ``steps`` may be larger than it was.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged, or of other settings or data; the message names the option.
        """
        state = checkpoint.load(path)
        for name, value in asdict(self.settings).items():
            before = state["settings"][name]
            if before != value and name != "steps":
                raise ValueError(f"{path}: {option(name)} was {before} in the run to resume and is {value} now")
        taken, steps = state["taken"], self.settings.steps
        if taken > steps:
            raise ValueError(f"{path}: the run to resume has taken {taken} steps; --steps is {steps}")
        if state["data_digest"] != self.dataset.digest():
            raise ValueError(f"{path}: the run to resume saw other drawings than --data {self.dataset.name} has now")
        self.taken, self.curves, self._losses = taken, state["curves"], state["losses"]
        self.generator.set_state(state["generator"])
        for name, learner in self.learners.items():
            learner.restore(state["learners"][name])
