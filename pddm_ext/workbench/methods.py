"""What a batch of embeddings is trained by, each under its name in the settings."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

import pddm_ext
from pddm_ext.quadruplets import Mode, Quadruplets

from .settings import Settings, scores


class Quadruplet(nn.Module):
    """Embedding loss on hard quadruplets, and the score loss where there is a PDDM unit, which then mines them.

    Attributes:
        unit: the PDDM unit, or None.
        batches: how many batches have been trained on.
    """

    batches: Tensor

    def __init__(self, settings: Settings, mode: Mode, unit: pddm_ext.PDDM | None) -> None:
        super().__init__()
        self.mode, self.unit, self.candidates = mode, unit, settings.candidates or None
        self.gather = settings.gather
        self.unit_gradient, self.distance_batches = (
            settings.unit_gradient,
            settings.distance_steps * settings.accumulate,
        )
        self.loss = pddm_ext.QuadrupletLoss(settings.alpha, settings.beta, settings.weight)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.bank = None if unit is None else bank_of(settings)

    def mine(self, feats: Tensor, labels: Tensor) -> Quadruplets:
        """What the trained method mines of a batch; its scores are the unit's, or negative squared distances."""
        if self.unit is None:
            return mine_by_distance(feats, labels, self.mode)
        return pddm_ext.mine_and_score(feats, labels, self.unit, mode=self.mode, candidates=self.candidates)

    def forward(self, feats: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        quads = self._mine(feats if self.unit_gradient else feats.detach(), labels, rows)
        among = None if self.bank is None else self.bank.feats
        embedding = self.loss.embedding(feats, quads, ref_feats=among)
        if self.unit is None:
            return {"embedding": embedding}
        return {"score": self.loss.similarity(quads), "embedding": self.loss.weight * embedding}

    def _mine(self, feats: Tensor, labels: Tensor, rows: Tensor) -> Quadruplets:
        """:meth:`mine`, of all processes' batches if it gathers, and among the bank's rows, if there is one; or by
        distance at first, with the unit's scores."""
        self.batches += 1
        world = dist.group.WORLD if dist.is_initialized() else None
        # What mines by distance mines its own batch.
        group = self.loss.group = world if self.gather and self.unit is not None else None
        if self.unit is None:
            return self.mine(feats, labels)
        if self.bank is not None:
            self.bank.group = world  # one for all: what one process would have of their batches
        if not self.distance_batches or self.batches > self.distance_batches:
            given = {"candidates": self.candidates, "group": group}
            return mine(self.unit, feats, labels, rows, self.mode, self.bank, **given)
        quads = mine_by_distance(feats, labels, self.mode)
        i, j, k, l = (rows.clamp(min=0) for rows in quads[:4])  # noqa: E741 - the paper's names
        scores = pddm_ext.score_pairs(feats, torch.cat([i, i, j]), torch.cat([j, k, l]), self.unit)
        s_ij, s_ik, s_jl = torch.where(quads.valid.repeat(3), scores, 0.0).chunk(3)
        return quads._replace(s_ij=s_ij, s_ik=s_ik, s_jl=s_jl)


class Joint(Quadruplet):
    """The score loss on every positive pair's quadruplet, beside the multi-similarity loss on all pairs.

    The hard quadruplets train the unit and, through it, the embedding; what they leave out (the pairs that are not the
    hardest) a loss on all pairs has, as its library sets it. Three things differ from the paper's PDDM, each chosen on
    validation classes:

    - The unit starts as a function of the distance, so that its first quadruplets are hard and its score ranks unseen
      classes. Alone that collapses the embedding, as mining by distance does; the loss on all pairs holds it open.
    - The unit sees features with noise. Without it the unit learns the places of the training classes by heart, its
      gradient draws the embedding there, and unseen classes suffer.
    - The score loss weighs 0.3: it corrects the embedding, and does not lead it.
    """

    SCORE, NOISE = 0.3, 0.05

    def __init__(self, settings: Settings, unit: pddm_ext.PDDM) -> None:
        super().__init__(settings, "pair", unit)
        self.pairs = losses.MultiSimilarityLoss()

    def forward(self, feats: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        unit = F.normalize(feats if self.unit_gradient else feats.detach(), dim=1)
        quads = self._mine(unit + self.NOISE * torch.randn_like(unit), labels, rows)
        return {"score": self.SCORE * self.loss.similarity(quads), "embedding": self.pairs(feats, labels)}


class PairLoss(nn.Module):
    """A loss of pytorch-metric-learning, on what its miner picks, if there is one."""

    unit = bank = None

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, feats: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        picked = None if self.miner is None else self.miner(feats, labels)
        return {"embedding": self.loss(feats, labels, picked)}


def bank_of(settings: Settings, like: Tensor | None = None) -> pddm_ext.MemoryBank | None:
    """The memory bank that the settings come to, of a tensor's dtype and device."""
    like = torch.empty(0) if like is None else like
    rows, made = settings.bank_rows, pddm_ext.MemoryBank
    return made(rows, settings.dim, dtype=like.dtype, device=like.device) if rows else None


def mine(
    unit: pddm_ext.PDDM,
    feats: Tensor,
    labels: Tensor,
    rows: Tensor,
    mode: Mode,
    bank: pddm_ext.MemoryBank | None,
    **more: Any,
) -> Quadruplets:
    """The unit's quadruplets of a batch; or of its rows and those in the bank, among which they then are, too."""
    if bank is not None:
        bank.add(feats, labels, rows)
        more |= {"ids": rows, **bank.references()}
    return pddm_ext.mine_and_score(feats, labels, unit, mode=mode, **more)


def mine_by_distance(feats: Tensor, labels: Tensor, mode: Mode) -> Quadruplets:
    """Hard quadruplets by the negative squared Euclidean distance of the unit features. No gradient."""
    with torch.no_grad():
        unit = F.normalize(feats, dim=1)
        return pddm_ext.reference.select_quadruplets(2 * (unit @ unit.T) - 2, labels, mode)


@torch.no_grad()
def rank_by_distance(unit: pddm_ext.PDDM) -> None:
    """Initial weights whose score falls with the distance, whatever the place.

    A few entries of u' are constant, the others are u's own, so that the direction of u' turns away from the constant
    ones as u grows; each entry of c is what is left of those.
    """
    constant = max(1, unit.hidden // 16)
    for parameter in unit.parameters():
        parameter.zero_()
    unit.u.weight[:-constant].fill_diagonal_(1)
    unit.u.bias[-constant:] = 0.5 * constant**-0.5
    unit.v.bias.fill_(1)
    unit.c.weight[:, unit.hidden - constant : unit.hidden] = constant**-0.5
    unit.c.weight += torch.randn_like(unit.c.weight) * 0.1 * unit.hidden**-0.5
    unit.s.weight.fill_(1 / unit.combined)


def objective(settings: Settings, classes: int) -> Quadruplet | PairLoss:
    """The method of the settings: a module of (n, dim) embeddings and (n,) labels whose results add up to the loss.

    The initial weights of a unit or of proxies depend on the seed alone; torch's global generator is left as it was.

    Args:
        settings: name the method.
        classes: how many are trained on, each of which has a proxy where the method has those.

    Raises:
        ValueError: a start that the method's unit does not have.
    """
    family, _, mode = settings.method.rpartition("-")
    if family == "euclidean":
        return Quadruplet(settings, mode, None)  # type: ignore[arg-type]
    if scores(settings.method):
        if settings.unit_start == "classes":
            raise ValueError(
                f"--unit-start classes is for a unit that is trained afterwards (recommended, --unit-steps); "
                f"{settings.method} trains one with the embedding"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            unit = pddm_ext.PDDM(settings.dim)
            if settings.unit_start == "distance" or settings.method == "joint":
                rank_by_distance(unit)
        return Joint(settings, unit) if family != "pddm" else Quadruplet(settings, mode, unit)  # type: ignore[arg-type]
    triplet = losses.TripletMarginLoss
    proxies = {"num_classes": classes, "embedding_size": settings.dim}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        loss, miner = {
            "triplet-hard": lambda: (triplet(settings.margin), miners.BatchHardMiner()),
            "triplet-semihard": lambda: (
                triplet(settings.margin),
                miners.TripletMarginMiner(settings.margin, "semihard"),
            ),
            "triplet-all": lambda: (triplet(settings.margin), None),
            "n-pair": lambda: (losses.NPairsLoss(), None),
            "contrastive": lambda: (losses.ContrastiveLoss(), None),
            # The first of its two stages; the second is fitting.py.
            "recommended": lambda: (losses.MultiSimilarityLoss(), None),
            "multi-similarity": lambda: (losses.MultiSimilarityLoss(), None),
            "multi-similarity-mined": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
            "sup-con": lambda: (losses.SupConLoss(), None),
            "proxy-anchor": lambda: (losses.ProxyAnchorLoss(**proxies), None),
            "norm-softmax": lambda: (losses.NormalizedSoftmaxLoss(**proxies), None),
            "sub-center-arcface": lambda: (losses.SubCenterArcFaceLoss(**proxies), None),
        }[settings.method]()  # type: ignore[no-untyped-call]
    return PairLoss(loss, miner)
