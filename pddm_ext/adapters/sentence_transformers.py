"""PDDM in Sentence Transformers: a loss that mines the hard quadruplets of a batch of labelled sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks, _numbers
from ..losses import QuadrupletLoss
from ..precision import score_dtype
from ..quadruplets import Mode
from ..unit import PDDM
from . import needs

needs("sentence_transformers", "sentence-transformers")

from sentence_transformers import SentenceTransformer  # noqa: E402


class PDDMQuadrupletLoss(nn.Module):
    """Hard quadruplets of a batch under a PDDM unit's score, and the double-header hinge loss on them.

    A batch needs two classes and two sentences of a class, which the batch sampler ``"group_by_label"`` sees to::

        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        loss = PDDMQuadrupletLoss(model)
        args = SentenceTransformerTrainingArguments(
            "output", batch_sampler="group_by_label", learning_rate_mapping={r"^unit\\.": 1e-3}
        )
        SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, loss=loss).train()

    Without a valid quadruplet the loss is 0 with zero gradients. It is computed in float32 (float64 for float64
    embeddings), also under ``bf16=True`` or ``fp16=True``.

    The unit is a part of the loss, not of the model. What the trainer of sentence-transformers 6.2 does with it:

    - **Optimizer.** The trainer's own has the loss's parameters beside the model's, at the same learning rate. One
      that suits a pretrained model is too low for a new unit: hence the mapping above. Into ``optimizers=`` you must
      put ``loss.parameters()``, which are both. ``max_grad_norm`` clips the model's gradients only.
    - **Device.** The trainer moves the loss, and so the unit, to the model's device.
    - **Checkpoints** have the optimizer's state of the unit, but not its weights, and ``load_best_model_at_end`` does
      not bring them back. To resume, or to score pairs later, save them beside each checkpoint, and load them before
      ``trainer.train(resume_from_checkpoint=folder)``::

        class SaveUnit(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.is_world_process_zero:
                    torch.save(loss.unit.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/unit.pt")

        loss.unit.load_state_dict(torch.load(f"{folder}/unit.pt", weights_only=True))

    - **Wrappers** that change the embeddings' dimension, as ``MatryoshkaLoss`` does, do not fit: a unit has one.
    - **Several processes.** The trainer has the model alone in its DistributedDataParallel; this loss does the same
      for the unit: rank 0's for all in the first step, and the mean of its gradients in every step. Each process
      mines its own batch, or with ``gather`` all mine the batches of all as one.

    Args:
        model: what is trained.
        unit: scores pairs of embeddings; a new one of the model's embedding dimension by default.
        mode: of mining, see :func:`pddm_ext.mine_and_score`.
        alpha: margin α of the scores.
        beta: margin β of the squared distances.
        weight: λ, of the embedding term.
        ignore_label: the label of sentences whose class is not known: they are in no quadruplet.
        gather: mine the sentences of all processes together; not beside candidates.
        candidates: score only each sentence's so many nearest of other classes, see :func:`pddm_ext.mine_and_score`.

    Attributes:
        unit: the :class:`pddm_ext.PDDM`, for :func:`pddm_ext.topk` or :func:`pddm_ext.score_matrix` after training.

    Inputs:
        One column of sentences, and ``label``, integer class ids.

    Raises:
        TypeError: model is no SentenceTransformer, unit no PDDM; in a step, labels missing or of no integer dtype.
        ValueError: a mode that is not accepted, a model of unknown dimension, a unit of another one; in a step, more
            than one column of sentences, or a label too many or too few.

    Source: Huang, Loy, Tang, *Local Similarity-Aware Deep Feature Embedding*, NIPS 2016.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        unit: PDDM | None = None,
        mode: Mode = "pair",
        alpha: float = 0.5,
        beta: float = 1.0,
        weight: float = 0.5,
        *,
        ignore_label: int | None = None,
        candidates: int | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, SentenceTransformer):
            raise TypeError(f"model is a {type(model).__name__}; a SentenceTransformer is accepted")
        _checks.mode(mode)
        _checks.number_of_candidates(candidates)
        with model.truncate_embeddings(None):  # which is done in encoding, not in training
            dim = model.get_embedding_dimension()
        if dim is None:
            raise ValueError("model has modules that do not tell its embedding dimension; one that does is accepted")
        if unit is None:
            unit = PDDM(dim).to(model.device)
        _checks._unit(unit, dim)
        self.model = model  # by this name the trainer puts a wrapped model in its place
        if ignore_label is not None:
            _numbers.integer("ignore_label", ignore_label)
        _numbers.switch("gather", gather)
        if gather and candidates is not None:
            raise ValueError(f"candidates is {candidates} beside gather; with it None is accepted")
        self.unit, self.mode, self.ignore_label = unit, mode, ignore_label
        self.candidates, self.gather = candidates, gather
        self.quadruplet_loss = QuadrupletLoss(alpha, beta, weight)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch: one column of tokenized sentences and labels (n,), to a scalar."""
        columns = list(sentence_features)
        if len(columns) != 1:
            raise ValueError(f"sentence_features has {len(columns)} columns of sentences; one is accepted")
        return self.compute_loss_from_embeddings([self.model(columns[0])["sentence_embedding"]], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of [embeddings (n, dim)] and labels (n,), a scalar."""
        (feats,) = embeddings
        feats = feats.to(score_dtype(feats))
        several = dist.is_available() and dist.is_initialized()
        if torch.is_grad_enabled() and several:
            self._share_unit()
        group = self.quadruplet_loss.group = dist.group.WORLD if self.gather and several else None
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
            loss: Tensor = self.quadruplet_loss(feats, quads)
        return loss

    def _share_unit(self) -> None:
        """Rank 0's unit for all processes, once, and the mean of its gradients from when it is trained."""
        for parameter in self.unit.parameters():
            # A parameter's own attribute, for a copy of it has neither this nor the hook.
            averaged: bool | None = getattr(parameter, "_pddm_averaged", None)
            if averaged is None:
                dist.broadcast(parameter.data, src=0)
            if not averaged and parameter.requires_grad:
                parameter.register_hook(_mean_over_processes)  # type: ignore[no-untyped-call]
            parameter._pddm_averaged = averaged or parameter.requires_grad  # type: ignore[attr-defined]

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {
            "unit": self.unit.extra_repr(),
            "mode": self.mode,
            "alpha": self.quadruplet_loss.alpha,
            "beta": self.quadruplet_loss.beta,
            "weight": self.quadruplet_loss.weight,
            "ignore_label": self.ignore_label,
            "candidates": self.candidates,
            "gather": self.gather,
        }

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return """
@inproceedings{huang2016local,
    title = {Local Similarity-Aware Deep Feature Embedding},
    author = {Huang, Chen and Loy, Chen Change and Tang, Xiaoou},
    booktitle = {Advances in Neural Information Processing Systems (NIPS)},
    year = {2016},
    note = {arXiv:1610.08904},
}
"""


def _mean_over_processes(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
