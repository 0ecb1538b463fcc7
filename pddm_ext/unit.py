"""The scoring unit, on the fused kernels."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, health, processes
from .candidates import mine_candidates
from .group import mine_group
from .ops import call, tracing, unit_arguments
from .parameters import Parameters
from .precision import autocast
from .quadruplets import MODES, Mode, Quadruplets
from .references import mine_references, number_classes
from .unlabelled import set_aside, unlabelled


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
        tensors = _checks.matched_rows(x, y, self)
        n = x[..., 0].numel()
        rows = torch.cat([autocast(x).reshape(n, self.dim), autocast(y).reshape(n, self.dim)])
        i = torch.arange(n, device=x.device)
        scores: Tensor = call("score_pairs", rows, i, i + n, *unit_arguments(self, tensors))
        return scores.reshape(x.shape[:-1])

    def mine(
        self,
        feats: Tensor,
        labels: Tensor,
        *,
        mode: Mode = "batch",
        ignore_label: int | None = None,
        candidates: int | None = None,
        ref_feats: Tensor | None = None,
        ref_labels: Tensor | None = None,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Quadruplets:
        """:func:`pddm_ext.mine_and_score` with this unit."""
        references = _checks.References(ref_feats, ref_labels, ids, ref_ids)
        if group is not None:
            given = (feats, labels, self, mode, ignore_label, candidates, references, group)
            of = processes.of_miners(*given, default_unit)
            arguments = (ignore_label, unit_arguments(self), MODES.index(mode), group, references)
            mined = mine_group(autocast(feats), labels, of, *arguments)
            return _quadruplets(mined).of_rows(sum(of), references.number())
        _, tensors = _checks.mining(feats, labels, self, mode, default_unit, candidates, references)
        left_out = unlabelled(labels, ignore_label)
        numbers = (*unit_arguments(self, tensors), MODES.index(mode))
        if ref_feats is not None and ref_labels is not None:
            rows = autocast(feats)
            classes, ref_classes = number_classes(labels, ref_labels, left_out, unlabelled(ref_labels, ignore_label))
            samples = (None if x is None else x.long() for x in (ids, ref_ids))
            mined = mine_references(rows, classes, ref_feats, ref_classes, *samples, *numbers)
        else:
            rows, classes = (feats, labels) if left_out is None else set_aside(feats, labels, left_out)
            rows = autocast(rows)
            if candidates is not None and tracing():
                raise RuntimeError(
                    "torch.jit.trace would keep whether candidates are fewer than rows; None is accepted"
                )
            if candidates is None or candidates >= feats.shape[0]:
                mined = call("mine", rows, classes, *numbers)
            else:
                mined = mine_candidates(rows, classes, *numbers, int(candidates))
        quads = _quadruplets(mined)
        health.after_mining(quads, rows, labels, self, left_out, ref_feats)
        return quads.of_rows(feats.shape[0], references.number())


def _quadruplets(mined: tuple[Tensor, ...]) -> Quadruplets:
    """From the operators' order to the contract's."""
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
    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if (dim, where) not in _default_units:
        # Made in ordinary mode even if an evaluation under inference_mode is the first to ask, or it could never train.
        with _default_units_lock, torch.inference_mode(False):
            if (dim, where) not in _default_units:
                if torch._C._are_functorch_transforms_active() or hasattr(torch.empty(0), "fake_mode"):
                    raise RuntimeError(
                        f"default_unit({dim}) does not exist yet and cannot be made inside a transform of torch.func, "
                        f"an export or a fake tensor mode; call pddm_ext.default_unit({dim}) before"
                    )
                with torch.device("cpu"):  # whatever the default device is
                    unit = PDDM(dim)
                unit = unit.to(where)
                unit.u.weight.register_post_accumulate_grad_hook(_notice_unused)  # type: ignore[no-untyped-call]
                _default_units[dim, where] = unit
    return _default_units[dim, where]


#: Backward passes into one gradient, of a parameter that nobody changes, until that is told.
_UNUSED_PASSES = 8


def _notice_unused(weight: Tensor) -> None:
    assert weight.grad is not None
    # An optimizer would have changed the weight, or its zero_grad would have left a new gradient.
    version, passes, before = getattr(weight.grad, "_pddm_passes", (weight._version, 0, None))
    passes = passes + 1 if version == weight._version else 1
    if passes == _UNUSED_PASSES // 2:  # fused optimizers change it and not its version
        before = weight.detach().clone()
    if passes == _UNUSED_PASSES and before is not None and not torch.equal(before, weight.detach()):
        passes = 1
    weight.grad._pddm_passes = (weight._version, passes, before)  # type: ignore[attr-defined]
    if passes == _UNUSED_PASSES:
        dim = weight.shape[1]
        health.tell(
            "default unit",
            f"default_unit({dim}) has gathered the gradients of {passes} backward passes and no optimizer has used "
            f"them: unless a step is to gather more, it never trains. Hand its parameters to your optimizer, "
            f"[*net.parameters(), *pddm_ext.default_unit({dim}).parameters()], or freeze it with requires_grad_(False)",
        )
