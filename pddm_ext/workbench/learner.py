"""What a step differentiates: a net, and the losses that train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pddm_ext
from pddm_ext.precision import unmasked

from .fitting import FittedUnit
from .methods import PairLoss, Quadruplet
from .model import Embedder
from .settings import PROXIES, Settings
from .similarity import Similarity


class Learner(nn.Module):
    """A net and what trains it. One forward pass is all that a step differentiates, as distributed training asks.

    Attributes:
        known: whether it is given backbone features in the pictures' place.
        fitted: the unit that is trained when the net no longer is, if one is to be.
    """

    def __init__(
        self, net: Embedder, objective: Quadruplet | PairLoss, settings: Settings, fitted: FittedUnit | None = None
    ) -> None:
        super().__init__()
        self.net, self.objective, self.settings, self.known = net, objective, settings, False
        self.density = pddm_ext.DensityRegularizer(settings.density_ratio) if settings.density else None
        self.ranking = None
        if settings.structure:
            self.ranking = pddm_ext.MultiClusterRankingLoss(settings.clusters, over=settings.centres)  # type: ignore[arg-type]
        self.fitted = fitted
        bank = objective.bank
        if bank is not None:  # it is the same in every process, and need not be sent at every step
            names = [f"objective.bank.{name}" for name, _ in bank.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # type: ignore[no-untyped-call]

    @property
    def unit(self) -> pddm_ext.PDDM | None:
        return self.objective.unit if self.fitted is None else self.fitted.unit

    @property
    def similarity(self) -> Similarity | None:
        """What ranks by score, where there is a unit."""
        return Similarity.of(self.objective.unit) if self.fitted is None else self.fitted.similarity

    def forward(self, pictures: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        # Losses are sums of small differences: of float32 even where the net runs in less.
        feats, structure = self.net.project(pictures) if self.known else self.net.both(pictures)
        feats = feats if feats.dtype == torch.float64 else feats.float()
        feats, zero = unmasked(feats)
        with torch.autocast(feats.device.type, enabled=False):
            terms: dict[str, Tensor] = self.objective(feats, labels, rows)
            if self.density is not None:
                terms["density"] = self.settings.density * self.density(feats, labels)
            if self.ranking is not None and structure is not None:
                terms["structure"] = self.settings.structure * self.ranking(feats, structure)
        return {name: term + zero for name, term in terms.items()}

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam: the head and the structure head at ``lr``, the backbone, the unit and proxies each at theirs."""
        settings = self.settings
        head = [p for name, p in self.net.named_parameters() if not name.startswith("backbone.")]
        factor = settings.proxy_lr_factor if settings.method in PROXIES else settings.unit_lr_factor
        groups: list[dict[str, Any]] = [{"params": head}]
        for parameters, times in (
            (self.net.backbone.parameters(), settings.backbone_lr_factor),
            (self.objective.parameters(), factor),
        ):
            trained = [p for p in parameters if p.requires_grad]
            if trained:
                groups.append({"params": trained, "lr": settings.lr * times})
        return torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def schedule(settings: Settings) -> Callable[[int], float]:
    """What each learning rate is multiplied by at a step, counted from 0."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "constant":
            return rise
        return rise * (1 + torch.tensor(step / settings.steps * torch.pi).cos().item()) / 2

    return factor
