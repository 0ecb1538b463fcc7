"""One training run: batches, updates, and what is measured and kept every so many steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor, nn

import pddm_ext
from pddm_ext import _C
from pddm_ext.precision import unmasked

from . import checkpoint
from .console import Progress
from .data.augment import described
from .data.splits import Dataset, TestSet, batches
from .evaluation.evaluate import embed
from .evaluation.retrieval import KS, recall_at_k, relevant
from .evaluation.separation import effective_rank, spread
from .methods import PairLoss, Quadruplet, objective
from .model import Embedder, embedder
from .settings import Settings, difference

CHECKPOINT, CONFIG = "checkpoint.pt", "config.json"

#: Below this spread an embedding counts as collapsed; its root-mean-square distance is a fifth of the whole sphere's.
COLLAPSED = 0.04

#: float16's smallest number: what overflows in spite of this scale does not overflow for the scale's sake.
_SMALLEST_SCALE = 2.0**-24


class CollapseWarning(UserWarning):
    """The embedding puts nearly everything at one point."""


class Learner(nn.Module):
    """A net and what trains it. One forward pass is all that a step differentiates, as distributed training asks."""

    def __init__(self, net: Embedder, objective: Quadruplet | PairLoss, settings: Settings) -> None:
        super().__init__()
        self.net, self.objective, self.settings = net, objective, settings
        self.density = pddm_ext.DensityRegularizer(settings.density_ratio) if settings.density else None
        self.ranking = pddm_ext.MultiClusterRankingLoss(settings.clusters) if settings.structure else None

    @property
    def unit(self) -> pddm_ext.PDDM | None:
        return self.objective.unit

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # Losses are sums of small differences: of float32 even where the net runs in less.
        feats, structure = self.net.both(pictures)
        feats = feats if feats.dtype == torch.float64 else feats.float()
        feats, zero = unmasked(feats)
        with torch.autocast(feats.device.type, enabled=False):
            terms: dict[str, Tensor] = self.objective(feats, labels)
            if self.density is not None:
                terms["density"] = self.settings.density * self.density(feats, labels)
            if self.ranking is not None and structure is not None:
                terms["structure"] = self.settings.structure * self.ranking(feats, structure)
        return {name: term + zero for name, term in terms.items()}


def _schedule(settings: Settings) -> Callable[[int], float]:
    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "constant":
            return rise
        return rise * (1 + torch.tensor(step / settings.steps * torch.pi).cos().item()) / 2

    return factor


def _random_states(fabric: Fabric, generator: torch.Generator) -> dict[str, Tensor]:
    """The state of each process's random generators, by their name: (processes, bytes) uint8."""
    states = {"torch": torch.get_rng_state(), "augment": generator.get_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    gathered = {name: fabric.all_gather(state) for name, state in states.items()}
    return {name: state.reshape(fabric.world_size, -1).cpu() for name, state in gathered.items()}  # type: ignore[union-attr]


class Run:
    """A training run under way.

    Args:
        settings: what to do.
        dataset: what to train on, and what to measure on.
        folder: where checkpoints and TensorBoard logs go; without one nothing is written.
        backbone: any module that makes (n, f) features of pictures, in place of the settings' one.

    Attributes:
        learner: the net and its objective.
        test: the frozen test set.
        taken: steps so far.
        leads: whether this is the process that measures and writes, of several.
        curves: lists of ``step``, ``seconds`` (of training), ``loss`` (mean since the point before), ``recall``
            (Recall@1 on the test classes), ``spread`` and ``effective_rank``.

    Raises:
        ValueError: settings that cannot be trained on this data.
        ModuleNotFoundError: a backbone's package is not installed.
    """

    def __init__(
        self, settings: Settings, dataset: Dataset, folder: Path | None = None, backbone: nn.Module | None = None
    ) -> None:
        classes, pictures = len(dataset.train.names), len(dataset.test.labels)
        if settings.classes > classes:
            raise ValueError(f"--classes is {settings.classes}; {dataset.name} has {classes} to train on")
        if pictures <= max(KS):
            raise ValueError(f"{dataset.name} has {pictures} test pictures; Recall@{max(KS)} needs more")
        if len(torch.unique(dataset.test.labels[relevant(dataset.test.labels) > 0])) < 2:
            raise ValueError(f"{dataset.name} has fewer than two test classes of two pictures or more")
        self.settings, self.dataset, self.folder = settings, dataset, folder
        view = dataset.view
        net = embedder(settings, (view.channels, view.size, view.size), backbone)
        self.learner = Learner(net, objective(settings, classes), settings)
        if settings.precision == "64-true":
            self.learner.double()  # before a checkpoint is loaded, which float32 would round
        self.optimizer = self._optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _schedule(settings))
        self.test = TestSet(dataset, settings.seed)
        self.taken, self.seconds, self.leads = 0, 0.0, True
        self.curves: dict[str, list[float]] = {
            name: [] for name in ("step", "seconds", "loss", "recall", "spread", "effective_rank")
        }
        self._restored: dict[str, Any] | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        groups: list[dict[str, Any]] = [{"params": list(self.learner.net.parameters())}]
        rest = list(self.learner.objective.parameters())
        if rest:
            groups.append({"params": rest, "lr": settings.lr * settings.unit_lr_factor})
        return torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay)

    def train(self, *, progress: bool | None = None) -> None:
        """Train up to ``settings.steps``, measuring, and leaving a checkpoint, every ``settings.every`` steps.

        Args:
            progress: as in :class:`.console.Progress`.

        Raises:
            FloatingPointError: the loss, a parameter, the embedding or a score is not finite.
            ValueError: the accelerator is not there, or is of another kind than in the run to resume.
        """
        settings = self.settings
        loggers: list[Logger] = []
        if self.folder is not None:
            loggers.append(TensorBoardLogger(self.folder, name="tensorboard", version=""))
        fabric = self._fabric(settings.accelerator, settings.devices, loggers)
        if settings.devices > 1:
            fabric.launch()
        self.leads = fabric.is_global_zero
        learner, optimizer = fabric.setup(self.learner, self.optimizer)
        # Each process draws and distorts for itself.
        generator = torch.Generator(fabric.device).manual_seed(settings.seed + fabric.global_rank)
        torch.manual_seed(settings.seed + fabric.global_rank)
        if self._restored is not None:
            self._restore(fabric, generator)
        try:
            with Progress("training", settings.steps, self.taken, "step", progress if self.leads else False) as bar:
                while self.taken < settings.steps:
                    # Of all processes: (processes, steps).
                    losses = fabric.all_gather(self._chunk(fabric, learner, optimizer, generator, bar))
                    losses = losses.reshape(fabric.world_size, -1).cpu()  # type: ignore[union-attr]
                    states = _random_states(fabric, generator)
                    failure: Exception | None = None
                    if self.leads:
                        try:
                            loss = self._measure(losses, getattr(fabric.strategy.precision, "scaler", None))
                            fabric.log_dict({name: curve[-1] for name, curve in self.curves.items()}, self.taken)
                            if self.folder is not None:
                                self._save(fabric, states)
                            bar.report(f"R@1 {self.curves['recall'][-1]:.1%}, loss {loss:.3g}")
                        except (FloatingPointError, OSError) as error:
                            failure = error
                    # The others would wait for the leading process for ever.
                    if fabric.broadcast(failure is not None):
                        raise failure or FloatingPointError("the leading process has stopped")
        finally:
            for logger in fabric.loggers:
                logger.finalize("success")  # or points that are not on disk yet would be lost

    def _fabric(self, accelerator: str, devices: int, loggers: list[Logger]) -> Fabric:
        """Where to compute. What is named is taken or refused; ``auto`` is the same for every method, so that those of
        a comparison share a device: what Lightning Fabric chooses, or the CPU where the kernels do not have that.
        """
        try:
            fabric = Fabric(
                accelerator=accelerator,
                devices=devices,
                precision=self.settings.precision,  # type: ignore[arg-type]
                loggers=loggers,
            )
        except (RuntimeError, ImportError, ValueError) as error:
            hint = "" if accelerator == "cpu" else "; --accelerator cpu is there on every machine"
            raise ValueError(f"--accelerator {accelerator} is not to be had: {error}{hint}") from error
        kind = fabric.device.type
        served = ("cpu", "cuda") if _C.build_info()["cuda"] not in (None, "emulated") else ("cpu",)
        if kind in served:
            return fabric
        scores = f"this build of pddm_ext scores on {' and '.join(served)}"
        if accelerator == "auto":
            warnings.warn(f"--accelerator auto would be {kind} here; {scores}: on the CPU instead", stacklevel=3)
            return self._fabric("cpu", devices, loggers)
        if self.learner.unit is not None:
            raise ValueError(f"--accelerator {accelerator} is {kind} here; {scores}; --accelerator cpu is accepted")
        return fabric

    def place(self, accelerator: str | None = None) -> None:
        """Move the learner to an accelerator, the settings' one by default, to measure it without training.

        Raises:
            ValueError: the accelerator is not there.
        """
        self.learner.to(self._fabric(accelerator or self.settings.accelerator, 1, []).device)

    def _chunk(
        self, fabric: Fabric, learner: nn.Module, optimizer: Any, generator: torch.Generator, bar: Progress
    ) -> Tensor:
        """Steps up to the next measurement; the loss of each."""
        settings, view = self.settings, self.dataset.view
        begun = self.taken % settings.every
        count = min(settings.every - begun, settings.steps - self.taken)
        drawn = batches(
            self.dataset.train,
            settings.classes,
            settings.samples,
            (begun + count) * settings.accumulate,  # no more are drawn, however rarely it measures
            seed=(settings.seed * 7919 + self.taken // settings.every * 101 + fabric.global_rank) % 2**32,
            workers=settings.workers,
            skip=begun * settings.accumulate,
        )
        losses = torch.zeros(count, device=fabric.device)
        learner.train()
        start = time.perf_counter()
        for step in range(count):
            for part in range(settings.accumulate):
                stored, labels = next(drawn)
                stored, labels = stored.to(fabric.device), labels.to(fabric.device)
                pictures = view.augment(stored, generator) if settings.augment else view.plain(stored)
                with fabric.no_backward_sync(learner, enabled=part < settings.accumulate - 1):  # type: ignore[arg-type]
                    terms = learner(pictures, labels)
                    loss = torch.stack(list(terms.values())).sum() / settings.accumulate
                    fabric.backward(loss)
                losses[step] += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            self.scheduler.step()
            self.taken += 1
            bar.update()
        losses = losses.cpu()  # waits for the device
        self.seconds += time.perf_counter() - start
        return losses

    def _refuse_divergence(self, features: Tensor, losses: Tensor, scaler: Any) -> None:
        """Stop in words where something is not finite.

        A gradient scaler passes over a step whose gradients overflow, and lowers its scale for the next: that is no
        divergence before nothing else happens.
        """
        after, rates = f"after {self.taken} steps", "lower --lr or --unit-lr-factor"
        if not features.isfinite().all():
            raise FloatingPointError(f"the embedding is not finite {after}; lower --lr")
        for name, parameter in self.learner.named_parameters():
            if not parameter.isfinite().all():
                of_unit = name.startswith("objective.unit.")
                called = name.replace("objective.unit.", "the PDDM unit's ") if of_unit else f"the parameter {name}"
                raise FloatingPointError(f"{called} is not finite {after}; {rates if of_unit else 'lower --lr'}")
        unit = self.learner.unit
        if unit is not None:
            with torch.no_grad():
                rows = features.to(unit.u.weight.device)
                if not unit(rows[1:], rows[:-1]).isfinite().all():
                    raise FloatingPointError(f"the PDDM unit's scores are not finite {after}; {rates}")
        finite = losses.isfinite().all(0)
        if not finite.any() or (scaler is None and not finite.all()):
            at = self.taken - len(finite) + 1 + int((~finite).nonzero()[0])
            raise FloatingPointError(f"the loss is not finite at step {at}; lower --lr")
        if scaler is not None and scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(
                f"no update is made any more {after}: gradients are not finite at any scale of the loss; "
                f"lower --lr, or choose --precision bf16-mixed"
            )

    def _measure(self, losses: Tensor, scaler: Any) -> float:
        """A point of every curve; gives the mean of this process's finite losses (processes, steps)."""
        features = embed(self.learner.net, self.test, self.settings.workers)
        self._refuse_divergence(features, losses, scaler)
        own = losses[0]  # this is the leading process
        loss = own[own.isfinite()].mean().item()
        point = {
            "step": self.taken,
            "seconds": self.seconds,
            "loss": loss,
            "recall": recall_at_k(features, self.test.labels)[1],
            "spread": spread(features),
            "effective_rank": effective_rank(features),
        }
        was_collapsed = bool(self.curves["spread"]) and self.curves["spread"][-1] < COLLAPSED
        for name, value in point.items():
            self.curves[name].append(value)
        if point["spread"] < COLLAPSED and not was_collapsed:
            warnings.warn(
                f"after {self.taken} steps the embedding has collapsed: its spread is {point['spread']:.4f}, "
                f"its effective rank {point['effective_rank']:.1f} of {self.settings.dim}; nearly all is at one point. "
                f"Hardest negatives alone tend to do this early on: try semi-hard mining, another mode, a smaller "
                f"margin or a lower --lr",
                CollapseWarning,
                stacklevel=3,
            )
        return loss

    def _save(self, fabric: Fabric, states: dict[str, Tensor]) -> None:
        assert self.folder is not None
        checkpoint.save(
            self.folder / CHECKPOINT,
            {
                "settings": asdict(self.settings),
                "data_digest": self.dataset.digest(),
                "taken": self.taken,
                "seconds": self.seconds,
                "curves": self.curves,
                "generators": states,
                "learner": self.learner.state_dict(),
                "best": {},
                "view": described(self.dataset.view) or {},
                "names": list(self.dataset.train.names),
                "baselines": {},
                "thresholds": {},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
            },
        )

    def resume(self, path: Path | None = None) -> None:
        """Continue from a checkpoint of the same settings and data; ``steps`` may be larger under a constant schedule.

        Args:
            path: the checkpoint; without one, the folder's.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged, or of other settings or data; the message names the option.
        """
        if path is None:
            assert self.folder is not None, "a run without a folder has no checkpoint"
            path = self.folder / CHECKPOINT
        state = checkpoint.load(path)
        # A cosine ends where the steps do.
        changed = difference(state["settings"], self.settings, but=("steps",) * (self.settings.schedule == "constant"))
        if changed:
            raise ValueError(f"{path}: {changed}, where the run is to be resumed")
        taken, steps = state["taken"], self.settings.steps
        if taken > steps:
            raise ValueError(f"{path}: the run to resume has taken {taken} steps; --steps is {steps}")
        if taken < 0 or state["curves"].keys() != self.curves.keys():
            raise ValueError(f"{path}: damaged; its steps or curves are none that a run has")
        if state["data_digest"] != self.dataset.digest():
            raise ValueError(f"{path}: the run to resume saw other pictures than --data {self.dataset.name} has now")
        try:
            self.learner.load_state_dict(state["learner"])
        except RuntimeError as error:
            raise ValueError(f"{path}: its weights do not fit the net; {error}") from error
        self.taken, self.seconds, self.curves = taken, state["seconds"], state["curves"]
        self._restored = state

    def _restore(self, fabric: Fabric, generator: torch.Generator) -> None:
        """What can only be put back once the devices are there."""
        state, self._restored = self._restored, None
        assert state is not None
        if ("cuda" in state["generators"]) != (fabric.device.type == "cuda"):
            raise ValueError(f"the run to resume had another kind of device than {fabric.device.type}")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if state["precision"]:
                fabric.strategy.precision.load_state_dict(state["precision"])
            # Copies: torch reads a generator's state wrongly from a tensor that begins inside another one.
            own = {name: states[fabric.global_rank].clone() for name, states in state["generators"].items()}
            generator.set_state(own["augment"])
            torch.set_rng_state(own["torch"])
            if "cuda" in own:
                torch.cuda.set_rng_state(own["cuda"], fabric.device)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the run to resume has no state that fits this one ({type(error).__name__}: {error}); its checkpoint "
                f"is damaged, or of another number of --devices"
            ) from error
