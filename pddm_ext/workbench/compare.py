"""A grid of methods and seeds on one data set: each cell a run in a folder of its own, none ever lost or run again."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pddm_ext.quadruplets import Quadruplets

from . import backbones, devices, outcome
from .checkpoint import claimed, write_bytes
from .console import Progress, brief_warnings
from .data import scan
from .data.augment import Photographs
from .data.load import load
from .data.photos import without
from .data.splits import Dataset, batches
from .interrupts import uninterrupted
from .loop import CHECKPOINT, CONFIG, FEATURES, Run
from .measuring import prepared
from .methods import Quadruplet, objective
from .model import embedder
from .outcome import raw_pixels
from .report.pictures import Examples, Shown
from .settings import FITTED, METHODS, Settings, difference, parse, read, scores, unused, written

#: The sweep's runs have seeds of their own, so that no final run was looked at before.
_SWEEP_SEED = 1000

#: What no method has to itself: the grid decides these.
_OF_DATA = ("data", "root", "split", "gallery", "skip_unreadable", "download")
_COMMON = ("method", "seed", *_OF_DATA)

#: So many methods are shown in pictures, for the page to stay small.
_SHOWN = 4


@dataclass(frozen=True)
class Cell:
    """One run of the grid: what to do, where, where the features of frozen backbones are kept, and in which fold of
    validation classes, if it chooses a setting."""

    label: str
    settings: Settings
    folder: Path
    features: Path | None = None
    fold: int | None = None


def method(text: str, common: Settings) -> Settings:
    """A method of the grid: ``NAME`` or ``NAME:setting=value,...``, the rest as in ``common``.

    Raises:
        ValueError: no such method or setting, or a value it does not take.
    """
    name, _, changes = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"--methods has {name!r}; {', '.join(METHODS)} are accepted")
    types: dict[str, Any] = {setting.name: type(setting.default) for setting in fields(Settings)}
    given: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key in _COMMON:
            raise ValueError(f"--methods {text}: {key} is not a method's own; give {', '.join(_COMMON)} for all")
        kind = types.get(key, str)
        try:
            given[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            given[key] = value
    idle = sorted(given.keys() & unused(name))
    if idle:
        raise ValueError(f"--methods {text}: {name} does not use {', '.join(idle)}")
    # What all share and this one does not use is no setting of it.
    own = {setting.name: setting.default for setting in fields(Settings) if setting.name in unused(name)}
    settings = replace(common, method=name, **{**own, **parse(given, f"--methods {text}")})
    for key, term in (("density_ratio", "density"), ("clusters", "structure"), ("centres", "structure")):
        if key in given and not getattr(settings, term):
            raise ValueError(f"--methods {text}: {key} does nothing without {term}")
    idle = sorted(given.keys() & FITTED)
    if idle and not (settings.unit_updates or scores(name)):
        raise ValueError(f"--methods {text}: {idle[0]} does nothing without unit_steps")
    if "backbone_lr_factor" in given and settings.freeze:
        raise ValueError(f"--methods {text}: backbone_lr_factor does nothing with freeze")
    return settings


class Grid:
    """Methods × seeds, each method at the learning rate that does best on validation classes.

    Args:
        common: the settings that cells share.
        methods: texts that :func:`method` reads; each is its own label.
        seeds: of the runs that count.
        folder: of everything; cells that finished there before are taken as they are.
        lrs: learning rates to try; with none or one nothing is tried.
        tries: runs for each learning rate that is tried, each on another fold of validation classes.

    Raises:
        ValueError: a method that does not exist or appears twice, or too few seeds.
    """

    def __init__(
        self,
        common: Settings,
        methods: Sequence[str],
        seeds: Sequence[int],
        folder: Path,
        lrs: Sequence[float] = (),
        tries: int = 1,
    ) -> None:
        if not methods or not seeds or tries < 1:
            raise ValueError("--methods and --seeds have to name something, and --tries is at least 1")
        for name, listed in (("--methods", methods), ("--seeds", seeds), ("--lrs", lrs)):
            if len(set(listed)) < len(listed):
                raise ValueError(f"{name} lists something twice: {', '.join(map(str, listed))}")
        self.folder, self.seeds, self.lrs, self.tries = folder, list(seeds), list(lrs), tries
        self.methods = {text: method(text, common) for text in methods}
        for text, settings in self.methods.items():
            if settings.devices > 1:
                raise ValueError(f"--devices is {settings.devices}; each run of a comparison has 1, see --jobs")
            for lr in self.lrs:
                replace(settings, lr=lr)  # refuses one that cannot be trained with
            if self.lrs and "lr=" in text:
                raise ValueError(f"--methods {text} has its own lr, and --lrs would choose another")

    def tuning(self) -> list[Cell]:
        """Runs that choose the learning rates."""
        if len(self.lrs) < 2:
            return []
        return [
            Cell(
                f"{text} lr={lr:g}",
                replace(settings.first_stage, lr=lr, seed=_SWEEP_SEED + attempt),
                self.folder / "tuning" / _safe(text) / f"lr-{lr:g}" / f"seed-{_SWEEP_SEED + attempt}",
                self.folder / FEATURES,
                fold=attempt,
            )
            for text, settings in self.methods.items()
            for lr in self.lrs
            for attempt in range(self.tries)
        ]

    def chosen(self) -> dict[str, float]:
        """Each method's learning rate: the highest mean MAP@R on validation classes, once :meth:`tuning` is done."""
        if not self.lrs:
            return {text: settings.lr for text, settings in self.methods.items()}
        if len(self.lrs) == 1:
            return dict.fromkeys(self.methods, self.lrs[0])
        sums: dict[str, dict[float, float]] = {text: dict.fromkeys(self.lrs, 0.0) for text in self.methods}
        for cell in self.tuning():
            metrics = finished(cell)
            value = 0.0 if metrics is None else metrics["results"]["distance"]["map_at_r"]["value"]
            sums[cell.label.rpartition(" ")[0]][cell.settings.lr] += value
        return {text: max(by_lr, key=lambda lr: by_lr[lr]) for text, by_lr in sums.items()}

    def cells(self) -> list[Cell]:
        """The runs that count."""
        lrs = self.chosen()
        return [
            Cell(
                text,
                replace(settings, lr=lrs[text], seed=seed),
                self._folder(text, seed),
                self.folder / FEATURES,
            )
            for seed in self.seeds
            for text, settings in self.methods.items()
        ]

    def check(self) -> None:
        """Refuse, before any run, what some run of the grid would come to.

        Raises:
            FileNotFoundError, ModuleNotFoundError, ValueError: as :meth:`run`, or a backbone, an accelerator, classes
                or pictures that a run needs and that are not there; the message names the option.
        """
        tuning = self.tuning()
        for cell in tuning:
            _refuse_another(cell)
        for text, settings in self.methods.items():
            lr = self.lrs[0] if len(self.lrs) == 1 else settings.lr
            for seed in self.seeds:
                # What is yet to be chosen is no difference.
                cell = Cell(text, replace(settings, seed=seed, lr=lr), self._folder(text, seed))
                _refuse_another(cell, but=("lr",) * bool(tuning))
        built = set()
        for settings in self.methods.values():
            whole = _dataset(replace(settings, seed=self.seeds[0]))
            folds = (_SWEEP_SEED + attempt for attempt in range(self.tries if tuning else 0))
            for dataset in (whole, *(_dataset(replace(settings, seed=f)).validation(f - _SWEEP_SEED) for f in folds)):
                train = prepared(settings, dataset).train
                scored = settings.unit_updates > 0 or objective(settings, len(train.names)).unit is not None
            view = whole.view
            net = (settings.backbone, settings.pretrained, view.size, settings.dim, settings.structure > 0)
            if net not in built:
                embedder(settings, (view.channels, view.size, view.size))
                built.add(net)
            devices.fabric(settings, settings.accelerator, 1, scored)

    def _folder(self, text: str, seed: int) -> Path:
        return self.folder / "cells" / _safe(text) / f"seed-{seed}"

    def run(self, jobs: int, *, progress: bool | None = None) -> dict[str, list[dict[str, Any]]]:
        """Run what is not there yet, ``jobs`` cells at a time, and give each label's metrics in the order of seeds.

        Args:
            jobs: how many.
            progress: as in :class:`.console.Progress`.

        Raises:
            FileNotFoundError: the data are not there.
            ValueError: the data or a cell in the folder are damaged, or the cell has other settings.
            FloatingPointError: a run that counts diverged.
        """
        self.check()
        first = next(iter(self.methods.values()))
        # Fetched and looked at once, and refused before any run if it is no good.
        _LEFT_OUT.clear()
        _TOLD.clear()
        dataset, lost = scan.examined(_dataset(first), skip=first.skip_unreadable, progress=progress)
        _LEFT_OUT.update(lost)
        _TOLD.extend(dataset.notes)
        scan.tell(dataset)
        if lost:
            self.check()  # of what is left
        _run_all(self.tuning(), jobs, "choosing learning rates", progress)
        cells = self.cells()
        _run_all(cells, jobs, "training", progress)
        results: dict[str, list[dict[str, Any]]] = {text: [] for text in self.methods}
        for cell in cells:
            metrics = finished(cell)
            assert metrics is not None
            results[cell.label].append(metrics)
        return results


def finished(cell: Cell) -> dict[str, Any] | None:
    """The metrics of a finished cell, None of any other.

    Raises:
        ValueError: it was run with other settings, or is damaged.
    """
    metrics = outcome.read(cell.folder)
    if metrics is None:
        return None
    changed = difference(metrics["settings"], cell.settings)
    if changed:
        raise ValueError(f"{cell.folder}: {changed}; choose another --out")
    return metrics


def _refuse_another(cell: Cell, but: tuple[str, ...] = ()) -> None:
    """Refuse a folder that holds a run of other settings than the cell's, finished or not."""
    metrics = outcome.read(cell.folder)
    config = cell.folder / CONFIG
    before = read(config) if metrics is None and config.exists() else (metrics or {}).get("settings")
    if before is None:
        return
    # One that has not finished may go on to more steps, where its first ones are the same.
    longer = ("steps",) * (metrics is None and cell.settings.schedule == "constant")
    changed = difference(before, cell.settings, but + longer)
    if changed:
        raise ValueError(f"{cell.folder}: {changed}; choose another --out")


def _dataset(settings: Settings) -> Dataset:
    """The settings' data, loaded once for all runs that see them alike."""
    own = {name: getattr(settings, name) for name in _OF_DATA}
    seed = settings.seed if settings.split == "random" else 0
    dataset = _loaded(Settings(seed=seed, **own), backbones.view(settings), frozenset(_LEFT_OUT))
    # Another seed's half of the classes was not looked at.
    return dataset if settings.split == "random" else replace(dataset, notes=tuple(_TOLD) or dataset.notes)


#: Pictures that cannot be read, and what is to be known of the others: the grid was told when it began, and the
#: processes of its runs are told in turn.
_LEFT_OUT: set[str] = set()
_TOLD: list[str] = []


@functools.lru_cache(4)
def _loaded(settings: Settings, view: Photographs, lost: frozenset[str]) -> Dataset:
    return without(load(settings, view), lost)


def run_cell(cell: Cell, threads: int) -> None:
    """Train one cell, from its checkpoint if it has one, and write what it leaves behind."""
    torch.set_num_threads(threads)
    dataset = _dataset(cell.settings)
    dataset = dataset if cell.fold is None else dataset.validation(cell.fold)
    run = Run(cell.settings, dataset, cell.folder, features=cell.features)
    with claimed(cell.folder), brief_warnings(f"{cell.label}, seed {cell.settings.seed}: "):
        if finished(cell) is not None:
            return  # by another process meanwhile
        if (cell.folder / CHECKPOINT).exists():
            run.resume()
        write_bytes(cell.folder / CONFIG, written(cell.settings))
        try:
            run.train(progress=False)
            metrics = outcome.figures(run)
        except FloatingPointError as error:
            if cell.fold is None:
                raise FloatingPointError(f"{cell.label}, seed {cell.settings.seed}: {error}") from error
            # A learning rate that diverges has been tried, and lost.
            metrics = _diverged(cell.settings)
        outcome.write(cell.folder, metrics)


def _diverged(settings: Settings) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "curves": {},
        "results": {"distance": {"map_at_r": {"value": 0.0}}},
        "diverged": True,
    }


def _run_all(cells: list[Cell], jobs: int, what: str, progress: bool | None) -> None:
    left = [cell for cell in cells if finished(cell) is None]
    if not left:
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with Progress(what, len(cells), len(cells) - len(left), "run", progress) as bar:
        for cell in _each(left, jobs, threads):
            bar.update()
            bar.report(f"{cell.label} seed {cell.settings.seed}")


def _each(cells: list[Cell], jobs: int, threads: int) -> Iterator[Cell]:
    # Processes of their own even for one job: threads and warnings of a run do not outlive it.
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(multiprocessing.get_start_method(), frozenset(_LEFT_OUT), tuple(_TOLD)),
    )
    others = multiprocessing.active_children()
    try:
        # No more than are running: what waits in the pool can no longer be called off.
        waiting, futures = iter(cells), dict[Future[None], Cell]()
        while True:
            for cell in itertools.islice(waiting, jobs - len(futures)):
                with uninterrupted():
                    futures[pool.submit(run_cell, cell, threads)] = cell
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                future.result()
                yield futures.pop(future)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    except BrokenProcessPool as error:
        raise OSError(
            "the process of a run has been killed; too little memory, perhaps, for --jobs at a time"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: str, lost: frozenset[str] = frozenset(), told: tuple[str, ...] = ()) -> None:
    """What a process of the grid does first."""
    _LEFT_OUT.update(lost)
    _TOLD.extend(told)
    # Loaders start their workers as they do in a run by itself; spawned ones would take seconds each time.
    multiprocessing.set_start_method(start, force=True)
    signal.signal(signal.SIGTERM, _end)
    # Nobody would stop it, nor hear of what it does, if the process that started it were killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(_: int, frame: FrameType | None) -> None:
    """As Ctrl-C, which is blocked here: a run under way leaves a checkpoint of its step."""
    hear = signal.getsignal(signal.SIGINT)
    try:
        if callable(hear):
            hear(signal.SIGINT, frame)
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def examples(grid: Grid) -> tuple[Examples, dict[str, Any]]:
    """Pictures of the first methods, trained with the first seed, and the retrieval figures of raw pixels."""
    cells = [cell for cell in grid.cells() if cell.settings.seed == grid.seeds[0]][:_SHOWN]
    runs = {cell.label: Run(cell.settings, _dataset(cell.settings), features=cell.features) for cell in cells}
    dataset = next(iter(runs.values())).dataset
    first = next(iter(runs.values()))
    settings, view = first.settings, dataset.view
    stored, labels, _ = next(batches(dataset.train, settings.classes, settings.samples, 1, seed=_SWEEP_SEED))
    batch = view.augment(stored, torch.Generator().manual_seed(_SWEEP_SEED)) if settings.augment else view.plain(stored)
    shown = {}
    for cell in cells:
        run = runs[cell.label]
        run.resume(cell.folder / CHECKPOINT)
        run.choose()
        run.place()
        features = run.look().features
        quadruplets = None
        if isinstance(run.learner.objective, Quadruplet) and run.dataset.view == view:
            with torch.no_grad():
                net = run.learner.net.eval()
                weight = next(net.parameters())
                mined = run.learner.objective.mine(net(batch.to(weight)), labels.to(weight.device))
                quadruplets = Quadruplets(*(field.cpu() for field in mined))
        shown[cell.label] = Shown(features, run.learner.similarity, quadruplets, run.learner.objective.unit is not None)
    classes = [dataset.train.names[c] for c in labels.tolist()]
    return Examples(settings.seed, first.test, batch, shown, classes), raw_pixels(first.test, settings.seed)


def _safe(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-.=," else "_" for c in label)
