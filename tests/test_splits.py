"""Data as a run meets them: chosen by name, split into classes, drawn in batches."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pddm_ext.workbench.data import augment, glyphs, splits
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset, TestClasses, TestSet, batches, in_memory
from pddm_ext.workbench.evaluation import evaluate
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings
from runs import TINY, blots, differences, seen_by, with_gallery
from small_data import PUBLISHED, make_folder, make_omniglot, scatter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [*PUBLISHED, "folder", "omniglot", "glyphs"])
def test_settings_pick_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name in PUBLISHED:
        scatter(tmp_path, PUBLISHED[name][0]())
    elif name == "folder":
        make_folder(tmp_path)
    elif name == "omniglot":
        make_omniglot(tmp_path / "images_background_small1.zip")
    else:
        # Drawing them takes seconds and is tested elsewhere.
        monkeypatch.setattr(glyphs, "load", lambda: Dataset("glyphs", augment.DRAWINGS, None, None))  # type: ignore[arg-type]
    root = "" if name == "glyphs" else str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert by_name.load(Settings(data=name, root=root)).name == name
    if name not in PUBLISHED:
        with pytest.raises(ValueError, match=f"--download fetches cub200, cars196 and sop; --data is {name}"):
            by_name.load(Settings(data=name, root=root, download=True))


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
    assert [pictures.shape for pictures, *_ in drawn] == [(18, 1, 64, 64)] * 5
    for pictures, labels, picked in drawn:
        assert torch.equal(pictures, tiny.train.pictures[picked])
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


# Known classes, few labels and wrong ones


def test_drawings_of_known_classes(tmp_path: Path) -> None:
    """All characters are on both sides: of each the last drawing by name, one of four, is searched for."""
    archive = make_omniglot(tmp_path / "images_background_small1.zip")
    unseen = by_name.load(Settings(data="omniglot", root=str(archive)))
    known = by_name.load(Settings(data="omniglot", root=str(archive), split="known"))
    assert known.protocol == "known"
    assert known.gallery is known.train
    assert not known.distort_test
    assert known.train.names == (*unseen.train.names, *unseen.test.names)
    assert torch.bincount(known.train.labels).tolist() == [3] * 15
    assert known.test.labels.tolist() == list(range(15))
    assert torch.equal(known.test.pictures[torch.tensor([0])], unseen.train.pictures[torch.tensor([3])])
    assert torch.equal(known.test.pictures[torch.tensor([14])], unseen.test.pictures[torch.tensor([23])])
    assert known.train.groups == (*unseen.train.groups, *unseen.test.groups)
    test = TestSet(known, 0)
    assert (len(test.queries), len(test.gallery)) == (15, 45)
    # Neither side, nor what is chosen by, has a drawing of another.
    assert len({known.digest(), unseen.digest()}) == 2
    with pytest.raises(ValueError, match="has the same classes on both sides already"):
        known.known()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_few_labels(tiny: Dataset, share: float) -> None:
    few = tiny.train.thinned(share, 3)
    assert torch.bincount(few.labels).tolist() == [max(2, round(4 * share))] * 8
    assert few.names == tiny.train.names
    assert few.digest == tiny.train.thinned(share, 3).digest
    assert (few.digest == tiny.train.thinned(share, 4).digest) == (share == 1)


def test_holding_pictures_out_leaves_what_is_searched_among_whole(tiny: Dataset) -> None:
    rows = torch.arange(80)
    train = replace(tiny.train, pictures=tiny.train.pictures[rows % 32], labels=tiny.train.labels[rows % 32])
    data = replace(tiny, train=train, test=tiny.train, gallery=train, protocol="known")
    held = data.hold_out(0)
    assert held.val is not None
    assert len(held.train.labels) + len(held.val.labels) == 80
    assert held.gallery is train
    # Validation pictures are not among what they are searched for in, nor where a setting is chosen by them.
    for selecting in (held.selecting(), data.validation(0)):
        assert selecting is not None
        assert selecting.gallery is not None
        assert selecting.gallery.digest == held.train.digest
        again = selecting.hold_out(1)
        assert again.gallery is selecting.gallery
        chosen = again.selecting()
        assert chosen is not None
        assert chosen.gallery is again.train


@pytest.mark.parametrize("share", [0.2, 0.4, 0.0])
def test_wrong_labels(tiny: Dataset, share: float) -> None:
    split = tiny.train
    wrong = split.mislabelled(share, 3)
    changed = wrong.labels != split.labels
    assert int(changed.sum()) == round(share * len(split.labels))
    assert wrong.labels.min() >= 0
    assert wrong.labels.max() < len(split.names)
    assert torch.equal(wrong.labels, split.mislabelled(share, 3).labels)
    assert share == 0 or not torch.equal(wrong.labels, split.mislabelled(share, 4).labels)


@pytest.mark.parametrize("protocol", ["known", "seen"])
def test_a_step_is_chosen_among_right_labels(tiny: Dataset, protocol: TestClasses) -> None:
    """Also where validation pictures are searched for among what is trained on, for want of a gallery of theirs."""
    data = with_gallery(tiny)
    data = replace(data, protocol=protocol, gallery=None, test=tiny.test)
    run = Run(Settings(**TINY, label_noise=0.3, patience=2), data)
    selecting = run.dataset.selecting()
    assert selecting is not None
    assert torch.equal(selecting.gallery.labels, data.train.labels)
    assert not torch.equal(run.dataset.train.labels, data.train.labels)


def test_classes_that_wrong_labels_leave_without_pictures_are_told(tiny: Dataset) -> None:
    few = replace(tiny, train=tiny.train.some(torch.arange(0, 32, 4)))
    with pytest.raises(
        ValueError, match=r"--label-noise is 0.9, which leaves \d classes with pictures; --classes is 8"
    ):
        Run(Settings(**{**TINY, "classes": 8}, label_noise=0.9), few)


def test_what_is_searched_among_keeps_its_labels(tiny: Dataset) -> None:
    data = with_gallery(tiny)
    settings = Settings(**TINY, train_share=1.0, label_noise=0.25)
    run = Run(settings, data)
    assert not torch.equal(run.dataset.train.labels, data.train.labels)
    assert torch.equal(run.dataset.gallery.labels, data.train.labels)
    assert torch.equal(run.test.labels, TestSet(data, 0).labels)


def test_validation_classes_are_searched_for_by_their_other_pictures(tiny: Dataset) -> None:
    """Where the data have such, as the Grocery Store Dataset; classes are told by name."""
    rows = torch.arange(32)
    order = torch.tensor([7, 6, 5, 4, 3, 2, 1])  # of other labels, and one class less
    others = tiny.train.some(rows[rows % 4 == 0]).classes(order)
    data = replace(tiny, train=tiny.train.some(rows[rows % 4 > 0]), others=others, distort_test=False)
    assert data.hold_out(0).selecting().gallery.names == data.validation(0).gallery.names
    assert data.digest() != replace(data, others=None).digest()
    for fold in (0, 1):
        held = data.validation(fold)
        assert held.gallery is not None
        assert set(held.test.names) <= set(held.gallery.names)
        assert not set(held.gallery.names) & set(held.train.names)
        test = TestSet(held, 0)
        queries = {test.names[int(label)] for label in test.labels[test.queries]}
        assert queries == set(held.gallery.names) - {tiny.train.names[0]}
        stored = held.test.pictures[torch.arange(len(held.test.labels))]
        for picture, label in zip(stored, held.test.labels, strict=True):
            row = 4 * tiny.train.names.index(held.test.names[int(label)])
            assert torch.equal(picture, tiny.train.pictures[torch.tensor([row])][0])


def test_no_more_processes_read_than_there_are_batches(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Loader(DataLoader[object]):
        def __init__(self, *given: object, num_workers: int, **options: object) -> None:
            started.append(num_workers)
            super().__init__(*given, num_workers=0, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(splits, "DataLoader", Loader)
    monkeypatch.setattr(evaluate, "DataLoader", Loader)
    assert len(list(batches(tiny.train, 4, 3, 2, seed=0, workers=1000))) == 2
    assert len(seen_by(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.zeros(300, 1, 4, 4), workers=1000)) == 300
    assert started == [2, 2]
