"""pytorch-metric-learning: the score as a distance, in its losses, miners, inference and accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder, return_results
from torch import Tensor

import pddm_ext
from helpers import DEVICE, FLOATS, counters, make_features, make_unit, on_one_thread, reset_counters
from pddm_ext.adapters.pml import PDDMSimilarity
from pml_truth import PAIRED, TOLERANCE, D, Reference, copied, gradients, labels_of
from truth import truth

# --- The distance -----------------------------------------------------------------------------------------------------


@on_one_thread
@pytest.mark.parametrize("dtype", FLOATS)
def test_matrix_and_pairs_are_the_scores(dtype):
    unit = make_unit(D)
    x, r = make_features(7, D, dtype=dtype), make_features(5, D, seed=1, dtype=dtype)
    distance = PDDMSimilarity(unit)
    assert distance.is_inverted
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    torch.testing.assert_close(distance(x).cpu(), truth(x, unit), **tolerance)
    torch.testing.assert_close(distance(x, r).cpu(), truth(x, unit, r), **tolerance)
    torch.testing.assert_close(distance.pairwise_distance(x[:5], r).cpu(), truth(x, unit, r).diagonal(), **tolerance)
    assert distance(x).dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_a_batch_scores_each_pair_once():
    unit, y = make_unit(D), labels_of(*PAIRED)
    x = make_features(12, D)
    for call in (
        lambda: PDDMSimilarity(unit)(x),
        lambda: losses.TripletMarginLoss(distance=PDDMSimilarity(unit))(x, y),
        lambda: miners.BatchHardMiner(distance=PDDMSimilarity(unit))(x, y, x, y),
    ):
        reset_counters()
        call()
        assert counters()["pairs_scored"] == 12 * 13 // 2


@on_one_thread
def test_gradcheck_of_the_distance():
    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distance = PDDMSimilarity(make_unit(D).double())

        def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
            return self.distance(x), self.distance(x, r), self.distance.pairwise_distance(x[:3], r)

    scores = Scores()
    names, parameters = zip(
        *((name, p.detach().requires_grad_()) for name, p in scores.named_parameters()), strict=True
    )
    assert len(names) == 8

    def call(x: Tensor, r: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(scores, dict(zip(names, values, strict=True)), (x, r))

    x, r = make_features(4, D, dtype=torch.float64), make_features(3, D, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), r.requires_grad_(), *parameters))


TAKES_IT: dict[str, dict[str, Any]] = {
    "ContrastiveLoss": {"pos_margin": 1.0, "neg_margin": -0.5},
    "GeneralizedLiftedStructureLoss": {},
    "IntraPairVarianceLoss": {},
    "LiftedStructureLoss": {},
    "MarginLoss": {"beta": 0.0},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {},
    "NormalizedSoftmaxLoss": {"num_classes": 3, "embedding_size": D},
    "ProxyAnchorLoss": {"num_classes": 3, "embedding_size": D},
    "ProxyNCALoss": {"num_classes": 3, "embedding_size": D},
    "SoftTripleLoss": {"num_classes": 3, "embedding_size": D},
    "SupConLoss": {},
    "TripletMarginLoss": {"swap": True},
}


@on_one_thread
@pytest.mark.parametrize("name", TAKES_IT)
def test_losses_of_the_library(name):
    """The same value and the same gradients as with the distance in plain PyTorch, in float64."""
    unit, y = make_unit(D).double(), labels_of(*PAIRED)
    results = []
    for distance in (PDDMSimilarity(unit), Reference(copied(unit))):
        torch.manual_seed(0)
        loss = getattr(losses, name)(distance=distance, **TAKES_IT[name]).to(DEVICE)
        x = make_features(12, D, dtype=torch.float64).requires_grad_()
        value = loss(x, y)
        own = [p for _, p in sorted(loss.named_parameters())]
        assert len(own) >= 8
        results.append((value, *gradients(value, x, *own)))
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@on_one_thread
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name", ["ContrastiveLoss", "MultiSimilarityLoss", "NCALoss", "NTXentLoss", "TripletMarginLoss"]
)
def test_losses_of_the_library_in_every_dtype(name, dtype):
    unit, y = make_unit(D), labels_of(*PAIRED)
    x = make_features(12, D, dtype=dtype)
    loss = getattr(losses, name)(distance=PDDMSimilarity(unit), **TAKES_IT[name])
    expected = getattr(losses, name)(distance=Reference(copied(unit)), **TAKES_IT[name])
    rtol = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(loss(x, y).double(), expected(x.double(), y), rtol=rtol, atol=TOLERANCE[dtype])


@on_one_thread
@pytest.mark.parametrize("name", ["TripletMarginLoss", "ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss"])
def test_losses_of_the_library_with_a_reference(name):
    unit, y, ry = make_unit(D).double(), labels_of(*PAIRED), labels_of(0, 1, 2, 2, 1)
    results = []
    for distance in (PDDMSimilarity(unit), Reference(copied(unit))):
        loss = getattr(losses, name)(distance=distance, **{k: v for k, v in TAKES_IT[name].items() if k != "swap"})
        x = make_features(12, D, dtype=torch.float64).requires_grad_()
        r = make_features(5, D, seed=1, dtype=torch.float64).requires_grad_()
        value = loss(x, y, ref_emb=r, ref_labels=ry)
        results.append((value, *gradients(value, x, r, *distance.parameters())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@on_one_thread
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("BatchHardMiner", {}),
        ("BatchEasyHardMiner", {"pos_strategy": "easy", "neg_strategy": "semihard"}),
        ("HDCMiner", {}),
        ("MultiSimilarityMiner", {}),
        ("PairMarginMiner", {"pos_margin": 0.5, "neg_margin": -0.5}),
        ("TripletMarginMiner", {"type_of_triplets": "semihard", "margin": 1.0}),
    ],
)
def test_miners_of_the_library(name, kwargs):
    unit, y = make_unit(D), labels_of(*PAIRED)
    x, r = make_features(12, D, dtype=torch.float64), make_features(5, D, seed=1, dtype=torch.float64)
    ours = getattr(miners, name)(distance=PDDMSimilarity(unit), collect_stats=True, **kwargs)
    theirs = getattr(miners, name)(distance=Reference(copied(unit)), collect_stats=True, **kwargs)
    for arguments in ((), (r, labels_of(0, 1, 2, 2, 1))):
        found, expected = ours(x, y, *arguments), theirs(x, y, *arguments)
        assert len(expected[0]) > 0
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]
        for stat in ours._record_these_stats:
            assert getattr(ours, stat) == pytest.approx(getattr(theirs, stat))


@pytest.mark.parametrize(
    ("module", "name", "kwargs"),
    [
        (losses, "CircleLoss", {}),
        (losses, "TupletMarginLoss", {}),
        (losses, "AngularLoss", {}),
        (losses, "FastAPLoss", {}),
        (losses, "SmoothAPLoss", {}),
        (losses, "ArcFaceLoss", {"num_classes": 3, "embedding_size": D}),
        (miners, "AngularMiner", {}),
        (miners, "DistanceWeightedMiner", {}),
    ],
)
def test_what_is_made_for_one_geometry_refuses_it(module, name, kwargs):
    with pytest.raises(AssertionError, match="requires the distance metric to be"):
        getattr(module, name)(distance=PDDMSimilarity(make_unit(D)), **kwargs)


def test_statistics_of_the_distance():
    x, r = make_features(6, D), 2 * make_features(6, D)
    distance = PDDMSimilarity(make_unit(D), collect_stats=True)
    distance(x, r)
    norm = x.norm(dim=1).mean().item()
    assert distance.initial_avg_query_norm == pytest.approx(norm)
    assert distance.final_avg_ref_norm == pytest.approx(2 * norm)


# --- Inference and accuracy -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_matches_by_score():
    unit, x, r = make_unit(D), make_features(7, D), make_features(5, D, seed=1)
    s = pddm_ext.score_matrix(x, unit, r)
    threshold = s.median().item()
    finder = MatchFinder(PDDMSimilarity(unit), threshold=threshold)
    model = InferenceModel(torch.nn.Identity(), match_finder=finder, normalize_embeddings=False, data_device=DEVICE)
    assert model.get_matches(x, r).tolist() == (s >= threshold).tolist()
    assert model.is_match(x[:5], r).tolist() == (s.diagonal() >= threshold).tolist()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [None, 3])
def test_nearest_neighbours_by_score(batch_size):
    unit, x, r = make_unit(16), make_features(7, 16), make_features(20, 16, seed=1)  # none with every relu dead: ties
    scores, rows = CustomKNN(PDDMSimilarity(unit), batch_size)(x, 4, r)
    expected = pddm_ext.topk(x, r, 4, unit)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(rows, expected[1])
    _, rows = CustomKNN(PDDMSimilarity(unit), batch_size)(x, 4, torch.cat([x, r]), ref_includes_query=True)
    s = truth(x, unit, torch.cat([x, r])).fill_diagonal_(-torch.inf)
    assert rows.tolist() == s.argsort(1, descending=True)[:, :4].tolist()


@torch.no_grad()
def test_the_accuracy_calculator_ranks_by_score():
    """By the whole matrix, and by the streamed ranking."""
    unit, x, y = make_unit(16), make_features(40, 16), torch.arange(40, device=DEVICE) % 4

    def streamed(query: Tensor, k: int, gallery: Tensor, ref_includes_query: bool) -> tuple[Tensor, Tensor]:
        return return_results(*pddm_ext.topk(query, gallery, k + ref_includes_query, unit), ref_includes_query)

    s = truth(x, unit).fill_diagonal_(-torch.inf)
    hits = y.cpu()[s.argsort(1, descending=True)[:, :9]] == y.cpu()[:, None]
    for knn in (CustomKNN(PDDMSimilarity(unit)), streamed):
        calculator = AccuracyCalculator(
            include=("precision_at_1", "r_precision"), k="max_bin_count", device=DEVICE, knn_func=knn
        )
        accuracy = calculator.get_accuracy(x, y)
        assert accuracy["precision_at_1"] == pytest.approx(hits[:, 0].double().mean().item())
        assert accuracy["r_precision"] == pytest.approx(hits.double().mean().item())
