"""pytorch-metric-learning: its triplets are those of the quadruplets, of a batch and of a reference."""

from __future__ import annotations

import pytest
import torch

import pddm_ext
from helpers import DEVICE, MODES, assert_same_bits, make_features, make_unit, on_one_thread
from pddm_ext import reference
from pddm_ext.adapters.pml import PDDMMiner, PDDMSimilarity, QuadrupletLoss
from pml_truth import MIXED, PAIRED, D, copied, labels_of, listed, lowest_with_itself, mined_by_loops
from truth import truth


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


def test_an_anchor_is_not_spent_on_itself():
    unit, y = lowest_with_itself(), labels_of(0, 0, 1, 1, 2)
    x = make_features(5, D)
    r, ry = torch.cat([make_features(3, D, seed=1), x]), torch.cat([labels_of(0, 1, 0), y])
    s = truth(x, unit, r)
    assert (s[torch.arange(5), torch.arange(5) + 3] == 0).all()
    found = listed(PDDMMiner(unit)(x, y, r, ry))
    expected = mined_by_loops(s, y, ry, "anchor", lambda i, j: j == i + 3)
    assert found == expected  # one has no other positive
    (only,) = listed(PDDMMiner(unit, "batch")(x, y, r, ry))
    assert [only] == mined_by_loops(s, y, ry, "batch", lambda i, j: j == i + 3)
    assert set(listed(PDDMMiner(unit, "pair")(x, y, r, ry))) == set(
        mined_by_loops(s, y, ry, "pair", lambda i, j: j == i + 3)
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
