"""What numbers the classes have is nobody's business: each figure, batch and gradient is the same under others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import MODES, host_only, make_unit, on_one_thread
from pddm_ext.adapters import pml
from pddm_ext.adapters.lightning import MetricLearningModule
from pddm_ext.workbench.evaluation import inputs, probes, retrieval, separation
from pddm_ext.workbench.evaluation.evaluate import measure
from pddm_ext.workbench.methods import objective
from pddm_ext.workbench.settings import METHODS, PROXIES, Settings

CLASSES = 6

#: Numbers of the classes that some type or library would run together, or order otherwise.
NUMBERS = {
    "from 2^25": [2**25 + c for c in range(CLASSES)],
    "float64 cannot tell": [2**60 + c for c in range(CLASSES)],
    "the ends of int64": [-(2**63), 2**63 - 1, -(2**63) + 1, 2**63 - 2, 0, -1],
    "negative and backwards": [-c for c in range(CLASSES)],
    "equal in their low 32 bits": [c * 2**32 for c in range(CLASSES)],
}
numbers = st.lists(
    st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(2**24, 2**26)),
    min_size=CLASSES,
    max_size=CLASSES,
    unique=True,
)


def batch(n: int = 60, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Features of classes that overlap, so that no figure is at an end, and their numbers from 0; one row alone."""
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(CLASSES - 1, (n,), generator=random)
    labels[7] = CLASSES - 1
    centres = torch.randn(CLASSES, dim, generator=random)
    return F.normalize(centres[labels] + 0.9 * torch.randn(n, dim, generator=random), dim=1), labels


def under(ids: list[int], labels: Tensor) -> Tensor:
    return torch.tensor(ids)[labels]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    features, labels = batch()
    return measure(features, labels, make_unit(6, 8, 8, device="cpu"), seed=1, structure=features.exp())


@host_only("features on the CPU")
class TestFigures:
    @pytest.mark.parametrize("ids", NUMBERS.values(), ids=NUMBERS)
    def test_of_named_numbers(self, expected: dict[str, Any], ids: list[int]) -> None:
        features, labels = batch()
        unit = make_unit(6, 8, 8, device="cpu")
        assert measure(features, under(ids, labels), unit, seed=1, structure=features.exp()) == expected
        assert 0.05 < expected["clustering"]["ami"] < expected["clustering"]["nmi"] < 0.95
        assert 0.2 < expected["transfer"] < 1

    @settings(max_examples=8)
    @given(ids=numbers)
    @on_one_thread
    def test_of_any_numbers(self, expected: dict[str, Any], ids: list[int]) -> None:
        features, labels = batch()
        unit = make_unit(6, 8, 8, device="cpu")
        assert measure(features, under(ids, labels), unit, seed=1, structure=features.exp()) == expected

    @settings(max_examples=20)
    @given(ids=numbers)
    @on_one_thread
    def test_of_each_function_by_itself(self, ids: list[int]) -> None:
        features, labels = batch()
        other, queries = under(ids, labels), torch.arange(60)
        ranked = retrieval.by_distance(features, queries, 20)
        for call in (
            lambda y: probes.clustering(features, y, 0),
            lambda y: [rows.tolist() for rows in probes.halves(y, 0)],
            lambda y: probes.zero_shot(features, y, 0),
            lambda y: separation.pairs(y, 0, 50)[0].tolist(),
            lambda y: separation.separation(features, y, None, 0),
            lambda y: retrieval.relevant(y).tolist(),
            lambda y: retrieval.per_query(ranked[labels < 5], queries[labels < 5], y).tolist(),
            lambda y: retrieval.recall_at_k(features, y),
        ):
            assert call(other) == call(labels)

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
    )
    def test_of_any_integer_dtype(self, dtype: torch.dtype) -> None:
        labels = batch()[1]
        assert torch.equal(inputs.classes(labels.to(dtype), 60), inputs.classes(labels, 60))


def test_classes_are_numbered_as_they_appear() -> None:
    huge = torch.tensor([2**63 - 1, -5, 2**63 - 1, 2**25, 2**25 + 1, -5])
    assert inputs.classes(huge, 6).tolist() == [0, 1, 0, 2, 3, 1]
    assert inputs.classes(huge[:0], 0).tolist() == []
    above = torch.tensor([2**64 - 1, 0, 2**63], dtype=torch.uint64)
    assert inputs.classes(above, 3).tolist() == [0, 1, 2]


def trained_by(method: str, labels: Tensor, ids: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    features = batch()[0].requires_grad_()
    torch.manual_seed(0)
    terms = objective(Settings(method=method, dim=6), 8)(features, under(ids, labels), torch.arange(len(labels)))
    (gradient,) = torch.autograd.grad(sum(terms.values()), features)
    return terms, gradient


# A proxy's class is its row; the workbench numbers classes from 0 for them.
@pytest.mark.parametrize("method", [method for method in METHODS if method not in PROXIES])
@on_one_thread
def test_losses_and_gradients_of_every_method(method: str) -> None:
    labels = batch()[1]
    terms, gradient = trained_by(method, labels, list(range(CLASSES)))
    assert gradient.abs().sum() > 0
    for name, ids in NUMBERS.items():
        other, also = trained_by(method, labels, ids)
        torch.testing.assert_close(other, terms, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(also, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("ids", NUMBERS.values(), ids=NUMBERS)
def test_batches(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's draws are of classes, whatever they are called."""
    labels = torch.arange(CLASSES).repeat(5)

    def drawn(labels: Tensor) -> list[int]:
        monkeypatch.setattr(common_functions, "NUMPY_RANDOM", np.random.RandomState(1))
        return list(MPerClassSampler(labels, 2, 6, length_before_new_iter=60))

    assert drawn(under(ids, labels)) == drawn(labels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", NUMBERS.values(), ids=NUMBERS)
@host_only("the CPU's bits")
@on_one_thread
def test_the_miner_and_the_loss_for_pytorch_metric_learning(ids: list[int], mode: Any) -> None:
    features, labels = batch()
    unit = make_unit(6, 8, 8, device="cpu")
    reference = F.normalize(features.flip(0) + 0.1, dim=1)

    def found(labels: Tensor) -> list[Any]:
        miner, loss = pml.PDDMMiner(unit, mode), pml.QuadrupletLoss(unit, mode)
        mined = [miner(features, labels), miner(features, labels, reference, labels.flip(0))]
        memory = pml_losses.CrossBatchMemory(pml_losses.TripletMarginLoss(distance=pml.PDDMSimilarity(unit)), 6, 100)
        values = [
            loss(features, labels),
            loss(features, labels, mined[0]),
            loss(features, labels, ref_emb=reference, ref_labels=labels.flip(0)),
            memory(features, labels),
            memory(reference, labels.flip(0)),
        ]
        return [[rows.tolist() for rows in triplets] for triplets in mined] + [value.item() for value in values]

    assert found(under(ids, labels)) == found(labels)


@pytest.mark.parametrize("ids", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.filterwarnings("ignore")
@host_only("Lightning's CPU accelerator")
def test_validation_in_lightning(ids: list[int]) -> None:
    features, labels = batch()

    def figures(labels: Tensor) -> dict[str, float]:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False))
        loader = DataLoader(TensorDataset(features, labels), batch_size=16)
        (found,) = trainer.validate(MetricLearningModule(nn.Identity(), 6), loader, verbose=False)
        return dict(found)

    assert figures(under(ids, labels)) == figures(labels)
