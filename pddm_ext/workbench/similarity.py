"""What pairs are ranked and told apart by where a PDDM unit says how alike they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

import pddm_ext
from pddm_ext.candidates import dot_products

# Numbers of gathered features, and entries of a matrix of scores, in memory at once.
_NUMBERS, _ENTRIES = 2**23, 2**24


@dataclass(frozen=True)
class Similarity:
    """A unit's score, and the cosine beside it: ``max(S(x, y), floor) + cosine · x̂ · ŷ``, of rows of any norm.

    A unit that was trained on a frozen embedding knows the places of the classes that it was trained on, and nothing of
    others. So its score counts only where it is high, which it is of pairs that lie together at a class it knows; all
    others the cosine tells apart, which ranks as the distance does.

    Attributes:
        unit: on any device; in evaluation nothing has a gradient.
        cosine: from 0, which leaves the score by itself.
        floor: of the score.
    """

    unit: pddm_ext.PDDM
    cosine: float = 0.0
    floor: float = -math.inf

    @overload
    @classmethod
    def of(cls, given: Similarity | pddm_ext.PDDM) -> Similarity: ...

    @overload
    @classmethod
    def of(cls, given: Similarity | pddm_ext.PDDM | None) -> Similarity | None: ...

    @classmethod
    def of(cls, given: Similarity | pddm_ext.PDDM | None) -> Similarity | None:
        """A unit alone is its own score."""
        return cls(given) if isinstance(given, pddm_ext.PDDM) else given

    @property
    def device(self) -> torch.device:
        return self.unit.u.weight.device

    @torch.no_grad()
    def pairs(self, features: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Of listed pairs of rows: (P,).

        Args:
            features: (n, d), on any device.
            i, j: (P,) rows of it, on any device.
        """
        rows = features.to(self.device)
        i, j = i.to(self.device), j.to(self.device)
        scores = pddm_ext.score_pairs(rows, i, j, self.unit)
        if not self.cosine:
            return scores
        return scores.clamp(min=self.floor) + self.cosine * cosine_of(rows, i, j)

    @torch.no_grad()
    def best(self, queries: Tensor, gallery: Tensor, k: int) -> Tensor:
        """The k most alike gallery rows of each query, best first: (q, k) int64 on the CPU.

        Equal ones in the order of rows; NaN comes last.

        Args:
            queries: (q, d), on any device.
            gallery: (g, d), on any device.
            k: 1 to g.
        """
        queries, gallery = queries.to(self.device), gallery.to(self.device)
        if not self.cosine:
            return pddm_ext.topk(queries, gallery, k, self.unit)[1].cpu()
        # In what the scores are in, too.
        dtype = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
        x, y = F.normalize(queries.to(dtype), dim=1), F.normalize(gallery.to(dtype), dim=1)
        found = [torch.empty(0, k, dtype=torch.int64)]
        for lot in torch.split(torch.arange(len(x)), max(1, _ENTRIES // max(1, len(y)))):
            scores = pddm_ext.score_matrix(queries[lot], self.unit, gallery).clamp(min=self.floor)
            scores = scores + self.cosine * dot_products(x[lot], y)
            # Ascending, since a sort takes NaN for the largest value.
            found.append((-scores).sort(dim=1, stable=True).indices[:, :k].cpu())
        return torch.cat(found)


def cosine_of(features: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Cosines (P,) of listed pairs of rows of ``features`` (n, d), all on one device."""
    rows = F.normalize(features, dim=1)
    size = max(1, _NUMBERS // rows.shape[1])
    lots = zip(torch.split(i, size), torch.split(j, size), strict=True)
    return torch.cat([(rows[a] * rows[b]).sum(1) for a, b in lots])
