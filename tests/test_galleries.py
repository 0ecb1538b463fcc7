"""Queries that are searched for among a gallery: rankings, figures, pairs and probes of either."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn

from helpers import make_unit
from pddm_ext import reference
from pddm_ext.workbench.evaluation import evaluate, probes, retrieval, separation
from pddm_ext.workbench.evaluation.evaluate import measure
from runs import seen_by

N, D = 60, 6


def features(seed: int = 0, n: int = N) -> Tensor:
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def rows(count: int, seed: int) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:count]


LABELS = torch.randint(0, 12, (N,), generator=torch.Generator().manual_seed(4)) * 3 - 5
#: Queries and galleries that have no row in common, some, or all of either.
SIDES = {
    "apart": (rows(N, 1)[:25], rows(N, 1)[25:]),
    "some in common": (rows(30, 1), rows(40, 2)),
    "queries in the gallery": (rows(50, 1)[::3], rows(50, 1)),
    "the gallery in the queries": (rows(50, 1), rows(50, 1)[10:34]),
    "few": (rows(30, 1), rows(5, 3)),
    "all queries": (None, rows(33, 1)),
    "a whole gallery": (rows(20, 1), None),
    "all among all": (None, None),
}
sides = pytest.mark.parametrize(("queries", "gallery"), SIDES.values(), ids=SIDES)


def lists(queries: Tensor | None, gallery: Tensor | None) -> tuple[list[int], list[int]]:
    return tuple(list(range(N)) if x is None else x.tolist() for x in (queries, gallery))  # type: ignore[return-value]


def by(similarity: Tensor, query: int, gallery: list[int]) -> list[int]:
    """The gallery without the query, the most similar first."""
    return sorted((row for row in gallery if row != query), key=lambda row: -float(similarity[query, row]))


@sides
def test_rankings_are_of_the_gallery_alone_without_the_query(queries: Tensor | None, gallery: Tensor | None) -> None:
    unit, x = make_unit(D, 17, 23), features()
    asked, among = lists(queries, gallery)
    k = len(among) - bool(set(asked) & set(among))
    with torch.no_grad():
        scores = reference.score_matrix(x.double().to(unit.u.weight.device), unit).cpu()
    near = retrieval.by_distance(x, torch.tensor(asked), k, gallery)
    scored = retrieval.by_score(x.double(), torch.tensor(asked), k, unit, gallery)
    for place, query in enumerate(asked):
        assert near[place].tolist() == by(-torch.cdist(x.double(), x.double()), query, among)[:k]
        assert scored[place].tolist() == by(scores, query, among)[:k]
    some = retrieval.rerank(x, torch.tensor(asked), near, unit, k)
    mixed = {tuple(sorted(ranking)) for ranking in some.tolist()}
    assert mixed == {tuple(sorted(ranking)) for ranking in near.tolist()}


@pytest.mark.parametrize("copies", [2, 30])
def test_a_query_that_is_in_the_gallery_never_finds_itself_even_among_its_copies(copies: int) -> None:
    x = features(n=N // copies).repeat(copies, 1)
    queries, gallery = rows(30, 1), rows(40, 2)
    for ranked in (
        retrieval.by_distance(x, queries, 5, gallery),
        retrieval.by_score(x, queries, 5, make_unit(D), gallery),
    ):
        for query, found in zip(queries.tolist(), ranked.tolist(), strict=True):
            assert query not in found
            assert len(set(found)) == 5
            assert set(found) <= set(gallery.tolist())


def figures(similarity: Tensor, query: int, gallery: list[int]) -> list[float]:
    """Recall@1, 2, 4, 8, MAP@R and R-precision, by their definitions."""
    hits = [bool(LABELS[row] == LABELS[query]) for row in by(similarity, query, gallery)]
    r = sum(hits)
    precision = [sum(hits[: place + 1]) / (place + 1) for place in range(r)]
    average = sum(p for p, hit in zip(precision, hits, strict=False) if hit) / r
    return [*(float(any(hits[:k])) for k in (1, 2, 4, 8)), average, sum(hits[:r]) / r]


def values(summary: dict[str, Any]) -> list[float]:
    return [p["value"] for p in (*summary["recall"].values(), summary["map_at_r"], summary["r_precision"])]


@sides
def test_figures_are_means_over_the_queries_with_an_answer(queries: Tensor | None, gallery: Tensor | None) -> None:
    x, unit = features(), make_unit(D, 17, 23)
    asked, among = lists(queries, gallery)
    having = [q for q in asked if any(LABELS[q] == LABELS[row] for row in among if row != q)]
    with torch.no_grad():
        scores = reference.score_matrix(x.double().to(unit.u.weight.device), unit).cpu()
    found = measure(x.double(), LABELS, unit, seed=0, queries=queries, gallery=gallery)
    assert found["left_out"] == len(asked) - len(having)
    json.dumps(found, allow_nan=False)
    for kind, similarity in (("distance", -torch.cdist(x.double(), x.double())), ("score", scores)):
        expected = torch.tensor([figures(similarity, q, among) for q in having]).mean(0).tolist()
        assert values(found["results"][kind]) == pytest.approx(expected, abs=1e-6), kind
    recall = retrieval.recall_at_k(x, LABELS, queries, gallery)
    assert list(recall.values()) == pytest.approx(values(found["results"]["distance"])[:4])


def test_figures_are_those_of_pytorch_metric_learning_for_a_reference_set() -> None:
    x, (queries, gallery) = features(), SIDES["apart"]
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"), device=torch.device("cpu")
    )
    expected = calculator.get_accuracy(x[queries], LABELS[queries], x[gallery], LABELS[gallery])
    found = retrieval.retrieval(x, LABELS, None, 0, 100, queries=queries, gallery=gallery)["distance"]
    assert found["recall"]["1"]["value"] == pytest.approx(expected["precision_at_1"])
    assert found["map_at_r"]["value"] == pytest.approx(expected["mean_average_precision_at_r"])
    assert found["r_precision"]["value"] == pytest.approx(expected["r_precision"])


def test_a_query_outside_searches_the_whole_gallery_though_another_is_in_it() -> None:
    # A gallery of eight rows, all of one class but the last: R is 7, and the eighth row counts for Recall@8.
    labels = torch.tensor([0] * 7 + [1, 0, 1])
    x = F.normalize(torch.tensor([[1.0, 0.02 * row] for row in range(7)] + [[0.1, 1], [1, 0.5], [1, 0.0]]), dim=1)
    gallery = torch.arange(8)
    recall = retrieval.recall_at_k(x, labels, torch.tensor([0, 9]), gallery)
    assert recall == {1: 0.5, 2: 0.5, 4: 0.5, 8: 1}
    found = retrieval.retrieval(x, labels, None, 0, 100, queries=torch.tensor([0, 8, 9]), gallery=gallery)["distance"]
    assert found["recall"]["8"]["value"] == 1
    assert found["r_precision"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_all_rows_by_name_are_all_among_all_bit_for_bit(dtype: torch.dtype) -> None:
    x, unit, everything = features(), make_unit(D, 17, 23), torch.arange(N, dtype=dtype)
    expected = measure(x, LABELS, unit, seed=1, structure=x.exp())
    assert measure(x, LABELS, unit, seed=1, structure=x.exp(), queries=everything, gallery=everything) == expected


def test_queries_without_an_answer_change_no_ranking() -> None:
    labels = LABELS.clone()
    labels[:7] = torch.arange(100, 107)
    with_them = measure(features(), labels, None, seed=0, queries=torch.arange(30), gallery=torch.arange(30, N))
    without = measure(features(), labels, None, seed=0, queries=torch.arange(7, 30), gallery=torch.arange(30, N))
    assert with_them["left_out"] == without["left_out"] + 7
    assert with_them["results"] == without["results"]


def test_rows_on_neither_side_change_nothing() -> None:
    x, labels = features(), LABELS.clone()
    queries, gallery = torch.arange(20), torch.arange(20, 50)
    expected = measure(x[:50], labels[:50], None, seed=0, queries=queries, gallery=gallery)
    assert measure(x, labels, None, seed=0, queries=queries, gallery=gallery) == expected


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, (queries, gallery) = make_unit(D, 17, 23), SIDES["some in common"]
    whole = retrieval.retrieval(features(), LABELS, unit, 0, 100, queries=queries, gallery=gallery)
    monkeypatch.setattr(retrieval, "_ENTRIES", 170)
    parts = retrieval.retrieval(features(), LABELS, unit, 0, 100, queries=queries, gallery=gallery)
    for kind in ("distance", "score", "rerank"):
        assert values(parts[kind]) == values(whole[kind])


# Pairs


def pairs_of(queries: Tensor | None, gallery: Tensor | None) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
    asked, among = lists(queries, gallery)
    every = {frozenset((q, g)) for q in asked for g in among if q != g}
    same = {pair for pair in every if len({int(LABELS[row]) for row in pair}) == 1}
    return same, every - same


@sides
def test_pairs_are_each_query_with_each_gallery_row_once(queries: Tensor | None, gallery: Tensor | None) -> None:
    for found, expected in zip(
        separation.pairs(LABELS, 0, 10**6, queries, gallery), pairs_of(queries, gallery), strict=True
    ):
        assert len(found[0]) == len(expected)
        assert {frozenset(pair) for pair in found.T.tolist()} == expected


@sides
def test_drawn_pairs_are_any_of_them(queries: Tensor | None, gallery: Tensor | None) -> None:
    few = min(map(len, pairs_of(queries, gallery))) - 1
    drawn: tuple[set[frozenset[int]], ...] = (set(), set())
    for seed in range(400):
        for seen, found in zip(drawn, separation.pairs(LABELS, seed, few, queries, gallery), strict=True):
            assert found.shape == (2, few)
            seen.update(frozenset(pair) for pair in found.T.tolist())
    for seen, expected in zip(drawn, pairs_of(queries, gallery), strict=True):
        assert seen <= expected
        assert len(seen) > 0.95 * len(expected)


# Probes


def catalogue(width: float = 0.05) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features near twenty centres, labels, five queries a class and a gallery of one row a class."""
    labels = torch.arange(120) % 20
    random = torch.Generator().manual_seed(2)
    x = F.normalize(torch.eye(20)[labels] + width * torch.randn(120, 20, generator=random), dim=1)
    return x, labels, torch.arange(20, 120), torch.arange(20)


def test_a_gallery_of_one_picture_a_class_can_be_measured() -> None:
    x, labels, queries, gallery = catalogue(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(x, labels, make_unit(20, 8, 8), seed=0, queries=queries, gallery=gallery, structure=x.exp())
    assert found["left_out"] == 0
    # Nothing but the nearest picture is there to learn from.
    assert found["zero_shot"] == pytest.approx(found["results"]["distance"]["recall"]["1"]["value"])
    assert 0.2 < found["transfer"] <= 1
    assert found["results"]["distance"]["r_precision"] == found["results"]["distance"]["map_at_r"]


def test_one_query_a_class_has_nothing_to_cluster() -> None:
    x, labels, queries, gallery = catalogue()
    found = measure(x, labels, None, seed=0, queries=gallery, gallery=queries)
    assert found["clustering"] == {"nmi": None, "ami": None}
    assert found["transfer"] == found["zero_shot"] == 1


@sides
def test_probes_learn_the_gallery_and_are_tested_on_the_queries(
    queries: Tensor | None, gallery: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, among = lists(queries, gallery)
    rows = probes.learned(LABELS, 0, queries, gallery)
    outside = sorted(set(among) - set(asked))
    if outside:
        both = {int(LABELS[row]) for row in outside} & {int(LABELS[row]) for row in asked}
        assert rows is not None
        assert sorted(rows[0].tolist()) == [row for row in outside if int(LABELS[row]) in both]
        assert sorted(rows[1].tolist()) == sorted(row for row in asked if int(LABELS[row]) in both)
        monkeypatch.setattr(probes, "CLASSES", 3)
        chosen = [probes.learned(LABELS, seed, queries, gallery) for seed in range(4)]
        drawn = [tuple(LABELS[torch.cat(some)].unique().tolist()) for some in chosen if some is not None]
        assert all(len(classes) == min(3, len(both)) for classes in drawn)
        assert len(set(drawn)) > 1 or len(both) <= 3
    else:
        assert rows is not None
        assert set(torch.cat(rows).tolist()) <= set(asked)
        counts = {c: (LABELS[rows[0]] == c).sum() - (LABELS[rows[1]] == c).sum() for c in LABELS.unique()}
        assert all(abs(difference) <= 1 for difference in counts.values())
    assert not set(rows[0].tolist()) & set(rows[1].tolist())


def test_a_gallery_without_two_classes_to_learn_has_no_probe() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    queries, gallery = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])
    x = features(n=6)
    found = measure(x, labels, None, seed=0, queries=queries, gallery=gallery)
    assert found["transfer"] is None
    assert found["zero_shot"] is None


def test_clusters_are_those_of_the_queries() -> None:
    x, labels, queries, gallery = catalogue()
    expected = probes.clustering(x[queries], labels[queries], 0)
    assert measure(x, labels, None, seed=0, queries=queries, gallery=gallery)["clustering"] == expected
    assert probes.clustering(x, labels, 0, queries) == expected


def test_spread_and_rank_are_of_both_sides() -> None:
    x, labels, queries, gallery = catalogue()
    found = measure(x, labels, None, seed=0, queries=queries[:50], gallery=gallery)
    used = x[:70]
    assert found["spread"] == evaluate.spread(used)
    assert found["effective_rank"] == evaluate.effective_rank(used)


# A test set


class Pictures:
    """Stands for a test set with a gallery."""

    def __init__(self) -> None:
        _, self.labels, self.queries, self.gallery = catalogue()
        self.seen = torch.randn(120, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        self.read = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.read += len(rows)
        return self.seen[rows]


def test_embedding_shows_its_pictures_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    test, net = Pictures(), nn.Sequential(nn.Flatten(), nn.Linear(9, 6))
    seen_by(net, test)
    assert capsys.readouterr().err == ""
    seen_by(net, test, progress=True)
    shown = capsys.readouterr().err
    assert "embedding: 100%" in shown
    assert "120/120" in shown


def test_a_net_that_fails_is_put_back_into_its_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 6))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        seen_by(net, Pictures())
    assert net.training


# What is named


EMPTY = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("side", ["queries", "gallery"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([0, 1], TypeError, "{} is a list; a tensor of an integer dtype"),
        (torch.arange(9) / 1, TypeError, "{} has dtype torch.float32; an integer dtype"),
        (torch.arange(N) > 30, TypeError, "{} has dtype torch.bool; an integer dtype"),
        (torch.arange(9)[None], ValueError, r"{} has shape \(1, 9\); one dimension"),
        (torch.arange(9).to("meta"), TypeError, "{} is on the meta device"),
        (EMPTY, ValueError, "{} is empty; at least one row is accepted"),
        (torch.tensor([4, 0, 7, 4]), ValueError, "{} has row 4 twice; distinct rows are accepted"),
        (torch.tensor([0, N]), IndexError, "{} (is|are) 0 to 60; 0 to 59 is accepted"),
        (torch.tensor([-1, 3]), IndexError, "{} (is|are) -1 to 3; 0 to 59 is accepted"),
    ],
)
def test_sides_that_are_not_accepted(side: str, given: Any, error: type[Exception], message: str) -> None:
    chosen = {side: given}
    calls = [
        lambda: measure(features(), LABELS, None, seed=0, **chosen),
        lambda: retrieval.retrieval(features(), LABELS, None, 0, 10, **chosen),
        lambda: retrieval.recall_at_k(features(), LABELS, **chosen),
        lambda: separation.separation(features(), LABELS, None, 0, **chosen),
        lambda: probes.transfer(features(), LABELS, 0, **chosen),
        lambda: probes.zero_shot(features(), LABELS, 0, **chosen),
    ]
    if side == "gallery":
        calls += [
            lambda: retrieval.by_distance(features(), torch.arange(3), 3, given),
            lambda: retrieval.by_score(features(), torch.arange(3), 3, make_unit(D), given),
            lambda: retrieval.relevant(LABELS, given),
        ]
    else:
        calls.append(lambda: probes.clustering(features(), LABELS, 0, given))
    for call in calls:
        with pytest.raises(error, match=message.format(side)):
            call()


NOBODY = {"queries": torch.arange(4), "gallery": torch.arange(30, 40)}
APART = torch.arange(N)
CALLS: dict[str, Any] = {
    "no answer": (
        lambda: retrieval.recall_at_k(features(), APART, **NOBODY),
        "0 of the 4 queries have another row of their class in the gallery; at least 1 is accepted",
    ),
    "one answer": (
        lambda: retrieval.retrieval(features(), APART % 39, None, 0, 9, queries=APART[:4], gallery=APART[39:40]),
        "1 of the 4 queries have another row of their class in the gallery; at least 2 are accepted",
    ),
    "one class": (
        lambda: measure(features(), APART // 30, None, seed=0, queries=APART[:4], gallery=APART[:20]),
        "queries have 1 classes of which the gallery has another row; at least 2 are accepted",
    ),
    "no classes": (
        lambda: measure(features(), APART, None, seed=0, **NOBODY),
        "queries have 0 classes of which the gallery has another row",
    ),
    "k of the gallery": (
        lambda: retrieval.by_distance(features(), APART[:3], 11, NOBODY["gallery"]),
        "k is 11; 1 to 10, the other rows of the gallery, is accepted",
    ),
    "k of a gallery with a query": (
        lambda: retrieval.by_score(features(), APART[30:33], 10, make_unit(D), NOBODY["gallery"]),
        "k is 10; 1 to 9, the other rows of the gallery, is accepted",
    ),
    "the query alone": (
        lambda: retrieval.by_distance(features(), APART[5:6], 1, APART[5:6]),
        "k is 1; there is no other row in the gallery",
    ),
    "a query without an answer": (
        lambda: retrieval.per_query(APART[30:40].expand(4, 10), APART[:4], APART, NOBODY["gallery"]),
        "queries has row 0, which has no other row of its class in the gallery",
    ),
    "a ranked row outside": (
        lambda: retrieval.per_query(APART[29:39].expand(4, 10), APART[:4], APART % 10, NOBODY["gallery"]),
        "ranked has row 29, which is not in the gallery",
    ),
    "no negative pair": (
        lambda: separation.pairs(APART // 30, 0, 9, APART[:4], APART[:20]),
        "labels have no positive pair, or no negative one",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_what_has_no_figure_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
