"""Hard-quadruplet mining."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from . import _checks, processes, reference
from .quadruplets import Mode, Quadruplets
from .unit import PDDM, default_unit
from .unlabelled import check


def mine_and_score(
    feats: Tensor,
    labels: Tensor,
    unit: PDDM | None = None,
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
    """Find the hard quadruplets of a batch under the unit's score, and the scores of their pairs.

    Over the positive pairs (same label) and the negatives (another label)::

        (i, j) = argmin S over the positive pairs    k = argmax S_i· over i's negatives    l = argmax S_j· over j's

    Ties go to the lowest index; a NaN score never wins. The indices are constants; the scores carry gradient to
    ``feats`` and to the unit's eight parameters.

    Args:
        feats: (n, d) features, float32, float64, bfloat16 or float16, any strides. Rows are L2-normalised inside.
        labels: (n,) class ids of any integer dtype.
        unit: the scoring unit; without one, ``default_unit(d, feats.device)``, whose parameters your optimizer needs.
        mode: ``"batch"`` (the paper): one quadruplet, from the hardest positive pair of the batch, P + 2n scores.
            ``"anchor"``: one per row, with its own hardest positive, n²/2 scores.
            ``"pair"``: one per positive pair, n²/2 scores.
        ignore_label: the label of rows whose class is not known, such as −1. They are in no quadruplet, neither as
            positives of each other nor as negatives of anybody. None: every number is a class, −1 too.
        candidates: C, to score only pairs of a row and the C rows of other classes nearest to it by the dot product of
            unit rows, and of a row and its positives (the C farthest, where there are more); k and l are the best of
            these. At most nC + P scores, n² dot products and memory O(nC); in mode ``"batch"``, which has little to
            save, P + 2C scores and 2n dot products. In mode ``"pair"`` the slots are the positive pairs that are
            scored. From C = n on nothing is left out; None is the same.
        ref_feats: (m, d) references, rows beside the batch such as those of a :class:`pddm_ext.MemoryBank`, of any of
            the dtypes; each is rounded to feats' own on its way. Then i is a row of the batch and j, k and l are rows
            of the references: (i, j) of equal labels, k of another label than i's, l of another than j's. The batch
            is none of its references unless its rows are among them. Where references ask for a gradient they have
            one. ``"batch"`` scores P + 2m pairs, P the positive ones; ``"anchor"`` and ``"pair"`` n·m, and m more for
            each distinct j. They are streamed: memory is O(n) beyond them.
        ref_labels: (m,) class ids of the references.
        ids: (n,) numbers of the batch's samples, of any integer dtype, with ref_ids (m,): rows of equal numbers are one
            sample, which is never paired with itself. Without them nothing is left out: where the batch is among its
            references, each row's best match is then itself.
        ref_ids: (m,), see ids.
        group: the processes whose batches are one, all of which then call this at once, each with its own rows. The
            indices are rows of the whole batch, in the order of ranks. A process has the slots of its own rows
            (``"anchor"``), of the pairs whose lower row is its own (``"pair"``), or the one slot if its i is its own
            (``"batch"``; the others' is not valid): together they are what one process mines of the whole batch, and
            on the CPU have its bits. Each scores n²/2W of the pairs, n rows of W processes. References are the same in
            every process; each compares its own rows, and its part of the distinct j. The loss then wants the group,
            too; see :class:`pddm_ext.QuadrupletLoss` for gradients. The unit must be the same in every process, which
            default units are not by themselves. What one process refuses is an error in all.

    A batch from which nothing can be learned is told once in words; see :func:`pddm_ext.set_health_checks`.

    Returns:
        :class:`Quadruplets` of (Q,) tensors; see there for Q and for slots that are not valid.

    Raises:
        ValueError: a shape, length, mode, number of candidates or feature dimension that does not fit.
        TypeError: a dtype that is not accepted, or candidates that are no int.
        RuntimeError: tensors on different devices, or on one this build has no kernels for.

    Source: Huang, Loy, Tang, NIPS 2016, section 3.2.
    """
    if not isinstance(unit, PDDM | reference.PDDM):  # a unit checks its own arguments
        references = _checks.References(ref_feats, ref_labels, ids, ref_ids)
        if group is None:
            check(ignore_label)
            unit, _ = _checks.mining(feats, labels, unit, mode, default_unit, candidates, references)
        else:  # what one process refuses, all do
            given = (feats, labels, unit, mode, ignore_label, candidates, references, group)
            processes.of_miners(*given, default_unit)
            unit = default_unit(feats.shape[1], feats.device) if unit is None else unit
    return unit.mine(
        feats,
        labels,
        mode=mode,
        ignore_label=ignore_label,
        candidates=candidates,
        ref_feats=ref_feats,
        ref_labels=ref_labels,
        ids=ids,
        ref_ids=ref_ids,
        group=group,
    )
