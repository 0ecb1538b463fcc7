"""PDDM in PyTorch Lightning: a module that trains a net with its scoring unit and measures retrieval."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from .. import _checks, _numbers, processes
from ..losses import QuadrupletLoss
from ..precision import score_dtype, unmasked
from ..quadruplets import Mode
from ..unit import PDDM
from ..unlabelled import unlabelled
from . import needs

needs("lightning", "lightning")
needs("pytorch_metric_learning", "lightning")
needs("faiss", "lightning")

from lightning.pytorch import LightningModule  # noqa: E402
from lightning.pytorch.utilities import CombinedLoader  # noqa: E402
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # noqa: E402

#: What validation logs, by the names that pytorch-metric-learning gives it.
METRICS = ("precision_at_1", "mean_average_precision_at_r")

#: Batches after which divergence is looked for where the trainer does not log.
_CHECK_EVERY = 50
#: float16's smallest number: what overflows in spite of this scale does not overflow for the scale's sake.
_SMALLEST_SCALE = 2.0**-24


class MetricLearningModule(LightningModule):
    r"""Trains a net and a PDDM unit of its own by the hard quadruplets of each batch, and measures retrieval.

    As it is, or as the base of a module that overrides any part of it, such as ``forward`` (images to features) or
    ``configure_optimizers`` (here it gives an optimizer, to be scheduled)::

        class Birds(MetricLearningModule):
            def __init__(self, width: int = 64) -> None:
                super().__init__(backbone(width), dim=width, lr=3e-4)

    A batch is a pair of images and labels; images are whatever ``forward`` takes. Losses are computed in float32
    (float64 for float64 features) whatever the trainer's precision. Training logs

    - ``train_loss`` and its terms, ``train_similarity`` (E_m) and ``train_embedding`` (λ E_e);
    - ``train_valid``, the share of slots that hold a quadruplet.

    Validation, and a test, take each row of an epoch as a query among all others, by Euclidean distance of the unit
    features, and log ``precision_at_1`` and ``mean_average_precision_at_r``, under ``NAME/dataloader_idx_N`` if there
    are several loaders. A row alone in its class is no query; where every row is, the figures are NaN.

    **Several processes.** ``strategy="ddp"`` serves, without looking for unused parameters: each step's graph has every
    parameter of the unit, and the features, even if no quadruplet is valid. Each process mines its own batch, and the
    gradient is the mean over the processes. With ``gather`` the rows of all processes are one batch, so that hard
    negatives of the others count: each process scores its part of the pairs, and the gradient is that of one process
    with the whole batch, by :class:`pddm_ext.QuadrupletLoss`'s group.

    It holds for batches of different lengths, but not for a net in which the rows of a batch meet, as in a BatchNorm
    that is not synchronised. Gathering waits for the device.

    Validation always gathers, however many rows each process has. Rows that a ``DistributedSampler`` repeats to make
    the shares equal are left out, for each would find its copy.

    **Divergence** ends training with a FloatingPointError on every process, at the end of an epoch, after a validation
    or every ``log_every_n_steps`` batches: mining leaves out what is not finite, so that the loss of a net that has
    diverged would be 0. Under a gradient scaler (``precision="16-mixed"``) a step that overflows is passed over, as it
    should be; parameters that are not finite, and a scale at which nothing is left to scale, are divergence there, too.
    A hook of yours, ``on_train_batch_end`` or ``on_train_epoch_end``, calls the module's own.

    **Checkpoints** load with ``weights_only=True``. Without a constructor of its own, a class saves the arguments too,
    but for the net: ``MetricLearningModule.load_from_checkpoint(path, net=net, weights_only=True)``. A constructor of
    yours may call ``save_hyperparameters`` itself.

    Args:
        net: any module that makes (n, dim) features.
        dim: length of a feature.
        mode: of mining, see :func:`pddm_ext.mine_and_score`.
        alpha: margin α of the scores.
        beta: margin β of the squared distances.
        weight: λ, of E_e.
        lr: learning rate of Adam.
        unit_lr_factor: the unit's learning rate over ``lr``.
        weight_decay: L2 penalty of Adam, the paper's γ.
        gather: mine the rows of all processes together; not beside candidates.
        ignore_label: the label of images whose class is not known: they are in no quadruplet, and in validation
            neither queries nor found.
        candidates: score only each row's so many nearest of other classes, see :func:`pddm_ext.mine_and_score`.

    Attributes:
        net: as given.
        unit: the :class:`pddm_ext.PDDM`; never the process-wide one.
        loss: the :class:`pddm_ext.QuadrupletLoss`.

    Shape:
        ``forward``: (n, …) to (n, dim) float32, float64, bfloat16 or float16. Labels: (n,) of any integer dtype.

    Raises:
        TypeError: net is no module; in a step, a dtype that is not accepted.
        ValueError: a mode or number that is not accepted; in a step, a shape that does not fit.
        FloatingPointError: a loss, a parameter or, in validation, a feature is not finite.

    Source: Huang, Loy, Tang, *Local Similarity-Aware Deep Feature Embedding*, NIPS 2016.
    """

    def __init__(
        self,
        net: nn.Module,
        dim: int,
        *,
        mode: Mode = "anchor",
        alpha: float = 0.5,
        beta: float = 1.0,
        weight: float = 0.5,
        lr: float = 1e-3,
        unit_lr_factor: float = 1.0,
        weight_decay: float = 5e-4,
        gather: bool = False,
        ignore_label: int | None = None,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is a {type(net).__name__}; a torch.nn.Module is accepted")
        _checks.mode(mode)
        _checks.number_of_candidates(candidates)
        if gather and candidates is not None:
            raise ValueError(f"candidates is {candidates} beside gather; with it None is accepted")
        for name, value in (("lr", lr), ("unit_lr_factor", unit_lr_factor)):
            _numbers.number(name, value, "a positive finite number")
        for name, value in (("alpha", alpha), ("beta", beta), ("weight", weight), ("weight_decay", weight_decay)):
            _numbers.number(name, value, "a finite number from 0")
        # Another constructor's arguments may be modules or anything else that only a pickle can hold, and loading
        # would give ours to it.
        if type(self).__init__ is MetricLearningModule.__init__:
            self.save_hyperparameters(ignore=["net"])
        self.net, self.unit = net, PDDM(dim)
        self.loss = QuadrupletLoss(alpha, beta, weight)
        if ignore_label is not None:
            _numbers.integer("ignore_label", ignore_label)
        self.mode, self.gather, self.ignore_label, self.candidates = mode, gather, ignore_label, candidates
        self.lr, self.unit_lr_factor, self.weight_decay = lr, unit_lr_factor, weight_decay
        self._validated: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._finite: Tensor | None = None

    def forward(self, images: Any) -> Tensor:
        """The features (n, dim) of images (n, …)."""
        feats: Tensor = self.net(images)
        return feats

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over every parameter of the module, the unit's in the second group, with its learning rate."""
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("unit.")]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": list(self.unit.parameters()), "lr": self.lr * self.unit_lr_factor},
        ]
        return torch.optim.Adam(groups, lr=self.lr, weight_decay=self.weight_decay)

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch (images, labels)."""
        feats, labels = self._embed(batch)
        group = self.loss.group = self._everyone() if self.gather else None
        feats, zero = unmasked(feats)
        # Autocast would round the features for scoring.
        with torch.autocast(feats.device.type, enabled=False):
            quads = self.unit.mine(
                feats,
                labels,
                mode=self.mode,
                ignore_label=self.ignore_label,
                candidates=self.candidates,
                group=group,
            )
            similarity = self.loss.similarity(quads)
            embedding = self.loss.weight * self.loss.embedding(feats, quads)
            loss = similarity + embedding + zero
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        slots = torch.stack([quads.valid.sum(), torch.tensor(len(quads.valid), device=feats.device)])
        if group is not None:
            dist.all_reduce(slots, group=group)
        # Of floats, since a quotient of integers has torch's default dtype, which may be float16.
        valid = slots[0].float() / slots[1].clamp(min=1) if self.mode != "batch" else slots[0]
        terms = {"train_similarity": similarity, "train_embedding": embedding, "train_valid": valid}
        # Of a group each process has its own part of the loss.
        several = group is not None
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=several)
        self.log_dict(terms, batch_size=len(labels), sync_dist=several)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        if (batch_idx + 1) % (every or _CHECK_EVERY) == 0:
            self._refuse_divergence()

    def on_train_epoch_end(self) -> None:
        self._refuse_divergence()

    def on_validation_epoch_start(self) -> None:
        self._validated.clear()

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keeps the unit features of a batch (images, labels) until the epoch ends."""
        feats, labels = self._embed(batch)
        self._validated[dataloader_idx].append((F.normalize(feats.float(), dim=-1), labels))

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval(CombinedLoader(self.trainer.val_dataloaders).flattened)

    def on_test_epoch_start(self) -> None:
        self._validated.clear()

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_retrieval(CombinedLoader(self.trainer.test_dataloaders).flattened)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The features (n, dim) of a batch of images, or of (images, labels)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        feats: Tensor = self(images)
        return feats

    def _log_retrieval(self, loaders: list[Any]) -> None:
        for index, batches in sorted(self._validated.items()):
            feats, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            own = _distinct(loaders[index], len(feats)) if index < len(loaders) else len(feats)
            feats, labels = self._of_all_processes(feats[:own], labels[:own])
            left_out = unlabelled(labels, self.ignore_label)
            if left_out is not None:
                feats, labels = feats[~left_out], labels[~left_out]
            if not feats.isfinite().all():  # on every process, or those left would wait for ever
                raise FloatingPointError("the features are not finite; lower lr, or choose a precision of wider range")
            self._refuse_parameters()
            measured = self._measure(feats, labels)
            suffix = f"/dataloader_idx_{index}" if len(self._validated) > 1 else ""
            for name, value in measured.items():
                self.log(name + suffix, value, prog_bar=True, sync_dist=True, add_dataloader_idx=False)
        self._validated.clear()

    def _refuse_divergence(self) -> None:
        """Stop, on every process, where a loss since the last time or a parameter is not finite on any."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        finite, self._finite = self._finite, None
        if scaler is None:
            fine = finite is None or bool(finite)
            reason = "a loss is not finite"
        else:
            fine = scaler.get_scale() >= _SMALLEST_SCALE
            reason = "gradients are not finite at any scale of the loss, and no update is made any more"
        self._everywhere(fine, f"{reason}; lower lr, or choose a precision of wider range")
        self._refuse_parameters()

    def _refuse_parameters(self) -> None:
        broken = [name for name, parameter in self.named_parameters() if not parameter.isfinite().all()]
        name = broken[0] if broken else "(of another process)"
        rates = "lr or unit_lr_factor" if name.startswith("unit.") else "lr"
        self._everywhere(not broken, f"the parameter {name} is not finite; lower {rates}")

    def _everywhere(self, fine: bool, message: str) -> None:
        """Raise on every process, or those left would wait for ever."""
        if not self.trainer.strategy.reduce_boolean_decision(fine, all=True):
            raise FloatingPointError(message)

    def _embed(self, batch: tuple[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """Checked features, not below float32, and int64 labels."""
        images, labels = batch
        feats = self(images)
        _checks._matrix("feats", feats)
        _checks._vector("labels", labels, len(feats), "feats")
        _checks._unit(self.unit, feats.shape[1])
        return feats.to(score_dtype(feats)), labels.long()

    def _everyone(self) -> dist.ProcessGroup | None:
        """All processes of the training, where there are several."""
        if self.trainer.world_size == 1:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("several processes without torch.distributed cannot gather; strategy='ddp' is accepted")
        return dist.group.WORLD

    def _of_all_processes(self, feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of every process, in the order of ranks."""
        group = self._everyone()
        if group is None:
            return feats, labels
        of = processes.lengths(group, feats.device, lambda: len(feats))
        return processes.shards(feats, of, group), processes.shards(labels, of, group)

    def _measure(self, feats: Tensor, labels: Tensor) -> dict[str, float]:
        measured: dict[str, float] = {}
        if len(feats) == 0:
            return dict.fromkeys(METRICS, float("nan"))
        if self.trainer.is_global_zero:
            calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", device=torch.device("cpu"))
            # It compares labels as float32: not the class ids themselves, which may be large.
            _, classes = torch.unique(labels, return_inverse=True)
            measured = calculator.get_accuracy(feats.cpu(), classes.cpu())
        return self.trainer.strategy.broadcast(measured)


def _distinct(loader: Any, count: int) -> int:
    """How many of this process's first rows, of ``count`` that a loader gave it, no other row repeats.

    Of N rows a sampler for W processes gives rank r those at r, r + W, …, and begins anew after N to make shares equal.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or count != sampler.num_samples:
        return count
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
