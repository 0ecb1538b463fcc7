"""What pytorch-metric-learning's adapter is compared with: the library over the plain-PyTorch reference, and loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances
from torch import Tensor

import pddm_ext
from helpers import DEVICE
from pddm_ext import reference
from pddm_ext.adapters.pml import DensityRegularizer
from truth import in_double

D = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def labels_of(*ids: int) -> Tensor:
    return torch.tensor(ids, device=DEVICE)


# Classes of 1 to 4 rows, in no order: singletons make quadruplets that are not valid.
MIXED = (3, 7, 3, 5, 0, 7, 5, 3, 9, 7, 3, 5)
PAIRED = (1, 0, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2)


class Reference(distances.BaseDistance):
    """The same distance, in plain PyTorch."""

    def __init__(self, unit: reference.PDDM, **kwargs: Any) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True, **kwargs)
        self.unit = unit

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return reference.score_matrix(query_emb, self.unit, ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.unit(query_emb, ref_emb)


def mined_by_loops(
    s: Tensor, labels: Tensor, ref_labels: Tensor, mode: str, itself: Callable[[int, int], bool]
) -> list[tuple[int, int, int]]:
    """(i, j, k) of an (n, m) matrix, by comparing one number with another."""
    n, m = s.shape
    y, ry = labels.tolist(), ref_labels.tolist()
    pairs = [(i, j) for i in range(n) for j in range(m) if y[i] == ry[j] and not itself(i, j)]
    if mode == "anchor":
        rows = sorted({i for i, _ in pairs})
        pairs = [min((p for p in pairs if p[0] == i), key=lambda p: (s[p].item(), p)) for i in rows]
    elif mode == "batch":
        pairs = [min(pairs, key=lambda p: (s[p].item(), p))]
    triplets = []
    for i, j in pairs:
        negatives = [k for k in range(m) if ry[k] != y[i]]
        if negatives:
            triplets.append((i, j, max(negatives, key=lambda k: (s[i, k].item(), -k))))
    return triplets


def listed(triplets: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(t.tolist() for t in triplets), strict=True))


def loss_of(x: Tensor, ref: Tensor, triplets: list[tuple[int, int, int]], unit: reference.PDDM) -> Tensor:
    """(T,) from the definition, in float64 with plain-PyTorch scores."""
    a, p, n = torch.tensor(triplets, device=x.device).T
    f, g = F.normalize(x, dim=-1), F.normalize(ref, dim=-1)
    margin = 0.5 + unit(x[a], ref[n]) - unit(x[a], ref[p])
    distances = 1.0 + (f[a] - g[p]).square().sum(1) - (f[a] - g[n]).square().sum(1)
    return F.relu(margin) + 0.5 * F.relu(distances)


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves)


def copied(unit: reference.PDDM) -> reference.PDDM:
    return in_double(unit).to(DEVICE)


def lowest_with_itself() -> pddm_ext.PDDM:
    """S is the sum of u/‖u‖ times D: 0 for a row with itself, and more than that for any other."""
    unit = pddm_ext.PDDM(D)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
        unit.u.weight.copy_(torch.eye(D))
        unit.c.weight[:, :D] = 1.0
        unit.s.weight.fill_(1.0)
    return unit.to(DEVICE)


def with_density(loss: Callable[..., Any], weight: float = 0.3, **kwargs: Any) -> Any:
    density = DensityRegularizer(ratio=0.4, temperature=0.2, eps=0.01)
    return density.attach(loss(embedding_regularizer=density, embedding_reg_weight=weight, **kwargs))
