"""A PDDM unit for an embedding that no longer changes: the second of two stages."""

from __future__ import annotations

import math
from collections.abc import Iterator

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pddm_ext

from .methods import bank_of, mine, rank_by_distance
from .settings import Settings
from .similarity import Similarity, cosine_of

#: The unit's learning rate, of Adam, falling by a cosine; and what its classifier's loss weighs beside the score's.
RATE, CLASSIFIER = 1e-3, 0.3
#: Classes are told apart by logits of this scale.
SCALE = 16.0
#: Layers are so many times as long as a feature, or so long, at most.
_WIDEST, _LONGEST = 4, 512
#: Length of the noise over a feature's own, of a score by itself; and of one that falls back to the distance, which is
#: to be high of fewer pairs: unseen classes come between those it knows.
NOISE, CAUTIOUS = 0.3, 1.0
#: The cosine's weight beside the score, in standard deviations of either.
WEIGHT = 2.0
#: Pairs of training rows whose scores the cosine's weight and the floor are taken from, and the share of those of
#: different classes that lies below the floor.
_PAIRS, _BELOW = 2**18, 0.998


class FittedUnit(nn.Module):
    """A unit that is trained afterwards, and the cosine that stands beside its score (:class:`.Similarity`).

    Args:
        settings: length of a feature, width of the unit, and the seed of its first weights.
        classes: how many are trained on.

    Attributes:
        unit: random until it is fitted.
        cosine: its weight beside the score, a scalar.
        floor: of the score, a scalar.
    """

    cosine: Tensor
    floor: Tensor

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        widest = min(_WIDEST * settings.dim, max(settings.dim, _LONGEST))
        room = min(classes + settings.dim // 2, widest)
        self._sizes, self._seed = (settings.dim, *2 * (settings.unit_width or max(settings.dim, room),)), settings.seed
        self.unit = self._fresh().requires_grad_(False)
        self.register_buffer("cosine", torch.zeros(()))
        self.register_buffer("floor", torch.full((), -math.inf))

    def reset(self) -> None:
        """Random weights, those of the first time, and nothing beside the score."""
        self.unit.load_state_dict(self._fresh().state_dict())
        self.cosine.zero_()
        self.floor.fill_(-math.inf)

    def _fresh(self) -> pddm_ext.PDDM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return pddm_ext.PDDM(*self._sizes)

    @property
    def similarity(self) -> Similarity:
        return Similarity(self.unit, float(self.cosine), float(self.floor))


def fit(
    fitted: FittedUnit,
    features: Tensor,
    labels: Tensor,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    settings: Settings,
    *,
    fall_back: bool,
) -> Iterator[None]:
    """Train the unit anew, a step for each item taken; the end sets what stands beside its score.

    The score loss on the quadruplet of every positive pair, of features with noise: without it the unit learns the
    very places of the training rows, where no test row lies. By default it starts from what the embedding has made of
    the classes: a row of v for each of them, its mean, and a row of c that rises where the pair lies at it. These rows
    stay a classifier, whose cross-entropy is a small part of the loss. So the first quadruplets are hard ones, and what
    is learnt is where, and how far, the distance is wrong.

    Args:
        fitted: with a unit on the features' device.
        features: (n, dim) of unit norm, of the training pictures.
        labels: (n,) int64 from 0, on the features' device.
        batches: some of the features (b, dim), their labels and their rows (b,); as many as there are steps.
        settings: start, noise, margin, steps and the rows of earlier steps to mine among.
        fall_back: whether the score is to fall back to the distance where the unit knows nothing.

    Raises:
        FloatingPointError: a parameter, or what stands beside the score, is not finite in the end.
    """
    fitted.reset()
    unit, device = fitted.unit, features.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    rows, group = _knowing(unit, features, labels, settings)
    unit.requires_grad_(True)
    loss_of = pddm_ext.QuadrupletLoss(settings.alpha)
    bank = bank_of(settings, features)
    length = settings.unit_noise or (CAUTIOUS if fall_back else NOISE)
    optimizer = torch.optim.Adam(unit.parameters(), lr=RATE, weight_decay=settings.weight_decay)
    steps = settings.unit_updates
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    try:
        for clean, classes, places in batches:
            noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=device)
            seen = F.normalize(clean + length * noise / settings.dim**0.5, dim=1)
            classes = classes.to(device)
            quads = mine(unit, seen, classes, places.to(device), "pair", bank)
            loss = loss_of.similarity(quads)
            if rows:
                logits = F.linear(seen, unit.v.weight[:rows], unit.v.bias[:rows])
                loss = loss + CLASSIFIER * F.cross_entropy(SCALE * logits, group[classes])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            yield
    finally:
        unit.requires_grad_(False)
    if fall_back:
        cosine, floor = _beside(unit, features, labels, generator)
        fitted.cosine.copy_(WEIGHT * cosine)
        fitted.floor.copy_(floor)
    told = (*unit.parameters(), *((fitted.cosine, fitted.floor) if fall_back else ()))
    if not all(value.isfinite().all() for value in told):
        raise FloatingPointError("the PDDM unit is not finite after its own steps; lower --unit-noise")


@torch.no_grad()
def _knowing(unit: pddm_ext.PDDM, features: Tensor, labels: Tensor, settings: Settings) -> tuple[int, Tensor]:
    """Initial weights as the settings ask; how many rows of v are a classifier's, and each class's among them."""
    count = int(labels.max()) + 1
    group = torch.arange(count, device=labels.device)
    if settings.unit_start == "distance":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            rank_by_distance(unit)
    if settings.unit_start in ("distance", "random"):
        return 0, group
    sums = torch.zeros(count, features.shape[1], dtype=features.dtype, device=features.device)
    means = F.normalize(sums.index_add(0, labels, features), dim=1)
    room = unit.hidden - min(settings.dim, unit.hidden) // 2  # the rest is for what classes do not tell
    if count > room:
        means, group = _grouped(means, room)
    rows = len(means)
    unit.v.weight[:rows], unit.v.bias[:rows] = means, -0.3
    # A row of c for each of v: where that one alone stands out of v', the pair lies at its class.
    unit.c.weight[:rows] *= 0.2
    at = torch.arange(rows, device=means.device)
    unit.c.weight[at, unit.hidden + at], unit.c.bias[:rows] = 1.0, -0.5
    unit.s.weight[0, :rows] = 1.0
    return rows, group


def _grouped(means: Tensor, rooms: int) -> tuple[Tensor, Tensor]:
    """Groups of classes that lie close together, by k-means: their centres (rooms, d), and each class's group."""
    points = means.float().cpu().numpy()
    found = faiss.Kmeans(points.shape[1], rooms, seed=1, min_points_per_centroid=1, spherical=True)
    found.train(points)
    group = torch.from_numpy(found.index.search(points, 1)[1][:, 0])
    # Labels of an empty group would never be seen.
    used, group = torch.unique(group, return_inverse=True)
    centres = torch.from_numpy(found.centroids)[used]
    return centres.to(means), group.to(means.device)


@torch.no_grad()
def _beside(unit: pddm_ext.PDDM, features: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of pairs of rows drawn at random, the standard deviation of scores over that of cosines, and the floor."""
    i, j = torch.randint(len(features), (2, _PAIRS), generator=generator, device=features.device)
    i, j = i[i != j], j[i != j]
    scores, cosines = Similarity(unit).pairs(features, i, j), cosine_of(features, i, j)
    different = scores[labels[i] != labels[j]].sort().values
    floor = different[int(_BELOW * (len(different) - 1))] if len(different) else scores.min()
    return scores.std() / cosines.std().clamp(min=1e-12), floor
