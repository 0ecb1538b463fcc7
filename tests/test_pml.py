"""The adapter of pytorch-metric-learning: its own losses, miners, reducers, wrappers, trainers and testers with ours
swapped in, against the same library over the plain-PyTorch reference in float64, or against loops over it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder, return_results
from torch import Tensor

import pddm_ext
from helpers import (
    DEVICE,
    FLOATS,
    MODES,
    ON_CUDA,
    assert_same_bits,
    counters,
    make_features,
    make_unit,
    on_one_thread,
    reset_counters,
)
from pddm_ext import reference
from pddm_ext.adapters.pml import DensityRegularizer, PDDMMiner, PDDMSimilarity, QuadrupletLoss
from truth import in_double, truth

D = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def labels_of(*ids: int) -> Tensor:
    return torch.tensor(ids, device=DEVICE)


# Classes of 1 to 4 rows, in no order: singletons make quadruplets that are not valid.
MIXED = (3, 7, 3, 5, 0, 7, 5, 3, 9, 7, 3, 5)
PAIRED = (1, 0, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2)


class Reference(distances.BaseDistance):
    """The same distance, in plain PyTorch."""

    def __init__(self, unit: reference.PDDM, **kwargs: Any) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True, **kwargs)
        self.unit = unit

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return reference.score_matrix(query_emb, self.unit, ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.unit(query_emb, ref_emb)


def mined_by_loops(
    s: Tensor, labels: Tensor, ref_labels: Tensor, mode: str, itself: Callable[[int, int], bool]
) -> list[tuple[int, int, int]]:
    """(i, j, k) of an (n, m) matrix, by comparing one number with another."""
    n, m = s.shape
    y, ry = labels.tolist(), ref_labels.tolist()
    pairs = [(i, j) for i in range(n) for j in range(m) if y[i] == ry[j] and not itself(i, j)]
    if mode == "anchor":
        rows = sorted({i for i, _ in pairs})
        pairs = [min((p for p in pairs if p[0] == i), key=lambda p: (s[p].item(), p)) for i in rows]
    elif mode == "batch":
        pairs = [min(pairs, key=lambda p: (s[p].item(), p))]
    triplets = []
    for i, j in pairs:
        negatives = [k for k in range(m) if ry[k] != y[i]]
        if negatives:
            triplets.append((i, j, max(negatives, key=lambda k: (s[i, k].item(), -k))))
    return triplets


def listed(triplets: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(t.tolist() for t in triplets), strict=True))


def loss_of(x: Tensor, ref: Tensor, triplets: list[tuple[int, int, int]], unit: reference.PDDM) -> Tensor:
    """(T,) from the definition, in float64 with plain-PyTorch scores."""
    a, p, n = torch.tensor(triplets, device=x.device).T
    f, g = F.normalize(x, dim=-1), F.normalize(ref, dim=-1)
    margin = 0.5 + unit(x[a], ref[n]) - unit(x[a], ref[p])
    distances = 1.0 + (f[a] - g[p]).square().sum(1) - (f[a] - g[n]).square().sum(1)
    return F.relu(margin) + 0.5 * F.relu(distances)


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves)


def copied(unit: reference.PDDM) -> reference.PDDM:
    return in_double(unit).to(DEVICE)


# --- The miner --------------------------------------------------------------------------------------------------------


@on_one_thread
@pytest.mark.parametrize("ids", [MIXED, PAIRED])
@pytest.mark.parametrize("mode", MODES)
def test_triplets_are_the_two_of_every_valid_quadruplet(mode, ids):
    x, y, unit = make_features(12, D, dtype=torch.float64), labels_of(*ids), make_unit(D)
    miner = PDDMMiner(unit, mode)
    quads = reference.mine_and_score(x, y, copied(unit), mode=mode)
    i, j, k, l = (index[quads.valid] for index in quads[:4])  # noqa: E741
    expected = listed((i, j, k)) + listed((j, i, l))
    assert listed(miner(x, y)) == expected
    assert miner.num_triplets == len(expected) > 0
    # What the library makes of no reference at all may be spelled out.
    assert listed(miner(x, y, x, y)) == expected


@on_one_thread
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_a_reference_of_its_own(mode, seed):
    """Class 9 is not in it, and class 4 has no anchor."""
    unit = make_unit(D, seed=seed)
    x, y = make_features(12, D, seed=seed, dtype=torch.float64), labels_of(*MIXED)
    r, ry = make_features(9, D, seed=seed + 50, dtype=torch.float64), labels_of(3, 4, 7, 5, 3, 0, 7, 7, 4)
    expected = mined_by_loops(truth(x, unit, r), y, ry, mode, lambda i, j: False)
    assert listed(PDDMMiner(unit, mode)(x, y, r, ry)) == expected


@on_one_thread
@pytest.mark.parametrize("mode", MODES)
def test_the_same_labels_say_that_rows_are_the_same_samples(mode):
    """As the library's own pairs have it: by identity, or where the embeddings are the reference."""
    unit, y = make_unit(D), labels_of(*PAIRED)
    x, augmented = make_features(12, D, dtype=torch.float64), make_features(12, D, seed=1, dtype=torch.float64)
    miner = PDDMMiner(unit, mode)
    s = truth(x, unit, augmented)
    assert listed(miner(x, y, augmented, y)) == mined_by_loops(s, y, y, mode, lambda i, j: i == j)
    assert listed(miner(x, y, augmented)) == mined_by_loops(s, y, y, mode, lambda i, j: i == j)
    assert listed(miner(x, y, augmented, y.clone())) == mined_by_loops(s, y, y, mode, lambda i, j: False)
    assert listed(miner(x, y, x, y.clone())) == mined_by_loops(truth(x, unit), y, y, mode, lambda i, j: i == j)


def lowest_with_itself() -> pddm_ext.PDDM:
    """S is the sum of u/‖u‖ times D: 0 for a row with itself, and more than that for any other."""
    unit = pddm_ext.PDDM(D)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
        unit.u.weight.copy_(torch.eye(D))
        unit.c.weight[:, :D] = 1.0
        unit.s.weight.fill_(1.0)
    return unit.to(DEVICE)


def test_an_anchor_is_not_spent_on_itself():
    unit, y = lowest_with_itself(), labels_of(0, 0, 1, 1, 2)
    x = make_features(5, D)
    r, ry = torch.cat([make_features(3, D, seed=1), x]), torch.cat([labels_of(0, 1, 0), y])
    s = truth(x, unit, r)
    assert (s[torch.arange(5), torch.arange(5) + 3] == 0).all()
    found = listed(PDDMMiner(unit)(x, y, r, ry))
    expected = mined_by_loops(s, y, ry, "anchor", lambda i, j: j == i + 3)
    assert found[:4] == expected
    assert found[4][:2] == (4, 7)  # it has no other positive; who removes such pairs can
    (only,) = listed(PDDMMiner(unit, "batch")(x, y, r, ry))
    assert [only] == mined_by_loops(s, y, ry, "batch", lambda i, j: j == i + 3)
    assert set(listed(PDDMMiner(unit, "pair")(x, y, r, ry))) == set(
        mined_by_loops(s, y, ry, "pair", lambda i, j: False)
    )


@pytest.mark.parametrize("mode", MODES)
def test_nan_never_wins(mode):
    unit, y = make_unit(D), labels_of(0, 0, 1, 1)
    x, r, ry = make_features(4, D), make_features(6, D, seed=1), labels_of(0, 0, 0, 1, 1, 1)
    r[[1, 4]] = torch.nan
    s = truth(x, unit, r)
    s[:, [1, 4]] = torch.nan
    found = listed(PDDMMiner(unit, mode)(x, y, r, ry))
    assert all(n not in (1, 4) for _, _, n in found)
    if mode != "pair":  # which compares no positives
        assert all(p not in (1, 4) for _, p, _ in found)
        assert len(found) == (4 if mode == "anchor" else 1)
    assert [len(t) for t in PDDMMiner(unit)(x, y, torch.full_like(r, torch.nan), ry)] == [0, 0, 0]


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_ties_go_to_the_lowest_index(mode):
    x, y = make_features(2, D), labels_of(0, 1)
    r = make_features(2, D, seed=1).repeat_interleave(3, 0)
    found = listed(PDDMMiner(make_unit(D), mode)(x, y, r, labels_of(0, 0, 0, 1, 1, 1)))
    assert set(found) <= {(0, 0, 3), (1, 3, 0)}
    assert len(found) == (2 if mode == "anchor" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_mine(mode):
    miner = PDDMMiner(make_unit(D), mode)
    x, r = make_features(4, D), make_features(3, D, seed=1)
    for y, ry in ((labels_of(0, 0, 0, 0), labels_of(0, 0, 0)), (labels_of(0, 1, 2, 3), labels_of(4, 5, 6))):
        for mined in (miner(x, y), miner(x, y, r, ry), miner(x, y, r[:0], ry[:0]), miner(x[:0], y[:0], r, ry)):
            assert all(t.dtype == torch.int64 and len(t) == 0 for t in mined)


def test_without_a_unit_the_default_one_mines_and_scores():
    x, y = make_features(12, D), labels_of(*MIXED)
    unit = pddm_ext.default_unit(D, DEVICE)
    assert_same_bits(PDDMMiner()(x, y), PDDMMiner(unit)(x, y))
    assert_same_bits(PDDMSimilarity()(x), pddm_ext.score_matrix(x, unit))
    assert_same_bits(QuadrupletLoss()(x, y), QuadrupletLoss(unit)(x, y))
    assert list(QuadrupletLoss().parameters()) == []
    assert {id(p) for p in QuadrupletLoss(unit).parameters()} == {id(p) for p in unit.parameters()}


def test_a_plain_pytorch_unit_serves_too():
    x, y, unit = make_features(12, D, dtype=torch.float64), labels_of(*MIXED), make_unit(D)
    assert listed(PDDMMiner(copied(unit))(x, y)) == listed(PDDMMiner(unit)(x, y))
    torch.testing.assert_close(QuadrupletLoss(copied(unit))(x, y), QuadrupletLoss(unit)(x, y))


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


# --- The loss ---------------------------------------------------------------------------------------------------------


@on_one_thread
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", [PAIRED, MIXED])
def test_the_mean_is_the_packages_own_loss(ids, mode, dtype):
    y, unit = labels_of(*ids), make_unit(D)
    x = make_features(12, D, dtype=dtype).requires_grad_()
    quads = pddm_ext.mine_and_score(x, y, unit, mode=mode)
    expected = pddm_ext.QuadrupletLoss()(x, quads)
    value = QuadrupletLoss(unit, mode)(x, y)
    found, wanted = (gradients(v, x, *unit.parameters()) for v in (value, expected))
    assert wanted[0].abs().max() > 0
    if ids == PAIRED and not ON_CUDA:  # every quadruplet is valid: the same sums in the same order
        assert quads.valid.all()
        assert_same_bits(value, expected)
        assert_same_bits(found, wanted)
    else:
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
        slack = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, TOLERANCE[dtype])
        torch.testing.assert_close(found, wanted, rtol=slack, atol=slack)


def test_margins_and_weight():
    x, y, unit = make_features(12, D), labels_of(*PAIRED), make_unit(D)
    quads = unit.mine(x, y, mode="pair")
    for own in ({"alpha": 0.1, "beta": 0.3, "weight": 2.0}, {"alpha": 0.0}, {"weight": 0.0}):
        value = QuadrupletLoss(unit, "pair", **own)(x, y)
        torch.testing.assert_close(value, pddm_ext.QuadrupletLoss(**own)(x, quads), rtol=1e-6, atol=0)


@on_one_thread
@pytest.mark.parametrize(
    "make",
    [
        lambda unit: PDDMMiner(unit),
        lambda unit: PDDMMiner(unit, "pair"),
        lambda unit: miners.BatchHardMiner(distance=PDDMSimilarity(unit)),
        lambda unit: miners.TripletMarginMiner(margin=0.5),
        lambda unit: miners.MultiSimilarityMiner(),
    ],
    ids=["anchor", "pair", "batch-hard", "triplet-margin", "multi-similarity"],
)
@pytest.mark.parametrize("with_reference", [False, True])
def test_triplets_and_pairs_of_any_miner(make, with_reference):
    """Values and gradients of the embeddings, the reference and the unit, from the definition."""
    unit, y, ry = make_unit(D).double(), labels_of(*MIXED), labels_of(5, 3, 3, 7, 7, 0, 5, 5)
    x = make_features(12, D, dtype=torch.float64).requires_grad_()
    r = make_features(8, D, seed=1, dtype=torch.float64).requires_grad_()
    arguments = (r, ry) if with_reference else ()
    indices = make(unit)(x, y, *arguments)
    if len(indices) == 3:
        triplets = listed(indices)
    else:
        positives, negatives = listed(indices[:2]), listed(indices[2:])
        triplets = [(a, p, n) for a, p in positives for b, n in negatives if a == b]
    assert len(triplets) > 3
    value = QuadrupletLoss(unit)(x, y, indices, *arguments)
    plain = copied(unit)
    expected = loss_of(x, r if with_reference else x, triplets, plain).mean()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    leaves = (x, r) if with_reference else (x,)
    torch.testing.assert_close(
        gradients(value, *leaves, *unit.parameters()), gradients(expected, *leaves, *plain.parameters())
    )
    # Labels are not needed for what is listed.
    torch.testing.assert_close(QuadrupletLoss(unit)(x, None, indices, *arguments), value)


def test_the_triplets_of_the_quadruplets_have_their_sum():
    x, y, unit = make_features(12, D, dtype=torch.float64), labels_of(*MIXED), make_unit(D)
    for mode in MODES:
        whole = QuadrupletLoss(unit, mode, reducer=reducers.SumReducer())
        torch.testing.assert_close(whole(x, y, PDDMMiner(unit, mode)(x, y)), whole(x, y))


@on_one_thread
@pytest.mark.parametrize("mode", MODES)
def test_a_reference_without_indices_is_mined(mode):
    unit, y, ry = make_unit(D), labels_of(*MIXED), labels_of(5, 3, 3, 7, 7, 0, 5, 5)
    x, r = make_features(12, D, dtype=torch.float64), make_features(8, D, seed=1, dtype=torch.float64)
    triplets = mined_by_loops(truth(x, unit, r), y, ry, mode, lambda i, j: False)
    expected = loss_of(x, r, triplets, copied(unit)).mean()
    torch.testing.assert_close(QuadrupletLoss(unit, mode)(x, y, ref_emb=r, ref_labels=ry), expected)


def test_all_triplets_score_each_pair_once():
    x, y, unit = make_features(12, D), labels_of(*PAIRED), make_unit(D)
    indices = miners.TripletMarginMiner(margin=100)(x, y)
    assert len(indices[0]) == 12 * 3 * 8
    reset_counters()
    QuadrupletLoss(unit)(x, y, indices)
    assert counters()["pairs_scored"] == 12 * 11


@on_one_thread
def test_reducers():
    x, y, unit = make_features(12, D, dtype=torch.float64), labels_of(*MIXED), make_unit(D)
    quads = unit.mine(x, y, mode="pair")
    each = pddm_ext.QuadrupletLoss(reduction="none")(x, quads)

    def reduced(reducer: reducers.BaseReducer) -> Any:
        return QuadrupletLoss(unit, "pair", reducer=reducer)(x, y)

    everything = reduced(reducers.DoNothingReducer())["loss"]
    assert everything["reduction_type"] == "triplet"
    assert_same_bits(everything["losses"], each)
    assert_same_bits(everything["indices"], quads[:3])
    torch.testing.assert_close(reduced(reducers.SumReducer()), each.sum())
    middle = each.median()
    torch.testing.assert_close(reduced(reducers.ThresholdReducer(low=middle.item())), each[each > middle].mean())
    torch.testing.assert_close(reduced(reducers.AvgNonZeroReducer()), each[each > 0].mean())
    weights = torch.arange(10.0, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(reduced(reducers.ClassWeightedReducer(weights)), (each * weights[y[quads.i]]).mean())
    counting = QuadrupletLoss(unit, "pair", reducer=reducers.MeanReducer(collect_stats=True))
    counting(x, y)
    assert counting.reducer.losses_size == len(each)


def test_regularizers_of_the_library():
    x, y, unit = make_features(12, D), labels_of(*PAIRED), make_unit(D)
    loss = QuadrupletLoss(unit, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.25)
    torch.testing.assert_close(loss(x, y), QuadrupletLoss(unit)(x, y) + 0.25 * x.norm(dim=1).mean())
    assert loss.sub_loss_names() == ["loss", "embedding_reg_loss"]


def test_zero_without_quadruplets():
    unit, x = make_unit(D), make_features(4, D).requires_grad_()
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    r = make_features(3, D, seed=1)
    one, apart = labels_of(1, 1, 1, 1), labels_of(0, 1, 2, 3)
    for mode in MODES:
        loss = QuadrupletLoss(unit, mode)
        for arguments in (
            (one,),
            (apart,),
            (one, (empty, empty, empty)),
            (one, (empty, empty, empty, empty)),
            (apart, None, r, labels_of(7, 8, 9)),
            (apart, None, r[:0], empty),
        ):
            value = loss(x, *arguments)
            assert value.item() == 0
            (gradient,) = gradients(value, x)
            assert torch.equal(gradient, torch.zeros_like(x))


def test_order_of_rows_does_not_matter():
    x, y, unit = make_features(12, D, dtype=torch.float64), labels_of(*MIXED), make_unit(D)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for mode in MODES:
        loss = QuadrupletLoss(unit, mode)
        torch.testing.assert_close(loss(x[order], y[order]), loss(x, y))


def test_a_copy_and_a_state():
    x, y, unit = make_features(12, D), labels_of(*PAIRED), make_unit(D)
    loss = QuadrupletLoss(unit)
    twin = copy.deepcopy(loss)
    assert twin.distance.unit is not unit
    assert_same_bits(twin(x, y), loss(x, y))
    other = QuadrupletLoss(make_unit(D, seed=1))
    assert other(x, y) != loss(x, y)
    other.load_state_dict(loss.state_dict())
    assert_same_bits(other(x, y), loss(x, y))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    x, y, unit = make_features(4, D), labels_of(0, 0, 1, 1), make_unit(D)
    r, ry = make_features(3, D, seed=1), labels_of(0, 1, 1)
    for make in (PDDMMiner, QuadrupletLoss):
        with pytest.raises(ValueError, match="mode is 'hard'; 'batch', 'anchor', 'pair' are accepted"):
            make(unit, "hard")
        with pytest.raises(ValueError, match="distance is a CosineSimilarity; this has its own and accepts none"):
            make(unit, distance=distances.CosineSimilarity())
        with pytest.raises(TypeError, match="unit is a Linear; a PDDM or None is accepted"):
            make(torch.nn.Linear(D, D))
        call = make(unit)
        with pytest.raises(TypeError, match=r"labels has dtype torch.float32; an integer dtype is accepted"):
            call(x, y.float())
        with pytest.raises(ValueError, match="unit scores features of dimension 6; these have 5"):
            call(x[:, :5], y)
        for arguments, message in (
            ((r.double(), ry), "embeddings has dtype torch.float32 and ref_emb torch.float64; one dtype is accepted"),
            ((r, ry.double()), "ref_labels has dtype torch.float64; an integer dtype is accepted"),
        ):
            with pytest.raises(TypeError, match=message):
                call(x, y, ref_emb=arguments[0], ref_labels=arguments[1])
        with pytest.raises(ValueError, match=r"ref_emb has shape \(3, 5\); embeddings has dimension 6"):
            call(x, y, ref_emb=r[:, :5], ref_labels=ry)
        with pytest.raises(ValueError, match="ref_labels has length 4; ref_emb has 3"):
            call(x, y, ref_emb=r)
    with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
        QuadrupletLoss(unit)(x)
    row = labels_of(0)
    for indices, message in (
        ((row - 1, row, row), "anchors are -1 to -1; 0 to 3 is accepted"),
        ((row, row + 3, row), "positives are 3 to 3; 0 to 2 is accepted"),
        ((row, row, row + 4), "negatives are 4 to 4; 0 to 2 is accepted"),
    ):
        with pytest.raises(IndexError, match=message):
            QuadrupletLoss(unit)(x, y, indices, r, ry)


# --- The regularizer --------------------------------------------------------------------------------------------------


def with_density(loss: Callable[..., Any], weight: float = 0.3, **kwargs: Any) -> Any:
    density = DensityRegularizer(ratio=0.4, temperature=0.2, eps=0.01)
    return density.attach(loss(embedding_regularizer=density, embedding_reg_weight=weight, **kwargs))


def density_of(x: Tensor, y: Tensor) -> Tensor:
    return pddm_ext.DensityRegularizer(ratio=0.4, temperature=0.2, eps=0.01)(x, y)


@pytest.mark.parametrize("loss", [losses.TripletMarginLoss, losses.ContrastiveLoss, QuadrupletLoss])
def test_density_beside_a_loss(loss):
    x, y = make_features(12, D, dtype=torch.float64).requires_grad_(), labels_of(*MIXED)
    regularized = with_density(loss)
    expected = loss()(x, y) + 0.3 * density_of(x, y)
    (gradient,) = gradients(expected, x)
    nothing = tuple(t[:0] for t in PDDMMiner()(x, y))
    for value in (
        regularized(x, y),
        regularized(x, labels=y),
        regularized(labels=y.cpu(), embeddings=x),
        regularized(x, y, nothing) + loss()(x, y),
    ):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, x), (gradient,))


def test_density_in_wrappers():
    x, y = make_features(12, D, dtype=torch.float64), labels_of(*PAIRED)
    r = make_features(12, D, seed=1, dtype=torch.float64)
    triplet = losses.TripletMarginLoss()
    both = losses.MultipleLosses([with_density(losses.TripletMarginLoss), losses.NTXentLoss()], weights=[1, 0.5])
    torch.testing.assert_close(both(x, y), triplet(x, y) + 0.3 * density_of(x, y) + 0.5 * losses.NTXentLoss()(x, y))
    # The embeddings are the batch's, whatever the memory holds.
    memory = losses.CrossBatchMemory(with_density(losses.TripletMarginLoss), D, 64).to(DEVICE)
    plain = losses.CrossBatchMemory(triplet, D, 64).to(DEVICE)
    for batch in (r, x):
        torch.testing.assert_close(memory(batch, y), plain(batch, y) + 0.3 * density_of(batch, y))
    queued = torch.arange(12, device=DEVICE) < 4
    value, expected = (m(x, y, enqueue_mask=queued) for m in (memory, plain))
    torch.testing.assert_close(value, expected + 0.3 * density_of(x[~queued], y[~queued]))
    # Called by keyword: row i and its augmentation are a class.
    views = losses.SelfSupervisedLoss(with_density(losses.TripletMarginLoss))
    pairs = torch.arange(12, device=DEVICE).repeat(2)
    expected = losses.SelfSupervisedLoss(triplet)(x, r) + 0.3 * density_of(torch.cat([x, r]), pairs)
    torch.testing.assert_close(views(x, r), expected)


def test_a_copy_has_its_own_density():
    x, y = make_features(12, D), labels_of(*MIXED)
    loss = with_density(losses.TripletMarginLoss)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.embedding_regularizer is not loss.embedding_regularizer
        seen: list[Any] = []
        loss.embedding_regularizer.register_forward_hook(lambda *call, seen=seen: seen.append(call))
        torch.testing.assert_close(twin(x, y), loss(x, y))
        assert len(seen) == 1
    assert list(loss.state_dict()) == []
    loss.load_state_dict(loss.state_dict())


def test_density_remembers_labels_for_one_call_only():
    x, y = make_features(12, D), labels_of(*MIXED)
    density = DensityRegularizer()
    loss = losses.TripletMarginLoss(embedding_regularizer=density)
    message = r"DensityRegularizer has no labels .*call density.attach\(loss\), and then the loss with labels"
    with pytest.raises(RuntimeError, match=message):
        loss(x, y)
    assert density.attach(loss) is loss
    loss(x, y)
    with pytest.raises(RuntimeError, match=message):
        density(x)
    with pytest.raises(RuntimeError, match=message):
        loss(x, indices_tuple=PDDMMiner()(x, y))
    with pytest.raises(ValueError, match="Number of embeddings must equal number of labels"):
        loss(x[:3], y)
    with pytest.raises(RuntimeError, match=message):
        density(x)


def test_density_refuses():
    density = DensityRegularizer()
    with pytest.raises(ValueError, match=r"loss is a NTXentLoss that was not made with embedding_regularizer=this"):
        density.attach(losses.NTXentLoss())
    with pytest.raises(ValueError, match="not made with"):
        density.attach(losses.NTXentLoss(embedding_regularizer=DensityRegularizer()))
    with pytest.raises(ValueError, match="ratio is 0; a positive finite number is accepted"):
        DensityRegularizer(ratio=0)
    with pytest.raises(ValueError, match="distance is a LpDistance; this has its own and accepts none"):
        DensityRegularizer(distance=distances.LpDistance())


# --- The library's containers and loops -------------------------------------------------------------------------------


class Spy(losses.TripletMarginLoss):
    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        self.given = indices_tuple
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


Spy.__name__ = "TripletMarginLoss"  # CrossBatchMemory asks for names


def test_cross_batch_memory_keeps_every_anchor():
    """Its queue holds the batch too, whose rows score lowest with themselves."""
    unit, y = lowest_with_itself(), labels_of(0, 0, 1, 1, 2, 2)
    loss = Spy(distance=PDDMSimilarity(unit))
    memory = losses.CrossBatchMemory(loss, D, 12, miner=PDDMMiner(unit)).to(DEVICE)
    for step in range(4):
        memory(make_features(6, D, seed=step), y)
        a, p, n = loss.given
        assert a.tolist() == list(range(6))
        held = memory.label_memory
        assert torch.equal(held[p], y[a])
        assert (held[n] != y[a]).all()
        assert (memory.curr_batch_idx[a] != p).all()


@pytest.mark.parametrize("given", [False, True])
def test_quadruplets_in_a_memory_that_lets_them_in(given):
    class Memory(losses.CrossBatchMemory):
        @staticmethod
        def supported_losses() -> list[str]:
            return [*losses.CrossBatchMemory.supported_losses(), "QuadrupletLoss"]

    unit, y = make_unit(D), labels_of(*PAIRED)
    memory = Memory(QuadrupletLoss(unit), D, 24, miner=PDDMMiner(unit) if given else None).to(DEVICE)
    first, x = make_features(12, D, dtype=torch.float64), make_features(12, D, seed=1, dtype=torch.float64)
    memory(first, y)
    held, held_y = torch.cat([first, x]), torch.cat([y, y])
    s = truth(x, unit, held)
    if given:
        triplets = mined_by_loops(s, y, held_y, "anchor", lambda i, j: j == i + 12)
    else:
        triplets = [
            (a, p, n)
            for a in range(12)
            for p in range(24)
            for n in range(24)
            if held_y[p] == y[a] != held_y[n] and p != a + 12
        ]
    expected = loss_of(x, held, triplets, copied(unit)).mean()
    torch.testing.assert_close(memory(x, y), expected)
    with pytest.raises(Exception, match="CrossBatchMemory not supported for QuadrupletLoss"):
        losses.CrossBatchMemory(QuadrupletLoss(unit), D)


def test_autocast_takes_a_memory_of_another_dtype():
    """CrossBatchMemory's stays in float32 on a GPU. It is rounded as the batch is, as for any other product."""
    unit, y = make_unit(D), labels_of(*PAIRED)
    x, r = make_features(12, D).bfloat16(), make_features(12, D, seed=1)
    distance, miner = PDDMSimilarity(unit), PDDMMiner(unit, "pair")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same_bits(distance(x, r), distance(x, r.bfloat16()))
        assert_same_bits(distance.pairwise_distance(x, r), distance.pairwise_distance(x, r.bfloat16()))
        assert_same_bits(miner(x, y, r, y), miner(x, y, r.bfloat16(), y))
        value = QuadrupletLoss(unit)(x, y, ref_emb=r, ref_labels=y)
    expected = QuadrupletLoss(unit)(x.float(), y, PDDMMiner(unit)(x, y, r.bfloat16(), y), r, y)
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


def clusters(classes: int, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes told apart by four coordinates of sixteen; the others are noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(per_class)
    signal = torch.randn(classes, 4, generator=g)[y] + 0.1 * torch.randn(len(y), 4, generator=g)
    return torch.cat([signal, 0.7 * torch.randn(len(y), 12, generator=g)], 1).to(DEVICE), y.to(DEVICE)


def precision(net: torch.nn.Module, x: Tensor, y: Tensor, distance: distances.BaseDistance) -> float:
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=DEVICE, knn_func=CustomKNN(distance))
    with torch.no_grad():
        return calculator.get_accuracy(net(x), y)["precision_at_1"]


def loop_triplet(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    reducer = reducers.ThresholdReducer(low=0)
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit), reducer=reducer)
    return loss, PDDMMiner(unit, "pair")


def loop_contrastive(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    loss = losses.ContrastiveLoss(pos_margin=0.5, neg_margin=-0.5, distance=PDDMSimilarity(unit))
    return loss, miners.MultiSimilarityMiner(epsilon=0.5, distance=PDDMSimilarity(unit))


def loop_multi_similarity(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    return losses.MultiSimilarityLoss(beta=10, base=0, distance=PDDMSimilarity(unit)), None


def loop_quadruplet(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    return with_density(lambda **kwargs: QuadrupletLoss(unit, **kwargs), weight=0.01), None


def loop_memory(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit))
    return losses.CrossBatchMemory(loss, 8, 128, miner=PDDMMiner(unit, "pair")).to(DEVICE), None


@on_one_thread
@pytest.mark.parametrize("make", [loop_triplet, loop_contrastive, loop_multi_similarity, loop_quadruplet, loop_memory])
def test_a_training_loop_learns(make):
    """Loss, miner, distance and reducer; precision at 1 by score, of other samples of the classes."""
    torch.manual_seed(0)
    samples, classes = clusters(10, 32)
    x, y, test_x, test_y = samples[::2], classes[::2], samples[1::2], classes[1::2]
    net = torch.nn.Linear(16, 8).to(DEVICE)
    unit = pddm_ext.PDDM(8).to(DEVICE)
    loss_func, miner = make(unit)
    optimizer = torch.optim.Adam([*net.parameters(), *loss_func.parameters()], lr=1e-2)
    before = precision(net, test_x, test_y, PDDMSimilarity(unit))
    for _ in range(100):
        batch = torch.randperm(len(x))[:64].to(DEVICE)
        embeddings, labels = net(x[batch]), y[batch]
        optimizer.zero_grad()
        loss = (
            loss_func(embeddings, labels) if miner is None else loss_func(embeddings, labels, miner(embeddings, labels))
        )
        loss.backward()
        optimizer.step()
    after = precision(net, test_x, test_y, PDDMSimilarity(unit))
    assert before < 0.3
    assert after > 0.8


@on_one_thread
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_trainer_and_tester():
    """MetricLossOnly and GlobalEmbeddingSpaceTester as their notebooks use them."""
    torch.manual_seed(0)
    x, y = clusters(10, 32)
    train = torch.utils.data.TensorDataset(x[::2].cpu(), y[::2].cpu())
    validation = torch.utils.data.TensorDataset(x[1::2].cpu(), y[1::2].cpu())
    trunk, embedder = torch.nn.Linear(16, 16).to(DEVICE), torch.nn.Linear(16, 8).to(DEVICE)
    unit = pddm_ext.PDDM(8).to(DEVICE)
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit))
    modules = {"trunk": trunk, "embedder": embedder, "metric_loss": loss}
    tester = testers.GlobalEmbeddingSpaceTester(
        data_device=DEVICE,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(
            include=("precision_at_1",), k=1, device=DEVICE, knn_func=CustomKNN(PDDMSimilarity(unit))
        ),
    )

    def tested(epoch: int) -> float:
        splits = {"train": train, "val": validation}
        return tester.test(splits, epoch, trunk, embedder, [("val", ["train"])])["val"]["precision_at_1_level0"]

    before = tested(0)
    trainer = trainers.MetricLossOnly(
        {"trunk": trunk, "embedder": embedder},
        {f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=1e-2) for name, module in modules.items()},
        64,
        {"metric_loss": loss},
        train,
        mining_funcs={"tuple_miner": PDDMMiner(unit, "pair")},
        data_device=DEVICE,
        sampler=samplers.MPerClassSampler(y[::2].cpu(), m=8, length_before_new_iter=640),
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=8)
    assert before < 0.3
    assert tested(8) > 0.8
