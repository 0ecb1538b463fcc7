"""pytorch-metric-learning with the learned score: a miner, a distance, a loss and a regularizer of the library's kinds.

They take the library's arguments (``ref_emb``, ``ref_labels``, ``indices_tuple``, ``reducer``, ``collect_stats``) and
work in its wrappers, trainers, testers and accuracy calculator. ``CrossBatchMemory`` and ``SelfSupervisedLoss`` know
losses by the names of their classes: they take :class:`PDDMSimilarity` inside those, and :class:`QuadrupletLoss` in a
subclass of theirs whose ``supported_losses()`` has its name.

Where ``unit`` is left out, :func:`pddm_ext.default_unit` of the embeddings' dimension scores. It is no submodule of
anything here: its parameters train only if your optimizer has them. One that is given is in ``loss.parameters()``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _numbers, density, health, losses
from ..mining import mine_and_score
from ..parameters import Parameters
from ..precision import autocast
from ..quadruplets import Mode, Quadruplets
from ..scoring import score_matrix, score_pairs
from ..unit import PDDM, default_unit
from . import needs

needs("pytorch_metric_learning", "pml")

from pytorch_metric_learning.distances import BaseDistance  # noqa: E402
from pytorch_metric_learning.losses import BaseMetricLossFunction  # noqa: E402
from pytorch_metric_learning.miners import BaseMiner  # noqa: E402
from pytorch_metric_learning.regularizers import BaseRegularizer  # noqa: E402
from pytorch_metric_learning.utils import common_functions as c_f  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

__all__ = ["DensityRegularizer", "PDDMMiner", "PDDMSimilarity", "QuadrupletLoss"]

Triplets = tuple[Tensor, Tensor, Tensor]


class PDDMSimilarity(BaseDistance):  # type: ignore[misc]
    """The score of a unit as a distance of the library: inverted, a larger one means more alike.

    Differentiable to the embeddings and to the unit's parameters. Embeddings that are their own reference are scored
    once for each unordered pair. Margins and thresholds are in the unit's scores, which have no fixed range.

    What takes it: ``TripletMarginLoss``, ``ContrastiveLoss`` (its ``pos_margin`` above its ``neg_margin``, unlike the
    defaults), ``MultiSimilarityLoss``, ``NTXentLoss``, ``SupConLoss``, ``NCALoss``, ``MarginLoss``, ``NPairsLoss``,
    ``LiftedStructureLoss``, ``GeneralizedLiftedStructureLoss``, ``IntraPairVarianceLoss``; against their proxies
    ``ProxyNCALoss``, ``ProxyAnchorLoss``, ``SoftTripleLoss``, ``NormalizedSoftmaxLoss``; every miner with a choice of
    distance but ``AngularMiner`` and ``DistanceWeightedMiner``; ``MatchFinder``, and under ``torch.no_grad()``
    ``CustomKNN``. Losses of one geometry refuse it, ``CircleLoss`` and whatever else is made for cosines or Euclidean
    distances. Three take any distance and cannot use this one: ``RankedListLoss`` (smaller must mean more alike),
    ``HistogramLoss`` (wants [−1, 1]) and ``ManifoldLoss`` (cuts scores off at 0).

    Args:
        unit: the scoring unit.
        collect_stats: as everywhere in the library.

    Shape:
        query_emb (n, d), ref_emb (m, d), float32, float64, bfloat16 or float16, L2-normalised inside; (n, m) scores,
        float32 (float64 for float64 embeddings). ``pairwise_distance`` takes (n, d) twice and gives (n,).

    Raises:
        ValueError: a shape or embedding dimension that does not fit.
        TypeError: a dtype that is not accepted, or a unit that is no PDDM.
    """

    def __init__(self, unit: PDDM | None = None, *, collect_stats: bool | None = None) -> None:
        if unit is not None and not isinstance(unit, Parameters):
            raise TypeError(f"unit is a {type(unit).__name__}; a PDDM or None is accepted")
        # Left as they are, embeddings that are their own reference can be told by identity; the unit normalises.
        super().__init__(normalize_embeddings=False, is_inverted=True, collect_stats=collect_stats)
        self.unit = unit

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        if ref_emb is query_emb:
            return score_matrix(query_emb, self.unit_for(query_emb))
        query_emb, ref_emb = _one_space(query_emb, ref_emb)
        return score_matrix(query_emb, self.unit_for(query_emb), ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        query_emb, ref_emb = _one_space(query_emb, ref_emb)
        scores: Tensor = self.unit_for(query_emb)(query_emb, ref_emb)
        return scores

    def unit_for(self, embeddings: Tensor) -> PDDM:
        """The unit, or the default one of the embeddings' dimension and device."""
        return default_unit(embeddings.shape[-1], embeddings.device) if self.unit is None else self.unit


class PDDMMiner(BaseMiner):  # type: ignore[misc]
    """Triplets (anchor, positive, negative) from the hard quadruplets (i, j, k, l) of a unit: (i, j, k) and (j, i, l).

    All (i, j, k) come first, then all (j, i, l). Quadruplets that are not valid are left out.

    With a reference of its own (``ref_emb``, ``ref_labels``) it mines among references, as
    :func:`pddm_ext.mine_and_score` does: i is a row of the embeddings, j and k are rows of the reference. Their
    triplets are (i, j, k) alone, since the library's anchors are rows of the embeddings. As everywhere in the library,
    ``ref_labels`` that are the very tensor ``labels`` say that row i is the same sample in both, and no positive of
    itself. Where nothing says so, as in ``CrossBatchMemory``, equal rows are taken for one sample, and never paired.

    Args:
        unit: the scoring unit.
        mode: ``"anchor"``: each row's own hardest positive. ``"batch"``: the one hardest positive pair.
            ``"pair"``: every positive pair.
        ignore_label: the label of rows whose class is not known: they are in no triplet.
        candidates: score only each row's so many nearest of other classes, see :func:`pddm_ext.mine_and_score`.
        **kwargs: of the library's ``BaseMiner``, but ``distance``.

    Shape:
        embeddings (n, d), labels (n,) of any integer dtype, ref_emb (m, d), ref_labels (m,); three int64 (T,).

    Raises:
        ValueError: a mode, a shape, a length or an embedding dimension that does not fit, or a ``distance``.
        TypeError: a dtype that is not accepted, or a unit that is no PDDM.

    Source: Huang, Loy, Tang, NIPS 2016, section 3.2.
    """

    def __init__(
        self,
        unit: PDDM | None = None,
        mode: Mode = "anchor",
        *,
        ignore_label: int | None = None,
        candidates: int | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.mode(mode)
        _checks.number_of_candidates(candidates)
        _refuse_distance(kwargs)
        super().__init__(distance=PDDMSimilarity(unit), **kwargs)
        self.mode: Mode = mode
        self.ignore_label, self.candidates = _ignored(ignore_label), candidates

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Triplets:
        among = ref_emb is not embeddings or ref_labels is not labels
        quads = _quadruplets(self, embeddings, labels, *((ref_emb, ref_labels) if among else ()))
        i, j, k, l = torch.stack(quads[:4])[:, quads.valid]  # noqa: E741 - the paper's names
        return (i, j, k) if among else (torch.cat([i, j]), torch.cat([j, i]), torch.cat([k, l]))


class QuadrupletLoss(BaseMetricLossFunction):  # type: ignore[misc]
    """:class:`pddm_ext.QuadrupletLoss` as a loss of the library: one element for the reducer per quadruplet or triplet.

    Called without ``indices_tuple``, it mines with its unit, among the reference where there is one, and a quadruplet
    (i, j, k, l) is one element with the indices (i, j, k). Their mean, which the default reducer takes, is
    ``pddm_ext.QuadrupletLoss()``'s, to rounding.

    Called with ``indices_tuple``, triplets or pairs from any miner, it has one element for each triplet, S being the
    score and D the squared Euclidean distance of the unit embeddings::

        max(0, α + S_an − S_ap) + weight · max(0, β + D_ap − D_an)

    so the triplets of :class:`PDDMMiner` have the same sum as the quadruplets, over twice as many elements.

    No quadruplet or triplet at all gives 0 with zero gradients.

    Source: Huang, Loy, Tang, NIPS 2016, equations 3 to 5.

    Args:
        unit: the scoring unit.
        mode: of mining, as in :class:`PDDMMiner`.
        alpha: margin α of the scores.
        beta: margin β of the squared distances, which lie in [0, 4].
        weight: of the distances' term.
        ignore_label: the label of rows whose class is not known: what this mines has none of them.
        candidates: of what this mines, as in :class:`PDDMMiner`.
        **kwargs: of the library's ``BaseMetricLossFunction``, but ``distance``: reducer, embedding_regularizer, …

    Shape:
        embeddings (n, d), float32, float64, bfloat16 or float16; labels (n,) of any integer dtype; ref_emb (m, d),
        ref_labels (m,). The reducer is given float32 elements (float64 for float64 embeddings).

    Raises:
        ValueError: a mode, a shape, a length or an embedding dimension that does not fit, or a ``distance``.
        TypeError: a dtype that is not accepted, or a unit that is no PDDM.
        IndexError: ``indices_tuple`` has a row that is not there.
    """

    def __init__(
        self,
        unit: PDDM | None = None,
        mode: Mode = "anchor",
        alpha: float = 0.5,
        beta: float = 1.0,
        weight: float = 0.5,
        *,
        ignore_label: int | None = None,
        candidates: int | None = None,
        **kwargs: Any,
    ) -> None:
        _checks.mode(mode)
        _checks.number_of_candidates(candidates)
        _refuse_distance(kwargs)
        super().__init__(distance=PDDMSimilarity(unit), **kwargs)
        self.mode: Mode = mode
        self.ignore_label, self.candidates = _ignored(ignore_label), candidates
        self._each = losses.QuadrupletLoss(alpha, beta, weight, reduction="none")
        self.alpha, self.beta, self.weight = alpha, beta, weight
        self.add_to_recordable_attributes(list_of_names=["alpha", "beta", "weight"], is_stat=False)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, alpha={self.alpha}, beta={self.beta}, weight={self.weight}"

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, Any]:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        if labels is not None:
            _checks._vector("labels", labels, len(embeddings), "embeddings")
        if indices_tuple is not None:
            triplets = lmu.convert_to_triplets(indices_tuple, labels, ref_labels)
            values = self._of_triplets(embeddings, ref_emb, *triplets)
        else:
            among = ref_emb is not embeddings or ref_labels is not labels
            quads = _quadruplets(self, embeddings, labels, *((ref_emb, ref_labels) if among else ()))
            values = self._each(embeddings, quads, ref_feats=ref_emb if among else None)[quads.valid]
            triplets = tuple(torch.stack(quads[:3])[:, quads.valid])
        if len(values) == 0:
            return self.zero_losses()  # type: ignore[no-any-return]
        return {"loss": {"losses": values, "indices": triplets, "reduction_type": "triplet"}}

    def _of_triplets(self, embeddings: Tensor, ref_emb: Tensor, a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        for name, index, of in (("anchors", a, embeddings), ("positives", p, ref_emb), ("negatives", n, ref_emb)):
            if ((index < 0) | (index >= len(of))).any():
                raise IndexError(f"{name} are {int(index.min())} to {int(index.max())}; 0 to {len(of) - 1} is accepted")
        itself = ref_emb is embeddings
        rows, shift = (embeddings, 0) if itself else (torch.cat(_one_space(embeddings, ref_emb)), len(embeddings))
        # Triplets share their pairs: all of a batch have O(n³) of the first and O(n²) of the second.
        pairs, which = torch.unique(torch.stack([a, a]) * len(ref_emb) + torch.stack([p, n]), return_inverse=True)
        unit = self.distance.unit_for(embeddings)
        scores = score_pairs(rows, pairs // len(ref_emb), pairs % len(ref_emb) + shift, unit)
        s_ap, s_an = scores[which]
        f = F.normalize(embeddings.to(scores.dtype), dim=-1)
        g = f if itself else F.normalize(ref_emb.to(scores.dtype), dim=-1)
        with torch.autocast(f.device.type, enabled=False):
            distances = f.square().sum(-1)[:, None] + g.square().sum(-1) - 2 * f @ g.T
        return F.relu(self.alpha + s_an - s_ap) + self.weight * F.relu(self.beta + distances[a, p] - distances[a, n])


class DensityRegularizer(BaseRegularizer):  # type: ignore[misc]
    """:class:`pddm_ext.DensityRegularizer` as an ``embedding_regularizer`` of any loss of the library.

    The library hands a regularizer the embeddings alone, and this one needs their labels. :meth:`attach` lets it see
    what the loss is called with::

        density = DensityRegularizer(ratio=0.5)
        loss = density.attach(TripletMarginLoss(embedding_regularizer=density, embedding_reg_weight=0.1))

    The loss stays the loss it was, of the same class, so wrappers know it; copies of it have copies of the regularizer,
    attached. Within ``CrossBatchMemory`` the regularizer sees the batch, not the memory.

    Source: Li, Yao, Pan, Chao, Mei, *Deep Metric Learning with Density Adaptivity*, 2019, arXiv:1909.03909.

    Args:
        ratio: the extent aimed at, over the room; positive.
        temperature: T, in squared distance; positive.
        eps: ε, in squared distance; positive.
        ignore_label: the label of rows whose class is not known, which are left out.
        **kwargs: of the library's ``BaseRegularizer``, but ``distance``.

    Shape:
        embeddings (n, d), labels (n,) of any integer dtype. The result is a scalar.

    Raises:
        ValueError: a parameter that is not positive and finite, a shape or length that does not fit, or a ``distance``.
        TypeError: a dtype that is not accepted.
        RuntimeError: it is called by no loss that it is attached to, or by one that was called without labels.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        temperature: float = 0.05,
        eps: float = 1e-4,
        *,
        ignore_label: int | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_distance(kwargs)
        super().__init__(**kwargs)
        self.density = density.DensityRegularizer(ratio, temperature, eps, ignore_label=ignore_label)
        self._labels: Tensor | None = None

    def attach(self, loss: BaseMetricLossFunction) -> BaseMetricLossFunction:
        """Let the regularizer see the labels of every call of the loss it was given to, during that call.

        Args:
            loss: a loss that was made with ``embedding_regularizer=`` this.

        Returns:
            The loss.

        Raises:
            ValueError: its embedding_regularizer is another, or none.
        """
        if getattr(loss, "embedding_regularizer", None) is not self:
            raise ValueError(
                f"loss is a {type(loss).__name__} that was not made with embedding_regularizer=this regularizer"
            )
        # Bound methods: a copy of the loss has hooks that are methods of its own copy of the regularizer.
        loss.register_forward_pre_hook(self._remember, with_kwargs=True)
        loss.register_forward_hook(self._forget, always_call=True)
        return loss

    def _remember(self, loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels", args[1] if len(args) > 1 else None)

    def _forget(self, *_: Any) -> None:
        self._labels = None

    def compute_loss(self, x: Tensor) -> dict[str, Any]:
        if self._labels is None:
            raise RuntimeError(
                "DensityRegularizer has no labels of these embeddings: make the loss with "
                "embedding_regularizer=density, call density.attach(loss), and then the loss with labels"
            )
        value = self.density(x, c_f.to_device(self._labels, x))
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}


def _refuse_distance(kwargs: dict[str, Any]) -> None:
    if "distance" in kwargs:
        raise ValueError(f"distance is a {type(kwargs['distance']).__name__}; this has its own and accepts none")


def _one_space(embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on: a memory bank need not have the batch's, as for any other product."""
    embeddings, ref_emb = autocast(embeddings), autocast(ref_emb)
    _checks._both("embeddings", embeddings, "ref_emb", ref_emb)
    return embeddings, ref_emb


def _ignored(ignore_label: int | None) -> int | None:
    if ignore_label is not None:
        _numbers.integer("ignore_label", ignore_label)
    return ignore_label


def _quadruplets(
    mining: PDDMMiner | QuadrupletLoss,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Quadruplets:
    """Of a batch, or among a reference: i is then a row of the embeddings, and j, k and l are rows of the reference."""
    among: dict[str, Any] = {}
    if ref_emb is not None:
        if mining.candidates is not None:
            raise NotImplementedError(
                f"candidates is {mining.candidates}, for pairs of the batch; with a reference (ref_emb) "
                f"None is accepted"
            )
        itself = ref_emb is embeddings or ref_labels is labels or ref_labels is None  # the library's reading
        ref_labels = labels if ref_labels is None else ref_labels
        _checks._vector("labels", labels, len(embeddings), "embeddings")
        _checks._vector("ref_labels", ref_labels, len(ref_emb), "ref_emb")
        health.before_mining(embeddings=embeddings, ref_emb=ref_emb)
        embeddings, ref_emb = _one_space(embeddings, ref_emb)
        ids, ref_ids = _samples(embeddings, ref_emb, itself)
        among = {"ref_feats": ref_emb, "ref_labels": ref_labels, "ids": ids, "ref_ids": ref_ids}
    return mine_and_score(
        embeddings,
        labels,
        mining.distance.unit,
        mode=mining.mode,
        ignore_label=mining.ignore_label,
        candidates=mining.candidates,
        **among,
    )


def _samples(embeddings: Tensor, ref_emb: Tensor, itself: bool) -> tuple[Tensor, Tensor]:
    """Numbers of samples: those of row i are one where that is known; otherwise those of equal rows."""
    n = len(embeddings)
    if itself and len(ref_emb) == n:
        rows = torch.arange(n, device=embeddings.device)
        return rows, rows
    # unique() cannot sort NaN. Whatever stands for it, pairs with it score NaN and stay out.
    rows = torch.unique(torch.cat([embeddings, ref_emb]).detach().nan_to_num(), dim=0, return_inverse=True)[1]
    return rows[:n], rows[n:]
