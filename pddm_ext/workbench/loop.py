"""One training run: batches, updates, and what is measured and kept every so many steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from . import checkpoint, devices, measuring
from .console import Progress
from .data.augment import described
from .data.splits import Dataset, Split, TestSet, batches
from .evaluation.evaluate import over
from .fitting import FittedUnit, fit
from .interrupts import Interrupts, leading
from .kept import Kept
from .learner import Learner, schedule
from .measuring import COLLAPSED, Seen
from .methods import objective
from .model import embedder
from .settings import FITTED, PROXIES, Settings, difference, scores

CHECKPOINT, CONFIG, FEATURES = "checkpoint.pt", "config.json", "features"

_Shown = Callable[[str, int, str], AbstractContextManager[Progress]]
"""What makes a bar of what is done, of how many, and what one is called."""


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
        dataset: what to train on, and what to measure on; with ``patience`` some of what it has to train on is held
            out, where it has no validation pictures.
        folder: where checkpoints and TensorBoard logs go; without one nothing is written.
        backbone: any module that makes (n, f) features of pictures, in place of the settings' one.
        features: folder of a frozen backbone's features, if not the run's own.

    Attributes:
        learner: the net and its objective; once training is over, of the chosen step.
        test: the frozen test set.
        validation: the one that a step and thresholds are chosen by, if there is one.
        taken: steps so far.
        saved: the step of the checkpoint in the folder, if one was written or read.
        fitted: whether the unit that is trained afterwards has been.
        leads: whether this is the process that measures and writes, of several.
        curves: lists of ``step``, ``seconds`` (of training), ``loss`` (mean since the point before; None at step 0),
            ``recall`` (Recall@1), ``spread`` and ``effective_rank``; with ``patience`` ``map_at_r``, too, and all of
            them of the validation pictures.
        baselines: what training started from on the test pictures (:func:`.measuring.baselines`).
        thresholds: what parts same from different on the validation pictures (:func:`.measuring.thresholds`).

    Raises:
        ValueError: settings that cannot be trained on this data.
        ModuleNotFoundError: a backbone's package is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        folder: Path | None = None,
        backbone: nn.Module | None = None,
        *,
        features: Path | None = None,
    ) -> None:
        dataset = measuring.prepared(settings, dataset)
        self.settings, self.dataset, self.folder = settings, dataset, folder
        view = dataset.view
        net = embedder(settings, (view.channels, view.size, view.size), backbone)
        classes = len(dataset.train.names)
        unit = FittedUnit(settings, classes) if settings.unit_updates else None
        self.learner = Learner(net, objective(settings, classes), settings, unit)
        if settings.precision == "64-true":
            self.learner.double()  # before a checkpoint is loaded, which float32 would round
        self.optimizer = self.learner.optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(settings))
        self.test = TestSet(dataset, settings.seed)
        selecting = dataset.selecting()
        self.validation = None if selecting is None else TestSet(selecting, settings.seed)
        self.taken, self.seconds, self.leads, self.fitted = 0, 0.0, True, False
        self.saved: int | None = None
        names = ["step", "seconds", "loss", "recall", "spread", "effective_rank"]
        self.curves: dict[str, list[Any]] = {name: [] for name in names + ["map_at_r"] * (settings.patience > 0)}
        self.baselines: dict[str, Any] = {}
        self.thresholds: dict[str, dict[str, float]] = {}
        self._features = folder / FEATURES if features is None and folder is not None else features
        self._train: Split = dataset.train
        self._known: dict[TestSet, Tensor] = {}
        self._best: dict[str, Tensor] = {}
        self._losses = torch.zeros(1, 0)  # of all processes, since the last point: (processes, steps)
        self._states: dict[str, Tensor] = {}
        self._seen: dict[TestSet, tuple[int, Seen]] = {}  # and of which step
        self._restored: dict[str, Any] | None = None

    @property
    def chosen_step(self) -> int | None:
        """The step that the validation pictures choose (:func:`.measuring.chosen`); None without ``patience``."""
        return measuring.chosen(self.curves)

    @property
    def over(self) -> bool:
        """Whether all steps are taken, or ``patience`` is at its end."""
        chosen = self.chosen_step
        waited = 0 if chosen is None else len(self.curves["step"]) - 1 - self.curves["step"].index(chosen)
        return self.taken >= self.settings.steps or 0 < self.settings.patience <= waited

    def train(self, *, progress: bool | None = None) -> None:
        """Train up to ``settings.steps``, measuring, and leaving a checkpoint, every ``settings.every`` steps.

        A first Ctrl-C ends it after the step that it is at (of several processes at the next measurement), or in the
        midst of a measurement; a checkpoint of the step reached is left. A second one ends it at once.

        Args:
            progress: as in :class:`.console.Progress`.

        Raises:
            FloatingPointError: the loss, a parameter, the embedding or a score is not finite.
            KeyboardInterrupt: as said.
            ValueError: the accelerator is not there, or is of another kind than in the run to resume.
        """
        settings = self.settings
        loggers: list[Logger] = []
        if self.folder is not None:
            loggers.append(TensorBoardLogger(self.folder, name="tensorboard", version=""))
        fabric = self._fabric(settings.accelerator, settings.devices, loggers)
        # Before the other processes start, which then find them in the folder.
        self._know(fabric.device, progress if rank_zero_only.rank == 0 else False)  # type: ignore[attr-defined]
        if settings.devices > 1:
            with leading():
                fabric.launch()
        self.leads = fabric.is_global_zero
        learner, optimizer = fabric.setup(self.learner, self.optimizer)
        # Each process draws and distorts for itself.
        generator = torch.Generator(fabric.device).manual_seed(settings.seed + fabric.global_rank)
        torch.manual_seed(settings.seed + fabric.global_rank)
        if self._restored is not None:
            self._restore(fabric, generator)
        self._states = _random_states(fabric, generator)
        show = progress if self.leads else False
        try:
            with Interrupts() as ctrl_c, Progress("training", settings.steps, self.taken, "step", show) as bar:
                bar.expect(settings.every)
                while True:
                    if self._due():
                        self._alone(fabric, ctrl_c, lambda: self._measure(fabric, ctrl_c, bar))
                    if self.over:
                        break
                    stop = self._chunk(fabric, learner, optimizer, generator, bar, ctrl_c)
                    self._states = _random_states(fabric, generator)
                    if stop:
                        self._save(fabric)
                        raise KeyboardInterrupt
                self._alone(fabric, ctrl_c, lambda: self._finish(fabric, ctrl_c, bar))
        finally:
            for logger in fabric.loggers:
                logger.finalize("success")  # or points that are not on disk yet would be lost

    def _alone(self, fabric: Fabric, ctrl_c: Interrupts, work: Callable[[], None]) -> None:
        """Work of the leading process, whose end the others wait for, whichever it is."""
        failure: BaseException | None = None
        if self.leads:
            try:
                work()
            except Exception as error:
                failure = error
            except KeyboardInterrupt as error:
                failure = error
                if not ctrl_c.twice:
                    self._save(fabric)
        if fabric.broadcast(isinstance(failure, KeyboardInterrupt)):
            raise failure or KeyboardInterrupt
        if fabric.broadcast(failure is not None):
            raise failure or FloatingPointError("the leading process has stopped")

    def _fabric(self, accelerator: str, processes: int, loggers: Sequence[Logger]) -> Fabric:
        return devices.fabric(self.settings, accelerator, processes, self.learner.unit is not None, loggers)

    def place(self, accelerator: str | None = None) -> None:
        """Move the learner to an accelerator, the settings' one by default, to measure it without training.

        Raises:
            ValueError: the accelerator is not there.
        """
        self.learner.to(self._fabric(accelerator or self.settings.accelerator, 1, []).device)

    def _know(self, device: torch.device, progress: bool | None) -> None:
        """Compute a frozen backbone's features, where training sees the same picture each time."""
        if not self.settings.freeze or self.settings.augment or self._known:
            return
        self.learner.to(device)
        kept = Kept(self.learner.net, self.dataset, self._features, workers=self.settings.workers, progress=progress)
        self._train = replace(self.dataset.train, pictures=kept.of(self.dataset.train.pictures))
        self._known[self.test] = kept.of_test(self.dataset, self.settings.seed)
        selecting = self.dataset.selecting()
        if self.validation is not None and selecting is not None:
            self._known[self.validation] = kept.of_test(selecting, self.settings.seed)

    def _chunk(
        self,
        fabric: Fabric,
        learner: nn.Module,
        optimizer: Any,
        generator: torch.Generator,
        bar: Progress,
        ctrl_c: Interrupts,
    ) -> bool:
        """Steps up to the next measurement; gives whether they were to end before it."""
        settings, view, alone = self.settings, self.dataset.view, fabric.world_size == 1
        begun = self.taken % settings.every
        count = min(settings.every - begun, settings.steps - self.taken)
        known = self._train is not self.dataset.train
        drawn = batches(
            self._train,
            settings.classes,
            settings.samples,
            (begun + count) * settings.accumulate,  # no more are drawn, however rarely it measures
            seed=(settings.seed * 7919 + self.taken // settings.every * 101 + fabric.global_rank) % 2**32,
            workers=0 if known else settings.workers,
            skip=begun * settings.accumulate,
        )
        losses = torch.zeros(count, device=fabric.device)
        learner.train()
        self.learner.known = known
        start = time.perf_counter()
        done, told = 0, False
        while done < count and not (alone and ctrl_c.asked):
            for part in range(settings.accumulate):
                pictures, labels, rows = (part.to(fabric.device) for part in next(drawn))
                if not known:
                    pictures = view.augment(pictures, generator) if settings.augment else view.plain(pictures)
                with fabric.no_backward_sync(learner, enabled=part < settings.accumulate - 1):  # type: ignore[arg-type]
                    terms = learner(pictures, labels, rows)
                    loss = torch.stack(list(terms.values())).sum() / settings.accumulate
                    fabric.backward(loss)
                losses[done] += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            self.scheduler.step()
            self.taken += 1
            done += 1
            bar.update()
            if ctrl_c.asked and not told and not alone:
                told = True
                bar.report(f"stopping at step {self.taken + count - done}; Ctrl-C again ends at once")
        del drawn
        losses = losses[:done].cpu()  # waits for the device
        self.seconds += time.perf_counter() - start
        gathered = fabric.all_gather(losses).reshape(fabric.world_size, -1).cpu()  # type: ignore[union-attr]
        self._losses = torch.cat([self._losses.expand(fabric.world_size, -1), gathered], dim=1)
        # One process that is to stop stops all, at the same step.
        return bool(fabric.all_gather(torch.tensor(int(ctrl_c.asked))).any())  # type: ignore[union-attr]

    def _due(self) -> bool:
        """Whether a point of the curves is to be measured at the step reached."""
        last = self.curves["step"][-1] if self.curves["step"] else None
        return last != self.taken and (self.taken % self.settings.every == 0 or self.taken == self.settings.steps)

    def _look(self, test: TestSet, shown: _Shown, *, bare: bool = False) -> Seen:
        """What the net makes of a test set now; the last look is remembered."""
        step, seen = self._seen.get(test, (-1, None))
        if seen is None or step != self.taken:
            net, known, workers = self.learner.net, self._known.get(test), self.settings.workers
            with shown("measuring", len(test), "picture") as bar:
                seen = measuring.look(net, test, known, workers=workers, bare=bare, bar=bar)
            self._seen[test] = self.taken, seen
        return seen

    def look(self, *, progress: bool | None = False) -> Seen:
        """What the learner makes of the test set; the last measurement's, if that was of the same weights.

        Args:
            progress: as in :class:`.console.Progress`.
        """
        return self.look_at(self.test, progress=progress)

    def look_at(self, test: TestSet, *, progress: bool | None = False) -> Seen:
        """:meth:`look` at the test set or at the validation one."""
        self._know(next(self.learner.parameters()).device, progress)
        return self._look(test, lambda what, total, unit: Progress(what, total, 0, unit, progress))

    def _measure(self, fabric: Fabric, ctrl_c: Interrupts, bar: Progress) -> None:
        """A point of every curve, logged, and a checkpoint with it; before the first step what it starts from, too."""
        chooses = self.settings.patience > 0 and self.validation is not None
        with ctrl_c.at_once():
            if self.taken == 0:
                self.baselines = measuring.baselines(
                    self._look(self.test, bar.aside, bare=True), self.test, self.settings.seed
                )
            test = self.validation if chooses and self.validation is not None else self.test
            seen = self._look(test, bar.aside)
            loss = None
            if self.taken:
                scaler = getattr(fabric.strategy.precision, "scaler", None)
                measuring.refuse_divergence(self.learner, seen.features, self._losses, self.taken, scaler)
                own = self._losses[0]  # this is the leading process
                loss = own[own.isfinite()].mean().item() if own.numel() else None
            figures = measuring.point(seen, test, self.settings)
        values = {"step": self.taken, "seconds": self.seconds, "loss": loss, **figures}
        was_collapsed = bool(self.curves["spread"]) and self.curves["spread"][-1] < COLLAPSED
        for name, value in values.items():
            self.curves[name].append(value)
        self._losses = torch.zeros(1, 0)
        if chooses and self.chosen_step == self.taken:
            self._best = {name: value.detach().cpu().clone() for name, value in self.learner.state_dict().items()}
        if figures["spread"] < COLLAPSED and not was_collapsed:
            measuring.warn_of_collapse(self.taken, figures, self.settings.dim)
        kind = "validation" if chooses else ""
        logged = {f"{kind}/{name}" if kind and name in figures else name: v for name, v in values.items()}
        fabric.log_dict({name: value for name, value in logged.items() if value is not None}, self.taken)
        if self.taken:
            self._save(fabric)
        said = "" if loss is None else f", loss {loss:.3g}"
        bar.report(f"{kind} R@1 {figures['recall']:.1%}{said}".strip())

    def _finish(self, fabric: Fabric, ctrl_c: Interrupts, bar: Progress) -> None:
        """Put the best step's weights in, train a unit on what they make, if one is to be, and choose thresholds by the
        validation pictures, where there are some."""
        if self.learner.fitted is not None and not self.fitted:
            with ctrl_c.at_once():
                self._fit(self.learner.fitted, bar)
            self._save(fabric)
        if self.validation is not None and not self.thresholds:
            with ctrl_c.at_once(), self._chosen():
                self.thresholds = measuring.thresholds(
                    self._look(self.validation, bar.aside), self.validation, self.learner
                )
            self._save(fabric)
        self.choose()

    def _fit(self, fitted: FittedUnit, bar: Progress) -> None:
        settings, train = self.settings, self._train
        net, known = self.learner.net, train is not self.dataset.train

        def call(lot: Tensor) -> list[Tensor]:
            return [F.normalize(net.project(lot)[0] if known else net(self.dataset.view.plain(lot).to(lot)), dim=1)]

        with self._chosen(), bar.aside("embedding", len(train.labels), "picture") as shown:
            (features,) = over(train.pictures, call, net, 0 if known else settings.workers, shown)
        features = (features if features.dtype == torch.float64 else features.float()).to(fitted.cosine.device)
        steps, labels = settings.unit_updates, train.labels.to(features.device)
        rows = replace(train, pictures=features)
        drawn = batches(rows, settings.classes, settings.samples, steps, seed=(settings.seed * 7919 + 7) % 2**32)
        with bar.aside("training the unit", steps, "step") as shown:
            for _ in fit(fitted, features, labels, drawn, settings, fall_back=self._falls_back):
                shown.update()
        if self._best:
            self._best |= {name: value.detach().cpu().clone() for name, value in self._of_unit().items()}
        self.fitted = True
        bar.report(f"a PDDM unit trained in {steps} steps of its own")

    @property
    def _falls_back(self) -> bool:
        unseen = self.dataset.protocol == "unseen"
        return unseen if self.settings.unit_fallback == "own" else self.settings.unit_fallback == "distance"

    def _of_unit(self) -> dict[str, Tensor]:
        """Weights of the unit that is trained afterwards."""
        return {name: value for name, value in self.learner.state_dict().items() if name.startswith("fitted.")}

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """The chosen step's weights meanwhile."""
        last = {name: value.clone() for name, value in self.learner.state_dict().items()} if self._best else {}
        try:
            self.choose()
            yield
        finally:
            if last and self.chosen_step != self.taken:
                self.learner.load_state_dict(last)
                self._seen.clear()

    def choose(self) -> None:
        """Put in the weights of the chosen step, where validation pictures have chosen one."""
        if self._best and self.chosen_step != self.taken:
            self.learner.load_state_dict(self._best)
            self._seen.clear()

    def _save(self, fabric: Fabric) -> None:
        if self.folder is None or not self.leads or self.taken == 0:
            return
        checkpoint.save(
            self.folder / CHECKPOINT,
            {
                "settings": asdict(self.settings),
                "data": measuring.sides(self.dataset),
                "taken": self.taken,
                "seconds": self.seconds,
                "curves": self.curves,
                "losses": self._losses,
                "generators": self._states,
                "learner": self.learner.state_dict(),
                "best": self._best,
                "view": described(self.dataset.view) or {},
                "names": list(self.dataset.train.names),
                "baselines": self.baselines,
                "thresholds": self.thresholds,
                "fitted": self.fitted,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
            },
        )
        self.saved = self.taken

    def resume(self, path: Path | None = None, *, accept_changed_data: bool = False) -> list[str]:
        """Continue from a checkpoint of the same settings and data.

        ``steps`` may be larger under a constant schedule, ``patience`` another, and so what makes the unit that is
        trained afterwards, which then is anew.

        Args:
            path: the checkpoint; without one, the folder's.
            accept_changed_data: whether pictures may have come, gone or changed since.

        Returns:
            Which sides of the data have changed, in words.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged, or of other settings or data; the message names the option.
        """
        if path is None:
            assert self.folder is not None, "a run without a folder has no checkpoint"
            path = self.folder / CHECKPOINT
        state = checkpoint.load(path)
        self._refuse_others(path, state)
        changed = measuring.changes(state["data"], measuring.sides(self.dataset))
        if changed and not accept_changed_data:
            raise ValueError(
                f"{path}: the run to resume saw other pictures than --data {self.dataset.name} has now: "
                f"{'; '.join(changed)}; put them back, or go on with those of now by --accept-changed-data"
            )
        refit = bool(changed) or not state["fitted"] or self._other_unit(state["settings"])
        for name in ("learner", "best"):
            kept = {key: value for key, value in state[name].items() if not key.startswith("fitted.")}
            # Made anew, it may be of another width, for another number of classes.
            state[name] = kept | self._of_unit() if state[name] and refit else state[name]
        try:
            self.learner.load_state_dict(state["learner"])
        except RuntimeError as error:
            raise ValueError(f"{path}: its weights do not fit the net; {error}") from error
        self.taken, self.seconds, self.curves = state["taken"], state["seconds"], state["curves"]
        self.saved, self.baselines, self._losses, self._best = (
            self.taken,
            state["baselines"],
            state["losses"],
            state["best"],
        )
        # Of a run that goes on both are made anew.
        self.fitted = self.learner.fitted is not None and self.over and not refit
        known = self.over and not changed and self.fitted == (self.learner.fitted is not None)
        self.thresholds = state["thresholds"] if known else {}
        self._restored = state
        self._seen.clear()
        return changed

    def _other_unit(self, before: Mapping[str, Any]) -> bool:
        """Whether the unit that is trained afterwards was to be another one."""
        return any(before.get(name) != getattr(self.settings, name) for name in ("unit_steps", *FITTED))

    def _refuse_others(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, or that no run has left."""
        settings, taken = self.settings, state["taken"]
        # A cosine ends where the steps do. How long to wait for a better step changes none that was taken.
        free = ("steps",) * (settings.schedule == "constant")
        free += ("patience",) * (settings.patience > 0 and bool(state["settings"].get("patience")))
        if not scores(settings.method):
            free += ("unit_steps", *FITTED)  # of what is trained when all else is
        changed = difference(state["settings"], settings, but=free)
        if changed:
            raise ValueError(
                f"{path}: {changed}, where the run is to be resumed; leave it as it was, or begin another run in "
                f"another --out"
            )
        if taken > settings.steps:
            raise ValueError(f"{path}: the run to resume has taken {taken} steps; --steps is {settings.steps}")
        if state["curves"].keys() != self.curves.keys():
            raise ValueError(f"{path}: damaged; its steps or curves are none that a run has")
        if state["names"] != list(self.dataset.train.names) and settings.method in PROXIES:
            raise ValueError(
                f"{path}: its proxies are of other classes than --data {self.dataset.name} has to train on now; "
                f"begin another run in another --out"
            )

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
