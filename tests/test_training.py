"""A training run: its data, its settings, its command line, and runs that stop and continue."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import pddm_ext
from helpers import threads
from pddm_ext.workbench import checkpoint, cli, loop, outcome
from pddm_ext.workbench.data import glyphs
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset, Split, TestSet, batches, fit, in_memory
from pddm_ext.workbench.evaluation.evaluate import embed
from pddm_ext.workbench.evaluation.retrieval import recall_at_k
from pddm_ext.workbench.loop import CHECKPOINT, CONFIG, CollapseWarning, Learner, Run
from pddm_ext.workbench.methods import mine_by_distance, objective
from pddm_ext.workbench.model import embedder
from pddm_ext.workbench.settings import METHODS, Settings

TINY = {"steps": 6, "classes": 4, "samples": 3, "dim": 8, "every": 2, "accelerator": "cpu"}
TINY_OPTIONS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small, among other test processes, are slower on more."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def characters() -> Dataset:
    return glyphs.load()


def blots(classes: int, seed: int) -> list[Tensor]:
    """Classes of random coarse patterns, each of four pictures a little different: (4, 1, 64, 64) uint8 each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(classes, 1, 1, 8, 8, generator=generator)
    coarse = coarse + 0.3 * torch.rand(classes, 4, 1, 8, 8, generator=generator)
    large = torch.nn.functional.interpolate(coarse.flatten(0, 1), scale_factor=8) * 190
    return list(large.byte().split(4))


def make_tiny() -> Dataset:
    def split(groups: dict[str, str], seed: int) -> Split:
        pictures = iter(blots(sum(map(len, groups.values())), seed))
        return in_memory({group: {name: next(pictures) for name in names} for group, names in groups.items()})

    return Dataset(
        "glyphs", DRAWINGS, split({"one": "abcde", "two": "fgh"}, 0), split({"three": "vwxyz"}, 1), distort_test=True
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Eight training classes and five test classes, which the command line finds in the glyphs' place."""
    dataset = make_tiny()
    monkeypatch.setattr(glyphs, "load", lambda: dataset)
    return dataset


def make_archive(path: Path) -> Path:
    """Omniglot's layout in small, for processes that no fixture reaches: 5 alphabets × 3 characters × 4 drawings."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for alphabet in "ABCDE":
            for character in range(3):
                ink = random.integers(0, 2, (12, 12)).repeat(8, 0).repeat(8, 1) * 255
                for drawing in range(4):
                    noisy = np.where(random.random(ink.shape) < 0.1, 0, ink).astype(np.uint8)
                    name = f"images_background_small1/{alphabet}/character{character + 1:02}/{drawing}.png"
                    with archive.open(name, "w") as file:
                        Image.fromarray(noisy).convert("1").save(file, "PNG")
    return path


def pictures_of(dataset: Dataset, **changed: Any) -> tuple[Tensor, Tensor]:
    """A batch as a net sees it."""
    stored, labels = next(batches(dataset.train, 4, 3, 1, seed=0, **changed))
    return dataset.view.plain(stored), labels


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON holds them, without what no two runs share."""
    metrics = json.loads(json.dumps(metrics))
    del metrics["curves"]["seconds"]
    return metrics


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Ctrl-C while this many-th batch is with the net, counted from 1."""
    forward, calls = Learner.forward, []

    def interrupted(self: Learner, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return forward(self, pictures, labels)

    monkeypatch.setattr(Learner, "forward", interrupted)


def trained(dataset: Dataset, folder: Path | None = None, backbone: nn.Module | None = None, **changed: Any) -> Run:
    """A run to its end, from its folder's checkpoint if there is one."""
    run = Run(Settings(**{**TINY, **changed}), dataset, folder, backbone)
    if folder is not None and (folder / CHECKPOINT).exists():
        run.resume()
    run.train(progress=False)
    return run


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two states of dicts, lists, tensors and values are not the same bits."""
    if isinstance(one, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        return [found for key in one for found in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, (a, b) in pairs for found in differences(a, b, f"{at}/{place}")]
    return [] if one == other else [at]


# Glyphs


def test_glyphs_are_open_set(characters: Dataset) -> None:
    train, test = characters.train, characters.test
    assert not set(train.names) & set(test.names)
    for scripts, split in ((glyphs.TRAIN_SCRIPTS, train), (glyphs.TEST_SCRIPTS, test)):
        assert split.groups == tuple(scripts)
        for place, (script, members) in enumerate(scripts.items()):
            kept = {name for name, group in zip(split.names, split.group_of, strict=True) if group == place}
            assert kept <= set(members), script
            assert len(kept) >= 5, script
        assert torch.bincount(split.labels).min() >= glyphs.MIN_FACES
        assert split.labels.max() + 1 == len(split.names)
        assert len(split.pictures) == len(split.labels)
    assert len(train.names) >= 50
    assert len(test.names) >= 80


def test_no_picture_has_two_labels(characters: Dataset) -> None:
    splits = characters.train, characters.test
    drawings = torch.cat([split.pictures[torch.arange(len(split.labels))] for split in splits])
    labels = torch.cat([splits[0].labels, splits[1].labels + len(splits[0].names)])
    alike = glyphs.similarity(drawings, drawings)
    other = labels[:, None] != labels[None, :]
    assert alike[other].max() < glyphs.ALIKE
    # By another measure too: no two classes share most of their ink.
    ink = (drawings > 127).flatten(1).float()
    both = ink @ ink.T
    union = ink.sum(1)[:, None] + ink.sum(1)[None, :] - both
    assert (both / union)[other].max() < 0.9


@pytest.mark.parametrize(
    "pair",
    [
        *("AА", "oо", "cс", "pр", "xх", "BВ", "HН", "iі", "cC", "sS", "Il", "0O", "6б"),
        *("oօ", "nո", "uս", "hհ", "gց", "qզ", "OՕ", "SՏ", "UՍ", "oס", "Iו", "Iן"),
    ],
)
def test_look_alikes_are_one_class_or_left_out(characters: Dataset, pair: str) -> None:
    kept = set(characters.train.names) | set(characters.test.names)
    assert len(kept & set(pair)) <= 1


def test_left_out_training_characters_are_not_tested(characters: Dataset) -> None:
    """A test class looks like no character of a training script, kept or not."""
    drawn = torch.cat(list(glyphs.draw("".join(glyphs.TRAIN_SCRIPTS.values())).values()))
    for rows in torch.arange(len(characters.test.labels)).split(256):
        assert glyphs.similarity(characters.test.pictures[rows], drawn).max() < glyphs.ALIKE


def test_only_glyphs_that_a_face_has_are_drawn() -> None:
    drawn = glyphs.draw("Aა中")
    assert "中" not in drawn
    assert len(drawn["A"]) == len(glyphs.FACES) == 16
    assert glyphs.MIN_FACES <= len(drawn["ა"]) < len(glyphs.FACES)


def test_missing_font_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "FACES", ("NoSuchFace",))
    with pytest.raises(FileNotFoundError, match=r"NoSuchFace\.ttf.*matplotlib"):
        glyphs.draw("A")


# Pictures and batches


def test_fit_normalises_place_and_size() -> None:
    small, large = Image.new("L", (105, 105)), Image.new("L", (200, 200))
    small.paste(255, (10, 20, 30, 60))
    large.paste(255, (90, 20, 150, 140))
    torch.testing.assert_close(fit(small), fit(large), rtol=0, atol=0)
    with pytest.raises(ValueError, match="blank"):
        fit(Image.new("L", (9, 9)))


def test_samples_are_fresh_in_training_and_frozen_at_test(tiny: Dataset) -> None:
    stored = tiny.train.pictures[torch.arange(24)]
    generator = torch.Generator().manual_seed(3)
    first, second = (DRAWINGS.augment(stored, generator) for _ in range(2))
    assert first.shape == (24, 1, 32, 32)
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    every = torch.arange(len(tiny.test.labels))
    test, again, other = (TestSet(tiny, seed) for seed in (3, 3, 4))
    assert torch.equal(test[every], again[every])
    assert torch.equal(test.labels, again.labels)
    assert not torch.equal(test[every], other[every])


def test_undistorted_test_pictures_are_the_stored_ones_in_another_order(tiny: Dataset) -> None:
    test = TestSet(Dataset("glyphs", DRAWINGS, tiny.train, tiny.test), 0)
    plain = DRAWINGS.plain(tiny.test.pictures[torch.arange(len(test))])
    for picture, label in zip(test[torch.arange(len(test))], test.labels, strict=True):
        same = (plain == picture).flatten(1).all(1)
        assert tiny.test.labels[same].tolist() == [label]


def test_batches_are_classes_times_samples_and_follow_their_seed(tiny: Dataset) -> None:
    drawn = list(batches(tiny.train, 3, 6, 5, seed=1))  # more than the four pictures of a class
    assert [pictures.shape for pictures, _ in drawn] == [(18, 1, 64, 64)] * 5
    for pictures, labels in drawn:
        assert torch.bincount(labels, minlength=8).sort().values.tolist() == [0] * 5 + [6] * 3
        for picture, label in zip(pictures, labels, strict=True):
            rows = (tiny.train.pictures[torch.arange(32)] == picture).flatten(1).all(1)
            assert tiny.train.labels[rows].tolist() == [label]
    assert not differences(drawn, list(batches(tiny.train, 3, 6, 5, seed=1)))
    assert differences(drawn, list(batches(tiny.train, 3, 6, 5, seed=2)))
    assert not differences(drawn[2:], list(batches(tiny.train, 3, 6, 5, seed=1, skip=2)))


def test_validation_classes_are_training_classes_that_are_held_out(tiny: Dataset) -> None:
    for fold, held in enumerate(["fgh", "abcde", "fgh"]):  # the last group first, and around
        validation = tiny.validation(fold)
        assert "".join(validation.test.names) == held
        assert "".join(validation.train.names) == "".join(sorted(set("abcdefgh") - set(held)))
        for split in (validation.train, validation.test):
            for name, label in zip(split.names, range(len(split.names)), strict=True):
                before = (tiny.train.labels == tiny.train.names.index(name)).nonzero().flatten()
                rows = (split.labels == label).nonzero().flatten()
                assert torch.equal(split.pictures[rows], tiny.train.pictures[before])
    assert tiny.validation(0).digest() not in (tiny.digest(), tiny.validation(1).digest())
    assert tiny.validation(0).distort_test


def test_without_groups_a_quarter_of_the_classes_is_held_out(tiny: Dataset) -> None:
    train = in_memory({"all": dict(zip("abcdefgh", blots(8, 0), strict=True))})
    ungrouped = Dataset("folder", DRAWINGS, train, tiny.test)
    assert [ungrouped.validation(fold).test.names for fold in range(4)] == [tuple(t) for t in ("dh", "cg", "bf", "ae")]


@pytest.mark.parametrize("groups", [{"one": "abcde"}, {"one": "ab", "two": "c"}])
def test_too_few_classes_to_hold_some_out(tiny: Dataset, groups: dict[str, str]) -> None:
    pictures = iter(blots(5, 0))
    train = in_memory({group: {name: next(pictures) for name in names} for group, names in groups.items()})
    with pytest.raises(ValueError, match="too few to hold some out"):
        Dataset("glyphs", DRAWINGS, train, tiny.test).validation(0)


# Methods


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_mining_by_distance_finds_the_farthest_positive_and_the_nearest_negatives(mode: Any) -> None:
    feats = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    quads = mine_by_distance(feats, labels, mode)
    unit = torch.nn.functional.normalize(feats.double(), dim=1)
    distance = torch.cdist(unit, unit)
    for i, j, k, l in zip(*(field.tolist() for field in quads[:4]), strict=True):  # noqa: E741
        others = labels != labels[i]
        assert k == distance[i].masked_fill(~others, torch.inf).argmin()
        assert l == distance[j].masked_fill(~others, torch.inf).argmin()
        if mode == "anchor":
            assert j == distance[i].masked_fill(others, -torch.inf).argmax()
    assert len(quads.i) == {"batch": 1, "anchor": 12, "pair": 18}[mode]


def test_a_unit_that_starts_by_distance_ranks_by_it() -> None:
    made = objective(Settings(method="pddm-pair", dim=16, unit_start="distance"))
    assert made.unit is not None
    feats = torch.nn.functional.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    i, j = torch.triu_indices(60, 60, 1)
    scores, distances = pddm_ext.score_matrix(feats, made.unit)[i, j].detach(), torch.cdist(feats, feats)[i, j]
    ranks = torch.stack([scores.argsort().argsort(), distances.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] < -0.9
    assert scores[distances.argmin()] > scores[distances.argmax()]


def test_first_updates_can_be_mined_by_distance(tiny: Dataset) -> None:
    made = objective(Settings(method="pddm-anchor", dim=8, distance_steps=1, accumulate=2))
    feats, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(3)
    mined = []
    made.loss.similarity = lambda quads: (mined.append(quads), quads.s_ij.sum())[1]  # type: ignore[method-assign]
    for _ in range(3):  # two batches of the first update, and one of the second
        made(feats, labels)
    by_distance, by_score = mine_by_distance(feats, labels, "anchor"), made.mine(feats, labels)
    assert not all(torch.equal(one, other) for one, other in zip(by_distance[:4], by_score[:4], strict=True))
    for quads, expected in zip(mined, (by_distance, by_distance, by_score), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(quads[:4], expected[:4], strict=True))
        scores = pddm_ext.score_pairs(feats, quads.i, quads.j, made.unit)
        torch.testing.assert_close(quads.s_ij, scores)
        torch.testing.assert_close(quads.s_jl, pddm_ext.score_pairs(feats, quads.j, quads.l, made.unit))


@pytest.mark.parametrize("flows", [True, False])
def test_the_score_loss_trains_the_embedding_only_if_asked(flows: bool) -> None:
    made = objective(Settings(method="pddm-pair", dim=8, unit_gradient=flows))
    feats = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms = made(feats, torch.arange(4).repeat(3))
    assert terms["score"] > 0
    terms["score"].backward()
    assert (feats.grad is not None and feats.grad.abs().sum() > 0) == flows
    assert made.unit.u.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        *((method, {}) for method in METHODS),
        *((method, {"density": 0.1, "structure": 0.3}) for method in ("pddm-anchor", "multi-similarity")),
    ],
)
def test_each_method_trains(tiny: Dataset, method: str, terms: dict[str, Any]) -> None:
    """Every parameter moves, and on a fixed batch the loss comes down."""
    run = Run(Settings(**TINY, method=method, lr=3e-3, **terms), tiny)
    assert (run.learner.unit is not None) == (method.startswith("pddm-") or method == "recommended")
    before = {name: value.clone() for name, value in run.learner.named_parameters()}
    pictures, labels = pictures_of(tiny)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)  # the same noise, where a method has some
        loss = sum(run.learner(pictures, labels).values())
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in run.learner.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", ["euclidean-anchor", "multi-similarity"])
def test_density_and_structure_are_terms_beside_any_loss(tiny: Dataset, method: str) -> None:
    common = {**TINY, "method": method}
    plain, both = (
        Run(Settings(**common, **more), tiny).learner
        for more in ({}, {"density": 0.1, "density_ratio": 0.7, "structure": 0.3, "clusters": 3})
    )
    pictures, labels = pictures_of(tiny)
    terms, bare = both(pictures, labels), plain(pictures, labels)
    feats, structure = both.net.both(pictures)
    assert structure is not None
    expected = {
        **bare,
        "density": 0.1 * pddm_ext.DensityRegularizer(0.7)(feats, labels),
        "structure": 0.3 * pddm_ext.MultiClusterRankingLoss(3)(feats, structure),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert plain.net.both(pictures)[1] is None
    assert {name for name, _ in both.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "net.structure.linear.weight",
        "net.structure.linear.bias",
    }


@pytest.mark.parametrize("method", METHODS)
def test_divergence_of_any_method_is_said(tiny: Dataset, method: str) -> None:
    with pytest.raises(FloatingPointError, match="embedding is not finite after 2 steps"):
        trained(tiny, method=method, lr=1e30)


def test_every_method_starts_from_the_same_net_and_torchs_generator_is_left_alone(tiny: Dataset) -> None:
    before = torch.random.get_rng_state()
    nets = [Run(Settings(**TINY, method=method), tiny).learner.net.state_dict() for method in METHODS]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(not differences(nets[0], net) for net in nets)
    units = [objective(Settings(**TINY, method=method)).state_dict() for method in METHODS if "pddm" in method]
    assert all(not differences(units[0], unit) for unit in units)
    other = Run(Settings(**TINY, seed=1), tiny).learner.net.state_dict()
    assert "/backbone.0.weight" in differences(nets[0], other)


def test_the_unit_has_a_learning_rate_of_its_own(tiny: Dataset) -> None:
    run = Run(Settings(**TINY, method="pddm-pair", lr=0.01, unit_lr_factor=5.0), tiny)
    net, unit = run.optimizer.param_groups
    assert (net["lr"], unit["lr"]) == (0.01, pytest.approx(0.05))
    assert net["weight_decay"] == unit["weight_decay"] == 5e-4
    assert run.learner.unit is not None
    assert {id(p) for p in unit["params"]} == {id(p) for p in run.learner.unit.parameters()}
    assert {id(p) for p in net["params"]} == {id(p) for p in run.learner.net.parameters()}
    alone = Run(Settings(**TINY, method="n-pair", weight_decay=0.0), tiny)
    assert [group["weight_decay"] for group in alone.optimizer.param_groups] == [0]


# Updates


def test_accumulated_batches_are_updated_by_the_mean_of_their_gradients(tiny: Dataset) -> None:
    changed = {"method": "contrastive", "augment": False, "every": 1, "steps": 1, "accumulate": 2}
    run = Run(Settings(**{**TINY, **changed}), tiny)
    start = run.learner.state_dict()
    seen: list[tuple[Tensor, Tensor]] = []
    run.learner.register_forward_pre_hook(lambda module, given: seen.append(given))
    gradients = []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in run.learner.parameters() if p.grad is not None])
    )
    start = {name: value.clone() for name, value in start.items()}
    run.train(progress=False)
    assert len(seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])
    expected = Run(run.settings, tiny).learner
    expected.load_state_dict(start)
    (sum(sum(expected(*given).values()) for given in seen) / 2).backward()
    for got, parameter in zip(gradients[0], expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-7)
    assert run.curves["loss"] == [pytest.approx(sum(sum(expected(*given).values()) for given in seen).item() / 2)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("cosine", 0, [(1 + math.cos(step * math.pi / 8)) / 2 for step in range(8)]),
        ("cosine", 2, [(1 + math.cos(step * math.pi / 8)) / 2 * (1 if step else 0.5) for step in range(8)]),
    ],
)
def test_learning_rates_follow_their_schedule(tiny: Dataset, schedule: str, warmup: int, factors: list[float]) -> None:
    changed = {**TINY, "steps": 8, "every": 4, "lr": 0.01, "method": "pddm-batch", "unit_lr_factor": 3.0}
    run = Run(Settings(**changed, schedule=schedule, warmup=warmup), tiny)
    rates: list[list[float]] = []
    run.optimizer.register_step_pre_hook(lambda *_: rates.append([g["lr"] for g in run.optimizer.param_groups]))
    run.train(progress=False)
    assert [net for net, _ in rates] == pytest.approx([0.01 * factor for factor in factors])
    assert [unit for _, unit in rates] == pytest.approx([0.03 * factor for factor in factors])


def test_augment_decides_what_the_net_sees(tiny: Dataset) -> None:
    plain = DRAWINGS.plain(tiny.train.pictures[torch.arange(32)])

    def known(augment: bool) -> list[bool]:
        run = Run(Settings(**TINY, augment=augment), tiny)
        seen: list[Tensor] = []
        run.learner.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        run.train(progress=False)
        return [bool((plain == picture).flatten(1).all(1).any()) for picture in torch.cat(seen)]

    assert all(known(False))
    assert not any(known(True))


def test_a_short_run_on_glyphs_learns(characters: Dataset) -> None:
    run = Run(Settings(steps=80, every=80, accelerator="cpu"), characters)
    run.train(progress=False)
    pixels = run.test[torch.arange(len(run.test))].flatten(1)
    assert run.curves["recall"][-1] > recall_at_k(pixels, run.test.labels)[1] + 0.05


def test_the_same_seed_gives_the_same_run(tiny: Dataset) -> None:
    one, same, other = (trained(tiny, seed=seed).learner.state_dict() for seed in (1, 1, 2))
    assert not differences(one, same)
    assert differences(one, other)


# Runs that stop and continue


def dropping() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 16), nn.ReLU())


@pytest.mark.parametrize(
    ("changed", "backbone"),
    [
        ({"method": "pddm-anchor"}, None),
        ({"method": "recommended"}, None),
        ({"method": "triplet-all", "density": 0.1, "structure": 0.3}, None),
        ({"method": "multi-similarity-mined", "accumulate": 2}, None),
        ({"method": "triplet-semihard", "augment": False}, None),
        ({"method": "pddm-pair", "schedule": "cosine", "warmup": 3, "accumulate": 2}, None),
        ({"method": "pddm-anchor", "precision": "bf16-mixed"}, None),
        ({"method": "contrastive", "precision": "64-true"}, None),
        ({"method": "pddm-batch"}, dropping),
    ],
)
def test_a_resumed_run_ends_at_the_same_bits(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    backbone: Callable[[], nn.Module] | None,
) -> None:
    def train(name: str) -> Run:
        return trained(tiny, tmp_path / name, None if backbone is None else backbone(), **changed)

    whole = train("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * changed.get("accumulate", 1))
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert checkpoint.load(tmp_path / "stopped" / CHECKPOINT)["taken"] == 2
    torch.manual_seed(99)  # whatever the process did in between
    stopped = train("stopped")
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert states[0]["taken"] == 6
    assert not differences(*states)
    assert untimed(outcome.figures(stopped)) == untimed(outcome.figures(whole))


@pytest.mark.parametrize("method", ["pddm-anchor", "recommended"])
def test_a_finished_run_can_be_made_longer(tiny: Dataset, tmp_path: Path, method: str) -> None:
    """From a step between two evaluations, too; each stop is one measurement more."""
    trained(tiny, tmp_path / "whole", steps=7, every=3, accumulate=2, method=method)
    for steps in (2, 4, 7):
        trained(tiny, tmp_path / "grown", steps=steps, every=3, accumulate=2, method=method)
    whole, grown = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "grown"))
    for part in ("learner", "optimizer", "generators", "taken"):
        assert not differences(whole[part], grown[part]), part
    assert whole["curves"]["step"] == [3, 6, 7]
    assert grown["curves"]["step"] == [2, 3, 4, 6, 7]


def test_stopping_and_resuming_on_the_command_line(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", *TINY_OPTIONS, "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert cli.main(options) == 130
    assert "stopped after 1 steps; no checkpoint yet" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert cli.main(options) == 130
    assert f"stopped after 3 steps; {tmp_path / 'stopped' / CHECKPOINT} is there" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert scalars(tmp_path / "stopped")["step"] == [(2, 2)]  # what was measured is on the disk
    assert cli.main([*options, "--resume"]) == 0
    assert cli.main([*options[:-1], str(tmp_path / "whole")]) == 0
    stopped, whole = (outcome.read(tmp_path / name) for name in ("stopped", "whole"))
    assert stopped is not None
    assert whole is not None
    assert untimed(stopped) == untimed(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", "0.5"], "--lr was 0.001 and is 0.5 now"),
        (["--unit-lr-factor", "7"], " and is 7.0 now"),
        (["--method", "pddm-pair"], "--method was pddm-anchor and is pddm-pair now"),
        (["--no-augment"], "--augment was True and is False now"),
        (["--steps", "1"], "has taken 2 steps; --steps is 1"),
    ],
)
def test_resuming_under_other_options_names_them(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    content = (tmp_path / CHECKPOINT).read_bytes()
    assert cli.main(["train", *TINY_OPTIONS, *changed, "--out", str(tmp_path), "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == content
    assert not (tmp_path / CONFIG).exists()


def test_a_cosine_schedule_cannot_be_made_longer(tiny: Dataset, tmp_path: Path) -> None:
    """Its first steps would have been others."""
    trained(tiny, tmp_path, steps=2, schedule="cosine")
    with pytest.raises(ValueError, match="--steps was 2 and is 6 now"):
        trained(tiny, tmp_path, schedule="cosine")


def test_resuming_on_other_pictures_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2)
    for other in (
        Dataset("glyphs", DRAWINGS, tiny.train, tiny.train, distort_test=True),
        Dataset("glyphs", DRAWINGS, tiny.train.classes(torch.arange(7)), tiny.test, distort_test=True),
    ):
        with pytest.raises(ValueError, match="saw other pictures than --data glyphs has now"):
            Run(Settings(**TINY), other, tmp_path).resume()


def test_weights_of_another_net_are_refused(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: its weights do not fit the net"):
        Run(Settings(**TINY), tiny, tmp_path, backbone=dropping()).resume()


# Checkpoints


def test_a_missing_or_damaged_checkpoint_is_named(tiny: Dataset, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt: no checkpoint"):
        Run(Settings(**TINY), tiny, tmp_path).resume()
    trained(tiny, tmp_path, steps=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "tensorboard"]  # nothing temporary
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
            checkpoint.load(path)
    for other in ({"weights": torch.zeros(1)}, [1], {"format": checkpoint.FORMAT, "settings": {}}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not a checkpoint of format"):
            checkpoint.load(path)


class Creates:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny, tmp_path, steps=2)
    path, mark = tmp_path / CHECKPOINT, tmp_path / "mark"
    torch.save({**checkpoint.load(path), "precision": Creates(mark)}, path)
    assert cli.main(["eval", str(path)]) == 2
    assert f"{path}: not a readable checkpoint" in capsys.readouterr().err
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert mark.exists()


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write_bytes(path, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_bytes(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# What a run leaves behind


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_train_leaves_behind(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert cli.main(["train", *TINY_OPTIONS, "--steps", "5", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    for text in ("train on 8 classes, 32 pictures: one, two", "search among 5 classes, 20 pictures: three"):
        assert text in printed.out
    for text in ("Recall@1", "Recall@8", "MAP@R", "by distance", "by score", "re-ranked", f"run: {folder}"):
        assert text in printed.out
    assert "5/5" in printed.err  # the progress bar
    assert sorted(file.name for file in folder.iterdir()) == [CHECKPOINT, CONFIG, "metrics.json", "tensorboard"]

    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics["data"] == {
        "train": {"classes": 8, "from": ["one", "two"], "pictures": 32},
        "test": {"classes": 5, "from": ["three"], "pictures": 20},
    }
    assert set(metrics["results"]) == {"distance", "score", "rerank"}
    assert metrics["curves"]["step"] == [2, 4, 5]
    assert {len(curve) for curve in metrics["curves"].values()} == {3}
    assert metrics["curves"]["recall"][-1] == pytest.approx(metrics["results"]["distance"]["recall"]["1"]["value"])
    assert metrics["spread"] == pytest.approx(metrics["curves"]["spread"][-1])
    assert metrics["collapsed"] == (metrics["spread"] < loop.COLLAPSED)
    assert metrics["environment"]["device"] == "cpu"
    assert metrics["environment"]["threads"] == 1

    logged = scalars(folder)
    assert logged.keys() == metrics["curves"].keys()
    for name, curve in metrics["curves"].items():
        assert [step for step, _ in logged[name]] == [2, 4, 5]
        assert [value for _, value in logged[name]] == pytest.approx(curve, rel=1e-6), name


def test_eval_prints_and_writes_the_figures_of_the_run(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--precision", "64-true", "--structure", "0.3", "--out", str(tmp_path)]
    assert cli.main(["train", *TINY_OPTIONS, *options]) == 0
    table = capsys.readouterr().out.split("three\n")[1].split("run: ")[0]
    assert all(heading in table for heading in ("by distance", "by score", "re-ranked", "by structure"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["eval", str(tmp_path / CHECKPOINT), "--json", str(tmp_path / "again.json")]) == 0
    assert capsys.readouterr().out == table
    again, metrics = (json.loads((tmp_path / name).read_text()) for name in ("again.json", "metrics.json"))
    assert again == metrics
    assert cli.main(["eval", str(tmp_path / CHECKPOINT), "--accelerator", "nonsense"]) == 2
    assert "--accelerator nonsense is not to be had" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "again.json"])


def test_eval_finds_data_that_have_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = make_archive(tmp_path / "small.zip")
    options = ["--data", "omniglot", "--root", str(archive), *TINY_OPTIONS, "--out", str(tmp_path / "run")]
    assert cli.main(["train", *options]) == 0
    assert "search among 6 classes, 24 pictures: D, E" in capsys.readouterr().out
    archive.rename(tmp_path / "moved.zip")
    path = str(tmp_path / "run" / CHECKPOINT)
    assert cli.main(["eval", path]) == 2
    assert str(archive) in capsys.readouterr().err
    assert cli.main(["eval", path, "--root", str(tmp_path / "moved.zip")]) == 0
    assert "Recall@1" in capsys.readouterr().out


def test_an_earlier_run_is_not_overwritten(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert cli.main(["train", *TINY_OPTIONS, "--lr", "0.01", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a run; --resume continues it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    assert outcome.read(tmp_path) is None
    for damaged in ("", "{", "[]", '{"settings": {}}', "\udcff"):
        (tmp_path / "metrics.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"metrics\.json: not the figures of a finished run .* delete it"):
            outcome.read(tmp_path)


def test_a_collapse_is_said_once(tiny: Dataset) -> None:
    """Weights that decay far faster than they learn leave one point for all pictures."""
    run = Run(Settings(**{**TINY, "steps": 30, "every": 5}, method="pddm-batch", lr=0.05, weight_decay=1e4), tiny)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(progress=False)
    said = [str(warning.message) for warning in caught if warning.category is CollapseWarning]
    low = [value < loop.COLLAPSED for value in run.curves["spread"]]
    assert len(said) == sum(now and not before for before, now in zip([False, *low], low, strict=False)) == 1
    at = low.index(True)
    assert said[0].startswith(
        f"after {run.curves['step'][at]} steps the embedding has collapsed: its spread is "
        f"{run.curves['spread'][at]:.4f}, its effective rank {run.curves['effective_rank'][at]:.1f} of 8"
    )
    assert low[-1]
    assert outcome.figures(run)["collapsed"]


# Backbones


def test_a_backbone_of_ones_own_is_trained_and_measured_in_evaluation_mode(tiny: Dataset) -> None:
    backbone = dropping()
    before = [parameter.clone() for parameter in backbone.parameters()]
    run = trained(tiny, backbone=backbone)
    for one, parameter in zip(before, backbone.parameters(), strict=True):
        assert not torch.equal(one, parameter)
    assert torch.equal(embed(run.learner.net, run.test), embed(run.learner.net, run.test))
    assert run.learner.net.training


class Quadratic(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures[:, 0]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Quadratic(), r"gives \(1, 32, 32\) for one picture; features of shape \(1, f\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), r"does not take pictures of shape \(1, 32, 32\)"),
    ],
)
def test_a_backbone_that_does_not_fit_is_told(tiny: Dataset, backbone: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(Settings(**TINY), tiny, backbone=backbone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "convnet, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted"),
        ("timm/", "convnet, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted"),
        ("collections:NoSuchThing", "--backbone collections:NoSuchThing: .*NoSuchThing"),
        ("collections:OrderedDict", "gives OrderedDict; a torch.nn.Module is accepted"),
    ],
)
def test_bad_backbone_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(Settings(backbone=name), (1, 32, 32))


@pytest.fixture
def module_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``mine:net``, whose import leaves a mark."""
    mark = tmp_path / "imported"
    (tmp_path / "mine_for_a_test.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(mark)!r}).touch()\n"
        "def net():\n    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 16), nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_a_test", raising=False)
    return mark


def test_eval_runs_a_backbones_code_only_when_confirmed(
    tiny: Dataset, tmp_path: Path, module_of_mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = "mine_for_a_test:net", str(tmp_path / "run" / CHECKPOINT)
    assert cli.main(["train", *TINY_OPTIONS, "--backbone", name, "--out", str(tmp_path / "run")]) == 0
    del sys.modules["mine_for_a_test"]
    module_of_mine.unlink()
    for unconfirmed in ([], ["--backbone", "mine_for_a_test:other"]):
        assert cli.main(["eval", path, *unconfirmed]) == 2
        assert f"confirm with --backbone {name}" in capsys.readouterr().err
        assert not module_of_mine.exists()
    assert cli.main(["eval", path, "--backbone", name, "--json", str(tmp_path / "again.json")]) == 0
    assert module_of_mine.exists()
    assert json.loads((tmp_path / "again.json").read_text()) == outcome.read(tmp_path / "run")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_backbone_library_that_is_missing_is_named(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    for module in (library, f"{library}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    options = ["train", *TINY_OPTIONS, "--backbone", f"{library}/resnet18", "--out", str(tmp_path / "out")]
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert f"this needs {library}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# The command line


def test_config_repeats_a_run_and_options_override_it(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "contrastive", "--no-augment", "--lr", "0.002", "--seed", "3"]
    assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "first")]) == 0
    config = tmp_path / "first" / CONFIG
    given = json.loads(config.read_text())
    assert given == {**Settings(**TINY).__dict__, "method": "contrastive", "augment": False, "lr": 0.002, "seed": 3}
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "again")]) == 0
    first, again = (outcome.read(tmp_path / name) for name in ("first", "again"))
    assert first is not None
    assert again is not None
    assert untimed(first) == untimed(again)
    assert (tmp_path / "again" / CONFIG).read_bytes() == config.read_bytes()

    changed = ["--config", str(config), "--steps", "2", "--augment", "--lr", "1"]
    assert cli.main(["train", *changed, "--out", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / CONFIG).read_text()) == {**given, "steps": 2, "augment": True, "lr": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps": 5', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a JSON object of settings"),
        (b'{"step": 5}', "'step' is no setting; data, root"),
        (b'{"steps": "5"}', "steps is '5'; a value of type int is accepted"),
        (b'{"steps": 5.0}', "steps is 5.0; a value of type int is accepted"),
        (b'{"steps": true}', "steps is True; a value of type int is accepted"),
        (b'{"augment": 1}', "augment is 1; a value of type bool is accepted"),
        (b'{"lr": null}', "lr is None; a value of type float is accepted"),
        (b'{"lr": NaN}', "--lr is nan; a positive finite number is accepted"),
        (b'{"method": "triplet"}', "--method is 'triplet'; recommended, pddm-batch"),
        (b'{"precision": "fp8"}', "--precision is 'fp8'; 32-true"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_bad_config_fails_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: pytest.fail("work was begun"))
    config = tmp_path / "config.json"
    if content is not None:
        config.write_bytes(content)
    assert cli.main([command, "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "omniglot"], "--data omniglot needs --root"),
        (["--root", "somewhere"], "--data glyphs has no --root"),
        (["--download"], "--download fetches cub200, cars196 and sop; --data is glyphs"),
        (["--steps", "0"], "--steps is 0; at least 1 is accepted"),
        (["--classes", "1"], "--classes is 1; at least 2 is accepted"),
        (["--classes", "999"], "--classes is 999; glyphs has 8 to train on"),
        (["--samples", "1"], "--samples is 1; at least 2 is accepted"),
        (["--accumulate", "0"], "--accumulate is 0; at least 1 is accepted"),
        (["--dim", "0"], "--dim is 0; at least 1 is accepted"),
        (["--devices", "0"], "--devices is 0; at least 1 is accepted"),
        (["--workers", "-1"], "--workers is -1; at least 0 is accepted"),
        (["--warmup", "-1"], "--warmup is -1; at least 0 is accepted"),
        (["--lr", "nan"], "--lr is nan; a positive finite number is accepted"),
        (["--unit-lr-factor", "-1"], "--unit-lr-factor is -1.0; a positive finite number is accepted"),
        (["--weight-decay", "inf"], "--weight-decay is inf; a finite number from 0 is accepted"),
        (["--density", "-1"], "--density is -1.0; a finite number from 0 is accepted"),
        (["--density-ratio", "0"], "--density-ratio is 0.0; a positive finite number is accepted"),
        (["--structure", "nan"], "--structure is nan; a finite number from 0 is accepted"),
        (["--clusters", "1"], "--clusters is 1; at least 2 is accepted"),
        (["--margin", "-0.1"], "--margin is -0.1; a finite number from 0 is accepted"),
        (["--seed", "-1"], "--seed is -1; at least 0 is accepted"),
        (["--seed", str(2**32)], "less than 2**32 is accepted"),
        (["--every", "0"], "--every is 0; at least 1 is accepted"),
        (["--backbone", "resnet"], "--backbone is 'resnet'"),
        (["--pretrained"], "--pretrained is for timm and torchvision backbones; --backbone is convnet"),
        (
            ["--data", "folder", "--root", "x"],
            "--backbone convnet is for drawings (glyphs, omniglot); for --data folder",
        ),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_bad_options_fail_before_any_work(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupt_anywhere_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "load", load)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_choices_are_named_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--method", "--data", "--schedule", "--precision"):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", option, "nonsense"])
        assert left.value.code == 2
        assert f"argument {option}: invalid choice: 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("accelerator", ["nonsense", "mps" if not torch.backends.mps.is_available() else "tpu"])
def test_an_accelerator_that_is_not_there_is_named(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: str
) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--accelerator", accelerator, "--out", str(tmp_path)]) == 2
    assert f"error: --accelerator {accelerator} is not to be had" in capsys.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()


def test_too_few_test_pictures_are_told(tiny: Dataset) -> None:
    few = Dataset("folder", DRAWINGS, tiny.train, tiny.test.classes(torch.arange(2)))
    with pytest.raises(ValueError, match="folder has 8 test pictures; Recall@8 needs more"):
        Run(Settings(**TINY), few)


def test_an_output_folder_that_is_a_file_is_named(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_divergence_ends_the_command(tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_OPTIONS, "--lr", "1e30", "--out", str(tmp_path)]) == 2
    assert "embedding is not finite after 2 steps; lower --lr" in capsys.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()
    assert not (tmp_path / "metrics.json").exists()


def test_info_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    build = pddm_ext._C.build_info()
    for text in (pddm_ext.__version__, torch.__version__, build["compiler"], build["stable_abi"], "CUDA", "threads"):
        assert text in out
    for name in pddm_ext._C.cpu_capabilities():
        assert name in out


def test_info_and_help_need_no_training_extra_and_train_says_how_to_get_them() -> None:
    program = """
import sys
for extra in ("matplotlib", "PIL", "tqdm", "sklearn", "scipy", "jinja2", "faiss", "lightning_fabric", "tensorboard"):
    sys.modules[extra] = None
sys.modules["pytorch_metric_learning"] = None
from pddm_ext.workbench import cli
assert cli.main(["info"]) == 0
try:
    cli.main(["compare", "--help"])
except SystemExit as left:
    assert left.code == 0
sys.exit(cli.main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "instruction sets" in done.stdout
    assert "--unit-lr-factor" in done.stdout
    assert "pip install 'pddm-ext[train]'" in done.stderr
    assert "Traceback" not in done.stderr


# Several processes

_ON_TWO = """
import os, sys
import torch
from pddm_ext.workbench import cli
from pddm_ext.workbench import checkpoint, loop

train, forward = loop.Run.train, loop.Learner.forward
seen = []

def kept(self, **changed):
    train(self, **changed)
    name = f"{sys.argv[1]}-{os.environ.get('LOCAL_RANK', '0')}.pt"
    torch.save({"learner": self.learner.state_dict(), "seen": seen, "leads": self.leads}, name)

def noted(self, pictures, labels):
    seen.append(pictures)
    return forward(self, pictures, labels)

save = checkpoint.save

def kept_too(path, state):
    save(path, state)
    save(path.with_name(f"after-{state['taken']}.pt"), state)

loop.Run.train, loop.Learner.forward, checkpoint.save = kept, noted, kept_too
torch.set_num_threads(1)
sys.exit(cli.main(sys.argv[2:]))
"""


def on_two(tmp_path: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(_ON_TWO)
    data = ["--data", "omniglot", "--root", str(tmp_path / "small.zip"), "--out", str(tmp_path / name)]
    given = ["train", *TINY_OPTIONS, *data, "--devices", "2", "--method", "recommended", *options]
    command = [sys.executable, "script.py", name, *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_two_processes_train_one_net_and_continue(tmp_path: Path) -> None:
    make_archive(tmp_path / "small.zip")
    for name, resume in (("whole", []), ("parts", ["--resume"])):
        done = on_two(tmp_path, name, "--steps", "4", *resume)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("MAP@R") == 1
        if not resume:
            (tmp_path / "parts").mkdir()
            shutil.copy(tmp_path / "whole" / "after-2.pt", tmp_path / "parts" / CHECKPOINT)
    one, two = (torch.load(tmp_path / f"whole-{rank}.pt") for rank in (0, 1))
    assert (one["leads"], two["leads"]) == (True, False)
    assert len(one["seen"]) == len(two["seen"]) == 4
    assert not torch.equal(one["seen"][0], two["seen"][0])  # each has batches of its own
    # Batch normalisation's running means are each process's own after its last batch; the first one's are kept.
    parameters = [name for name in differences(one["learner"], two["learner"]) if "running" not in name]
    assert not parameters
    metrics = outcome.read(tmp_path / "whole")
    assert metrics is not None
    assert metrics["curves"]["step"] == [2, 4]
    for rank in (0, 1):
        whole, parts = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "parts"))
        assert not differences(whole["seen"][2:], parts["seen"]), rank
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "parts")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert not differences(*states)


def test_divergence_ends_every_process(tmp_path: Path) -> None:
    make_archive(tmp_path / "small.zip")
    done = on_two(tmp_path, "diverged", "--lr", "1e30")
    assert done.returncode == 2
    assert "embedding is not finite after 2 steps" in done.stderr
    assert not (tmp_path / "diverged" / "metrics.json").exists()
