"""All figures of an embedding on the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pddm_ext
from pddm_ext import _checks, _numbers

from ..data.splits import TestSet
from ..model import Embedder
from . import inputs
from .probes import clustering, transfer, zero_shot
from .retrieval import relevant, retrieval
from .separation import effective_rank, separation, spread


def embed(net: nn.Module, test: TestSet, workers: int = 0) -> Tensor:
    """Unit features (n, dim) of the test set, float32 on the CPU, in evaluation mode; the net's mode is put back.

    Args:
        net: pictures to embeddings, on any device.
        test: what to embed.
        workers: processes that read the pictures.
    """
    (features,) = _over(test, lambda pictures: (net(pictures),), net, workers)
    return F.normalize(features, dim=1)


def _over(
    test: TestSet, call: Callable[[Tensor], Sequence[Tensor]], net: nn.Module, workers: int
) -> tuple[Tensor, ...]:
    """What ``call`` gives for all test pictures, row by row."""
    was_training, weight = net.training, next(net.parameters())
    rows = torch.split(torch.arange(len(test)), 256)
    # Its own generator, for a loader draws from torch's once on every use.
    loader: Iterable[Tensor] = DataLoader(
        test,  # type: ignore[arg-type]
        batch_size=None,
        sampler=rows,
        num_workers=workers,
        generator=torch.Generator(),
    )
    net.eval()
    with torch.no_grad():
        parts = [[rows.float().cpu() for rows in call(pictures.to(weight))] for pictures in loader]
    net.train(was_training)
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def measure(
    features: Tensor,
    labels: Tensor,
    unit: pddm_ext.PDDM | None,
    *,
    seed: int,
    candidates: int = 100,
    structure: Tensor | None = None,
) -> dict[str, Any]:
    """Every figure of given features: by distance, with a unit by its score, and with a structure re-ranked by that.

    Args:
        features: (n, d) unit rows (or zero ones, as ``normalize`` leaves them), of any floating dtype and on any
            device; measured in float32 on the CPU, without a gradient.
        labels: (n,) of any integer dtype, with two classes of two rows or more. No figure depends on the numbers that
            the classes have.
        unit: on any device, or None.
        seed: from 0, of whatever is drawn: the same gives the same figures.
        candidates: how many of the nearest rows are re-ranked, by score or by structure.
        structure: (n, d) positive weights, of any floating dtype, or None.

    Returns:
        ``results`` (:func:`.retrieval.retrieval`), ``clustering`` (:func:`.probes.clustering`), ``transfer``,
        ``zero_shot``, ``pairs`` (:func:`.separation.separation`), ``spread`` and ``effective_rank``, all as plain
        numbers that JSON can hold.

    Raises:
        TypeError: an argument that is no tensor, unit or int, or a dtype or layout that is not accepted.
        ValueError: shapes, norms, labels, a unit or candidates that cannot be evaluated.
        FloatingPointError: a feature, a structure or a score is not finite.
    """
    features = inputs.features(features, unit=True)
    labels = inputs.classes(labels, len(features))
    classes = len(torch.unique(labels[relevant(labels) > 0]))
    if classes < 2:
        raise ValueError(f"labels have {classes} classes of two rows or more; at least 2 are accepted")
    _numbers.size("candidates", candidates)
    inputs.seed(seed)
    if unit is not None:
        _checks._unit(unit, features.shape[1])
    if structure is not None:
        structure = inputs.features(structure, "structure")
        if structure.shape != features.shape or not (structure > 0).all():
            raise ValueError(
                f"structure has shape {tuple(structure.shape)} and values from {structure.min():.4g}; "
                f"{tuple(features.shape)}, as features have, and positive values are accepted"
            )
    return {
        "results": retrieval(features, labels, unit, seed, candidates, structure),
        "clustering": clustering(features, labels, seed),
        "transfer": transfer(features, labels, seed),
        "zero_shot": zero_shot(features, labels, seed),
        "pairs": separation(features, labels, unit, seed),
        "spread": spread(features),
        "effective_rank": effective_rank(features),
    }


def evaluate(
    net: nn.Module, unit: pddm_ext.PDDM | None, test: TestSet, *, seed: int, candidates: int = 100, workers: int = 0
) -> dict[str, Any]:
    """:func:`measure` of the net's features, and structures if it has a head for them, on the test set."""
    if isinstance(net, Embedder) and net.structure is not None:
        features, structure = _over(test, net.both, net, workers)  # type: ignore[arg-type]
        features = F.normalize(features, dim=1)
    else:
        features, structure = embed(net, test, workers), None
    return measure(features, test.labels, unit, seed=seed, candidates=candidates, structure=structure)
