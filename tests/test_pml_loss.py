"""pytorch-metric-learning: the quadruplet loss and the density regularizer, with its miners, reducers and wrappers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor

import pddm_ext
from helpers import (
    DEVICE,
    FLOATS,
    MODES,
    assert_same_bits,
    counters,
    make_features,
    make_unit,
    on_one_thread,
    reset_counters,
)
from pddm_ext import reference
from pddm_ext.adapters.pml import DensityRegularizer, PDDMMiner, PDDMSimilarity, QuadrupletLoss
from pml_truth import (
    MIXED,
    PAIRED,
    TOLERANCE,
    D,
    copied,
    gradients,
    labels_of,
    listed,
    loss_of,
    with_density,
)

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
    quads = copied(unit).mine(x, y, mode=mode, ref_feats=r, ref_labels=ry)
    assert listed(PDDMMiner(unit, mode)(x, y, r, ry)) == listed(tuple(field[quads.valid] for field in quads[:3]))
    expected = reference.QuadrupletLoss()(x, quads, ref_feats=r)
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
