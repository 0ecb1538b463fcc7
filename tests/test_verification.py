"""Same or not by one threshold: rates, where they are equal, and the thresholds that have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import pddm_ext
from helpers import make_unit
from pddm_ext.workbench.evaluation import separation
from pddm_ext.workbench.evaluation.evaluate import measure

#: Few distinct values, so that many are equal.
SIMILARITIES = st.lists(st.integers(-6, 6), min_size=1, max_size=40)
Values = NDArray[np.float64]


def rates(positive: Values, negative: Values, threshold: float) -> tuple[float, float]:
    """TPR and FPR of calling a pair the same from a threshold upwards."""
    return float(np.mean(positive >= threshold)), float(np.mean(negative >= threshold))


def thresholds(positive: Values, negative: Values) -> list[float]:
    """All that make a difference, the largest first."""
    return sorted({*positive.tolist(), *negative.tolist()}, reverse=True)


@given(SIMILARITIES, SIMILARITIES, st.sampled_from([0.5, 0.2, 0.1]))
def test_the_rate_is_the_largest_of_all_thresholds_that_do_not_exceed(
    positives: list[int], negatives: list[int], rate: float
) -> None:
    positive, negative = (np.array(values, float) for values in (positives, negatives))
    before, separation.FPRS = separation.FPRS, (rate,)
    try:
        found = separation.verification(positive, negative)
    finally:
        separation.FPRS = before
    tpr, threshold = found["tpr"][str(rate)], found["thresholds"][str(rate)]
    allowed = {t: rates(positive, negative, t)[0] for t in thresholds(positive, negative)}
    allowed = {t: share for t, share in allowed.items() if rates(positive, negative, t)[1] <= rate}
    best = max(allowed.values(), default=0.0)
    if len(negative) < 1 / rate:
        assert tpr is None
        assert threshold is None
    else:
        assert tpr == best
        assert threshold == (max(t for t, share in allowed.items() if share == best) if best else None)


@given(SIMILARITIES, SIMILARITIES)
def test_the_equal_error_rate_is_where_the_curves_cross(positives: list[int], negatives: list[int]) -> None:
    positive, negative = (np.array(values, float) for values in (positives, negatives))
    points = [(0.0, 0.0), *(rates(positive, negative, t) for t in thresholds(positive, negative))]
    tpr, fpr = np.array(points).T
    place = np.interp(0, fpr - (1 - tpr), np.arange(len(points)))  # rises with each threshold
    found = separation.verification(positive, negative)
    assert found["eer"] == pytest.approx(np.interp(place, np.arange(len(points)), fpr), abs=1e-12)
    crossed = [
        t
        for t in thresholds(positive, negative)
        if rates(positive, negative, t)[1] >= 1 - rates(positive, negative, t)[0]
    ]
    assert found["thresholds"]["eer"] == max(crossed)


@given(SIMILARITIES, SIMILARITIES, st.floats(0.1, 10), st.floats(-5, 5))
def test_no_change_of_scale_alters_a_rate(positives: list[int], negatives: list[int], by: float, more: float) -> None:
    positive, negative = (np.array(values, float) for values in (positives, negatives))
    one, other = (separation.verification(p, n) for p, n in ((positive, negative), (positive * by, negative * by)))
    assert (one["tpr"], one["eer"]) == (other["tpr"], other["eer"])


def test_rates_at_their_ends() -> None:
    low, high = np.linspace(0, 1, 2000), np.linspace(2, 3, 80)
    apart = separation.verification(high, low)
    assert apart["tpr"] == {"0.01": 1, "0.001": 1}
    assert apart["eer"] == 0
    assert apart["thresholds"] == {"0.01": 2, "0.001": 2, "eer": 2}
    wrong = separation.verification(low, np.linspace(2, 3, 200))
    assert wrong["tpr"] == {"0.01": 0, "0.001": None}
    assert wrong["eer"] == 1
    assert wrong["thresholds"] == {"0.01": None, "0.001": None, "eer": 2}
    point = separation.verification(np.zeros(7), np.zeros(2000))  # a collapse to one point
    assert point["tpr"] == {"0.01": 0, "0.001": 0}
    assert point["eer"] == 0.5
    assert point["thresholds"] == {"0.01": None, "0.001": None, "eer": 0}


@pytest.mark.parametrize(
    ("negatives", "resolved"), [(99, ()), (100, ("0.01",)), (999, ("0.01",)), (1000, ("0.01", "0.001"))]
)
def test_what_too_few_negative_pairs_cannot_tell_is_none(negatives: int, resolved: tuple[str, ...]) -> None:
    found = separation.verification(np.array([0.5, 2.0]), np.linspace(0, 1, negatives))
    for rate in ("0.01", "0.001"):
        assert (found["tpr"][rate] is not None) == (rate in resolved)
        assert (found["thresholds"][rate] is not None) == (rate in resolved)


def test_a_share_of_exactly_the_rate_does_not_exceed_it() -> None:
    positive = np.array([5.0, 3.0, 1.0])
    for count, rate in ((100, "0.01"), (300, "0.01"), (1000, "0.001"), (7000, "0.001")):
        above = round(count * float(rate))
        negative = np.concatenate([np.full(above, 4.0), np.zeros(count - above)])
        assert separation.verification(positive, negative)["tpr"][rate] == 1
        negative[above] = 4.0  # one more
        assert separation.verification(positive, negative)["tpr"][rate] == pytest.approx(1 / 3)


def embedding() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 8
    return F.normalize(torch.eye(8)[labels] + 0.5 * torch.randn(80, 8, generator=random), dim=1), labels


@pytest.mark.parametrize("gallery", [None, torch.arange(30, 80)])
def test_thresholds_are_distances_up_to_and_scores_from_which_a_pair_is_the_same(gallery: Any) -> None:
    """Whoever applies the threshold to the pairs has the rates that are told."""
    x, labels = embedding()
    unit = make_unit(8, 17, 23)
    queries = None if gallery is None else torch.arange(30)
    found = measure(x, labels, unit, seed=0, queries=queries, gallery=gallery)["pairs"]
    i, j = torch.triu_indices(80, 80, 1) if gallery is None else torch.cartesian_prod(queries, gallery).T
    same = labels[i] == labels[j]
    with torch.no_grad():
        scores = pddm_ext.score_pairs(x.to(unit.u.weight.device), i, j, unit).cpu()
    distances = torch.linalg.vector_norm(x[i] - x[j], dim=1)
    for kind, called in (
        ("distance", lambda t: distances.double() <= t),
        ("score", lambda t: scores.double() >= t),
    ):
        for rate, threshold in found[kind]["thresholds"].items():
            if threshold is None:
                assert found[kind]["tpr"][rate] == 0
                continue
            hits, alarms = (called(threshold)[these].double().mean().item() for these in (same, ~same))
            if rate == "eer":
                assert alarms == pytest.approx(found[kind]["eer"], abs=0.01)
                assert 1 - hits == pytest.approx(found[kind]["eer"], abs=0.01)
            else:
                assert hits == pytest.approx(found[kind]["tpr"][rate], abs=1e-9)
                assert alarms <= float(rate)
    assert None not in found["distance"]["thresholds"].values()
    assert found["distance"]["thresholds"]["eer"] > 0


def test_separate_classes_are_told_apart_without_an_error() -> None:
    labels = torch.arange(80) % 8
    found = measure(torch.eye(8)[labels], labels, None, seed=0)["pairs"]["distance"]
    assert found["tpr"] == {"0.01": 1, "0.001": 1}
    assert found["eer"] == 0
    assert found["thresholds"] == {"0.01": 0, "0.001": 0, "eer": 0}


def test_many_pairs_are_drawn_and_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = embedding()
    whole = measure(x, labels, None, seed=0)["pairs"]["distance"]
    monkeypatch.setattr(separation, "_PAIRS", 2000)  # of 2800 negative ones
    drawn = measure(x, labels, None, seed=0)["pairs"]["distance"]
    assert drawn["eer"] != whole["eer"]
    assert drawn["eer"] == pytest.approx(whole["eer"], abs=0.02)
    assert drawn["tpr"]["0.01"] == pytest.approx(whole["tpr"]["0.01"], abs=0.1)
