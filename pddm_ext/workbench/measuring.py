"""What is looked at while a run trains: points of its curves, what it started from, and signs that it goes wrong."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .console import Progress
from .data.splits import Dataset, Split, TestSet
from .evaluation.evaluate import over
from .evaluation.retrieval import KS, answered, recall_at_k, retrieval
from .evaluation.separation import effective_rank, separation, spread
from .learner import Learner
from .model import Embedder
from .settings import Settings

#: Below this spread an embedding counts as collapsed; its root-mean-square distance is a fifth of the whole sphere's.
COLLAPSED = 0.04

#: float16's smallest number: what overflows in spite of this scale does not overflow for the scale's sake.
_SMALLEST_SCALE = 2.0**-24


class CollapseWarning(UserWarning):
    """The embedding puts nearly everything at one point."""


def prepared(settings: Settings, dataset: Dataset) -> Dataset:
    """The data as a run trains on it: with pictures held out, where a step is to be chosen by them, and with what
    ``train_share`` and ``label_noise`` leave of the others.

    Raises:
        ValueError: settings that cannot be trained, or pictures that cannot be measured; the message names the option.
    """
    if settings.patience:
        dataset = dataset.hold_out(settings.seed)
    classes = len(dataset.train.names)
    if settings.classes > classes:
        held = " without those held out" if settings.patience else ""
        raise ValueError(f"--classes is {settings.classes}; {dataset.name} has {classes} to train on{held}")
    selecting = dataset.selecting()
    for kind, data in (("test", dataset), ("validation", selecting)):
        if data is not None:
            _measurable(kind, dataset.name, data)
    # What is searched among keeps its pictures and labels.
    train = dataset.train.thinned(settings.train_share, settings.seed).mislabelled(settings.label_noise, settings.seed)
    left = len(torch.unique(train.labels))
    if settings.classes > left:
        raise ValueError(
            f"--label-noise is {settings.label_noise}, which leaves {left} classes with pictures; --classes is "
            f"{settings.classes}"
        )
    return replace(dataset, train=train, among=dataset.among if selecting is None else selecting.gallery)


def _measurable(kind: str, name: str, data: Dataset) -> None:
    pictures = len(data.test.labels)
    if data.gallery is None and pictures <= max(KS):
        raise ValueError(f"{name} has {pictures} {kind} pictures; Recall@{max(KS)} needs more")
    test = TestSet(replace(data, distort_test=False), 0)
    asked = answered(test.labels, test.queries, test.gallery, least=0)
    if len(torch.unique(test.labels[asked])) < 2:
        what = "of two pictures or more" if data.gallery is None else "of which the gallery has pictures"
        raise ValueError(f"{name} has fewer than two {kind} classes {what}")


class Seen(NamedTuple):
    """What a net makes of a test set's pictures, float32 on the CPU.

    Attributes:
        features: (n, dim), of unit norm.
        structure: (n, dim), of a net with a structure head.
        bare: (n, f) backbone features of unit norm, where they were asked for.
    """

    features: Tensor
    structure: Tensor | None
    bare: Tensor | None


def look(
    net: Embedder, test: TestSet, known: Tensor | None, *, workers: int = 0, bare: bool = False, bar: Progress
) -> Seen:
    """A test set through a net, once, in evaluation mode.

    Args:
        net: on any device.
        test: the pictures.
        known: their backbone features (n, f), where they are there.
        workers: processes that read the pictures.
        bare: whether backbone features are asked for.
        bar: gets the pictures done.
    """

    def call(lot: Tensor) -> list[Tensor]:
        features = net.backbone(lot) if known is None else lot
        embedding, structure = net.project(features)
        return [embedding, *([] if structure is None else [structure]), *([features] if bare else [])]

    parts = over(test if known is None else known, call, net, workers if known is None else 0, bar)
    parts = tuple(part.float() for part in parts)
    return Seen(
        F.normalize(parts[0], dim=1),
        None if net.structure is None else parts[1],
        F.normalize(parts[-1], dim=1) if bare else None,
    )


def found(features: Tensor, test: TestSet, seed: int) -> dict[str, Any]:
    """Retrieval figures of features (n, d) of a test set by distance."""
    figures: dict[str, Any] = retrieval(
        features, test.labels, None, seed, 1, queries=test.queries, gallery=test.gallery
    )["distance"]
    return figures


def baselines(seen: Seen, test: TestSet, seed: int) -> dict[str, Any]:
    """What training starts from: retrieval figures of the bare backbone features and of the untrained embedding.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    assert seen.bare is not None
    if not seen.bare.isfinite().all():
        raise FloatingPointError("the backbone's features are not finite before any training")
    return {"backbone": found(seen.bare, test, seed), "untrained": found(seen.features, test, seed)}


def point(seen: Seen, test: TestSet, settings: Settings) -> dict[str, float]:
    """The figures of a measurement: ``recall``, ``spread``, ``effective_rank``; ``map_at_r`` to choose a step by."""
    figures = {
        "recall": recall_at_k(seen.features, test.labels, test.queries, test.gallery)[1],
        "spread": spread(seen.features),
        "effective_rank": effective_rank(seen.features),
    }
    if settings.patience:
        figures["map_at_r"] = found(seen.features, test, settings.seed)["map_at_r"]["value"]
    return figures


def chosen(curves: Mapping[str, list[Any]]) -> int | None:
    """The step that the validation pictures choose, the first of the highest MAP@R; None where there is no choice."""
    values = curves.get("map_at_r")
    return int(curves["step"][values.index(max(values))]) if values else None


def thresholds(seen: Seen, test: TestSet, learner: Learner) -> dict[str, dict[str, float]]:
    """By ``"distance"`` and, with a unit, ``"score"``: what parts same from different, by rate of false positives."""
    pairs = separation(
        seen.features,
        test.labels,
        learner.similarity,
        learner.settings.seed,
        queries=test.queries,
        gallery=test.gallery,
    )
    return {
        kind: {rate: cut for rate, cut in of["thresholds"].items() if cut is not None} for kind, of in pairs.items()
    }


def warn_of_collapse(taken: int, figures: Mapping[str, float], dim: int) -> None:
    warnings.warn(
        f"after {taken} steps the embedding has collapsed: its spread is {figures['spread']:.4f}, "
        f"its effective rank {figures['effective_rank']:.1f} of {dim}; nearly all is at one point. "
        f"Hardest negatives alone tend to do this early on: try semi-hard mining, another mode, a smaller "
        f"margin or a lower --lr",
        CollapseWarning,
        stacklevel=6,
    )


def refuse_divergence(learner: Learner, features: Tensor, losses: Tensor, taken: int, scaler: Any) -> None:
    """Stop in words where something is not finite.

    A gradient scaler passes over a step whose gradients overflow, and lowers its scale for the next: that is no
    divergence before nothing else happens.

    Args:
        learner: whose parameters are looked at.
        features: (n, dim) of the test pictures.
        losses: (processes, steps) since the last measurement.
        taken: steps so far.
        scaler: of gradients, or None.

    Raises:
        FloatingPointError: something is not finite.
    """
    after, rates = f"after {taken} steps", "lower --lr or --unit-lr-factor"
    if not features.isfinite().all():
        raise FloatingPointError(f"the embedding is not finite {after}; lower --lr")
    for name, parameter in learner.named_parameters():
        if not parameter.isfinite().all():
            of_unit = name.startswith("objective.unit.")
            called = name.replace("objective.unit.", "the PDDM unit's ") if of_unit else f"the parameter {name}"
            raise FloatingPointError(f"{called} is not finite {after}; {rates if of_unit else 'lower --lr'}")
    unit = learner.objective.unit
    if unit is not None:
        with torch.no_grad():
            rows = features.to(unit.u.weight.device)
            if not unit(rows[1:], rows[:-1]).isfinite().all():
                raise FloatingPointError(f"the PDDM unit's scores are not finite {after}; {rates}")
    finite = losses.isfinite().all(0)
    if not finite.any() or (scaler is None and not finite.all()):
        at = taken - len(finite) + 1 + int((~finite).nonzero()[0])
        raise FloatingPointError(f"the loss is not finite at step {at}; lower --lr")
    if scaler is not None and scaler.get_scale() < _SMALLEST_SCALE:
        raise FloatingPointError(
            f"no update is made any more {after}: gradients are not finite at any scale of the loss; "
            f"lower --lr, or choose --precision bf16-mixed"
        )


def sides(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Of each side of the data what it consists of, and a digest of its pictures and labels, as plain values."""
    named: Iterable[tuple[str, Split | None]] = (
        ("train", dataset.train),
        ("test", dataset.test),
        ("gallery", dataset.gallery),
        ("val", dataset.val),
        ("others", dataset.others),
    )
    return {
        name: {
            "classes": len(split.names),
            "from": list(split.groups),
            "pictures": len(split.labels),
            "digest": hashlib.sha256(split.digest.encode() + split.labels.numpy().tobytes()).hexdigest(),
        }
        for name, split in named
        if split is not None
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which :func:`sides` are others than before, in words."""
    words = []
    for name in dict.fromkeys((*before, *now)):
        both = before.get(name), now.get(name)
        if len({side["digest"] if side else "" for side in both}) > 1:
            had, has = (
                f"{side['pictures']} pictures of {side['classes']} classes" if side else "none" for side in both
            )
            words.append(f"{name} had {had} and has {'as many others' if had == has else has} now")
    return words
