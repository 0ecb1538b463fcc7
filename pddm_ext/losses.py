"""The double-header hinge loss over quadruplets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quadruplets import Quadruplets


class QuadrupletLoss(nn.Module):
    """Hinges on the scores and on the squared Euclidean distances D of the unit features, mean over valid quadruplets::

        E_m = max(0, α + S_ik − S_ij) + max(0, α + S_jl − S_ij)
        E_e = max(0, β + D_ij − D_ik) + max(0, β + D_ij − D_jl)
        L   = E_m + weight · E_e

    The paper's γ is the optimizer's weight decay (5e-4 there). No valid quadruplet gives 0 with zero gradients.

    Source: Huang, Loy, Tang, NIPS 2016, equations 3 to 5.

    Args:
        alpha: margin α of the scores.
        beta: margin β of the squared distances, which lie in [0, 4].
        weight: λ, of E_e.

    Shape:
        feats (n, d), as given to the miner; quads with fields of (Q,). The result is a scalar in the scores' dtype.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 1.0, weight: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta, self.weight = alpha, beta, weight

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, weight={self.weight}"

    def forward(self, feats: Tensor, quads: Quadruplets) -> Tensor:
        return _mean(self._similarity(quads) + self.weight * self._embedding(feats, quads), quads.valid)

    def similarity(self, quads: Quadruplets) -> Tensor:
        """E_m: pulls the unit (and the features through it) to score positives above negatives by α."""
        return _mean(self._similarity(quads), quads.valid)

    def embedding(self, feats: Tensor, quads: Quadruplets) -> Tensor:
        """E_e: pulls the features themselves, whoever mined the quadruplets."""
        return _mean(self._embedding(feats, quads), quads.valid)

    # Of every slot. At Q = 1 the loss is nothing but launches, so what can be one operator over all pairs is.

    def _similarity(self, quads: Quadruplets) -> Tensor:
        return F.relu(torch.stack([quads.s_ik, quads.s_jl]) - quads.s_ij + self.alpha).sum(0)

    def _embedding(self, feats: Tensor, quads: Quadruplets) -> Tensor:
        if feats.dim() != 2:
            raise ValueError(f"feats has shape {tuple(feats.shape)}; (rows, dim) is accepted")
        if len(feats) == 0:
            return feats.sum().to(quads.s_ij.dtype)
        # Slots that are not valid are cut off before the norm, for the gradient of a row of NaN would be NaN even
        # times 0. An embedding's gradient is added up in one order on every device.
        f = F.embedding(torch.stack(quads[:4]).clamp(min=0), feats).to(quads.s_ij.dtype)
        f_i, f_j, f_k, f_l = F.normalize(torch.where(quads.valid[:, None], f, 0.0), dim=-1)
        d_ij, d_ik, d_jl = (torch.stack([f_i, f_i, f_j]) - torch.stack([f_j, f_k, f_l])).square().sum(-1)
        return F.relu(d_ij + self.beta - torch.stack([d_ik, d_jl])).sum(0)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
