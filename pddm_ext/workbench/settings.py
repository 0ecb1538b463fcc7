"""What a run's numbers depend on. Imports no training extra, so that the command line can show its defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pddm_ext._numbers import number
from pddm_ext.quadruplets import MODES

DRAWINGS = ("glyphs", "omniglot")
DATA = (*DRAWINGS, "cub200", "cars196", "sop", "in-shop", "grocery", "folder")
SPLITS = ("half", "random", "none", "known", "unseen")
GALLERIES = ("train", "catalogue")
METHODS = (
    "recommended",
    "joint",
    *(f"pddm-{mode}" for mode in MODES),
    *(f"euclidean-{mode}" for mode in MODES),
    "triplet-hard",
    "triplet-semihard",
    "triplet-all",
    "n-pair",
    "contrastive",
    "multi-similarity",
    "multi-similarity-mined",
    "sup-con",
    "proxy-anchor",
    "norm-softmax",
    "sub-center-arcface",
)
#: Methods whose classes have proxies, parameters of their own.
PROXIES = ("proxy-anchor", "norm-softmax", "sub-center-arcface")
FALLBACKS = ("own", "distance", "none")
STARTS = ("own", "random", "distance", "classes")
OVER = ("pairs", "all")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")

#: Adam divides a rate by numbers below 1, and float32, in which it does, ends at 3e38.
_LARGEST_RATE = 1e30
#: More processes than any machine reads pictures with, and few enough for one to start.
WORKERS = 1024


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """The options of ``pddm-ext train``, by their names there; ``config.json`` of a run holds them all.

    Raises:
        ValueError: a value that cannot be trained with; the message names the option.
    """

    data: str = _setting("glyphs", "what to train on", DATA)
    root: str = _setting("", "folder or archive of the data; glyphs have none")
    split: str = _setting(
        "half",
        "of a folder without test: half of the classes by name, half of them drawn by the seed, or none held out; "
        "also of drawings, cub200, cars196 and sop: known, which searches for the last fifth of each class's "
        "pictures; of grocery: unseen, every second class",
        SPLITS,
    )
    gallery: str = _setting("train", "grocery: what test photographs are searched among", GALLERIES)
    skip_unreadable: bool = _setting(False, "leave out pictures that cannot be read, where they would end the run")
    download: bool = _setting(False, "fetch cub200, cars196 or sop into --root first")
    method: str = _setting("pddm-anchor", "what picks and weighs the pairs of a batch", METHODS)
    steps: int = _setting(600, "updates")
    classes: int = _setting(16, "classes in a batch")
    samples: int = _setting(4, "samples of a class in a batch")
    accumulate: int = _setting(1, "batches per update; each mines for itself")
    train_share: float = _setting(1.0, "share of each class's training pictures that is trained on, and two at least")
    label_noise: float = _setting(0.0, "share of the training pictures that is trained on under another class")
    augment: bool = _setting(True, "distort the training pictures")
    backbone: str = _setting(
        "convnet", "convnet, efficientnet-lite0, timm/NAME, torchvision/NAME, or MODULE:CALLABLE of yours"
    )
    pretrained: bool = _setting(
        False, "start timm and torchvision backbones from their published weights; efficientnet-lite0 always does"
    )
    picture: int = _setting(0, "side of what the backbone sees, in pixels; 0 is its own")
    freeze: bool = _setting(False, "leave the backbone as it is, BatchNorm's statistics included")
    dim: int = _setting(64, "length of a feature")
    lr: float = _setting(1e-3, "learning rate of Adam")
    unit_lr_factor: float = _setting(1.0, "the PDDM unit's learning rate over --lr")
    backbone_lr_factor: float = _setting(1.0, "the backbone's learning rate over --lr; the paper's is 0.1")
    proxy_lr_factor: float = _setting(100.0, "learning rate over --lr of the proxies of losses that have some")
    weight_decay: float = _setting(5e-4, "L2 penalty of Adam")
    schedule: str = _setting("constant", "of the learning rate over --steps", SCHEDULES)
    warmup: int = _setting(0, "updates over which the learning rate rises to its value, in equal parts")
    unit_start: str = _setting(
        "own",
        "the PDDM unit's initial weights: random, such that it ranks by distance, or such that it knows the classes "
        "(recommended and --unit-steps, whose own they are; those of pddm are random)",
        STARTS,
    )
    unit_steps: int = _setting(
        0,
        "updates that train a PDDM unit afterwards, on the frozen embedding, for a method without one; 0 is 1500 for "
        "recommended, and no unit for others",
    )
    unit_width: int = _setting(0, "with --unit-steps: length of the unit's layers; 0 has room for each class")
    unit_noise: float = _setting(
        0.0,
        "with --unit-steps: length of the noise that is added to a feature, over its own; 0 is 0.3, and 1 where the "
        "score falls back",
    )
    unit_fallback: str = _setting(
        "own",
        "with --unit-steps: what the score falls back to where the unit knows neither picture: the distance, or none; "
        "own is the distance where the data search for classes that are not trained on",
        FALLBACKS,
    )
    unit_gradient: bool = _setting(True, "PDDM: let the score loss train the embedding, too")
    candidates: int = _setting(0, "PDDM: score only each row's so many nearest of other classes; 0 scores all")
    bank: int = _setting(
        0,
        "PDDM and --unit-steps: mine among the newest so many pictures of this and earlier batches; -1 is this one's, "
        "and 0 is 256 for a unit that is trained afterwards, and this one's otherwise",
    )
    gather: bool = _setting(False, "PDDM: with several --devices, mine the batches of all together")
    distance_steps: int = _setting(0, "PDDM: first updates whose quadruplets are mined by distance")
    alpha: float = _setting(0.5, "PDDM: margin of the scores")
    beta: float = _setting(1.0, "quadruplets: margin of the squared distances")
    weight: float = _setting(0.5, "PDDM: weight of the embedding loss beside the score loss")
    margin: float = _setting(0.2, "triplet methods: margin of the distances")
    density: float = _setting(0.0, "any method: weight of the density regularizer beside its loss; 0 is without")
    density_ratio: float = _setting(0.5, "extent of a class that the density regularizer aims at, over its room")
    structure: float = _setting(
        0.0, "any method: weight of the multi-cluster ranking loss, which trains a structure head"
    )
    clusters: int = _setting(2, "centres of the multi-cluster ranking loss")
    centres: str = _setting(
        "pairs", "what these are taken from: distances of pairs, or all, those of rows from themselves too", OVER
    )
    precision: str = _setting("32-true", "arithmetic, by Lightning Fabric's names", PRECISIONS)
    accelerator: str = _setting(
        "auto", "device kind, by Lightning Fabric's names: cpu, cuda, ...; auto is one that PDDM can score on"
    )
    devices: int = _setting(1, "processes, one for each device; each mines its own batch, or see --gather")
    workers: int = _setting(
        0, "processes that read pictures, at most one for each batch; 0 reads in the training process"
    )
    seed: int = _setting(0, "of weights, batches and the test set")
    every: int = _setting(50, "evaluate and checkpoint every so many updates")
    patience: int = _setting(
        0,
        "stop after so many evaluations on validation pictures without a better one, and keep the best; 0 is without",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{option(setting.name)} is {value!r}; {', '.join(choices)} are accepted")
        least = {
            -1: ("bank",),
            0: (
                "picture",
                "warmup",
                "candidates",
                "distance_steps",
                "unit_steps",
                "unit_width",
                "workers",
                "seed",
                "patience",
            ),
            1: ("steps", "accumulate", "dim", "devices", "every"),
            2: ("classes", "samples", "clusters"),
        }
        for bound, names in least.items():
            for name in names:
                if getattr(self, name) < bound:
                    raise ValueError(f"{option(name)} is {getattr(self, name)}; at least {bound} is accepted")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if type(value) is int and setting.name != "seed" and value >= 2**31:
                raise ValueError(f"{option(setting.name)} is {value}; less than 2**31 is accepted")
        if self.workers > WORKERS:
            raise ValueError(f"--workers is {self.workers}; at most {WORKERS} is accepted")
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}; less than 2**32 is accepted")
        factors = ("unit_lr_factor", "backbone_lr_factor", "proxy_lr_factor")
        for name in ("lr", *factors, "density_ratio"):
            number(option(name), getattr(self, name), "a positive finite number")
        used = ["lr", *(name for name in factors if name != "proxy_lr_factor" or self.method in PROXIES)]
        for name, rate in ((name, self.lr * (1 if name == "lr" else getattr(self, name))) for name in used):
            if rate > _LARGEST_RATE:
                raise ValueError(f"{option(name)} makes a learning rate of {rate}; at most {_LARGEST_RATE} is accepted")
        nonnegative = ("weight_decay", "alpha", "beta", "weight", "margin", "density", "structure")
        for name in (*nonnegative, "unit_noise", "label_noise"):
            number(option(name), getattr(self, name), "a finite number from 0")
        if self.weight_decay > _LARGEST_RATE:
            raise ValueError(f"--weight-decay is {self.weight_decay}; at most {_LARGEST_RATE} is accepted")
        if not 0 < self.train_share <= 1:
            raise ValueError(f"--train-share is {self.train_share}; above 0, and at most 1, is accepted")
        if self.label_noise >= 1:
            raise ValueError(f"--label-noise is {self.label_noise}; from 0 to below 1 is accepted")
        if self.gather and self.devices == 1:
            raise ValueError("--gather is for several --devices; 1 has nothing to gather")
        for beside in ("gather", "bank"):
            for name in ("candidates", "distance_steps"):
                if getattr(self, beside) > 0 and getattr(self, name):
                    raise ValueError(
                        f"{option(name)} is {getattr(self, name)} beside {option(beside)}; with it 0 is accepted"
                    )
        if 0 < self.bank < self._mined:
            raise ValueError(
                f"--bank is {self.bank}; a batch has {self._mined} pictures, and -1, 0 or at least as many are accepted"
            )
        if self.unit_width == 1:
            raise ValueError("--unit-width is 1; 0 or at least 2 is accepted")
        if self.pretrained and not self.backbone.startswith(("timm/", "torchvision/", "efficientnet-lite0")):
            raise ValueError(
                f"--pretrained is for backbones with published weights (timm, torchvision, efficientnet-lite0); "
                f"--backbone is {self.backbone}"
            )
        if self.picture and self.data in DRAWINGS:
            raise ValueError(f"--picture is {self.picture}; --data {self.data} is drawings, of one size")
        if (self.root == "") != (self.data == "glyphs"):
            raise ValueError(f"--data {self.data} {'has no' if self.root else 'needs'} --root, where its files are")

    @property
    def unit_updates(self) -> int:
        """How many updates train a unit on the frozen embedding; 0 where none is trained afterwards."""
        return 0 if scores(self.method) else self.unit_steps or 1500 * (self.method == "recommended")

    @property
    def _mined(self) -> int:
        """Pictures of one step that a bank takes in."""
        return self.classes * self.samples * (self.devices if scores(self.method) else 1)

    @property
    def bank_rows(self) -> int:
        """Pictures that a memory bank holds; 0 is no bank."""
        own = max(_OWN_BANK, self._mined) if self.unit_updates else 0
        return max(self.bank, 0) or (0 if self.bank else own)

    @property
    def first_stage(self) -> Settings:
        """Those that train the same embedding, and no unit afterwards."""
        method = "multi-similarity" if self.method == "recommended" else self.method
        own: dict[str, Any] = {s.name: s.default for s in fields(self) if s.name in {"unit_steps", *FITTED}}
        return replace(self, method=method, **own) if self.unit_updates else self

    def idle(self) -> set[str]:
        """The settings that do nothing for the method."""
        return unused(self.method) | (set() if self.unit_updates or scores(self.method) else FITTED)


def scores(method: str) -> bool:
    """Whether a method trains a PDDM unit together with the embedding."""
    return method == "joint" or method.startswith("pddm")


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


#: Pictures in the bank of a unit that is trained afterwards: more bring little (docs/results.md).
_OWN_BANK = 256
_SCORED = {"unit_lr_factor", "unit_gradient", "candidates", "bank", "gather", "distance_steps", "alpha"}
#: Of a unit that is trained afterwards, beside its number of updates.
FITTED = {"unit_start", "unit_width", "unit_noise", "unit_fallback", "bank", "alpha"}
_PARTICULAR = _SCORED | FITTED | {"unit_steps", "beta", "weight", "margin", "proxy_lr_factor"}


def unused(method: str) -> set[str]:
    """The settings that are for other methods than this one."""
    if method == "joint":
        return _PARTICULAR - _SCORED
    if method.startswith("pddm"):
        return _PARTICULAR - _SCORED - {"unit_start", "beta", "weight"}
    own = {"unit_steps", *FITTED}
    if method.startswith("triplet"):
        own.add("margin")
    if method.startswith("euclidean"):
        own.add("beta")
    if method in PROXIES:
        own.add("proxy_lr_factor")
    return _PARTICULAR - own


def parse(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by name, checked to be settings and of their types; an int serves as a float.

    Raises:
        ValueError: an unknown name or a value of another type; the message names it and ``where`` it stands.
    """
    known = {setting.name: type(setting.default) for setting in fields(Settings)}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where}: {name!r} is no setting; {', '.join(known)} are")
        if known[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not known[name]:
            raise ValueError(f"{where}: {name} is {value!r}; a value of type {known[name].__name__} is accepted")
        values[name] = value
    return values


def read(path: Path) -> dict[str, Any]:
    """The settings in a JSON file such as a run's ``config.json``; those it leaves out keep their defaults.

    Raises:
        ValueError: not a JSON object of settings.
        OSError: not readable.
    """
    try:
        given = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OSError(f"--config is {path} ({error.strerror}); a file of settings is accepted") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: not a JSON object of settings")
    return parse(given, str(path))


#: Where and how fast pictures are read does not change what is computed.
_INDIFFERENT = ("root", "download", "workers", "skip_unreadable")


def difference(before: Mapping[str, Any], now: Settings, but: tuple[str, ...] = ()) -> str:
    """The first setting that was another in an earlier run, as ``--name was X and is Y now``; empty if none was.

    What the earlier run did not know had its default. What does nothing for the method is no difference.
    """
    indifferent = {*_INDIFFERENT, *but, *now.idle()}
    for setting in fields(Settings):
        was, value = before.get(setting.name, setting.default), getattr(now, setting.name)
        if was != value and setting.name not in indifferent:
            return f"{option(setting.name)} was {was} and is {value} now"
    return ""


def written(settings: Settings) -> bytes:
    """The content of ``config.json``."""
    return (json.dumps(asdict(settings), indent=1) + "\n").encode()
