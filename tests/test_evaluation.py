"""The evaluation of an embedding: rankings, retrieval figures, pairs, clusters and probes."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from scipy.stats import bootstrap
from torch import Tensor, nn

from helpers import make_unit
from pddm_ext import reference
from pddm_ext.workbench.evaluation import evaluate, probes, retrieval, separation
from pddm_ext.workbench.model import Embedder
from runs import looked, measured, seen_by


def noise(n: int, dim: int = 8, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def uneven(n: int, seed: int = 0) -> Tensor:
    """Classes of many sizes in no order, some of one row; ids that are no row numbers."""
    random = torch.Generator().manual_seed(seed)
    return 5 * (torch.rand(n, generator=random).pow(3) * n / 3).long() - 7


def clusters(classes: int, each: int, width: float, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Unit features around centres that are far apart, and their labels, in no order."""
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(classes).repeat_interleave(each)[torch.randperm(classes * each, generator=random)]
    centres = torch.eye(dim)[:classes]
    return F.normalize(centres[labels] + width * torch.randn(len(labels), dim, generator=random), dim=1), labels


def values(summary: dict) -> list[float]:
    """Recall@1, 2, 4, 8, MAP@R and R-precision."""
    return [p["value"] for p in (*summary["recall"].values(), summary["map_at_r"], summary["r_precision"])]


# Rankings


def all_rankings(features: Tensor, k: int, unit: nn.Module) -> dict[str, Tensor]:
    rows = torch.arange(len(features))
    near = retrieval.by_distance(features, rows, k)
    return {
        "distance": near,
        "score": retrieval.by_score(features, rows, k, unit),
        "rerank": retrieval.rerank(features, rows, near, unit, k),
    }


def test_distance_ranks_as_the_whole_matrix_does() -> None:
    features, queries = noise(70), torch.tensor([5, 69, 0, 31])
    whole = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    ranked = retrieval.by_distance(features, queries, 69)
    assert ranked.dtype == torch.int64
    assert torch.equal(ranked, whole[queries].argsort(dim=1)[:, :69])
    assert torch.equal(retrieval.by_distance(features, queries, 4), ranked[:, :4])


@pytest.mark.parametrize("seed", range(3))
def test_score_ranks_as_the_reference_does(seed: int) -> None:
    features, unit, queries = noise(50, 6, seed).double(), make_unit(6, 17, 23, seed=seed), torch.arange(49, -1, -3)
    with torch.no_grad():
        whole = reference.score_matrix(features.to(unit.u.weight.device), unit).cpu().fill_diagonal_(-torch.inf)
    expected = whole[queries].argsort(dim=1, descending=True, stable=True)
    assert torch.equal(retrieval.by_score(features, queries, 49, unit), expected[:, :49])
    assert torch.equal(retrieval.by_score(features, queries, 7, unit), expected[:, :7])


def test_reranking_orders_the_candidates_by_score_and_leaves_the_rest() -> None:
    features, rows, unit = noise(40, 6).double(), torch.arange(40), make_unit(6, 17, 23)
    near = retrieval.by_distance(features, rows, 39)
    scored = retrieval.by_score(features, rows, 39, unit)
    assert not torch.equal(near, scored)
    assert torch.equal(retrieval.rerank(features, rows, near, unit, 1), near)
    assert torch.equal(retrieval.rerank(features, rows, near, unit, 39), scored)
    some = retrieval.rerank(features, rows, near, unit, 9)
    assert torch.equal(some[:, 9:], near[:, 9:])
    for mixed, best, candidates in zip(some.tolist(), scored.tolist(), near[:, :9].tolist(), strict=True):
        assert mixed[:9] == [row for row in best if row in candidates]


def test_reranking_keeps_ties_in_order_and_puts_nan_last() -> None:
    features, unit, query = noise(30, 6), make_unit(6, 17, 23), torch.tensor([3])
    ranked = torch.tensor([[9, 4, 1, 27, 20, 11, 6, 17, 2, 5]])
    broken = features.clone()
    broken[4] = torch.nan
    expected = retrieval.rerank(features, query, ranked[:, [0, 2, 3, 4]], unit, 4)[0].tolist()
    assert retrieval.rerank(broken, query, ranked, unit, 5)[0].tolist() == [*expected, 4, 11, 6, 17, 2, 5]
    with torch.no_grad():
        unit.s.weight.zero_()  # all scores are the bias
    assert torch.equal(retrieval.rerank(features, query, ranked, unit, 10), ranked)
    with torch.no_grad():
        unit.s.bias.fill_(-torch.inf)  # the least score, but a score
    assert retrieval.rerank(broken, query, ranked, unit, 5)[0].tolist() == [9, 1, 27, 20, 4, 11, 6, 17, 2, 5]


@pytest.mark.parametrize("copies", [1, 2, 40])
def test_a_row_never_finds_itself_even_among_its_copies(copies: int) -> None:
    features = noise(40 // copies, 6).repeat(copies, 1)
    for kind, ranked in all_rankings(features, 5, make_unit(6, 17, 23)).items():
        assert ranked.shape == (40, 5), kind
        for row, others in enumerate(ranked.tolist()):
            assert row not in others, kind
            assert len(set(others)) == 5, kind
            assert 0 <= min(others) <= max(others) < 40, kind


# Figures


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("duplicates", [False, True])
def test_figures_are_those_of_pytorch_metric_learning(seed: int, duplicates: bool) -> None:
    features, labels = noise(90, 4, seed), uneven(90, seed)
    counts = labels.unique(return_counts=True)[1]
    assert counts.min() == 1
    assert counts.max() > 9
    if duplicates:
        features[:30] = features[30:60]
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"), device=torch.device("cpu")
    )
    expected = calculator.get_accuracy(features, labels)
    found = retrieval.retrieval(features, labels, None, 0, 100)["distance"]
    assert found["recall"]["1"]["value"] == pytest.approx(expected["precision_at_1"])
    assert found["map_at_r"]["value"] == pytest.approx(expected["mean_average_precision_at_r"])
    assert found["r_precision"]["value"] == pytest.approx(expected["r_precision"])
    recall = {k: found["recall"][str(k)]["value"] for k in retrieval.KS}
    assert retrieval.recall_at_k(features, labels) == pytest.approx(recall)


def test_figures_of_a_ranking_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    ranked = torch.tensor([[3, 1, 4, 5, 6, 2, 7, 8, 9, 10], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    ranked = torch.cat([ranked, torch.tensor([[0, 1, 2, 4, 5, 6, 7, 8, 9, 10]])])
    found = retrieval.per_query(ranked, torch.tensor([0, 1, 3]), labels)
    tail = sum(place / (place + 3) for place in range(1, 5)) / 7
    expected = [[0, 1, 1, 1, 0.5 / 2, 0.5], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, tail, 4 / 7]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_recall_counts_the_nearest_others() -> None:
    # On a line: 0 0 1 | 1 1 0 0 0 0 2; the second row's nearest is the first. The only one of class 2 is no query.
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 2])
    features = torch.tensor([0.0, 0.1, 0.25, 10, 10.1, 20, 20.1, 20.3, 20.6, 30])[:, None]
    recall = retrieval.recall_at_k(features, labels)
    assert recall == pytest.approx({1: 8 / 9, 2: 8 / 9, 4: 1, 8: 1})
    assert retrieval.recall_at_k(features[:3], labels[:3]) == {1: 1, 2: 1, 4: 1, 8: 1}  # fewer others than 8


@pytest.mark.parametrize(
    "labels", [uneven(60, 3), torch.arange(60) % 20, torch.tensor([4, 4, 2, 9, 2, 4])], ids=["uneven", "threes", "few"]
)
def test_retrieval_measures_each_ranking(labels: Tensor) -> None:
    n = len(labels)
    features, unit = noise(n, 6), make_unit(6, 17, 23)
    found = retrieval.retrieval(features, labels, unit, 0, 20)
    queries = (torch.bincount(labels + 7)[labels + 7] > 1).nonzero().flatten()
    near = retrieval.by_distance(features, queries, n - 1)
    expected = {
        "distance": near,
        "score": retrieval.by_score(features, queries, n - 1, unit),
        "rerank": retrieval.rerank(features, queries, near, unit, 20),
    }
    assert found.keys() == expected.keys()
    for kind, ranked in expected.items():
        means = retrieval.per_query(ranked, queries, labels).mean(0).tolist()
        assert values(found[kind]) == pytest.approx(means), kind
    assert n < 20 or len({tuple(values(summary)) for summary in found.values()}) == 3


def test_structures_rerank_the_nearest_rows() -> None:
    features, labels = noise(60, 6), torch.arange(60) % 20
    structure = 0.5 + torch.rand(60, 6, generator=torch.Generator().manual_seed(1))
    found = retrieval.retrieval(features, labels, None, 0, 10, structure)
    assert found.keys() == {"distance", "structure"}
    near, queries = retrieval.by_distance(features, torch.arange(60), 59), torch.arange(60)
    squared = (structure[:, None] * (features[:, None] - features).square()).sum(-1)
    ranked = torch.cat([near[:, :10].gather(1, squared.gather(1, near[:, :10]).argsort(1)), near[:, 10:]], dim=1)
    means = retrieval.per_query(ranked, queries, labels).mean(0).tolist()
    assert values(found["structure"]) == pytest.approx(means)
    assert values(found["structure"]) != pytest.approx(values(found["distance"]))
    plain = retrieval.retrieval(features, labels, None, 0, 10, torch.ones(60, 6))
    assert plain["structure"] == plain["distance"]


@pytest.mark.parametrize("each", [3, 20])  # fewer relevant rows than candidates, and more
def test_candidates_from_one_to_all_lead_from_distance_to_score(each: int) -> None:
    features, labels, unit = noise(60, 6), torch.arange(60) % (60 // each), make_unit(6, 17, 23)
    one, some, everything = (retrieval.retrieval(features, labels, unit, 0, c) for c in (1, 10, 1000))
    assert one["rerank"] == one["distance"]
    assert everything["rerank"] == everything["score"]
    assert some["rerank"] not in (some["distance"], some["score"])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, unit = noise(60, 6), uneven(60, 3), make_unit(6, 17, 23)
    whole = evaluate.measure(features, labels, unit, seed=0)
    monkeypatch.setattr(retrieval, "_ENTRIES", 1300)
    monkeypatch.setattr(separation, "_NUMBERS", 100)
    monkeypatch.setattr(separation, "_SCORED", 7)
    parts = evaluate.measure(features, labels, unit, seed=0)
    for kind in ("distance", "score", "rerank"):
        assert values(parts["results"][kind]) == values(whole["results"][kind])
    assert parts["pairs"] == whole["pairs"]


# Intervals


def test_interval_is_that_of_resampled_means() -> None:
    figures = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).double().pow(3)
    found = retrieval.summary(figures, 7)
    expected = bootstrap(
        (figures.numpy(),), np.mean, axis=0, n_resamples=2000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    points = [*found["recall"].values(), found["map_at_r"], found["r_precision"]]
    assert [p["low"] for p in points] == pytest.approx(expected.low)
    assert [p["high"] for p in points] == pytest.approx(expected.high)
    assert values(found) == pytest.approx(figures.mean(0).tolist())
    assert found == retrieval.summary(figures, 7)
    assert found != retrieval.summary(figures, 8)


def test_interval_contains_the_value_and_narrows_with_the_queries() -> None:
    widths = []
    for n in (30, 3000):
        figures = torch.rand(n, 6, generator=torch.Generator().manual_seed(n)).double()
        found = retrieval.summary(figures, 0)["map_at_r"]
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.3)
    assert retrieval.summary(torch.ones(9, 6).double(), 0)["map_at_r"] == {"value": 1, "low": 1, "high": 1}


# Pairs


def test_few_pairs_are_all_looked_at_once() -> None:
    labels = uneven(40)
    positive, negative = separation.pairs(labels, 0, 10**6)
    i, j = torch.triu_indices(40, 40, 1)
    for found, expected in ((positive, labels[i] == labels[j]), (negative, labels[i] != labels[j])):
        assert len(found[0]) == expected.sum()
        assert {frozenset(pair) for pair in found.T.tolist()} == {
            frozenset(pair) for pair in torch.stack([i, j])[:, expected].T.tolist()
        }


def test_many_pairs_are_drawn_alike() -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in ((3, 1), (8, 60), (1, 20), (5, 2))])
    positive, negative = separation.pairs(labels, 0, 1200)
    assert positive.shape == negative.shape == (2, 1200)
    assert (labels[positive[0]] == labels[positive[1]]).all()
    assert (positive[0] != positive[1]).all()
    assert (labels[negative[0]] != labels[negative[1]]).all()
    # Of 1961 positive pairs 1770 are in class 8; of 1442 negative pairs 1200 are between classes 8 and 1.
    assert (labels[positive[0]] == 8).double().mean() == pytest.approx(1770 / 1961, abs=0.03)
    assert (labels[negative].sum(0) == 9).double().mean() == pytest.approx(1200 / 1442, abs=0.03)
    assert torch.equal(separation.pairs(labels, 0, 1200)[1], negative)
    assert not torch.equal(separation.pairs(labels, 1, 1200)[1], negative)


def test_distributions_at_their_ends() -> None:
    low, high = np.linspace(0, 1, 50), np.linspace(2, 3, 80)
    apart, wrong, same = (separation.distribution(*both) for both in ((high, low), (low, high), (low, low)))
    assert (apart["overlap"], apart["auc"]) == (0, 1)
    assert (wrong["overlap"], wrong["auc"]) == (0, 0)
    assert (same["overlap"], same["auc"]) == pytest.approx((1, 0.5))
    point = separation.distribution(np.zeros(3), np.zeros(5))  # a collapse to one point
    assert (point["overlap"], point["auc"]) == pytest.approx((1, 0.5))
    for found in (apart, wrong, same, point):
        assert np.diff(found["edges"]).min() > 0
        assert len(found["positive"]) == len(found["negative"]) == len(found["edges"]) - 1 == 60
        assert sum(found["positive"]) == pytest.approx(1)
        assert sum(found["negative"]) == pytest.approx(1)
    assert (apart["edges"][0], apart["edges"][-1]) == (0, 3)
    assert apart["positive"][0] == 0 < apart["negative"][0]
    half = separation.distribution(np.array([0.0, 1]), np.array([0.0, 0, 0, 3]))
    assert half["overlap"] == pytest.approx(0.5)
    assert half["auc"] == pytest.approx((3 * 0.5 + 3) / 8)


def test_pairs_are_compared_by_distance_and_by_score() -> None:
    features, labels, unit = noise(30, 6), uneven(30), make_unit(6, 17, 23)
    with torch.no_grad():
        scores = reference.score_matrix(features.double().to(unit.u.weight.device), unit).cpu()
    distances = torch.cdist(features.double(), features.double())
    i, j = torch.triu_indices(30, 30, 1)
    same = labels[i] == labels[j]
    found = separation.separation(features, labels, unit, 0)
    assert found.keys() == {"distance", "score"}
    for kind, matrix in (("distance", -distances), ("score", scores)):
        expected = separation.distribution(matrix[i, j][same].numpy(), matrix[i, j][~same].numpy())
        assert found[kind]["auc"] == pytest.approx(expected["auc"], abs=1e-3)
        assert found[kind]["edges"] == pytest.approx(expected["edges"], abs=1e-5)
        assert found[kind]["positive"] == pytest.approx(expected["positive"], abs=2.1 / same.sum().item())


def test_clusters_are_apart_and_noise_is_not() -> None:
    features, labels = clusters(8, 12, 0.02)
    found = separation.separation(features, labels, None, 0)
    assert (found["distance"]["overlap"], found["distance"]["auc"]) == (0, 1)
    found = separation.separation(noise(400), torch.arange(400) % 8, None, 0)
    assert found["distance"]["overlap"] > 0.95
    assert found["distance"]["auc"] == pytest.approx(0.5, abs=0.02)


def test_spread_at_its_ends() -> None:
    assert evaluate.spread(torch.eye(4)[:1].expand(9, 4)) == pytest.approx(0)
    assert evaluate.spread(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)
    assert evaluate.spread(torch.eye(4)) == pytest.approx(3 / 4)


@pytest.mark.parametrize("seed", range(8))
def test_no_spread_is_below_zero(seed: int) -> None:
    point = torch.nn.functional.normalize(torch.randn(1, 7, generator=torch.Generator().manual_seed(seed)))
    assert 0 <= evaluate.spread(point.expand(9, 7)) < 1e-6


def test_effective_rank_in_closed_form() -> None:
    assert evaluate.effective_rank(torch.eye(8)[:1].expand(9, 8)) == pytest.approx(1)
    assert evaluate.effective_rank(torch.eye(8).repeat(3, 1)) == pytest.approx(8)
    assert evaluate.effective_rank(torch.eye(8)[:3]) == pytest.approx(3)
    # Singular values 3 and 1.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert evaluate.effective_rank(torch.eye(8)[[0] * 9 + [1]]) == pytest.approx(math.exp(entropy))
    assert evaluate.effective_rank(torch.zeros(5, 3)) == 1


# Clusters and probes


def test_separated_clusters_are_found_and_learned() -> None:
    for width in (0, 0.002):
        features, labels = clusters(20, 5, width)
        assert probes.clustering(features, labels, 0) == pytest.approx({"nmi": 1, "ami": 1})
        assert probes.transfer(features, labels, 0) == 1
        assert probes.zero_shot(features, labels, 0) == 1


def test_class_means_of_uneven_classes() -> None:
    # A class of many rows has a mean as long as the others'.
    labels = torch.tensor([70, -3, 12]).repeat_interleave(torch.tensor([2, 40, 8]))
    features = torch.eye(4)[labels.unique(return_inverse=True)[1]]
    assert probes.zero_shot(features, labels, 0) == 1


def test_noise_is_left_to_chance() -> None:
    features, labels = noise(1000, 16), torch.arange(1000) % 50
    assert probes.clustering(features, labels, 0)["ami"] == pytest.approx(0, abs=0.03)
    assert 0 < probes.clustering(features, labels, 0)["nmi"] < 0.6
    assert probes.transfer(features, labels, 0) < 0.06
    assert probes.zero_shot(features, labels, 0) < 0.06


def test_a_linear_probe_finds_what_class_means_do_not() -> None:
    # The class is the sign of the coordinate that varies least.
    random = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(400, 3, generator=random) * torch.tensor([1, 1, 0.01]))
    labels = (features[:, 2] > 0).long()
    assert probes.transfer(features, labels, 0) > 0.95
    assert probes.zero_shot(features, labels, 0) < 0.75
    found = evaluate.measure(features, labels, None, seed=0)
    assert found["transfer"] == probes.transfer(features, labels, 0)
    assert found["zero_shot"] == probes.zero_shot(features, labels, 0)


def test_halves_are_of_every_class_of_two_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in ((3, 1), (8, 2), (1, 7), (5, 2), (-4, 6))])
    support, query = probes.halves(labels, 0)
    assert sorted([*support.tolist(), *query.tolist()]) == list(range(1, 18))
    for label, count in ((8, 2), (1, 7), (5, 2), (-4, 6)):
        assert (labels[support] == label).sum() in (count // 2, count - count // 2)
    assert not torch.equal(support.sort().values, probes.halves(labels, 1)[0].sort().values)
    monkeypatch.setattr(probes, "CLASSES", 3)
    few = [labels[torch.cat(probes.halves(labels, seed))].unique().tolist() for seed in range(8)]
    assert all(len(kept) == 3 for kept in few)
    assert len({tuple(kept) for kept in few}) > 1


# All of it


class Pictures:
    """Stands for a test set: labels, and what a net sees of its rows."""

    def __init__(self, seen: Tensor, labels: Tensor) -> None:
        self.seen, self.labels = seen, labels
        self.queries = self.gallery = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.seen[rows]


def test_a_net_sees_all_pictures_in_evaluation_mode() -> None:
    test = Pictures(torch.randn(300, 1, 3, 3, generator=torch.Generator().manual_seed(0)), uneven(300))
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(9), nn.Linear(9, 6))

    features = seen_by(net, test)
    assert net.training
    assert net[1].num_batches_tracked == 0
    torch.testing.assert_close(features, net.eval()(test.seen))
    assert not seen_by(net, test).requires_grad
    assert not net.training


def test_a_look_gives_structures_where_the_net_has_a_head_for_them() -> None:
    test = Pictures(torch.randn(60, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 20)
    net = Embedder(nn.Sequential(nn.Flatten(), nn.Linear(9, 7)), 6, (1, 3, 3), structured=True)
    nn.init.normal_(net.structure.linear.weight, generator=torch.Generator().manual_seed(1))
    found = looked(net, test)
    torch.testing.assert_close(found.structure, net.structure(net.backbone(test.seen)).detach())
    torch.testing.assert_close(found.features, F.normalize(net(test.seen), dim=1).detach())
    figures = measured(net, None, test)
    assert figures["results"]["structure"] != figures["results"]["distance"]


def test_pictures_may_be_read_by_other_processes() -> None:
    test = Pictures(torch.randn(300, 1, 3, 3, generator=torch.Generator().manual_seed(0)), uneven(300))
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6))
    state = torch.get_rng_state()
    assert torch.equal(seen_by(net, test, workers=2), seen_by(net, test))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("with_unit", [False, True])
def test_figures_are_what_the_files_hold(with_unit: bool) -> None:
    features, labels = noise(120, 6), uneven(120)
    kinds = {"distance", "score", "rerank"} if with_unit else {"distance"}
    found = evaluate.measure(features, labels, make_unit(6, 17, 23) if with_unit else None, seed=0)
    assert found.keys() == {
        *("results", "left_out", "clustering", "transfer", "zero_shot", "pairs", "spread", "effective_rank"),
    }
    assert found["results"].keys() == kinds
    assert found["pairs"].keys() == kinds - {"rerank"}
    for result in found["results"].values():
        assert result.keys() == {"recall", "map_at_r", "r_precision"}
        assert list(result["recall"]) == ["1", "2", "4", "8"]
    assert found["clustering"].keys() == {"nmi", "ami"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found  # plain numbers, finite, keys that are strings


def test_the_seed_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "_PAIRS", 5000)  # of more
    features, labels, unit = noise(300, 6), torch.arange(300) % 20, make_unit(6, 17, 23)
    before = torch.get_rng_state()
    first = evaluate.measure(features, labels, unit, seed=2**32 - 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(17)
    np.random.seed(17)  # noqa: NPY002 — what scikit-learn would fall back on
    assert evaluate.measure(features, labels, unit, seed=2**32 - 1) == first
    others = [evaluate.measure(features, labels, unit, seed=seed) for seed in (5, 6, 7)]
    for figure in ("results", "clustering", "transfer", "zero_shot", "pairs"):
        assert any(other[figure] != first[figure] for other in others), figure
    for kind in first["results"]:
        assert values(others[0]["results"][kind]) == values(first["results"][kind])


def test_a_collapsed_embedding_can_be_measured() -> None:
    features, labels = torch.eye(6)[:1].repeat(40, 1), torch.arange(40) % 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate.measure(features, labels, make_unit(6, 17, 23), seed=0)
    assert found["spread"] == pytest.approx(0)
    assert found["effective_rank"] == pytest.approx(1)
    assert found["clustering"]["ami"] == pytest.approx(0)
    assert found["zero_shot"] == found["transfer"] == 0.25
    for pairs in found["pairs"].values():
        assert (pairs["overlap"], pairs["auc"]) == pytest.approx((1, 0.5))


@pytest.mark.parametrize(
    ("features", "labels", "candidates", "message"),
    [
        (noise(4), torch.tensor([0, 0, 1]), 9, "labels has length 3; features has 4"),
        (noise(4)[0], torch.zeros(8), 9, r"features has shape \(8,\); \(rows, dim\) is accepted"),
        (noise(4), torch.tensor([0, 0, 1, 2]), 9, "labels have 1 classes of two rows or more; at least 2"),
        (noise(0), torch.zeros(0, dtype=torch.int64), 9, r"features has shape \(0, 8\); at least one row"),
        (noise(4), torch.tensor([0, 0, 1, 1]), 0, "candidates is 0; at least 1"),
    ],
)
def test_what_cannot_be_measured_is_named(features: Tensor, labels: Tensor, candidates: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.measure(features, labels, None, seed=0, candidates=candidates)


def test_what_is_not_finite_is_named() -> None:
    features, labels, unit = noise(40, 6), torch.arange(40) % 4, make_unit(6, 17, 23)
    broken = features.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="the embedding is not finite"):
        evaluate.measure(broken, labels, None, seed=0)
    with torch.no_grad():
        unit.c.weight[1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="the PDDM unit's scores are not finite"):
        evaluate.measure(features, labels, unit, seed=0)
