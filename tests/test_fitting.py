"""The second of two stages: a unit for an embedding that no longer changes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pddm_ext
from pddm_ext.workbench import checkpoint, cli, fitting, outcome
from pddm_ext.workbench.data.splits import Dataset, TestClasses
from pddm_ext.workbench.evaluation.evaluate import measure
from pddm_ext.workbench.fitting import FittedUnit, fit
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.settings import Settings
from pddm_ext.workbench.similarity import Similarity
from runs import TINY, differences, trained, untimed, with_gallery

CLASSES, DIM = 6, 8


def rows(each: int, seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Unit features whose classes lie close together along most axes, and are spread along two that tell nothing."""
    generator = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, DIM, generator=generator)
    generator.manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    spread = torch.full((DIM,), 0.15)
    spread[:2] = 1.5
    noise = torch.randn(len(labels), DIM, generator=generator) * spread
    return F.normalize(centres[labels] + noise, dim=1), labels


def drawn(features: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        places = torch.randperm(len(labels), generator=generator)[:24]
        yield features[places], labels[places], places


def fitted(features: Tensor, labels: Tensor, fall_back: bool = True, **changed: Any) -> FittedUnit:
    given = {"method": "recommended", "dim": DIM, "unit_steps": 150, "weight_decay": 0.0, **changed}
    settings = Settings(**given)
    made = FittedUnit(settings, int(labels.max()) + 1).to(features.dtype)
    for _ in fit(made, features, labels, drawn(features, labels, settings.unit_updates), settings, fall_back=fall_back):
        pass
    return made


def map_at_r(similarity: Similarity | None, gallery: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    n = len(queries[1])
    both = torch.cat([queries[0], gallery[0]]), torch.cat([queries[1], gallery[1]])
    places = torch.arange(len(both[1]))
    found = measure(*both, similarity, seed=0, queries=places[:n], gallery=places[n:])
    by = "distance" if similarity is None else "score"
    return float(found["results"][by]["map_at_r"]["value"])


def test_the_score_knows_its_classes_better_than_the_distance_does() -> None:
    gallery, queries = rows(20, 1), rows(10, 2)
    distance = map_at_r(None, gallery, queries)
    similarity = fitted(*gallery, fall_back=False).similarity
    assert similarity.cosine == 0
    assert map_at_r(similarity, gallery, queries) > distance + 0.1
    beside = fitted(*gallery).similarity
    assert beside.cosine > 0
    assert map_at_r(beside, gallery, queries) > distance


def test_it_begins_with_what_the_embedding_has_made_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step the score is higher of pairs at a class than of others; of random weights it is not."""
    monkeypatch.setattr(fitting, "RATE", 0.0)
    features, labels = rows(12, 1)
    tells = {}
    for start in ("own", "random"):
        settings = Settings(method="recommended", dim=DIM, unit_start=start)
        made = FittedUnit(settings, CLASSES)
        list(fit(made, features, labels, drawn(features, labels, 1), settings, fall_back=True))
        scores = pddm_ext.score_matrix(features, made.unit)
        same = labels[:, None] == labels
        off = ~torch.eye(len(labels), dtype=torch.bool)
        tells[start] = float((scores[same & off].mean() - scores[~same].mean()) / scores[off].std())
    assert tells["own"] > 1
    assert tells["random"] < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_same_each_time_whatever_was_fitted_before(dtype: torch.dtype) -> None:
    features, labels = (rows(8, 1)[0].to(dtype), rows(8, 1)[1])
    settings = Settings(method="recommended", dim=DIM, unit_steps=20)
    torch.manual_seed(3)
    once = fitted(features, labels, unit_steps=20)
    torch.manual_seed(4)
    twice = fitted(features, labels, unit_steps=20)
    list(fit(twice, features, labels, drawn(features, labels, 20), settings, fall_back=True))
    state = torch.random.get_rng_state()
    fitted(features, labels, unit_steps=2)
    assert torch.equal(state, torch.random.get_rng_state())
    twice = fitted(features, labels, unit_steps=20)
    assert not differences(once.state_dict(), twice.state_dict())
    assert once.unit.u.weight.dtype == dtype
    assert not any(parameter.requires_grad for parameter in once.parameters())


def test_it_can_be_mined_among_rows_of_earlier_steps() -> None:
    """Which holds more of a class than a batch of 24 does; and a bank of the batch alone has its pairs both ways."""
    features, labels = rows(8, 1)
    counts, made, mine = {}, {}, fitting.mine
    for bank in (-1, 24, 60):
        seen: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "mine", lambda *given, to=seen: (q := mine(*given), to.append(len(q.i)))[0])
            made[bank] = fitted(features, labels, unit_steps=5, bank=bank, classes=6)
        counts[bank] = seen
    assert counts[24] == [2 * count for count in counts[-1]]
    assert counts[60][0] == counts[24][0]
    assert all(more > 2 * few for more, few in zip(counts[60][2:], counts[24][2:], strict=True))
    assert differences(made[-1].state_dict(), made[60].state_dict())


def test_a_bank_of_its_own_is_that_of_a_unit_trained_afterwards() -> None:
    features, labels = rows(8, 1)
    own, named = (fitted(features, labels, unit_steps=5, bank=bank, classes=6) for bank in (0, 256))
    assert not differences(own.state_dict(), named.state_dict())
    assert Settings(method="recommended").bank_rows == 256
    assert Settings(method="recommended", classes=100, samples=4).bank_rows == 400
    assert Settings(method="recommended", bank=-1).bank_rows == 0
    for method in ("pddm-pair", "joint", "multi-similarity"):
        assert Settings(method=method).bank_rows == Settings(method=method, bank=-1).bank_rows == 0
    # What is refused beside a bank is not beside none.
    assert Settings(method="pddm-pair", bank=-1, candidates=3).candidates == 3


def test_below_the_floor_lie_the_scores_of_nearly_all_different_pairs() -> None:
    features, labels = rows(20, 1)
    made = fitted(features, labels, unit_steps=60)
    scores = pddm_ext.score_matrix(features, made.unit)
    different = scores[labels[:, None] != labels]
    assert float((different < made.floor).float().mean()) == pytest.approx(0.998, abs=0.002)
    assert fitted(features, labels, unit_steps=2, fall_back=False).similarity.floor == -torch.inf


def test_the_cosine_weighs_so_many_standard_deviations() -> None:
    features, labels = rows(20, 1)
    made = fitted(features, labels, unit_steps=30)
    i, j = torch.triu_indices(len(features), len(features), 1)
    scores = pddm_ext.score_pairs(features, i, j, made.unit)
    cosines = (features[i] * features[j]).sum(1)
    assert float(made.cosine * cosines.std() / scores.std()) == pytest.approx(fitting.WEIGHT, rel=0.05)


def test_more_classes_than_a_unit_has_room_for_share_it() -> None:
    features, labels = rows(3, 1, classes=60)
    settings = Settings(method="recommended", dim=DIM, unit_steps=5, unit_width=16)
    made = FittedUnit(settings, 60)
    assert (made.unit.hidden, made.unit.combined) == (16, 16)
    list(fit(made, features, labels, drawn(features, labels, 5), settings, fall_back=True))
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    assert FittedUnit(Settings(method="recommended", dim=DIM), 60).unit.hidden == 4 * DIM
    assert FittedUnit(Settings(method="recommended", dim=DIM), 3).unit.hidden == DIM
    assert FittedUnit(Settings(method="recommended", dim=DIM), 20).unit.hidden == 20 + DIM // 2


@pytest.mark.parametrize("start", ["random", "distance"])
def test_other_starts(start: str) -> None:
    features, labels = rows(8, 1)
    made = fitted(features, labels, unit_start=start, unit_steps=10)
    assert made.similarity.cosine > 0


def test_what_diverges_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RATE", 1e37)
    with pytest.raises(FloatingPointError, match="the PDDM unit is not finite after its own steps"):
        fitted(*rows(8, 1), unit_steps=5)


# The similarity


def test_a_score_beside_a_cosine() -> None:
    torch.manual_seed(0)
    unit = pddm_ext.PDDM(DIM)
    features = 3 * torch.randn(20, DIM)
    plain = pddm_ext.score_matrix(features, unit).detach()
    floor = float(plain.median())
    similarity = Similarity(unit, 0.5, floor)
    unit_rows = F.normalize(features, dim=1)
    expected = plain.clamp(min=floor) + 0.5 * unit_rows @ unit_rows.T
    i, j = torch.randint(20, (2, 50))
    torch.testing.assert_close(similarity.pairs(features, i, j), expected[i, j])
    found = similarity.best(features[:5], features, 7)
    assert torch.equal(found, expected[:5].argsort(dim=1, descending=True, stable=True)[:, :7])
    assert similarity.best(features[:0], features, 3).shape == (0, 3)
    alone = Similarity(unit)
    assert torch.equal(alone.best(features[:5], features, 7), pddm_ext.topk(features[:5], features, 7, unit)[1])
    assert torch.equal(alone.pairs(features, i, j), pddm_ext.score_pairs(features, i, j, unit))


def test_the_best_of_a_similarity_has_nan_last_and_equal_ones_in_order() -> None:
    unit = pddm_ext.PDDM(DIM)
    features = torch.randn(6, DIM)
    features[4] = features[1]
    features[2] = torch.nan
    order = Similarity(unit, 1.0).best(features[:1], features, 6)[0].tolist()
    assert order[-1] == 2
    assert order.index(4) == order.index(1) + 1


# Runs

RECOMMENDED = {"method": "recommended", "unit_steps": 20, "freeze": False}


def test_the_embedding_is_the_first_methods_alone(tiny: Dataset, tmp_path: Path) -> None:
    alone = trained(tiny, method="multi-similarity")
    both = trained(tiny, tmp_path, **RECOMMENDED)
    assert not differences(alone.learner.net.state_dict(), both.learner.net.state_dict())
    assert both.fitted
    metrics = outcome.figures(both)
    assert metrics["results"].keys() == {"distance", "score", "rerank"}
    assert metrics["results"]["distance"] == outcome.figures(alone)["results"]["distance"]
    used = pddm_ext.load(tmp_path)
    assert used.unit is not None
    assert not differences(used.unit.state_dict(), both.learner.unit.state_dict())
    assert used.cosine == float(both.learner.fitted.cosine) > 0
    pictures = tiny.test.pictures[torch.arange(6)]
    x = used(pictures)
    expected = used.unit(x[:3], x[3:]).clamp(min=used.floor) + used.cosine * (x[:3] * x[3:]).sum(1)
    assert used.floor == float(both.learner.fitted.floor) > -torch.inf
    torch.testing.assert_close(used.score(pictures[:3], pictures[3:]), expected.detach())


@pytest.mark.parametrize("method", ["euclidean-anchor", "norm-softmax"])
def test_any_method_without_a_unit_can_be_followed_by_one(tiny: Dataset, method: str) -> None:
    run = trained(tiny, method=method, unit_steps=5)
    assert run.fitted
    assert run.learner.similarity is not None
    assert "score" in outcome.figures(run)["results"]


@pytest.mark.parametrize(("protocol", "own"), [("unseen", True), ("known", False), ("seen", False)])
def test_the_score_falls_back_where_classes_are_unseen_or_as_asked(
    tiny: Dataset, protocol: TestClasses, own: bool
) -> None:
    data = replace(tiny, protocol=protocol)
    for asked, falls in (("own", own), ("distance", True), ("none", False)):
        run = trained(data, **RECOMMENDED, unit_fallback=asked)
        assert (run.learner.similarity.cosine > 0) == (run.learner.similarity.floor > -torch.inf) == falls


def test_another_unit_is_had_of_a_finished_run_without_training_its_embedding_again(
    tiny: Dataset, tmp_path: Path
) -> None:
    first = trained(tiny, tmp_path, **RECOMMENDED)
    for changed in ({"unit_noise": 0.1}, {"unit_width": 30, "unit_start": "random"}, {"unit_steps": 7}):
        again = trained(tiny, tmp_path, **{**RECOMMENDED, **changed})
        fresh = trained(tiny, **{**RECOMMENDED, **changed})
        assert again.taken == 6
        assert not differences(again.learner.state_dict(), fresh.learner.state_dict())
        assert differences(again.learner.fitted.state_dict(), first.learner.fitted.state_dict())
    plain = trained(tiny, tmp_path / "plain", method="norm-softmax")
    after = trained(tiny, tmp_path / "plain", method="norm-softmax", unit_steps=3)
    assert not differences(plain.learner.net.state_dict(), after.learner.net.state_dict())
    assert after.fitted
    without = trained(tiny, tmp_path / "plain", method="norm-softmax")
    assert pddm_ext.load(tmp_path / "plain").unit is not None  # nothing was left to do
    assert without.learner.similarity is None


def test_a_class_that_came_makes_the_unit_anew(tiny: Dataset, tmp_path: Path) -> None:
    data = with_gallery(tiny)
    few = replace(data, train=data.train.classes(torch.arange(7)), gallery=data.gallery)
    trained(few, tmp_path, **RECOMMENDED, patience=2)
    run = Run(Settings(**{**TINY, **RECOMMENDED, "patience": 2}), data, tmp_path)
    assert run.resume(accept_changed_data=True)
    run.train(progress=False)
    assert run.fitted
    assert run.learner.unit.hidden == 8 + 4
    assert pddm_ext.load(tmp_path).unit.hidden == 12


def test_what_stands_beside_the_score_is_checked(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, **RECOMMENDED)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    for name, value, message in (
        ("cosine", torch.tensor(torch.nan), "its weights are not all finite"),
        ("floor", torch.tensor(torch.nan), "its weights are not all finite"),
        ("cosine", torch.ones(2), "damaged; it has no weights of a unit"),
    ):
        bad = {**state, "learner": {**state["learner"], f"fitted.{name}": value}}
        checkpoint.save(tmp_path / CHECKPOINT, {key: part for key, part in bad.items() if key != "format"})
        with pytest.raises(ValueError, match=message):
            pddm_ext.load(tmp_path)


def test_a_start_by_classes_is_for_a_unit_trained_afterwards(tiny: Dataset) -> None:
    with pytest.raises(ValueError, match="--unit-start classes is for a unit that is trained afterwards"):
        Run(Settings(**TINY, method="pddm-pair", unit_start="classes"), tiny)


def test_ctrl_c_while_the_unit_is_trained_loses_no_step(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, changed = with_gallery(tiny), {**RECOMMENDED, "patience": 3, "augment": False}
    whole = trained(data, tmp_path / "whole", **changed)
    generator = fitting.fit

    def interrupted(*arguments: Any, **named: Any) -> Iterator[None]:
        for step, _ in enumerate(generator(*arguments, **named)):
            if step == 7:
                signal.raise_signal(signal.SIGINT)
            yield

    with monkeypatch.context() as patch:
        patch.setattr("pddm_ext.workbench.loop.fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(data, tmp_path / "stopped", **changed)
    state = checkpoint.load(tmp_path / "stopped" / CHECKPOINT)
    assert state["taken"] == 6
    assert state["fitted"] is False
    early = pddm_ext.load(tmp_path / "stopped")
    assert early.unit is None
    with pytest.raises(ValueError, match="recommended, whose PDDM unit is trained when the run has ended"):
        early.score(data.test.pictures[torch.arange(1)], data.test.pictures[torch.arange(1)])
    with monkeypatch.context() as patch:
        patch.setattr("pddm_ext.workbench.export.export", lambda *_: [])
        assert cli.main(["export", str(tmp_path / "stopped"), "--out", str(tmp_path / "graphs")]) == 0
    assert (
        "not written: a unit of recommended, whose PDDM unit is trained when the run has ended"
        in capsys.readouterr().out
    )
    resumed = trained(data, tmp_path / "stopped", **changed)
    assert not differences(whole.learner.state_dict(), resumed.learner.state_dict())
    assert untimed(outcome.figures(whole)) == untimed(outcome.figures(resumed))
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    assert not differences(states[0]["best"], states[1]["best"])
    assert states[0]["thresholds"].keys() == {"distance", "score"}
    again = Run(Settings(**states[0]["settings"]), data, tmp_path / "whole")
    again.resume()
    assert again.fitted
    assert pddm_ext.load(tmp_path / "whole").unit is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unit_steps": -1}, "--unit-steps is -1; at least 0"),
        ({"unit_noise": float("nan")}, "--unit-noise is nan"),
        ({"unit_fallback": "cosine"}, "--unit-fallback is 'cosine'; own, distance, none are accepted"),
        ({"unit_width": 1}, "--unit-width is 1; 0 or at least 2"),
        ({"gather": True}, "--gather is for several --devices; 1 has nothing to gather"),
        ({"gather": True, "devices": 2, "candidates": 3}, "--candidates is 3 beside --gather; with it 0 is accepted"),
        ({"gather": True, "devices": 2, "distance_steps": 3}, "--distance-steps is 3 beside --gather"),
        ({"bank": -2}, "--bank is -2; at least -1"),
        ({"bank": 11, "classes": 4, "samples": 3}, "--bank is 11; a batch has 12 pictures"),
        (
            {"bank": 23, "classes": 4, "samples": 3, "devices": 2, "method": "joint"},
            "--bank is 23; a batch has 24 pictures",
        ),
        ({"bank": 9, "candidates": 3}, "--candidates is 3 beside --bank; with it 0 is accepted"),
        ({"bank": 9, "distance_steps": 3}, "--distance-steps is 3 beside --bank"),
        ({"train_share": 0.0}, "--train-share is 0.0; above 0"),
        ({"train_share": 1.5}, "--train-share is 1.5"),
        ({"label_noise": 1.0}, "--label-noise is 1.0; from 0 to below 1"),
        ({"label_noise": -0.1}, "--label-noise is -0.1"),
    ],
)
def test_settings_that_cannot_be_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**changed)
