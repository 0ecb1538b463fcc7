"""The scoring unit, on the fused kernels."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from . import _checks
from .ops import unit_arguments
from .parameters import Parameters
from .precision import autocast
from .quadruplets import MODES, Mode, Quadruplets


class PDDM(Parameters):
    __doc__ = Parameters.__doc__

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of matched rows, differentiable.

        Args:
            x, y: (…, d), float32, float64, bfloat16 or float16; rows are L2-normalised inside.

        Returns:
            (…), float32 (float64 for float64 input).

        Raises:
            ValueError: shapes differ, or the last dimension is not the unit's.
            TypeError: a dtype that is not accepted.
        """
        _checks.matched_rows(x, y, self)
        n = x[..., 0].numel()
        rows = autocast(torch.cat([x.reshape(n, self.dim), y.reshape(n, self.dim)]))
        i = torch.arange(n, device=x.device)
        scores: Tensor = torch.ops.pddm.score_pairs(rows, i, i + n, *unit_arguments(self))
        return scores.reshape(x.shape[:-1])

    def mine(self, feats: Tensor, labels: Tensor, *, mode: Mode = "batch") -> Quadruplets:
        """:func:`pddm_ext.mine_and_score` with this unit."""
        _checks.mining(feats, labels, self, mode, default_unit)
        mined = torch.ops.pddm.mine(autocast(feats), labels, *unit_arguments(self), MODES.index(mode))
        s_ij, s_ik, s_jl, i, j, k, l, valid = mined  # noqa: E741 - the paper's names
        return Quadruplets(i, j, k, l, s_ij, s_ik, s_jl, valid)


_default_units: dict[tuple[int, torch.device], PDDM] = {}
_default_units_lock = threading.Lock()


def default_unit(dim: int, device: torch.device | str | None = None) -> PDDM:
    """The process-wide unit for features of length ``dim``, made (with torch's generator) on first use.

    :func:`pddm_ext.mine_and_score` uses it where it is given none. Its parameters are trained like any others: hand
    ``default_unit(dim).parameters()`` to the optimizer. Call it before compiling a function that relies on it: modules
    cannot be made inside ``torch.compile``.

    Args:
        dim: length of a feature.
        device: where its parameters live; the CPU by default. Each device has its own.
    """
    where = torch.device(device or "cpu")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if (dim, where) not in _default_units:
        # Made in ordinary mode even if an evaluation under inference_mode is the first to ask, or it could never train.
        with _default_units_lock, torch.inference_mode(False):
            if (dim, where) not in _default_units:
                _default_units[dim, where] = PDDM(dim).to(where)
    return _default_units[dim, where]
