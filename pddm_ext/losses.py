"""The double-header hinge loss over quadruplets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _checks, _numbers, ops, processes
from .precision import no_autocast
from .quadruplets import Quadruplets

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS: Final = ("mean", "sum", "none")
_INDICES: Final = (torch.int64,) * 4


class QuadrupletLoss(nn.Module):
    """Hinges on the scores and on the squared Euclidean distances D of the unit features, mean over valid quadruplets::

        E_m = max(0, α + S_ik − S_ij) + max(0, α + S_jl − S_ij)
        E_e = max(0, β + D_ij − D_ik) + max(0, β + D_ij − D_jl)
        L   = E_m + weight · E_e

    The paper's γ is the optimizer's weight decay (5e-4 there). No valid quadruplet gives 0 with zero gradients.

    The mean is one operator forward and one backward; what it does not have (other reductions, compiled graphs,
    ``torch.func``, second derivatives) plain PyTorch computes, as in ``reference``.

    In a group of W processes, of whose V valid quadruplets this one has V_r, it returns L_r = W / V · Σ over its own,
    so that the mean of what they return is the loss L of the whole batch. A wrapper such as DDP takes the mean of the
    processes' gradients: 1 / W · Σ_r ∇L_r = ∇L. What the others' quadruplets ask of this process's rows reaches them in
    the backward pass, which all take part in. So the gradients of the net and of the unit, each averaged over the
    processes, are those of one process with the whole batch. A regularizer sees this process's rows alone.

    Source: Huang, Loy, Tang, NIPS 2016, equations 3 to 5.

    Args:
        alpha: margin α of the scores, from 0.
        beta: margin β of the squared distances, which lie in [0, 4]; from 0.
        weight: λ, of E_e; from 0.
        regularizer: added to the loss, a function of the features and their labels such as
            :class:`pddm_ext.DensityRegularizer`; the loss then wants the labels, too.
        regularizer_weight: of its value.
        reduction: ``"mean"`` over valid quadruplets, their ``"sum"``, or ``"none"``.
        group: the processes that have mined one batch together; they all call this at once.

    Shape:
        feats (n, d), as given to the miner; quads with fields of (Q,); labels (n,) of any integer dtype; ref_feats
        (m, d), if and only if the quadruplets were mined among references. The result is a scalar in the scores' dtype;
        without reduction (Q,), 0 where a quadruplet is not valid.

    Raises:
        ValueError: a number out of its range, no such reduction, a regularizer without a reduction or labels, feats
            that are not (n, d), or quads that were mined from another number of rows.
        TypeError: an argument of another type, or feats of a dtype that is not accepted.
    """

    #: One operator forward and one backward, where there is one.
    _fused = True
    __copy__, __deepcopy__ = processes.shallow_copy_with_group, processes.copy_with_group
    __getstate__ = processes.state_without_group

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 1.0,
        weight: float = 0.5,
        *,
        regularizer: Callable[[Tensor, Tensor], Tensor] | None = None,
        regularizer_weight: float = 1.0,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        numbers = {"alpha": alpha, "beta": beta, "weight": weight, "regularizer_weight": regularizer_weight}
        for name, value in numbers.items():
            _numbers.number(name, value, "a finite number from 0")
        if not (regularizer is None or callable(regularizer)):
            raise TypeError(f"regularizer is a {type(regularizer).__name__}; a function or None is accepted")
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; {', '.join(map(repr, _REDUCTIONS))} are accepted")
        if regularizer is not None and reduction == "none":
            raise ValueError("reduction is 'none' beside a regularizer, which has no value for each quadruplet")
        if group is not None:
            processes.check(group)
            if reduction == "none":
                raise ValueError("reduction is 'none' beside a group; 'mean' and 'sum' are accepted")
        self.group = group
        self.alpha, self.beta, self.weight = alpha, beta, weight
        self.regularizer, self.regularizer_weight, self.reduction = regularizer, regularizer_weight, reduction

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, beta={self.beta}, weight={self.weight}"
        return own if self.regularizer is None else f"{own}, regularizer_weight={self.regularizer_weight}"

    def forward(
        self, feats: Tensor, quads: Quadruplets, labels: Tensor | None = None, *, ref_feats: Tensor | None = None
    ) -> Tensor:
        batch = feats
        feats, quads = self._rows(feats, quads, ref_feats, labelled=self.regularizer is None or labels is not None)
        margins = self.alpha, self.beta, self.weight
        learned = [margin for margin in margins if isinstance(margin, Tensor)]  # which have gradients, too
        if self._fused and self.reduction == "mean" and not learned and _fits(feats, quads):
            i, j, k, l, s_ij, s_ik, s_jl, valid = quads  # noqa: E741 - the paper's names
            given = (feats, s_ij, s_ik, s_jl, i, j, k, l, valid, *map(float, margins))
            loss: Tensor = ops.call("quadruplet_loss", *given)[0]
        else:
            loss = self._plain(feats, quads)
        loss = self._scaled(loss, quads.valid)
        if self.regularizer is None or labels is None:
            return loss
        return loss + self.regularizer_weight * self.regularizer(batch, labels)

    def similarity(self, quads: Quadruplets) -> Tensor:
        """E_m: pulls the unit (and the features through it) to score positives above negatives by α."""
        if self.group is None:
            _quadruplets(quads)
        else:
            device = processes.where(quads.valid if isinstance(quads, Quadruplets) else None)

            def checked() -> int:
                _quadruplets(quads)
                return 0

            processes.lengths(self.group, device, checked)
        return self._scaled(self._reduced(self._similarity(quads), quads.valid), quads.valid)

    def embedding(self, feats: Tensor, quads: Quadruplets, *, ref_feats: Tensor | None = None) -> Tensor:
        """E_e: pulls the features themselves, whoever mined the quadruplets."""
        feats, quads = self._rows(feats, quads, ref_feats)
        return self._scaled(self._reduced(self._embedding(feats, quads), quads.valid), quads.valid)

    def _rows(
        self, feats: Tensor, quads: Quadruplets, ref_feats: Tensor | None, labelled: bool = True
    ) -> tuple[Tensor, Quadruplets]:
        """Features of whatever rows the quadruplets name, and the quadruplets in their numbers."""

        if self.group is None:
            _labels_there(labelled)
            _of_batch(feats, quads, ref_feats)
            return _joined(feats, quads, ref_feats)

        def checked() -> int:
            _labels_there(labelled)
            _quadruplets(quads)
            _checks._matrix("feats", feats)
            _checks._devices(feats, quads.i)
            _of_references(feats, quads, ref_feats)
            return feats.shape[0]

        mined = quads.mined_rows() if isinstance(quads, Quadruplets) else None
        alike = {**_checks.numbers_of(feats), "mined rows": -1 if mined is None else mined}
        of = processes.lengths(self.group, processes.where(feats), checked, alike)
        if mined is not None and mined != sum(of):
            raise ValueError(f"the group's feats have {sum(of)} rows; quads were mined from {mined}")
        return _joined(processes.gathered(feats, of, self.group), quads, ref_feats)

    def _scaled(self, value: Tensor, valid: Tensor) -> Tensor:
        if self.group is None:
            return value
        own = valid.sum()
        total, world = own.clone(), dist.get_world_size(self.group)
        dist.all_reduce(total, group=self.group)
        if self.reduction == "sum":
            return value * world
        # In the loss's own dtype: a quotient of integers would be of torch's default one, such as float16.
        return value * ((own * world).to(value.dtype) / total.clamp(min=1).to(value.dtype))

    # Of every slot. At Q = 1 the loss is nothing but launches, so what can be one operator over all pairs is.

    def _similarity(self, quads: Quadruplets) -> Tensor:
        return F.relu(torch.stack([quads.s_ik, quads.s_jl]) - quads.s_ij + self.alpha).sum(0)

    def _embedding(self, feats: Tensor, quads: Quadruplets) -> Tensor:
        if feats.shape[0] == 0:
            return feats.sum().to(quads.s_ij.dtype)
        # Slots that are not valid are cut off before the norm, for the gradient of a row of NaN would be NaN even
        # times 0. An embedding's gradient is added up in one order on every device, and before it is rounded.
        f = F.embedding(torch.stack(quads[:4]).clamp(min=0), feats.to(quads.s_ij.dtype))
        f_i, f_j, f_k, f_l = F.normalize(torch.where(quads.valid[:, None], f, 0.0), dim=-1)
        d_ij, d_ik, d_jl = (torch.stack([f_i, f_i, f_j]) - torch.stack([f_j, f_k, f_l])).square().sum(-1)
        return F.relu(d_ij + self.beta - torch.stack([d_ik, d_jl])).sum(0)

    def _plain(self, feats: Tensor, quads: Quadruplets) -> Tensor:
        return self._reduced(self._similarity(quads) + self.weight * self._embedding(feats, quads), quads.valid)

    def _reduced(self, values: Tensor, valid: Tensor) -> Tensor:
        values = torch.where(valid, values, 0.0)
        if self.reduction == "none":
            return values
        return values.sum() if self.reduction == "sum" else values.sum() / valid.sum().clamp(min=1)


def _fits(feats: Tensor, quads: Quadruplets) -> bool:
    """Whether the operator has this: tensors of one device that the kernels were built for, of whom nobody asks for
    more than first derivatives yet, and quadruplets as mining makes them."""
    shape, scores, device = quads.valid.shape, quads.s_ij.dtype, feats.device
    if not (device.type in ops.DEVICES and scores in (torch.float32, torch.float64) and len(shape) == 1):
        return False
    for t, dtype in zip(quads, (*_INDICES, scores, scores, scores, torch.bool), strict=True):
        if not (t.dtype is dtype and t.shape == shape and t.device == device):
            return False
    return _checks.concrete(feats) and forward_ad._current_level < 0


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.alpha, ctx.beta, ctx.weight = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Any, ...]:
    feats, s_ij, s_ik, s_jl, i, j, k, l, valid, opened = ctx.saved_tensors  # noqa: E741 - the paper's names
    given = (feats, s_ij, s_ik, s_jl)
    gradients: tuple[Tensor | None, ...] = (None,) * 4
    if upstream is not None and torch.is_grad_enabled():  # these are to be differentiated in turn
        plain = QuadrupletLoss(ctx.alpha, ctx.beta, ctx.weight)
        with torch.enable_grad():
            # Of copies, or what leads from the features to the scores would be gone through here as well.
            given = tuple(x.view_as(x) for x in given)
            quads = Quadruplets(i, j, k, l, *given[1:], valid)
            loss = plain._plain(given[0], quads)
            wanted = [x for x in given if x.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True, allow_unused=True))
        gradients = tuple(next(found) if x.requires_grad else None for x in given)
    elif upstream is not None:
        gradients = ops.call("quadruplet_loss_backward", upstream, opened, *given, i, j, k, l, valid, ctx.weight)
    return (*gradients, *(None,) * 8)


ops.differentiable("quadruplet_loss", _backward, _keep)


def _labels_there(labelled: bool) -> None:
    if not labelled:
        raise ValueError("labels are missing; a loss with a regularizer is called as loss(feats, quads, labels)")


def _quadruplets(quads: Quadruplets) -> None:
    if not isinstance(quads, Quadruplets):
        raise TypeError(f"quads is a {type(quads).__name__}; Quadruplets are accepted")


def _joined(feats: Tensor, quads: Quadruplets, ref_feats: Tensor | None) -> tuple[Tensor, Quadruplets]:
    """Features and quadruplets of one batch: the references that are picked follow the rows, slot by slot."""
    if ref_feats is None:
        return feats, quads
    picked = torch.cat(quads[1:4])
    n = feats.shape[0]
    with no_autocast(feats):  # which joins no other half precision than its own
        rows = feats if ref_feats.shape[0] == 0 else torch.cat([feats, ref_feats[picked.clamp(min=0)].to(feats.dtype)])
    places = torch.where(picked < 0, -1, n + torch.arange(picked.shape[0], device=picked.device))
    j, k, l = places.reshape(3, quads.i.shape[0])  # noqa: E741 - the paper's name
    return rows, quads._replace(j=j, k=k, l=l)


def _of_batch(feats: Tensor, quads: Quadruplets, ref_feats: Tensor | None = None) -> None:
    """Refuses features that are not those of the quadruplets, as far as their number tells."""
    _quadruplets(quads)
    _checks._matrix("feats", feats)
    _checks._devices(feats, quads.i)
    _of_references(feats, quads, ref_feats)
    mined = None if torch.compiler.is_compiling() else quads.mined_rows()
    if mined is not None:
        if mined != feats.shape[0]:
            raise ValueError(f"feats has {feats.shape[0]} rows; quads were mined from {mined}")
    elif _checks.readable(feats) and len(quads.i):
        sides: list[tuple[str, Tensor, tuple[Tensor, ...]]] = [("feats", feats, quads[:4])]
        if ref_feats is not None:
            sides = [("feats", feats, quads[:1]), ("ref_feats", ref_feats, quads[1:4])]
        for field, x in zip(quads._fields, quads, strict=True):
            if x.shape != quads.valid.shape or x.dim() != 1:
                raise ValueError(
                    f"quads.{field} has shape {tuple(x.shape)} and quads.valid {tuple(quads.valid.shape)}; (Q,) of all "
                    f"is accepted"
                )
        for name, rows, indices in sides:
            every = torch.stack(indices)
            last, least = int(every.max()), int(torch.where(quads.valid, every, 0).min())
            if last >= rows.shape[0]:
                raise ValueError(f"{name} has {rows.shape[0]} rows; quads were mined from {last + 1} or more")
            if least < 0:
                raise ValueError(f"quads has row {least} of {name} in a valid slot; from 0 is accepted")


def _of_references(feats: Tensor, quads: Quadruplets, ref_feats: Tensor | None) -> None:
    if ref_feats is not None:
        _checks._matrix("ref_feats", ref_feats)
        _checks._devices(feats, ref_feats)
        if ref_feats.shape[1] != feats.shape[1]:
            raise ValueError(f"ref_feats has shape {tuple(ref_feats.shape)}; feats has dimension {feats.shape[1]}")
    if torch.compiler.is_compiling() or quads.mined_rows() is None:
        return
    among, given = quads.mined_references(), None if ref_feats is None else ref_feats.shape[0]
    if among != given:
        found = "is missing" if given is None else f"has {given} rows"
        wanted = "no references" if among is None else f"{among} references"
        raise ValueError(f"ref_feats {found}; quads were mined among {wanted}")
