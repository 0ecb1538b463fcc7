"""Density adaptivity: classes embedded neither too tightly nor too widely for the room around them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, _numbers
from .precision import no_autocast, score_dtype
from .unlabelled import unlabelled


class DensityRegularizer(nn.Module):
    r"""A penalty on classes that are too concentrated, or too little, for the room they have: added to any metric loss.

    For a class c of n_c ≥ 2 samples with unit features f, and every class's centroid μ (the mean of its samples)::

        extent  r_c² = Σ ‖f − μ_c‖² / (n_c − 1)            density: many samples within a small r_c
        room    ρ_c² = Σ_b w_b ‖μ_c − μ_b‖²                over the other classes b, the nearest before all,
                w    = softmax over b ≠ c of −‖μ_c − μ_b‖² / T
        loss    mean over c of [½ log((r_c² + ε) / (ρ_c² + ε)) − log ratio]²

    A class that fills less than ``ratio`` of its room is spread, one that fills more is drawn together; the room has a
    gradient too, so that by the same force centroids approach or part. On the logarithmic scale twice the ratio costs
    as much as half of it. ε bounds the force where a class shrinks to a point; in it nothing spreads, for equal rows
    have no direction to part in.

    Derivation. Of independent samples with covariance Σ_c, E r_c² = tr Σ_c whatever n_c is: the squared radius of the
    class. A sample lies nearer to another centroid, at a distance ρ, when its part along the line between the two
    exceeds ρ/2; for classes of one shape r/ρ alone decides how often. One ratio for every class therefore balances
    variation within classes and similarity between them. The room is a mean of squared distances, so it is never
    negative, is never below the nearest one, and tends to it as T falls. It is the room in the batch: between centroids
    of n_c and n_b samples a squared distance is larger than between their expectations, by r_c²/n_c + r_b²/n_b on
    average; the room is by less, since its weights favour the centroids that chance has brought near.

    The paper's is the principle: to measure how concentrated each class is in the embedding, and to make that
    concentration fit the classes around it, by a term beside any loss, trained end to end. The measure (extent over
    room), the soft choice of the nearest centroids, the logarithmic penalty and the defaults are ours.

    A class of one row has no extent: it is room to others and has no term of its own. Without a class of two rows, or
    with a single class, the loss is 0 with zero gradients. For n rows of C classes, time is O(n d + C² d) and memory
    O(n d + C²). The number of classes is data: a GPU is waited for to learn it, and ``torch.compile`` breaks its graph
    there. Sums over classes run over sorted rows, in one order on every run. It is differentiable once.

    Source: Li, Yao, Pan, Chao, Mei, *Deep Metric Learning with Density Adaptivity*, 2019, arXiv:1909.03909.

    Args:
        ratio: the extent aimed at, over the room; positive.
        temperature: T, in squared distance, which is at most 4 between unit features; positive.
        eps: ε, in squared distance; positive.
        ignore_label: the label of rows whose class is not known, which are left out.

    Shape:
        feats (n, d), float32, float64, bfloat16 or float16, L2-normalised inside; labels (n,) of any integer dtype. The
        result is a scalar, float32 (float64 for float64 features), also under autocast.

    Raises:
        ValueError: a parameter that is not positive and finite, or a shape or length that does not fit.
        TypeError: a parameter that is no number, or a dtype that is not accepted.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        temperature: float = 0.05,
        eps: float = 1e-4,
        *,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("ratio", ratio), ("temperature", temperature), ("eps", eps)):
            _numbers.number(name, value, "a positive finite number")
        if ignore_label is not None:
            _numbers.integer("ignore_label", ignore_label)
        self.ratio, self.temperature, self.eps, self.ignore_label = ratio, temperature, eps, ignore_label

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, temperature={self.temperature}, eps={self.eps}"

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        _check(feats, labels)
        left_out = unlabelled(labels, self.ignore_label)
        if left_out is not None:
            feats, labels = feats[~left_out], labels[~left_out]
        # Only equality matters: uint64, which few operators know, may wrap.
        _, c, counts = torch.unique(labels.long(), return_inverse=True, return_counts=True)
        several = (counts > 1).nonzero().squeeze(1)
        if len(counts) < 2 or len(several) == 0:
            return feats[:0].sum().to(score_dtype(feats))
        f = F.normalize(feats.to(score_dtype(feats)), dim=-1)
        # Atomic additions would leave the order of a GPU's sums to chance; bags of sorted rows and an embedding's
        # gradient are added up in one order.
        order, starts = torch.argsort(c, stable=True), counts.cumsum(0) - counts
        mu = F.embedding_bag(order, f, starts, mode="mean")
        deviations = (f - F.embedding(c, mu)).square().sum(-1, keepdim=True)
        extent = F.embedding_bag(order, deviations, starts, mode="sum")[several, 0] / (counts[several] - 1)
        room = self._room(mu, several)
        log_ratio = ((extent + self.eps) / (room + self.eps)).log() / 2
        loss: Tensor = (log_ratio - math.log(self.ratio)).square().mean()
        return loss

    def _room(self, mu: Tensor, several: Tensor) -> Tensor:
        # Classes lie close together early in training: about their common mean, less is lost to cancellation.
        mu = mu - mu.mean(0)
        own = F.embedding(several, mu)
        with no_autocast(mu):
            product = own @ mu.T
        distances = F.relu(own.square().sum(-1, keepdim=True) + mu.square().sum(-1) - 2 * product)
        itself = several[:, None] == torch.arange(len(mu), device=mu.device)
        weights = (-distances / self.temperature).masked_fill(itself, -math.inf).softmax(-1)
        room: Tensor = (weights * distances).sum(-1)
        return room


def _check(feats: Tensor, labels: Tensor) -> None:
    _checks._matrix("feats", feats)
    _checks._vector("labels", labels, feats.shape[0], "feats")
    _checks._devices(feats, labels)
    if feats.shape[1] == 0:
        raise ValueError("feats has shape (n, 0); a dimension of at least 1 is accepted")
