"""What a training loop would not notice by itself, told once per process: batches that teach nothing, and why.

A batch without a valid quadruplet gives a loss of 0 with zero gradients, by contract. A diverged network, a sampler
that draws no positives and a collapsed embedding all look like that, and whoever watches the loss takes it for success.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from .parameters import Parameters
from .precision import score_dtype
from .quadruplets import Quadruplets

Action = Literal["warn", "raise", "ignore"]
_ACTIONS: Final = ("warn", "raise", "ignore")

#: A GPU's batches are looked at so often, a call's result when the next look comes: nothing waits.
_EVERY = 16


class HealthWarning(UserWarning):
    """A batch, a unit or an optimizer is such that training does nothing."""


class HealthError(RuntimeError):
    """The same, where :func:`set_health_checks` asked for errors."""


_action: Action = "warn"
_told: set[str] = set()


def set_health_checks(action: Action) -> None:
    """What happens when mining sees that a step teaches nothing.

    That is: features, references or a unit's parameters that are not finite, a batch without a positive pair or of one
    class, features that are all one point, and a default unit whose gradient no optimizer uses. Not looked at are
    batches inside ``torch.compile``, ``torch.func``'s transforms and CUDA graphs; of a group's batch, and on the CPU
    alone, only what every process knows: its features and classes, or the references that it is mined among. On the CPU
    every batch is looked at; on a GPU one in sixteen, without waiting for it, so that word comes some steps later.

    Args:
        action: ``"warn"`` (the default), once per process for each reason, by a :class:`HealthWarning`; ``"raise"`` a
            :class:`HealthError` each time; ``"ignore"``.

    Raises:
        ValueError: another action.
    """
    global _action
    if action not in _ACTIONS:
        raise ValueError(f"action is {action!r}; {', '.join(map(repr, _ACTIONS))} are accepted")
    _action = action
    _told.clear()


def tell(reason: str, message: str) -> None:
    """Tell a reason in words, if it has not been told."""
    if _action == "raise":
        raise HealthError(message)
    if _action == "warn" and reason not in _told:
        _told.add(reason)
        warnings.warn(f"{message}. (Told once; see pddm_ext.set_health_checks.)", HealthWarning, stacklevel=_caller())


def _caller() -> int:
    """How far up the stack, seen from :func:`tell`, the first line lies that is neither the package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("pddm_ext.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


def after_mining(
    quads: Quadruplets,
    feats: Tensor,
    labels: Tensor,
    unit: Parameters | None,
    left_out: Tensor | None,
    ref_feats: Tensor | None = None,
) -> None:
    """Look at a batch and what was mined of it.

    Args:
        quads: what was mined.
        feats: (n, d), by whose similarity, in the precision that it was computed from.
        labels: (n,).
        unit: whose score mined, or None.
        left_out: (n,) bool, rows that were not to be mined, or None.
        ref_feats: (m, d), the references that were mined among, or None.
    """
    if _action == "ignore" or not _checks.concrete(feats):
        return
    feats, ref_feats = feats.detach(), None if ref_feats is None else ref_feats.detach()
    if left_out is not None:
        feats = torch.where(left_out[:, None], 0.0, feats)
    if feats.is_cpu:
        if _ill(quads, feats, ref_feats):
            _diagnose(quads, feats, labels, unit, left_out, ref_feats)
    elif feats.is_cuda and _later.due() and not torch.cuda.is_current_stream_capturing():
        if _later.read():
            _diagnose(quads, feats, labels, unit, left_out, ref_feats)
        _later.write(_signs(quads, feats, ref_feats))


def _ill(quads: Quadruplets, feats: Tensor, ref_feats: Tensor | None = None) -> bool:
    """Whether a closer look is due. Of microseconds, for it is taken at every batch, small ones too."""
    if not _sums_up(feats) or quads.valid.shape[0] == 0 or not (ref_feats is None or _sums_up(ref_feats)):
        return True
    s_ij, s_ik = _first(quads.s_ij), _first(quads.s_ik)
    return not abs(s_ij - s_ik) > 1e-5 * abs(s_ij) + 1e-7  # one point, one score; no slot valid, or not this; infinity


def _first(scores: Tensor) -> float:
    """The first of at least one score."""
    return float(scores.item() if scores.shape[0] == 1 else scores.detach()[0].item())


def _sums_up(feats: Tensor) -> bool:
    """Whether the sum is finite, and so is every number; what large numbers add up to may not be. Copies nothing."""
    return math.isfinite(feats.sum(dtype=score_dtype(feats)).item())


def _signs(quads: Quadruplets, feats: Tensor, ref_feats: Tensor | None = None) -> Tensor:
    """:func:`_ill` where the answer is wanted on the device: (3,) bool."""
    apart = (quads.s_ij - quads.s_ik).detach().abs() > 1e-5 * quads.s_ij.detach().abs() + 1e-7
    finite = feats.sum(dtype=torch.float32).isfinite()
    if ref_feats is not None:
        finite &= ref_feats.sum(dtype=torch.float32).isfinite()
    return torch.stack([~finite, ~quads.valid.any(), ~apart.any()])


def _diagnose(
    quads: Quadruplets,
    feats: Tensor,
    labels: Tensor,
    unit: Parameters | None,
    left_out: Tensor | None,
    ref_feats: Tensor | None,
) -> None:
    if not _finite("feats", feats) or (ref_feats is not None and not _finite("ref_feats", ref_feats)):
        return
    if unit is not None:
        broken = [name for name, p in unit.named_parameters() if not p.isfinite().all()]
        if broken:
            tell(
                "unit",
                f"the unit has parameters that are not finite ({', '.join(broken)}): scores are NaN or infinite, and "
                f"nothing can be mined. Training has diverged: lower the unit's learning rate, or clip its gradient",
            )
            return
    if left_out is not None:
        feats, labels = feats[~left_out], labels[~left_out]
    if not quads.valid.any() and ref_feats is not None:
        tell(
            "references",
            f"no quadruplet of {len(feats)} rows and {len(ref_feats)} references is valid, and the loss is 0: a row "
            f"needs a reference of its class that is another sample, and references of other classes. A memory bank is "
            f"empty before its first addition; give it the batch before mining, and let it hold several batches",
        )
    elif not quads.valid.any():
        _diagnose_labels(labels)
    elif _one_point(feats):
        tell(
            "collapse",
            f"all {len(feats)} rows of feats point the same way (or are too small or large to have a norm): every "
            f"score is the same, and no gradient can part them. The embedding has collapsed, or the network gives a "
            f"constant: look at its output, use a smaller margin or learning rate, or another mode at first",
        )
    elif _one_score(quads) and (unit is None or unit.s.weight.any()):  # zeros are a start, and have a gradient
        tell(
            "dead unit",
            "the unit gives different pairs the same score, to the last bit: its relus are dead, and it has no "
            "gradient. Lower its learning rate and start it anew",
        )


def before_mining(**feats: Tensor) -> None:
    """Look at features (n, d) by the names of their arguments, where what is mined of them is not looked at after. In a
    group those must be the same in every process, so that all are told, or all raise, and none is left waiting."""
    for name, x in feats.items():
        if _action != "ignore" and _checks.readable(x) and not _sums_up(x.detach()):
            _finite(name, x.detach())


def of_group(feats: Tensor, classes: Tensor) -> None:
    """Look at the rows (n, d) of all processes of a group and their classes (n,), −1 for those left out.

    Every process sees the same, so that all are told, or all raise, and none is left waiting.
    """
    if _action != "ignore" and _checks.readable(feats):
        known = classes >= 0
        labels = classes[known]
        counts = torch.unique(labels, return_counts=True)[1]
        if _finite("feats", feats[known]) and (len(counts) < 2 or not bool((counts > 1).any())):
            _diagnose_labels(labels)


def _finite(name: str, feats: Tensor) -> bool:
    """Whether features (n, d) are finite; told if not."""
    finite = feats.isfinite().all(1)
    if finite.all():
        return True
    bad = (~finite).nonzero().flatten()
    tell(
        "features",
        f"{len(bad)} of {len(feats)} rows of {name} are not finite, the first is row {int(bad[0])}: they are in no "
        f"quadruplet, and where all are, the loss is 0 with zero gradients. Training has diverged, or the data or "
        f"the precision ({feats.dtype}) bring NaN or infinity: look at the network's output, lower its learning rate, "
        f"or find the place with torch.autograd.set_detect_anomaly(True)",
    )
    return False


def _diagnose_labels(labels: Tensor) -> None:
    _, counts = torch.unique(labels.long(), return_counts=True)
    if len(counts) == 1 and counts[0] > 1:
        tell(
            "one class",
            f"all {len(labels)} labelled rows of the batch are of one class: there is no negative, so no quadruplet, "
            f"and the loss is 0. Let the sampler draw several classes for each batch",
        )
    elif not (counts > 1).any():
        tell(
            "no positive",
            f"the batch has {len(labels)} labelled rows and no two of one class: there is no positive pair, so no "
            f"quadruplet, and the loss is 0. Let the sampler draw several samples of each class, as "
            f"pytorch-metric-learning's MPerClassSampler does",
        )
    else:
        tell(
            "scores",
            "no quadruplet of the batch is valid, though it has positives and negatives and its features are finite: "
            "the scores are NaN. The unit's parameters are too large for the precision",
        )


def _one_point(feats: Tensor) -> bool:
    f = F.normalize(feats.to(score_dtype(feats)), dim=1)
    # Of the unit rows' own rounding: half precision has an eps of a thousandth.
    return bool((f - f[0]).abs().max() <= 8 * torch.finfo(feats.dtype).eps)


def _one_score(quads: Quadruplets) -> bool:
    scores = torch.stack(quads[4:7]).detach()[:, quads.valid]
    return scores.shape[1] > 2 and bool((scores == scores[0, 0]).all())  # fewer may be alike by chance


class _Later:
    """Signs of a GPU's batch, on their way to the host while the device goes on."""

    def __init__(self) -> None:
        self.calls = 0
        self.arrived: torch.cuda.Event | None = None
        self.signs: Tensor | None = None

    def due(self) -> bool:
        self.calls += 1
        return self.calls % _EVERY == 1

    def read(self) -> bool:
        """Whether an earlier batch had a sign; False, too, while that is not known."""
        if self.signs is None or self.arrived is None or not self.arrived.query():  # type: ignore[no-untyped-call]
            return False
        return bool(self.signs.any())

    def write(self, signs: Tensor) -> None:
        self.signs = torch.empty(signs.shape, dtype=torch.bool, pin_memory=True)
        self.signs.copy_(signs, non_blocking=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.arrived.record()


_later = _Later()
