"""Data as a run meets them: chosen by name, split into classes, drawn in batches."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from pddm_ext.workbench.data import augment, glyphs
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset, TestSet, batches, in_memory
from pddm_ext.workbench.settings import Settings
from runs import blots, differences
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
